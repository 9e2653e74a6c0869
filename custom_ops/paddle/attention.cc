// PD_BUILD_OP bindings of dual chunk attention: dense and sparse prefill, decode.
#include "qwen1m/attention.h"

#include <algorithm>
#include <string>

#include "dual_chunk.h"

namespace qwen1m {
namespace {

float* optional_lse(const Call& call, const OptionalTensor& lse, int64_t tokens, int64_t heads) {
  if (!lse) return nullptr;
  call.expect(*lse, "lse", DataType::FLOAT32, {tokens, heads});
  return pointer<float>(*lse);
}

// Pieces in host memory are checked, and the launch depends on them. On a GPU they may lie there: nothing of them is
// known then.
void dca_prefill(const Tensor& q, Tensor& out, const Tensor& key_cache, const Tensor& value_cache,
                 const OptionalTensor& scales, const OptionalTensor& frame, const Tensor& block_tables,
                 const Tensor& pieces, const Tensor& scale, const OptionalTensor& lse, int64_t chunk_len) {
  Call call(q);
  const qwen1m_cache cache = call.expect_readable_cache(key_cache, value_cache, scales, frame);
  expect_chunk(chunk_len, cache.page_size);
  call.expect(block_tables, "block_tables", DataType::INT32, {-1, -1});
  Call(pieces).expect(pieces, "pieces", DataType::INT32, {-1, 4});
  const bool on_device = call.on_gpu() && !pieces.is_cpu();
  const int64_t sequences = block_tables.shape()[0], width = block_tables.shape()[1];
  call.expect(scale, "scale", DataType::FLOAT32, {sequences});
  call.expect_activation(q, "q", {-1, -1, -1, cache.head_dim});
  const int64_t tokens = q.shape()[1];
  const auto* piece = reinterpret_cast<const qwen1m_piece*>(pieces.data<int32_t>());
  int64_t last = on_device ? width * cache.page_size - 1 : 0;
  for (int64_t p = 0; !on_device && p < pieces.shape()[0]; ++p) {
    if (piece[p].rows == 0) continue;
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
          .on_device = on_device,
          .chunk_len = static_cast<int32_t>(chunk_len),
      },
      QWEN1M_WORKSPACE_KERNEL(dca_prefill));
}

void dca_sparse_prefill(const Tensor& q, Tensor& out, const Tensor& key_cache, const Tensor& value_cache,
                        const OptionalTensor& scales, const OptionalTensor& frame, const Tensor& block_table,
                        const Tensor& blocks, const Tensor& counts, const Tensor& listed, const Tensor& columns,
                        const Tensor& column_counts, const OptionalTensor& order, const OptionalTensor& lse,
                        int64_t row, int64_t begin, int64_t rows, int64_t first_block, int64_t num_blocks,
                        int64_t all_columns, int64_t chunk_len, float scale) {
  Call call(q);
  const qwen1m_cache cache = call.expect_readable_cache(key_cache, value_cache, scales, frame);
  expect_chunk(chunk_len, cache.page_size);
  call.expect(block_table, "block_table", DataType::INT32, {-1});
  expect_piece(begin, rows, chunk_len);
  call.expect_pages(block_table, 0, begin + rows, key_cache);
  call.expect_activation(q, "q", {-1, -1, -1, cache.head_dim});
  const int64_t tokens = q.shape()[1], row_blocks = (rows + QWEN1M_ROW_BLOCK - 1) / QWEN1M_ROW_BLOCK;
  const int32_t heads = expect_queries(call, q, cache, tokens, begin + rows - 1, chunk_len);
  QWEN1M_REQUIRE(row >= 0 && row + rows <= tokens,
                 "rows " + text(row) + " to " + text(row + rows) + " are not among q's " + text(tokens));
  expect_row_blocks(first_block, num_blocks, rows, QWEN1M_ROW_BLOCK);
  const qwen1m_dtype activation = call.expect_activation(out, "out", {tokens, heads, cache.head_dim});
  call.expect(blocks, "blocks", DataType::INT32, {heads, row_blocks, -1});
  call.expect(counts, "counts", DataType::INT32, {heads, row_blocks, 6});
  call.expect(columns, "columns", DataType::INT32, {heads, -1});
  const int64_t column_width = columns.shape()[1];
  QWEN1M_REQUIRE(column_width % QWEN1M_COLUMN_GROUP == 0,
                 "columns must be a multiple of " + text(QWEN1M_COLUMN_GROUP) + " wide, got " + text(column_width));
  call.expect(listed, "listed", DataType::INT32, {heads, row_blocks, column_width / 32});
  call.expect(column_counts, "column_counts", DataType::INT32, {heads, 3});
  QWEN1M_REQUIRE(all_columns >= 1 && all_columns <= heads * column_width,
                 "all_columns must be 1 to the " + text(heads * column_width) + " of the heads' rows of columns, got " +
                     text(all_columns));
  if (order) call.expect(*order, "order", DataType::INT32, {heads});
  call.run(
      qwen1m_dca_sparse_prefill{
          .q = q.data(),
          .out = memory(out),
          .lse = optional_lse(call, lse, tokens, heads),
          .cache = cache,
          .block_table = block_table.data<int32_t>(),
          .tables =
              {
                  .blocks = pointer<int32_t>(blocks),
                  .counts = pointer<int32_t>(counts),
                  .listed = reinterpret_cast<uint32_t*>(pointer<int32_t>(listed)),
                  .columns = pointer<int32_t>(columns),
                  .column_counts = pointer<int32_t>(column_counts),
                  .block_width = static_cast<int32_t>(blocks.shape()[2]),
                  .column_width = static_cast<int32_t>(column_width),
              },
          .order = order ? order->data<int32_t>() : nullptr,
          .activation = activation,
          .scale = scale,
          .tokens = static_cast<int32_t>(tokens),
          .heads = heads,
          .all_columns = static_cast<int32_t>(all_columns),
          .row = static_cast<int32_t>(row),
          .begin = static_cast<int32_t>(begin),
          .rows = static_cast<int32_t>(rows),
          .chunk_len = static_cast<int32_t>(chunk_len),
          .first_block = static_cast<int32_t>(first_block),
          .num_blocks = static_cast<int32_t>(num_blocks),
      },
      QWEN1M_WORKSPACE_KERNEL(dca_sparse_prefill));
}

Tensors dca_decode(const Tensor& q, const Tensor& key_cache, const Tensor& value_cache, const OptionalTensor& scales,
                   const OptionalTensor& frame, const Tensor& block_tables, const Tensor& lengths, const Tensor& scale,
                   int64_t chunk_len) {
  Call call(q);
  const qwen1m_cache cache = call.expect_cache(key_cache, value_cache, scales, frame);
  expect_chunk(chunk_len, cache.page_size);
  call.expect(block_tables, "block_tables", DataType::INT32, {-1, -1});
  const int64_t batch = block_tables.shape()[0], width = block_tables.shape()[1];
  call.expect(lengths, "lengths", DataType::INT32, {batch});
  call.expect(scale, "scale", DataType::FLOAT32, {batch});
  int64_t last = call.on_gpu() ? width * cache.page_size - 1 : 0;  // lengths on a GPU are not read
  for (int64_t b = 0; !call.on_gpu() && b < batch; ++b) {
    const int64_t length = lengths.data<int32_t>()[b];
    QWEN1M_REQUIRE(length >= 0, "lengths must not be negative, got " + text(length));
    if (length > 0) call.expect_pages(block_tables, b * width, length, key_cache);
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

}  // namespace
}  // namespace qwen1m

PD_BUILD_OP(qwen1m_dca_prefill)
    .Inputs({"q", "out", "key_cache", "value_cache", paddle::Optional("scales"), paddle::Optional("frame"),
             "block_tables", "pieces", "scale", paddle::Optional("lse")})
    .Outputs({"written"})
    .Attrs({"chunk_len: int64_t"})
    .SetInplaceMap({{"out", "written"}})
    .SetKernelFn(PD_KERNEL(qwen1m::dca_prefill));

PD_BUILD_OP(qwen1m_dca_sparse_prefill)
    .Inputs({"q", "out", "key_cache", "value_cache", paddle::Optional("scales"), paddle::Optional("frame"),
             "block_table", "blocks", "counts", "listed", "columns", "column_counts", paddle::Optional("order"),
             paddle::Optional("lse")})
    .Outputs({"written"})
    .Attrs({"row: int64_t", "begin: int64_t", "rows: int64_t", "first_block: int64_t", "num_blocks: int64_t",
            "all_columns: int64_t", "chunk_len: int64_t", "scale: float"})
    .SetInplaceMap({{"out", "written"}})
    .SetKernelFn(PD_KERNEL(qwen1m::dca_sparse_prefill));

PD_BUILD_OP(qwen1m_dca_decode)
    .Inputs({"q", "key_cache", "value_cache", paddle::Optional("scales"), paddle::Optional("frame"), "block_tables",
             "lengths", "scale"})
    .Outputs({"out"})
    .Attrs({"chunk_len: int64_t"})
    .SetKernelFn(PD_KERNEL(qwen1m::dca_decode));
