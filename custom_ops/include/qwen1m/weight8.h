// Linear layers whose weights are bytes with scales: weight-only products, the widening to 16 bits, the rounding.
#pragma once

#include "qwen1m/types.h"

// W[n, k] is the number in byte n, k times scales[n / rows, k / columns]. Blocks are powers of two that divide N and K.
typedef struct {
  const uint8_t* numbers;  // [N, K]
  const float* scales;     // [N / rows, K / columns]
  qwen1m_dtype kind;       // of the numbers: QWEN1M_INT8, or QWEN1M_E4M3 (FP8)
  int32_t rows, columns;
} qwen1m_weight8;

enum { QWEN1M_LEAST_COLUMNS = 16 };  // of a block

// y[T, N] = x[T, K] * W^T. The weight must not be what the launch right before writes.
typedef struct {
  const void* x;
  qwen1m_weight8 weight;
  void* y;
  int64_t tokens, in_features, out_features;
  qwen1m_dtype activation, out_dtype;  // of x, of y
} qwen1m_linear8;

// out[N, K] = W, rounded once
typedef struct {
  qwen1m_weight8 weight;
  void* out;
  int64_t in_features, out_features;
  qwen1m_dtype out_dtype;
} qwen1m_widen_weight;

// numbers, scales: of `values` [N, K], whatever they held. The largest number of a block is 127 or 448; ties go to
// even.
typedef struct {
  const void* values;
  qwen1m_weight8 weight;
  int64_t in_features, out_features;
  qwen1m_dtype dtype;
} qwen1m_round_weight;

QWEN1M_API void qwen1m_cpu_linear8(const qwen1m_linear8*);
QWEN1M_API void qwen1m_cpu_widen_weight(const qwen1m_widen_weight*);
// By the calling thread alone, any that is. Returns 0, or 1 where a value is not finite: what is written then is
// useless.
QWEN1M_API int qwen1m_cpu_round_weight(const qwen1m_round_weight*);

QWEN1M_API int qwen1m_cuda_linear8(const qwen1m_linear8*, qwen1m_stream);  // few rows
QWEN1M_API int qwen1m_cuda_widen_weight(const qwen1m_widen_weight*, qwen1m_stream);
