// Decode of few keys over an 8-bit cache: see decode_cluster.cuh and byte_rows.cuh.
#include "attention.cuh"
#include "decode_cluster.cuh"
#include "qwen1m/dca_stages.h"
#include "sm80/byte_rows.cuh"

namespace qwen1m {
namespace cuda {
namespace sm90 {

namespace {

using sm80::kPartBytes;
using sm80::kRing;
using sm80::kWarpKeys;
constexpr int kBlocks = 3;  // of a processor

struct SharedPlan {
  char rings[kWarps][kRing][2][kPartBytes];  // keys, values
  Inbox inbox;                               // behind what the warps leave at the start
};
static_assert(WarpResult::kBytes <= offsetof(SharedPlan, inbox));

template <typename T, typename Number>
__global__ void __launch_bounds__(kThreads, kBlocks) decode_bytes_kernel(const __grid_constant__ qwen1m_dca_decode a) {
  extern __shared__ char shared[];
  SharedPlan& plan = *reinterpret_cast<SharedPlan*>(shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const EarlyPages pages(a);
  const ClusterShare share(a);
  plan.inbox.open();
  const uint32_t own_ring = shared_address(plan.rings[warp]);
  sm80::ByteRing<Number, EarlyPages> ring(a.cache, pages, share.kv_head, own_ring, share.first, share.last);

  // The newest key, and q, are what the launch before writes.
  f16 waiting[kRing - 1];  // scales of the tiles that are under way
#pragma unroll
  for (int i = 0; i < kRing - 1; ++i) {
    if (share.first + i < share.settled) waiting[i] = ring.load(share.first + i);
  }
  await_previous();
  admit_next();
#pragma unroll
  for (int i = 0; i < kRing - 1; ++i) {
    if (share.first + i >= share.settled) waiting[i] = ring.load(share.first + i);
  }

  const T* q = static_cast<const T*>(a.q) + share.line(a) * kDim;
  const int64_t variant = static_cast<int64_t>(a.batch) * a.heads * kDim;
  const float* power = a.cache.frame.power + share.kv_head * kDim;
  const float* centre = a.cache.frame.centre + share.kv_head * kDim;
  const float scale = a.scale[share.sequence] * kLog2E;

  sm80::ByteRows<T, Number, false> state;
  state.start();
  Stage current = kStages;
  int use = 0;
  const int32_t chunk = (share.length - 1) / a.chunk_len * a.chunk_len;
  for (int tile = share.first; tile < share.last; ++tile) {
    const int32_t key = tile * kTileKeys;
    const Stage stage = key >= chunk ? kIntra : key >= chunk - a.chunk_len ? kSucc : kInter;
    if (stage != current) {
      current = stage;
      state.set_query(q + stage * variant, share.rows, power, centre, scale, lane);
    }
    copy_wait<kRing - 2>();
    __syncwarp();
    const uint32_t part = own_ring + use * 2 * kPartBytes;
    const f16 own = waiting[0];
#pragma unroll
    for (int i = 0; i + 1 < kRing - 1; ++i) waiting[i] = waiting[i + 1];
    waiting[kRing - 2] = ring.load(tile + kRing - 1);
    const int count = share.length - key - warp * kWarpKeys;
    if (count > 0) state.attend(part, part + kPartBytes, count, widen(own), lane);
    use = use == kRing - 1 ? 0 : use + 1;
  }
  copy_wait<0>();
  __syncthreads();

  state.finish(WarpResult(shared, warp), lane);
  finish_in_cluster<T>(a, share, shared, plan.inbox);
}

}  // namespace

bool takes_decode_bytes(const qwen1m_dca_decode& a) {
  return fits_clusters(a, decode_bytes_kernel<bf16, int8_t>, sizeof(SharedPlan));
}

template <typename T>
int dca_decode_bytes(const qwen1m_dca_decode& a, qwen1m_stream stream) {
  return with_number(a.cache.dtype, [&](auto number) -> int {
    return launch_clusters(a, decode_bytes_kernel<T, decltype(number)>, sizeof(SharedPlan), stream);
  });
}

template int dca_decode_bytes<bf16>(const qwen1m_dca_decode&, qwen1m_stream);
template int dca_decode_bytes<f16>(const qwen1m_dca_decode&, qwen1m_stream);

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
