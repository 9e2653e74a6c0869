// PD_BUILD_OP bindings: check the arguments, allocate the result, call the kernel through its C interface.
#include <algorithm>
#include <string>
#include <vector>

#include "check.h"

namespace qwen1m {

using paddle::DataType;
using Tensors = std::vector<Tensor>;

template <typename T>
T* pointer(const Tensor& tensor) {
  return const_cast<T*>(tensor.data<T>());
}

Tensor make(const Shape& shape, DataType type, const Tensor& like) { return paddle::empty(shape, type, like.place()); }

float* optional_lse(const paddle::optional<Tensor>& lse, int64_t tokens, int64_t heads) {
  if (!lse) return nullptr;
  expect(*lse, "lse", DataType::FLOAT32, {tokens, heads});
  return pointer<float>(*lse);
}

Tensors embedding(const Tensor& ids, const Tensor& table) {
  expect(ids, "ids", DataType::INT64, {-1});
  expect_shape(table, "table", {-1, -1});
  const int64_t tokens = ids.shape()[0], vocab = table.shape()[0], width = table.shape()[1];
  const int64_t* id = ids.data<int64_t>();
  for (int64_t t = 0; t < tokens; ++t) {
    QWEN1M_REQUIRE(id[t] >= 0 && id[t] < vocab,
                   "id " + std::to_string(id[t]) + " is outside the vocabulary of " + std::to_string(vocab));
  }
  Tensor out = make({tokens, width}, DataType::FLOAT32, ids);
  const qwen1m_embedding a{id, table.data(), pointer<float>(out), tokens, width, storage_type(table, "table")};
  qwen1m_cpu_embedding(&a);
  return {out};
}

Tensors normalise(const Tensor* delta, const Tensor& residual, const Tensor& weight, float eps) {
  expect(residual, delta ? "residual" : "hidden", DataType::FLOAT32, {-1, -1});
  const int64_t tokens = residual.shape()[0], width = residual.shape()[1];
  if (delta) expect(*delta, "delta", DataType::FLOAT32, {tokens, width});
  expect_shape(weight, "weight", {width});
  Tensor out = make({tokens, width}, DataType::FLOAT32, residual);
  const qwen1m_rms_norm a{delta ? delta->data<float>() : nullptr,
                          pointer<float>(residual),
                          weight.data(),
                          pointer<float>(out),
                          tokens,
                          width,
                          eps,
                          storage_type(weight, "weight")};
  qwen1m_cpu_rms_norm(&a);
  return {out};
}

Tensors rms_norm(const Tensor& hidden, const Tensor& weight, float eps) {
  return normalise(nullptr, hidden, weight, eps);
}

Tensors add_rms_norm(const Tensor& delta, Tensor& residual, const Tensor& weight, float eps) {
  return normalise(&delta, residual, weight, eps);
}

Tensors linear(const Tensor& x, const Tensor& weight, const paddle::optional<Tensor>& bias) {
  expect(x, "x", DataType::FLOAT32, {-1, -1});
  const int64_t tokens = x.shape()[0], depth = x.shape()[1];
  expect_shape(weight, "weight", {-1, depth});
  const int64_t features = weight.shape()[0];
  if (bias) expect(*bias, "bias", weight.dtype(), {features});
  Tensor y = make({tokens, features}, DataType::FLOAT32, x);
  const qwen1m_linear a{x.data<float>(), weight.data(), bias ? bias->data() : nullptr, pointer<float>(y), tokens,
                        depth,           features,      storage_type(weight, "weight")};
  qwen1m_cpu_linear(&a);
  return {y};
}

Tensors silu_mul(const Tensor& gate_up) {
  expect(gate_up, "gate_up", DataType::FLOAT32, {-1, -1});
  const int64_t tokens = gate_up.shape()[0], width = gate_up.shape()[1] / 2;
  QWEN1M_REQUIRE(width * 2 == gate_up.shape()[1],
                 "gate_up's width must be even, got " + std::to_string(gate_up.shape()[1]));
  Tensor out = make({tokens, width}, DataType::FLOAT32, gate_up);
  const qwen1m_silu_mul a{gate_up.data<float>(), pointer<float>(out), tokens, width};
  qwen1m_cpu_silu_mul(&a);
  return {out};
}

Tensors gather_rows(const Tensor& hidden, const Tensor& rows) {
  expect(hidden, "hidden", DataType::FLOAT32, {-1, -1});
  expect(rows, "rows", DataType::INT64, {-1});
  const int64_t tokens = hidden.shape()[0], width = hidden.shape()[1], count = rows.shape()[0];
  Tensor out = make({count, width}, DataType::FLOAT32, hidden);
  const int64_t* row = rows.data<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    QWEN1M_REQUIRE(row[i] >= 0 && row[i] < tokens,
                   "row " + std::to_string(row[i]) + " is not one of the " + std::to_string(tokens) + " rows");
  }
  const qwen1m_embedding a{row, hidden.data(), pointer<float>(out), count, width, QWEN1M_FLOAT32};
  qwen1m_cpu_embedding(&a);
  return {out};
}

Tensors rotary_table(const Tensor& positions, const Tensor& inv_freq) {
  expect(positions, "positions", DataType::INT32, {-1, -1});
  expect(inv_freq, "inv_freq", DataType::FLOAT32, {-1});
  const int64_t variants = positions.shape()[0], tokens = positions.shape()[1], head_dim = 2 * inv_freq.shape()[0];
  Tensor table = make({variants, tokens, head_dim}, DataType::FLOAT32, positions);
  const qwen1m_rotary_table a{positions.data<int32_t>(), inv_freq.data<float>(), pointer<float>(table),
                              variants * tokens, static_cast<int32_t>(head_dim)};
  qwen1m_cpu_rotary_table(&a);
  return {table};
}

Tensors rotate_and_cache(const Tensor& qkv, const Tensor& bias, const Tensor& table, const Tensor& slots,
                         Tensor& key_cache, Tensor& value_cache) {
  const qwen1m_cache cache = paged_cache(key_cache, value_cache);
  expect(qkv, "qkv", DataType::FLOAT32, {-1, -1});
  const int64_t tokens = qkv.shape()[0], width = qkv.shape()[1], d = cache.head_dim;
  const int64_t heads = width / d - 2 * cache.kv_heads;
  QWEN1M_REQUIRE(width % d == 0 && heads > 0 && heads % cache.kv_heads == 0,
                 "qkv's width must be (H + 2 * " + std::to_string(cache.kv_heads) + ") * " + std::to_string(d) +
                     " with H a multiple of the KV heads, got " + std::to_string(width));
  expect_shape(bias, "bias", {width});
  expect(table, "table", DataType::FLOAT32, {-1, tokens, d});
  expect(slots, "slots", DataType::INT64, {tokens});
  const int64_t variants = table.shape()[0], places = key_cache.shape()[0] * cache.page_size;
  const int64_t* slot = slots.data<int64_t>();
  for (int64_t t = 0; t < tokens; ++t) {
    QWEN1M_REQUIRE(slot[t] >= 0 && slot[t] < places, "slot " + std::to_string(slot[t]) + " is outside the cache of " +
                                                         std::to_string(places) + " tokens");
  }
  Tensor q = make({variants, tokens, heads, d}, DataType::FLOAT32, qkv);
  const qwen1m_rotate_and_cache a{qkv.data<float>(),
                                  bias.data(),
                                  table.data<float>(),
                                  slot,
                                  pointer<float>(q),
                                  cache,
                                  storage_type(bias, "bias"),
                                  static_cast<int32_t>(variants),
                                  static_cast<int32_t>(tokens),
                                  static_cast<int32_t>(heads)};
  qwen1m_cpu_rotate_and_cache(&a);
  return {q};
}

Tensors rotate_queries(const Tensor& qkv, const Tensor& bias, const Tensor& table, int64_t row, int64_t heads) {
  expect(qkv, "qkv", DataType::FLOAT32, {-1, -1});
  expect(table, "table", DataType::FLOAT32, {-1, -1, -1});
  const int64_t variants = table.shape()[0], rows = table.shape()[1], d = table.shape()[2];
  const int64_t kv_heads = (qkv.shape()[1] / d - heads) / 2;
  QWEN1M_REQUIRE(heads > 0 && kv_heads > 0 && (heads + 2 * kv_heads) * d == qkv.shape()[1],
                 "qkv's width " + std::to_string(qkv.shape()[1]) + " does not hold " + std::to_string(heads) +
                     " heads of " + std::to_string(d) + " and their keys and values");
  expect_shape(bias, "bias", {qkv.shape()[1]});
  QWEN1M_REQUIRE(row >= 0 && row + rows <= qkv.shape()[0], "rows " + std::to_string(row) + " to " +
                                                               std::to_string(row + rows) + " are not among the " +
                                                               std::to_string(qkv.shape()[0]));
  Tensor q = make({variants, rows, heads, d}, DataType::FLOAT32, qkv);
  const qwen1m_rotate_queries a{qkv.data<float>(),           bias.data(),
                                table.data<float>(),         pointer<float>(q),
                                storage_type(bias, "bias"),  static_cast<int32_t>(variants),
                                static_cast<int32_t>(row),   static_cast<int32_t>(rows),
                                static_cast<int32_t>(heads), static_cast<int32_t>(kv_heads),
                                static_cast<int32_t>(d)};
  qwen1m_cpu_rotate_queries(&a);
  return {q};
}

void dca_prefill(const Tensor& q, Tensor& out, const Tensor& key_cache, const Tensor& value_cache,
                 const Tensor& block_tables, const Tensor& pieces, const Tensor& scale,
                 const paddle::optional<Tensor>& lse, int64_t chunk_len) {
  const qwen1m_cache cache = paged_cache(key_cache, value_cache);
  expect_chunk(chunk_len, cache);
  expect(block_tables, "block_tables", DataType::INT32, {-1, -1});
  expect(pieces, "pieces", DataType::INT32, {-1, 4});
  const int64_t sequences = block_tables.shape()[0], width = block_tables.shape()[1];
  expect(scale, "scale", DataType::FLOAT32, {sequences});
  expect_shape(q, "q", {-1, -1, -1, cache.head_dim});
  const int64_t tokens = q.shape()[1];
  const auto* piece = reinterpret_cast<const qwen1m_piece*>(pieces.data<int32_t>());
  int64_t last = 0;
  for (int64_t p = 0; p < pieces.shape()[0]; ++p) {
    const int64_t end = static_cast<int64_t>(piece[p].begin) + piece[p].rows;
    QWEN1M_REQUIRE(piece[p].sequence >= 0 && piece[p].sequence < sequences && piece[p].row >= 0 && piece[p].rows > 0 &&
                       piece[p].row + piece[p].rows <= tokens && piece[p].begin >= 0 &&
                       piece[p].begin / chunk_len == (end - 1) / chunk_len,
                   "piece " + text({piece[p].sequence, piece[p].row, piece[p].rows, piece[p].begin}) +
                       " (sequence, row, rows, begin) must name rows of q inside one chunk of " +
                       std::to_string(chunk_len));
    expect_pages(block_tables.data<int32_t>() + piece[p].sequence * width, width, end, key_cache);
    last = std::max(last, end - 1);
  }
  const int32_t heads = expect_queries(q, cache, tokens, last, chunk_len);
  expect(out, "out", DataType::FLOAT32, {tokens, heads, cache.head_dim});
  const qwen1m_dca_prefill a{q.data<float>(),
                             pointer<float>(out),
                             optional_lse(lse, tokens, heads),
                             cache,
                             block_tables.data<int32_t>(),
                             piece,
                             scale.data<float>(),
                             static_cast<int32_t>(tokens),
                             heads,
                             static_cast<int32_t>(width),
                             static_cast<int32_t>(pieces.shape()[0]),
                             static_cast<int32_t>(chunk_len)};
  qwen1m_cpu_dca_prefill(&a);
}

Tensors dca_decode(const Tensor& q, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_tables,
                   const Tensor& lengths, const Tensor& scale, int64_t chunk_len) {
  const qwen1m_cache cache = paged_cache(key_cache, value_cache);
  expect_chunk(chunk_len, cache);
  expect(block_tables, "block_tables", DataType::INT32, {-1, -1});
  const int64_t batch = block_tables.shape()[0], width = block_tables.shape()[1];
  expect(lengths, "lengths", DataType::INT32, {batch});
  expect(scale, "scale", DataType::FLOAT32, {batch});
  int64_t last = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = lengths.data<int32_t>()[b];
    expect_pages(block_tables.data<int32_t>() + b * width, width, length, key_cache);
    last = std::max(last, length - 1);
  }
  const int32_t heads = expect_queries(q, cache, batch, last, chunk_len);
  Tensor out = make({batch, heads, cache.head_dim}, DataType::FLOAT32, q);
  const qwen1m_dca_decode a{q.data<float>(),
                            pointer<float>(out),
                            cache,
                            block_tables.data<int32_t>(),
                            lengths.data<int32_t>(),
                            scale.data<float>(),
                            static_cast<int32_t>(batch),
                            heads,
                            static_cast<int32_t>(width),
                            static_cast<int32_t>(chunk_len)};
  qwen1m_cpu_dca_decode(&a);
  return {out};
}

Tensors dca_probe(const Tensor& q, const Tensor& key_cache, const Tensor& block_table, int64_t end, int64_t chunk_len,
                  float scale) {
  const qwen1m_cache cache = paged_cache(key_cache, key_cache);
  expect_chunk(chunk_len, cache);
  expect(block_table, "block_table", DataType::INT32, {-1});
  expect_pages(block_table.data<int32_t>(), block_table.shape()[0], end, key_cache);
  expect_shape(q, "q", {-1, -1, -1, cache.head_dim});
  const int64_t rows = q.shape()[1];
  QWEN1M_REQUIRE(
      rows >= 1 && rows <= 64 && rows <= end,
      "q must hold 1 to 64 rows and no more than the " + std::to_string(end) + " keys, got " + std::to_string(rows));
  QWEN1M_REQUIRE((end - rows) / chunk_len == (end - 1) / chunk_len, "the probe rows must lie in one chunk");
  const int32_t heads = expect_queries(q, cache, rows, end - 1, chunk_len);
  Tensor vertical = make({heads, end}, DataType::FLOAT32, q), slash = make({heads, end}, DataType::FLOAT32, q);
  const qwen1m_dca_probe a{q.data<float>(),
                           cache,
                           block_table.data<int32_t>(),
                           pointer<float>(vertical),
                           pointer<float>(slash),
                           scale,
                           static_cast<int32_t>(rows),
                           heads,
                           static_cast<int32_t>(end),
                           static_cast<int32_t>(chunk_len)};
  qwen1m_cpu_dca_probe(&a);
  return {vertical, slash};
}

Tensors select_critical(const Tensor& vertical, const Tensor& slash, const Tensor& vertical_sizes,
                        const Tensor& slash_sizes, int64_t max_vertical, int64_t max_slash, int64_t forced_columns,
                        int64_t forced_diagonals) {
  expect(vertical, "vertical", DataType::FLOAT32, {-1, -1});
  const int64_t heads = vertical.shape()[0], keys = vertical.shape()[1];
  expect(slash, "slash", DataType::FLOAT32, {heads, keys});
  expect(vertical_sizes, "vertical_sizes", DataType::INT32, {heads});
  expect(slash_sizes, "slash_sizes", DataType::INT32, {heads});
  const auto expect_sizes = [&](const Tensor& sizes, const std::string& name, int64_t most) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t size = sizes.data<int32_t>()[h];
      QWEN1M_REQUIRE(size >= 1 && size <= most,
                     name + " must be 1 to " + std::to_string(most) + ", got " + std::to_string(size));
    }
  };
  expect_sizes(vertical_sizes, "vertical_sizes", max_vertical);
  expect_sizes(slash_sizes, "slash_sizes", max_slash);
  const int64_t columns_width = std::min(max_vertical, keys), slashes_width = std::min(max_slash, keys);
  Tensor columns = make({heads, columns_width}, DataType::INT32, vertical);
  Tensor slashes = make({heads, slashes_width}, DataType::INT32, vertical);
  const qwen1m_select_critical a{vertical.data<float>(),
                                 slash.data<float>(),
                                 vertical_sizes.data<int32_t>(),
                                 slash_sizes.data<int32_t>(),
                                 pointer<int32_t>(columns),
                                 pointer<int32_t>(slashes),
                                 static_cast<int32_t>(heads),
                                 static_cast<int32_t>(keys),
                                 static_cast<int32_t>(columns_width),
                                 static_cast<int32_t>(slashes_width),
                                 static_cast<int32_t>(forced_columns),
                                 static_cast<int32_t>(forced_diagonals)};
  qwen1m_cpu_select_critical(&a);
  return {columns, slashes};
}

Tensors sparse_index(const Tensor& columns, const Tensor& slashes, int64_t begin, int64_t rows, int64_t chunk_len,
                     int64_t block) {
  expect(columns, "columns", DataType::INT32, {-1, -1});
  const int64_t heads = columns.shape()[0];
  expect(slashes, "slashes", DataType::INT32, {heads, -1});
  QWEN1M_REQUIRE(begin >= 0 && rows >= 1 && chunk_len >= 1 && begin / chunk_len == (begin + rows - 1) / chunk_len,
                 "the piece [" + std::to_string(begin) + ", " + std::to_string(begin + rows) +
                     ") must lie in one chunk of chunk_len " + std::to_string(chunk_len));
  QWEN1M_REQUIRE(block >= 1, "block must be at least 1, got " + std::to_string(block));
  const int64_t row_blocks = (rows + block - 1) / block;
  // A stage's blocks are disjoint and no more than its diagonals; up to 5 stand in for an empty stage, and a diagonal
  // that crosses from one stage to the next counts in both.
  const int64_t diagonals = slashes.shape()[1] + 2 + 2 * 5, disjoint = (begin + rows) / block + 3;
  const int64_t block_width = std::min(diagonals, disjoint), column_width = columns.shape()[1] + 3 * 5;
  Tensor block_table = make({heads, row_blocks, block_width}, DataType::INT32, columns);
  Tensor column_table = make({heads, row_blocks, column_width}, DataType::INT32, columns);
  Tensor counts = make({heads, row_blocks, 6}, DataType::INT32, columns);
  const qwen1m_sparse_index a{columns.data<int32_t>(),
                              slashes.data<int32_t>(),
                              {pointer<int32_t>(block_table), pointer<int32_t>(column_table), pointer<int32_t>(counts),
                               static_cast<int32_t>(block_width), static_cast<int32_t>(column_width)},
                              static_cast<int32_t>(heads),
                              static_cast<int32_t>(columns.shape()[1]),
                              static_cast<int32_t>(slashes.shape()[1]),
                              static_cast<int32_t>(begin),
                              static_cast<int32_t>(rows),
                              static_cast<int32_t>(chunk_len),
                              static_cast<int32_t>(block)};
  qwen1m_cpu_sparse_index(&a);
  return {block_table, column_table, counts};
}

void dca_sparse_prefill(const Tensor& q, Tensor& out, const Tensor& key_cache, const Tensor& value_cache,
                        const Tensor& block_table, const Tensor& blocks, const Tensor& columns, const Tensor& counts,
                        const paddle::optional<Tensor>& lse, int64_t row, int64_t begin, int64_t rows,
                        int64_t chunk_len, float scale) {
  const qwen1m_cache cache = paged_cache(key_cache, value_cache);
  expect_chunk(chunk_len, cache);
  expect(block_table, "block_table", DataType::INT32, {-1});
  QWEN1M_REQUIRE(begin >= 0 && rows >= 1 && begin / chunk_len == (begin + rows - 1) / chunk_len,
                 "the piece [" + std::to_string(begin) + ", " + std::to_string(begin + rows) +
                     ") must lie in one chunk of chunk_len " + std::to_string(chunk_len));
  expect_pages(block_table.data<int32_t>(), block_table.shape()[0], begin + rows, key_cache);
  expect_shape(q, "q", {-1, -1, -1, cache.head_dim});
  const int64_t tokens = q.shape()[1], row_blocks = (rows + 63) / 64;
  const int32_t heads = expect_queries(q, cache, tokens, begin + rows - 1, chunk_len);
  QWEN1M_REQUIRE(row >= 0 && row + rows <= tokens, "rows " + std::to_string(row) + " to " + std::to_string(row + rows) +
                                                       " are not among q's " + std::to_string(tokens));
  expect(out, "out", DataType::FLOAT32, {tokens, heads, cache.head_dim});
  expect(blocks, "blocks", DataType::INT32, {heads, row_blocks, -1});
  expect(columns, "columns", DataType::INT32, {heads, row_blocks, -1});
  expect(counts, "counts", DataType::INT32, {heads, row_blocks, 6});
  const qwen1m_dca_sparse_prefill a{q.data<float>(),
                                    pointer<float>(out),
                                    optional_lse(lse, tokens, heads),
                                    cache,
                                    block_table.data<int32_t>(),
                                    {pointer<int32_t>(blocks), pointer<int32_t>(columns), pointer<int32_t>(counts),
                                     static_cast<int32_t>(blocks.shape()[2]), static_cast<int32_t>(columns.shape()[2])},
                                    scale,
                                    static_cast<int32_t>(tokens),
                                    heads,
                                    static_cast<int32_t>(row),
                                    static_cast<int32_t>(begin),
                                    static_cast<int32_t>(rows),
                                    static_cast<int32_t>(chunk_len)};
  qwen1m_cpu_dca_sparse_prefill(&a);
}

Tensors sample(const Tensor& logits, Tensor& seen, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
               const Tensor& repetition_penalty, const Tensor& banned, const Tensor& seeds, const Tensor& steps) {
  expect(logits, "logits", DataType::FLOAT32, {-1, -1});
  const int64_t batch = logits.shape()[0], vocab = logits.shape()[1];
  expect(seen, "seen", DataType::UINT8, {batch, vocab});
  expect(temperature, "temperature", DataType::FLOAT32, {batch});
  expect(top_k, "top_k", DataType::INT32, {batch});
  expect(top_p, "top_p", DataType::FLOAT32, {batch});
  expect(repetition_penalty, "repetition_penalty", DataType::FLOAT32, {batch});
  expect(banned, "banned", DataType::INT32, {batch, -1});
  expect(seeds, "seeds", DataType::INT64, {batch});
  expect(steps, "steps", DataType::INT64, {batch});
  const int64_t banned_width = banned.shape()[1];
  for (int64_t i = 0; i < batch * banned_width; ++i) {
    const int32_t id = banned.data<int32_t>()[i];
    QWEN1M_REQUIRE(id < vocab,
                   "banned id " + std::to_string(id) + " is outside the vocabulary of " + std::to_string(vocab));
  }
  Tensor ids = make({batch}, DataType::INT64, logits), logprobs = make({batch}, DataType::FLOAT32, logits);
  const qwen1m_sample a{logits.data<float>(),        pointer<uint8_t>(seen),
                        temperature.data<float>(),   top_k.data<int32_t>(),
                        top_p.data<float>(),         repetition_penalty.data<float>(),
                        banned.data<int32_t>(),      seeds.data<int64_t>(),
                        steps.data<int64_t>(),       pointer<int64_t>(ids),
                        pointer<float>(logprobs),    static_cast<int32_t>(batch),
                        static_cast<int32_t>(vocab), static_cast<int32_t>(banned_width)};
  qwen1m_cpu_sample(&a);
  return {ids, logprobs};
}

}  // namespace qwen1m

PD_BUILD_OP(qwen1m_embedding).Inputs({"ids", "table"}).Outputs({"out"}).SetKernelFn(PD_KERNEL(qwen1m::embedding));

PD_BUILD_OP(qwen1m_rms_norm)
    .Inputs({"hidden", "weight"})
    .Outputs({"out"})
    .Attrs({"eps: float"})
    .SetKernelFn(PD_KERNEL(qwen1m::rms_norm));

PD_BUILD_OP(qwen1m_add_rms_norm)
    .Inputs({"delta", "residual", "weight"})
    .Outputs({"sum", "out"})
    .Attrs({"eps: float"})
    .SetInplaceMap({{"residual", "sum"}})
    .SetKernelFn(PD_KERNEL(qwen1m::add_rms_norm));

PD_BUILD_OP(qwen1m_linear)
    .Inputs({"x", "weight", paddle::Optional("bias")})
    .Outputs({"y"})
    .SetKernelFn(PD_KERNEL(qwen1m::linear));

PD_BUILD_OP(qwen1m_silu_mul).Inputs({"gate_up"}).Outputs({"out"}).SetKernelFn(PD_KERNEL(qwen1m::silu_mul));

PD_BUILD_OP(qwen1m_gather_rows).Inputs({"hidden", "rows"}).Outputs({"out"}).SetKernelFn(PD_KERNEL(qwen1m::gather_rows));

PD_BUILD_OP(qwen1m_rotary_table)
    .Inputs({"positions", "inv_freq"})
    .Outputs({"table"})
    .SetKernelFn(PD_KERNEL(qwen1m::rotary_table));

PD_BUILD_OP(qwen1m_rotate_and_cache)
    .Inputs({"qkv", "bias", "table", "slots", "key_cache", "value_cache"})
    .Outputs({"written_keys", "written_values", "q"})
    .SetInplaceMap({{"key_cache", "written_keys"}, {"value_cache", "written_values"}})
    .SetKernelFn(PD_KERNEL(qwen1m::rotate_and_cache));

PD_BUILD_OP(qwen1m_rotate_queries)
    .Inputs({"qkv", "bias", "table"})
    .Outputs({"q"})
    .Attrs({"row: int64_t", "heads: int64_t"})
    .SetKernelFn(PD_KERNEL(qwen1m::rotate_queries));

PD_BUILD_OP(qwen1m_dca_prefill)
    .Inputs({"q", "out", "key_cache", "value_cache", "block_tables", "pieces", "scale", paddle::Optional("lse")})
    .Outputs({"written"})
    .Attrs({"chunk_len: int64_t"})
    .SetInplaceMap({{"out", "written"}})
    .SetKernelFn(PD_KERNEL(qwen1m::dca_prefill));

PD_BUILD_OP(qwen1m_dca_decode)
    .Inputs({"q", "key_cache", "value_cache", "block_tables", "lengths", "scale"})
    .Outputs({"out"})
    .Attrs({"chunk_len: int64_t"})
    .SetKernelFn(PD_KERNEL(qwen1m::dca_decode));

PD_BUILD_OP(qwen1m_dca_probe)
    .Inputs({"q", "key_cache", "block_table"})
    .Outputs({"vertical", "slash"})
    .Attrs({"end: int64_t", "chunk_len: int64_t", "scale: float"})
    .SetKernelFn(PD_KERNEL(qwen1m::dca_probe));

PD_BUILD_OP(qwen1m_select_critical)
    .Inputs({"vertical", "slash", "vertical_sizes", "slash_sizes"})
    .Outputs({"columns", "slashes"})
    .Attrs({"max_vertical: int64_t", "max_slash: int64_t", "forced_columns: int64_t", "forced_diagonals: int64_t"})
    .SetKernelFn(PD_KERNEL(qwen1m::select_critical));

PD_BUILD_OP(qwen1m_sparse_index)
    .Inputs({"columns", "slashes"})
    .Outputs({"block_table", "column_table", "counts"})
    .Attrs({"begin: int64_t", "rows: int64_t", "chunk_len: int64_t", "block: int64_t"})
    .SetKernelFn(PD_KERNEL(qwen1m::sparse_index));

PD_BUILD_OP(qwen1m_dca_sparse_prefill)
    .Inputs({"q", "out", "key_cache", "value_cache", "block_table", "blocks", "columns", "counts",
             paddle::Optional("lse")})
    .Outputs({"written"})
    .Attrs({"row: int64_t", "begin: int64_t", "rows: int64_t", "chunk_len: int64_t", "scale: float"})
    .SetInplaceMap({{"out", "written"}})
    .SetKernelFn(PD_KERNEL(qwen1m::dca_sparse_prefill));

PD_BUILD_OP(qwen1m_sample)
    .Inputs({"logits", "seen", "temperature", "top_k", "top_p", "repetition_penalty", "banned", "seeds", "steps"})
    .Outputs({"marked", "ids", "logprobs"})
    .SetInplaceMap({{"seen", "marked"}})
    .SetKernelFn(PD_KERNEL(qwen1m::sample));
