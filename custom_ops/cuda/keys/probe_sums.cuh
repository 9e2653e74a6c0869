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

// Weights of tiles of kKeys keys summed along diagonals, 32 keys after 32. Diagonal d of such 32, 0 <= d < 96, meets
// key k and row a where k + 64 - a = d. Lane 4g + p of open[i] holds diagonal 32i + 8p + g.
template <int kKeys>
struct OpenDiagonals {
  static constexpr int kGroups = kKeys / 8 + kRowTiles8;  // of eight diagonals, that a tile meets
  float open[3] = {};

  // along[j][e]: this lane's weights on the diagonals 8j + g - 2p - e, one of each eight keys less one of each eight
  // rows. `second`: the tile is the second one of 16 keys.
  __device__ void add(const float (&along)[kGroups][2], int lane, bool second = false) {
    const int g = lane / 4, p = lane % 4;
    // Both e onto diagonal 8j + g - 2p: the one of e = 1 lies one key further on.
    float even[kGroups];
#pragma unroll
    for (int j = 0; j < kGroups; ++j) even[j] = __shfl_sync(kAllLanes, along[j][1], (lane + 4) % kWarp);
    float straight[12] = {};
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const float following = j + 1 < kGroups ? even[j + 1 < kGroups ? j + 1 : j] : 0.0f;
      straight[j] = along[j][0] + (g == 7 ? following : even[j]);
    }
    // All p onto diagonal 8j + g: that of p lies 2p keys further on.
    float turned[kGroups];
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      turned[j] = __shfl_sync(kAllLanes, straight[j], ((g + 2 * p) % 8) * 4 + p);
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const float following = j + 1 < kGroups ? turned[j + 1 < kGroups ? j + 1 : j] : 0.0f;
      straight[j] = g + 2 * p >= 8 ? following : turned[j];
    }
    // Summed over the four lanes of a g; lane p keeps groups j = 4i + p. Those of a second tile lie two groups further
    // on: lanes of p >= 2 keep groups 4i + p - 2 of it, the others 4i + p + 2, which belong to the next i.
    const bool upper = (p >= 2) != second, odd = p % 2, shifted = second && p < 2;
    float kept[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const float send0 = upper ? straight[4 * i] : straight[4 * i + 2];
      const float send1 = upper ? straight[4 * i + 1] : straight[4 * i + 3];
      const float keep0 = (upper ? straight[4 * i + 2] : straight[4 * i]) + __shfl_xor_sync(kAllLanes, send0, 2);
      const float keep1 = (upper ? straight[4 * i + 3] : straight[4 * i + 1]) + __shfl_xor_sync(kAllLanes, send1, 2);
      kept[i] = (odd ? keep1 : keep0) + __shfl_xor_sync(kAllLanes, odd ? keep0 : keep1, 1);
    }
    open[0] += shifted ? 0.0f : kept[0];
    open[1] += shifted ? kept[0] : kept[1];
    open[2] += shifted ? kept[1] : kept[2];
  }

  // The 32 diagonals that no later key meets; the others move down.
  __device__ float close() {
    const float closed = open[0];
    open[0] = open[1];
    open[1] = open[2];
    open[2] = 0;
    return closed;
  }
};

}  // namespace
}  // namespace cuda
}  // namespace qwen1m
