// Logits processing and sampling: a block a row, no sort of the vocabulary and nothing stored on the way.
//
// Penalties and bans are applied to the logits anew in every sweep over a row. The first sweep finds the largest logit
// and the sum of exp, all that a greedy row needs. For a draw, a token's place in the order (logit descending, id
// ascending) is one number, its rank. `narrow` finds the token at which the number of tokens, or their mass, reaches a
// goal: a radix descent over the bits of the rank, a histogram a sweep, until few candidates are left; those are listed
// in shared memory, sorted and scanned. With a small top_k all that it keeps fits the list, and one descent is enough.
//
// Masses are fixed point numbers, so that their sums do not depend on the order of atomics: exp((logit - largest) /
// temperature) in multiples of 2^-40. Tokens that round to nothing are never drawn and count as absent.
#include <cfloat>

#include "block_scan.cuh"
#include "common.cuh"
#include "qwen1m/sampling.h"

namespace qwen1m {
namespace cuda {
namespace {

constexpr int kThreads = kScanThreads;
constexpr int kPack = Pack<float>::kSize;
constexpr int kIdBits = 22;
constexpr int kRankBits = 32 + kIdBits;
constexpr int32_t kMaxVocab = 1 << kIdBits;
constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
constexpr int kListed = 512;
constexpr int kMassBits = 40;

// Tokens whose rank begins with `prefix`, its bits from `shift` on.
struct Band {
  uint64_t prefix;
  int shift;
  int32_t tokens;
  uint64_t before;  // number, or mass, of the tokens that rank higher
};

struct Token {
  uint64_t rank;
  uint64_t through;  // mass of this token and all that rank higher
};

// Neighbouring tokens: what a thread reads at a time.
struct Tokens {
  Pack<float> logits;
  uint32_t seen;  // a byte each
};

// One row's logits, processed when they are read. The row begins `misaligned` logits behind a multiple of 16 bytes.
struct Row {
  const float* logits;
  const uint8_t* seen;  // null without a penalty
  const int32_t* banned;
  int32_t vocab, num_banned, misaligned;
  float penalty;

  // What lies outside of the row is -inf, which has no part in anything.
  __device__ Tokens load(int32_t id) const {
    if (id >= 0 && id + kPack <= vocab) {
      const float4 values = __ldg(reinterpret_cast<const float4*>(logits + id));
      return {{values.x, values.y, values.z, values.w},
              seen == nullptr ? 0 : __ldca(reinterpret_cast<const uint32_t*>(seen + id))};
    }
    Tokens tokens{{kNegativeInfinity, kNegativeInfinity, kNegativeInfinity, kNegativeInfinity}, 0};
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      if (id + i < 0 || id + i >= vocab) continue;
      tokens.logits.values[i] = logits[id + i];
      if (seen != nullptr) tokens.seen |= static_cast<uint32_t>(seen[id + i]) << (8 * i);
    }
    return tokens;
  }

  // Penalty and bans. NaN counts as -inf and -0 as 0.
  __device__ Pack<float> process(const Tokens& tokens, int32_t id) const {
    Pack<float> out;
#pragma unroll
    for (int i = 0; i < kPack; ++i) out.values[i] = fmaxf(tokens.logits.values[i], kNegativeInfinity) + 0.0f;
    if (tokens.seen != 0) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        float& x = out.values[i];
        if (tokens.seen >> (8 * i) & 0xFF) x = x > 0.0f ? x / penalty : x * penalty;
      }
    }
#pragma unroll 1
    for (int32_t b = 0; b < num_banned; ++b) {
      const int32_t place = __ldg(banned + b) - id;
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        if (place == i) out.values[i] = kNegativeInfinity;
      }
    }
    return out;
  }
};

// The id of a thread's first token, at 16 bytes and hence below 0 in the first thread of some rows.
__device__ int32_t first_id(const Row& row) { return static_cast<int32_t>(threadIdx.x) * kPack - row.misaligned; }

// visit(id, logits) for kPack neighbours from `id` on and every other pack of the row, ids ascending in a thread. The
// next pack is on its way meanwhile.
template <typename Visit>
__device__ void for_each_pack(const Row& row, const Visit& visit) {
  constexpr int32_t kStride = kThreads * kPack;
  Tokens next = row.load(first_id(row));
#pragma unroll 1
  for (int32_t id = first_id(row); id < row.vocab; id += kStride) {
    const Pack<float> logits = row.process(next, id);
    next = row.load(id + kStride);
    visit(id, logits);
  }
}

// visit(id, logit) for every token of the row.
template <typename Visit>
__device__ void for_each_token(const Row& row, const Visit& visit) {
  for_each_pack(row, [&](int32_t id, const Pack<float>& logits) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) visit(id + i, logits.values[i]);
  });
}

// Larger for what comes first: larger logits, then lower ids.
__device__ uint64_t rank_of(float logit, int32_t id) {
  const uint32_t bits = __float_as_uint(logit);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << kIdBits | (kMaxVocab - 1 - id);
}

__device__ int32_t id_of(uint64_t rank) { return kMaxVocab - 1 - static_cast<int32_t>(rank & (kMaxVocab - 1)); }

__device__ float logit_of(uint64_t rank) {
  const uint32_t ordered = static_cast<uint32_t>(rank >> kIdBits);
  return __uint_as_float(ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered);
}

// Uniform over the multiples of 2^-24 in [0, 1), times 2^24, a function of (seed, step) alone: splitmix64's finaliser.
__device__ uint64_t uniform_24_bits(uint64_t seed, uint64_t step) {
  uint64_t z = seed + 0x9E3779B97F4A7C15ull * (step + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return (z ^ (z >> 31)) >> 40;
}

__device__ uint64_t to_fixed(float x) { return __float2ull_rn(x * (1ull << kMassBits)); }

// exp((logit - largest) / temperature) as a fixed point number.
struct Masses {
  float largest, scale;  // log2(e) / temperature

  __device__ float exponent(float logit) const { return (logit - largest) * scale; }
  __device__ bool present(float logit) const { return exponent(logit) >= -kMassBits; }
  __device__ uint64_t operator()(float logit) const { return present(logit) ? to_fixed(exp2f(exponent(logit))) : 0; }
};

struct Shared {
  union {
    struct {
      uint32_t tokens[kDigits];
      uint32_t mass_low[kDigits], mass_high[kDigits];
    };
    struct {
      uint64_t listed[kListed], sorted[kListed];
    };
  };
  uint64_t partial[kWarp];
  Row row;
  Masses masses;
  int32_t num_listed;
  Band band;
  Token token;
};

struct Largest {
  uint64_t rank;
  float log_sum_exp;  // of logit - largest
};

__device__ __noinline__ Largest find_largest(Shared& shared) {
  const Row& row = shared.row;
  float largest = kNegativeInfinity, reference = -FLT_MAX;  // the largest, made finite
  float sum = 0.0f;                                         // of exp(logit - reference)
  int32_t id = max(first_id(row), 0);
  for_each_pack(row, [&](int32_t first, const Pack<float>& logits) {
    float highest = logits.values[kPack - 1];
#pragma unroll
    for (int i = 0; i < kPack - 1; ++i) highest = fmaxf(highest, logits.values[i]);
    if (highest > largest) {
      const float old = reference;
      largest = highest;
      reference = fmaxf(highest, -FLT_MAX);
      sum *= exp2f((old - reference) * kLog2E);
#pragma unroll
      for (int i = kPack - 1; i >= 0; --i) {
        if (logits.values[i] == highest) id = first + i;
      }
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum += exp2f((logits.values[i] - reference) * kLog2E);
  });
  const uint64_t rank = block_max(shared.partial, rank_of(largest, id));
  const uint64_t own = to_fixed(sum * exp2f((reference - logit_of(rank)) * kLog2E));
  const uint64_t total = block_sums(shared.partial, own).total;
  return {rank, logf(static_cast<float>(total)) - kMassBits * kLn2};
}

// The band of at most kListed tokens, those before it included where `with_higher`, in which the number (kByMass: the
// mass) of tokens reaches `goal`, from 1 on; the lowest band where all together do not.
template <bool kByMass>
__device__ __noinline__ Band narrow(Shared& shared, uint64_t goal, bool with_higher) {
  const Row& row = shared.row;
  const Masses& masses = shared.masses;
  Band band{0, kRankBits, 0, 0};
  while (band.shift > 0) {
    const int shift = max(band.shift - kDigitBits, 0);
    const uint32_t digit_mask = (1u << (band.shift - shift)) - 1;
    for (int i = threadIdx.x; i < kDigits; i += kThreads) {
      shared.tokens[i] = shared.mass_low[i] = shared.mass_high[i] = 0;
    }
    __syncthreads();
    for_each_token(row, [&](int32_t id, float logit) {
      const uint64_t rank = rank_of(logit, id);
      if (!masses.present(logit) || rank >> band.shift != band.prefix) return;
      const uint32_t digit = static_cast<uint32_t>(rank >> shift) & digit_mask;
      atomicAdd(&shared.tokens[digit], 1);
      if (kByMass) {
        const uint64_t mass = masses(logit);
        const uint32_t low = static_cast<uint32_t>(mass), old = atomicAdd(&shared.mass_low[digit], low);
        const uint32_t high = static_cast<uint32_t>(mass >> 32) + (old + low < old ? 1 : 0);
        if (high != 0) atomicAdd(&shared.mass_high[digit], high);
      }
    });
    __syncthreads();
    // A thread adds up two digits; the first thread has the largest.
    const auto weight = [&](int digit) -> uint64_t {
      if (!kByMass) return shared.tokens[digit];
      return static_cast<uint64_t>(shared.mass_high[digit]) << 32 | shared.mass_low[digit];
    };
    const int high = kDigits - 1 - 2 * threadIdx.x, low = high - 1;
    const uint64_t high_weight = weight(high), own = high_weight + weight(low);
    const Sums<uint64_t> sums = block_sums(shared.partial, own);
    const uint64_t before = band.before + sums.before;
    if (band.shift == kRankBits) goal = min(goal, sums.total);
    if (before < goal && goal <= before + own) {
      const bool in_high = goal <= before + high_weight;
      const int digit = in_high ? high : low;
      shared.band = {band.prefix << (band.shift - shift) | digit, shift, static_cast<int32_t>(shared.tokens[digit]),
                     in_high ? before : before + high_weight};
    }
    __syncthreads();
    band = shared.band;
    if (band.tokens + (with_higher ? static_cast<int64_t>(band.before) : 0) <= kListed) break;
  }
  return band;
}

// Lists the tokens of a band, those before it included where `with_higher`, sorted. Returns how many.
__device__ __noinline__ int32_t list_sorted(Shared& shared, Band band, bool with_higher) {
  const Row& row = shared.row;
  const Masses& masses = shared.masses;
  if (threadIdx.x == 0) shared.num_listed = 0;
  __syncthreads();
  for_each_token(row, [&](int32_t id, float logit) {
    const uint64_t rank = rank_of(logit, id), prefix = rank >> band.shift;
    if (!masses.present(logit) || prefix < band.prefix || (prefix > band.prefix && !with_higher)) return;
    shared.listed[atomicAdd(&shared.num_listed, 1)] = rank;
  });
  __syncthreads();
  const int32_t count = shared.num_listed;
  if (threadIdx.x < count) {
    const uint64_t own = shared.listed[threadIdx.x];
    int32_t place = 0;
    for (int32_t i = 0; i < count; ++i) place += shared.listed[i] > own;
    shared.sorted[place] = own;
  }
  __syncthreads();
  return count;
}

// The token at which the mass reaches `goal`, from each thread's own and the mass before it.
__device__ Token reach(Shared& shared, uint64_t rank, uint64_t mass, uint64_t before, uint64_t goal) {
  if (before < goal && goal <= before + mass) shared.token = {rank, before + mass};
  __syncthreads();
  const Token reached = shared.token;
  __syncthreads();
  return reached;
}

// The token at which the mass of all tokens reaches `goal`.
__device__ __noinline__ Token find_mass(Shared& shared, uint64_t goal) {
  const Band band = narrow<true>(shared, goal, false);
  const int32_t count = list_sorted(shared, band, false);
  const uint64_t rank = threadIdx.x < count ? shared.sorted[threadIdx.x] : 0;
  const uint64_t mass = threadIdx.x < count ? shared.masses(logit_of(rank)) : 0;
  return reach(shared, rank, mass, band.before + block_sums(shared.partial, mass).before, goal);
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
    if (top_p < 1.0f) kept = reach(shared, rank, mass, sums.before, top_p_goal(top_p, kept)).through;
    return reach(shared, rank, mass, sums.before, draw_goal(uniform, kept)).rank;
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
  const float temperature = a.temperature[b];
  if (threadIdx.x == 0) {
    const float* logits = a.logits + begin;
    const float penalty = a.repetition_penalty[b];
    shared.row = {logits,
                  penalty == 1.0f ? nullptr : a.seen + begin,
                  a.banned + b * a.banned_width,
                  a.vocab,
                  step < a.banned_steps[b] ? a.banned_width : 0,
                  static_cast<int32_t>(reinterpret_cast<uintptr_t>(logits) / sizeof(float) % kPack),
                  penalty};
  }
  __syncthreads();
  const Largest largest = find_largest(shared);
  const float logit = logit_of(largest.rank);
  const int32_t top_k = a.top_k[b] > 0 ? min(a.top_k[b], a.vocab) : a.vocab;
  uint64_t chosen = largest.rank;
  if (temperature > 0.0f && top_k > 1 && isfinite(logit)) {
    if (threadIdx.x == 0) shared.masses = {logit, min(kLog2E / temperature, FLT_MAX)};
    __syncthreads();
    chosen = draw(shared, top_k, a.top_p[b], uniform_24_bits(a.seeds[b], step));
  }
  if (threadIdx.x == 0) {
    const int32_t id = id_of(chosen);
    a.ids[b] = id;
    a.logprobs[b] = logit_of(chosen) - logit - largest.log_sum_exp;
    a.seen[begin + id] = 1;
    a.steps[b] = step + 1;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

int qwen1m_cuda_sample(const qwen1m_sample* a, qwen1m_stream stream) {
  using namespace qwen1m::cuda;
  if (a->vocab > kMaxVocab) return cudaErrorInvalidValue;
  // Rows of both begin equally far from where packs may.
  if (reinterpret_cast<uintptr_t>(a->logits) % sizeof(Pack<float>) != 0) return cudaErrorMisalignedAddress;
  if (reinterpret_cast<uintptr_t>(a->seen) % sizeof(uint32_t) != 0) return cudaErrorMisalignedAddress;
  sample_rows<<<a->batch, kThreads, 0, as_stream(stream)>>>(*a);
  return cudaGetLastError();
}
