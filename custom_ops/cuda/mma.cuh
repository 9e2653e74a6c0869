// Tensor core and asynchronous copy instructions of compute capability 8.0 and newer, one function an instruction.
#pragma once

#include "common.cuh"

namespace qwen1m {
namespace cuda {

// Shared memory as the instructions address it.
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline uint4 load_shared(uint32_t shared) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(shared));
  return v;
}

// 16 bytes from global to shared memory.
__device__ inline void copy_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// The same; zeros when not `valid`, though the address must be readable all the same. Costs several instructions more.
__device__ inline void copy_async_or_zero(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// The copies issued since the last call form a group.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kGroups` of this thread's groups are under way.
template <int kGroups>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Four 8 x 8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(uint32_t (&m)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&m)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

// c[16, 8] += a[16, 16] * b[16, 8]. Lane 4g + p holds c at rows g (c[0], c[1]) and g + 8 (c[2], c[3]), columns 2p, 2p
// + 1.
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void multiply_add<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void multiply_add<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two values rounded to T in one register, `low` at the lower address.
template <typename T>
__device__ inline uint32_t pack_pair(float low, float high);

template <>
__device__ inline uint32_t pack_pair<bf16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ inline uint32_t pack_pair<f16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A tile of rows of D 16-bit values in shared memory. The 16-byte chunks of a row are permuted so that the eight rows
// of a matrix, read at one chunk, lie in different banks.
template <int D>
struct SharedRows {
  static constexpr int kChunks = D / 8;
  static constexpr int kRowBytes = D * 2;

  __device__ static uint32_t address(uint32_t tile, int row, int chunk) {
    return tile + row * kRowBytes + ((chunk ^ (row & 7)) << 4);
  }
};

// Where a lane's rows of an operand of 16 rows begin, relative to the tile. An operand's rows are those of the left
// factor, or those of the right factor itself; or, `transposed`, those whose transpose is the right factor.
template <int D>
__device__ inline uint32_t operand(int lane) {
  return SharedRows<D>::address(0, lane % 16, lane / 16);
}

template <int D>
__device__ inline uint32_t transposed_operand(int lane) {
  return SharedRows<D>::address(0, lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

// The same for rows further down (a multiple of 16) and for values [16 * step, 16 * step + 16). Tiles begin at
// multiples of a row's size, so that the permutation of chunks is a single exclusive or.
template <int D>
__device__ inline uint32_t at(uint32_t place, int row, int step) {
  return (place ^ (step << 5)) + row * SharedRows<D>::kRowBytes;
}

// a[16, 16]: rows and values of an operand() as the left factor.
__device__ inline void load_left(uint32_t (&a)[4], uint32_t place) { load_matrices(a, place); }

// b[16, 16]: values and rows of a transposed_operand(): b[0], b[1] for the first eight rows, b[2], b[3] for the others.
__device__ inline void load_transposed(uint32_t (&b)[4], uint32_t place) { load_matrices(b, place); }

// b[16, 16]: rows and values of an operand(): b[0], b[1] for the first eight values, b[2], b[3] for the others.
__device__ inline void load_right(uint32_t (&b)[4], uint32_t place) { load_matrices_transposed(b, place); }

}  // namespace cuda
}  // namespace qwen1m
