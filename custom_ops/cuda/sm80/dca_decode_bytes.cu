// Decode over an 8-bit cache, int8 or E4M3: one query a sequence against all of its keys, split over the keys as in
// dca_decode.cu.
#include "attention.cuh"
#include "byte_rows.cuh"
#include "decode_shares.cuh"
#include "overlap.cuh"
#include "qwen1m/dca_stages.h"
#include "row_loads.cuh"

namespace qwen1m {
namespace cuda {
namespace sm80 {

namespace {

constexpr int kSharedBytes = kRingBytes > WarpResult<kDim>::kBytes ? kRingBytes : WarpResult<kDim>::kBytes;

template <typename T, typename Number, bool kUpper>
__global__ void __launch_bounds__(kThreads, kUpper ? kBlocksPerProcessor : kMostBlocksPerProcessor)
    decode_bytes_kernel(const __grid_constant__ DecodeArguments a) {
  extern __shared__ char shared[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Share share(a);
  if (share.is_empty()) {
    await_previous();
    return;
  }
  const Pages pages(a.block_tables + static_cast<int64_t>(share.sequence) * a.table_width, a.cache.page_size);
  const uint32_t own_ring = shared_address(shared) + warp * kRing * 2 * kPartBytes;
  ByteRing<Number, Pages> ring(a.cache, pages, share.kv_head, own_ring, share.first, share.last);

  // The newest key, and q, are what the launch before writes.
  if (share.has_newest()) await_previous();
  f16 waiting[kRing - 1];  // scales of the tiles that are under way
#pragma unroll
  for (int i = 0; i < kRing - 1; ++i) waiting[i] = ring.load(share.first + i);
  if (!share.has_newest()) await_previous();

  const T* q = static_cast<const T*>(a.q) + (static_cast<int64_t>(share.sequence) * a.heads + share.first_head) * kDim;
  ByteRows<T, Number, kUpper> state;
  state.start();
  attend_tiles(state, a, share, q, ring, own_ring, waiting);
  state.finish(WarpResult<kDim>(shared, warp), lane);
  finish_share<T, kDim>(a, share, shared);
}

}  // namespace

template <typename T>
int dca_decode_bytes(const qwen1m_dca_decode& decode, void* workspace, qwen1m_stream stream) {
  const DecodeArguments a = decode_arguments(decode, workspace);
  const bool upper = a.heads / a.cache.kv_heads > kGroupRows / 2;
  return with_number(a.cache.dtype, [&](auto number) -> int {
    using Number = decltype(number);
    const auto kernel = upper ? decode_bytes_kernel<T, Number, true> : decode_bytes_kernel<T, Number, false>;
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (status != cudaSuccess) return status;
    return launch_overlapping(kernel, decode_grid(a), kThreads, kSharedBytes, as_stream(stream), a);
  });
}

template int dca_decode_bytes<bf16>(const qwen1m_dca_decode&, void*, qwen1m_stream);
template int dca_decode_bytes<f16>(const qwen1m_dca_decode&, void*, qwen1m_stream);

}  // namespace sm80
}  // namespace cuda
}  // namespace qwen1m
