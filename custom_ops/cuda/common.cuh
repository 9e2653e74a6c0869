// What the CUDA kernels share: storage types, dispatch on them, 16-byte packs, reductions over a warp and a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "qwen1m/e4m3.h"
#include "qwen1m/types.h"

namespace qwen1m {
namespace cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

// A number of an FP8 cache.
struct fp8 {
  uint8_t bits;
};

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kNegativeInfinity = -__builtin_huge_valf();

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __bfloat162float(x); }
__device__ inline float widen(f16 x) { return __half2float(x); }
__device__ inline float widen(int8_t x) { return static_cast<float>(x); }
// The same bits as a float16: sign, one bit more of exponent, mantissa. It stands for 2^-8 of the number.
__device__ inline float widen(fp8 x) {
  const auto half = static_cast<uint16_t>((x.bits & 0x80) << 8 | (x.bits & 0x7f) << 7);
  return 256.0f * __half2float(__ushort_as_half(half));
}

// Two bytes of four, the lower or the upper ones, each in the upper byte of its 16 bits.
__device__ inline uint32_t spread_pair(uint32_t bytes, int upper) {
  return __byte_perm(bytes, 0, upper ? 0x3424 : 0x1404);
}
// The same of FP8 numbers as float16 that stand for 2^-8 of them.
__device__ inline uint32_t spread_fp8_pair(uint32_t bytes, int upper) {
  const uint32_t pair = spread_pair(bytes, upper);
  return (pair & 0x80008000u) | (pair & 0x7f007f00u) >> 1;
}
// The same of int8 numbers as float16: 1024 + 128 + number is one whose last byte is the number with its highest bit
// turned.
__device__ inline uint32_t widen_int8_pair(uint32_t bytes, int upper) {
  const uint32_t pair = __byte_perm(bytes ^ 0x80808080u, 0x64646464u, upper ? 0x4342 : 0x4140), origin = 0x64806480u;
  const __half2 number = __hsub2(reinterpret_cast<const __half2&>(pair), reinterpret_cast<const __half2&>(origin));
  return reinterpret_cast<const uint32_t&>(number);
}

template <typename T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 narrow<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline f16 narrow<f16>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline int8_t narrow<int8_t>(float x) {
  return static_cast<int8_t>(max(-127, min(127, __float2int_rn(x))));
}
template <>
__device__ inline fp8 narrow<fp8>(float x) {
  return {to_e4m3(x)};
}

// Of the numbers of an 8-bit cache.
template <typename Number>
constexpr float kLargest = 0;
template <>
constexpr float kLargest<int8_t> = 127;
template <>
constexpr float kLargest<fp8> = kLargestE4M3;

// 16 bytes of values: one load or store of a thread.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// f(T{}) for the type that `dtype` names; activations, weights and caches of a GPU are 16 bits wide.
template <typename F>
int with_half_type(qwen1m_dtype dtype, F&& f) {
  switch (dtype) {
    case QWEN1M_BFLOAT16: return f(bf16{});
    case QWEN1M_FLOAT16: return f(f16{});
    default: return cudaErrorInvalidValue;
  }
}

// f(Number{}) for the bytes that a cache holds.
template <typename F>
int with_number(qwen1m_dtype dtype, F&& f) {
  switch (dtype) {
    case QWEN1M_INT8: return f(int8_t{});
    case QWEN1M_E4M3: return f(fp8{});
    default: return cudaErrorInvalidValue;
  }
}

template <typename F>
int with_type(qwen1m_dtype dtype, F&& f) {
  return dtype == QWEN1M_FLOAT32 ? f(float{}) : with_half_type(dtype, f);
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

__device__ inline float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// Whether the current device is a Hopper, whose own machine code (sm_90a) runs there and nowhere else.
inline bool is_hopper() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
}

// Of the current device.
inline int32_t processors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

inline cudaStream_t as_stream(qwen1m_stream stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace cuda
}  // namespace qwen1m
