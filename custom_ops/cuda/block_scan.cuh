// Prefix sums and maxima over a warp and over a block, whose warps `partial` has an entry each for.
#pragma once

#include "common.cuh"

namespace qwen1m {
namespace cuda {

constexpr int kScanThreads = kWarp * kWarp;

// The sum of x over the lanes up to this one.
template <typename T>
__device__ T inclusive_warp_sum(T x) {
  const unsigned lane = threadIdx.x % kWarp;
#pragma unroll
  for (unsigned distance = 1; distance < kWarp; distance *= 2) {
    const T lower = __shfl_up_sync(kAllLanes, x, distance);
    if (lane >= distance) x += lower;
  }
  return x;
}

template <typename T>
struct Sums {
  T before, total;  // over the threads before this one, over all
};

// `partial` is in shared memory and may be used again at once. The same for block_max.
template <typename T, int WARPS>
__device__ Sums<T> block_sums(T (&partial)[WARPS], T x) {
  static_assert(WARPS <= kWarp, "a lane a warp");
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const T through = inclusive_warp_sum(x);
  if (lane == kWarp - 1) partial[warp] = through;
  __syncthreads();
  const T own = lane < WARPS ? partial[lane] : T{}, warps_through = inclusive_warp_sum(own);
  __syncthreads();
  const T warps_before = __shfl_sync(kAllLanes, warps_through - own, warp);
  return {warps_before + through - x, __shfl_sync(kAllLanes, warps_through, kWarp - 1)};
}

template <typename T>
__device__ T warp_largest(T x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, x, mask);
    if (other > x) x = other;
  }
  return x;
}

template <typename T>
__device__ T block_max(T (&partial)[kWarp], T x) {
  x = warp_largest(x);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = warp_largest(partial[threadIdx.x % kWarp]);
  __syncthreads();
  return x;
}

}  // namespace cuda
}  // namespace qwen1m
