// PD_BUILD_OP bindings of the rest of a step: rotations and cache write, embedding, norms, also of what several ranks
// add up, linears, activation, casts.
#include "qwen1m/step.h"

#include <string>

#include "dual_chunk.h"
#include "qwen1m/mailbox.h"

namespace qwen1m {
namespace {

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

// Where rotations of rows of `width` come from and go to, all but q and qkv.
qwen1m_rotate_and_cache expect_rotation(Call& call, int64_t tokens, int64_t width, const Tensor& bias,
                                        const Tensor& table, const Tensor& slots, const qwen1m_cache& cache,
                                        int64_t pages) {
  const int64_t d = cache.head_dim, heads = width / d - 2 * cache.kv_heads;
  QWEN1M_REQUIRE(width % d == 0 && heads > 0 && heads % cache.kv_heads == 0,
                 "qkv's width must be (H + 2 * " + text(cache.kv_heads) + ") * " + text(d) +
                     " with H a multiple of the KV heads, got " + text(width));
  const qwen1m_dtype bias_type = call.expect_stored(bias, "bias", {width});
  call.expect(table, "table", DataType::FLOAT32, {-1, tokens, d});
  call.expect(slots, "slots", DataType::INT64, {tokens});
  const int64_t places = pages * cache.page_size;
  const int64_t* slot = slots.data<int64_t>();
  for (int64_t t = 0; !call.on_gpu() && t < tokens; ++t) {
    QWEN1M_REQUIRE(slot[t] >= -1 && slot[t] < places,
                   "slot " + text(slot[t]) + " is outside the cache of " + text(places) + " tokens");
  }
  return {
      .qkv = nullptr,
      .bias = bias.data(),
      .table = table.data<float>(),
      .slots = slot,
      .q = nullptr,
      .cache = cache,
      .activation = QWEN1M_FLOAT32,
      .bias_dtype = bias_type,
      .variants = static_cast<int32_t>(table.shape()[0]),
      .tokens = static_cast<int32_t>(tokens),
      .heads = static_cast<int32_t>(heads),
  };
}

// Keys and values go to the cache; returns the queries where they are `wanted`.
Tensors rotate(bool wanted, const Tensor& qkv, const Tensor& bias, const Tensor& table, const Tensor& slots,
               const Tensor& key_cache, const Tensor& value_cache, const OptionalTensor& scales,
               const OptionalTensor& frame) {
  Call call(qkv);
  const qwen1m_cache cache = call.expect_cache(key_cache, value_cache, scales, frame);
  const qwen1m_dtype activation = call.expect_activation(qkv, "qkv", {-1, -1});
  const int64_t tokens = qkv.shape()[0], pages = key_cache.shape()[0];
  auto rotation = expect_rotation(call, tokens, qkv.shape()[1], bias, table, slots, cache, pages);
  rotation.qkv = qkv.data();
  rotation.activation = activation;
  Tensors queries;
  if (wanted) {
    queries.push_back(call.make_activation({rotation.variants, tokens, rotation.heads, cache.head_dim}));
    rotation.q = memory(queries[0]);
  }
  call.run(rotation, QWEN1M_KERNEL(rotate_and_cache));
  return queries;
}

Tensors rotate_and_cache(const Tensor& qkv, const Tensor& bias, const Tensor& table, const Tensor& slots,
                         Tensor& key_cache, Tensor& value_cache, const OptionalTensor& scales,
                         const OptionalTensor& frame) {
  return rotate(true, qkv, bias, table, slots, key_cache, value_cache, scales, frame);
}

void cache_keys(const Tensor& qkv, const Tensor& bias, const Tensor& table, const Tensor& slots, Tensor& key_cache,
                Tensor& value_cache, const OptionalTensor& scales, const OptionalTensor& frame) {
  rotate(false, qkv, bias, table, slots, key_cache, value_cache, scales, frame);
}

// Rows [row, row + rows) of qkv, by those of the table from table_row on.
Tensors rotate_queries(const Tensor& qkv, const Tensor& bias, const Tensor& table, int64_t row, int64_t rows,
                       int64_t table_row, int64_t heads) {
  Call call(qkv);
  const qwen1m_dtype activation = call.expect_activation(qkv, "qkv", {-1, -1});
  call.expect(table, "table", DataType::FLOAT32, {-1, -1, -1});
  const int64_t variants = table.shape()[0], table_rows = table.shape()[1], d = table.shape()[2];
  const int64_t tokens = qkv.shape()[0], width = qkv.shape()[1], kv_heads = (width / d - heads) / 2;
  QWEN1M_REQUIRE(heads > 0 && kv_heads > 0 && (heads + 2 * kv_heads) * d == width,
                 "qkv's width " + text(width) + " does not hold " + text(heads) + " heads of " + text(d) +
                     " and their keys and values");
  const qwen1m_dtype bias_type = call.expect_stored(bias, "bias", {width});
  const auto expect_rows = [rows](int64_t first, int64_t all, const char* what) {
    QWEN1M_REQUIRE(first >= 0 && rows >= 0 && first + rows <= all,
                   "rows " + text(first) + " to " + text(first + rows) + " are not among " + what + "'s " + text(all));
  };
  expect_rows(row, tokens, "qkv");
  expect_rows(table_row, table_rows, "table");
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
          .table_row = static_cast<int32_t>(table_row),
          .table_rows = static_cast<int32_t>(table_rows),
          .heads = static_cast<int32_t>(heads),
          .kv_heads = static_cast<int32_t>(kv_heads),
          .head_dim = static_cast<int32_t>(d),
      },
      QWEN1M_KERNEL(rotate_queries));
  return {q};
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

// Numbers from `least` on, below `count`.
void expect_indices(const Call& call, const Tensor& indices, int64_t least, int64_t count, const std::string& what,
                    const std::string& among) {
  if (call.on_gpu()) return;
  const int64_t* index = indices.data<int64_t>();
  for (int64_t i = 0; i < indices.shape()[0]; ++i) {
    QWEN1M_REQUIRE(index[i] >= least && index[i] < count, what + " " + text(index[i]) + among);
  }
}

// `table` holds the rows of ids `first` .. of a vocabulary; other ids give zeros.
Tensors embedding(const Tensor& ids, const Tensor& table, int64_t first, int64_t vocabulary) {
  Call call(ids);
  call.expect(ids, "ids", DataType::INT64, {-1});
  const qwen1m_dtype type = call.expect_stored(table, "table", {-1, -1});
  const int64_t tokens = ids.shape()[0], rows = table.shape()[0], width = table.shape()[1];
  call.expect_width(width);
  expect_indices(call, ids, 0, vocabulary, "id", " is outside the vocabulary of " + text(vocabulary));
  const Tensor out = call.make({tokens, width}, DataType::FLOAT32);
  call.run(
      qwen1m_embedding{
          .ids = ids.data<int64_t>(),
          .table = table.data(),
          .out = memory(out),
          .tokens = tokens,
          .width = width,
          .rows = rows,
          .first = first,
          .dtype = type,
          .out_dtype = QWEN1M_FLOAT32,
      },
      QWEN1M_KERNEL(embedding));
  return {out};
}

// Row -1 gives zeros.
Tensors gather_rows(const Tensor& hidden, const Tensor& rows) {
  Call call(hidden);
  call.expect_shape(hidden, "hidden", {-1, -1});
  const bool wide = hidden.dtype() == DataType::FLOAT32;
  const qwen1m_dtype type = wide ? QWEN1M_FLOAT32 : call.expect_activation(hidden, "hidden", {-1, -1});
  call.expect(rows, "rows", DataType::INT64, {-1});
  const int64_t tokens = hidden.shape()[0], width = hidden.shape()[1], count = rows.shape()[0];
  call.expect_width(width);
  expect_indices(call, rows, -1, tokens, "row", " is not one of the " + text(tokens) + " rows");
  const Tensor out = call.make({count, width}, hidden.dtype());
  call.run(
      qwen1m_embedding{
          .ids = rows.data<int64_t>(),
          .table = hidden.data(),
          .out = memory(out),
          .tokens = count,
          .width = width,
          .rows = tokens,
          .first = 0,
          .dtype = type,
          .out_dtype = type,
      },
      QWEN1M_KERNEL(embedding));
  return {out};
}

Tensors join_columns(const Tensor& parts, int64_t columns) {
  const Call call(parts);
  call.expect(parts, "parts", DataType::FLOAT32, {-1, -1, -1});
  const int64_t ranks = parts.shape()[0], rows = parts.shape()[1], share = parts.shape()[2];
  QWEN1M_REQUIRE(columns >= 1 && columns <= ranks * share,
                 "columns must be 1 to the " + text(ranks * share) + " that the parts hold, got " + text(columns));
  const Tensor out = call.make({rows, columns}, DataType::FLOAT32);
  call.run(
      qwen1m_join_columns{
          .parts = parts.data<float>(),
          .out = pointer<float>(out),
          .rows = rows,
          .share = share,
          .columns = columns,
      },
      QWEN1M_KERNEL(join_columns));
  return {out};
}

// run(call, arguments) computes what is returned, `into` where that is given.
template <typename Run>
Tensors normalise(const Tensor* delta, const Tensor& residual, const Tensor& weight, float eps, const Run& run,
                  const Tensor* into = nullptr) {
  Call call(residual);
  call.expect(residual, delta ? "residual" : "hidden", DataType::FLOAT32, {-1, -1});
  const int64_t tokens = residual.shape()[0], width = residual.shape()[1];
  if (delta) call.expect_activation(*delta, "delta", {tokens, width});
  const qwen1m_dtype type = call.expect_stored(weight, "weight", {width});
  call.expect_width(width);
  const Tensor out = into ? *into : call.make_activation({tokens, width});
  if (into) call.expect_activation(out, "out", {tokens, width});
  run(call, qwen1m_rms_norm{
                .delta = delta ? delta->data() : nullptr,
                .residual = pointer<float>(residual),
                .weight = weight.data(),
                .out = memory(out),
                .tokens = tokens,
                .width = width,
                .eps = eps,
                .activation = storage_type(out, "out"),
                .dtype = type,
            });
  return {out};
}

void run_norm(const Call& call, const qwen1m_rms_norm& norm) { call.run(norm, QWEN1M_KERNEL(rms_norm)); }

Tensors rms_norm(const Tensor& hidden, const Tensor& weight, float eps) {
  return normalise(nullptr, hidden, weight, eps, run_norm);
}

Tensors add_rms_norm(const Tensor& delta, Tensor& residual, const Tensor& weight, float eps) {
  return normalise(&delta, residual, weight, eps, run_norm);
}

void rms_norm_into(const OptionalTensor& delta, Tensor& residual, const Tensor& weight, Tensor& out, float eps) {
  normalise(delta ? &*delta : nullptr, residual, weight, eps, run_norm, &out);
}

// How many ranks there are.
int32_t expect_mailboxes(const std::vector<int64_t>& boxes, int64_t rank) {
  const auto degree = static_cast<int64_t>(boxes.size());
  QWEN1M_REQUIRE(degree >= 2 && degree <= QWEN1M_PEER_RANKS && rank >= 0 && rank < degree,
                 "boxes must be those of 2 to " + text(QWEN1M_PEER_RANKS) + " ranks and rank one of them, got " +
                     text(degree) + " and rank " + text(rank));
  return static_cast<int32_t>(degree);
}

Tensors sum_rms_norm(const Tensor& delta, Tensor& residual, const Tensor& weight, float eps,
                     const std::vector<int64_t>& boxes, int64_t rank, bool sent) {
  const int32_t degree = expect_mailboxes(boxes, rank);
  return normalise(&delta, residual, weight, eps, [&](const Call& call, const qwen1m_rms_norm& norm) {
    QWEN1M_REQUIRE(call.on_gpu(), "delta must lie on a GPU, where mailboxes are");
    QWEN1M_REQUIRE(norm.tokens <= QWEN1M_MAILBOX_ROWS && norm.width <= QWEN1M_MAILBOX_WIDTH,
                   "delta must have at most " + text(QWEN1M_MAILBOX_ROWS) + " rows of " + text(QWEN1M_MAILBOX_WIDTH) +
                       " values, got " + text(delta.shape()));
    const auto no_mailboxes = [](const qwen1m_sum_rms_norm*) {};
    call.run(
        qwen1m_sum_rms_norm{
            .norm = norm,
            .boxes = boxes.data(),
            .rank = static_cast<int32_t>(rank),
            .degree = degree,
            .sent = sent ? 1 : 0,
        },
        no_mailboxes, QWEN1M_CUDA(qwen1m_cuda_sum_rms_norm));
  });
}

// parts [degree - 1, rows, N], of which those from row `first` on are of delta's rows.
void parts_rms_norm(const Tensor& delta, Tensor& residual, const Tensor& weight, const Tensor& parts, Tensor& out,
                    float eps, int64_t first, int64_t rank) {
  const auto run = [&](const Call& call, const qwen1m_rms_norm& norm) {
    call.expect(parts, "parts", delta.dtype(), {-1, -1, norm.width});
    const int64_t degree = parts.shape()[0] + 1, rows = parts.shape()[1], end = first + norm.tokens;
    QWEN1M_REQUIRE(degree <= QWEN1M_PEER_RANKS && rank >= 0 && rank < degree,
                   "rank must be one of the " + text(degree) + " that there are parts of, at most " +
                       text(QWEN1M_PEER_RANKS) + ", got " + text(rank));
    QWEN1M_REQUIRE(first >= 0 && end <= rows,
                   "rows " + text(first) + " to " + text(end) + " are not among the " + text(rows) + " of the parts");
    call.run(
        qwen1m_parts_rms_norm{
            .norm = norm,
            .parts = static_cast<const char*>(parts.data()) + first * norm.width * qwen1m_bytes_of(norm.activation),
            .stride = rows * norm.width,
            .rank = static_cast<int32_t>(rank),
            .degree = static_cast<int32_t>(degree),
        },
        QWEN1M_KERNEL(parts_rms_norm));
  };
  normalise(&delta, residual, weight, eps, run, &out);
}

// A product of rows with a weight, all but its bias and where it goes: activations.
qwen1m_linear expect_linear(Call& call, const Tensor& x, const Tensor& weight) {
  const qwen1m_dtype activation = call.expect_activation(x, "x", {-1, -1});
  const int64_t depth = x.shape()[1];
  const qwen1m_dtype type = call.expect_stored(weight, "weight", {-1, depth});
  call.expect_width(depth);
  return {
      .x = x.data(),
      .weight = weight.data(),
      .bias = nullptr,
      .y = nullptr,
      .tokens = x.shape()[0],
      .in_features = depth,
      .out_features = weight.shape()[0],
      .activation = activation,
      .out_dtype = activation,
      .dtype = type,
  };
}

Tensors linear(const Tensor& x, const Tensor& weight, const paddle::optional<Tensor>& bias, bool float32_out) {
  Call call(x);
  qwen1m_linear product = expect_linear(call, x, weight);
  const Shape shape{product.tokens, product.out_features};
  if (bias) {
    call.expect(*bias, "bias", weight.dtype(), {product.out_features});
    product.bias = bias->data();
  }
  const Tensor y = float32_out ? call.make(shape, DataType::FLOAT32) : call.make_activation(shape);
  product.y = memory(y);
  product.out_dtype = storage_type(y, "y");
  call.run(product, QWEN1M_KERNEL(linear));
  return {y};
}

Tensors sending_linear(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& boxes, int64_t rank) {
  Call call(x);
  const int32_t degree = expect_mailboxes(boxes, rank);
  qwen1m_linear product = expect_linear(call, x, weight);
  QWEN1M_REQUIRE(call.on_gpu(), "x must lie on a GPU, where mailboxes are");
  QWEN1M_REQUIRE(product.tokens <= QWEN1M_FEW_ROWS && product.out_features <= QWEN1M_MAILBOX_WIDTH,
                 "the product must have at most " + text(QWEN1M_FEW_ROWS) + " rows of " + text(QWEN1M_MAILBOX_WIDTH) +
                     " values, got " + text(Shape{product.tokens, product.out_features}));
  call.expect_width(product.out_features);
  const Tensor y = call.make_activation({product.tokens, product.out_features});
  product.y = memory(y);
  const auto no_mailboxes = [](const qwen1m_sending_linear*) {};
  call.run(qwen1m_sending_linear{product, boxes.data(), static_cast<int32_t>(rank), degree}, no_mailboxes,
           QWEN1M_CUDA(qwen1m_cuda_sending_linear));
  return {y};
}

Tensors gated_linear(const Tensor& x, const Tensor& weight) {
  Call call(x);
  qwen1m_linear product = expect_linear(call, x, weight);
  QWEN1M_REQUIRE(product.out_features % 2 == 0,
                 "gate and up must have as many features each, got " + text(product.out_features) + " together");
  const Tensor y = call.make_activation({product.tokens, product.out_features / 2});
  product.y = memory(y);
  call.run(product, QWEN1M_KERNEL(gated_linear));
  return {y};
}

Tensors rotating_linear(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& table,
                        const Tensor& slots, Tensor& key_cache, Tensor& value_cache) {
  Call call(x);
  const qwen1m_linear product = expect_linear(call, x, weight);
  QWEN1M_REQUIRE(!call.on_gpu() || product.tokens <= QWEN1M_FEW_ROWS,
                 "x must have at most " + text(QWEN1M_FEW_ROWS) + " rows on a GPU, got " + text(product.tokens));
  const qwen1m_cache cache = call.expect_cache(key_cache, value_cache, {}, {});
  auto rotation =
      expect_rotation(call, product.tokens, product.out_features, bias, table, slots, cache, key_cache.shape()[0]);
  const Tensor q = call.make_activation({rotation.variants, product.tokens, rotation.heads, cache.head_dim});
  rotation.activation = product.activation;
  rotation.q = memory(q);
  call.run(qwen1m_rotating_linear{product, rotation}, QWEN1M_KERNEL(rotating_linear));
  return {q};
}

Tensors silu_mul(const Tensor& gate_up) {
  Call call(gate_up);
  const qwen1m_dtype activation = call.expect_activation(gate_up, "gate_up", {-1, -1});
  const int64_t tokens = gate_up.shape()[0], width = gate_up.shape()[1] / 2;
  QWEN1M_REQUIRE(width * 2 == gate_up.shape()[1], "gate_up's width must be even, got " + text(gate_up.shape()[1]));
  call.expect_width(width);
  const Tensor out = call.make_activation({tokens, width});
  call.run(
      qwen1m_silu_mul{
          .gate_up = gate_up.data(),
          .out = memory(out),
          .tokens = tokens,
          .width = width,
          .activation = activation,
      },
      QWEN1M_KERNEL(silu_mul));
  return {out};
}

Tensors cast(const Tensor& values, const std::string& dtype) {
  Call call(values);
  const qwen1m_dtype type = storage_type(values, "values");
  const Tensor out = call.make(values.shape(), named_type(dtype));
  call.run(
      qwen1m_cast{
          .values = values.data(),
          .out = memory(out),
          .count = values.numel(),
          .dtype = type,
          .out_dtype = storage_type(out, "out"),
      },
      QWEN1M_KERNEL(cast));
  return {out};
}

}  // namespace
}  // namespace qwen1m

PD_BUILD_OP(qwen1m_rotary_table)
    .Inputs({"positions", "inv_freq"})
    .Outputs({"table"})
    .SetKernelFn(PD_KERNEL(qwen1m::rotary_table));

PD_BUILD_OP(qwen1m_rotate_and_cache)
    .Inputs({"qkv", "bias", "table", "slots", "key_cache", "value_cache", paddle::Optional("scales"),
             paddle::Optional("frame")})
    .Outputs({"written_keys", "written_values", "q"})
    .SetInplaceMap({{"key_cache", "written_keys"}, {"value_cache", "written_values"}})
    .SetKernelFn(PD_KERNEL(qwen1m::rotate_and_cache));

PD_BUILD_OP(qwen1m_cache_keys)
    .Inputs({"qkv", "bias", "table", "slots", "key_cache", "value_cache", paddle::Optional("scales"),
             paddle::Optional("frame")})
    .Outputs({"written_keys", "written_values"})
    .SetInplaceMap({{"key_cache", "written_keys"}, {"value_cache", "written_values"}})
    .SetKernelFn(PD_KERNEL(qwen1m::cache_keys));

PD_BUILD_OP(qwen1m_rotate_queries)
    .Inputs({"qkv", "bias", "table"})
    .Outputs({"q"})
    .Attrs({"row: int64_t", "rows: int64_t", "table_row: int64_t", "heads: int64_t"})
    .SetKernelFn(PD_KERNEL(qwen1m::rotate_queries));

PD_BUILD_OP(qwen1m_decode_inputs)
    .Inputs({"lengths", "block_tables", "inv_freq"})
    .Outputs({"grown", "slots", "table", "scale"})
    .Attrs({"page_size: int64_t", "chunk_len: int64_t", "chunk_size: int64_t",
            "original_max_position_embeddings: int64_t"})
    .SetInplaceMap({{"lengths", "grown"}})
    .SetKernelFn(PD_KERNEL(qwen1m::decode_inputs));

PD_BUILD_OP(qwen1m_embedding)
    .Inputs({"ids", "table"})
    .Outputs({"out"})
    .Attrs({"first: int64_t", "vocabulary: int64_t"})
    .SetKernelFn(PD_KERNEL(qwen1m::embedding));

PD_BUILD_OP(qwen1m_gather_rows).Inputs({"hidden", "rows"}).Outputs({"out"}).SetKernelFn(PD_KERNEL(qwen1m::gather_rows));

PD_BUILD_OP(qwen1m_join_columns)
    .Inputs({"parts"})
    .Outputs({"out"})
    .Attrs({"columns: int64_t"})
    .SetKernelFn(PD_KERNEL(qwen1m::join_columns));

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

PD_BUILD_OP(qwen1m_rms_norm_into)
    .Inputs({paddle::Optional("delta"), "residual", "weight", "out"})
    .Outputs({"sum", "normed"})
    .Attrs({"eps: float"})
    .SetInplaceMap({{"residual", "sum"}, {"out", "normed"}})
    .SetKernelFn(PD_KERNEL(qwen1m::rms_norm_into));

PD_BUILD_OP(qwen1m_sum_rms_norm)
    .Inputs({"delta", "residual", "weight"})
    .Outputs({"sum", "out"})
    .Attrs({"eps: float", "boxes: std::vector<int64_t>", "rank: int64_t", "sent: bool"})
    .SetInplaceMap({{"residual", "sum"}})
    .SetKernelFn(PD_KERNEL(qwen1m::sum_rms_norm));

PD_BUILD_OP(qwen1m_parts_rms_norm)
    .Inputs({"delta", "residual", "weight", "parts", "out"})
    .Outputs({"sum", "normed"})
    .Attrs({"eps: float", "first: int64_t", "rank: int64_t"})
    .SetInplaceMap({{"residual", "sum"}, {"out", "normed"}})
    .SetKernelFn(PD_KERNEL(qwen1m::parts_rms_norm));

PD_BUILD_OP(qwen1m_linear)
    .Inputs({"x", "weight", paddle::Optional("bias")})
    .Outputs({"y"})
    .Attrs({"float32_out: bool"})
    .SetKernelFn(PD_KERNEL(qwen1m::linear));

PD_BUILD_OP(qwen1m_sending_linear)
    .Inputs({"x", "weight"})
    .Outputs({"y"})
    .Attrs({"boxes: std::vector<int64_t>", "rank: int64_t"})
    .SetKernelFn(PD_KERNEL(qwen1m::sending_linear));

PD_BUILD_OP(qwen1m_gated_linear).Inputs({"x", "weight"}).Outputs({"y"}).SetKernelFn(PD_KERNEL(qwen1m::gated_linear));

PD_BUILD_OP(qwen1m_rotating_linear)
    .Inputs({"x", "weight", "bias", "table", "slots", "key_cache", "value_cache"})
    .Outputs({"written_keys", "written_values", "q"})
    .SetInplaceMap({{"key_cache", "written_keys"}, {"value_cache", "written_values"}})
    .SetKernelFn(PD_KERNEL(qwen1m::rotating_linear));

PD_BUILD_OP(qwen1m_silu_mul).Inputs({"gate_up"}).Outputs({"out"}).SetKernelFn(PD_KERNEL(qwen1m::silu_mul));

PD_BUILD_OP(qwen1m_cast)
    .Inputs({"values"})
    .Outputs({"out"})
    .Attrs({"dtype: std::string"})
    .SetKernelFn(PD_KERNEL(qwen1m::cast));
