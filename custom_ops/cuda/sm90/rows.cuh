// 64 query rows of a warpgroup under an online softmax: mask, weights, output. Layout of registers: see hopper.cuh.
#pragma once

#include "hopper.cuh"
#include "qwen1m/dca_stages.h"
#include "shares.cuh"

namespace qwen1m {
namespace cuda {
namespace sm90 {

constexpr int kHeadDim = 128;
constexpr int kRows = 64;  // of a warpgroup
constexpr int kPanels = kHeadDim / kPanelValues;
constexpr float kGrowth = 8.0f;  // of a running maximum, in log2, before output and sum are rescaled

// Scores of the rows against kKeys keys, then their weights.
template <typename T, int kKeys>
struct Scores {
  float value[kKeys / 2];

  // Those of the kPart-th kPartKeys keys.
  template <int kPartKeys, int kPart>
  __device__ float (&part()) [kPartKeys / 2] {
    static_assert((kPart + 1) * kPartKeys <= kKeys, "");
    return *reinterpret_cast<float (*)[kPartKeys / 2]>(value + kPart * kPartKeys / 2);
  }

  __device__ void pack(uint32_t (&weights)[kKeys / 4]) const {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weights[i] = pack_pair<T>(value[2 * i], value[2 * i + 1]);
  }
};

// Key number `column` is seen by the rows h of this thread (16w + g + 8h) when visible(column, h).
template <int N, typename F>
__device__ inline void mask_scores(float (&scores)[N], F&& visible) {
  const int pair = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < N / 4; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!visible(8 * n + pair + i % 2, i / 2)) scores[4 * n + i] = kNegativeInfinity;
    }
  }
}

template <typename T>
struct Rows {
  float out[kHeadDim / 2];
  float maximum[2];  // lags behind the true one by kGrowth at most
  float sum[2];      // of this thread's columns
  float shrink[2];   // what `out` must be multiplied by, after the products under way, before the next

  __device__ void start() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      maximum[h] = kNegativeInfinity;
      sum[h] = 0;
    }
  }

  // Scores become weights. `scale` includes log2(e). Leaves `out` alone. A row's numbers depend on its own scores only.
  template <int kKeys>
  __device__ void soften(Scores<T, kKeys>& scores, float scale) {
    float top[2];
    largest(scores, top);
    grow(top, scale);
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[h] = sum[h] * shrink[h] + weigh(scores, h, scale);
  }

  // The same where no products are under way, `out` rescaled where that is needed: that, and a row's largest score over
  // its four threads, is behind a branch, which products under way would be waited for at.
  template <int kKeys>
  __device__ void soften_at_rest(Scores<T, kKeys>& scores, float scale) {
    float top[2];
    largest(scores, top);
    if (__any_sync(kAllLanes, grows(top[0], 0, scale) || grows(top[1], 1, scale))) {
      grow(top, scale);
      rescale();
#pragma unroll
      for (int h = 0; h < 2; ++h) sum[h] *= shrink[h];
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[h] += weigh(scores, h, scale);
  }

  // Whether some row of the warp needs rescale().
  __device__ bool grown() const { return __any_sync(kAllLanes, shrink[0] != 1.0f || shrink[1] != 1.0f); }

  __device__ void rescale() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= shrink[i / 2 % 2];
  }

  // Ends the products under way but for the last kGroups groups, in all warps of the group at one instruction. They run
  // beside what was computed so far: ptxas moves a wait up to the last branch, here one that is never taken.
  template <int kGroups = 0>
  __device__ void settle_output() {
    const bool rescaled = grown();
    while (shrink[0] < 0) asm volatile("nanosleep.u32 1;");
    products_wait<kGroups>();
    settle(out);
    if (rescaled) rescale();
  }

  // out += weights V for kSteps times 16 keys: weights from `first` on. Does not wait.
  template <int kSteps, int kWeights>
  __device__ void attend(const uint32_t (&weights)[kWeights], int first, uint32_t values) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t* w = weights + first + 4 * step;
      const uint32_t a[4] = {w[0], w[1], w[2], w[3]};
      multiply_rows<T>(out, a, values + (step * 16 * kPanelRowBytes >> 4));
    }
  }

  // f(row, h, sum) for this thread's two rows.
  template <typename F>
  __device__ void each_row(F&& f) const {
    const int first = threadIdx.x / kWarp % 4 * 16 + threadIdx.x % kWarp / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[h];
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      f(first + 8 * h, h, total);
    }
  }

  // Rows [0, rows) of the warpgroup go to `place` (first row, this head), rows of `stride` heads; `lse` may be null.
  __device__ void store(T* place, float* lse, int rows, int stride, float scale) const {
    const int pair = threadIdx.x % 4;
    each_row([&](int row, int h, float total) {
      if (row >= rows) return;
      const float inverse = total > 0 ? 1.0f / total : 0.0f;
      const int64_t line = static_cast<int64_t>(row) * stride;
      uint32_t* values = reinterpret_cast<uint32_t*>(place + line * kHeadDim) + pair;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        values[4 * n] = pack_pair<T>(out[4 * n + 2 * h] * inverse, out[4 * n + 2 * h + 1] * inverse);
      }
      if (lse != nullptr && pair == 0) lse[line] = (maximum[h] * scale + log2f(total)) * kLn2;
    });
  }

  // Rows [0, rows) as a share of the keys left them; number(row) is the share's number for a row and its head.
  template <typename F>
  __device__ void store_share(const Shares& shares, int rows, float scale, F&& number) const {
    const int pair = threadIdx.x % 4;
    each_row([&](int row, int h, float total) {
      if (row >= rows) return;
      const int64_t place = number(row);
      if (pair == 0) shares.statistic[place] = make_float2(maximum[h] * scale, total);
      if (total == 0) return;
      float2* values = reinterpret_cast<float2*>(shares.partial + place * kHeadDim) + pair;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) values[4 * n] = make_float2(out[4 * n + 2 * h], out[4 * n + 2 * h + 1]);
    });
  }

 private:
  // Of this thread's scores.
  template <int kKeys>
  __device__ static void largest(const Scores<T, kKeys>& scores, float (&top)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      constexpr int kChains = 4;  // side by side
      float tops[kChains];
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) {
        const float score = scores.value[i / 2 * 4 + 2 * h + i % 2];
        tops[i % kChains] = i < kChains ? score : fmaxf(tops[i % kChains], score);
      }
      top[h] = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
    }
  }

  __device__ bool grows(float top, int h, float scale) const { return (top - maximum[h]) * scale > kGrowth; }

  // Maxima that `top`, of each thread's scores, leaves too far behind move on.
  __device__ void grow(float (&top)[2], float scale) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
#pragma unroll
      for (int h = 0; h < 2; ++h) top[h] = fmaxf(top[h], __shfl_xor_sync(kAllLanes, top[h], distance));
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool grown = grows(top[h], h, scale);
      shrink[h] = grown ? exp2_fast((maximum[h] - top[h]) * scale) : 1.0f;
      maximum[h] = grown ? top[h] : maximum[h];
    }
  }

  // Rows h's scores become weights, whose sum is returned.
  template <int kKeys>
  __device__ float weigh(Scores<T, kKeys>& scores, int h, float scale) const {
    const float origin = maximum[h] == kNegativeInfinity ? 0.0f : maximum[h] * scale;
    float totals[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& score = scores.value[4 * n + 2 * h + c];
        score = exp2_fast(score * scale - origin);
        totals[c] += score;
      }
    }
    return totals[0] + totals[1];
  }
};

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
