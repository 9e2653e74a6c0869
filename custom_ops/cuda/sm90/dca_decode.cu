// Decode of few keys over a 16-bit cache: see decode_cluster.cuh.
//
//   tiles    64 keys; each warp scores and attends to 16 of them with the query heads as the rows of its tile
//   loads    the first tiles come while the launch before, which makes the queries and the newest key, still runs
//   ring     two tiles: the launch behind may begin at once, and finds the memory that its loads pass through
#include "attention.cuh"
#include "decode_cluster.cuh"
#include "qwen1m/dca_stages.h"
#include "sm80/decode_rows.cuh"

namespace qwen1m {
namespace cuda {
namespace sm90 {

namespace {

constexpr int kBlocks = 2;  // of a processor
constexpr int kRing = 2;
constexpr int kRowBytes = SharedRows<kDim>::kRowBytes, kTileBytes = kTileKeys * kRowBytes;

struct SharedPlan {
  char queries[kStages][kMostRows * kRowBytes];
  char ring[kRing][2][kTileBytes];  // keys, values
  Inbox inbox;                      // behind what the warps leave at the start
};
static_assert(WarpResult::kBytes <= offsetof(SharedPlan, inbox));

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) decode_kernel(const __grid_constant__ qwen1m_dca_decode a) {
  extern __shared__ char shared[];
  SharedPlan& plan = *reinterpret_cast<SharedPlan*>(shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const EarlyPages pages(a);
  const ClusterShare share(a);
  plan.inbox.open();
  const int64_t cache_row = static_cast<int64_t>(a.cache.kv_heads) * kDim;
  const T* keys = static_cast<const T*>(a.cache.key) + share.kv_head * kDim;
  const T* values = static_cast<const T*>(a.cache.value) + share.kv_head * kDim;

  // A tile lies in one page and in one stage: both hold a multiple of its keys.
  const uint32_t ring = shared_address(plan.ring);
  int32_t page = share.first < share.last ? pages.page(share.first * kTileKeys) : 0;
  int ahead = share.first, fill = 0;
  const auto load_before = [&](int end) {
    for (; ahead < end; ++ahead) {
      const int count = share.length - ahead * kTileKeys;
      const int64_t offset = pages.slot(page, ahead * kTileKeys) * cache_row;
      const uint32_t place = ring + fill * 2 * kTileBytes;
      load_rows<T, kDim, kTileKeys, kThreads>(place, keys + offset, cache_row, 0, count);
      load_rows<T, kDim, kTileKeys, kThreads>(place + kTileBytes, values + offset, cache_row, 0, count);
      copy_commit();
      if (ahead + 1 < share.last) page = pages.page((ahead + 1) * kTileKeys);
      fill = fill == kRing - 1 ? 0 : fill + 1;
    }
  };
  load_before(min(share.first + kRing, share.settled));
  await_previous();
  admit_next();

  // Queries go by way of registers, so that they and the tiles do not wait for each other.
  constexpr int kChunks = SharedRows<kDim>::kChunks;
  static_assert(kMostRows * kChunks == kThreads, "a chunk a thread");
  const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const T* q = static_cast<const T*>(a.q) + (share.line(a) + row) * kDim + chunk * kPack;
  const int64_t variant = static_cast<int64_t>(a.batch) * a.heads * kDim;
  const Stage latest = share.length > 2 * a.chunk_len ? kInter : share.length > a.chunk_len ? kSucc : kIntra;
  uint4 queries[kStages] = {};
#pragma unroll
  for (int stage = kIntra; stage <= kInter; ++stage) {
    if (row < share.rows && stage <= latest) queries[stage] = *reinterpret_cast<const uint4*>(q + stage * variant);
  }
  load_before(min(share.first + kRing, share.last));
  for (int i = share.last; i < share.first + kRing; ++i) copy_commit();
#pragma unroll
  for (int stage = kIntra; stage <= kInter; ++stage) {
    *reinterpret_cast<uint4*>(plan.queries[stage] + SharedRows<kDim>::address(0, row, chunk)) = queries[stage];
  }

  const float scale = a.scale[share.sequence] * kLog2E;
  const uint32_t rows_place = operand<kDim>(lane), transposed_place = transposed_operand<kDim>(lane);
  // The lower half of a tile's rows is the upper one once more.
  const uint32_t query_place = SharedRows<kDim>::address(shared_address(plan.queries), lane % 8, lane / 16);
  sm80::DecodeRows<T, kDim> state;
  state.start();
  Stage current = kStages;
  int use = 0;
  const int32_t chunk_begin = (share.length - 1) / a.chunk_len * a.chunk_len;
  for (int tile = share.first; tile < share.last; ++tile) {
    if (tile == share.first) {  // the whole ring is under way
      copy_wait<kRing - 1>();
    } else {
      copy_wait<kRing - 2>();
    }
    __syncthreads();
    if (tile > share.first) load_before(min(tile + kRing, share.last));
    const int32_t key = tile * kTileKeys;
    const Stage stage = key_stage(key, chunk_begin, a.chunk_len);
    if (stage != current) {
      current = stage;
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) {
        load_left(state.query[step], at<kDim>(query_place, stage * kMostRows, step));
      }
    }
    const uint32_t place = at<kDim>(ring + use * 2 * kTileBytes, 16 * warp, 0);
    state.attend(place + transposed_place, place + kTileBytes + rows_place, 16 * warp, share.length - key, scale, lane);
    use = use == kRing - 1 ? 0 : use + 1;
  }
  copy_wait<0>();
  __syncthreads();

  const WarpResult result(shared, warp);
  result.keep_statistic(lane / 4, lane, state.maximum[0], state.sum[0]);
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    *reinterpret_cast<float2*>(result.row(lane / 4) + 8 * n + 2 * (lane % 4)) =
        make_float2(state.out[n][0], state.out[n][1]);
  }
  finish_in_cluster<T>(a, share, shared, plan.inbox);
}

}  // namespace

bool takes_decode(const qwen1m_dca_decode& a) { return fits_clusters(a, decode_kernel<bf16>, sizeof(SharedPlan)); }

template <typename T>
int dca_decode(const qwen1m_dca_decode& a, qwen1m_stream stream) {
  return launch_clusters(a, decode_kernel<T>, sizeof(SharedPlan), stream);
}

template int dca_decode<bf16>(const qwen1m_dca_decode&, qwen1m_stream);
template int dca_decode<f16>(const qwen1m_dca_decode&, qwen1m_stream);

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
