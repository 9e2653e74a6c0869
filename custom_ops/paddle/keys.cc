// PD_BUILD_OP bindings of the choice of keys: probe, top-k, index.
#include "qwen1m/keys.h"

#include <algorithm>
#include <string>

#include "dual_chunk.h"

namespace qwen1m {
namespace {

Tensors dca_probe(const Tensor& q, const Tensor& key_cache, const OptionalTensor& scales, const OptionalTensor& frame,
                  const Tensor& block_table, int64_t end, int64_t chunk_len, float scale) {
  Call call(q);
  const qwen1m_cache cache = call.expect_readable_cache(key_cache, key_cache, scales, frame);
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

// Of a piece, without tables and row blocks.
qwen1m_sparse_index index_of(const Call& call, const Tensor& columns, const Tensor& slashes, int64_t begin,
                             int64_t rows, int64_t chunk_len, int64_t block) {
  call.expect(columns, "columns", DataType::INT32, {-1, -1});
  call.expect(slashes, "slashes", DataType::INT32, {columns.shape()[0], -1});
  expect_piece(begin, rows, chunk_len);
  QWEN1M_REQUIRE(block >= 1 && (!call.on_gpu() || ((block & (block - 1)) == 0 && block <= 4096)),
                 "block must be at least 1, on a GPU a power of two up to 4,096, got " + text(block));
  return {
      .columns = columns.data<int32_t>(),
      .slashes = slashes.data<int32_t>(),
      .chains = nullptr,
      .tables = {},
      .heads = static_cast<int32_t>(columns.shape()[0]),
      .selected_columns = static_cast<int32_t>(columns.shape()[1]),
      .selected_slashes = static_cast<int32_t>(slashes.shape()[1]),
      .begin = static_cast<int32_t>(begin),
      .rows = static_cast<int32_t>(rows),
      .chunk_len = static_cast<int32_t>(chunk_len),
      .block = static_cast<int32_t>(block),
      .first_block = 0,
      .num_blocks = 0,
  };
}

Shape chains_shape(const qwen1m_sparse_index& index) {
  return {index.heads, 3, QWEN1M_CHAIN_WIDTH(index.selected_slashes)};
}

Tensors index_chains(const Tensor& columns, const Tensor& slashes, int64_t begin, int64_t rows, int64_t chunk_len,
                     int64_t block) {
  const Call call(columns);
  qwen1m_sparse_index index = index_of(call, columns, slashes, begin, rows, chunk_len, block);
  QWEN1M_REQUIRE(call.on_gpu(), "columns must lie on a GPU: a CPU goes without chains");
  const Tensor chains = call.make(chains_shape(index), DataType::INT32);
  index.chains = pointer<int32_t>(chains);
  const auto no_chains = [](const qwen1m_sparse_index*) {};
  call.run(index, no_chains, QWEN1M_CUDA(qwen1m_cuda_index_chains));
  return {chains};
}

Tensors sparse_index(const Tensor& columns, const Tensor& slashes, const OptionalTensor& chains, int64_t begin,
                     int64_t rows, int64_t chunk_len, int64_t block, int64_t first_block, int64_t num_blocks) {
  const Call call(columns);
  qwen1m_sparse_index index = index_of(call, columns, slashes, begin, rows, chunk_len, block);
  expect_row_blocks(first_block, num_blocks, rows, block);
  if (chains) {
    call.expect(*chains, "chains", DataType::INT32, chains_shape(index));
    index.chains = pointer<int32_t>(*chains);
  }
  // A stage's blocks are disjoint and no more than its diagonals; up to 5 stand in for an empty stage, and a diagonal
  // that crosses from one stage to the next counts in both.
  const int64_t diagonals = slashes.shape()[1] + 2 + 2 * 5, disjoint = (begin + rows) / block + 3;
  const int64_t heads = index.heads, block_width = std::min(diagonals, disjoint);
  const int64_t column_width = QWEN1M_COLUMN_WIDTH(columns.shape()[1]);
  const Tensor block_table = call.make({heads, num_blocks, block_width}, DataType::INT32);
  const Tensor counts = call.make({heads, num_blocks, 6}, DataType::INT32);
  const Tensor listed = call.make({heads, num_blocks, column_width / 32}, DataType::INT32);
  const Tensor column_table = call.make({heads, column_width}, DataType::INT32);
  const Tensor column_counts = call.make({heads, 3}, DataType::INT32);
  index.tables = {
      .blocks = pointer<int32_t>(block_table),
      .counts = pointer<int32_t>(counts),
      .listed = reinterpret_cast<uint32_t*>(pointer<int32_t>(listed)),
      .columns = pointer<int32_t>(column_table),
      .column_counts = pointer<int32_t>(column_counts),
      .block_width = static_cast<int32_t>(block_width),
      .column_width = static_cast<int32_t>(column_width),
  };
  index.first_block = static_cast<int32_t>(first_block);
  index.num_blocks = static_cast<int32_t>(num_blocks);
  call.run(index, QWEN1M_WORKSPACE_KERNEL(sparse_index));
  return {block_table, counts, listed, column_table, column_counts};
}

}  // namespace
}  // namespace qwen1m

PD_BUILD_OP(qwen1m_dca_probe)
    .Inputs({"q", "key_cache", paddle::Optional("scales"), paddle::Optional("frame"), "block_table"})
    .Outputs({"vertical", "slash"})
    .Attrs({"end: int64_t", "chunk_len: int64_t", "scale: float"})
    .SetKernelFn(PD_KERNEL(qwen1m::dca_probe));

PD_BUILD_OP(qwen1m_select_critical)
    .Inputs({"vertical", "slash", "vertical_sizes", "slash_sizes"})
    .Outputs({"columns", "slashes"})
    .Attrs({"max_vertical: int64_t", "max_slash: int64_t", "forced_columns: int64_t", "forced_diagonals: int64_t"})
    .SetKernelFn(PD_KERNEL(qwen1m::select_critical));

PD_BUILD_OP(qwen1m_index_chains)
    .Inputs({"columns", "slashes"})
    .Outputs({"chains"})
    .Attrs({"begin: int64_t", "rows: int64_t", "chunk_len: int64_t", "block: int64_t"})
    .SetKernelFn(PD_KERNEL(qwen1m::index_chains));

PD_BUILD_OP(qwen1m_sparse_index)
    .Inputs({"columns", "slashes", paddle::Optional("chains")})
    .Outputs({"block_table", "counts", "listed", "column_table", "column_counts"})
    .Attrs({"begin: int64_t", "rows: int64_t", "chunk_len: int64_t", "block: int64_t", "first_block: int64_t",
            "num_blocks: int64_t"})
    .SetKernelFn(PD_KERNEL(qwen1m::sparse_index));
