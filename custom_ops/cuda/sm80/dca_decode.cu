// Decode: one query a sequence against all of its keys, split over the keys.
//
// A block takes a share of one sequence's keys for one KV head: tiles of 64 keys, of which each warp scores and attends
// to 16 with the query heads of the group as the rows of its tile. Every warp keeps a softmax of its own; they are
// merged at the end of the block, and the blocks' shares by a second kernel. The time is that of reading K and V once:
// a ring of tiles keeps the reads under way. The grid does not depend on the lengths, which stay on the device.
#include <algorithm>

#include "attention.cuh"
#include "qwen1m/dca_stages.h"
#include "row_loads.cuh"

namespace qwen1m {
namespace cuda {
namespace sm80 {

namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kGroupRows = 16;  // query heads of one KV head that share a block
constexpr int kDecodeRing = 3;
constexpr int kBlocksPerProcessor = 2;

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
  const int tiles = (length + kTileKeys - 1) / kTileKeys, share = (tiles + a.splits - 1) / a.splits;
  const int first = min(split * share, tiles), last = min(first + share, tiles);
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
    copy_commit();
    fill = fill == kDecodeRing - 1 ? 0 : fill + 1;
  };

  const T* q = static_cast<const T*>(a.q) + (static_cast<int64_t>(sequence) * a.heads + first_head) * D;
  const int64_t variant = static_cast<int64_t>(a.batch) * a.heads * D;
  const Stage latest = length > 2 * a.chunk_len ? kInter : length > a.chunk_len ? kSucc : kIntra;
  for (int stage = kIntra; stage <= latest; ++stage) {
    load_rows<T, D, kGroupRows, kThreads>(queries + stage * kGroupRows * SharedRows<D>::kRowBytes, q + stage * variant,
                                          D, 0, rows);
  }
#pragma unroll
  for (int i = 0; i < kDecodeRing - 1; ++i) load(first + i);

  DecodeRows<T, D> state;
  state.start();
  Stage current = kStages;
  int use = 0;
  const int32_t chunk = (length - 1) / a.chunk_len * a.chunk_len;
  for (int tile = first; tile < last; ++tile) {
    copy_wait<kDecodeRing - 2>();
    __syncthreads();
    load(tile + kDecodeRing - 1);
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
    const int64_t place = (static_cast<int64_t>(sequence) * a.heads + first_head + row) * a.splits + split;
    a.partial[place * D + i % D] = out;
    if (i % D == 0) a.statistic[place] = make_float2(top, total);
  }
}

// One block a (sequence, head): kMergeParts threads a value, each with every kMergeParts-th share and a softmax of its
// own, and all that it reads of kMergeAtOnce shares under way together.
constexpr int kMergeParts = 8, kMergeAtOnce = 9;

template <typename T, int D>
__global__ void __launch_bounds__(kMergeParts* D) merge_kernel(const __grid_constant__ DecodeArguments a) {
  __shared__ float outs[kMergeParts][D];
  __shared__ float2 statistics[kMergeParts];
  const int value = threadIdx.x % D, part = threadIdx.x / D;
  const int64_t row = static_cast<int64_t>(blockIdx.y) * a.heads + blockIdx.x;
  const float2* statistic = a.statistic + row * a.splits;
  const float* partial = a.partial + row * a.splits * D + value;
  float top = kNegativeInfinity, total = 0, out = 0;
  for (int first = part; first < a.splits; first += kMergeParts * kMergeAtOnce) {
    float2 shares[kMergeAtOnce];
    float values[kMergeAtOnce];
#pragma unroll
    for (int i = 0; i < kMergeAtOnce; ++i) {
      const int s = first + i * kMergeParts;
      shares[i] = s < a.splits ? statistic[s] : make_float2(kNegativeInfinity, 0);
      values[i] = s < a.splits ? partial[static_cast<int64_t>(s) * D] : 0;
    }
    float higher = top;
#pragma unroll
    for (int i = 0; i < kMergeAtOnce; ++i) higher = fmaxf(higher, shares[i].x);
    const float origin = higher == kNegativeInfinity ? 0.0f : higher, shrink = exp2_fast(top - origin);
    total *= shrink;
    out *= shrink;
#pragma unroll
    for (int i = 0; i < kMergeAtOnce; ++i) {
      const float weight = exp2_fast(shares[i].x - origin);
      total += shares[i].y * weight;
      out += values[i] * weight;
    }
    top = higher;
  }
  outs[part][value] = out;
  if (value == 0) statistics[part] = make_float2(top, total);
  __syncthreads();
  if (part != 0) return;
#pragma unroll
  for (int p = 1; p < kMergeParts; ++p) top = fmaxf(top, statistics[p].x);
  const float origin = top == kNegativeInfinity ? 0.0f : top;
  total = out = 0;
#pragma unroll
  for (int p = 0; p < kMergeParts; ++p) {
    const float weight = exp2_fast(statistics[p].x - origin);
    total += statistics[p].y * weight;
    out += outs[p][value] * weight;
  }
  static_cast<T*>(a.out)[row * D + value] = narrow<T>(total > 0 ? out / total : 0.0f);
}

// Shares a sequence: enough for the whole device, whatever the lengths are.
int32_t decode_splits(const qwen1m_dca_decode& a) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t parts = ceil_div(a.heads / a.cache.kv_heads, kGroupRows);
  const int64_t fill = kBlocksPerProcessor * processors / (a.cache.kv_heads * parts * a.batch);
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
  kernel<<<dim3(a.splits, a.cache.kv_heads * parts, a.batch), kThreads, kBytes, as_stream(stream)>>>(a);
  merge_kernel<T, D><<<dim3(a.heads, a.batch), kMergeParts * D, 0, as_stream(stream)>>>(a);
  return cudaGetLastError();
}

QWEN1M_INSTANTIATE(dca_decode, (const qwen1m_dca_decode&, void*, qwen1m_stream));

}  // namespace sm80
}  // namespace cuda
}  // namespace qwen1m

int64_t qwen1m_cuda_dca_decode_workspace(const qwen1m_dca_decode* a) {
  const int64_t shares = static_cast<int64_t>(a->batch) * a->heads * qwen1m::cuda::sm80::decode_splits(*a);
  return shares * (a->cache.head_dim * sizeof(float) + sizeof(float2));
}
