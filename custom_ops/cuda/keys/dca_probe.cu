// The probe: softmax of up to 64 critical query rows over all keys, summed along columns and along diagonals.
//
// A warp scores 32 keys against the 64 rows of one head, keys as the rows of the product, so that a column's sum is
// taken along registers. It walks over a span of keys with a ring of tiles of its own and never waits for other warps.
// Two passes read K: the first finds each row's maximum and sum, the second adds up the weights. A diagonal's sum is
// complete when the last key that it meets has been scored: the second pass begins a little before its span and carries
// the open diagonals in registers, so that all sums are made in one order whatever the grid.
#include <algorithm>

#include "attention.cuh"
#include "keys/probe_sums.cuh"
#include "qwen1m/dca_stages.h"
#include "row_loads.cuh"

namespace qwen1m {
namespace cuda {

namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kWarpKeys = 32;
constexpr int kProbeRing = 2;
constexpr int kHalo = kProbeRows;  // keys before a span that share diagonals with it
constexpr int kKeyTiles8 = kWarpKeys / 8;
constexpr float kGrowth = 8.0f;  // of a running maximum, in log2, before its sum is rescaled

struct ProbeArguments : qwen1m_dca_probe {
  float2* statistic;  // [H, spans, 64]: maximum in units of log2, sum
  float* log_sum;     // [H, 64]: log2 of each row's sum of exp2(scaled scores)
  int32_t span;       // keys of a warp
  int32_t spans;      // warps a head
};

template <int D>
constexpr int probe_shared_bytes() {
  return (kStages * kProbeRows + kWarps * kProbeRing * kWarpKeys) * SharedRows<D>::kRowBytes;
}

// Rows stand at the end of the 64, so that the last row is always row 63; those before the first are zero.
__device__ inline int row_offset(const ProbeArguments& a) { return kProbeRows - a.rows; }

// Scores of 32 keys against 64 rows: lane 4g + p holds keys 16m + g, 16m + g + 8 and rows 8n + 2p, 8n + 2p + 1.
struct ProbeScores {
  float value[kWarpKeys / 16][kRowTiles8][4];

  // `keys` is an operand, `queries` a transposed one.
  template <typename T, int D>
  __device__ void score(uint32_t keys, uint32_t queries) {
#pragma unroll
    for (int m = 0; m < kWarpKeys / 16; ++m) {
#pragma unroll
      for (int n = 0; n < kRowTiles8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) value[m][n][i] = 0;
      }
    }
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t key[kWarpKeys / 16][4];
#pragma unroll
      for (int m = 0; m < kWarpKeys / 16; ++m) load_left(key[m], at<D>(keys, 16 * m, step));
#pragma unroll
      for (int n = 0; n < kRowTiles8 / 2; ++n) {
        uint32_t query[4];
        load_transposed(query, at<D>(queries, 16 * n, step));
#pragma unroll
        for (int m = 0; m < kWarpKeys / 16; ++m) {
          multiply_add<T>(value[m][2 * n], key[m], query[0], query[1]);
          multiply_add<T>(value[m][2 * n + 1], key[m], query[2], query[3]);
        }
      }
    }
  }

  // f(score, half tile of keys h: key 8h + g, tile of rows n, e: row 8n + 2p + e)
  template <typename F>
  __device__ void each(F&& f) {
#pragma unroll
    for (int h = 0; h < kKeyTiles8; ++h) {
#pragma unroll
      for (int n = 0; n < kRowTiles8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) f(value[h / 2][n][2 * (h % 2) + e], h, n, e);
      }
    }
  }

  // Key `first + k` is seen by row a from position `row_position` + a on; keys from `end` on by none.
  __device__ void mask(int32_t first, int32_t end, int32_t row_position, int lane) {
    each([&](float& score, int h, int n, int e) {
      const int32_t key = first + 8 * h + lane / 4;
      if (key >= end || key > row_position + 8 * n + 2 * (lane % 4) + e) score = kNegativeInfinity;
    });
  }
};

// Walks a warp over keys [begin, end), stage by stage; visit(first key, scores) sees the products of each tile.
template <typename T, int D, typename F>
__device__ void walk_keys(const ProbeArguments& a, uint32_t shared, int32_t begin, int32_t end, F&& visit) {
  constexpr int kTileBytes = kWarpKeys * SharedRows<D>::kRowBytes, kChunks = SharedRows<D>::kChunks;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, head = blockIdx.y;
  const uint32_t ring = shared + kStages * kProbeRows * SharedRows<D>::kRowBytes + warp * kProbeRing * kTileBytes;
  const uint32_t rows_place = operand<D>(lane), transposed_place = transposed_operand<D>(lane);
  const int64_t cache_row = static_cast<int64_t>(a.cache.kv_heads) * D;
  const T* pool = static_cast<const T*>(a.cache.key) + static_cast<int64_t>(head / (a.heads / a.cache.kv_heads)) * D;
  const Pages pages(a.block_table, a.cache.page_size);
  const int32_t chunk = stage_keys(kIntra, a.end - 1, a.chunk_len).begin;

  const auto load = [&](int32_t first) {
    if (first < end) {
      const T* keys = pool + pages.slot(first) * cache_row + lane % kChunks * 8;
#pragma unroll
      for (int r = lane / kChunks; r < kWarpKeys; r += kWarp / kChunks) {
        const int readable = min(r, a.end - 1 - first);
        copy_async_or_zero(
            SharedRows<D>::address(ring + (first / kWarpKeys % kProbeRing) * kTileBytes, r, lane % kChunks),
            keys + readable * cache_row, r == readable);
      }
    }
    copy_commit();
  };
  load(begin);
  for (int32_t first = begin; first < end; first += kWarpKeys) {
    load(first + kWarpKeys);
    copy_wait<kProbeRing - 1>();
    __syncwarp();
    const Stage stage = key_stage(first, chunk, a.chunk_len);
    ProbeScores scores;
    scores.score<T, D>(ring + (first / kWarpKeys % kProbeRing) * kTileBytes + rows_place,
                       at<D>(shared + transposed_place, stage * kProbeRows, 0));
    __syncwarp();
    if (first + kWarpKeys > a.end - a.rows) scores.mask(first, a.end, a.end - kProbeRows, lane);
    visit(first, scores);
  }
  copy_wait<0>();
}

// The head's queries, every rotation that this block's keys need.
template <typename T, int D>
__device__ void load_queries(const ProbeArguments& a, uint32_t shared, int32_t begin, int32_t end) {
  for (int stage = kIntra; stage < kStages; ++stage) {
    const Span keys = stage_keys(static_cast<Stage>(stage), a.end - 1, a.chunk_len);
    if (keys.begin >= end || keys.end <= begin) continue;
    const T* q = static_cast<const T*>(a.q) + (static_cast<int64_t>(stage) * a.rows * a.heads + blockIdx.y) * D;
    const int64_t stride = static_cast<int64_t>(a.heads) * D;
    load_rows<T, D, kProbeRows, kThreads>(shared + stage * kProbeRows * SharedRows<D>::kRowBytes,
                                          q - row_offset(a) * stride, stride, row_offset(a), kProbeRows);
  }
  copy_commit();
  copy_wait<0>();
  __syncthreads();
}

// Each row's maximum and sum over the warp's span.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 2) statistics_kernel(const __grid_constant__ ProbeArguments a) {
  extern __shared__ char memory[];
  const uint32_t shared = shared_address(memory);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int32_t block_begin = blockIdx.x * kWarps * a.span, begin = block_begin + warp * a.span;
  load_queries<T, D>(a, shared, block_begin, min(block_begin + kWarps * a.span, a.end));

  const float scale = a.scale * kLog2E;
  float maximum[kRowTiles8][2], sum[kRowTiles8][2];  // of rows 8n + 2p + e over this lane's keys
#pragma unroll
  for (int n = 0; n < kRowTiles8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      maximum[n][e] = kNegativeInfinity;
      sum[n][e] = 0;
    }
  }
  walk_keys<T, D>(a, shared, begin, min(begin + a.span, a.end), [&](int32_t, ProbeScores& scores) {
#pragma unroll
    for (int n = 0; n < kRowTiles8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float top = kNegativeInfinity;
#pragma unroll
        for (int h = 0; h < kKeyTiles8; ++h) top = fmaxf(top, scores.value[h / 2][n][2 * (h % 2) + e]);
        top *= scale;
        // A maximum that lags behind by no more than kGrowth keeps the sum within float32.
        if (top > maximum[n][e] + kGrowth || (maximum[n][e] == kNegativeInfinity && top > kNegativeInfinity)) {
          sum[n][e] *= exp2_fast(maximum[n][e] - top);
          maximum[n][e] = top;
        }
        const float origin = maximum[n][e] == kNegativeInfinity ? 0.0f : maximum[n][e];
#pragma unroll
        for (int h = 0; h < kKeyTiles8; ++h) {
          sum[n][e] += exp2_fast(scores.value[h / 2][n][2 * (h % 2) + e] * scale - origin);
        }
      }
    }
  });
  const int64_t place = (static_cast<int64_t>(blockIdx.y) * a.spans + blockIdx.x * kWarps + warp) * kProbeRows;
#pragma unroll
  for (int n = 0; n < kRowTiles8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float top = maximum[n][e], total = sum[n][e];
#pragma unroll
      for (int mask = 4; mask < kWarp; mask *= 2) {
        const float other = __shfl_xor_sync(kAllLanes, top, mask), other_sum = __shfl_xor_sync(kAllLanes, total, mask);
        const float both = fmaxf(top, other), origin = both == kNegativeInfinity ? 0.0f : both;
        total = total * exp2_fast(top - origin) + other_sum * exp2_fast(other - origin);
        top = both;
      }
      if (lane < 4) a.statistic[place + 8 * n + 2 * lane + e] = make_float2(top, total);
    }
  }
}

// The weights of a span's keys, summed along columns and diagonals.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 2) sums_kernel(const __grid_constant__ ProbeArguments a) {
  extern __shared__ char memory[];
  const uint32_t shared = shared_address(memory);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, head = blockIdx.y;
  const int32_t block_begin = blockIdx.x * kWarps * a.span, begin = block_begin + warp * a.span;
  load_queries<T, D>(a, shared, max(block_begin - kHalo, 0), min(block_begin + kWarps * a.span, a.end));
  if (begin >= a.end) return;

  float log_sum[kRowTiles8][2];
#pragma unroll
  for (int n = 0; n < kRowTiles8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) log_sum[n][e] = a.log_sum[head * kProbeRows + 8 * n + 2 * (lane % 4) + e];
  }
  const float scale = a.scale * kLog2E;
  float* vertical = a.vertical + static_cast<int64_t>(head) * a.end;
  float* slash = a.slash + static_cast<int64_t>(head) * a.end;
  const int32_t span_end = min(begin + a.span, a.end);
  const int p = lane % 4, place = 8 * p + lane / 4;  // of this lane among 32 keys or diagonals
  OpenDiagonals<kWarpKeys> diagonals;
  // Diagonal d of the tile at `first` meets the last row at key first + d - 1.
  const auto write_closed = [&](int32_t first, float closed) {
    const int32_t key = first + place - 1;
    if (first >= begin && key >= 0 && key < a.end) slash[key] = closed;
  };
  walk_keys<T, D>(a, shared, max(begin - kHalo, 0), span_end, [&](int32_t first, ProbeScores& scores) {
    float column[kKeyTiles8] = {}, along[diagonals.kGroups][2] = {};
    scores.each([&](float& score, int h, int n, int e) {
      const float weight = exp2_fast(score * scale - log_sum[n][e]);
      column[h] += weight;
      along[h + kRowTiles8 - n][e] += weight;
    });
    write_closed(first, diagonals.add(along, lane));
#pragma unroll
    for (int h = 0; h < kKeyTiles8; ++h) {
      column[h] += __shfl_xor_sync(kAllLanes, column[h], 1);
      column[h] += __shfl_xor_sync(kAllLanes, column[h], 2);
    }
    if (first >= begin && first + place < a.end) {
      vertical[first + place] = p == 0 ? column[0] : p == 1 ? column[1] : p == 2 ? column[2] : column[3];
    }
  });
  const float none[diagonals.kGroups][2] = {};
  if (span_end == a.end) {
    write_closed((a.end + kWarpKeys - 1) / kWarpKeys * kWarpKeys, diagonals.add(none, lane));
  }
}

constexpr int kMinSpan = 128, kMaxSpan = 2048, kWantedBlocks = 1024;

// Long spans read fewer keys twice; short ones keep every processor busy when there are few keys.
ProbeArguments plan(const qwen1m_dca_probe& probe, void* workspace) {
  ProbeArguments a{probe, nullptr, nullptr, kMaxSpan, 0};
  while (a.span > kMinSpan && ceil_div(a.end, kWarps * a.span) * a.heads < kWantedBlocks) a.span /= 2;
  a.spans = static_cast<int32_t>(ceil_div(a.end, kWarps * a.span)) * kWarps;
  a.statistic = static_cast<float2*>(workspace);
  a.log_sum = reinterpret_cast<float*>(a.statistic + static_cast<int64_t>(a.heads) * a.spans * kProbeRows);
  return a;
}

}  // namespace

template <typename T, int D>
int dca_probe(const qwen1m_dca_probe& probe, void* workspace, qwen1m_stream stream) {
  const ProbeArguments a = plan(probe, workspace);
  constexpr int kBytes = probe_shared_bytes<D>();
  const auto statistics = statistics_kernel<T, D>;
  const auto sums = sums_kernel<T, D>;
  for (const auto kernel : {statistics, sums}) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (status != cudaSuccess) return status;
  }
  const dim3 grid(a.spans / kWarps, a.heads);
  statistics<<<grid, kThreads, kBytes, as_stream(stream)>>>(a);
  merge_statistics_kernel<<<a.heads, kMergeThreads, 0, as_stream(stream)>>>(a.statistic, a.log_sum, a.spans, a.rows);
  sums<<<grid, kThreads, kBytes, as_stream(stream)>>>(a);
  return cudaGetLastError();
}

int64_t dca_probe_workspace(const qwen1m_dca_probe& probe) {
  const ProbeArguments a = plan(probe, nullptr);
  return static_cast<int64_t>(a.heads) * kProbeRows * (a.spans * sizeof(float2) + sizeof(float));
}

QWEN1M_INSTANTIATE(dca_probe, (const qwen1m_dca_probe&, void*, qwen1m_stream));

}  // namespace cuda
}  // namespace qwen1m
