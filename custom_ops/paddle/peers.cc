// PD_BUILD_OP bindings of what ranks bring into each other's memory, and of the norm that adds it up.
#include "qwen1m/peers.h"

#include "call.h"

namespace qwen1m {
namespace {

using Addresses = std::vector<int64_t>;

void expect_others(const Addresses& flags, int64_t number) {
  const auto count = static_cast<int64_t>(flags.size());
  QWEN1M_REQUIRE(count >= 1 && count < QWEN1M_PEER_RANKS,
                 "there must be 1 to " + text(QWEN1M_PEER_RANKS - 1) + " other ranks, got " + text(count));
  QWEN1M_REQUIRE(number >= 0 && number < QWEN1M_PEER_NUMBERS,
                 "number must be below " + text(QWEN1M_PEER_NUMBERS) + ", got " + text(number));
}

void send_rows(Tensor& values, int64_t copier, const Addresses& from, const Addresses& to, const Addresses& flags,
               int64_t bytes, int64_t number) {
  const Call call(values);
  expect_others(flags, number);
  QWEN1M_REQUIRE(from.size() == flags.size() && to.size() == flags.size(),
                 "from, to and flags must be of as many ranks, got " + text(static_cast<int64_t>(from.size())) + ", " +
                     text(static_cast<int64_t>(to.size())) + " and " + text(static_cast<int64_t>(flags.size())));
  call.run(
      qwen1m_send_rows{
          .copier = copier,
          .from = from.data(),
          .to = to.data(),
          .flags = flags.data(),
          .bytes = bytes,
          .count = static_cast<int32_t>(flags.size()),
          .number = static_cast<int32_t>(number),
      },
      QWEN1M_KERNEL(send_rows));
}

void await_rows(Tensor& values, int64_t copier, const Addresses& flags, int64_t number) {
  const Call call(values);
  expect_others(flags, number);
  call.run(
      qwen1m_await_rows{
          .copier = copier,
          .flags = flags.data(),
          .count = static_cast<int32_t>(flags.size()),
          .number = static_cast<int32_t>(number),
      },
      QWEN1M_KERNEL(await_rows));
}

// parts [degree - 1, rows, N], of which those from row `first` on are of delta's rows.
void parts_rms_norm(const Tensor& delta, Tensor& residual, const Tensor& weight, const Tensor& parts, Tensor& out,
                    float eps, int64_t first, int64_t rank) {
  Call call(residual);
  call.expect(residual, "residual", DataType::FLOAT32, {-1, -1});
  const int64_t tokens = residual.shape()[0], width = residual.shape()[1];
  const qwen1m_dtype activation = call.expect_activation(delta, "delta", {tokens, width});
  const qwen1m_dtype type = call.expect_stored(weight, "weight", {width});
  call.expect(parts, "parts", delta.dtype(), {-1, -1, width});
  call.expect(out, "out", delta.dtype(), {tokens, width});
  call.expect_width(width);
  const int64_t degree = parts.shape()[0] + 1, rows = parts.shape()[1];
  QWEN1M_REQUIRE(degree <= QWEN1M_PEER_RANKS && rank >= 0 && rank < degree,
                 "rank must be one of the " + text(degree) + " that there are parts of, at most " +
                     text(QWEN1M_PEER_RANKS) + ", got " + text(rank));
  QWEN1M_REQUIRE(first >= 0 && first + tokens <= rows, "rows " + text(first) + " to " + text(first + tokens) +
                                                           " are not among the " + text(rows) + " of the parts");
  const auto* part = static_cast<const char*>(parts.data());
  call.run(
      qwen1m_parts_rms_norm{
          .norm =
              {
                  .delta = delta.data(),
                  .residual = pointer<float>(residual),
                  .weight = weight.data(),
                  .out = memory(out),
                  .tokens = tokens,
                  .width = width,
                  .eps = eps,
                  .activation = activation,
                  .dtype = type,
              },
          .parts = part + first * width * qwen1m_bytes_of(activation),
          .stride = rows * width,
          .rank = static_cast<int32_t>(rank),
          .degree = static_cast<int32_t>(degree),
      },
      QWEN1M_KERNEL(parts_rms_norm));
}

}  // namespace
}  // namespace qwen1m

PD_BUILD_OP(qwen1m_send_rows)
    .Inputs({"values"})
    .Outputs({"same"})
    .Attrs({"copier: int64_t", "from: std::vector<int64_t>", "to: std::vector<int64_t>", "flags: std::vector<int64_t>",
            "bytes: int64_t", "number: int64_t"})
    .SetInplaceMap({{"values", "same"}})
    .SetKernelFn(PD_KERNEL(qwen1m::send_rows));

PD_BUILD_OP(qwen1m_await_rows)
    .Inputs({"values"})
    .Outputs({"same"})
    .Attrs({"copier: int64_t", "flags: std::vector<int64_t>", "number: int64_t"})
    .SetInplaceMap({{"values", "same"}})
    .SetKernelFn(PD_KERNEL(qwen1m::await_rows));

PD_BUILD_OP(qwen1m_parts_rms_norm)
    .Inputs({"delta", "residual", "weight", "parts", "out"})
    .Outputs({"sum", "normed"})
    .Attrs({"eps: float", "first: int64_t", "rank: int64_t"})
    .SetInplaceMap({{"residual", "sum"}, {"out", "normed"}})
    .SetKernelFn(PD_KERNEL(qwen1m::parts_rms_norm));
