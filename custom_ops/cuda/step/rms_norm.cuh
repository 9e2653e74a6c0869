// RMSNorm of a row by a block; what becomes of the result is the caller's.
#pragma once

#include "overlap.cuh"
#include "qwen1m/step.h"
#include "vectors.cuh"

namespace qwen1m {
namespace cuda {

constexpr int kNormValues = 8;  // of a row that a thread keeps in registers
constexpr int kNormThreads = 1024;
constexpr int kNormVector = 4;  // neighbours of a thread, and so 128 of a warp

inline unsigned norm_threads(int64_t width) {
  return static_cast<unsigned>(ceil_div(width, kNormValues * kWarp) * kWarp);
}

// store(i, inside, values) gets the result from column i on, of all threads the same number of times; `inside` is false
// behind the row. Everything is loaded before the sum: a decode step waits for memory once, and for the weight while
// the launch before still runs.
template <typename T, typename Store>
__device__ inline void normalise_row(const qwen1m_rms_norm& a, const Store& store) {
  constexpr int N = kNormVector, kVectors = kNormValues / N;
  __shared__ float partial[kNormThreads / kWarp];
  const int64_t row = blockIdx.x * a.width;
  const int width = static_cast<int>(a.width), stride = static_cast<int>(blockDim.x) * N;
  const int first = static_cast<int>(threadIdx.x) * N;
  float* residual = a.residual + row;

  float values[kVectors][N] = {};
  Vector<T, N> weight[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = first + j * stride;
    if (i < width) weight[j] = load_vector<N>(static_cast<const T*>(a.weight) + i);
  }
  await_previous();
  admit_next();
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = first + j * stride;
    if (i < width) load_widened(residual + i, values[j]);
  }
  if (a.delta) {
    Vector<T, N> delta[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int i = first + j * stride;
      if (i < width) delta[j] = load_vector<N>(static_cast<const T*>(a.delta) + row + i);
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int i = first + j * stride;
      if (i < width) {
#pragma unroll
        for (int n = 0; n < N; ++n) values[j][n] += widen(delta[j].values[n]);
        store_narrowed(values[j], residual + i);
      }
    }
  }

  float squares = 0;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    for (int n = 0; n < N; ++n) squares += values[j][n] * values[j][n];
  }
  squares = warp_sum(squares);
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  if (lane == 0) partial[threadIdx.x / kWarp] = squares;
  __syncthreads();
  const float total = warp_sum(lane < warps ? partial[lane] : 0.0f);
  const float inverse = rsqrtf(total / static_cast<float>(width) + a.eps);

#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = first + j * stride;
    if (i < width) {
#pragma unroll
      for (int n = 0; n < N; ++n) values[j][n] *= inverse * widen(weight[j].values[n]);
    }
    store(i, i < width, values[j]);
  }
}

}  // namespace cuda
}  // namespace qwen1m
