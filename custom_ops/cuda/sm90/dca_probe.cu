// The probe on Hopper: the query heads of a KV head score a tile of keys that was read once.
//
// A block's keys lie in one DCA stage, so that it holds one rotation of the group's queries at a time. Two passes, as
// in keys/dca_probe.cu:
//
//   statistics  a warpgroup walks over a span of keys, 64 at a time, as the right factor: a row's sum runs along
//   registers.
//               Its reference lies above the highest score of the first tile, and rises when weights grow beyond two.
//   sums        a warp walks over a span of its own, 16 keys at a time, which are rows of the left factor: four warps
//               take part in a product, each with its own keys, against one head's 64 rows. A column's sum runs along
//               registers, diagonals are carried as in keys/dca_probe.cu.
#include <algorithm>
#include <type_traits>

#include "attention.cuh"
#include "keys/probe_sums.cuh"
#include "row_loads.cuh"
#include "rows.cuh"

namespace qwen1m {
namespace cuda {
namespace sm90 {
namespace {

constexpr int kTile = 16, kRing = 2;  // keys of a warp at a time; tiles under way
constexpr int kHalo = kProbeRows;     // keys before a span that share diagonals with it
constexpr int kPanelBytes = kProbeRows * kPanelRowBytes;
constexpr int kSumWarps = 12;
constexpr float kHeadroom = 24;  // of a row's reference above its first scores, in log2
constexpr int kTileReady = 1;    // first of the named barriers, one a warpgroup

// As many as leave room for the group's queries.
constexpr int statistic_warpgroups(int group) { return group <= 5 ? 4 : 3; }

// How the keys are dealt to the warpgroups or warps of a pass: blocks of each stage, from inter on.
struct Spans {
  int32_t keys;  // of one
  int32_t blocks[kStages];

  __host__ __device__ int32_t count() const { return blocks[0] + blocks[1] + blocks[2]; }
};

struct ProbeArguments : qwen1m_dca_probe {
  float2* statistic;
  float* log_sum;
  Spans statistics, sums;
};

// What is the same in all lanes, known to be so: descriptors that depend on it are computed in uniform registers.
__device__ inline int same_in_warp(int value) { return __shfl_sync(kAllLanes, value, 0); }

// The keys of one of a block's `shares` warpgroups or warps.
struct Share {
  Stage stage = kInter;
  int32_t block_begin = 0;
  int32_t begin = 0;   // of the span
  int32_t end = 0;     // of the span, at most that of the stage
  int32_t limit = 0;   // end of the stage
  bool opens = false;  // the block's keys are the stage's first

  __device__ Share(const ProbeArguments& a, const Spans& spans, int shares, int number) {
    int block = blockIdx.x, s = kInter;
    while (block >= spans.blocks[s]) block -= spans.blocks[s--];
    stage = static_cast<Stage>(s);
    const Span keys = stage_keys(stage, a.end - 1, a.chunk_len);
    block_begin = keys.begin + block * shares * spans.keys;
    begin = block_begin + number * spans.keys;
    limit = keys.end;
    end = min(begin + spans.keys, limit);
    opens = block == 0;
  }
};

// The group's queries in one rotation; rows stand at the end of the 64, those before the first are zero.
template <typename T, int kGroup, int kThreads>
__device__ void load_queries(const ProbeArguments& a, const char (&queries)[kGroup][kPanels][kPanelBytes],
                             int rotation) {
  const int missing = kProbeRows - a.rows;
  const T* q = static_cast<const T*>(a.q) + static_cast<int64_t>(rotation) * a.rows * a.heads * kHeadDim;
  __syncthreads();  // products with those before have ended
  for (int i = threadIdx.x; i < kGroup * kProbeRows * 16; i += kThreads) {
    const int h = i / (kProbeRows * 16), row = i / 16 % kProbeRows, chunk = i % 16, from = max(row - missing, 0);
    const T* source = q + (static_cast<int64_t>(from) * a.heads + blockIdx.y * kGroup + h) * kHeadDim + chunk * 8;
    copy_async_or_zero(shared_address(queries[h][chunk / 8]) + row * kPanelRowBytes + ((chunk % 8 ^ row % 8) << 4),
                       source, row >= missing);
  }
  copy_commit();
  copy_wait<0>();
  async_proxy_fence();
  __syncthreads();
}

// 64 rows of a head times 64 others, transposed, both in shared memory: `left` and `right` are their descriptors.
template <typename T>
__device__ void multiply_heads(float (&scores)[32], uint32_t left, uint32_t right) {
  products_begin();
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const uint32_t on = (step / 4 * kPanelBytes >> 4) + step % 4 * 2;
    multiply_shared<T>(scores, left + on, right + on, step > 0);
  }
  products_commit();
  products_wait<0>();
  settle(scores);
}

template <int kGroup, int kWarpgroups>
struct alignas(1024) StatisticsShared {
  char queries[kGroup][kPanels][kPanelBytes];
  char keys[kWarpgroups][kRing][kPanels][kTileKeys * kPanelRowBytes];
};

// A row's sum of exp2(score - reference) over the keys of one of the four lanes that have a part of it.
struct RowSum {
  float reference = -1e30f;  // none yet: any score's weight is infinite
  float sum = 0;

  // Adds up the weights of the scores of row 16w + g + 8h. Without fmaf the products would be shared with raise(), and
  // the reference subtracted by instructions of their own.
  template <int h>
  __device__ float weigh(const float (&scores)[kTileKeys / 2], float scale) const {
    float parts[2] = {};
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) parts[e] += exp2_fast(fmaf(scores[4 * n + 2 * h + e], scale, -reference));
    }
    return parts[0] + parts[1];
  }

  template <int h>
  __device__ void raise(const float (&scores)[kTileKeys / 2], float scale) {
    float top = kNegativeInfinity;
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) top = fmaxf(top, fmaxf(scores[4 * n + 2 * h], scores[4 * n + 2 * h + 1]));
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
    const float higher = fmaxf(reference, top * scale + kHeadroom);
    sum *= exp2_fast(reference - higher);
    reference = higher;
  }
};

// Adds a tile's scores to this thread's rows. `scale` includes log2(e).
__device__ inline void add_weights(RowSum (&rows)[2], const float (&scores)[kTileKeys / 2], float scale) {
  float weights[2] = {rows[0].weigh<0>(scores, scale), rows[1].weigh<1>(scores, scale)};
  if (__any_sync(kAllLanes, !(fmaxf(weights[0], weights[1]) < 2))) {
    rows[0].raise<0>(scores, scale);
    rows[1].raise<1>(scores, scale);
    weights[0] = rows[0].weigh<0>(scores, scale);
    weights[1] = rows[1].weigh<1>(scores, scale);
  }
  rows[0].sum += weights[0];
  rows[1].sum += weights[1];
}

// Each row's reference and sum over each span.
template <typename T, int kGroup>
__global__ void __launch_bounds__(statistic_warpgroups(kGroup) * kWarpgroup, 1)
    statistics_kernel(const __grid_constant__ ProbeArguments a) {
  constexpr int kWarpgroups = statistic_warpgroups(kGroup);
  extern __shared__ char memory[];
  auto& shared = *reinterpret_cast<StatisticsShared<kGroup, kWarpgroups>*>(memory);
  const int warpgroup = same_in_warp(threadIdx.x / kWarpgroup);
  const int thread = threadIdx.x % kWarpgroup, lane = threadIdx.x % kWarp;
  const int first_row = thread / kWarp * 16 + lane / 4;
  const Share keys(a, a.statistics, kWarpgroups, warpgroup);
  const int tiles = (keys.end - keys.begin + kTileKeys - 1) / kTileKeys;

  constexpr int kTileBytes = sizeof(shared.keys[0][0]);
  const uint32_t ring = shared_address(shared.keys[warpgroup]);
  const int64_t cache_row = static_cast<int64_t>(a.cache.kv_heads) * kHeadDim;
  const T* pool = static_cast<const T*>(a.cache.key) + static_cast<int64_t>(blockIdx.y) * kHeadDim;
  const Pages pages(a.block_table, a.cache.page_size);
  const auto load = [&](int tile) {
    if (tile < tiles) {
      const int row = thread / 16, chunk = thread % 16;
      const int32_t key = keys.begin + tile * kTileKeys, last = a.end - 1 - key;
      const uint32_t target = ring + tile % kRing * kTileBytes + chunk / 8 * (kTileBytes / kPanels) +
                              row * kPanelRowBytes + ((chunk % 8 ^ row % 8) << 4);
      const T* source = pool + pages.slot(key) * cache_row + chunk * 8;
#pragma unroll
      for (int r = 0; r < kTileKeys; r += 8) {
        copy_async(target + r * kPanelRowBytes, source + min(row + r, last) * cache_row);
      }
    }
    copy_commit();
  };
  load(0);
  load_queries<T, kGroup, kWarpgroups * kWarpgroup>(a, shared.queries, keys.stage);

  const float scale = a.scale * kLog2E;
  RowSum rows[kGroup][2];
  for (int tile = 0; tile < tiles; ++tile) {
    copy_wait<0>();
    async_proxy_fence();
    named_sync(kTileReady + warpgroup, kWarpgroup);  // the tile has come, and nobody reads the one before any more
    load(tile + 1);
    const int32_t key = keys.begin + tile * kTileKeys;
    const uint32_t right = rows_descriptor(ring + tile % kRing * kTileBytes);
    const bool partial = key + kTileKeys > min(keys.limit, a.end - a.rows);
#pragma unroll
    for (int h = 0; h < kGroup; ++h) {
      float scores[kTileKeys / 2];
      const uint32_t left = rows_descriptor(shared_address(shared.queries[h][0]));
      multiply_heads<T>(scores, left, right);
      if (partial) {
        mask_scores(scores, [&](int column, int i) {
          return key + column < keys.limit && key + column <= a.end - kProbeRows + first_row + 8 * i;
        });
      }
      add_weights(rows[h], scores, scale);
    }
  }

  const int spans = a.statistics.count() * kWarpgroups;
#pragma unroll
  for (int h = 0; h < kGroup; ++h) {
    const int64_t span = (blockIdx.y * kGroup + h) * static_cast<int64_t>(spans) + blockIdx.x * kWarpgroups + warpgroup;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float total = rows[h][i].sum;
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      if (lane % 4 == 0) {
        a.statistic[span * kProbeRows + first_row + 8 * i] =
            make_float2(total > 0 ? rows[h][i].reference : kNegativeInfinity, total);
      }
    }
  }
}

template <int kGroup>
struct alignas(1024) SumsShared {
  char queries[kGroup][kPanels][kPanelBytes];
  char keys[kSumWarps / 4][kRing][kPanels][4 * kTile * kPanelRowBytes];
};

template <typename T, int kGroup>
struct Walk : Share {
  static constexpr int kThreads = kSumWarps * kWarp;

  const ProbeArguments& a;
  SumsShared<kGroup>& shared;
  const int warp = same_in_warp(threadIdx.x / kWarp), lane = threadIdx.x % kWarp;

  __device__ Walk(const ProbeArguments& arguments, SumsShared<kGroup>& memory)
      : Share(arguments, arguments.sums, kSumWarps, threadIdx.x / kWarp), a(arguments), shared(memory) {}

  __device__ int head(int h) const { return blockIdx.y * kGroup + h; }

  // `tiles` tiles of the warp's keys from `first` on; visit(h, first key, scores) sees each head's products. Tiles
  // outside the sequence may hold anything, keys from `last` on are masked, as those that a row does not see.
  template <typename F>
  __device__ void operator()(int32_t first, int tiles, int32_t last, F&& visit) const {
    constexpr int kTileBytes = sizeof(shared.keys[0][0]);
    const uint32_t ring = shared_address(shared.keys[warp / 4]);
    const int64_t cache_row = static_cast<int64_t>(a.cache.kv_heads) * kHeadDim;
    const T* pool = static_cast<const T*>(a.cache.key) + static_cast<int64_t>(blockIdx.y) * kHeadDim;
    const Pages pages(a.block_table, a.cache.page_size);
    const auto load = [&](int tile) {
      const int32_t key = first + tile * kTile, last_row = a.end - 1 - key;
      if (tile < tiles && key >= 0 && last_row >= 0) {
        const int chunk = lane % 16;
        const uint32_t target =
            ring + tile % kRing * kTileBytes + chunk / 8 * (kTileBytes / kPanels) + warp % 4 * kTile * kPanelRowBytes;
        const T* source = pool + pages.slot(key) * cache_row + chunk * 8;
#pragma unroll
        for (int r = lane / 16; r < kTile; r += 2) {
          copy_async(target + r * kPanelRowBytes + ((chunk % 8 ^ r % 8) << 4), source + min(r, last_row) * cache_row);
        }
      }
      copy_commit();
    };
    load(0);
    for (int tile = 0; tile < tiles; ++tile) {
      const int32_t key = first + tile * kTile;
      copy_wait<0>();
      async_proxy_fence();
      named_sync(kTileReady + warp / 4, kWarpgroup);  // the tile has come, and nobody reads the one before any more
      load(tile + 1);
      const uint32_t left = rows_descriptor(ring + tile % kRing * kTileBytes);
      const bool partial = key + kTile > min(last, a.end - a.rows);
#pragma unroll
      for (int h = 0; h < kGroup; ++h) {
        float scores[kProbeRows / 2];
        const uint32_t right = rows_descriptor(shared_address(shared.queries[h][0]));
        multiply_heads<T>(scores, left, right);
        if (partial) {
          uint32_t from[1] = {static_cast<uint32_t>(key + lane / 4)};
          settle(from);  // lest comparisons of all heads be kept in registers
          each(scores, [&](float& score, int k, int n, int e) {
            const int32_t position = static_cast<int32_t>(from[0]) + 8 * k;
            if (position >= last || position > a.end - kProbeRows + 8 * n + 2 * (lane % 4) + e) {
              score = kNegativeInfinity;
            }
          });
        }
        visit(h, key, scores);
      }
    }
  }

  // f(score, k: key 8k + g, n, e: row 8n + 2p + e)
  template <typename F>
  __device__ static void each(float (&scores)[kProbeRows / 2], F&& f) {
#pragma unroll
    for (int n = 0; n < kRowTiles8; ++n) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int e = 0; e < 2; ++e) f(scores[4 * n + 2 * k + e], k, n, e);
      }
    }
  }
};

// The weights of the spans' keys, summed along columns and diagonals.
template <typename T, int kGroup>
__global__ void __launch_bounds__(kSumWarps* kWarp, 1) sums_kernel(const __grid_constant__ ProbeArguments a) {
  extern __shared__ char memory[];
  auto& shared = *reinterpret_cast<SumsShared<kGroup>*>(memory);
  const Walk<T, kGroup> walk(a, shared);
  float* log_sums = reinterpret_cast<float*>(memory + sizeof(shared));
  for (int i = threadIdx.x; i < kGroup * kProbeRows; i += kSumWarps * kWarp) {
    log_sums[i] = a.log_sum[walk.head(0) * kProbeRows + i];
  }
  const float scale = a.scale * kLog2E;
  const int lane = walk.lane, g = lane / 4, p = lane % 4;
  float* vertical = a.vertical + static_cast<int64_t>(walk.head(0)) * a.end;
  float* slash = a.slash + static_cast<int64_t>(walk.head(0)) * a.end;
  OpenDiagonals<kTile> diagonals[kGroup];

  // Diagonal d of the tile at `first` meets the last row at key first + d - 1. A span answers for the keys from the one
  // before its first; the sequence's last span for its own last key as well.
  const int32_t answers_to = walk.end == a.end && walk.begin < a.end ? a.end : walk.end - 1;
  const auto write_closed = [&](int h, int32_t first, float closed) {
    const int32_t key = first + p / 2 * 8 + g - 1;
    if (p % 2 == 0 && first >= walk.begin && key >= 0 && key < answers_to) {
      slash[h * a.end + key] = closed;
    }
  };
  // `counts`: whether the tile at a key is this warp's affair.
  const auto visit = [&](auto&& counts) {
    return [&, counts](int h, int32_t first, float (&scores)[kProbeRows / 2]) {
      if (!counts(first)) return;
      const float2* log_sum = reinterpret_cast<const float2*>(log_sums + h * kProbeRows) + p;
      float column[2] = {}, along[OpenDiagonals<kTile>::kGroups][2] = {};
      walk.each(scores, [&](float& score, int k, int n, int e) {
        const float2 origin = log_sum[4 * n];
        const float weight = exp2_fast(fmaf(score, scale, e ? -origin.y : -origin.x));
        float& diagonal = along[k + kRowTiles8 - n][e];
        column[k] = n == 0 && e == 0 ? weight : column[k] + weight;  // not 0 + weight, which is an addition
        diagonal = k == 0 || n == 0 ? weight : diagonal + weight;
      });
      write_closed(h, first, diagonals[h].add(along, lane));
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        column[k] += __shfl_xor_sync(kAllLanes, column[k], 1);
        column[k] += __shfl_xor_sync(kAllLanes, column[k], 2);
      }
      const int32_t key = first + 8 * p + g;
      if (p < 2 && first >= walk.begin && key < walk.end) {
        vertical[h * a.end + key] = p == 0 ? column[0] : column[1];
      }
    };
  };

  // The first span of a stage shares diagonals with the keys of the one before, which meet another rotation.
  const bool first_span = walk.opens && walk.warp == 0;
  if (walk.opens && walk.block_begin > 0) {
    load_queries<T, kGroup, walk.kThreads>(a, shared.queries, walk.stage + 1);
    walk(walk.begin - kHalo, kHalo / kTile, walk.begin, visit([&](int32_t) { return first_span; }));
  }
  load_queries<T, kGroup, walk.kThreads>(a, shared.queries, walk.stage);
  walk(walk.begin - kHalo, (kHalo + a.sums.keys) / kTile, walk.limit,
       visit([&](int32_t first) { return first >= walk.begin || !first_span; }));
  const float none[OpenDiagonals<kTile>::kGroups][2] = {};
#pragma unroll
  for (int h = 0; h < kGroup; ++h) write_closed(h, walk.begin + a.sums.keys, diagonals[h].add(none, lane));
}

// Spans that keep every processor busy to the end, and read few keys twice.
Spans deal(const qwen1m_dca_probe& probe, int shares, int halo, int processors) {
  constexpr int kFixed = 64;  // what a block costs before its first key, in keys of one share
  Spans best{};
  int64_t best_cost = INT64_MAX;
  for (int32_t keys = kTileKeys; keys <= 16384; keys += kTileKeys) {
    Spans spans{keys, {}};
    for (int stage = kIntra; stage < kStages; ++stage) {
      const Span span = stage_keys(static_cast<Stage>(stage), probe.end - 1, probe.chunk_len);
      spans.blocks[stage] = static_cast<int32_t>(ceil_div(span.end - span.begin, static_cast<int64_t>(shares) * keys));
    }
    const int64_t blocks = static_cast<int64_t>(spans.count()) * probe.cache.kv_heads;
    const int64_t cost = ceil_div(blocks, processors) * (keys + halo + kFixed);
    if (cost < best_cost) {
      best_cost = cost;
      best = spans;
    }
  }
  return best;
}

int group_of(const qwen1m_dca_probe& a) { return a.heads / a.cache.kv_heads; }

ProbeArguments plan(const qwen1m_dca_probe& probe, void* workspace) {
  const int warpgroups = statistic_warpgroups(group_of(probe));
  ProbeArguments a{probe, static_cast<float2*>(workspace), nullptr, deal(probe, warpgroups, 0, processors()),
                   deal(probe, kSumWarps, kHalo, processors())};
  a.log_sum = reinterpret_cast<float*>(a.statistic +
                                       static_cast<int64_t>(a.heads) * a.statistics.count() * warpgroups * kProbeRows);
  return a;
}

template <typename T, int kGroup>
int launch(const ProbeArguments& a, qwen1m_stream stream) {
  constexpr int kWarpgroups = statistic_warpgroups(kGroup);
  const auto run = [&](auto kernel, int blocks, int threads, int bytes) -> int {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
    kernel<<<dim3(blocks, a.cache.kv_heads), threads, bytes, as_stream(stream)>>>(a);
    return cudaGetLastError();
  };
  const int status = run(statistics_kernel<T, kGroup>, a.statistics.count(), kWarpgroups * kWarpgroup,
                         sizeof(StatisticsShared<kGroup, kWarpgroups>));
  if (status != cudaSuccess) return status;
  merge_statistics_kernel<<<a.heads, kMergeThreads, 0, as_stream(stream)>>>(a.statistic, a.log_sum,
                                                                            a.statistics.count() * kWarpgroups, a.rows);
  return run(sums_kernel<T, kGroup>, a.sums.count(), kSumWarps * kWarp,
             sizeof(SumsShared<kGroup>) + kGroup * kProbeRows * sizeof(float));
}

}  // namespace

bool takes_probe(const qwen1m_dca_probe& a) {
  return (group_of(a) == 5 || group_of(a) == 7) && a.heads % a.cache.kv_heads == 0 && a.chunk_len % kHalo == 0;
}

int64_t dca_probe_workspace(const qwen1m_dca_probe& probe) {
  const ProbeArguments a = plan(probe, nullptr);
  const int64_t spans = static_cast<int64_t>(a.statistics.count()) * statistic_warpgroups(group_of(a));
  return static_cast<int64_t>(a.heads) * kProbeRows * (spans * sizeof(float2) + sizeof(float));
}

template <typename T>
int dca_probe(const qwen1m_dca_probe& probe, void* workspace, qwen1m_stream stream) {
  const ProbeArguments a = plan(probe, workspace);
  return group_of(a) == 5 ? launch<T, 5>(a, stream) : launch<T, 7>(a, stream);
}

template int dca_probe<bf16>(const qwen1m_dca_probe&, void*, qwen1m_stream);
template int dca_probe<f16>(const qwen1m_dca_probe&, void*, qwen1m_stream);

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
