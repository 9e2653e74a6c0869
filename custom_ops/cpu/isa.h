// Compiles every kernel for one instruction set: types and head sizes are chosen here.
#pragma once

#include "attention.h"
#include "elementwise.h"
#include "kernels.h"
#include "linear.h"
#include "linear8.h"

namespace qwen1m {
namespace QWEN1M_ISA {

#define QWEN1M_TYPED(name)                                           \
  inline void name##_any(const qwen1m_##name& a) {                   \
    with_type(a.dtype, [&](auto type) { name<decltype(type)>(a); }); \
  }
QWEN1M_TYPED(linear)
QWEN1M_TYPED(embedding)
QWEN1M_TYPED(rms_norm)
#undef QWEN1M_TYPED

#define QWEN1M_ATTENTION(name) \
  inline void name##_any(const qwen1m_##name& a) { a.cache.head_dim == 128 ? name<128>(a) : name<64>(a); }
QWEN1M_ATTENTION(dca_prefill)
QWEN1M_ATTENTION(dca_decode)
QWEN1M_ATTENTION(dca_probe)
QWEN1M_ATTENTION(dca_sparse_prefill)
#undef QWEN1M_ATTENTION

inline void rotate_and_cache_any(const qwen1m_rotate_and_cache& a) {
  with_type(a.bias_dtype, [&](auto bias) {
    if (a.cache.dtype == QWEN1M_INT8) return rotate_and_cache<decltype(bias), int8_t>(a);
    if (a.cache.dtype == QWEN1M_E4M3) return rotate_and_cache<decltype(bias), E4M3>(a);
    with_type(a.cache.dtype, [&](auto cache) { rotate_and_cache<decltype(bias), decltype(cache)>(a); });
  });
}

inline void dequantize_pages_any(const qwen1m_dequantize_pages& a) {
  with_type(a.dtype, [&](auto type) {
    a.cache.dtype == QWEN1M_INT8 ? dequantize_pages<decltype(type), int8_t>(a)
                                 : dequantize_pages<decltype(type), E4M3>(a);
  });
}

inline void rotate_queries_any(const qwen1m_rotate_queries& a) {
  with_type(a.bias_dtype, [&](auto bias) { rotate_queries<decltype(bias)>(a); });
}

inline void cast_any(const qwen1m_cast& a) {
  with_type(a.dtype,
            [&](auto from) { with_type(a.out_dtype, [&](auto to) { cast<decltype(from), decltype(to)>(a); }); });
}

constexpr Kernels table(const char* isa) {
  return {isa,
          rotary_table,
          rotate_and_cache_any,
          rotate_queries_any,
          dca_prefill_any,
          dca_decode_any,
          dca_probe_any,
          dca_sparse_prefill_any,
          linear_any,
          embedding_any,
          rms_norm_any,
          silu_mul,
          cast_any,
          decode_inputs,
          dequantize_pages_any,
          linear8,
          widen_weight,
          round_weight,
          round_rows,
          rms_norm8,
          product8,
          gated_product8};
}

}  // namespace QWEN1M_ISA
}  // namespace qwen1m
