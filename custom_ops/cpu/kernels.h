// The kernels that exist once for each instruction set, as a table of functions.
#pragma once

#include "qwen1m/attention.h"
#include "qwen1m/keys.h"
#include "qwen1m/step.h"
#include "qwen1m/weight8.h"

namespace qwen1m {

struct Kernels {
  const char* isa;
  void (*rotary_table)(const qwen1m_rotary_table&);
  void (*rotate_and_cache)(const qwen1m_rotate_and_cache&);
  void (*rotate_queries)(const qwen1m_rotate_queries&);
  void (*dca_prefill)(const qwen1m_dca_prefill&);
  void (*dca_decode)(const qwen1m_dca_decode&);
  void (*dca_probe)(const qwen1m_dca_probe&);
  void (*dca_sparse_prefill)(const qwen1m_dca_sparse_prefill&);
  void (*linear)(const qwen1m_linear&);
  void (*embedding)(const qwen1m_embedding&);
  void (*rms_norm)(const qwen1m_rms_norm&);
  void (*silu_mul)(const qwen1m_silu_mul&);
  void (*cast)(const qwen1m_cast&);
  void (*decode_inputs)(const qwen1m_decode_inputs&);
  void (*dequantize_pages)(const qwen1m_dequantize_pages&);
  void (*linear8)(const qwen1m_linear8&);
  void (*widen_weight)(const qwen1m_widen_weight&);
  int (*round_weight)(const qwen1m_round_weight&);
  void (*round_rows)(const qwen1m_round_rows&);
  void (*rms_norm8)(const qwen1m_rms_norm8&);
  void (*product8)(const qwen1m_product8&);
  void (*gated_product8)(const qwen1m_gated_product8&);
};

extern const Kernels kGeneric;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The widest that this machine runs; QWEN1M_CPU_ISA (generic, avx2, avx512) asks for a narrower one.
const Kernels& kernels();

}  // namespace qwen1m
