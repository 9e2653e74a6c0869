// PD_BUILD_OP bindings of attention: rotation and cache, dense and sparse dual chunk attention, decode's inputs.
#include <algorithm>
#include <string>

#include "call.h"

namespace qwen1m {
namespace {

void expect_chunk(int64_t chunk_len, int64_t page_size) {
  QWEN1M_REQUIRE(chunk_len >= page_size && chunk_len % page_size == 0,
                 "chunk_len (chunk_size - local_size) must be a multiple of page_size " + text(page_size) + ", got " +
                     text(chunk_len));
}

// A piece of at least one row that lies in one DCA chunk.
void expect_piece(int64_t begin, int64_t rows, int64_t chunk_len) {
  QWEN1M_REQUIRE(begin >= 0 && rows >= 1 && chunk_len >= 1 && begin / chunk_len == (begin + rows - 1) / chunk_len,
                 "the piece [" + text(begin) + ", " + text(begin + rows) + ") must lie in one chunk of chunk_len " +
                     text(chunk_len));
}

// q is [V, rows, H, D] with H a multiple of the KV heads and the rotations that a row at `last_position` needs;
// returns H.
int32_t expect_queries(Call& call, const Tensor& q, const qwen1m_cache& cache, int64_t rows, int64_t last_position,
                       int64_t chunk_len) {
  call.expect_activation(q, "q", {-1, rows, -1, cache.head_dim});
  const int64_t heads = q.shape()[2];
  QWEN1M_REQUIRE(heads > 0 && heads % cache.kv_heads == 0,
                 "q's heads must be a multiple of the cache's " + text(cache.kv_heads) + ", got " + text(heads));
  const int64_t needed = last_position < chunk_len ? 1 : last_position < 2 * chunk_len ? 2 : 3;
  QWEN1M_REQUIRE(q.shape()[0] >= needed && q.shape()[0] <= 3,
                 "q must hold " + text(needed) + " to 3 rotations for position " + text(last_position) +
                     " with chunk_len " + text(chunk_len) + ", got " + text(q.shape()[0]));
  return static_cast<int32_t>(heads);
}

float* optional_lse(const Call& call, const paddle::optional<Tensor>& lse, int64_t tokens, int64_t heads) {
  if (!lse) return nullptr;
  call.expect(*lse, "lse", DataType::FLOAT32, {tokens, heads});
  return pointer<float>(*lse);
}

Tensors rotary_table(const Tensor& positions, const Tensor& inv_freq) {
  const Call call(positions);
  call.expect(positions, "positions", DataType::INT32, {-1, -1});
  call.expect(inv_freq, "inv_freq", DataType::FLOAT32, {-1});
  const int64_t variants = positions.shape()[0], tokens = positions.shape()[1], head_dim = 2 * inv_freq.shape()[0];
  const Tensor table = call.make({variants, tokens, head_dim}, DataType::FLOAT32);
  call.run(
      qwen1m_rotary_table{
          .positions = positions.data<int32_t>(),
          .inv_freq = inv_freq.data<float>(),
          .table = pointer<float>(table),
          .rows = variants * tokens,
          .head_dim = static_cast<int32_t>(head_dim),
      },
      QWEN1M_KERNEL(rotary_table));
  return {table};
}

Tensors rotate_and_cache(const Tensor& qkv, const Tensor& bias, const Tensor& table, const Tensor& slots,
                         Tensor& key_cache, Tensor& value_cache) {
  Call call(qkv);
  const qwen1m_cache cache = call.expect_cache(key_cache, value_cache);
  const qwen1m_dtype activation = call.expect_activation(qkv, "qkv", {-1, -1});
  const int64_t tokens = qkv.shape()[0], width = qkv.shape()[1], d = cache.head_dim;
  const int64_t heads = width / d - 2 * cache.kv_heads;
  QWEN1M_REQUIRE(width % d == 0 && heads > 0 && heads % cache.kv_heads == 0,
                 "qkv's width must be (H + 2 * " + text(cache.kv_heads) + ") * " + text(d) +
                     " with H a multiple of the KV heads, got " + text(width));
  const qwen1m_dtype bias_type = call.expect_stored(bias, "bias", {width});
  call.expect(table, "table", DataType::FLOAT32, {-1, tokens, d});
  call.expect(slots, "slots", DataType::INT64, {tokens});
  const int64_t variants = table.shape()[0], places = key_cache.shape()[0] * cache.page_size;
  const int64_t* slot = slots.data<int64_t>();
  for (int64_t t = 0; !call.on_gpu() && t < tokens; ++t) {
    QWEN1M_REQUIRE(slot[t] >= 0 && slot[t] < places,
                   "slot " + text(slot[t]) + " is outside the cache of " + text(places) + " tokens");
  }
  const Tensor q = call.make_activation({variants, tokens, heads, d});
  call.run(
      qwen1m_rotate_and_cache{
          .qkv = qkv.data(),
          .bias = bias.data(),
          .table = table.data<float>(),
          .slots = slot,
          .q = memory(q),
          .cache = cache,
          .activation = activation,
          .bias_dtype = bias_type,
          .variants = static_cast<int32_t>(variants),
          .tokens = static_cast<int32_t>(tokens),
          .heads = static_cast<int32_t>(heads),
      },
      QWEN1M_KERNEL(rotate_and_cache));
  return {q};
}

Tensors rotate_queries(const Tensor& qkv, const Tensor& bias, const Tensor& table, int64_t row, int64_t heads) {
  Call call(qkv);
  const qwen1m_dtype activation = call.expect_activation(qkv, "qkv", {-1, -1});
  call.expect(table, "table", DataType::FLOAT32, {-1, -1, -1});
  const int64_t variants = table.shape()[0], rows = table.shape()[1], d = table.shape()[2];
  const int64_t tokens = qkv.shape()[0], width = qkv.shape()[1], kv_heads = (width / d - heads) / 2;
  QWEN1M_REQUIRE(heads > 0 && kv_heads > 0 && (heads + 2 * kv_heads) * d == width,
                 "qkv's width " + text(width) + " does not hold " + text(heads) + " heads of " + text(d) +
                     " and their keys and values");
  const qwen1m_dtype bias_type = call.expect_stored(bias, "bias", {width});
  QWEN1M_REQUIRE(row >= 0 && row + rows <= tokens,
                 "rows " + text(row) + " to " + text(row + rows) + " are not among the " + text(tokens));
  const Tensor q = call.make_activation({variants, rows, heads, d});
  call.run(
      qwen1m_rotate_queries{
          .qkv = qkv.data(),
          .bias = bias.data(),
          .table = table.data<float>(),
          .q = memory(q),
          .activation = activation,
          .bias_dtype = bias_type,
          .variants = static_cast<int32_t>(variants),
          .row = static_cast<int32_t>(row),
          .rows = static_cast<int32_t>(rows),
          .heads = static_cast<int32_t>(heads),
          .kv_heads = static_cast<int32_t>(kv_heads),
          .head_dim = static_cast<int32_t>(d),
      },
      QWEN1M_KERNEL(rotate_queries));
  return {q};
}

// `pieces` lie in host memory on every device: the launch depends on them.
void dca_prefill(const Tensor& q, Tensor& out, const Tensor& key_cache, const Tensor& value_cache,
                 const Tensor& block_tables, const Tensor& pieces, const Tensor& scale,
                 const paddle::optional<Tensor>& lse, int64_t chunk_len) {
  Call call(q);
  const qwen1m_cache cache = call.expect_cache(key_cache, value_cache);
  expect_chunk(chunk_len, cache.page_size);
  call.expect(block_tables, "block_tables", DataType::INT32, {-1, -1});
  Call(pieces).expect(pieces, "pieces", DataType::INT32, {-1, 4});
  QWEN1M_REQUIRE(pieces.is_cpu(), "pieces must lie in host memory, got " + pieces.place().DebugString());
  const int64_t sequences = block_tables.shape()[0], width = block_tables.shape()[1];
  call.expect(scale, "scale", DataType::FLOAT32, {sequences});
  call.expect_activation(q, "q", {-1, -1, -1, cache.head_dim});
  const int64_t tokens = q.shape()[1];
  const auto* piece = reinterpret_cast<const qwen1m_piece*>(pieces.data<int32_t>());
  int64_t last = 0;
  for (int64_t p = 0; p < pieces.shape()[0]; ++p) {
    const int64_t end = static_cast<int64_t>(piece[p].begin) + piece[p].rows;
    QWEN1M_REQUIRE(piece[p].sequence >= 0 && piece[p].sequence < sequences && piece[p].row >= 0 && piece[p].rows > 0 &&
                       piece[p].row + piece[p].rows <= tokens && piece[p].begin >= 0 &&
                       piece[p].begin / chunk_len == (end - 1) / chunk_len,
                   "piece " + text(Shape{piece[p].sequence, piece[p].row, piece[p].rows, piece[p].begin}) +
                       " (sequence, row, rows, begin) must name rows of q inside one chunk of " + text(chunk_len));
    call.expect_pages(block_tables, piece[p].sequence * width, end, key_cache);
    last = std::max(last, end - 1);
  }
  const int32_t heads = expect_queries(call, q, cache, tokens, last, chunk_len);
  const qwen1m_dtype activation = call.expect_activation(out, "out", {tokens, heads, cache.head_dim});
  call.run(
      qwen1m_dca_prefill{
          .q = q.data(),
          .out = memory(out),
          .lse = optional_lse(call, lse, tokens, heads),
          .cache = cache,
          .block_tables = block_tables.data<int32_t>(),
          .pieces = piece,
          .scale = scale.data<float>(),
          .activation = activation,
          .tokens = static_cast<int32_t>(tokens),
          .heads = heads,
          .table_width = static_cast<int32_t>(width),
          .num_pieces = static_cast<int32_t>(pieces.shape()[0]),
          .chunk_len = static_cast<int32_t>(chunk_len),
      },
      QWEN1M_KERNEL(dca_prefill));
}

Tensors dca_decode(const Tensor& q, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_tables,
                   const Tensor& lengths, const Tensor& scale, int64_t chunk_len) {
  Call call(q);
  const qwen1m_cache cache = call.expect_cache(key_cache, value_cache);
  expect_chunk(chunk_len, cache.page_size);
  call.expect(block_tables, "block_tables", DataType::INT32, {-1, -1});
  const int64_t batch = block_tables.shape()[0], width = block_tables.shape()[1];
  call.expect(lengths, "lengths", DataType::INT32, {batch});
  call.expect(scale, "scale", DataType::FLOAT32, {batch});
  int64_t last = call.on_gpu() ? width * cache.page_size - 1 : 0;  // lengths on a GPU are not read
  for (int64_t b = 0; !call.on_gpu() && b < batch; ++b) {
    const int64_t length = lengths.data<int32_t>()[b];
    call.expect_pages(block_tables, b * width, length, key_cache);
    last = std::max(last, length - 1);
  }
  const int32_t heads = expect_queries(call, q, cache, batch, last, chunk_len);
  const Tensor out = call.make_activation({batch, heads, cache.head_dim});
  call.run(
      qwen1m_dca_decode{
          .q = q.data(),
          .out = memory(out),
          .cache = cache,
          .block_tables = block_tables.data<int32_t>(),
          .lengths = lengths.data<int32_t>(),
          .scale = scale.data<float>(),
          .activation = storage_type(out, "out"),
          .batch = static_cast<int32_t>(batch),
          .heads = heads,
          .table_width = static_cast<int32_t>(width),
          .chunk_len = static_cast<int32_t>(chunk_len),
      },
      QWEN1M_WORKSPACE_KERNEL(dca_decode));
  return {out};
}

Tensors decode_inputs(Tensor& lengths, const Tensor& block_tables, const Tensor& inv_freq, int64_t page_size,
                      int64_t chunk_len, int64_t chunk_size, int64_t original_max_position_embeddings) {
  const Call call(lengths);
  call.expect(lengths, "lengths", DataType::INT32, {-1});
  const int64_t batch = lengths.shape()[0];
  call.expect(block_tables, "block_tables", DataType::INT32, {batch, -1});
  call.expect(inv_freq, "inv_freq", DataType::FLOAT32, {-1});
  const int64_t width = block_tables.shape()[1], head_dim = 2 * inv_freq.shape()[0];
  call.expect_page_size(page_size);
  expect_chunk(chunk_len, page_size);
  for (int64_t b = 0; !call.on_gpu() && b < batch; ++b) {
    const int64_t length = lengths.data<int32_t>()[b];
    QWEN1M_REQUIRE(
        length >= 0 && length < width * page_size,
        "the block table has room for " + text(width * page_size) + " keys, of which " + text(length) + " are taken");
  }
  const Tensor slots = call.make({batch}, DataType::INT64), scale = call.make({batch}, DataType::FLOAT32);
  const Tensor table = call.make({3, batch, head_dim}, DataType::FLOAT32);
  call.run(
      qwen1m_decode_inputs{
          .lengths = pointer<int32_t>(lengths),
          .block_tables = block_tables.data<int32_t>(),
          .inv_freq = inv_freq.data<float>(),
          .slots = pointer<int64_t>(slots),
          .table = pointer<float>(table),
          .scale = pointer<float>(scale),
          .batch = static_cast<int32_t>(batch),
          .table_width = static_cast<int32_t>(width),
          .page_size = static_cast<int32_t>(page_size),
          .head_dim = static_cast<int32_t>(head_dim),
          .chunk_len = static_cast<int32_t>(chunk_len),
          .chunk_size = static_cast<int32_t>(chunk_size),
          .original_max_position_embeddings = static_cast<int32_t>(original_max_position_embeddings),
      },
      QWEN1M_KERNEL(decode_inputs));
  return {slots, table, scale};
}

Tensors dca_probe(const Tensor& q, const Tensor& key_cache, const Tensor& block_table, int64_t end, int64_t chunk_len,
                  float scale) {
  Call call(q);
  const qwen1m_cache cache = call.expect_cache(key_cache, key_cache);
  expect_chunk(chunk_len, cache.page_size);
  call.expect(block_table, "block_table", DataType::INT32, {-1});
  call.expect_pages(block_table, 0, end, key_cache);
  call.expect_activation(q, "q", {-1, -1, -1, cache.head_dim});
  const int64_t rows = q.shape()[1];
  QWEN1M_REQUIRE(rows >= 1 && rows <= 64 && rows <= end,
                 "q must hold 1 to 64 rows and no more than the " + text(end) + " keys, got " + text(rows));
  QWEN1M_REQUIRE((end - rows) / chunk_len == (end - 1) / chunk_len, "the probe rows must lie in one chunk");
  const int32_t heads = expect_queries(call, q, cache, rows, end - 1, chunk_len);
  const Tensor vertical = call.make({heads, end}, DataType::FLOAT32),
               slash = call.make({heads, end}, DataType::FLOAT32);
  call.run(
      qwen1m_dca_probe{
          .q = q.data(),
          .cache = cache,
          .block_table = block_table.data<int32_t>(),
          .vertical = pointer<float>(vertical),
          .slash = pointer<float>(slash),
          .activation = storage_type(q, "q"),
          .scale = scale,
          .rows = static_cast<int32_t>(rows),
          .heads = heads,
          .end = static_cast<int32_t>(end),
          .chunk_len = static_cast<int32_t>(chunk_len),
      },
      QWEN1M_WORKSPACE_KERNEL(dca_probe));
  return {vertical, slash};
}

Tensors select_critical(const Tensor& vertical, const Tensor& slash, const Tensor& vertical_sizes,
                        const Tensor& slash_sizes, int64_t max_vertical, int64_t max_slash, int64_t forced_columns,
                        int64_t forced_diagonals) {
  const Call call(vertical);
  call.expect(vertical, "vertical", DataType::FLOAT32, {-1, -1});
  const int64_t heads = vertical.shape()[0], keys = vertical.shape()[1];
  call.expect(slash, "slash", DataType::FLOAT32, {heads, keys});
  const auto expect_sizes = [&](const Tensor& sizes, const char* name, int64_t most) {
    call.expect(sizes, name, DataType::INT32, {heads});
    for (int64_t h = 0; !call.on_gpu() && h < heads; ++h) {
      const int64_t size = sizes.data<int32_t>()[h];
      QWEN1M_REQUIRE(size >= 1 && size <= most,
                     std::string(name) + " must be 1 to " + text(most) + ", got " + text(size));
    }
  };
  expect_sizes(vertical_sizes, "vertical_sizes", max_vertical);
  expect_sizes(slash_sizes, "slash_sizes", max_slash);
  const int64_t columns_width = std::min(max_vertical, keys), slashes_width = std::min(max_slash, keys);
  const Tensor columns = call.make({heads, columns_width}, DataType::INT32);
  const Tensor slashes = call.make({heads, slashes_width}, DataType::INT32);
  call.run(
      qwen1m_select_critical{
          .vertical = vertical.data<float>(),
          .slash = slash.data<float>(),
          .vertical_sizes = vertical_sizes.data<int32_t>(),
          .slash_sizes = slash_sizes.data<int32_t>(),
          .columns = pointer<int32_t>(columns),
          .slashes = pointer<int32_t>(slashes),
          .heads = static_cast<int32_t>(heads),
          .keys = static_cast<int32_t>(keys),
          .column_width = static_cast<int32_t>(columns_width),
          .slash_width = static_cast<int32_t>(slashes_width),
          .forced_columns = static_cast<int32_t>(forced_columns),
          .forced_diagonals = static_cast<int32_t>(forced_diagonals),
      },
      QWEN1M_KERNEL(select_critical));
  return {columns, slashes};
}

Tensors sparse_index(const Tensor& columns, const Tensor& slashes, int64_t begin, int64_t rows, int64_t chunk_len,
                     int64_t block) {
  const Call call(columns);
  call.expect(columns, "columns", DataType::INT32, {-1, -1});
  const int64_t heads = columns.shape()[0];
  call.expect(slashes, "slashes", DataType::INT32, {heads, -1});
  expect_piece(begin, rows, chunk_len);
  QWEN1M_REQUIRE(block >= 1, "block must be at least 1, got " + text(block));
  const int64_t row_blocks = (rows + block - 1) / block;
  // A stage's blocks are disjoint and no more than its diagonals; up to 5 stand in for an empty stage, and a diagonal
  // that crosses from one stage to the next counts in both.
  const int64_t diagonals = slashes.shape()[1] + 2 + 2 * 5, disjoint = (begin + rows) / block + 3;
  const int64_t block_width = std::min(diagonals, disjoint), column_width = columns.shape()[1] + 3 * 5;
  const Tensor block_table = call.make({heads, row_blocks, block_width}, DataType::INT32);
  const Tensor column_table = call.make({heads, row_blocks, column_width}, DataType::INT32);
  const Tensor counts = call.make({heads, row_blocks, 6}, DataType::INT32);
  call.run(
      qwen1m_sparse_index{
          .columns = columns.data<int32_t>(),
          .slashes = slashes.data<int32_t>(),
          .tables = {pointer<int32_t>(block_table), pointer<int32_t>(column_table), pointer<int32_t>(counts),
                     static_cast<int32_t>(block_width), static_cast<int32_t>(column_width)},
          .heads = static_cast<int32_t>(heads),
          .selected_columns = static_cast<int32_t>(columns.shape()[1]),
          .selected_slashes = static_cast<int32_t>(slashes.shape()[1]),
          .begin = static_cast<int32_t>(begin),
          .rows = static_cast<int32_t>(rows),
          .chunk_len = static_cast<int32_t>(chunk_len),
          .block = static_cast<int32_t>(block),
      },
      QWEN1M_KERNEL(sparse_index));
  return {block_table, column_table, counts};
}

void dca_sparse_prefill(const Tensor& q, Tensor& out, const Tensor& key_cache, const Tensor& value_cache,
                        const Tensor& block_table, const Tensor& blocks, const Tensor& columns, const Tensor& counts,
                        const paddle::optional<Tensor>& lse, int64_t row, int64_t begin, int64_t rows,
                        int64_t chunk_len, float scale) {
  Call call(q);
  const qwen1m_cache cache = call.expect_cache(key_cache, value_cache);
  expect_chunk(chunk_len, cache.page_size);
  call.expect(block_table, "block_table", DataType::INT32, {-1});
  expect_piece(begin, rows, chunk_len);
  call.expect_pages(block_table, 0, begin + rows, key_cache);
  call.expect_activation(q, "q", {-1, -1, -1, cache.head_dim});
  const int64_t tokens = q.shape()[1], row_blocks = (rows + 63) / 64;
  const int32_t heads = expect_queries(call, q, cache, tokens, begin + rows - 1, chunk_len);
  QWEN1M_REQUIRE(row >= 0 && row + rows <= tokens,
                 "rows " + text(row) + " to " + text(row + rows) + " are not among q's " + text(tokens));
  const qwen1m_dtype activation = call.expect_activation(out, "out", {tokens, heads, cache.head_dim});
  call.expect(blocks, "blocks", DataType::INT32, {heads, row_blocks, -1});
  call.expect(columns, "columns", DataType::INT32, {heads, row_blocks, -1});
  call.expect(counts, "counts", DataType::INT32, {heads, row_blocks, 6});
  call.run(
      qwen1m_dca_sparse_prefill{
          .q = q.data(),
          .out = memory(out),
          .lse = optional_lse(call, lse, tokens, heads),
          .cache = cache,
          .block_table = block_table.data<int32_t>(),
          .tables = {pointer<int32_t>(blocks), pointer<int32_t>(columns), pointer<int32_t>(counts),
                     static_cast<int32_t>(blocks.shape()[2]), static_cast<int32_t>(columns.shape()[2])},
          .activation = activation,
          .scale = scale,
          .tokens = static_cast<int32_t>(tokens),
          .heads = heads,
          .row = static_cast<int32_t>(row),
          .begin = static_cast<int32_t>(begin),
          .rows = static_cast<int32_t>(rows),
          .chunk_len = static_cast<int32_t>(chunk_len),
      },
      QWEN1M_KERNEL(dca_sparse_prefill));
}

}  // namespace
}  // namespace qwen1m

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

PD_BUILD_OP(qwen1m_decode_inputs)
    .Inputs({"lengths", "block_tables", "inv_freq"})
    .Outputs({"grown", "slots", "table", "scale"})
    .Attrs({"page_size: int64_t", "chunk_len: int64_t", "chunk_size: int64_t",
            "original_max_position_embeddings: int64_t"})
    .SetInplaceMap({{"lengths", "grown"}})
    .SetKernelFn(PD_KERNEL(qwen1m::decode_inputs));

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
