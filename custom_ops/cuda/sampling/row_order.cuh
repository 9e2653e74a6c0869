// A row of processed logits, and the order of its tokens: a block a row, nothing sorted whole and nothing stored.
//
// Bans, bias and penalties are applied to the logits anew in every sweep over a row. The first sweep finds the largest
// logit and the sum of exp. A token's place in the order (logit descending, id ascending) is one number, its rank.
// `narrow` finds the token at which the number of tokens, or their mass, reaches a goal: a radix descent over the bits
// of the rank, a histogram a sweep, until few candidates are left; those are listed in shared memory and sorted.
//
// Masses are fixed point numbers, so that their sums do not depend on the order of atomics: exp((logit - largest) /
// temperature) in multiples of 2^-40.
#pragma once

#include <cfloat>

#include "block_scan.cuh"
#include "common.cuh"
#include "qwen1m/sampling.h"

namespace qwen1m {
namespace cuda {

constexpr int kThreads = kScanThreads;
constexpr int kPack = Pack<float>::kSize;
constexpr int kIdBits = 22;
constexpr int kRankBits = 32 + kIdBits;
constexpr int32_t kMaxVocab = 1 << kIdBits;
constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
constexpr int kListed = 512;
constexpr int kMassBits = 40;
constexpr int kMaskBits = 32;  // tokens a word

// Tokens whose rank begins with `prefix`, its bits from `shift` on.
struct Band {
  uint64_t prefix;
  int shift;
  int32_t tokens;
  uint64_t before;  // number, or mass, of the tokens that rank higher
};

// Neighbouring tokens: what a thread reads at a time.
struct Tokens {
  Pack<float> logits, bias;
  uint2 counts;      // 16 bits each
  uint32_t allowed;  // a bit each
};

// One row's logits, processed when they are read. The row begins `misaligned` logits behind a multiple of 16 bytes.
struct Row {
  const float* logits;
  const float* bias;       // null where there is none
  const uint16_t* counts;  // null without a penalty
  const uint32_t* mask;    // null where every token is allowed
  int32_t vocab, misaligned;
  float repetition, frequency, presence;

  // What lies outside of the row is -inf, which has no part in anything.
  __device__ Tokens load(int32_t id) const {
    Tokens tokens{{kNegativeInfinity, kNegativeInfinity, kNegativeInfinity, kNegativeInfinity}, {}, {0, 0}, ~0u};
    if (id >= 0 && id + kPack <= vocab) {
      tokens.logits = load_pack(logits + id);
      if (bias != nullptr) tokens.bias = load_pack(bias + id);
      if (counts != nullptr) tokens.counts = __ldca(reinterpret_cast<const uint2*>(counts + id));
      if (mask != nullptr) {
        const uint32_t low = mask[id / kMaskBits], high = mask[(id + kPack - 1) / kMaskBits];
        tokens.allowed = __funnelshift_r(low, high, id % kMaskBits);
      }
      return tokens;
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const int32_t own = id + i;
      if (own < 0 || own >= vocab) continue;
      tokens.logits.values[i] = logits[own];
      if (bias != nullptr) tokens.bias.values[i] = bias[own];
      if (counts != nullptr) (i < 2 ? tokens.counts.x : tokens.counts.y) |= uint32_t{counts[own]} << (i % 2 * 16);
      if (mask != nullptr && !(mask[own / kMaskBits] >> (own % kMaskBits) & 1)) tokens.allowed &= ~(1u << i);
    }
    return tokens;
  }

  // Bans, bias, penalties. NaN counts as -inf and -0 as 0.
  __device__ Pack<float> process(const Tokens& tokens) const {
    Pack<float> out;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float logit = fmaxf(tokens.logits.values[i], kNegativeInfinity);
      out.values[i] = tokens.allowed >> i & 1 ? logit + tokens.bias.values[i] : kNegativeInfinity;
    }
    if ((tokens.counts.x | tokens.counts.y) != 0) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const uint32_t count = (i < 2 ? tokens.counts.x : tokens.counts.y) >> (i % 2 * 16) & 0xFFFF;
        out.values[i] = penalised(out.values[i], count);
      }
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) out.values[i] += 0.0f;
    return out;
  }

 private:
  __device__ static Pack<float> load_pack(const float* source) {
    const float4 values = __ldg(reinterpret_cast<const float4*>(source));
    return {values.x, values.y, values.z, values.w};
  }

  // Every step is rounded, as on a CPU.
  __device__ float penalised(float x, uint32_t count) const {
    if (count == 0) return x;
    x = x > 0.0f ? x / repetition : x * repetition;
    const uint32_t in_answer = count & QWEN1M_LARGEST_COUNT;
    if (in_answer == 0) return x;
    return __fsub_rn(__fsub_rn(x, __fmul_rn(frequency, static_cast<float>(in_answer))), presence);
  }
};

// How far a row that begins there is behind a multiple of 16 bytes, in logits.
__device__ inline int32_t misalignment(const float* logits) {
  return static_cast<int32_t>(reinterpret_cast<uintptr_t>(logits) / sizeof(float) % kPack);
}

// The id of a thread's first token, at 16 bytes and hence below 0 in the first thread of some rows.
__device__ inline int32_t first_id(const Row& row) {
  return static_cast<int32_t>(threadIdx.x) * kPack - row.misaligned;
}

// visit(id, logits) for kPack neighbours from `id` on and every other pack of the row, ids ascending in a thread. The
// next pack is on its way meanwhile.
template <typename Visit>
__device__ void for_each_pack(const Row& row, const Visit& visit) {
  constexpr int32_t kStride = kThreads * kPack;
  Tokens next = row.load(first_id(row));
#pragma unroll 1
  for (int32_t id = first_id(row); id < row.vocab; id += kStride) {
    const Pack<float> logits = row.process(next);
    next = row.load(id + kStride);
    visit(id, logits);
  }
}

// visit(id, logit) for every token of the row.
template <typename Visit>
__device__ void for_each_token(const Row& row, const Visit& visit) {
  for_each_pack(row, [&](int32_t id, const Pack<float>& logits) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      if (id + i >= 0 && id + i < row.vocab) visit(id + i, logits.values[i]);
    }
  });
}

// Larger for what comes first: larger logits, then lower ids.
__device__ inline uint64_t rank_of(float logit, int32_t id) {
  const uint32_t bits = __float_as_uint(logit);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << kIdBits | (kMaxVocab - 1 - id);
}

__device__ inline int32_t id_of(uint64_t rank) { return kMaxVocab - 1 - static_cast<int32_t>(rank & (kMaxVocab - 1)); }

__device__ inline float logit_of(uint64_t rank) {
  const uint32_t ordered = static_cast<uint32_t>(rank >> kIdBits);
  return __uint_as_float(ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered);
}

__device__ inline uint64_t to_fixed(float x) { return __float2ull_rn(x * (1ull << kMassBits)); }

// exp((logit - largest) / temperature) as a fixed point number; tokens whose exponent of 2 is below `lowest` are
// absent.
struct Masses {
  float largest, scale;  // log2(e) / temperature
  float lowest;          // not below -kMassBits where masses are asked for

  __device__ float exponent(float logit) const { return (logit - largest) * scale; }
  __device__ bool present(float logit) const { return !(exponent(logit) < lowest); }
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
};

struct Largest {
  uint64_t rank;
  float log_sum_exp;  // of logit - largest
};

__device__ __noinline__ inline Largest find_largest(Shared& shared) {
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
__device__ __noinline__ inline int32_t list_sorted(Shared& shared, Band band, bool with_higher) {
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

}  // namespace cuda
}  // namespace qwen1m
