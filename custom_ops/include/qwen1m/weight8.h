// Linear layers whose weights are bytes with scales: weight-only products, the widening to 16 bits, the rounding; and
// products of FP8 weights with rows that are rounded to FP8 too, as they are made.
#pragma once

#include "qwen1m/step.h"

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

// Rows of activations in FP8 (E4M3): numbers [rows, K], a scale for each 128 of a row, scales [K / 128, rows]. `rows`
// is T up to a multiple of four; those behind T are zeros. The largest number of a block is 448; one of zeros has
// scale 1.
typedef struct {
  uint8_t* numbers;
  float* scales;
  int64_t rows;
} qwen1m_rows8;

enum { QWEN1M_ROWS8_BLOCK = 128, QWEN1M_ROWS8_MULTIPLE = 4 };

// out = values [T, K], rounded
typedef struct {
  const void* values;
  qwen1m_rows8 out;
  int64_t tokens, width;
  qwen1m_dtype activation;
} qwen1m_round_rows;

// What an op makes, rounded to `out` in the place of its own, which is null.
typedef struct {
  qwen1m_rms_norm norm;
  qwen1m_rows8 out;
} qwen1m_rms_norm8;

// y[rows, N] = x[rows, K] * W^T, of an FP8 weight in blocks of 128 x 128; sums of 128 products are added in float32.
typedef struct {
  qwen1m_rows8 x;
  qwen1m_weight8 weight;
  void* y;
  int64_t in_features, out_features;
  qwen1m_dtype out_dtype;
} qwen1m_product8;

// The MLP's first product, of the gate's features and as many of what goes up, and SiLU of the first times the second,
// rounded to `out` [rows, N / 2] in the place of y, which is null.
typedef struct {
  qwen1m_product8 product;
  qwen1m_rows8 out;
} qwen1m_gated_product8;

QWEN1M_API void qwen1m_cpu_round_rows(const qwen1m_round_rows*);
QWEN1M_API void qwen1m_cpu_rms_norm8(const qwen1m_rms_norm8*);
QWEN1M_API void qwen1m_cpu_product8(const qwen1m_product8*);
QWEN1M_API void qwen1m_cpu_gated_product8(const qwen1m_gated_product8*);

// On Hopper alone; cudaErrorNotSupported elsewhere.
QWEN1M_API int qwen1m_cuda_round_rows(const qwen1m_round_rows*, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_rms_norm8(const qwen1m_rms_norm8*, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_product8(const qwen1m_product8*, void* workspace, qwen1m_stream);
QWEN1M_API int64_t qwen1m_cuda_product8_workspace(const qwen1m_product8*);
QWEN1M_API int qwen1m_cuda_gated_product8(const qwen1m_gated_product8*, qwen1m_stream);
// 1 where the current device has these, else 0.
QWEN1M_API int qwen1m_cuda_multiplies_rows8(void);

QWEN1M_API void qwen1m_cpu_linear8(const qwen1m_linear8*);
QWEN1M_API void qwen1m_cpu_widen_weight(const qwen1m_widen_weight*);
// By the calling thread alone, any that is. Returns 0, or 1 where a value is not finite: what is written then is
// useless.
QWEN1M_API int qwen1m_cpu_round_weight(const qwen1m_round_weight*);

QWEN1M_API int qwen1m_cuda_linear8(const qwen1m_linear8*, qwen1m_stream);  // few rows
QWEN1M_API int qwen1m_cuda_widen_weight(const qwen1m_widen_weight*, qwen1m_stream);
