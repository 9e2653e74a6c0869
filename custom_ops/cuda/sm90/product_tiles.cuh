// What products of many rows share: blocks that stay and take tiles until none is left, and what makes 16 bytes of a
// row of what four lanes have of it.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace qwen1m {
namespace cuda {
namespace sm90 {

// Which tiles of rows and features this block has, in bands of so many tiles of rows, which share L2. Of the `blocks`
// of a cluster, neighbours along x, all have the same features.
struct Tiles {
  int32_t of_rows, count;  // of a cluster: `blocks` tiles of rows, one below the other
  int32_t blocks;

  Tiles() = default;
  Tiles(int64_t rows, int tile_rows, int64_t across, int blocks = 1)
      : of_rows(static_cast<int32_t>(ceil_div(rows, static_cast<int64_t>(tile_rows) * blocks))),
        count(of_rows * static_cast<int32_t>(across)),
        blocks(blocks) {}

  unsigned grid(int processors) const { return static_cast<unsigned>(std::min(count, processors / blocks) * blocks); }

  // The block's tiles are those numbered first(), first() + step(), ...
  __device__ int32_t first() const { return static_cast<int32_t>(blockIdx.x) / blocks; }
  __device__ int32_t step() const { return static_cast<int32_t>(gridDim.x) / blocks; }

  struct Place {
    int32_t row, column;  // numbers of tiles
  };

  __device__ Place place(int32_t number) const {
    constexpr int32_t kBand = 8;
    const int32_t band = kBand * (count / of_rows);
    const int32_t begin = number / band * kBand, within = number % band, height = min(kBand, of_rows - begin);
    return {(begin + within % height) * blocks + static_cast<int32_t>(blockIdx.x) % blocks, within / height};
  }
};

// Lane p of four neighbours gets the p-th word of each of them.
__device__ inline void transpose_words(uint32_t (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      uint32_t &low = words[i], &high = words[i + bit];
      const uint32_t other = __shfl_xor_sync(kAllLanes, upper ? low : high, bit);
      (upper ? low : high) = other;
    }
  }
}

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
