// The softmax of a warp of decode over a 16-bit cache, of the query heads of one KV head.
#pragma once

#include "mma.cuh"
#include "row_loads.cuh"

namespace qwen1m {
namespace cuda {
namespace sm80 {
namespace {

// The running softmax of one warp: 16 query rows, 16 keys a tile.
template <typename T, int D>
struct DecodeRows {
  uint32_t query[D / 16][4];
  float out[D / 8][4];
  float maximum[2], sum[2], shrink[2];
  uint32_t weights[4];

  __device__ void start() {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0;
    }
    maximum[0] = maximum[1] = kNegativeInfinity;
    sum[0] = sum[1] = 0;
  }

  // The warp's keys, a transposed operand, are rows [row, row + 16) of a tile of `count` keys: their scores become
  // weights.
  __device__ void score(uint32_t keys, int row, int count, float scale, int lane) {
    float scores[2][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t b[4];
      load_transposed(b, at<D>(keys, 0, step));
      multiply_add<T>(scores[0], query[step], b[0], b[1]);
      multiply_add<T>(scores[1], query[step], b[2], b[3]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = maximum[h];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[i / 2][2 * h + i % 2];
        score = row + 8 * (i / 2) + 2 * (lane % 4) + i % 2 < count ? score * scale : kNegativeInfinity;
        top = fmaxf(top, score);
      }
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float origin = top == kNegativeInfinity ? 0.0f : top;
      shrink[h] = exp2_fast(maximum[h] - origin);
      maximum[h] = top;
      float total = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[i / 2][2 * h + i % 2];
        score = exp2_fast(score - origin);
        total += score;
      }
      sum[h] = sum[h] * shrink[h] + total;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = pack_pair<T>(scores[i / 2][i % 2 * 2], scores[i / 2][i % 2 * 2 + 1]);
  }

  // Adds the same keys' values, an operand, by their weights.
  __device__ void add(uint32_t values) {
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      load_right(b, at<D>(values, 0, n));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[2 * n][i] *= shrink[i / 2];
        out[2 * n + 1][i] *= shrink[i / 2];
      }
      multiply_add<T>(out[2 * n], weights, b[0], b[1]);
      multiply_add<T>(out[2 * n + 1], weights, b[2], b[3]);
    }
  }

  // Both, of a tile whose keys and values are there.
  __device__ void attend(uint32_t keys, uint32_t values, int row, int count, float scale, int lane) {
    score(keys, row, count, scale, lane);
    add(values);
  }
};

}  // namespace
}  // namespace sm80
}  // namespace cuda
}  // namespace qwen1m
