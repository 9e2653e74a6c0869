// PD_BUILD_OP bindings of everything around attention: embedding, norms, linears, activation, casts.
#include "call.h"

namespace qwen1m {
namespace {

// Rows of `table` [n, width] at `indices`, each of which must be one of its n.
void expect_indices(const Call& call, const Tensor& indices, int64_t count, const std::string& what,
                    const std::string& among) {
  if (call.on_gpu()) return;
  const int64_t* index = indices.data<int64_t>();
  for (int64_t i = 0; i < indices.shape()[0]; ++i) {
    QWEN1M_REQUIRE(index[i] >= 0 && index[i] < count, what + " " + text(index[i]) + among);
  }
}

// `table` holds the rows of ids `first` .. of a vocabulary; other ids give zeros.
Tensors embedding(const Tensor& ids, const Tensor& table, int64_t first, int64_t vocabulary) {
  Call call(ids);
  call.expect(ids, "ids", DataType::INT64, {-1});
  const qwen1m_dtype type = call.expect_stored(table, "table", {-1, -1});
  const int64_t tokens = ids.shape()[0], rows = table.shape()[0], width = table.shape()[1];
  call.expect_width(width);
  expect_indices(call, ids, vocabulary, "id", " is outside the vocabulary of " + text(vocabulary));
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

Tensors gather_rows(const Tensor& hidden, const Tensor& rows) {
  Call call(hidden);
  call.expect_shape(hidden, "hidden", {-1, -1});
  const bool wide = hidden.dtype() == DataType::FLOAT32;
  const qwen1m_dtype type = wide ? QWEN1M_FLOAT32 : call.expect_activation(hidden, "hidden", {-1, -1});
  call.expect(rows, "rows", DataType::INT64, {-1});
  const int64_t tokens = hidden.shape()[0], width = hidden.shape()[1], count = rows.shape()[0];
  call.expect_width(width);
  expect_indices(call, rows, tokens, "row", " is not one of the " + text(tokens) + " rows");
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

Tensors normalise(const Tensor* delta, const Tensor& residual, const Tensor& weight, float eps) {
  Call call(residual);
  call.expect(residual, delta ? "residual" : "hidden", DataType::FLOAT32, {-1, -1});
  const int64_t tokens = residual.shape()[0], width = residual.shape()[1];
  if (delta) call.expect_activation(*delta, "delta", {tokens, width});
  const qwen1m_dtype type = call.expect_stored(weight, "weight", {width});
  call.expect_width(width);
  const Tensor out = call.make_activation({tokens, width});
  call.run(
      qwen1m_rms_norm{
          .delta = delta ? delta->data() : nullptr,
          .residual = pointer<float>(residual),
          .weight = weight.data(),
          .out = memory(out),
          .tokens = tokens,
          .width = width,
          .eps = eps,
          .activation = storage_type(out, "out"),
          .dtype = type,
      },
      QWEN1M_KERNEL(rms_norm));
  return {out};
}

Tensors rms_norm(const Tensor& hidden, const Tensor& weight, float eps) {
  return normalise(nullptr, hidden, weight, eps);
}

Tensors add_rms_norm(const Tensor& delta, Tensor& residual, const Tensor& weight, float eps) {
  return normalise(&delta, residual, weight, eps);
}

Tensors linear(const Tensor& x, const Tensor& weight, const paddle::optional<Tensor>& bias, bool float32_out) {
  Call call(x);
  const qwen1m_dtype activation = call.expect_activation(x, "x", {-1, -1});
  const int64_t tokens = x.shape()[0], depth = x.shape()[1];
  const qwen1m_dtype type = call.expect_stored(weight, "weight", {-1, depth});
  call.expect_width(depth);
  const int64_t features = weight.shape()[0];
  if (bias) call.expect(*bias, "bias", weight.dtype(), {features});
  const Tensor y =
      float32_out ? call.make({tokens, features}, DataType::FLOAT32) : call.make_activation({tokens, features});
  call.run(
      qwen1m_linear{
          .x = x.data(),
          .weight = weight.data(),
          .bias = bias ? bias->data() : nullptr,
          .y = memory(y),
          .tokens = tokens,
          .in_features = depth,
          .out_features = features,
          .activation = activation,
          .out_dtype = storage_type(y, "y"),
          .dtype = type,
      },
      QWEN1M_KERNEL(linear));
  return {y};
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
  const DataType wanted = dtype == "float32"    ? DataType::FLOAT32
                          : dtype == "bfloat16" ? DataType::BFLOAT16
                          : dtype == "float16"  ? DataType::FLOAT16
                                                : DataType::UNDEFINED;
  QWEN1M_REQUIRE(wanted != DataType::UNDEFINED, "dtype must be float32, bfloat16 or float16, got " + dtype);
  const Tensor out = call.make(values.shape(), wanted);
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

PD_BUILD_OP(qwen1m_embedding)
    .Inputs({"ids", "table"})
    .Outputs({"out"})
    .Attrs({"first: int64_t", "vocabulary: int64_t"})
    .SetKernelFn(PD_KERNEL(qwen1m::embedding));

PD_BUILD_OP(qwen1m_gather_rows).Inputs({"hidden", "rows"}).Outputs({"out"}).SetKernelFn(PD_KERNEL(qwen1m::gather_rows));

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
    .Attrs({"float32_out: bool"})
    .SetKernelFn(PD_KERNEL(qwen1m::linear));

PD_BUILD_OP(qwen1m_silu_mul).Inputs({"gate_up"}).Outputs({"out"}).SetKernelFn(PD_KERNEL(qwen1m::silu_mul));

PD_BUILD_OP(qwen1m_cast)
    .Inputs({"values"})
    .Outputs({"out"})
    .Attrs({"dtype: std::string"})
    .SetKernelFn(PD_KERNEL(qwen1m::cast));
