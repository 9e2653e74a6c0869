// Which keys a head visits: probe, top-k, index.
#pragma once

#include "qwen1m/pages.h"

// Softmax of `rows` critical queries over keys [0, end), summed along columns and along diagonals.
typedef struct {
  const void* q;  // [V, rows, H, D]
  qwen1m_cache cache;
  const int32_t* block_table;
  float* vertical;  // [H, end]
  float* slash;     // [H, end], indexed by the column that the diagonal hits on the last row
  qwen1m_dtype activation;
  float scale;
  int32_t rows, heads, end, chunk_len;
} qwen1m_dca_probe;

// Exact top-k a head, ties to the lower index, in ascending order; `forced_*` entries rank first.
typedef struct {
  const float* vertical;  // [H, keys]
  const float* slash;     // [H, keys]
  const int32_t* vertical_sizes;
  const int32_t* slash_sizes;
  int32_t* columns;  // [H, column_width], padded with INT32_MAX
  int32_t* slashes;  // [H, slash_width]
  int32_t heads, keys, column_width, slash_width;
  int32_t forced_columns;    // the first ones
  int32_t forced_diagonals;  // the last ones
} qwen1m_select_critical;

#define QWEN1M_COLUMN_GROUP 64

// What each head visits in R row blocks of one piece; absolute keys, stages in the order inter, succ, intra. The
// columns of a stage ascend from a multiple of QWEN1M_COLUMN_GROUP on, with INT32_MAX up to the next one behind them.
// They are the piece's: a row block has a bit for each that it visits, of which none lies in a block of its stage.
typedef struct {
  int32_t* blocks;         // [H, R, block_width] first keys
  int32_t* counts;         // [H, R, 6]: blocks of intra, succ, inter, columns of intra, succ, inter
  uint32_t* listed;        // [H, R, column_width / 32]: bit c % 32 of word c / 32 for the column at c
  int32_t* columns;        // [H, column_width]
  int32_t* column_counts;  // [H, 3] of intra, succ, inter
  int32_t block_width, column_width;
} qwen1m_index_tables;

// How wide the columns are at most. A stage of a head without any gets five.
#define QWEN1M_COLUMN_WIDTH(selected_columns) \
  (((selected_columns) + 3 * (5 + QWEN1M_COLUMN_GROUP - 1)) / QWEN1M_COLUMN_GROUP * QWEN1M_COLUMN_GROUP)

// A stage of a head without any gets five diagonals. A chain of their blocks' ends has its length before it.
#define QWEN1M_CHAIN_WIDTH(selected_slashes) (1 + (selected_slashes) + 5)

typedef struct {
  const int32_t* columns;  // [H, selected_columns]
  const int32_t* slashes;  // [H, selected_slashes]
  int32_t* chains;  // [H, 3, QWEN1M_CHAIN_WIDTH], of a piece, for all its row blocks; null: made in the workspace
  qwen1m_index_tables tables;
  int32_t heads, selected_columns, selected_slashes;
  int32_t begin, rows, chunk_len, block;  // of the whole piece; on a GPU block is a power of two up to 4,096
  int32_t first_block, num_blocks;        // of it [first_block, first_block + num_blocks)
} qwen1m_sparse_index;

QWEN1M_API void qwen1m_cpu_dca_probe(const qwen1m_dca_probe*);
QWEN1M_API void qwen1m_cpu_select_critical(const qwen1m_select_critical*);
QWEN1M_API void qwen1m_cpu_sparse_index(const qwen1m_sparse_index*);

QWEN1M_API int64_t qwen1m_cuda_dca_probe_workspace(const qwen1m_dca_probe*);
QWEN1M_API int qwen1m_cuda_dca_probe(const qwen1m_dca_probe*, void* workspace, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_select_critical(const qwen1m_select_critical*, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_index_chains(const qwen1m_sparse_index*, qwen1m_stream);
QWEN1M_API int64_t qwen1m_cuda_sparse_index_workspace(const qwen1m_sparse_index*);
QWEN1M_API int qwen1m_cuda_sparse_index(const qwen1m_sparse_index*, void* workspace, qwen1m_stream);
