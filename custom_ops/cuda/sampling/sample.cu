// Sampling: a block a row.
//
// A greedy row needs one sweep over its logits. For a draw `narrow` finds the borders of top_k and top_p and the token
// that the random number falls on. With a small top_k all that it keeps fits the list, and one descent is enough.
// Tokens below min_p, and those whose mass rounds to nothing, count as absent.
#include "row_order.cuh"

namespace qwen1m {
namespace cuda {
namespace {

struct Token {
  uint64_t rank;
  uint64_t through;  // mass of this token and all that rank higher
};

// Uniform over the multiples of 2^-24 in [0, 1), times 2^24, a function of (seed, step) alone: splitmix64's finaliser.
__device__ uint64_t uniform_24_bits(uint64_t seed, uint64_t step) {
  uint64_t z = seed + 0x9E3779B97F4A7C15ull * (step + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return (z ^ (z >> 31)) >> 40;
}

// The token at which the mass reaches `goal`, from each thread's own and the mass before it.
__device__ Token reach(uint64_t rank, uint64_t mass, uint64_t before, uint64_t goal) {
  __shared__ uint64_t reached[2];
  if (before < goal && goal <= before + mass) {
    reached[0] = rank;
    reached[1] = before + mass;
  }
  __syncthreads();
  const Token token{reached[0], reached[1]};
  __syncthreads();
  return token;
}

// The token at which the mass of all tokens reaches `goal`.
__device__ __noinline__ Token find_mass(Shared& shared, uint64_t goal) {
  const Band band = narrow<true>(shared, goal, false);
  const int32_t count = list_sorted(shared, band, false);
  const uint64_t rank = threadIdx.x < count ? shared.sorted[threadIdx.x] : 0;
  const uint64_t mass = threadIdx.x < count ? shared.masses(logit_of(rank)) : 0;
  return reach(rank, mass, band.before + block_sums(shared.partial, mass).before, goal);
}

// Reached by the last token before which the mass is below top_p.
__device__ uint64_t top_p_goal(float top_p, uint64_t total) {
  const double goal = ceil(static_cast<double>(top_p) * static_cast<double>(total));
  return goal < 1.0 ? 1 : min(static_cast<uint64_t>(goal), total);
}

// Reached by the first token through which the mass exceeds uniform * kept.
__device__ uint64_t draw_goal(uint64_t uniform, uint64_t kept) { return __umul64hi(kept, uniform << 40) + 1; }

// The rank of the token that is drawn.
__device__ __noinline__ uint64_t draw(Shared& shared, int32_t top_k, float top_p, uint64_t uniform) {
  if (top_k <= kListed) {
    const Band band = narrow<false>(shared, top_k, true);
    const int32_t count = min(list_sorted(shared, band, true), top_k);
    const uint64_t rank = threadIdx.x < count ? shared.sorted[threadIdx.x] : 0;
    const uint64_t mass = threadIdx.x < count ? shared.masses(logit_of(rank)) : 0;
    const Sums<uint64_t> sums = block_sums(shared.partial, mass);
    uint64_t kept = sums.total;
    if (top_p < 1.0f) kept = reach(rank, mass, sums.before, top_p_goal(top_p, kept)).through;
    return reach(rank, mass, sums.before, draw_goal(uniform, kept)).rank;
  }
  uint64_t lowest = 0;  // rank that top_k keeps
  if (top_k < shared.row.vocab) {
    const Band band = narrow<false>(shared, top_k, false);
    const int32_t count = list_sorted(shared, band, false);
    lowest = shared.sorted[min(top_k - static_cast<int32_t>(band.before), count) - 1];
  }
  const Row& row = shared.row;
  const Masses& masses = shared.masses;
  uint64_t kept = 0;
  for_each_token(row, [&](int32_t id, float logit) {
    if (rank_of(logit, id) >= lowest) kept += masses(logit);
  });
  kept = block_sums(shared.partial, kept).total;
  if (top_p < 1.0f) kept = find_mass(shared, top_p_goal(top_p, kept)).through;
  return find_mass(shared, draw_goal(uniform, kept)).rank;
}

__global__ void __launch_bounds__(kThreads, 1) sample_rows(const qwen1m_sample a) {
  __shared__ Shared shared;
  const int64_t b = blockIdx.x, begin = b * a.vocab;
  const int64_t step = a.steps[b];
  if (step < 0) {  // no sequence
    if (threadIdx.x == 0) {
      a.ids[b] = 0;
      a.logprobs[b] = 0.0f;
    }
    return;
  }
  if (threadIdx.x == 0) {
    const float repetition = a.repetition_penalty[b], frequency = a.frequency_penalty[b];
    const float presence = a.presence_penalty[b];
    const bool penalised = repetition != 1.0f || frequency != 0.0f || presence != 0.0f;
    shared.row = {a.logits + begin,
                  a.biased[b] ? a.bias + begin : nullptr,
                  penalised ? a.counts + begin : nullptr,
                  a.masked[b] ? a.mask + b * ceil_div(a.vocab, kMaskBits) : nullptr,
                  a.vocab,
                  misalignment(a.logits + begin),
                  repetition,
                  frequency,
                  presence};
  }
  __syncthreads();
  const Largest largest = find_largest(shared);
  const float logit = logit_of(largest.rank);
  const float temperature = a.temperature[b];
  const int32_t top_k = a.top_k[b] > 0 ? min(a.top_k[b], a.vocab) : a.vocab;
  uint64_t chosen = largest.rank;
  if (temperature > 0.0f && top_k > 1 && isfinite(logit)) {
    if (threadIdx.x == 0) {
      const float lowest = fmaxf(-kMassBits, log2f(a.min_p[b]));
      shared.masses = {logit, min(kLog2E / temperature, FLT_MAX), lowest};
    }
    __syncthreads();
    chosen = draw(shared, top_k, a.top_p[b], uniform_24_bits(a.seeds[b], step));
  }
  if (threadIdx.x == 0) {
    const int32_t id = id_of(chosen);
    a.ids[b] = id;
    a.logprobs[b] = logit_of(chosen) - logit - largest.log_sum_exp;
    uint16_t& count = a.counts[begin + id];
    if ((count & QWEN1M_LARGEST_COUNT) != QWEN1M_LARGEST_COUNT) ++count;
    a.steps[b] = step + 1;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

int qwen1m_cuda_sample(const qwen1m_sample* a, qwen1m_stream stream) {
  using namespace qwen1m::cuda;
  if (a->vocab > kMaxVocab) return cudaErrorInvalidValue;
  // Rows of all three begin equally far from where packs may.
  if (reinterpret_cast<uintptr_t>(a->logits) % sizeof(Pack<float>) != 0) return cudaErrorMisalignedAddress;
  if (reinterpret_cast<uintptr_t>(a->bias) % sizeof(Pack<float>) != 0) return cudaErrorMisalignedAddress;
  if (reinterpret_cast<uintptr_t>(a->counts) % sizeof(uint2) != 0) return cudaErrorMisalignedAddress;
  sample_rows<<<a->batch, kThreads, 0, as_stream(stream)>>>(*a);
  return cudaGetLastError();
}
