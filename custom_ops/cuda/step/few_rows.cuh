// What products of a few rows share: a block of 16 features whose warps take turns along K, and its loads.
#pragma once

#include "common.cuh"
#include "overlap.cuh"
#include "qwen1m/step.h"

namespace qwen1m {
namespace cuda {

constexpr int kFeatures = 16;   // of a block: rows of one mma
constexpr int kTokenGroup = 8;  // columns of one mma
constexpr int kMaxTokens = QWEN1M_FEW_ROWS;
static_assert(kMaxTokens == 2 * kTokenGroup, "groups of a launch");
constexpr int kProcessorWarps = 16;  // as many as the registers of a processor hold

// 16 bytes, zeros where not `valid`.
#define QWEN1M_LOAD(instruction, to, at, valid)                    \
  asm volatile(                                                    \
      "{\n"                                                        \
      ".reg .pred p;\n"                                            \
      "setp.ne.b32 p, %5, 0;\n"                                    \
      "mov.b32 %0, 0;\n"                                           \
      "mov.b32 %1, 0;\n"                                           \
      "mov.b32 %2, 0;\n"                                           \
      "mov.b32 %3, 0;\n"                                           \
      "@p " instruction                                            \
      ".v4.b32 {%0, %1, %2, %3}, [%4];\n"                          \
      "}"                                                          \
      : "=&r"((to).x), "=&r"((to).y), "=&r"((to).z), "=&r"((to).w) \
      : "l"(at), "r"(static_cast<int>(valid)))

// What nobody reads again, and with it the rest of the line.
__device__ inline uint4 load_once(const void* at, bool valid) {
  uint4 v;
  QWEN1M_LOAD("ld.global.L1::no_allocate.L2::128B", v, at, valid);
  return v;
}

__device__ inline uint4 load_cached(const void* at, bool valid) {
  uint4 v;
  QWEN1M_LOAD("ld.global", v, at, valid);
  return v;
}
#undef QWEN1M_LOAD

// f(half, values ahead of k, whether they are in the row) for the halves of the step of STEP values that is so many of
// a warp's steps ahead of k.
template <int WARPS, int STEP, typename F>
__device__ __forceinline__ void each_half(int k, int depth, int steps_ahead, F&& f) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int ahead = steps_ahead * WARPS * STEP + half * (STEP / 2);
    f(half, ahead, k + ahead < depth);
  }
}

// A warp's steps along K: STAGES of them are under way, each loaded where the one before it has been multiplied.
// Weights come while the launch before, which makes x, still runs. next_steps() goes STAGES steps on; in_row() says
// whether there is one left.
template <int STAGES, typename Operands, typename InRow, typename LoadWeight, typename LoadX, typename Multiply,
          typename NextSteps>
__device__ __forceinline__ void walk_row(Operands (&stages)[STAGES], InRow&& in_row, LoadWeight&& load_weight,
                                         LoadX&& load_x, Multiply&& multiply, NextSteps&& next_steps) {
#pragma unroll
  for (int s = 0; s < STAGES; ++s) load_weight(stages[s], s);
  await_previous();
#pragma unroll
  for (int s = 0; s < STAGES; ++s) load_x(stages[s], s);
  while (in_row()) {
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
      multiply(stages[s]);
      load_weight(stages[s], s + STAGES);
      load_x(stages[s], s + STAGES);
    }
    next_steps();
  }
}

// What each warp of a block has of the block's features and tokens, in shared memory.
template <int WARPS, int GROUPS>
struct WarpSums {
  float sums[WARPS][GROUPS * kTokenGroup][kFeatures];

  // An accumulator of each group of tokens: (features g and g + 8, tokens 2p and 2p + 1) in lane 4g + p.
  __device__ __forceinline__ void put(const float (&accumulators)[GROUPS][4]) {
    const int lane = threadIdx.x % kWarp, group = lane / 4, part = lane % 4;
#pragma unroll
    for (int t = 0; t < GROUPS; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[threadIdx.x / kWarp][t * kTokenGroup + part * 2 + i % 2][group + i / 2 * 8] = accumulators[t][i];
      }
    }
  }

  // Of all warps, once they have put theirs.
  __device__ __forceinline__ float total(int token, int feature) const {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += sums[w][token][feature];
    return sum;
  }
};

// launch(a of few tokens, stream) for all of a's tokens, one after the other; x is of type T, y [tokens, width] of type
// Out.
template <typename T, typename Out, typename Linear>
int few_at_a_time(const Linear& a, int64_t width, int (*launch)(const Linear&, cudaStream_t), cudaStream_t stream) {
  for (int64_t first = 0; first < a.tokens; first += kMaxTokens) {
    Linear few = a;
    few.tokens = a.tokens - first < kMaxTokens ? a.tokens - first : kMaxTokens;
    few.x = static_cast<const T*>(a.x) + first * a.in_features;
    few.y = static_cast<Out*>(a.y) + first * width;
    if (const int error = launch(few, stream)) return error;
  }
  return cudaSuccess;
}

// Whether blocks have eight warps, not four, twice as many of which run at once: where they fill their rounds better,
// whose number is odd then. Of one round they keep more of the weights under way; of an even number they fill no more.
inline bool takes_eight_warps(int64_t out_features) {
  return ceil_div(ceil_div(out_features, kFeatures), kProcessorWarps / 8 * processors()) % 2 == 1;
}

}  // namespace cuda
}  // namespace qwen1m
