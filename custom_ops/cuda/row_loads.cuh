// Rows of queries, keys and values on their way into tiles of shared memory, and where a sequence's keys lie.
#pragma once

#include "mma.cuh"

namespace qwen1m {
namespace cuda {

constexpr int kTileKeys = 64;

// Where the keys of one sequence lie: page_size is a power of two.
struct Pages {
  const int32_t* table;
  int shift;
  int32_t mask;

  __device__ Pages(const int32_t* block_table, int page_size) : table(block_table), mask(page_size - 1) {
    shift = __popc(mask);
  }

  __device__ int32_t page(int32_t position) const { return __ldg(table + (position >> shift)); }

  // Of a position whose page has been looked up.
  __device__ int64_t slot(int32_t page, int32_t position) const {
    return (static_cast<int64_t>(page) << shift) + (position & mask);
  }

  __device__ int64_t slot(int32_t position) const { return slot(page(position), position); }
};

// How kThreads threads of a block share the 16-byte copies of a tile: rows threadIdx.x / kChunks, + kRowsAtOnce, ...
template <int D, int kThreads>
struct TileCopy {
  static constexpr int kChunks = SharedRows<D>::kChunks, kRowsAtOnce = kThreads / kChunks;
  static_assert(kRowsAtOnce % 4 == 0,
                "the permutation of chunks changes in one bit from one row of a thread to the next");

  const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;

  // Where the thread's chunk of row + i lies in shared memory, i a multiple of kRowsAtOnce.
  __device__ uint32_t target(uint32_t tile, int i) const {
    return (SharedRows<D>::address(tile, row, chunk) ^ (i % 8 << 4)) + i * SharedRows<D>::kRowBytes;
  }
};

// A block copies kRows rows to a tile; row r is `stride` values after row r - 1, and rows outside [begin, end) are
// zero.
template <typename T, int D, int kRows, int kThreads>
__device__ inline void load_rows(uint32_t tile, const T* first, int64_t stride, int begin, int end) {
  const TileCopy<D, kThreads> copy;
  constexpr int kRowsAtOnce = copy.kRowsAtOnce;
  const T* source = first + copy.row * stride + copy.chunk * 8;
  if (begin <= 0 && end >= kRows) {
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAtOnce) {
      copy_async(copy.target(tile, i), source);
      source += kRowsAtOnce * stride;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAtOnce) {
      const bool valid = copy.row + i >= begin && copy.row + i < end;
      copy_async_or_zero(copy.target(tile, i), valid ? source : first + begin * stride, valid);
      source += kRowsAtOnce * stride;
    }
  }
}

// The same for the keys of a tile that lie anywhere: row r is number slots[r] of the pool.
template <typename T, int D, int kThreads>
__device__ inline void load_slots(uint32_t tile, const T* pool, int32_t stride, const int32_t* slots) {
  const TileCopy<D, kThreads> copy;
  const char* source = reinterpret_cast<const char*>(pool + copy.chunk * 8);
  const int32_t stride_bytes = stride * static_cast<int32_t>(sizeof(T));
#pragma unroll
  for (int i = 0; i < kTileKeys; i += copy.kRowsAtOnce) {
    copy_async(copy.target(tile, i), source + static_cast<int64_t>(slots[copy.row + i]) * stride_bytes);
  }
}

}  // namespace cuda
}  // namespace qwen1m
