// Decode of few keys: the blocks of a cluster share out a sequence's keys for one KV head, and each row of the output
// is merged by one of them, to which all send what they made of it. Nothing goes through global memory.
#pragma once

#include "clusters.cuh"
#include "hopper.cuh"
#include "overlap.cuh"
#include "qwen1m/attention.h"
#include "sm80/decode_shares.cuh"

namespace qwen1m {
namespace cuda {
namespace sm90 {
namespace {

constexpr int kDim = 128;
constexpr int kClusterBlocks = 16;  // twice what every device takes
constexpr int kMostRows = 8;        // query heads of a KV head
constexpr int kMostKeys = 8192;     // the longest table: more keys are read sooner by all of the device's blocks

using sm80::kThreads;
using sm80::kWarps;
using WarpResult = sm80::WarpResult<kDim>;
static_assert(kDim == kThreads && kMostRows <= kClusterBlocks, "a block merges a row, a thread a value of it");

// What a block takes: tiles [first, last) of a sequence's keys for the query heads of one KV head.
struct ClusterShare {
  int sequence, kv_head, rank, rows, length, first, last;
  int settled;  // up to here no tile holds the newest key, which the launch before writes
  int count;    // blocks that have keys, or the one that says that there are none

  __device__ explicit ClusterShare(const qwen1m_dca_decode& a)
      : sequence(blockIdx.z), kv_head(blockIdx.y), rank(blockIdx.x), rows(a.heads / a.cache.kv_heads) {
    length = a.lengths[sequence];
    const int tiles = (length + kTileKeys - 1) / kTileKeys;
    const int size = max((tiles + kClusterBlocks - 1) / kClusterBlocks, 1);
    first = min(rank * size, tiles);
    last = min(first + size, tiles);
    count = max((tiles + size - 1) / size, 1);
    settled = last == tiles ? max(last - 1, first) : last;
  }

  // The first of its rows, among those of the whole batch.
  __device__ int64_t line(const qwen1m_dca_decode& a) const {
    return static_cast<int64_t>(sequence) * a.heads + kv_head * rows;
  }
};

// The first pages of a sequence's table, an entry a lane, come while its length does.
struct EarlyPages : Pages {
  int32_t early;

  __device__ EarlyPages(const qwen1m_dca_decode& a)
      : Pages(a.block_tables + static_cast<int64_t>(blockIdx.z) * a.table_width, a.cache.page_size),
        early(__ldg(table + min(static_cast<int>(threadIdx.x) % kWarp, a.table_width - 1))) {}

  // Called by whole warps.
  __device__ int32_t page(int32_t position) const {
    const int number = position >> shift;
    return number < kWarp ? __shfl_sync(kAllLanes, early, number) : __ldg(table + number);
  }
};

// ---- what blocks of a cluster have to do with each other ----

// A write to another block's shared memory, whose bytes count for the barrier there.
__device__ inline void send(uint32_t to, uint32_t barrier, float4 v) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(to),
               "r"(barrier), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}

__device__ inline void send(uint32_t to, uint32_t barrier, float2 v) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%2, %3}, [%1];" ::"r"(to),
               "r"(barrier), "f"(v.x), "f"(v.y)
               : "memory");
}

// Waits for the first phase of a barrier of this block, and sees what came with it from others.
__device__ inline void await_sent(uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}" ::"r"(barrier)
      : "memory");
}

// What a block is sent: of the row that has its rank the result of each block, in the shares' order.
struct Inbox {
  float values[kClusterBlocks][kDim];  // not normalised
  float2 statistics[kClusterBlocks];   // maximum in units of log2, sum
  uint64_t barrier;

  static constexpr int kResultBytes = kDim * sizeof(float) + sizeof(float2);

  // Blocks may send to each other once all have opened theirs and cluster_wait() has returned.
  __device__ void open() {
    if (threadIdx.x == 0) {
      barrier_init(shared_address(&barrier), 1);
      barrier_init_fence();
    }
    __syncwarp();
    cluster_arrive();
  }

  // One thread says what is to come, some of which may be there already.
  __device__ void expect(const ClusterShare& share) {
    barrier_arrive_expecting(shared_address(&barrier), share.count * kResultBytes);
  }

  // Sends a row's result, four values a lane.
  __device__ void send_row(const ClusterShare& share, int row, int lane, float4 out, float2 statistic) {
    const uint32_t at = in_block(shared_address(&barrier), row);
    send(in_block(shared_address(&values[share.rank][4 * lane]), row), at, out);
    if (lane == 0) send(in_block(shared_address(&statistics[share.rank]), row), at, statistic);
  }

  // This thread's value of the block's row, of all results.
  __device__ float merged(const ClusterShare& share) const {
    await_sent(shared_address(&barrier));
    float2 statistic[kClusterBlocks];
    float value[kClusterBlocks], top = kNegativeInfinity, total = 0, out = 0;
#pragma unroll
    for (int i = 0; i < kClusterBlocks; ++i) {
      const bool there = i < share.count;
      statistic[i] = there ? statistics[i] : make_float2(kNegativeInfinity, 0);
      value[i] = there ? values[i][threadIdx.x] : 0.0f;
      top = fmaxf(top, statistic[i].x);
    }
    const float origin = top == kNegativeInfinity ? 0.0f : top;
#pragma unroll
    for (int i = 0; i < kClusterBlocks; ++i) {
      const float weight = exp2_fast(statistic[i].x - origin);
      total += statistic[i].y * weight;
      out += value[i] * weight;
    }
    return total > 0 ? out / total : 0.0f;
  }
};

// The warps' results become the block's, and those of the cluster's blocks the output.
template <typename T>
__device__ void finish_in_cluster(const qwen1m_dca_decode& a, const ClusterShare& share, char* shared, Inbox& inbox) {
  const int lane = threadIdx.x % kWarp;
  __syncthreads();
  if (threadIdx.x == 0) inbox.expect(share);
  __syncwarp();
  cluster_wait();
  if (share.rank < share.count) {
    for (int row = threadIdx.x / kWarp; row < share.rows; row += kWarps) {
      float2 statistic[kWarps];
      float4 value[kWarps], out = make_float4(0, 0, 0, 0);
      float top = kNegativeInfinity, total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const WarpResult of_warp(shared, w);
        statistic[w] = of_warp.statistics[row];
        value[w] = reinterpret_cast<const float4*>(of_warp.row(row))[lane];
        top = fmaxf(top, statistic[w].x);
      }
      const float origin = top == kNegativeInfinity ? 0.0f : top;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float weight = exp2_fast(statistic[w].x - origin);
        total += statistic[w].y * weight;
        out.x += value[w].x * weight;
        out.y += value[w].y * weight;
        out.z += value[w].z * weight;
        out.w += value[w].w * weight;
      }
      inbox.send_row(share, row, lane, out, make_float2(top, total));
    }
  }
  if (share.rank < share.rows) {
    static_cast<T*>(a.out)[(share.line(a) + share.rank) * kDim + threadIdx.x] = narrow<T>(inbox.merged(share));
  }
}

template <typename Kernel>
int allow_clusters(Kernel kernel, int shared_bytes) {
  const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  return error ? error : cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

// Whether the tables are short, and the clusters of all sequences and KV heads run at once.
template <typename Kernel>
bool fits_clusters(const qwen1m_dca_decode& a, Kernel kernel, int shared_bytes) {
  if (a.heads / a.cache.kv_heads > kMostRows || static_cast<int64_t>(a.table_width) * a.cache.page_size > kMostKeys ||
      allow_clusters(kernel, shared_bytes) != cudaSuccess) {
    return false;
  }
  cudaLaunchAttribute cluster = clusters_of(kClusterBlocks);
  cudaLaunchConfig_t launch{};
  launch.gridDim = kClusterBlocks;
  launch.blockDim = kThreads;
  launch.dynamicSmemBytes = shared_bytes;
  launch.attrs = &cluster;
  launch.numAttrs = 1;
  int clusters = 0;
  return cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch) == cudaSuccess &&
         static_cast<int64_t>(a.batch) * a.cache.kv_heads <= clusters;
}

template <typename Kernel>
int launch_clusters(const qwen1m_dca_decode& a, Kernel kernel, int shared_bytes, qwen1m_stream stream) {
  if (const int error = allow_clusters(kernel, shared_bytes)) return error;
  const dim3 grid(kClusterBlocks, static_cast<unsigned>(a.cache.kv_heads), static_cast<unsigned>(a.batch));
  return launch_overlapping_clusters(kernel, kClusterBlocks, grid, kThreads, shared_bytes, as_stream(stream), a);
}

}  // namespace
}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
