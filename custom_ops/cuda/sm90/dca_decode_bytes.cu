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
  sm80::ByteRows<T, Number, false> state;
  state.start();
  sm80::attend_tiles(state, a, share, q, ring, own_ring, waiting);
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
