// What products of a few rows share: a block of 16 features whose warps take turns along K, and its loads.
#pragma once

#include "common.cuh"

namespace qwen1m {
namespace cuda {

constexpr int kFeatures = 16;   // of a block: rows of one mma
constexpr int kTokenGroup = 8;  // columns of one mma
constexpr int kMaxTokens = 2 * kTokenGroup;
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

// Whether all blocks of eight warps run at once: then they keep more of the weights under way than blocks of four;
// where they do not, smaller blocks leave less of the last round unfilled.
inline int all_at_once(int64_t out_features, bool& at_once) {
  int device, processors;
  if (const int error = cudaGetDevice(&device)) return error;
  if (const int error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  at_once = ceil_div(out_features, kFeatures) <= kProcessorWarps / 8 * processors;
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace qwen1m
