// Bindings of linear layers whose weights are bytes with scales.
#include "qwen1m/weight8.h"

#include "call.h"

namespace qwen1m {
namespace {

bool is_power_of_two(int64_t number) { return number > 0 && (number & (number - 1)) == 0; }

// `kind` is int8 or fp8; the blocks are what the shapes of numbers and scales say.
qwen1m_weight8 expect_weight(const Call& call, const Tensor& numbers, const Tensor& scales, const std::string& kind,
                             int64_t depth) {
  QWEN1M_REQUIRE(kind == "int8" || kind == "fp8", "kind must be int8 or fp8, got " + kind);
  call.expect(numbers, "numbers", DataType::UINT8, {-1, depth});
  call.expect(scales, "scales", DataType::FLOAT32, {-1, -1});
  const int64_t down = scales.shape()[0], across = scales.shape()[1], features = numbers.shape()[0];
  depth = numbers.shape()[1];
  const int64_t rows = down ? features / down : 0, columns = across ? depth / across : 0;
  QWEN1M_REQUIRE(rows * down == features && columns * across == depth && is_power_of_two(rows) && rows <= 128 &&
                     is_power_of_two(columns) && columns <= 128 && columns >= QWEN1M_LEAST_COLUMNS,
                 "scales must be of blocks of 1 to 128 rows and " + text(QWEN1M_LEAST_COLUMNS) +
                     " to 128 columns, powers of two, got " + text(scales.shape()) + " for numbers of " +
                     text(numbers.shape()));
  QWEN1M_REQUIRE(!call.on_gpu() || columns >= 64,
                 "blocks must have at least 64 columns on a GPU, got " + text(columns));
  return {numbers.data<uint8_t>(), scales.data<float>(), kind == "fp8" ? QWEN1M_E4M3 : QWEN1M_INT8,
          static_cast<int32_t>(rows), static_cast<int32_t>(columns)};
}

Tensors linear8(const Tensor& x, const Tensor& numbers, const Tensor& scales, const std::string& kind) {
  Call call(x);
  const qwen1m_dtype activation = call.expect_activation(x, "x", {-1, -1});
  const int64_t tokens = x.shape()[0], depth = x.shape()[1];
  const qwen1m_weight8 weight = expect_weight(call, numbers, scales, kind, depth);
  const int64_t features = numbers.shape()[0];
  const Tensor y = call.make_activation({tokens, features});
  call.run(
      qwen1m_linear8{
          .x = x.data(),
          .weight = weight,
          .y = memory(y),
          .tokens = tokens,
          .in_features = depth,
          .out_features = features,
          .activation = activation,
          .out_dtype = storage_type(y, "y"),
      },
      QWEN1M_KERNEL(linear8));
  return {y};
}

Tensors widen_weight(const Tensor& numbers, const Tensor& scales, const std::string& kind, const std::string& dtype) {
  const Call call(numbers);
  const qwen1m_weight8 weight = expect_weight(call, numbers, scales, kind, -1);
  const Tensor out = call.make(numbers.shape(), named_type(dtype));
  const qwen1m_dtype type = storage_type(out, "out");
  QWEN1M_REQUIRE(!call.on_gpu() || type != QWEN1M_FLOAT32, "dtype must be bfloat16 or float16 on a GPU, got float32");
  call.run(
      qwen1m_widen_weight{
          .weight = weight,
          .out = memory(out),
          .in_features = numbers.shape()[1],
          .out_features = numbers.shape()[0],
          .out_dtype = type,
      },
      QWEN1M_KERNEL(widen_weight));
  return {out};
}

// Memory for T rows of FP8, which is what an op returns: numbers and scales.
struct Rows8 {
  Tensor numbers, scales;

  Rows8(const Call& call, int64_t tokens, int64_t width)
      : numbers(call.make({padded(tokens), width}, DataType::UINT8)),
        scales(call.make({width / QWEN1M_ROWS8_BLOCK, padded(tokens)}, DataType::FLOAT32)) {
    QWEN1M_REQUIRE(width % QWEN1M_ROWS8_BLOCK == 0,
                   "rows of FP8 must hold a multiple of " + text(QWEN1M_ROWS8_BLOCK) + " values, got " + text(width));
  }

  static int64_t padded(int64_t tokens) {
    return (tokens + QWEN1M_ROWS8_MULTIPLE - 1) / QWEN1M_ROWS8_MULTIPLE * QWEN1M_ROWS8_MULTIPLE;
  }

  qwen1m_rows8 fields() const { return {pointer<uint8_t>(numbers), pointer<float>(scales), numbers.shape()[0]}; }
};

Tensors round_rows(const Tensor& values) {
  Call call(values);
  const qwen1m_dtype activation = call.expect_activation(values, "values", {-1, -1});
  const int64_t tokens = values.shape()[0], width = values.shape()[1];
  const Rows8 out(call, tokens, width);
  call.run(
      qwen1m_round_rows{
          .values = values.data(),
          .out = out.fields(),
          .tokens = tokens,
          .width = width,
          .activation = activation,
      },
      QWEN1M_KERNEL(round_rows));
  return {out.numbers, out.scales};
}

Tensors normalise8(const Tensor* delta, const Tensor& residual, const Tensor& weight, float eps) {
  Call call(residual);
  call.expect(residual, delta ? "residual" : "hidden", DataType::FLOAT32, {-1, -1});
  const int64_t tokens = residual.shape()[0], width = residual.shape()[1];
  if (delta) call.expect_activation(*delta, "delta", {tokens, width});
  const qwen1m_dtype type = call.expect_stored(weight, "weight", {width});
  const Rows8 out(call, tokens, width);
  call.run(
      qwen1m_rms_norm8{
          .norm =
              {
                  .delta = delta ? delta->data() : nullptr,
                  .residual = pointer<float>(residual),
                  .weight = weight.data(),
                  .out = nullptr,
                  .tokens = tokens,
                  .width = width,
                  .eps = eps,
                  .activation = call.on_gpu() ? type : QWEN1M_FLOAT32,
                  .dtype = type,
              },
          .out = out.fields(),
      },
      QWEN1M_KERNEL(rms_norm8));
  return {out.numbers, out.scales};
}

Tensors rms_norm8(const Tensor& hidden, const Tensor& weight, float eps) {
  return normalise8(nullptr, hidden, weight, eps);
}

Tensors add_rms_norm8(const Tensor& delta, Tensor& residual, const Tensor& weight, float eps) {
  return normalise8(&delta, residual, weight, eps);
}

// Without y, for activations of the call's device.
qwen1m_product8 expect_product(const Call& call, const Tensor& x, const Tensor& x_scales, const Tensor& numbers,
                               const Tensor& scales) {
  call.expect(x, "x", DataType::UINT8, {-1, -1});
  const int64_t rows = x.shape()[0], depth = x.shape()[1];
  QWEN1M_REQUIRE(rows % QWEN1M_ROWS8_MULTIPLE == 0,
                 "x must have a multiple of " + text(QWEN1M_ROWS8_MULTIPLE) + " rows, got " + text(rows));
  call.expect(x_scales, "x_scales", DataType::FLOAT32, {depth / QWEN1M_ROWS8_BLOCK, rows});
  const qwen1m_weight8 weight = expect_weight(call, numbers, scales, "fp8", depth);
  QWEN1M_REQUIRE(weight.rows == 128 && weight.columns == 128,
                 "scales must be of blocks of 128 x 128, got " + text(weight.rows) + " x " + text(weight.columns));
  return {
      .x = {pointer<uint8_t>(x), pointer<float>(x_scales), rows},
      .weight = weight,
      .y = nullptr,
      .in_features = depth,
      .out_features = numbers.shape()[0],
      .out_dtype = call.on_gpu() ? QWEN1M_BFLOAT16 : QWEN1M_FLOAT32,
  };
}

void product8(const Tensor& x, const Tensor& x_scales, const Tensor& numbers, const Tensor& scales, Tensor& y) {
  Call call(x);
  qwen1m_product8 product = expect_product(call, x, x_scales, numbers, scales);
  product.out_dtype = call.expect_activation(y, "y", {product.x.rows, product.out_features});
  product.y = memory(y);
  call.run(product, QWEN1M_WORKSPACE_KERNEL(product8));
}

Tensors gated_product8(const Tensor& x, const Tensor& x_scales, const Tensor& numbers, const Tensor& scales) {
  Call call(x);
  const qwen1m_product8 product = expect_product(call, x, x_scales, numbers, scales);
  QWEN1M_REQUIRE(product.out_features % (2 * QWEN1M_ROWS8_BLOCK) == 0,
                 "gate and up must have a multiple of " + text(QWEN1M_ROWS8_BLOCK) + " features each, got " +
                     text(product.out_features) + " together");
  const Rows8 out(call, product.x.rows, product.out_features / 2);
  call.run(qwen1m_gated_product8{product, out.fields()}, QWEN1M_KERNEL(gated_product8));
  return {out.numbers, out.scales};
}

}  // namespace
}  // namespace qwen1m

PD_BUILD_OP(qwen1m_linear8)
    .Inputs({"x", "numbers", "scales"})
    .Outputs({"y"})
    .Attrs({"kind: std::string"})
    .SetKernelFn(PD_KERNEL(qwen1m::linear8));

PD_BUILD_OP(qwen1m_widen_weight)
    .Inputs({"numbers", "scales"})
    .Outputs({"out"})
    .Attrs({"kind: std::string", "dtype: std::string"})
    .SetKernelFn(PD_KERNEL(qwen1m::widen_weight));

PD_BUILD_OP(qwen1m_round_rows)
    .Inputs({"values"})
    .Outputs({"numbers", "scales"})
    .SetKernelFn(PD_KERNEL(qwen1m::round_rows));

PD_BUILD_OP(qwen1m_rms_norm8)
    .Inputs({"hidden", "weight"})
    .Outputs({"numbers", "scales"})
    .Attrs({"eps: float"})
    .SetKernelFn(PD_KERNEL(qwen1m::rms_norm8));

PD_BUILD_OP(qwen1m_add_rms_norm8)
    .Inputs({"delta", "residual", "weight"})
    .Outputs({"sum", "numbers", "scales"})
    .Attrs({"eps: float"})
    .SetInplaceMap({{"residual", "sum"}})
    .SetKernelFn(PD_KERNEL(qwen1m::add_rms_norm8));

PD_BUILD_OP(qwen1m_product8)
    .Inputs({"x", "x_scales", "numbers", "scales", "y"})
    .Outputs({"written"})
    .SetInplaceMap({{"y", "written"}})
    .SetKernelFn(PD_KERNEL(qwen1m::product8));

PD_BUILD_OP(qwen1m_gated_product8)
    .Inputs({"x", "x_scales", "numbers", "scales"})
    .Outputs({"out", "out_scales"})
    .SetKernelFn(PD_KERNEL(qwen1m::gated_product8));
