// Decode: one query a sequence against all of its keys, split over the keys.
//
// A block takes a share of one sequence's keys for one KV head: tiles of 64 keys, of which each warp scores and attends
// to 16 with the query heads of the group as the rows of its tile. Every warp keeps a softmax of its own; they are
// merged at the end of the block, and the blocks' shares by the last blocks of a KV head to end. The time is that of
// reading K and V once: a ring of halves of tiles keeps the reads under way, the first of them already while the launch
// before, which makes the queries and the newest key, still runs. The grid does not depend on the lengths, which stay
// on the device.
#include "attention.cuh"
#include "decode_rows.cuh"
#include "decode_shares.cuh"
#include "overlap.cuh"
#include "qwen1m/dca_stages.h"
#include "row_loads.cuh"

namespace qwen1m {
namespace cuda {
namespace sm80 {

namespace {

constexpr int kDecodeRing = 5;  // keys or values of a tile

template <int D>
constexpr int decode_shared_bytes() {
  return (kStages * kGroupRows + kDecodeRing * kTileKeys) * SharedRows<D>::kRowBytes;
}

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    decode_kernel(const __grid_constant__ DecodeArguments a) {
  constexpr int kTileBytes = kTileKeys * SharedRows<D>::kRowBytes;
  extern __shared__ char shared[];
  const uint32_t queries = shared_address(shared);
  const uint32_t ring = queries + kStages * kGroupRows * SharedRows<D>::kRowBytes;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t rows_place = operand<D>(lane), transposed_place = transposed_operand<D>(lane);
  const Share share(a);
  const int sequence = share.sequence, first_head = share.first_head, rows = share.rows;
  const int length = share.length, first = share.first, last = share.last;
  if (share.is_empty()) {
    await_previous();
    return;
  }
  const float scale = a.scale[sequence] * kLog2E;
  const Pages pages(a.block_tables + static_cast<int64_t>(sequence) * a.table_width, a.cache.page_size);
  const int64_t cache_row = static_cast<int64_t>(a.cache.kv_heads) * D;
  const T* keys = static_cast<const T*>(a.cache.key) + static_cast<int64_t>(share.kv_head) * D;
  const T* values = static_cast<const T*>(a.cache.value) + static_cast<int64_t>(share.kv_head) * D;

  // A tile lies in one page and in one stage: both hold a multiple of its keys. Its keys are loaded, then its values.
  int64_t slot = first < last ? pages.slot(first * kTileKeys) : 0;
  int fill = 0;
  const auto load = [&](int half) {
    const int tile = first + half / 2;
    if (tile < last) {
      const T* rows = (half % 2 == 0 ? keys : values) + slot * cache_row;
      load_rows<T, D, kTileKeys, kThreads>(ring + fill * kTileBytes, rows, cache_row, 0, length - tile * kTileKeys);
      if (half % 2 != 0 && tile + 1 < last) slot = pages.slot((tile + 1) * kTileKeys);
    }
    fill = fill == kDecodeRing - 1 ? 0 : fill + 1;
  };

  // The newest key, and q, are what the launch before writes.
  const bool has_newest = share.has_newest();
  if (has_newest) await_previous();
#pragma unroll
  for (int i = 0; i < kDecodeRing - 1; ++i) load(i);
  if (!has_newest) await_previous();
  const T* q = static_cast<const T*>(a.q) + (static_cast<int64_t>(sequence) * a.heads + first_head) * D;
  const int64_t variant = static_cast<int64_t>(a.batch) * a.heads * D;
  const Stage latest = length > 2 * a.chunk_len ? kInter : length > a.chunk_len ? kSucc : kIntra;
  for (int stage = kIntra; stage <= latest; ++stage) {
    load_rows<T, D, kGroupRows, kThreads>(queries + stage * kGroupRows * SharedRows<D>::kRowBytes, q + stage * variant,
                                          D, 0, rows);
  }
  copy_commit();
  load(kDecodeRing - 1);
  copy_commit();

  DecodeRows<T, D> state;
  state.start();
  Stage current = kStages;
  int half = 0, use = 0;
  // Where the warp's keys of the next half are, once they are there.
  const auto await_half = [&] {
    if (half == 0) {  // the whole ring is under way, all but its end in one group
      copy_wait<1>();
    } else {
      copy_wait<kDecodeRing - 2>();
    }
    __syncthreads();
    if (half > 0) {
      load(half + kDecodeRing - 1);
      copy_commit();
    }
    ++half;
    const uint32_t place = at<D>(ring + use * kTileBytes, 16 * warp, 0);
    use = use == kDecodeRing - 1 ? 0 : use + 1;
    return place;
  };
  const int32_t chunk = (length - 1) / a.chunk_len * a.chunk_len;
  for (int tile = first; tile < last; ++tile) {
    const uint32_t key_place = await_half() + transposed_place;
    const int32_t key = tile * kTileKeys;
    const Stage stage = key_stage(key, chunk, a.chunk_len);
    if (stage != current) {
      current = stage;
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        load_left(state.query[step], at<D>(queries + rows_place, stage * kGroupRows, step));
      }
    }
    state.score(key_place, 16 * warp, length - key, scale, lane);
    state.add(await_half() + rows_place);
  }
  copy_wait<0>();
  __syncthreads();

  WarpResult<D> result(shared, warp);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = 8 * h + lane / 4;
    result.keep_statistic(row, lane, state.maximum[h], state.sum[h]);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const float2 pair = make_float2(state.out[n][2 * h], state.out[n][2 * h + 1]);
      *reinterpret_cast<float2*>(result.row(row) + 8 * n + 2 * (lane % 4)) = pair;
    }
  }
  finish_share<T, D>(a, share, shared);
}

}  // namespace

template <typename T, int D>
int dca_decode(const qwen1m_dca_decode& decode, void* workspace, qwen1m_stream stream) {
  const DecodeArguments a = decode_arguments(decode, workspace);
  const auto kernel = decode_kernel<T, D>;
  constexpr int kBytes = decode_shared_bytes<D>();
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  return launch_overlapping(kernel, decode_grid(a), kThreads, kBytes, as_stream(stream), a);
}

QWEN1M_INSTANTIATE(dca_decode, (const qwen1m_dca_decode&, void*, qwen1m_stream));

}  // namespace sm80
}  // namespace cuda
}  // namespace qwen1m

int64_t qwen1m_cuda_dca_decode_workspace(const qwen1m_dca_decode* a) {
  return qwen1m::cuda::sm80::decode_workspace(*a);
}
