// Vectors of the instruction set this file is compiled for: one source, no intrinsics but for what compilers convert
// value by value.
//
// Included once for each instruction set (isa_*.cpp), which defines QWEN1M_ISA (a namespace), QWEN1M_VECTOR_BYTES and
// QWEN1M_TILE_ROWS. Nothing here may instantiate standard templates: the linker would be free to keep the copy that
// was compiled for the widest machine.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#include "qwen1m/e4m3.h"
#include "qwen1m/types.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define QWEN1M_INLINE inline __attribute__((always_inline))

namespace qwen1m {
namespace QWEN1M_ISA {

constexpr int kLanes = QWEN1M_VECTOR_BYTES / 4;

typedef float Floats __attribute__((vector_size(QWEN1M_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(QWEN1M_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(QWEN1M_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(QWEN1M_VECTOR_BYTES / 2)));
typedef int16_t Shorts __attribute__((vector_size(QWEN1M_VECTOR_BYTES / 2)));
typedef int8_t Bytes __attribute__((vector_size(QWEN1M_VECTOR_BYTES / 4)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct E4M3 {
  uint8_t bits;
};

// Calls f with a value of the floating type that a tensor is stored in; bytes mean nothing by themselves.
template <typename F>
void with_type(qwen1m_dtype dtype, const F& f) {
  switch (dtype) {
    case QWEN1M_FLOAT32: return f(float{});
    case QWEN1M_BFLOAT16: return f(BFloat16{});
    case QWEN1M_FLOAT16: return f(Float16{});
    case QWEN1M_INT8:
    case QWEN1M_E4M3: return;
  }
}

// Activations are float32 on a CPU.
QWEN1M_INLINE float* floats(void* activations) { return static_cast<float*>(activations); }
QWEN1M_INLINE const float* floats(const void* activations) { return static_cast<const float*>(activations); }

QWEN1M_INLINE Floats broadcast(float x) { return x - Floats{}; }  // x - 0 is x, x + 0 is not (-0)

QWEN1M_INLINE Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof(v));
  return v;
}

QWEN1M_INLINE void store(float* p, Floats v) { memcpy(p, &v, sizeof(v)); }

QWEN1M_INLINE Floats bits_to_floats(Words w) {
  Floats v;
  memcpy(&v, &w, sizeof(v));
  return v;
}

QWEN1M_INLINE Floats load(const BFloat16* p) {
  Halves h;
  memcpy(&h, p, sizeof(h));
  return bits_to_floats(__builtin_convertvector(h, Words) << 16);
}

QWEN1M_INLINE Floats load(const int8_t* p) {
#if defined(__F16C__) && QWEN1M_VECTOR_BYTES == 64
  return (Floats)_mm512_maskz_cvtepi32_ps(
      0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__F16C__) && QWEN1M_VECTOR_BYTES == 32
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Bytes b;
  memcpy(&b, p, sizeof(b));
  return __builtin_convertvector(b, Floats);
#endif
}

QWEN1M_INLINE float widen(float x) { return x; }
QWEN1M_INLINE float widen(int8_t x) { return x; }

QWEN1M_INLINE float widen(BFloat16 x) {
  const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &word, sizeof(f));
  return f;
}

QWEN1M_INLINE float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  uint32_t word;
  if (magnitude >= 0x7c00) {
    word = 0x7f800000 | ((magnitude & 0x3ff) << 13);
  } else if (magnitude >= 0x400) {
    word = (magnitude << 13) + (112u << 23);
  } else {
    const float f = static_cast<float>(magnitude) * 0x1p-24f;
    memcpy(&word, &f, sizeof(word));
  }
  word |= sign;
  float f;
  memcpy(&f, &word, sizeof(f));
  return f;
}

QWEN1M_INLINE Floats load(const Float16* p) {
#if defined(__F16C__) && QWEN1M_VECTOR_BYTES == 64
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__) && QWEN1M_VECTOR_BYTES == 32
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

// The same bits as a float16: sign, one bit more of exponent, mantissa. It stands for 2^-8 of the number.
constexpr float kE4M3ByHalf = 256.0f;
QWEN1M_INLINE uint16_t as_half(E4M3 x) { return static_cast<uint16_t>((x.bits & 0x80) << 8 | (x.bits & 0x7f) << 7); }

QWEN1M_INLINE float widen(E4M3 x) { return widen(Float16{as_half(x)}) * kE4M3ByHalf; }

// Of the numbers times kE4M3ByHalf, which belongs into their scale.
QWEN1M_INLINE Floats load(const E4M3* p) {
#if defined(__F16C__) && QWEN1M_VECTOR_BYTES == 64
  const Shorts high = (Shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) << 8;
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)((high >> 1) & static_cast<int16_t>(0xbfff)));
#elif defined(__F16C__) && QWEN1M_VECTOR_BYTES == 32
  const Shorts high = (Shorts)_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))) << 8;
  return (Floats)_mm256_cvtph_ps((__m128i)((high >> 1) & static_cast<int16_t>(0xbfff)));
#else
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen(Float16{as_half(p[i])});
  return v;
#endif
}

QWEN1M_INLINE void narrow(float x, float* p) { *p = x; }

// Round to nearest, ties to even.
QWEN1M_INLINE void narrow(float x, BFloat16* p) {
  uint32_t word;
  memcpy(&word, &x, sizeof(word));
  p->bits = (word & 0x7fffffff) > 0x7f800000 ? static_cast<uint16_t>((word >> 16) | 0x40)
                                             : static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

QWEN1M_INLINE void narrow(float x, Float16* p) {
  uint32_t word;
  memcpy(&word, &x, sizeof(word));
  const uint32_t sign = (word >> 16) & 0x8000;
  const uint32_t magnitude = word & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;
  } else if (magnitude >= 0x38800000) {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  } else {
    float f;
    memcpy(&f, &magnitude, sizeof(f));
    const float rounded = f + 0.5f;  // the sum's unit in the last place is 2^-24, float16's smallest step
    memcpy(&half, &rounded, sizeof(half));
    half -= 0x3f000000;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}

QWEN1M_INLINE Floats select(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }
QWEN1M_INLINE Floats maximum(Floats a, Floats b) { return select(a > b, a, b); }
QWEN1M_INLINE Floats minimum(Floats a, Floats b) { return select(a < b, a, b); }

QWEN1M_INLINE float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

QWEN1M_INLINE float largest(Floats v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// 2^x for x <= 128 (infinite there); 0 below -126 (-inf included). Relative error below 2e-7.
QWEN1M_INLINE Floats exp2(Floats x) {
  const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Ints in_range = x > broadcast(-126.0f);
  const Floats clamped = select(in_range, x, broadcast(-126.0f));
  const Floats shifted = clamped + magic;
  const Floats r = clamped - (shifted - magic);
  Floats p = broadcast(1.535336188319500e-4f);
  p = p * r + broadcast(1.339887440266574e-3f);
  p = p * r + broadcast(9.618437357674640e-3f);
  p = p * r + broadcast(5.550332471162809e-2f);
  p = p * r + broadcast(2.402264791363012e-1f);
  p = p * r + broadcast(6.931472028550421e-1f);
  p = p * r + broadcast(1.0f);
  Words exponent;
  memcpy(&exponent, &shifted, sizeof(exponent));
  const Floats scale = bits_to_floats((exponent + 127u) << 23);
  return select(in_range, p * scale, Floats{});
}

// One step of a transposition: swaps the off-diagonal squares of WIDTH lanes between two vectors.
template <int WIDTH, int... LANE>
QWEN1M_INLINE void swap_squares(Floats& a, Floats& b, std::integer_sequence<int, LANE...>) {
  const Floats x = a, y = b;
#if defined(__clang__)
  a = __builtin_shufflevector(x, y, (LANE & WIDTH ? kLanes + LANE - WIDTH : LANE)...);
  b = __builtin_shufflevector(x, y, (LANE & WIDTH ? kLanes + LANE : LANE + WIDTH)...);
#else
  a = __builtin_shuffle(x, y, Ints{(LANE & WIDTH ? kLanes + LANE - WIDTH : LANE)...});
  b = __builtin_shuffle(x, y, Ints{(LANE & WIDTH ? kLanes + LANE : LANE + WIDTH)...});
#endif
}

// Transposes a kLanes x kLanes square held in kLanes vectors.
template <int WIDTH = 1>
QWEN1M_INLINE void transpose(Floats (&v)[kLanes]) {
  if constexpr (WIDTH < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & WIDTH)) swap_squares<WIDTH>(v[i], v[i + WIDTH], std::make_integer_sequence<int, kLanes>());
    }
    transpose<2 * WIDTH>(v);
  }
}

}  // namespace QWEN1M_ISA
}  // namespace qwen1m
