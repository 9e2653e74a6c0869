// What kernels of decode share: how a sequence's keys are shared out over blocks, and how what they made is merged.
#pragma once

#include <algorithm>

#include "block_scan.cuh"
#include "mma.cuh"
#include "overlap.cuh"
#include "qwen1m/attention.h"
#include "row_loads.cuh"
#include "vectors.cuh"

namespace qwen1m {
namespace cuda {
namespace sm80 {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kGroupRows = 16;  // query heads of one KV head that share a block
constexpr int kBlocksPerProcessor = 2, kMostBlocksPerProcessor = 3;
constexpr int kFewestTiles = 4;    // of a share
constexpr int kMergedAtOnce = 16;  // shares whose values a lane reads together
constexpr int kRowParts = 4;       // that blocks merge, where there are more shares
constexpr int kSharesAMerger = 2;  // at least

// How many shares of a (sequence, part of a KV head's group) are done, then also how many blocks have merged them: 0
// between launches. There are fewer of these than a device has processors wherever there are shares to merge. Launches
// of one device follow each other, as those of one stream do.
constexpr int kMostMerged = 1024;
__device__ int32_t shares_done[kMostMerged];

struct DecodeArguments : qwen1m_dca_decode {
  float* partial;     // [B, H, splits, D], not normalised
  float2* statistic;  // [B, H, splits]: maximum in units of log2, sum
  int32_t splits;
};

// What a block takes: tiles [first, last) of a sequence's keys, and rows of the query heads of one KV head.
struct Share {
  int sequence, split, kv_head, first_head, rows, length, tiles, first, last, count;

  __device__ explicit Share(const DecodeArguments& a) : sequence(blockIdx.z), split(blockIdx.x) {
    const int group = a.heads / a.cache.kv_heads, parts = (group + kGroupRows - 1) / kGroupRows;
    kv_head = blockIdx.y / parts;
    first_head = kv_head * group + blockIdx.y % parts * kGroupRows;
    rows = min(kGroupRows, (kv_head + 1) * group - first_head);
    length = a.lengths[sequence];
    tiles = (length + kTileKeys - 1) / kTileKeys;
    const int size = max((tiles + a.splits - 1) / a.splits, kFewestTiles);
    first = split * size;
    last = min(first + size, tiles);
    count = max((tiles + size - 1) / size, 1);
  }

  // There are more blocks than shares where a sequence is short.
  __device__ bool is_empty() const { return split >= count; }
  __device__ bool has_newest() const { return last == tiles; }
};

// Adds one and returns what was there. What this block wrote becomes visible to who adds later, and the other way
// round.
__device__ inline int32_t add_and_synchronize(int32_t* to) {
  int32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(to) : "memory");
  return before;
}

__device__ inline int32_t look_and_synchronize(const int32_t* at) {
  int32_t seen;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(at) : "memory");
  return seen;
}

// What lanes have merged of a row's shares: a warp of one share at a time, or 1 / kParts of it, and as many shares
// together, of each of which it has the same part of the values. Per lane D / kWarp values, not normalised.
template <int D, int kParts>
struct MergedShares {
  static constexpr int kEach = D / kWarp, kLanes = kWarp / kParts;
  float out[kEach] = {}, top = kNegativeInfinity, total = 0;

  // Every `step`-th share from `first` on of the row whose first is number `place` of them all; values from `dim` on.
  __device__ void add(const DecodeArguments& a, int64_t place, int dim, int first, int end, int step) {
    const float* const values_of = a.partial + place * D + dim;
    const float2* const statistic_of = a.statistic + place;
    for (; first < end; first += kMergedAtOnce * step) {
      Vector<float, kEach> values[kMergedAtOnce];
      float2 statistics[kMergedAtOnce];
#pragma unroll
      for (int i = 0; i < kMergedAtOnce; ++i) {
        statistics[i] = make_float2(kNegativeInfinity, 0);
        values[i] = {};
        const int share = first + i * step;
        if (share >= end) continue;
        statistics[i] = statistic_of[share];
        values[i] = load_vector<kEach>(values_of + share * D);
      }
      float higher = top;
#pragma unroll
      for (const float2& statistic : statistics) higher = fmaxf(higher, statistic.x);
      const float origin = higher == kNegativeInfinity ? 0.0f : higher, shrink = exp2_fast(top - origin);
      total *= shrink;
#pragma unroll
      for (float& value : out) value *= shrink;
#pragma unroll
      for (int i = 0; i < kMergedAtOnce; ++i) {
        const float weight = exp2_fast(statistics[i].x - origin);
        total += statistics[i].y * weight;
#pragma unroll
        for (int n = 0; n < kEach; ++n) out[n] += values[i].values[n] * weight;
      }
      top = higher;
    }
  }
};

// Merges what `count` shares made of a block's rows, the first of them `line` of [B, H]: a warp a row.
template <typename T, int D>
__device__ void merge_rows(const DecodeArguments& a, int64_t line, int rows, int count) {
  const int lane = threadIdx.x % kWarp;
  for (int row = threadIdx.x / kWarp; row < rows; row += kWarps) {
    MergedShares<D, 1> merged;
    merged.add(a, (line + row) * a.splits, lane * merged.kEach, 0, count, 1);
    const float inverse = merged.total > 0 ? 1.0f / merged.total : 0.0f;
    for (float& value : merged.out) value *= inverse;
    store_narrowed(merged.out, static_cast<T*>(a.out) + (line + row) * D + lane * merged.kEach);
  }
}

// A value of a row, of several softmaxes.
struct MergedValue {
  float out, top, total;
  __device__ float normalised() const { return total > 0 ? out / total : 0.0f; }
};

// Of N: statistic(i) is the maximum in units of log2 and the sum of one, value(i) its value, not normalised.
template <int N, typename Statistic, typename Value>
__device__ MergedValue merge_value(Statistic&& statistic, Value&& value) {
  MergedValue merged{0, kNegativeInfinity, 0};
#pragma unroll
  for (int i = 0; i < N; ++i) merged.top = fmaxf(merged.top, statistic(i).x);
  const float origin = merged.top == kNegativeInfinity ? 0.0f : merged.top;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float2 part = statistic(i);
    const float weight = exp2_fast(part.x - origin);
    merged.total += part.y * weight;
    merged.out += value(i) * weight;
  }
  return merged;
}

// Where a warp leaves its softmax, at the start of the block's shared memory: values [kWarps, kGroupRows, D], then
// statistics [kWarps, kGroupRows].
template <int D>
struct WarpResult {
  float* values;
  float2* statistics;

  __device__ WarpResult(char* shared, int warp)
      : values(reinterpret_cast<float*>(shared) + warp * kGroupRows * D),
        statistics(reinterpret_cast<float2*>(reinterpret_cast<float*>(shared) + kWarps * kGroupRows * D) +
                   warp * kGroupRows) {}

  static constexpr int kBytes = kWarps * kGroupRows * (D * sizeof(float) + sizeof(float2)) + sizeof(int);

  __device__ float* row(int row) const { return values + row * D; }

  // The four lanes of a row have a part of its sum each.
  __device__ void keep_statistic(int row, int lane, float maximum, float sum) const {
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    if (lane % 4 == 0) statistics[row] = make_float2(maximum, sum);
  }

  // A value of a row, of the first warp's result and those of all others.
  __device__ MergedValue over_warps(int row, int dim) const {
    return merge_value<kWarps>([&](int w) { return statistics[w * kGroupRows + row]; },
                               [&](int w) { return values[(w * kGroupRows + row) * D + dim]; });
  }
};

// Merges what `count` shares made of a part of row `line` of [B, H]: groups of lanes every so manieth of them, then the
// block theirs.
template <typename T, int D>
__device__ void merge_part(const DecodeArguments& a, int64_t line, int part, int count, char* shared) {
  using Group = MergedShares<D, kRowParts>;
  constexpr int kGroups = kWarps * kRowParts, kDims = D / kRowParts;
  static_assert(kDims <= kWarp, "a lane a value");
  const int group = threadIdx.x / Group::kLanes, first_dim = part * kDims;
  const int dim = threadIdx.x % Group::kLanes * Group::kEach;
  float* const values = reinterpret_cast<float*>(shared);  // [kGroups, kDims]
  float2* const statistics = reinterpret_cast<float2*>(values + kGroups * kDims);
  Group own;
  own.add(a, line * a.splits, first_dim + dim, group, count, kGroups);
#pragma unroll
  for (int n = 0; n < Group::kEach; ++n) values[group * kDims + dim + n] = own.out[n];
  if (dim == 0) statistics[group] = make_float2(own.top, own.total);
  __syncthreads();
  if (threadIdx.x < kDims) {
    const MergedValue merged = merge_value<kGroups>([&](int g) { return statistics[g]; },
                                                    [&](int g) { return values[g * kDims + threadIdx.x]; });
    static_cast<T*>(a.out)[line * D + first_dim + threadIdx.x] = narrow<T>(merged.normalised());
  }
  __syncthreads();
}

// The warps' results become the block's, and those of a sequence's blocks its output.
template <typename T, int D>
__device__ void finish_share(const DecodeArguments& a, const Share& share, char* shared) {
  const WarpResult<D> results(shared, 0);
  int& number = *reinterpret_cast<int*>(results.statistics + kWarps * kGroupRows);  // among the blocks that merge
  const int rows = share.rows;
  __syncthreads();
  const int64_t line = static_cast<int64_t>(share.sequence) * a.heads + share.first_head;
  for (int i = threadIdx.x; i < rows * D; i += kThreads) {
    const int row = i / D;
    const auto merged = results.over_warps(row, i % D);
    if (share.count == 1) {
      static_cast<T*>(a.out)[line * D + i] = narrow<T>(merged.normalised());
      continue;
    }
    const int64_t place = (line + row) * a.splits + share.split;
    a.partial[place * D + i % D] = merged.out;
    if (i % D == 0) a.statistic[place] = make_float2(merged.top, merged.total);
  }
  if (share.count == 1) return;

  // The blocks that are done last merge the rows once all are, in the shares' order: one alone, unless the shares are
  // few, would take as long as a processor takes to read everything. Those that wait are so few that whoever they wait
  // for finds room.
  const int parts = rows * kRowParts;
  const int merging = share.count <= kMergedAtOnce ? 1 : min(parts, share.count / kSharesAMerger);
  const int before = share.count - merging;
  int32_t* done = shares_done + share.sequence * gridDim.y + blockIdx.y;
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t seen = add_and_synchronize(done) + 1;  // this one among them
    number = seen - 1 - before;
    while (number >= 0 && seen < share.count) seen = look_and_synchronize(done);
  }
  __syncthreads();
  const int first = number;
  if (first < 0) return;
  if (merging == 1) {
    merge_rows<T, D>(a, line, rows, share.count);
  } else {
    for (int i = first; i < parts; i += merging) {
      merge_part<T, D>(a, line + i / kRowParts, i % kRowParts, share.count, shared);
    }
  }
  if (threadIdx.x == 0 && (merging == 1 || add_and_synchronize(done) == share.count + merging - 1)) *done = 0;
}

// Whether kMostBlocksPerProcessor blocks have room beside each other: over 8 bits, where half of a tile's rows are
// enough for the query heads, on Hopper.
inline bool has_room_for_most(const qwen1m_dca_decode& a) {
  return qwen1m_is_quantised(a.cache.dtype) && a.heads / a.cache.kv_heads <= kGroupRows / 2 && is_hopper();
}

// Shares a sequence: enough for the whole device, whatever the lengths are.
inline int32_t decode_splits(const qwen1m_dca_decode& a) {
  const int64_t parts = ceil_div(a.heads / a.cache.kv_heads, kGroupRows);
  const int64_t merged = a.cache.kv_heads * parts * a.batch;
  const int blocks = has_room_for_most(a) ? kMostBlocksPerProcessor : kBlocksPerProcessor;
  const int64_t fill = merged > kMostMerged ? 1 : processors() * blocks / merged;
  const int64_t most = ceil_div(static_cast<int64_t>(a.table_width) * a.cache.page_size, kTileKeys);
  return static_cast<int32_t>(std::max<int64_t>(1, std::min(fill, most)));
}

inline DecodeArguments decode_arguments(const qwen1m_dca_decode& decode, void* workspace) {
  DecodeArguments a{decode, nullptr, nullptr, decode_splits(decode)};
  a.partial = static_cast<float*>(workspace);  // first, since its rows are read 16 bytes at a time
  a.statistic =
      reinterpret_cast<float2*>(a.partial + static_cast<int64_t>(a.batch) * a.heads * a.splits * a.cache.head_dim);
  return a;
}

inline int64_t decode_workspace(const qwen1m_dca_decode& a) {
  const int64_t shares = static_cast<int64_t>(a.batch) * a.heads * decode_splits(a);
  return shares * (a.cache.head_dim * sizeof(float) + sizeof(float2));
}

inline dim3 decode_grid(const DecodeArguments& a) {
  const int64_t parts = ceil_div(a.heads / a.cache.kv_heads, kGroupRows);
  return dim3(a.splits, static_cast<unsigned>(a.cache.kv_heads * parts), a.batch);
}

}  // namespace
}  // namespace sm80
}  // namespace cuda
}  // namespace qwen1m
