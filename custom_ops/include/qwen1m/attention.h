// Dual chunk attention: dense and sparse prefill, decode.
#pragma once

#include "qwen1m/keys.h"

// Rows of one sequence that lie in one DCA chunk: rows [row, row + rows) of the step stand at positions
// [begin, begin + rows) of the sequence. A range of a piece's rows is a piece as well.
typedef struct {
  int32_t sequence;
  int32_t row;
  int32_t rows;
  int32_t begin;
} qwen1m_piece;

// Dense DCA over the pieces of a step, the three stages under one online softmax. Where a GPU's pieces are `on_device`
// the launch does not depend on them, so that a graph of it serves any: of at most 64, some may have no rows, and rows
// that are no piece's get whatever was in memory.
typedef struct {
  const void* q;  // [V, T, H, D]
  void* out;      // [T, H, D], only the pieces' rows are written
  float* lse;     // [T, H] natural log of the sum of exp(scaled logits), or null
  qwen1m_cache cache;
  const int32_t* block_tables;  // [S, table_width]
  const qwen1m_piece* pieces;   // in host memory, unless on_device
  const float* scale;           // [S]
  qwen1m_dtype activation;
  int32_t tokens, heads, table_width, num_pieces, on_device, chunk_len;
} qwen1m_dca_prefill;

// One query a sequence against all of its cached keys; zeros for a sequence of length 0. What the launch right before
// writes may be q and the newest key and value alone. Launches of a device follow each other.
typedef struct {
  const void* q;  // [V, B, H, D]
  void* out;      // [B, H, D]
  qwen1m_cache cache;
  const int32_t* block_tables;  // [B, table_width]
  const int32_t* lengths;       // [B]
  const float* scale;           // [B]
  qwen1m_dtype activation;
  int32_t batch, heads, table_width, chunk_len;
} qwen1m_dca_decode;

// DCA of row blocks [first_block, first_block + num_blocks) of one piece over the keys that the piece's index names.
typedef struct {
  const void* q;
  void* out;
  float* lse;
  qwen1m_cache cache;
  const int32_t* block_table;
  qwen1m_index_tables tables;
  const int32_t* order;  // [H] in which a GPU begins the heads, or null: as they are numbered
  qwen1m_dtype activation;
  float scale;
  int32_t tokens, heads;
  int32_t all_columns;  // of all heads at most, each stage filled up to groups: what a GPU has room for copies of
  int32_t row, begin, rows, chunk_len;
  int32_t first_block, num_blocks;
} qwen1m_dca_sparse_prefill;

QWEN1M_API void qwen1m_cpu_dca_prefill(const qwen1m_dca_prefill*);
QWEN1M_API void qwen1m_cpu_dca_decode(const qwen1m_dca_decode*);
QWEN1M_API void qwen1m_cpu_dca_sparse_prefill(const qwen1m_dca_sparse_prefill*);

QWEN1M_API int64_t qwen1m_cuda_dca_prefill_workspace(const qwen1m_dca_prefill*);
QWEN1M_API int qwen1m_cuda_dca_prefill(const qwen1m_dca_prefill*, void* workspace, qwen1m_stream);
QWEN1M_API int64_t qwen1m_cuda_dca_decode_workspace(const qwen1m_dca_decode*);
QWEN1M_API int qwen1m_cuda_dca_decode(const qwen1m_dca_decode*, void* workspace, qwen1m_stream);
QWEN1M_API int64_t qwen1m_cuda_dca_sparse_prefill_workspace(const qwen1m_dca_sparse_prefill*);
QWEN1M_API int qwen1m_cuda_dca_sparse_prefill(const qwen1m_dca_sparse_prefill*, void* workspace, qwen1m_stream);
