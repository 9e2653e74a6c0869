// How values become FP8 (E4M3) with a scale for each 128 of a row.
#pragma once

#include "common.cuh"

namespace qwen1m {
namespace cuda {

constexpr float kLeastMaximum = 0x1p-100f;  // smaller ones count as this, so that scales and their inverses are normal

// The scale of a block whose largest value is `most`, in kLanes neighbouring lanes of which each knows its own.
template <int kLanes>
__device__ inline float block_scale(float most) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, mask));
  return most > 0.0f ? fmaxf(most, kLeastMaximum) / kLargestE4M3 : 1.0f;
}

// Numbers in their bytes, rounded to nearest even; what is too large becomes the largest.
__device__ inline uint16_t to_e4m3(float a, float b) {
  uint16_t bytes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bytes) : "f"(b), "f"(a));
  return bytes;
}
__device__ inline uint32_t to_e4m3(float a, float b, float c, float d) {
  return static_cast<uint32_t>(to_e4m3(c, d)) << 16 | to_e4m3(a, b);
}

}  // namespace cuda
}  // namespace qwen1m
