// What products of a few rows share: a block of 16 features whose warps take turns along K, and its loads.
#pragma once

#include "common.cuh"
#include "overlap.cuh"
#include "qwen1m/step.h"

namespace qwen1m {
namespace cuda {

constexpr int kFeatures = 16;  // of a block
constexpr int kMaxTokens = QWEN1M_FEW_ROWS;
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

// The sums of a block, of which each warp has one part or more, in shared memory.
template <int PARTS, int TOKENS>
struct PartialSums {
  float parts[PARTS][TOKENS][kFeatures];

  __device__ __forceinline__ float total(int token, int feature) const {
    float sum = 0;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) sum += parts[part][token][feature];
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
