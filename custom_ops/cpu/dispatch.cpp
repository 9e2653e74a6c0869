// Chooses the instruction set once and puts the C interface in front of the kernels.
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

namespace qwen1m {

namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const char* wish = getenv("QWEN1M_CPU_ISA");
  const bool narrow = wish && strcmp(wish, "generic") == 0;
  const bool medium = wish && strcmp(wish, "avx2") == 0;
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && !narrow && !medium) return kAvx512;
  if (has_avx2 && !narrow) return kAvx2;
#endif
  return kGeneric;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace qwen1m

const char* qwen1m_cpu_isa() { return qwen1m::kernels().isa; }

#define QWEN1M_FORWARD(name) \
  void qwen1m_cpu_##name(const qwen1m_##name* a) { qwen1m::kernels().name(*a); }
QWEN1M_FORWARD(rotary_table)
QWEN1M_FORWARD(rotate_and_cache)
QWEN1M_FORWARD(rotate_queries)
QWEN1M_FORWARD(dca_prefill)
QWEN1M_FORWARD(dca_decode)
QWEN1M_FORWARD(dca_probe)
QWEN1M_FORWARD(dca_sparse_prefill)
QWEN1M_FORWARD(linear)
QWEN1M_FORWARD(embedding)
QWEN1M_FORWARD(rms_norm)
QWEN1M_FORWARD(silu_mul)
QWEN1M_FORWARD(cast)
QWEN1M_FORWARD(decode_inputs)
QWEN1M_FORWARD(dequantize_pages)
QWEN1M_FORWARD(linear8)
QWEN1M_FORWARD(widen_weight)
QWEN1M_FORWARD(round_rows)
QWEN1M_FORWARD(rms_norm8)
QWEN1M_FORWARD(product8)
QWEN1M_FORWARD(gated_product8)
int qwen1m_cpu_round_weight(const qwen1m_round_weight* a) { return qwen1m::kernels().round_weight(*a); }
