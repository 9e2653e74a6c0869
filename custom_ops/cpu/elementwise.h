// The rest of the step on the CPU: embedding, casts, RMSNorm, rotations and the cache write, SiLU, decode's inputs.
#pragma once

#include "parallel.h"
#include "qwen1m/pages.h"
#include "qwen1m/step.h"
#include "simd.h"

namespace qwen1m {
namespace QWEN1M_ISA {

constexpr int64_t kGrain = 16;           // rows below which a thread is not worth waking
constexpr int64_t kCastGrain = 1 << 15;  // values below which one is not

template <typename T>
void embedding(const qwen1m_embedding& a) {
  const T* table = static_cast<const T*>(a.table);
  float* out = floats(a.out);
  parallel_ranges(a.tokens, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = a.ids[t] - a.first;
      if (at < 0 || at >= a.rows) {
        memset(out + t * a.width, 0, sizeof(float) * a.width);
        continue;
      }
      const T* row = table + at * a.width;
      for (int64_t i = 0; i < a.width; ++i) out[t * a.width + i] = widen(row[i]);
    }
  });
}

template <typename T, typename Out>
void cast(const qwen1m_cast& a) {
  const T* values = static_cast<const T*>(a.values);
  Out* out = static_cast<Out*>(a.out);
  parallel_ranges(a.count, kCastGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) narrow(widen(values[i]), out + i);
  });
}

template <typename T>
void rms_norm(const qwen1m_rms_norm& a) {
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t whole = a.width / kLanes * kLanes;
  parallel_ranges(a.tokens, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* residual = a.residual + t * a.width;
      float* out = floats(a.out) + t * a.width;
      if (a.delta) {
        const float* delta = floats(a.delta) + t * a.width;
        for (int64_t i = 0; i < a.width; ++i) residual[i] += delta[i];
      }
      Floats squares{};
      for (int64_t i = 0; i < whole; i += kLanes) squares += load(residual + i) * load(residual + i);
      float total = sum(squares);
      for (int64_t i = whole; i < a.width; ++i) total += residual[i] * residual[i];
      const float inverse = 1.0f / __builtin_sqrtf(total / static_cast<float>(a.width) + a.eps);
      for (int64_t i = 0; i < whole; i += kLanes) {
        store(out + i, load(residual + i) * broadcast(inverse) * load(weight + i));
      }
      for (int64_t i = whole; i < a.width; ++i) out[i] = residual[i] * inverse * widen(weight[i]);
    }
  });
}

inline void silu_mul(const qwen1m_silu_mul& a) {
  const int64_t whole = a.width / kLanes * kLanes;
  parallel_ranges(a.tokens, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* gate = floats(a.gate_up) + t * 2 * a.width;
      const float* up = gate + a.width;
      float* out = floats(a.out) + t * a.width;
      for (int64_t i = 0; i < whole; i += kLanes) {
        const Floats g = load(gate + i);
        const Floats root = exp2(minimum(g * broadcast(-0.72134752f), broadcast(128.0f)));  // exp(-g / 2)
        store(out + i, g / (broadcast(1.0f) + root * root) * load(up + i));
      }
      for (int64_t i = whole; i < a.width; ++i) out[i] = gate[i] / (1.0f + __builtin_expf(-gate[i])) * up[i];
    }
  });
}

// cos | sin of float32 angles
inline void rotary_row(int32_t position, const float* inv_freq, int head_dim, float* out) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; ++i) {
    const float angle = static_cast<float>(position) * inv_freq[i];
    out[i] = static_cast<float>(__builtin_cos(static_cast<double>(angle)));
    out[half + i] = static_cast<float>(__builtin_sin(static_cast<double>(angle)));
  }
}

inline void rotary_table(const qwen1m_rotary_table& a) {
  parallel_ranges(a.rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* out = a.table + row * a.head_dim;
      if (row > begin && a.positions[row] == a.positions[row - 1]) {
        memcpy(out, out - a.head_dim, sizeof(float) * a.head_dim);
        continue;
      }
      rotary_row(a.positions[row], a.inv_freq, a.head_dim, out);
    }
  });
}

// out = rotate(x + bias), halves split; `table` is cos | sin.
template <typename B, typename Out>
inline void rotate_head(const float* x, const B* bias, const float* table, int head_dim, Out* out) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; ++i) {
    const float low = x[i] + widen(bias[i]), high = x[i + half] + widen(bias[i + half]);
    const float cosine = table[i], sine = table[i + half];
    narrow(low * cosine - high * sine, out + i);
    narrow(high * cosine + low * sine, out + i + half);
  }
}

constexpr int kMaxHeadDim = 128;

constexpr float largest_of(int8_t) { return 127; }
constexpr float largest_of(E4M3) { return kLargestE4M3; }

QWEN1M_INLINE void round_to(float x, int8_t* number) {
  *number = static_cast<int8_t>(__builtin_fminf(__builtin_fmaxf(__builtin_rintf(x), -127.0f), 127.0f));
}
QWEN1M_INLINE void round_to(float x, E4M3* number) { number->bits = to_e4m3(x); }

// The numbers of an 8-bit cache and their scale: x / scale to the nearest, for the float16 scale nearest to the one
// that makes max|x| the largest number.
template <typename Number>
inline void quantise(const float* x, int head_dim, Number* number, Float16* scale) {
  float largest = 0;
  for (int i = 0; i < head_dim; ++i) largest = __builtin_fmaxf(largest, __builtin_fabsf(x[i]));
  narrow(largest / largest_of(Number{}), scale);
  const float inverse = widen(*scale) > 0 ? 1.0f / widen(*scale) : 0.0f;
  for (int i = 0; i < head_dim; ++i) round_to(x[i] * inverse, number + i);
}

// Where one token's keys and values of a KV head go, in the type of the cache.
template <typename T>
struct HeadSlot {
  const qwen1m_cache& cache;
  int head;
  int64_t row;  // of the cache's [slots * G]

  void keep_key(const float* key) const { keep(key, cache.key); }
  void keep_value(const float* value) const { keep(value, cache.value); }

 private:
  void keep(const float* from, void* pool) const {
    T* to = static_cast<T*>(pool) + row * cache.head_dim;
    for (int i = 0; i < cache.head_dim; ++i) narrow(from[i], to + i);
  }
};

template <typename Number>
struct QuantisedSlot {
  const qwen1m_cache& cache;
  int head;
  int64_t row;

  void keep_key(const float* key) const {
    const float* power = cache.frame.power + head * cache.head_dim;
    const float* centre = cache.frame.centre + head * cache.head_dim;
    float centred[kMaxHeadDim];
    for (int i = 0; i < cache.head_dim; ++i) centred[i] = key[i] / power[i] - centre[i];
    keep(centred, cache.key, cache.frame.key_scale);
  }
  void keep_value(const float* value) const { keep(value, cache.value, cache.frame.value_scale); }

 private:
  void keep(const float* from, void* pool, void* scales) const {
    quantise(from, cache.head_dim, static_cast<Number*>(pool) + row * cache.head_dim,
             static_cast<Float16*>(scales) + row);
  }
};

template <>
struct HeadSlot<int8_t> : QuantisedSlot<int8_t> {};
template <>
struct HeadSlot<E4M3> : QuantisedSlot<E4M3> {};

template <typename T, typename Number>
void dequantize_pages(const qwen1m_dequantize_pages& a) {
  const qwen1m_cache& cache = a.cache;
  const int d = cache.head_dim, kv_heads = cache.kv_heads;
  const int64_t page_rows = static_cast<int64_t>(cache.page_size) * kv_heads;
  parallel_ranges(a.count * page_rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t to = begin; to < end; ++to) {
      const int64_t from = a.pages[to / page_rows] * page_rows + to % page_rows;
      const float* power = cache.frame.power + from % kv_heads * d;
      const float* centre = cache.frame.centre + from % kv_heads * d;
      const float key_scale = widen(static_cast<const Float16*>(cache.frame.key_scale)[from]);
      const float value_scale = widen(static_cast<const Float16*>(cache.frame.value_scale)[from]);
      const Number* key = static_cast<const Number*>(cache.key) + from * d;
      const Number* value = static_cast<const Number*>(cache.value) + from * d;
      for (int i = 0; i < d; ++i) {
        narrow((widen(key[i]) * key_scale + centre[i]) * power[i], static_cast<T*>(a.key) + to * d + i);
        narrow(widen(value[i]) * value_scale, static_cast<T*>(a.value) + to * d + i);
      }
    }
  });
}

template <typename B, typename T>
void rotate_and_cache(const qwen1m_rotate_and_cache& a) {
  const int d = a.cache.head_dim, kv_heads = a.cache.kv_heads;
  const int64_t width = static_cast<int64_t>(a.heads + 2 * kv_heads) * d;
  const B* bias = static_cast<const B*>(a.bias);
  parallel_ranges(a.tokens, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* x = floats(a.qkv) + t * width;
      for (int v = 0; a.q != nullptr && v < a.variants; ++v) {
        const int64_t row = static_cast<int64_t>(v) * a.tokens + t;
        for (int h = 0; h < a.heads; ++h) {
          rotate_head(x + h * d, bias + h * d, a.table + row * d, d, floats(a.q) + (row * a.heads + h) * d);
        }
      }
      if (a.slots[t] < 0) continue;
      for (int h = 0; h < kv_heads; ++h) {
        const int64_t key_at = static_cast<int64_t>(a.heads + h) * d, value_at = key_at + kv_heads * d;
        const HeadSlot<T> slot{a.cache, h, a.slots[t] * kv_heads + h};
        float key[kMaxHeadDim], value[kMaxHeadDim];
        rotate_head(x + key_at, bias + key_at, a.table + t * d, d, key);
        for (int i = 0; i < d; ++i) value[i] = x[value_at + i] + widen(bias[value_at + i]);
        slot.keep_key(key);
        slot.keep_value(value);
      }
    }
  });
}

template <typename B>
void rotate_queries(const qwen1m_rotate_queries& a) {
  const int d = a.head_dim;
  const int64_t width = static_cast<int64_t>(a.heads + 2 * a.kv_heads) * d;
  const B* bias = static_cast<const B*>(a.bias);
  parallel_ranges(a.rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int v = 0; v < a.variants; ++v) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t row = static_cast<int64_t>(v) * a.rows + t;
        const float* table = a.table + (static_cast<int64_t>(v) * a.table_rows + a.table_row + t) * d;
        for (int h = 0; h < a.heads; ++h) {
          rotate_head(floats(a.qkv) + (a.row + t) * width + h * d, bias + h * d, table, d,
                      floats(a.q) + (row * a.heads + h) * d);
        }
      }
    }
  });
}

inline void decode_inputs(const qwen1m_decode_inputs& a) {
  const int32_t inter = 2 * a.chunk_len - 1 < a.chunk_size ? 2 * a.chunk_len - 1 : a.chunk_size;
  for (int b = 0; b < a.batch; ++b) {
    const int32_t position = a.lengths[b], length = position + 1, offset = position % a.chunk_len;
    if (position > 0) {
      const int64_t page = a.block_tables[static_cast<int64_t>(b) * a.table_width + position / a.page_size];
      a.slots[b] = page * a.page_size + position % a.page_size;
      a.lengths[b] = length;
    } else {
      a.slots[b] = -1;
    }
    const int32_t succ = offset + a.chunk_len < a.chunk_size ? offset + a.chunk_len : a.chunk_size;
    const int32_t positions[3] = {offset, succ, inter};
    for (int v = 0; v < 3; ++v) {
      rotary_row(positions[v], a.inv_freq, a.head_dim, a.table + (static_cast<int64_t>(v) * a.batch + b) * a.head_dim);
    }
    double m = 1.0;
    if (a.original_max_position_embeddings > 0) {
      const double grown = 0.1 * __builtin_log(static_cast<double>(length) / a.original_max_position_embeddings) + 1.0;
      m = grown > 1.0 ? grown : 1.0;
    }
    a.scale[b] = static_cast<float>(m * m / __builtin_sqrt(static_cast<double>(a.head_dim)));
  }
}

}  // namespace QWEN1M_ISA
}  // namespace qwen1m
