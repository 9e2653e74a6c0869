// Neighbouring values of a thread: one access of at most 16 bytes, float32 in between.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace qwen1m {
namespace cuda {

constexpr int kPack = 8;  // 16-bit values of 16 bytes

template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
  static_assert(N % 2 == 0 && N * sizeof(T) <= 16, "one access of a thread");
  T values[N];
};

template <int N, typename T>
__device__ inline Vector<T, N> load_vector(const T* at) {
  return *reinterpret_cast<const Vector<T, N>*>(at);
}

template <typename T, int N>
__device__ inline void store_vector(const Vector<T, N>& from, T* at) {
  *reinterpret_cast<Vector<T, N>*>(at) = from;
}

template <typename T, int N>
__device__ inline void widen(const Vector<T, N>& from, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = widen(from.values[i]);
}

template <int N, typename T>
__device__ inline void load_widened(const T* at, float (&to)[N]) {
  widen(load_vector<N>(at), to);
}

__device__ inline void narrow_pair(float low, float high, float* to) {
  to[0] = low;
  to[1] = high;
}

__device__ inline void narrow_pair(float low, float high, bf16* to) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  to[0] = pair.x;
  to[1] = pair.y;
}

__device__ inline void narrow_pair(float low, float high, f16* to) {
  const __half2 pair = __floats2half2_rn(low, high);
  to[0] = pair.x;
  to[1] = pair.y;
}

template <typename T, int N>
__device__ inline void store_narrowed(const float (&from)[N], T* at) {
  Vector<T, N> to;
#pragma unroll
  for (int i = 0; i < N; i += 2) narrow_pair(from[i], from[i + 1], to.values + i);
  store_vector(to, at);
}

template <typename T, typename Out, int N>
__device__ inline void store_cast(const Vector<T, N>& from, Out* at) {
  if constexpr (std::is_same_v<T, Out>) {
    store_vector(from, at);
  } else {
    float wide[N];
    widen(from, wide);
    store_narrowed(wide, at);
  }
}

// Whether vectors may be loaded from all of these addresses. Null pointers count.
template <typename... Pointers>
bool aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace cuda
}  // namespace qwen1m
