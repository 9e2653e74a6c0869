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
