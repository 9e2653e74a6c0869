// PD_BUILD_OP bindings of sampling and log-probabilities.
#include "qwen1m/sampling.h"

#include "call.h"

namespace qwen1m {
namespace {

// Paddle has no unsigned tensors of 16 or 32 bits: counts and masks are bits in signed ones.
Tensors sample(const Tensor& logits, Tensor& counts, const Tensor& mask, const Tensor& masked, const Tensor& bias,
               const Tensor& biased, const Tensor& repetition_penalty, const Tensor& frequency_penalty,
               const Tensor& presence_penalty, const Tensor& temperature, const Tensor& min_p, const Tensor& top_k,
               const Tensor& top_p, const Tensor& seeds, Tensor& steps) {
  const Call call(logits);
  call.expect(logits, "logits", DataType::FLOAT32, {-1, -1});
  const int64_t batch = logits.shape()[0], vocab = logits.shape()[1];
  call.expect(counts, "counts", DataType::INT16, {batch, vocab});
  call.expect(mask, "mask", DataType::INT32, {batch, (vocab + 31) / 32});
  call.expect(masked, "masked", DataType::UINT8, {batch});
  call.expect(bias, "bias", DataType::FLOAT32, {batch, vocab});
  call.expect(biased, "biased", DataType::UINT8, {batch});
  call.expect(repetition_penalty, "repetition_penalty", DataType::FLOAT32, {batch});
  call.expect(frequency_penalty, "frequency_penalty", DataType::FLOAT32, {batch});
  call.expect(presence_penalty, "presence_penalty", DataType::FLOAT32, {batch});
  call.expect(temperature, "temperature", DataType::FLOAT32, {batch});
  call.expect(min_p, "min_p", DataType::FLOAT32, {batch});
  call.expect(top_k, "top_k", DataType::INT32, {batch});
  call.expect(top_p, "top_p", DataType::FLOAT32, {batch});
  call.expect(seeds, "seeds", DataType::INT64, {batch});
  call.expect(steps, "steps", DataType::INT64, {batch});
  const Tensor ids = call.make({batch}, DataType::INT64), logprobs = call.make({batch}, DataType::FLOAT32);
  call.run(
      qwen1m_sample{
          .logits = logits.data<float>(),
          .counts = reinterpret_cast<uint16_t*>(pointer<int16_t>(counts)),
          .mask = reinterpret_cast<const uint32_t*>(mask.data<int32_t>()),
          .masked = masked.data<uint8_t>(),
          .bias = bias.data<float>(),
          .biased = biased.data<uint8_t>(),
          .repetition_penalty = repetition_penalty.data<float>(),
          .frequency_penalty = frequency_penalty.data<float>(),
          .presence_penalty = presence_penalty.data<float>(),
          .temperature = temperature.data<float>(),
          .min_p = min_p.data<float>(),
          .top_k = top_k.data<int32_t>(),
          .top_p = top_p.data<float>(),
          .seeds = seeds.data<int64_t>(),
          .steps = pointer<int64_t>(steps),
          .ids = pointer<int64_t>(ids),
          .logprobs = pointer<float>(logprobs),
          .batch = static_cast<int32_t>(batch),
          .vocab = static_cast<int32_t>(vocab),
      },
      QWEN1M_KERNEL(sample));
  return {ids, logprobs};
}

Tensors top_logprobs(const Tensor& logits, const Tensor& ids, int64_t k) {
  const Call call(logits);
  call.expect(logits, "logits", DataType::FLOAT32, {-1, -1});
  const int64_t batch = logits.shape()[0], vocab = logits.shape()[1];
  call.expect(ids, "ids", DataType::INT64, {batch});
  const int64_t most = std::min<int64_t>(vocab, QWEN1M_MOST_TOP_LOGPROBS);
  QWEN1M_REQUIRE(1 <= k && k <= most, "k must be 1 to " + text(most) + ", got " + text(k));
  for (int64_t i = 0; !call.on_gpu() && i < batch; ++i) {
    const int64_t id = ids.data<int64_t>()[i];
    QWEN1M_REQUIRE(0 <= id && id < vocab, "id " + text(id) + " is outside the vocabulary of " + text(vocab));
  }
  const Tensor top_ids = call.make({batch, k}, DataType::INT32), top = call.make({batch, k}, DataType::FLOAT32);
  const Tensor own = call.make({batch}, DataType::FLOAT32), ranks = call.make({batch}, DataType::INT32);
  call.run(
      qwen1m_top_logprobs{
          .logits = logits.data<float>(),
          .ids = ids.data<int64_t>(),
          .top_ids = pointer<int32_t>(top_ids),
          .top_logprobs = pointer<float>(top),
          .logprobs = pointer<float>(own),
          .ranks = pointer<int32_t>(ranks),
          .batch = static_cast<int32_t>(batch),
          .vocab = static_cast<int32_t>(vocab),
          .k = static_cast<int32_t>(k),
      },
      QWEN1M_KERNEL(top_logprobs));
  return {top_ids, top, own, ranks};
}

}  // namespace
}  // namespace qwen1m

PD_BUILD_OP(qwen1m_sample)
    .Inputs({"logits", "counts", "mask", "masked", "bias", "biased", "repetition_penalty", "frequency_penalty",
             "presence_penalty", "temperature", "min_p", "top_k", "top_p", "seeds", "steps"})
    .Outputs({"counted", "advanced", "ids", "logprobs"})
    .SetInplaceMap({{"counts", "counted"}, {"steps", "advanced"}})
    .SetKernelFn(PD_KERNEL(qwen1m::sample));

PD_BUILD_OP(qwen1m_top_logprobs)
    .Inputs({"logits", "ids"})
    .Outputs({"top_ids", "top_logprobs", "logprobs", "ranks"})
    .Attrs({"k: int64_t"})
    .SetKernelFn(PD_KERNEL(qwen1m::top_logprobs));
