// Log-probabilities: a block a row of logits as they are, its k most likely tokens and a given one.
#include "row_order.cuh"

namespace qwen1m {
namespace cuda {
namespace {

static_assert(kListed == QWEN1M_MOST_TOP_LOGPROBS);

__global__ void __launch_bounds__(kThreads, 1) top_logprobs_rows(const qwen1m_top_logprobs a) {
  __shared__ Shared shared;
  const int64_t b = blockIdx.x;
  const float* logits = a.logits + b * a.vocab;
  if (threadIdx.x == 0) {
    shared.row = {logits, nullptr, nullptr, nullptr, a.vocab, misalignment(logits), 1.0f, 0.0f, 0.0f};
    shared.masses = {0.0f, 1.0f, kNegativeInfinity};  // every token is present
  }
  __syncthreads();
  const Largest largest = find_largest(shared);
  const auto logprob = [&](float logit) { return logit - logit_of(largest.rank) - largest.log_sum_exp; };

  const float given = fmaxf(logits[a.ids[b]], kNegativeInfinity);
  uint64_t at_least = 0;
  for_each_token(shared.row, [&](int32_t, float logit) { at_least += logit >= given; });
  const uint64_t place = block_sums(shared.partial, at_least).total;
  if (threadIdx.x == 0) {
    a.logprobs[b] = logprob(given);
    a.ranks[b] = static_cast<int32_t>(place);
  }

  list_sorted(shared, narrow<false>(shared, a.k, true), true);
  if (threadIdx.x < a.k) {
    const uint64_t rank = shared.sorted[threadIdx.x];
    a.top_ids[b * a.k + threadIdx.x] = id_of(rank);
    a.top_logprobs[b * a.k + threadIdx.x] = logprob(logit_of(rank));
  }
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

int qwen1m_cuda_top_logprobs(const qwen1m_top_logprobs* a, qwen1m_stream stream) {
  using namespace qwen1m::cuda;
  if (a->vocab > kMaxVocab || a->k < 1 || a->k > min(a->vocab, kListed)) return cudaErrorInvalidValue;
  if (reinterpret_cast<uintptr_t>(a->logits) % sizeof(Pack<float>) != 0) return cudaErrorMisalignedAddress;
  top_logprobs_rows<<<a->batch, kThreads, 0, as_stream(stream)>>>(*a);
  return cudaGetLastError();
}
