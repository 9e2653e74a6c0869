// What a GPU does in one launch: here one after the other, by way of memory.
#include <memory>

#include "kernels.h"

namespace {

// Uninitialised.
std::unique_ptr<float[]> scratch(int64_t count) { return std::unique_ptr<float[]>(new float[count]); }

}  // namespace

void qwen1m_cpu_gated_linear(const qwen1m_linear* a) {
  const auto gate_up = scratch(a->tokens * a->out_features);
  qwen1m_linear linear = *a;
  linear.y = gate_up.get();
  qwen1m_cpu_linear(&linear);
  const qwen1m_silu_mul silu{gate_up.get(), a->y, a->tokens, a->out_features / 2, QWEN1M_FLOAT32};
  qwen1m_cpu_silu_mul(&silu);
}

void qwen1m_cpu_rotating_linear(const qwen1m_rotating_linear* a) {
  const auto qkv = scratch(a->linear.tokens * a->linear.out_features);
  qwen1m_rotating_linear parts = *a;
  parts.linear.y = qkv.get();
  parts.rotation.qkv = qkv.get();
  qwen1m_cpu_linear(&parts.linear);
  qwen1m_cpu_rotate_and_cache(&parts.rotation);
}
