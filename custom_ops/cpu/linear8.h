// Linear layers on the CPU whose weights are bytes with scales: few rows widen them in registers, so that a step reads
// half the bytes of 16-bit weights; many rows widen tiles for the GEMM of linear.h. How weights become such bytes, and
// rows of activations.
#pragma once

#include "elementwise.h"
#include "linear.h"

namespace qwen1m {
namespace QWEN1M_ISA {

// f(T{}, power): the type of the numbers, and what its load() leaves to the scale.
template <typename F>
void with_kind(qwen1m_dtype kind, const F& f) {
  return kind == QWEN1M_E4M3 ? f(E4M3{}, kE4M3ByHalf) : f(int8_t{}, 1.0f);
}

// The scales of a row, a block of columns each.
inline const float* row_scales(const qwen1m_weight8& w, int64_t row, int64_t depth) {
  return w.scales + row / w.rows * (depth / w.columns);
}

// y[r, n] for ROWS rows of x and one row of the weight
template <typename T, int ROWS>
inline void dot_rows8(const float* x, const T* weight, const float* scales, float power, int64_t columns, int64_t depth,
                      float* y, int64_t y_stride) {
  Floats sums[ROWS] = {};
  const int64_t paired = columns / (2 * kLanes) * (2 * kLanes);
  for (int64_t block = 0; block < depth; block += columns) {
    Floats products[ROWS][2] = {};
    for (int64_t k = block; k < block + paired; k += 2 * kLanes) {
      const Floats w0 = load(weight + k), w1 = load(weight + k + kLanes);
      for (int r = 0; r < ROWS; ++r) {
        products[r][0] += w0 * load(x + r * depth + k);
        products[r][1] += w1 * load(x + r * depth + k + kLanes);
      }
    }
    for (int64_t k = block + paired; k < block + columns; k += kLanes) {
      const Floats w = load(weight + k);
      for (int r = 0; r < ROWS; ++r) products[r][0] += w * load(x + r * depth + k);
    }
    const Floats scale = broadcast(*scales++ * power);
    for (int r = 0; r < ROWS; ++r) sums[r] += (products[r][0] + products[r][1]) * scale;
  }
  for (int r = 0; r < ROWS; ++r) y[r * y_stride] = sum(sums[r]);
}

template <typename T>
void linear8_few(const qwen1m_linear8& a, float power) {
  const T* numbers = reinterpret_cast<const T*>(a.weight.numbers);
  const float* x = floats(a.x);
  float* y = floats(a.y);
  const int64_t depth = a.in_features, columns = a.weight.columns;
  parallel_ranges(a.out_features, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const T* w = numbers + n * depth;
      const float* scales = row_scales(a.weight, n, depth);
      int64_t r = 0;
      for (; r + 4 <= a.tokens; r += 4) {
        dot_rows8<T, 4>(x + r * depth, w, scales, power, columns, depth, y + r * a.out_features + n, a.out_features);
      }
      for (; r < a.tokens; ++r) {
        dot_rows8<T, 1>(x + r * depth, w, scales, power, columns, depth, y + r * a.out_features + n, a.out_features);
      }
    }
  });
}

// What row `row` of the weight stands for, float32 [depth].
template <typename T>
inline void widen_row8(const qwen1m_weight8& weight, int64_t row, int64_t depth, float power, float* out) {
  const T* numbers = reinterpret_cast<const T*>(weight.numbers) + row * depth;
  const float* scales = row_scales(weight, row, depth);
  for (int64_t block = 0; block < depth; block += weight.columns) {
    const Floats scale = broadcast(*scales++ * power);
    for (int64_t k = block; k < block + weight.columns; k += kLanes) store(out + k, load(numbers + k) * scale);
  }
}

inline void linear8(const qwen1m_linear8& a) {
  with_kind(a.weight.kind, [&](auto type, float power) {
    using T = decltype(type);
    if (a.tokens <= kDotRows) return linear8_few<T>(a, power);
    multiply_tiles(
        floats(a.x), floats(a.y), a.tokens, a.in_features, a.out_features, false, [](int64_t, int64_t) {},
        [&](int64_t begin, int64_t width, float* memory) -> const float* {
          for (int64_t n = 0; n < width; ++n) {
            widen_row8<T>(a.weight, begin + n, a.in_features, power, memory + n * a.in_features);
          }
          return memory;
        });
  });
}

inline void widen_weight(const qwen1m_widen_weight& a) {
  const int64_t depth = a.in_features;
  with_type(a.out_dtype, [&](auto out_type) {
    using Out = decltype(out_type);
    with_kind(a.weight.kind, [&](auto type, float power) {
      parallel_tasks(a.out_features, static_cast<size_t>(depth), [&](int64_t row, float* wide) {
        widen_row8<decltype(type)>(a.weight, row, depth, power, wide);
        Out* out = static_cast<Out*>(a.out) + row * depth;
        for (int64_t k = 0; k < depth; ++k) narrow(wide[k], out + k);
      });
    });
  });
}

constexpr float kLargestInt8 = 127.0f;

// Of `x` of at most 127, ties to even.
QWEN1M_INLINE uint8_t to_int8(float x) {
  const float rounded = x + 12582912.0f;  // 1.5 * 2^23: its unit in the last place is 1
  uint32_t word;
  memcpy(&word, &rounded, sizeof(word));
  return static_cast<uint8_t>(word);
}

// Numbers and scale of one block; whether all of its values are finite.
template <typename T>
bool round_block(const T* values, uint8_t* numbers, float* scale, const qwen1m_round_weight& a) {
  const int64_t pitch = a.in_features;
  float wide[128];
  float most = 0.0f;
  uint32_t bad = 0;
  for (int64_t n = 0; n < a.weight.rows; ++n) {
    for (int64_t k = 0; k < a.weight.columns; ++k) {
      const float x = widen(values[n * pitch + k]);
      const float size = x < 0 ? -x : x;
      bad |= !(size <= 3.4028235e38f);
      most = size > most ? size : most;
    }
  }
  const bool fp8 = a.weight.kind == QWEN1M_E4M3;
  *scale = most > 0 ? most / (fp8 ? kLargestE4M3 : kLargestInt8) : 1.0f;
  if (*scale < 1.1754944e-38f) *scale = 1.1754944e-38f;  // of subnormal ones a quotient may be more than the largest
  for (int64_t n = 0; n < a.weight.rows; ++n) {
    const T* row = values + n * pitch;
    for (int64_t k = 0; k < a.weight.columns; ++k) wide[k] = widen(row[k]) / *scale;
    uint8_t* out = numbers + n * pitch;
    if (fp8) {
      for (int64_t k = 0; k < a.weight.columns; ++k) out[k] = to_e4m3(wide[k]);
    } else {
      for (int64_t k = 0; k < a.weight.columns; ++k) out[k] = to_int8(wide[k]);
    }
  }
  return bad == 0;
}

inline int round_weight(const qwen1m_round_weight& a) {
  bool finite = true;
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    uint8_t* numbers = const_cast<uint8_t*>(a.weight.numbers);
    float* scale = const_cast<float*>(a.weight.scales);
    for (int64_t n = 0; n < a.out_features; n += a.weight.rows) {
      for (int64_t k = 0; k < a.in_features; k += a.weight.columns) {
        const int64_t at = n * a.in_features + k;
        finite &= round_block(static_cast<const T*>(a.values) + at, numbers + at, scale++, a);
      }
    }
  });
  return finite ? 0 : 1;
}

// Row t of `out`: of values [width], or zeros where there are none.
inline void round_row8(const float* values, const qwen1m_rows8& out, int64_t t, int64_t width) {
  uint8_t* numbers = out.numbers + t * width;
  for (int64_t block = 0; block < width; block += QWEN1M_ROWS8_BLOCK) {
    float most = 0.0f;
    for (int64_t k = 0; values && k < QWEN1M_ROWS8_BLOCK; ++k) {
      const float size = values[block + k] < 0 ? -values[block + k] : values[block + k];
      most = size > most ? size : most;
    }
    const float scale = most > 0 ? (most > 0x1p-100f ? most : 0x1p-100f) / kLargestE4M3 : 1.0f;
    out.scales[block / QWEN1M_ROWS8_BLOCK * out.rows + t] = scale;
    for (int64_t k = block; k < block + QWEN1M_ROWS8_BLOCK; ++k) numbers[k] = values ? to_e4m3(values[k] / scale) : 0;
  }
}

// values: float32 [tokens, width]
inline void round_rows8(const float* values, const qwen1m_rows8& out, int64_t tokens, int64_t width) {
  parallel_ranges(out.rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) round_row8(t < tokens ? values + t * width : nullptr, out, t, width);
  });
}

inline void round_rows(const qwen1m_round_rows& a) { round_rows8(floats(a.values), a.out, a.tokens, a.width); }

inline void rms_norm8(const qwen1m_rms_norm8& a) {
  const Scratch wide(static_cast<size_t>(a.norm.tokens * a.norm.width));
  qwen1m_rms_norm norm = a.norm;
  norm.out = wide.data;
  with_type(norm.dtype, [&](auto type) { rms_norm<decltype(type)>(norm); });
  round_rows8(wide.data, a.out, norm.tokens, norm.width);
}

inline void product8(const qwen1m_product8& a) {
  const Scratch wide(static_cast<size_t>(a.x.rows * a.in_features));
  parallel_ranges(a.x.rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * a.in_features; i < end * a.in_features; i += kLanes) {
      const int64_t t = i / a.in_features, block = i % a.in_features / QWEN1M_ROWS8_BLOCK;
      const Floats scale = broadcast(a.x.scales[block * a.x.rows + t] * kE4M3ByHalf);
      store(wide.data + i, load(reinterpret_cast<const E4M3*>(a.x.numbers) + i) * scale);
    }
  });
  linear8({wide.data, a.weight, a.y, a.x.rows, a.in_features, a.out_features, QWEN1M_FLOAT32, QWEN1M_FLOAT32});
}

inline void gated_product8(const qwen1m_gated_product8& a) {
  qwen1m_product8 product = a.product;
  const int64_t rows = product.x.rows, width = product.out_features / 2;
  const Scratch gate_up(static_cast<size_t>(rows * 2 * width)), values(static_cast<size_t>(rows * width));
  product.y = gate_up.data;
  product8(product);
  silu_mul({gate_up.data, values.data, rows, width, QWEN1M_FLOAT32});
  round_rows8(values.data, a.out, rows, width);
}

}  // namespace QWEN1M_ISA
}  // namespace qwen1m
