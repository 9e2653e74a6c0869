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

constexpr int kNormVectors = kNormValues / kNormVector;

// Of a row's values those that a thread has: vectors from column `first` on, `stride` apart.
struct NormColumns {
  int first, stride, width;
  __device__ int column(int j) const { return first + j * stride; }
  __device__ bool has(int j) const { return column(j) < width; }
};

// add(delta, columns, values) puts a row's delta to the values that a thread has of it.
struct AddDelta {
  template <typename T>
  __device__ void operator()(const T* delta, const NormColumns& own, float (&values)[kNormVectors][kNormVector]) const {
    Vector<T, kNormVector> loaded[kNormVectors];
#pragma unroll
    for (int j = 0; j < kNormVectors; ++j) {
      if (own.has(j)) loaded[j] = load_vector<kNormVector>(delta + own.column(j));
    }
#pragma unroll
    for (int j = 0; j < kNormVectors; ++j) {
#pragma unroll
      for (int n = 0; n < kNormVector && own.has(j); ++n) values[j][n] += widen(loaded[j].values[n]);
    }
  }
};

// store(i, inside, values) gets the result from column i on, of all threads the same number of times; `inside` is false
// behind the row. Everything is loaded before the sum: a decode step waits for memory once, and for the weight while
// the launch before still runs.
template <typename T, typename Add, typename Store>
__device__ inline void normalise_row(const qwen1m_rms_norm& a, const Add& add, const Store& store) {
  constexpr int N = kNormVector, kVectors = kNormVectors;
  __shared__ float partial[kNormThreads / kWarp];
  const int64_t row = blockIdx.x * a.width;
  const NormColumns own{static_cast<int>(threadIdx.x) * N, static_cast<int>(blockDim.x) * N, static_cast<int>(a.width)};
  float* residual = a.residual + row;

  float values[kVectors][N] = {};
  Vector<T, N> weight[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (own.has(j)) weight[j] = load_vector<N>(static_cast<const T*>(a.weight) + own.column(j));
  }
  admit_next();  // a product's first weights come while its rows are made, and while ranks wait for each other's
  await_previous();
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (own.has(j)) load_widened(residual + own.column(j), values[j]);
  }
  if (a.delta) {
    add(static_cast<const T*>(a.delta) + row, own, values);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (own.has(j)) store_narrowed(values[j], residual + own.column(j));
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
  const float inverse = rsqrtf(total / static_cast<float>(own.width) + a.eps);

#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (own.has(j)) {
#pragma unroll
      for (int n = 0; n < N; ++n) values[j][n] *= inverse * widen(weight[j].values[n]);
    }
    store(own.column(j), own.has(j), values[j]);
  }
}

// The same, with the result in a.out.
template <typename T, typename Add>
__device__ inline void write_normalised_row(const qwen1m_rms_norm& a, const Add& add) {
  T* out = static_cast<T*>(a.out) + blockIdx.x * a.width;
  normalise_row<T>(a, add, [&](int i, bool inside, const float (&values)[kNormVector]) {
    if (inside) store_narrowed(values, out + i);
  });
}

}  // namespace cuda
}  // namespace qwen1m
