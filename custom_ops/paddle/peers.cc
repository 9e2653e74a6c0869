// PD_BUILD_OP bindings of what ranks bring into each other's memory.
#include "qwen1m/peers.h"

#include "call.h"

namespace qwen1m {
namespace {

using Addresses = std::vector<int64_t>;

void expect_others(const Addresses& flags, int64_t number, int64_t mark) {
  const auto count = static_cast<int64_t>(flags.size());
  QWEN1M_REQUIRE(count >= 1 && count < QWEN1M_PEER_RANKS,
                 "there must be 1 to " + text(QWEN1M_PEER_RANKS - 1) + " other ranks, got " + text(count));
  QWEN1M_REQUIRE(number >= 0 && number < QWEN1M_PEER_NUMBERS,
                 "number must be below " + text(QWEN1M_PEER_NUMBERS) + ", got " + text(number));
  QWEN1M_REQUIRE(mark >= 0 && mark < QWEN1M_COPIER_MARKS,
                 "mark must be below " + text(QWEN1M_COPIER_MARKS) + ", got " + text(mark));
}

void send_rows(Tensor& values, int64_t copier, const Addresses& from, const Addresses& to, const Addresses& flags,
               int64_t bytes, int64_t number, int64_t mark) {
  const Call call(values);
  expect_others(flags, number, mark);
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
          .mark = static_cast<int32_t>(mark),
      },
      QWEN1M_KERNEL(send_rows));
}

void await_rows(Tensor& values, int64_t copier, const Addresses& flags, int64_t number, int64_t mark) {
  const Call call(values);
  expect_others(flags, number, mark);
  call.run(
      qwen1m_await_rows{
          .copier = copier,
          .flags = flags.data(),
          .count = static_cast<int32_t>(flags.size()),
          .number = static_cast<int32_t>(number),
          .mark = static_cast<int32_t>(mark),
      },
      QWEN1M_KERNEL(await_rows));
}

}  // namespace
}  // namespace qwen1m

PD_BUILD_OP(qwen1m_send_rows)
    .Inputs({"values"})
    .Outputs({"same"})
    .Attrs({"copier: int64_t", "from: std::vector<int64_t>", "to: std::vector<int64_t>", "flags: std::vector<int64_t>",
            "bytes: int64_t", "number: int64_t", "mark: int64_t"})
    .SetInplaceMap({{"values", "same"}})
    .SetKernelFn(PD_KERNEL(qwen1m::send_rows));

PD_BUILD_OP(qwen1m_await_rows)
    .Inputs({"values"})
    .Outputs({"same"})
    .Attrs({"copier: int64_t", "flags: std::vector<int64_t>", "number: int64_t", "mark: int64_t"})
    .SetInplaceMap({{"values", "same"}})
    .SetKernelFn(PD_KERNEL(qwen1m::await_rows));
