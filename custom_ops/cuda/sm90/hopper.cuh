// Instructions of compute capability 9.0 (sm_90a): barriers, bulk tensor copies, register shares, products of a
// warpgroup. One function an instruction; PTX ISA 8.0 and newer.
#pragma once

#include <cuda.h>

#include "mma.cuh"

namespace qwen1m {
namespace cuda {
namespace sm90 {

constexpr int kWarpgroup = 128;              // threads that issue a product together
constexpr int kMostSharedBytes = 227 << 10;  // of a block

// ---- mbarriers: a phase ends when all arrivals and all announced bytes have come in ----

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier, int times) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(times) : "memory");
}

__device__ inline void barrier_arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives once this thread's copies so far (copy_async) have come in.
__device__ inline void copy_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits for the end of the phase of that parity. A barrier that was never used counts as past parity 1.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A position in a ring of buffers and the parity of the barriers' phase there.
template <int kSize>
struct RingPlace {
  int index = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++index == kSize) {
      index = 0;
      parity ^= 1;
    }
  }
};

// ---- named barriers among the threads of several warps ----

__device__ inline void named_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline void named_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- the copy engine and what it and the tensor cores see ----

// Ordinary writes of this thread to shared memory become visible to copies and products that follow.
__device__ inline void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// A box of the tensor, its first element at (x, y, z), to shared memory; its bytes count for the barrier.
__device__ inline void copy_box(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The same of a matrix, at (x, y).
__device__ inline void copy_matrix(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared),
      "l"(&map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

// Bytes that lie one behind the other, in whole 16.
__device__ inline void copy_bytes(uint32_t shared, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// ---- blocks of a cluster ----

// The place in another block's shared memory that `shared` is in this one's.
__device__ inline uint32_t in_block(uint32_t shared, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
  return there;
}

// At another block's barrier. What this thread has stored need not be visible there: a release of the cluster's scope
// would cost a fence of the whole device.
__device__ inline void barrier_arrive_in_block(uint32_t barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(in_block(barrier, rank)) : "memory");
}

// copy_matrix to the same place in all `blocks` of the cluster, bit by bit, whose own barriers its bytes count for.
__device__ inline void copy_matrix_to(uint16_t blocks, uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x,
                                      int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4}], [%2], %5;" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}

// ---- registers of a warpgroup ----

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- products of a warpgroup ----

// Values in registers that products read or write are settled before and after: the compiler moves no use across.
template <typename T, int N>
__device__ inline void settle(T (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (sizeof(T) == 4 && T(0.5f) != T(0)) {
      asm volatile("" : "+f"(values[i])::"memory");
    } else {
      asm volatile("" : "+r"(values[i])::"memory");
    }
  }
}

// Before the first product after registers of this warpgroup were written.
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `kGroups` groups of products are under way.
template <int kGroups>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// Operands in shared memory are panels of rows of 64 16-bit values (128 bytes), the 16-byte chunks of a row permuted by
// chunk ^= row % 8; panels begin at multiples of 1,024 bytes.
constexpr int kPanelValues = 64, kPanelRowBytes = 128;

// The low half of a descriptor, which says where an operand begins: adding to it moves on by 16 bytes a unit. The high
// half is the same for all, eight rows one behind the other and the permutation. Products take it from a uniform
// register: the shuffle tells the compiler that all lanes have the same, so that what is added to it stays there too.
__device__ inline uint32_t descriptor(uint32_t shared, uint32_t leading_bytes) {
  return __shfl_sync(kAllLanes, leading_bytes >> 4 << 16 | (shared & 0x3ffff) >> 4, 0);
}
constexpr uint32_t kDescriptorHigh = 1u << 30 | 8 * kPanelRowBytes >> 4;

// Rows of the left factor, or those whose transpose is the right one: from a row, and 16-byte chunk 2 * step, on.
__device__ inline uint32_t rows_descriptor(uint32_t shared) { return descriptor(shared, 16); }

// Rows of the right factor itself: its columns go on in the next panel.
__device__ inline uint32_t columns_descriptor(uint32_t shared, int panel_rows) {
  return descriptor(shared, panel_rows * kPanelRowBytes);
}

#define QWEN1M_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define QWEN1M_F16(d, i) QWEN1M_F4(d, i), QWEN1M_F4(d, i + 4), QWEN1M_F4(d, i + 8), QWEN1M_F4(d, i + 12)
#define QWEN1M_F64(d, i) QWEN1M_F16(d, i), QWEN1M_F16(d, i + 16), QWEN1M_F16(d, i + 32), QWEN1M_F16(d, i + 48)
#define QWEN1M_R16(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p)                                                   \
  "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h ", %" #i ", %" #j ", %" #k ", %" #l ", %" #m \
  ", %" #n ", %" #o ", %" #p
#define QWEN1M_R32                                                 \
  QWEN1M_R16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15) \
  ", " QWEN1M_R16(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31)
#define QWEN1M_R64                                                                                            \
  QWEN1M_R32 ", " QWEN1M_R16(32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47) ", " QWEN1M_R16( \
      48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63)

#define QWEN1M_R128                                                                                                  \
  QWEN1M_R64 ", " QWEN1M_R16(64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79) ", " QWEN1M_R16(        \
      80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 91, 92, 93, 94,                                                    \
      95) ", " QWEN1M_R16(96, 97, 98, 99, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110,                     \
                          111) ", " QWEN1M_R16(112, 113, 114, 115, 116, 117, 118, 119, 120, 121, 122, 123, 124, 125, \
                                               126, 127)

// c[64, N] (+)= a[64, 16] b[16, N], N = 2 * (values of c a thread). Thread 32w + 4g + p holds rows 16w + g (c[4n],
// c[4n + 1]) and 16w + g + 8 (c[4n + 2], c[4n + 3]) at columns 8n + 2p, 8n + 2p + 1. `add` false: c's contents do not
// count. Both factors in shared memory, rows as their transposes.
template <typename T>
__device__ inline void multiply_shared(float (&c)[128], uint32_t a, uint32_t b, bool add);

template <typename T>
__device__ inline void multiply_shared(float (&c)[64], uint32_t a, uint32_t b, bool add);

template <typename T>
__device__ inline void multiply_shared(float (&c)[32], uint32_t a, uint32_t b, bool add);

// The left factor in registers, as multiply_add takes it, the right one as it is. Always adds.
template <typename T>
__device__ inline void multiply_rows(float (&c)[64], const uint32_t (&a)[4], uint32_t b);

#define QWEN1M_PRODUCTS(T, name)                                                                                      \
  template <>                                                                                                         \
  __device__ inline void multiply_shared<T>(float (&c)[128], uint32_t a, uint32_t b, bool add) {                      \
    asm volatile(                                                                                                     \
        "{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %131, 0;\nmov.b64 a, {%128, %130};\nmov.b64 b, {%129, "    \
        "%130};\nwgmma.mma_async.sync.aligned.m64n256k16.f32." name "." name " {" QWEN1M_R128                         \
        "}, a, b, p, 1, 1, 0, 0;\n}"                                                                                  \
        : QWEN1M_F64(c, 0), QWEN1M_F64(c, 64)                                                                         \
        : "r"(a), "r"(b), "r"(kDescriptorHigh), "r"(static_cast<int>(add)));                                          \
  }                                                                                                                   \
  template <>                                                                                                         \
  __device__ inline void multiply_shared<T>(float (&c)[64], uint32_t a, uint32_t b, bool add) {                       \
    asm volatile(                                                                                                     \
        "{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %67, 0;\nmov.b64 a, {%64, %66};\nmov.b64 b, {%65, %66};\n" \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " {" QWEN1M_R64 "}, a, b, p, 1, 1, 0, 0;\n}"     \
        : QWEN1M_F64(c, 0)                                                                                            \
        : "r"(a), "r"(b), "r"(kDescriptorHigh), "r"(static_cast<int>(add)));                                          \
  }                                                                                                                   \
  template <>                                                                                                         \
  __device__ inline void multiply_shared<T>(float (&c)[32], uint32_t a, uint32_t b, bool add) {                       \
    asm volatile(                                                                                                     \
        "{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %35, 0;\nmov.b64 a, {%32, %34};\nmov.b64 b, {%33, %34};\n" \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " {" QWEN1M_R32 "}, a, b, p, 1, 1, 0, 0;\n}"      \
        : QWEN1M_F16(c, 0), QWEN1M_F16(c, 16)                                                                         \
        : "r"(a), "r"(b), "r"(kDescriptorHigh), "r"(static_cast<int>(add)));                                          \
  }                                                                                                                   \
  template <>                                                                                                         \
  __device__ inline void multiply_rows<T>(float (&c)[64], const uint32_t (&a)[4], uint32_t b) {                       \
    asm volatile(                                                                                                     \
        "{\n.reg .b64 b;\nmov.b64 b, {%68, %69};\n"                                                                   \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " {" QWEN1M_R64                                  \
        "}, {%64, %65, %66, %67}, b, 1, 1, 1, 1;\n}"                                                                  \
        : QWEN1M_F64(c, 0)                                                                                            \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(kDescriptorHigh));                                  \
  }

QWEN1M_PRODUCTS(bf16, "bf16")
QWEN1M_PRODUCTS(f16, "f16")

// The same of FP8 (E4M3): c[64, 128] (+)= a[64, 32] b[32, 128], both in panels of rows of 128 bytes. Its sums keep some
// 14 bits.
__device__ inline void multiply_bytes(float (&c)[64], uint32_t a, uint32_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %67, 0;\nmov.b64 a, {%64, %66};\nmov.b64 b, {%65, %66};\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" QWEN1M_R64 "}, a, b, p, 1, 1;\n}"
      : QWEN1M_F64(c, 0)
      : "r"(a), "r"(b), "r"(kDescriptorHigh), "r"(static_cast<int>(add)));
}

#undef QWEN1M_PRODUCTS
#undef QWEN1M_R128
#undef QWEN1M_R64
#undef QWEN1M_R32
#undef QWEN1M_R16
#undef QWEN1M_F64
#undef QWEN1M_F16
#undef QWEN1M_F4

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
