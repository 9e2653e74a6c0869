// PD_BUILD_OP binding of sampling.
#include "qwen1m/sampling.h"

#include "call.h"

namespace qwen1m {
namespace {

Tensors sample(const Tensor& logits, Tensor& seen, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
               const Tensor& repetition_penalty, const Tensor& banned, const Tensor& banned_steps, const Tensor& seeds,
               Tensor& steps) {
  const Call call(logits);
  call.expect(logits, "logits", DataType::FLOAT32, {-1, -1});
  const int64_t batch = logits.shape()[0], vocab = logits.shape()[1];
  call.expect(seen, "seen", DataType::UINT8, {batch, vocab});
  call.expect(temperature, "temperature", DataType::FLOAT32, {batch});
  call.expect(top_k, "top_k", DataType::INT32, {batch});
  call.expect(top_p, "top_p", DataType::FLOAT32, {batch});
  call.expect(repetition_penalty, "repetition_penalty", DataType::FLOAT32, {batch});
  call.expect(banned, "banned", DataType::INT32, {batch, -1});
  call.expect(banned_steps, "banned_steps", DataType::INT64, {batch});
  call.expect(seeds, "seeds", DataType::INT64, {batch});
  call.expect(steps, "steps", DataType::INT64, {batch});
  const int64_t banned_width = banned.shape()[1];
  for (int64_t i = 0; !call.on_gpu() && i < batch * banned_width; ++i) {
    const int32_t id = banned.data<int32_t>()[i];
    QWEN1M_REQUIRE(id < vocab, "banned id " + text(id) + " is outside the vocabulary of " + text(vocab));
  }
  const Tensor ids = call.make({batch}, DataType::INT64), logprobs = call.make({batch}, DataType::FLOAT32);
  call.run(
      qwen1m_sample{
          .logits = logits.data<float>(),
          .seen = pointer<uint8_t>(seen),
          .temperature = temperature.data<float>(),
          .top_k = top_k.data<int32_t>(),
          .top_p = top_p.data<float>(),
          .repetition_penalty = repetition_penalty.data<float>(),
          .banned = banned.data<int32_t>(),
          .banned_steps = banned_steps.data<int64_t>(),
          .seeds = seeds.data<int64_t>(),
          .steps = pointer<int64_t>(steps),
          .ids = pointer<int64_t>(ids),
          .logprobs = pointer<float>(logprobs),
          .batch = static_cast<int32_t>(batch),
          .vocab = static_cast<int32_t>(vocab),
          .banned_width = static_cast<int32_t>(banned_width),
      },
      QWEN1M_KERNEL(sample));
  return {ids, logprobs};
}

}  // namespace
}  // namespace qwen1m

PD_BUILD_OP(qwen1m_sample)
    .Inputs({"logits", "seen", "temperature", "top_k", "top_p", "repetition_penalty", "banned", "banned_steps", "seeds",
             "steps"})
    .Outputs({"marked", "counted", "ids", "logprobs"})
    .SetInplaceMap({{"seen", "marked"}, {"steps", "counted"}})
    .SetKernelFn(PD_KERNEL(qwen1m::sample));
