// The C interface of every kernel: plain structs and raw pointers, no framework header.
//
// T rows of a step, S sequences, H query heads, G KV heads, D head_dim, V query variants in the order intra, succ,
// inter. All arrays are dense and row-major. Arguments are checked by the caller (custom_ops/paddle).
//
// `activation` is the type of the values that pass between ops: float32 on a CPU, bfloat16 or float16 on a GPU, where
// weights and caches are of that type too. The residual stream, rotary tables, LSE, sums and logits are float32
// everywhere.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

typedef enum { QWEN1M_FLOAT32 = 0, QWEN1M_BFLOAT16 = 1, QWEN1M_FLOAT16 = 2 } qwen1m_dtype;

// Rotated keys and values of one layer: [pages, page_size, G, D].
typedef struct {
  void* key;
  void* value;
  qwen1m_dtype dtype;
  int32_t page_size;
  int32_t kv_heads;
  int32_t head_dim;
} qwen1m_cache;

// Rows of one sequence that lie in one DCA chunk: rows [row, row + rows) of the step stand at positions
// [begin, begin + rows) of the sequence.
typedef struct {
  int32_t sequence;
  int32_t row;
  int32_t rows;
  int32_t begin;
} qwen1m_piece;

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
  const void* qkv;     // [T, (H + 2G) * D]
  const void* bias;    // [(H + 2G) * D]
  const float* table;  // [V, T, D]
  const int64_t* slots;
  void* q;  // [V, T, H, D]
  qwen1m_cache cache;
  qwen1m_dtype activation, bias_dtype;
  int32_t variants, tokens, heads;
} qwen1m_rotate_and_cache;

// The same for the queries of rows [row, row + rows) alone.
typedef struct {
  const void* qkv;
  const void* bias;
  const float* table;  // [V, rows, D]
  void* q;             // [V, rows, H, D]
  qwen1m_dtype activation, bias_dtype;
  int32_t variants, row, rows, heads, kv_heads, head_dim;
} qwen1m_rotate_queries;

// Dense DCA over the pieces of a step, the three stages under one online softmax.
typedef struct {
  const void* q;  // [V, T, H, D]
  void* out;      // [T, H, D], only the pieces' rows are written
  float* lse;     // [T, H] natural log of the sum of exp(scaled logits), or null
  qwen1m_cache cache;
  const int32_t* block_tables;  // [S, table_width]
  const qwen1m_piece* pieces;   // in host memory on every device
  const float* scale;           // [S]
  qwen1m_dtype activation;
  int32_t tokens, heads, table_width, num_pieces, chunk_len;
} qwen1m_dca_prefill;

// One query a sequence against all of its cached keys.
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

// What each head visits in each row block of one piece; absolute keys, stages in the order inter, succ, intra.
typedef struct {
  int32_t* blocks;   // [H, R, block_width] first keys
  int32_t* columns;  // [H, R, column_width]
  int32_t* counts;   // [H, R, 6]: blocks of intra, succ, inter, columns of intra, succ, inter
  int32_t block_width, column_width;
} qwen1m_index_tables;

typedef struct {
  const int32_t* columns;  // [H, selected_columns]
  const int32_t* slashes;  // [H, selected_slashes]
  qwen1m_index_tables tables;
  int32_t heads, selected_columns, selected_slashes;
  int32_t begin, rows, chunk_len, block;
} qwen1m_sparse_index;

// DCA of one piece over the keys that its index names.
typedef struct {
  const void* q;
  void* out;
  float* lse;
  qwen1m_cache cache;
  const int32_t* block_table;
  qwen1m_index_tables tables;
  qwen1m_dtype activation;
  float scale;
  int32_t tokens, heads;
  int32_t row, begin, rows, chunk_len;
} qwen1m_dca_sparse_prefill;

// y[T, N] = x[T, K] * weight[N, K]^T + bias[N]
typedef struct {
  const void* x;
  const void* weight;
  const void* bias;  // or null
  void* y;
  int64_t tokens, in_features, out_features;
  qwen1m_dtype activation, out_dtype, dtype;  // of x, of y, of the weight and bias
} qwen1m_linear;

// The table holds the rows of ids first .. first + rows; other ids give zeros.
typedef struct {
  const int64_t* ids;
  const void* table;  // [rows, width]
  void* out;          // [tokens, width]
  int64_t tokens, width, rows, first;
  qwen1m_dtype dtype, out_dtype;
} qwen1m_embedding;

// out = values in another type
typedef struct {
  const void* values;
  void* out;
  int64_t count;
  qwen1m_dtype dtype, out_dtype;
} qwen1m_cast;

// residual += delta (when delta is not null); out = residual / rms(residual) * weight
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

// Where the next token of each sequence goes and how it is rotated. Its length grows by one first.
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

typedef struct {
  const float* logits;  // [B, vocab]
  uint8_t* seen;        // [B, vocab]; the sampled token is marked
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* repetition_penalty;
  const int32_t* banned;        // [B, banned_width], -1 for none
  const int64_t* banned_steps;  // [B]: banned ids are so while the step is below this
  const int64_t* seeds;
  int64_t* steps;  // [B], grow by one
  int64_t* ids;
  float* logprobs;
  int32_t batch, vocab, banned_width;
} qwen1m_sample;

// The CPU kernels. Every one runs on the number of threads set last.
void qwen1m_cpu_set_num_threads(int count);
const char* qwen1m_cpu_isa(void);
void qwen1m_cpu_rotary_table(const qwen1m_rotary_table*);
void qwen1m_cpu_rotate_and_cache(const qwen1m_rotate_and_cache*);
void qwen1m_cpu_rotate_queries(const qwen1m_rotate_queries*);
void qwen1m_cpu_dca_prefill(const qwen1m_dca_prefill*);
void qwen1m_cpu_dca_decode(const qwen1m_dca_decode*);
void qwen1m_cpu_dca_probe(const qwen1m_dca_probe*);
void qwen1m_cpu_select_critical(const qwen1m_select_critical*);
void qwen1m_cpu_sparse_index(const qwen1m_sparse_index*);
void qwen1m_cpu_dca_sparse_prefill(const qwen1m_dca_sparse_prefill*);
void qwen1m_cpu_linear(const qwen1m_linear*);
void qwen1m_cpu_embedding(const qwen1m_embedding*);
void qwen1m_cpu_rms_norm(const qwen1m_rms_norm*);
void qwen1m_cpu_silu_mul(const qwen1m_silu_mul*);
void qwen1m_cpu_cast(const qwen1m_cast*);
void qwen1m_cpu_decode_inputs(const qwen1m_decode_inputs*);
void qwen1m_cpu_sample(const qwen1m_sample*);

// The CUDA kernels. Pointers are device memory except qwen1m_dca_prefill's pieces; page_size is a power of two from 64
// on, widths are multiples of 8 and tensors begin at multiples of 16 bytes. Everything is launched on `stream`, a
// cudaStream_t, and nothing waits for it. Returns a cudaError_t, 0 for success. `workspace` is device memory of as many
// bytes as the function of that name says; its contents do not matter.
typedef void* qwen1m_stream;
int qwen1m_cuda_rotary_table(const qwen1m_rotary_table*, qwen1m_stream);
int qwen1m_cuda_rotate_and_cache(const qwen1m_rotate_and_cache*, qwen1m_stream);
int qwen1m_cuda_rotate_queries(const qwen1m_rotate_queries*, qwen1m_stream);
int qwen1m_cuda_dca_prefill(const qwen1m_dca_prefill*, qwen1m_stream);
int64_t qwen1m_cuda_dca_decode_workspace(const qwen1m_dca_decode*);
int qwen1m_cuda_dca_decode(const qwen1m_dca_decode*, void* workspace, qwen1m_stream);
int64_t qwen1m_cuda_dca_probe_workspace(const qwen1m_dca_probe*);
int qwen1m_cuda_dca_probe(const qwen1m_dca_probe*, void* workspace, qwen1m_stream);
int qwen1m_cuda_select_critical(const qwen1m_select_critical*, qwen1m_stream);
int qwen1m_cuda_sparse_index(const qwen1m_sparse_index*, qwen1m_stream);
int qwen1m_cuda_dca_sparse_prefill(const qwen1m_dca_sparse_prefill*, qwen1m_stream);
int qwen1m_cuda_linear(const qwen1m_linear*, qwen1m_stream);  // few rows: a matrix product belongs to cuBLAS
int qwen1m_cuda_embedding(const qwen1m_embedding*, qwen1m_stream);
int qwen1m_cuda_rms_norm(const qwen1m_rms_norm*, qwen1m_stream);
int qwen1m_cuda_silu_mul(const qwen1m_silu_mul*, qwen1m_stream);
int qwen1m_cuda_cast(const qwen1m_cast*, qwen1m_stream);
int qwen1m_cuda_decode_inputs(const qwen1m_decode_inputs*, qwen1m_stream);
int qwen1m_cuda_sample(const qwen1m_sample*, qwen1m_stream);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
