// Decode: one query a sequence against all of its keys, split over the keys.
//
// A block takes a share of one sequence's keys for one KV head: tiles of 64 keys, of which each warp scores and attends
// to 16 with the query heads of the group as the rows of its tile. Every warp keeps a softmax of its own; they are
// merged at the end of the block, and the blocks' shares by the last block of a KV head to end. The time is that of
// reading K and V once: a ring of tiles keeps the reads under way, the first of them already while the launch before,
// which makes the queries and the newest key, still runs. The grid does not depend on the lengths, which stay on the
// device.
#include <algorithm>

#include "attention.cuh"
#include "block_scan.cuh"
#include "overlap.cuh"
#include "qwen1m/dca_stages.h"
#include "row_loads.cuh"
#include "vectors.cuh"

namespace qwen1m {
namespace cuda {
namespace sm80 {

namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kGroupRows = 16;  // query heads of one KV head that share a block
constexpr int kDecodeRing = 3;
constexpr int kBlocksPerProcessor = 2;
constexpr int kFewestTiles = 4;    // of a share
constexpr int kMergedAtOnce = 16;  // shares whose values a warp reads together

// How many shares of a (sequence, part of a KV head's group) are done: 0 between launches. There are fewer of these
// than a device has processors wherever there are shares to merge. Launches of one device follow each other, as those
// of one stream do.
constexpr int kMostMerged = 1024;
__device__ int32_t shares_done[kMostMerged];

struct DecodeArguments : qwen1m_dca_decode {
  float* partial;     // [B, H, splits, D], not normalised
  float2* statistic;  // [B, H, splits]: maximum in units of log2, sum
  int32_t splits;
};

template <int D>
constexpr int decode_shared_bytes() {
  return (kStages * kGroupRows + kDecodeRing * 2 * kTileKeys) * SharedRows<D>::kRowBytes;
}

// The running softmax of one warp: 16 query rows, 16 keys a tile.
template <typename T, int D>
struct DecodeRows {
  uint32_t query[D / 16][4];
  float out[D / 8][4];
  float maximum[2], sum[2];

  __device__ void start() {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0;
    }
    maximum[0] = maximum[1] = kNegativeInfinity;
    sum[0] = sum[1] = 0;
  }

  // The warp's keys, a transposed operand, and values, an operand, are rows [row, row + 16) of a tile of `count` keys.
  __device__ void attend(uint32_t keys, uint32_t values, int row, int count, float scale, int lane) {
    float scores[2][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t b[4];
      load_transposed(b, at<D>(keys, 0, step));
      multiply_add<T>(scores[0], query[step], b[0], b[1]);
      multiply_add<T>(scores[1], query[step], b[2], b[3]);
    }
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = maximum[h];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[i / 2][2 * h + i % 2];
        score = row + 8 * (i / 2) + 2 * (lane % 4) + i % 2 < count ? score * scale : kNegativeInfinity;
        top = fmaxf(top, score);
      }
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float origin = top == kNegativeInfinity ? 0.0f : top;
      shrink[h] = exp2_fast(maximum[h] - origin);
      maximum[h] = top;
      float total = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[i / 2][2 * h + i % 2];
        score = exp2_fast(score - origin);
        total += score;
      }
      sum[h] = sum[h] * shrink[h] + total;
    }
    const uint32_t weights[4] = {pack_pair<T>(scores[0][0], scores[0][1]), pack_pair<T>(scores[0][2], scores[0][3]),
                                 pack_pair<T>(scores[1][0], scores[1][1]), pack_pair<T>(scores[1][2], scores[1][3])};
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      load_right(b, at<D>(values, 0, n));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[2 * n][i] *= shrink[i / 2];
        out[2 * n + 1][i] *= shrink[i / 2];
      }
      multiply_add<T>(out[2 * n], weights, b[0], b[1]);
      multiply_add<T>(out[2 * n + 1], weights, b[2], b[3]);
    }
  }
};

// Adds one and returns what was there. What this block wrote becomes visible to who adds later, and the other way
// round.
__device__ inline int32_t add_and_synchronize(int32_t* to) {
  int32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(to) : "memory");
  return before;
}

// Merges what `count` shares made of a block's rows, the first of them `line` of [B, H]: a warp a row.
template <typename T, int D>
__device__ void merge_rows(const DecodeArguments& a, int64_t line, int rows, int count) {
  constexpr int kEach = D / kWarp;
  const int lane = threadIdx.x % kWarp;
  for (int row = threadIdx.x / kWarp; row < rows; row += kWarps) {
    const int64_t place = (line + row) * a.splits;
    float top = kNegativeInfinity, total = 0, out[kEach] = {};
    for (int first = 0; first < count; first += kMergedAtOnce) {
      Vector<float, kEach> values[kMergedAtOnce];
#pragma unroll
      for (int i = 0; i < kMergedAtOnce; ++i) {
        values[i] = load_vector<kEach>(a.partial + (place + min(first + i, count - 1)) * D + lane * kEach);
      }
      const bool valid = lane < kMergedAtOnce && first + lane < count;
      const float2 own = valid ? a.statistic[place + first + lane] : make_float2(kNegativeInfinity, 0);
      const float higher = fmaxf(top, warp_largest(own.x)), origin = higher == kNegativeInfinity ? 0.0f : higher;
      const float shrink = exp2_fast(top - origin), weight = exp2_fast(own.x - origin);
      total = total * shrink + warp_sum(own.y * weight);
#pragma unroll
      for (float& value : out) value *= shrink;
#pragma unroll
      for (int i = 0; i < kMergedAtOnce; ++i) {
        const float share_weight = __shfl_sync(kAllLanes, weight, i);
#pragma unroll
        for (int n = 0; n < kEach; ++n) out[n] += values[i].values[n] * share_weight;
      }
      top = higher;
    }
    const float inverse = total > 0 ? 1.0f / total : 0.0f;
#pragma unroll
    for (float& value : out) value *= inverse;
    store_narrowed(out, static_cast<T*>(a.out) + (line + row) * D + lane * kEach);
  }
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
  const int split = blockIdx.x, sequence = blockIdx.z;
  const int group = a.heads / a.cache.kv_heads, parts = (group + kGroupRows - 1) / kGroupRows;
  const int kv_head = blockIdx.y / parts, first_head = kv_head * group + blockIdx.y % parts * kGroupRows;
  const int rows = min(kGroupRows, (kv_head + 1) * group - first_head);

  const int32_t length = a.lengths[sequence];
  const int tiles = (length + kTileKeys - 1) / kTileKeys, share = max((tiles + a.splits - 1) / a.splits, kFewestTiles);
  const int first = split * share, last = min(first + share, tiles), shares = max((tiles + share - 1) / share, 1);
  if (split >= shares) {
    await_previous();
    return;
  }
  const float scale = a.scale[sequence] * kLog2E;
  const Pages pages(a.block_tables + static_cast<int64_t>(sequence) * a.table_width, a.cache.page_size);
  const int64_t cache_row = static_cast<int64_t>(a.cache.kv_heads) * D;
  const T* keys = static_cast<const T*>(a.cache.key) + static_cast<int64_t>(kv_head) * D;
  const T* values = static_cast<const T*>(a.cache.value) + static_cast<int64_t>(kv_head) * D;

  // A tile lies in one page and in one stage: both hold a multiple of its keys.
  int64_t slot = first < last ? pages.slot(first * kTileKeys) : 0;
  int fill = 0;
  const auto load = [&](int tile) {
    if (tile < last) {
      const int count = length - tile * kTileKeys;
      const int64_t offset = slot * cache_row;
      const uint32_t place = ring + fill * 2 * kTileBytes;
      load_rows<T, D, kTileKeys, kThreads>(place, keys + offset, cache_row, 0, count);
      load_rows<T, D, kTileKeys, kThreads>(place + kTileBytes, values + offset, cache_row, 0, count);
      if (tile + 1 < last) slot = pages.slot((tile + 1) * kTileKeys);
    }
    fill = fill == kDecodeRing - 1 ? 0 : fill + 1;
  };

  // The newest key, and q, are what the launch before writes.
  const bool has_newest = last == tiles;
  if (has_newest) await_previous();
#pragma unroll
  for (int i = 0; i < kDecodeRing - 1; ++i) load(first + i);
  if (!has_newest) await_previous();
  const T* q = static_cast<const T*>(a.q) + (static_cast<int64_t>(sequence) * a.heads + first_head) * D;
  const int64_t variant = static_cast<int64_t>(a.batch) * a.heads * D;
  const Stage latest = length > 2 * a.chunk_len ? kInter : length > a.chunk_len ? kSucc : kIntra;
  for (int stage = kIntra; stage <= latest; ++stage) {
    load_rows<T, D, kGroupRows, kThreads>(queries + stage * kGroupRows * SharedRows<D>::kRowBytes, q + stage * variant,
                                          D, 0, rows);
  }
  copy_commit();
  load(first + kDecodeRing - 1);
  copy_commit();

  DecodeRows<T, D> state;
  state.start();
  Stage current = kStages;
  int use = 0;
  const int32_t chunk = (length - 1) / a.chunk_len * a.chunk_len;
  for (int tile = first; tile < last; ++tile) {
    copy_wait<kDecodeRing - 2>();
    __syncthreads();
    if (tile > first) {
      load(tile + kDecodeRing - 1);
      copy_commit();
    }
    const int32_t key = tile * kTileKeys;
    const Stage stage = key >= chunk ? kIntra : key >= chunk - a.chunk_len ? kSucc : kInter;
    if (stage != current) {
      current = stage;
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        load_left(state.query[step], at<D>(queries + rows_place, stage * kGroupRows, step));
      }
    }
    const uint32_t place = at<D>(ring + use * 2 * kTileBytes, 16 * warp, 0);
    state.attend(place + transposed_place, place + kTileBytes + rows_place, 16 * warp, length - key, scale, lane);
    use = use == kDecodeRing - 1 ? 0 : use + 1;
  }
  copy_wait<0>();
  __syncthreads();

  // The warps' softmaxes become the block's.
  float* warp_out = reinterpret_cast<float*>(shared);                                      // [kWarps, kGroupRows, D]
  float2* warp_statistic = reinterpret_cast<float2*>(warp_out + kWarps * kGroupRows * D);  // [kWarps, kGroupRows]
  bool& is_last = *reinterpret_cast<bool*>(warp_statistic + kWarps * kGroupRows);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = 8 * h + lane / 4;
    float total = state.sum[h];
    total += __shfl_xor_sync(kAllLanes, total, 1);
    total += __shfl_xor_sync(kAllLanes, total, 2);
    if (lane % 4 == 0) warp_statistic[warp * kGroupRows + row] = make_float2(state.maximum[h], total);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      float* out = warp_out + (warp * kGroupRows + row) * D + 8 * n + 2 * (lane % 4);
      *reinterpret_cast<float2*>(out) = make_float2(state.out[n][2 * h], state.out[n][2 * h + 1]);
    }
  }
  __syncthreads();
  const int64_t line = static_cast<int64_t>(sequence) * a.heads + first_head;
  for (int i = threadIdx.x; i < rows * D; i += kThreads) {
    const int row = i / D;
    float top = kNegativeInfinity, total = 0, out = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, warp_statistic[w * kGroupRows + row].x);
    const float origin = top == kNegativeInfinity ? 0.0f : top;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 part = warp_statistic[w * kGroupRows + row];
      const float weight = exp2_fast(part.x - origin);
      total += part.y * weight;
      out += warp_out[(w * kGroupRows + row) * D + i % D] * weight;
    }
    if (shares == 1) {
      static_cast<T*>(a.out)[line * D + i] = narrow<T>(total > 0 ? out / total : 0.0f);
      continue;
    }
    const int64_t place = (line + row) * a.splits + split;
    a.partial[place * D + i % D] = out;
    if (i % D == 0) a.statistic[place] = make_float2(top, total);
  }
  if (shares == 1) return;

  // The last share to be done merges all of them, in their order.
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t* done = shares_done + sequence * gridDim.y + blockIdx.y;
    is_last = add_and_synchronize(done) == shares - 1;
    if (is_last) *done = 0;
  }
  __syncthreads();
  if (is_last) merge_rows<T, D>(a, line, rows, shares);
}

// Shares a sequence: enough for the whole device, whatever the lengths are.
int32_t decode_splits(const qwen1m_dca_decode& a) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t parts = ceil_div(a.heads / a.cache.kv_heads, kGroupRows);
  const int64_t merged = a.cache.kv_heads * parts * a.batch;
  const int64_t fill = merged > kMostMerged ? 1 : kBlocksPerProcessor * processors / merged;
  const int64_t most = ceil_div(static_cast<int64_t>(a.table_width) * a.cache.page_size, kTileKeys);
  return static_cast<int32_t>(std::max<int64_t>(1, std::min(fill, most)));
}

}  // namespace

template <typename T, int D>
int dca_decode(const qwen1m_dca_decode& decode, void* workspace, qwen1m_stream stream) {
  DecodeArguments a{decode, nullptr, nullptr, decode_splits(decode)};
  const int64_t shares = static_cast<int64_t>(a.batch) * a.heads * a.splits;
  a.statistic = static_cast<float2*>(workspace);
  a.partial = reinterpret_cast<float*>(a.statistic + shares);
  const auto kernel = decode_kernel<T, D>;
  constexpr int kBytes = decode_shared_bytes<D>();
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const int parts = static_cast<int>(ceil_div(a.heads / a.cache.kv_heads, kGroupRows));
  return launch_overlapping(kernel, dim3(a.splits, a.cache.kv_heads * parts, a.batch), kThreads, kBytes,
                            as_stream(stream), a);
}

QWEN1M_INSTANTIATE(dca_decode, (const qwen1m_dca_decode&, void*, qwen1m_stream));

}  // namespace sm80
}  // namespace cuda
}  // namespace qwen1m

int64_t qwen1m_cuda_dca_decode_workspace(const qwen1m_dca_decode* a) {
  const int64_t shares = static_cast<int64_t>(a->batch) * a->heads * qwen1m::cuda::sm80::decode_splits(*a);
  return shares * (a->cache.head_dim * sizeof(float) + sizeof(float2));
}
