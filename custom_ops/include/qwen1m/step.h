// The rest of a step: rotations and cache write, norms, linears, activation, embedding, a decode step's inputs.
#pragma once

#include "qwen1m/pages.h"

// table[V, T, D]: each row is cos[D/2] | sin[D/2] of position * inv_freq, the product rounded to float32.
typedef struct {
  const int32_t* positions;  // [V * T]
  const float* inv_freq;     // [D / 2]
  float* table;
  int64_t rows;  // V * T
  int32_t head_dim;
} qwen1m_rotary_table;

// Adds the bias, rotates the queries V ways, writes rotated keys and values to their slots.
typedef struct {
  const void* qkv;       // [T, (H + 2G) * D]
  const void* bias;      // [(H + 2G) * D]
  const float* table;    // [V, T, D]
  const int64_t* slots;  // [T]; a row with -1 writes nothing
  void* q;               // [V, T, H, D]; null: queries are left alone
  qwen1m_cache cache;
  qwen1m_dtype activation, bias_dtype;
  int32_t variants, tokens, heads;
} qwen1m_rotate_and_cache;

// The same for the queries of rows [row, row + rows) alone.
typedef struct {
  const void* qkv;
  const void* bias;
  const float* table;  // [V, table_rows, D], of which those from table_row on are of the first row
  void* q;             // [V, rows, H, D]
  qwen1m_dtype activation, bias_dtype;
  int32_t variants, row, rows, table_row, table_rows, heads, kv_heads, head_dim;
} qwen1m_rotate_queries;

// Where the next token of each sequence goes and how it is rotated. Its length grows by one first; a length of 0 is
// that of an empty row, which stays empty: its slot is -1.
typedef struct {
  int32_t* lengths;             // [B]
  const int32_t* block_tables;  // [B, table_width]
  const float* inv_freq;        // [D / 2]
  int64_t* slots;               // [B]
  float* table;                 // [3, B, D], as of qwen1m_rotary_table
  float* scale;                 // [B], D^-0.5 m(length)^2
  int32_t batch, table_width, page_size, head_dim;
  int32_t chunk_len, chunk_size, original_max_position_embeddings;
} qwen1m_decode_inputs;

// The table holds the rows of ids first .. first + rows; other ids give zeros.
typedef struct {
  const int64_t* ids;
  const void* table;  // [rows, width]
  void* out;          // [tokens, width]
  int64_t tokens, width, rows, first;
  qwen1m_dtype dtype, out_dtype;
} qwen1m_embedding;

// y[T, N] = x[T, K] * weight[N, K]^T + bias[N]. Of few rows, weight and bias must not be what the launch right before
// writes.
typedef struct {
  const void* x;
  const void* weight;
  const void* bias;  // or null
  void* y;
  int64_t tokens, in_features, out_features;
  qwen1m_dtype activation, out_dtype, dtype;  // of x, of y, of the weight and bias
} qwen1m_linear;

// qwen1m_gated_linear is one by a weight of gate and up without a bias, and then qwen1m_silu_mul: its y is [tokens,
// out_features / 2] activations.

// Up to FEW_ROWS read a weight once on a GPU. From MANY_ROWS on Hopper has products of its own, in 16 bits and in FP8.
enum { QWEN1M_FEW_ROWS = 16, QWEN1M_MANY_ROWS = 4096 };

// One without a bias, and then qwen1m_rotate_and_cache, for queries too, into a cache that is not of 8 bits: y and qkv
// are not there. On a GPU of few rows.
typedef struct {
  qwen1m_linear linear;
  qwen1m_rotate_and_cache rotation;
} qwen1m_rotating_linear;

// residual += delta (when delta is not null); out = residual / rms(residual) * weight. The weight must not be what the
// launch right before writes.
typedef struct {
  const void* delta;
  float* residual;
  const void* weight;
  void* out;
  int64_t tokens, width;
  float eps;
  qwen1m_dtype activation, dtype;
} qwen1m_rms_norm;

typedef struct {
  const void* gate_up;  // [tokens, 2 * width]
  void* out;            // [tokens, width]
  int64_t tokens, width;
  qwen1m_dtype activation;
} qwen1m_silu_mul;

// out = values in another type
typedef struct {
  const void* values;
  void* out;
  int64_t count;
  qwen1m_dtype dtype, out_dtype;
} qwen1m_cast;

// out[r] = parts[0][r] | parts[1][r] | ..., the first `columns` values of it
typedef struct {
  const float* parts;  // [., rows, share]
  float* out;          // [rows, columns]
  int64_t rows, share, columns;
} qwen1m_join_columns;

QWEN1M_API void qwen1m_cpu_rotary_table(const qwen1m_rotary_table*);
QWEN1M_API void qwen1m_cpu_rotate_and_cache(const qwen1m_rotate_and_cache*);
QWEN1M_API void qwen1m_cpu_rotate_queries(const qwen1m_rotate_queries*);
QWEN1M_API void qwen1m_cpu_decode_inputs(const qwen1m_decode_inputs*);
QWEN1M_API void qwen1m_cpu_embedding(const qwen1m_embedding*);
QWEN1M_API void qwen1m_cpu_linear(const qwen1m_linear*);
QWEN1M_API void qwen1m_cpu_gated_linear(const qwen1m_linear*);
QWEN1M_API void qwen1m_cpu_rotating_linear(const qwen1m_rotating_linear*);
QWEN1M_API void qwen1m_cpu_rms_norm(const qwen1m_rms_norm*);
QWEN1M_API void qwen1m_cpu_silu_mul(const qwen1m_silu_mul*);
QWEN1M_API void qwen1m_cpu_cast(const qwen1m_cast*);
QWEN1M_API void qwen1m_cpu_join_columns(const qwen1m_join_columns*);

QWEN1M_API int qwen1m_cuda_rotary_table(const qwen1m_rotary_table*, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_rotate_and_cache(const qwen1m_rotate_and_cache*, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_rotate_queries(const qwen1m_rotate_queries*, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_decode_inputs(const qwen1m_decode_inputs*, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_embedding(const qwen1m_embedding*, qwen1m_stream);
// Few rows, on Hopper many as well; others belong to cuBLAS.
QWEN1M_API int qwen1m_cuda_linear(const qwen1m_linear*, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_gated_linear(const qwen1m_linear*, qwen1m_stream);
// Whether so many rows with a weight of so many features are faster so than with cuBLAS, without a bias.
QWEN1M_API int qwen1m_cuda_multiplies_many_rows(int64_t rows, int64_t features);
QWEN1M_API int qwen1m_cuda_rotating_linear(const qwen1m_rotating_linear*, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_rms_norm(const qwen1m_rms_norm*, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_silu_mul(const qwen1m_silu_mul*, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_cast(const qwen1m_cast*, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_join_columns(const qwen1m_join_columns*, qwen1m_stream);
