// The tile of CPU attention: rows of queries against kTileKeys gathered keys under an online softmax.
//
// Keys and values are packed into panels of kPanel lanes, so that both products, scores = Q K^T and out += P V, are the
// same register tile: kTileRows x kPanel accumulators, one broadcast and two loads a step.
#pragma once

#include "progress.h"
#include "simd.h"

namespace qwen1m {
namespace QWEN1M_ISA {

constexpr int kTileRows = QWEN1M_TILE_ROWS;
constexpr int kPanel = 2 * kLanes;
constexpr int kTileKeys = 256;
constexpr float kNegativeInfinity = -__builtin_inff();
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// c[ROWS, kPanel] (+)= a[ROWS, depth] * b[depth, kPanel]
template <int ROWS>
inline void multiply_rows(const float* a, int a_stride, const float* b, int depth, float* c, int c_stride, bool add) {
  Floats left[ROWS], right[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    left[r] = add ? load(c + r * c_stride) : Floats{};
    right[r] = add ? load(c + r * c_stride + kLanes) : Floats{};
  }
  for (int k = 0; k < depth; ++k) {
    const Floats b_left = load(b + k * kPanel), b_right = load(b + k * kPanel + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Floats x = broadcast(a[r * a_stride + k]);
      left[r] += x * b_left;
      right[r] += x * b_right;
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    store(c + r * c_stride, left[r]);
    store(c + r * c_stride + kLanes, right[r]);
  }
}

// c[rows, panels * kPanel] (+)= a[rows, depth] * b, b packed as [panels][panel_stride]
inline void multiply(const float* a, int a_stride, int rows, const float* b, int panel_stride, int panels, int depth,
                     float* c, int c_stride, bool add) {
  for (int p = 0; p < panels; ++p, b += panel_stride, c += kPanel) {
    int r = 0;
    for (; r + kTileRows <= rows; r += kTileRows) {
      multiply_rows<kTileRows>(a + r * a_stride, a_stride, b, depth, c + r * c_stride, c_stride, add);
    }
    const float* tail = a + r * a_stride;
    float* out = c + r * c_stride;
    switch (rows - r) {
      case 1: multiply_rows<1>(tail, a_stride, b, depth, out, c_stride, add); break;
      case 2: multiply_rows<2>(tail, a_stride, b, depth, out, c_stride, add); break;
      case 3: multiply_rows<3>(tail, a_stride, b, depth, out, c_stride, add); break;
      case 4: multiply_rows<4>(tail, a_stride, b, depth, out, c_stride, add); break;
      case 5: multiply_rows<5>(tail, a_stride, b, depth, out, c_stride, add); break;
      case 6: multiply_rows<6>(tail, a_stride, b, depth, out, c_stride, add); break;
      case 7: multiply_rows<7>(tail, a_stride, b, depth, out, c_stride, add); break;
      default: break;
    }
  }
}

// The keys of one tile: where each row of K and V lies. Lanes past `count` repeat the last key and are masked. The
// scales and the frame of the KV head are those of an 8-bit cache.
struct KeyTile {
  const char* key[kTileKeys];
  const char* value[kTileKeys];
  int32_t position[kTileKeys];
  float key_scale[kTileKeys];
  float value_scale[kTileKeys];
  const float* power;
  const float* centre;
  qwen1m_dtype dtype;
  int count = 0;

  int padded() const { return (count + kPanel - 1) / kPanel * kPanel; }

  void pad() {
    for (int i = count; i < padded(); ++i) {
      key[i] = key[count - 1];
      value[i] = value[count - 1];
      key_scale[i] = key_scale[count - 1];
      value_scale[i] = value_scale[count - 1];
    }
  }

  // f(row), where row(i, d) gives dims [d, d + kLanes) of key i.
  template <typename F>
  void with_keys(const F& f) const {
    if (dtype == QWEN1M_INT8) return f(framed_keys<int8_t>());
    if (dtype == QWEN1M_E4M3) return f(framed_keys<E4M3>());
    with_type(dtype, [&](auto type) {
      f([this](int i, int d) { return load(reinterpret_cast<const decltype(type)*>(key[i]) + d); });
    });
  }

  // The same for values.
  template <typename F>
  void with_values(const F& f) const {
    if (dtype == QWEN1M_INT8) return f(scaled_values<int8_t>());
    if (dtype == QWEN1M_E4M3) return f(scaled_values<E4M3>());
    with_type(dtype, [&](auto type) {
      f([this](int i, int d) { return load(reinterpret_cast<const decltype(type)*>(value[i]) + d); });
    });
  }

 private:
  template <typename Number>
  auto framed_keys() const {
    return [this](int i, int d) {
      const Floats number = load(reinterpret_cast<const Number*>(key[i]) + d);
      return (number * broadcast(key_scale[i]) + load(centre + d)) * load(power + d);
    };
  }

  template <typename Number>
  auto scaled_values() const {
    return [this](int i, int d) {
      return load(reinterpret_cast<const Number*>(value[i]) + d) * broadcast(value_scale[i]);
    };
  }
};

// packed[panel][D][kPanel] = transposed keys
template <int D, typename Row>
inline void pack_keys(int padded, const Row& row, float* packed) {
  for (int panel = 0; panel < padded; panel += kPanel) {
    for (int half = 0; half < kPanel; half += kLanes) {
      for (int d = 0; d < D; d += kLanes) {
        Floats square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = row(panel + half + i, d);
        transpose(square);
        for (int i = 0; i < kLanes; ++i) store(packed + (d + i) * kPanel + half, square[i]);
      }
    }
    packed += D * kPanel;
  }
}

// packed[panel of D][key][kPanel]
template <int D, typename Row>
inline void pack_values(int padded, const Row& row, float* packed) {
  for (int i = 0; i < padded; ++i) {
    for (int d = 0; d < D; d += kLanes) {
      store(packed + (d / kPanel * kTileKeys + i) * kPanel + d % kPanel, row(i, d));
    }
  }
}

// Running softmax of up to `max_rows` query rows. Scores are in units of log2: q carries scale * log2(e).
template <int D>
struct Rows {
  float* q;            // [max_rows, D]
  float* out;          // [max_rows, D], not normalised
  float* scores;       // [max_rows, kTileKeys]
  float* keys;         // [kTileKeys / kPanel][D][kPanel]
  float* values;       // [D / kPanel][kTileKeys][kPanel]
  float* maximum_row;  // [max_rows]
  float* sum_row;      // [max_rows]
  int count;

  static size_t floats(int max_rows) {
    return static_cast<size_t>(max_rows) * (2 * D + kTileKeys + 2 * kLanes) + 2 * kTileKeys * D;
  }

  Rows(float* arena, int max_rows) {
    q = arena;
    out = q + max_rows * D;
    scores = out + max_rows * D;
    keys = scores + max_rows * kTileKeys;
    values = keys + kTileKeys * D;
    maximum_row = values + kTileKeys * D;
    sum_row = maximum_row + max_rows * kLanes;
  }

  void start(int rows) {
    count = rows;
    memset(out, 0, sizeof(float) * rows * D);
    for (int r = 0; r < rows; ++r) {
      maximum_row[r] = kNegativeInfinity;
      sum_row[r] = 0;
    }
  }

  // q row r = factor * source
  void set_query(int r, const float* source, float factor) {
    for (int d = 0; d < D; d += kLanes) store(q + r * D + d, load(source + d) * broadcast(factor));
  }

  void score(const KeyTile& tile) {
    advance();
    tile.with_keys([&](const auto& row) { pack_keys<D>(tile.padded(), row, keys); });
    multiply(q, D, count, keys, D * kPanel, tile.padded() / kPanel, D, scores, kTileKeys, false);
    for (int r = 0; r < count; ++r) {
      for (int i = tile.count; i < tile.padded(); ++i) scores[r * kTileKeys + i] = kNegativeInfinity;
    }
  }

  // Row r sees no key after `position`.
  void mask_after(const KeyTile& tile, int r, int32_t position) {
    float* row = scores + r * kTileKeys;
    for (int i = 0; i < tile.count; ++i) row[i] = tile.position[i] > position ? kNegativeInfinity : row[i];
  }

  // Folds row r of the scores into its running maximum and sum; leaves the weights in place of the scores.
  // Returns what the row's earlier output has to be multiplied by.
  float soften(int r, int padded) {
    float* row = scores + r * kTileKeys;
    Floats m = load(row);
    for (int i = kLanes; i < padded; i += kLanes) m = maximum(m, load(row + i));
    float top = largest(m);
    top = top > maximum_row[r] ? top : maximum_row[r];
    const Floats origin = broadcast(top == kNegativeInfinity ? 0.0f : top);
    Floats total{};
    for (int i = 0; i < padded; i += kLanes) {
      const Floats weight = exp2(load(row + i) - origin);
      total += weight;
      store(row + i, weight);
    }
    const float shrink =
        maximum_row[r] == top
            ? 1.0f
            : exp2(broadcast(maximum_row[r] == kNegativeInfinity ? kNegativeInfinity : maximum_row[r] - top))[0];
    maximum_row[r] = top;
    sum_row[r] = sum_row[r] * shrink + sum(total);
    return shrink;
  }

  // out = out * shrink + weights * V
  void attend(const KeyTile& tile) {
    for (int r = 0; r < count; ++r) {
      const float shrink = soften(r, tile.padded());
      if (shrink != 1.0f) {
        for (int d = 0; d < D; d += kLanes) store(out + r * D + d, load(out + r * D + d) * broadcast(shrink));
      }
    }
    tile.with_values([&](const auto& row) { pack_values<D>(tile.padded(), row, values); });
    multiply(scores, kTileKeys, count, values, kTileKeys * kPanel, D / kPanel, tile.count, out, D, true);
  }

  // Natural log of the sum of exp(scaled logits).
  float lse(int r) const { return maximum_row[r] * kLn2 + __builtin_logf(sum_row[r]); }

  void finish(int r, float* destination) const {
    const Floats inverse = broadcast(sum_row[r] > 0 ? 1.0f / sum_row[r] : 0.0f);
    for (int d = 0; d < D; d += kLanes) store(destination + d, load(out + r * D + d) * inverse);
  }
};

// Finds keys and values of one KV head in the pages of one sequence.
struct PagedRows {
  const qwen1m_cache& cache;
  const int32_t* block_table;
  int kv_head;
  int64_t head_bytes;

  PagedRows(const qwen1m_cache& of, const int32_t* table, int head)
      : cache(of), block_table(table), kv_head(head), head_bytes(of.head_dim * qwen1m_bytes_of(of.dtype)) {}

  void put(KeyTile* tile, int32_t position) const {
    const int64_t page = block_table[position / cache.page_size];
    const int64_t row = (page * cache.page_size + position % cache.page_size) * cache.kv_heads + kv_head;
    const int i = tile->count++;
    tile->key[i] = static_cast<const char*>(cache.key) + row * head_bytes;
    tile->value[i] = static_cast<const char*>(cache.value) + row * head_bytes;
    tile->position[i] = position;
    tile->dtype = cache.dtype;
    if (!qwen1m_is_quantised(cache.dtype)) return;
    const float left = cache.dtype == QWEN1M_E4M3 ? kE4M3ByHalf : 1.0f;  // by load()
    tile->key_scale[i] = widen(static_cast<const Float16*>(cache.frame.key_scale)[row]) * left;
    tile->value_scale[i] = widen(static_cast<const Float16*>(cache.frame.value_scale)[row]) * left;
    tile->power = cache.frame.power + kv_head * cache.head_dim;
    tile->centre = cache.frame.centre + kv_head * cache.head_dim;
  }
};

}  // namespace QWEN1M_ISA
}  // namespace qwen1m
