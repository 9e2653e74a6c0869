// Bytes of 8-bit weights become 16-bit values, exactly.
#pragma once

#include "mma.cuh"
#include "qwen1m/weight8.h"

namespace qwen1m {
namespace cuda {

struct Int8 {};
struct E4M3 {};

// Four numbers, of `bytes` from the lowest on, as two pairs of T. What the numbers are times 1 / kPower, which belongs
// into their scale.
template <typename Kind, typename T>
__device__ inline void widen_bytes(uint32_t bytes, uint32_t (&pairs)[2]);

template <typename Kind, typename T>
constexpr float kPower = 1.0f;
#if __CUDA_ARCH__ < 890
template <>
constexpr float kPower<E4M3, f16> = 256.0f;
#endif

// 2^23 + 128 + number is a float32 whose last byte is the number with its highest bit turned.
template <>
__device__ inline void widen_bytes<Int8, bf16>(uint32_t bytes, uint32_t (&pairs)[2]) {
  const uint32_t turned = bytes ^ 0x80808080u;
  float numbers[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    numbers[i] = __uint_as_float(__byte_perm(turned, 0x4b000000u, 0x7440 + i)) - 8388736.0f;
  }
  pairs[0] = pack_pair<bf16>(numbers[0], numbers[1]);
  pairs[1] = pack_pair<bf16>(numbers[2], numbers[3]);
}

template <>
__device__ inline void widen_bytes<Int8, f16>(uint32_t bytes, uint32_t (&pairs)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) pairs[i] = widen_int8_pair(bytes, i);
}

template <>
__device__ inline void widen_bytes<E4M3, f16>(uint32_t bytes, uint32_t (&pairs)[2]) {
#if __CUDA_ARCH__ >= 890
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n"
      "}"
      : "=r"(pairs[0]), "=r"(pairs[1])
      : "r"(bytes));
#else
#pragma unroll
  for (int i = 0; i < 2; ++i) pairs[i] = spread_fp8_pair(bytes, i);
#endif
}

// Four bits more of exponent: a bfloat16 whose exponent is 120 too small, which a product makes up for.
template <>
__device__ inline void widen_bytes<E4M3, bf16>(uint32_t bytes, uint32_t (&pairs)[2]) {
  const uint32_t power = 0x7b807b80u;  // 2^120
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t high = spread_pair(bytes, i), small = (high & 0x80008000u) | (high >> 4 & 0x07f007f0u);
    const __nv_bfloat162 number =
        __hmul2(reinterpret_cast<const __nv_bfloat162&>(small), reinterpret_cast<const __nv_bfloat162&>(power));
    pairs[i] = reinterpret_cast<const uint32_t&>(number);
  }
}

// f(Kind{}, T{}) for the kind of the numbers and a type of 16 bits.
template <typename F>
int with_weight8(qwen1m_dtype kind, qwen1m_dtype dtype, F&& f) {
  return with_half_type(dtype, [&](auto type) -> int {
    switch (kind) {
      case QWEN1M_INT8: return f(Int8{}, type);
      case QWEN1M_E4M3: return f(E4M3{}, type);
      default: return cudaErrorInvalidValue;
    }
  });
}

}  // namespace cuda
}  // namespace qwen1m
