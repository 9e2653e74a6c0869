// What the probe's kernels share: the merge of the rows' statistics, and weights summed along diagonals.
#pragma once

#include "mma.cuh"

namespace qwen1m {
namespace cuda {
namespace {

constexpr int kProbeRows = 64, kRowTiles8 = kProbeRows / 8;

// One block a head, kMergeThreads / 64 threads a row.
constexpr int kMergeThreads = 1024;

// statistic [H, spans, 64]: maximum in units of log2 (negative infinity: no key), sum. log_sum [H, 64]: log2 of each
// row's sum of exp2(scaled scores); rows stand at the end of the 64.
__global__ void __launch_bounds__(kMergeThreads)
    merge_statistics_kernel(const float2* statistics, float* log_sum, int spans, int rows) {
  __shared__ float2 parts[kMergeThreads / kProbeRows][kProbeRows];
  const int row = threadIdx.x % kProbeRows, part = threadIdx.x / kProbeRows;
  const float2* statistic = statistics + static_cast<int64_t>(blockIdx.x) * spans * kProbeRows;
  float top = kNegativeInfinity, total = 0;
  const auto add = [&](float2 other) {
    if (other.x == kNegativeInfinity) return;
    const float both = fmaxf(top, other.x);
    total = total * exp2_fast(top - both) + other.y * exp2_fast(other.x - both);
    top = both;
  };
  for (int s = part; s < spans; s += kMergeThreads / kProbeRows) add(statistic[s * kProbeRows + row]);
  parts[part][row] = make_float2(top, total);
  __syncthreads();
  if (part != 0) return;
  for (int other = 1; other < kMergeThreads / kProbeRows; ++other) add(parts[other][row]);
  // Rows that do not exist weigh nothing.
  log_sum[blockIdx.x * kProbeRows + row] = row < kProbeRows - rows ? -kNegativeInfinity : top + log2f(total);
}

// Weights of tiles of kKeys keys, one behind the other, summed along diagonals. Diagonal d of a tile, 0 <= d < kKeys +
// 64, meets key k and row a where k + 64 - a = d; from 64 on those of the next tile begin, so that after a tile its
// first kKeys are complete.
//
// What later tiles add to stays with the lanes that have it: only complete diagonals are summed over lanes.
template <int kKeys>
struct OpenDiagonals {
  static constexpr int kGroups = kKeys / 8 + kRowTiles8;  // of eight diagonals, that a tile meets
  static constexpr int kClosed = kKeys / 8;               // of them, that no later tile does: two or four
  float open[kGroups - kClosed] = {};                     // lane 4g + p: on diagonal 8j + g - 2p of the next tile

  // along[j][e]: this lane's weights on the diagonals 8j + g - 2p - e, one of each eight keys less one of each eight
  // rows. Returns the sum on diagonal 8j + g, where j = p for tiles of 32 keys and p / 2 for those of 16.
  __device__ float add(const float (&along)[kGroups][2], int lane) {
    const int g = lane / 4, p = lane % 4;
    // Both e onto diagonal 8j + g - 2p: the one of e = 1 lies one key further on.
    float next[kGroups], straight[kGroups];
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      next[j] = j == 0 ? 0.0f : __shfl_sync(kAllLanes, along[j][1], (lane + 4) % kWarp);  // no tile meets group 0
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const float following = j + 1 < kGroups ? next[j + 1 < kGroups ? j + 1 : j] : 0.0f;
      const float before = j < kGroups - kClosed ? open[j < kGroups - kClosed ? j : 0] : 0.0f;
      straight[j] = before + along[j][0] + (g == 7 ? following : next[j]);
    }
#pragma unroll
    for (int j = kClosed; j < kGroups; ++j) open[j - kClosed] = straight[j];
    // All p onto diagonal 8j + g: that of p lies 2p keys further on.
    float turned[kClosed + 1], closed[kClosed];
#pragma unroll
    for (int j = 0; j <= kClosed; ++j) turned[j] = __shfl_sync(kAllLanes, straight[j], ((g + 2 * p) % 8) * 4 + p);
#pragma unroll
    for (int j = 0; j < kClosed; ++j) closed[j] = g + 2 * p >= 8 ? turned[j + 1] : turned[j];
    // Summed over the four lanes of a g, of which each keeps one group.
    const bool upper = p >= 2;
    float kept[kClosed / 2];
#pragma unroll
    for (int i = 0; i < kClosed / 2; ++i) {
      const float low = closed[i], high = closed[i + kClosed / 2];
      kept[i] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, 2);
    }
    if constexpr (kClosed == 2) {
      return kept[0] + __shfl_xor_sync(kAllLanes, kept[0], 1);
    } else {
      const bool odd = p % 2;
      return (odd ? kept[1] : kept[0]) + __shfl_xor_sync(kAllLanes, odd ? kept[0] : kept[1], 1);
    }
  }
};

}  // namespace
}  // namespace cuda
}  // namespace qwen1m
