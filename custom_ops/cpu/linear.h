// Linear layers on the CPU: one single-threaded sgemm a share of the output columns, whose weights are widened to
// float32 tile by tile; few rows go through a dot product that widens in registers.
#pragma once

#include "cblas.h"
#include "parallel.h"
#include "qwen1m/step.h"
#include "qwen1m/weight8.h"
#include "simd.h"

namespace qwen1m {
namespace QWEN1M_ISA {

constexpr int64_t kDotRows = 8;               // up to so many rows the weights are read once, in registers
constexpr int64_t kTileFloats = 1024 * 1024;  // widened weights of one task: they stay in the last-level cache
constexpr int64_t kTileColumns = 512;
constexpr int64_t kTileTokens = 2048;  // rows of x of one sgemm

// y[r, n] for ROWS rows of x and one row of the weight
template <typename T, int ROWS>
inline void dot_rows(const float* x, const T* weight, int64_t depth, float bias, float* y, int64_t y_stride) {
  Floats sums[ROWS][2] = {};
  const int64_t whole = depth / (2 * kLanes) * (2 * kLanes);
  for (int64_t k = 0; k < whole; k += 2 * kLanes) {
    const Floats w0 = load(weight + k), w1 = load(weight + k + kLanes);
    for (int r = 0; r < ROWS; ++r) {
      sums[r][0] += w0 * load(x + r * depth + k);
      sums[r][1] += w1 * load(x + r * depth + k + kLanes);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    float total = sum(sums[r][0] + sums[r][1]);
    for (int64_t k = whole; k < depth; ++k) total += widen(weight[k]) * x[r * depth + k];
    y[r * y_stride] = total + bias;
  }
}

template <typename T>
void linear_few(const qwen1m_linear& a) {
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  const float* x = floats(a.x);
  float* y = floats(a.y);
  parallel_ranges(a.out_features, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const T* w = weight + n * a.in_features;
      const float b = bias ? widen(bias[n]) : 0.0f;
      int64_t r = 0;
      for (; r + 4 <= a.tokens; r += 4) {
        dot_rows<T, 4>(x + r * a.in_features, w, a.in_features, b, y + r * a.out_features + n, a.out_features);
      }
      for (; r < a.tokens; ++r) {
        dot_rows<T, 1>(x + r * a.in_features, w, a.in_features, b, y + r * a.out_features + n, a.out_features);
      }
    }
  });
}

inline const float* widen_tile(const float* weight, int64_t, float*) { return weight; }

template <typename T>
inline const float* widen_tile(const T* weight, int64_t count, float* tile) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store(tile + i, load(weight + i));
  for (int64_t i = whole; i < count; ++i) tile[i] = widen(weight[i]);
  return tile;
}

// y[T, N] = x[T, K] times the transpose of a weight, plus y where `adds`, by shares of the N columns that
// tile(begin, width, memory) gives in float32 [width, K], in that memory if need be. prepare(begin, width) comes first.
template <typename Prepare, typename Tile>
void multiply_tiles(const float* x, float* y, int64_t tokens, int64_t depth, int64_t features, bool adds,
                    const Prepare& prepare, const Tile& tile) {
  const int64_t fit = kTileFloats / depth;
  const int64_t widest = fit < 16 ? 16 : fit < kTileColumns ? fit : kTileColumns;
  const int64_t threads = num_threads();
  const int64_t rounds = (features + widest * threads - 1) / (widest * threads);
  const int64_t columns = (features + rounds * threads - 1) / (rounds * threads);
  const int64_t tasks = (features + columns - 1) / columns;
  parallel_tasks(tasks, static_cast<size_t>(columns * depth), [&](int64_t task, float* arena) {
    const int64_t begin = task * columns;
    const int64_t width = begin + columns < features ? columns : features - begin;
    const float* weight = tile(begin, width, arena);
    prepare(begin, width);
    for (int64_t t = 0; t < tokens; t += kTileTokens) {
      const int64_t rows = tokens - t < kTileTokens ? tokens - t : kTileTokens;
      scipy_cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<blasint>(rows),
                        static_cast<blasint>(width), static_cast<blasint>(depth), 1.0f, x + t * depth,
                        static_cast<blasint>(depth), weight, static_cast<blasint>(depth), adds ? 1.0f : 0.0f,
                        y + t * features + begin, static_cast<blasint>(features));
      advance();
    }
  });
}

template <typename T>
void linear(const qwen1m_linear& a) {
  if (a.tokens <= kDotRows) return linear_few<T>(a);
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  float* y = floats(a.y);
  const auto start_at_bias = [&](int64_t begin, int64_t width) {
    for (int64_t t = 0; bias && t < a.tokens; ++t) {
      for (int64_t n = 0; n < width; ++n) y[t * a.out_features + begin + n] = widen(bias[begin + n]);
    }
  };
  multiply_tiles(floats(a.x), y, a.tokens, a.in_features, a.out_features, bias != nullptr, start_at_bias,
                 [&](int64_t begin, int64_t width, float* memory) {
                   return widen_tile(weight + begin * a.in_features, width * a.in_features, memory);
                 });
}

}  // namespace QWEN1M_ISA
}  // namespace qwen1m
