// The probe on Hopper: the query heads of a KV head score a tile of keys that was read once, with products of a
// warpgroup whose left factor, the keys, stays in registers.
//
// A warp walks over a span of keys of its own, 16 at a time: four warps take part in a product, each with its own keys,
// against one head's 64 rows. A block's spans lie in one DCA stage, so that it holds one rotation of the queries at a
// time. Two passes and the carried diagonals are those of keys/dca_probe.cu, but for the reference of a row's sum: it
// lies in shared memory and rises only when a score exceeds it by 2^8.
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
constexpr int kPair = 2 * kTile;      // keys whose diagonals are closed at once
constexpr int kHalo = kProbeRows;     // keys before a span that share diagonals with it
constexpr int kPanelBytes = kProbeRows * kPanelRowBytes;
constexpr int kSumWarps = 12;

// The sums of a group's rows stay in registers: with seven heads there is room for two warpgroups of such threads.
constexpr int statistic_warps(int group) { return group <= 5 ? 12 : 8; }

// How the keys are dealt to the warps of a pass: blocks of each stage, from inter on.
struct Spans {
  int32_t keys;  // of a warp
  int32_t blocks[kStages];

  __host__ __device__ int32_t count() const { return blocks[0] + blocks[1] + blocks[2]; }
};

struct ProbeArguments : qwen1m_dca_probe {
  float2* statistic;
  float* log_sum;
  Spans statistics, sums;
};

template <int kGroup, int kWarps>
struct alignas(1024) Shared {
  char queries[kGroup][kPanels][kPanelBytes];
  char keys[kWarps][kRing][kTile * SharedRows<kHeadDim>::kRowBytes];
};

template <typename T, int kGroup, int kWarps>
struct Walk {
  static constexpr int kThreads = kWarps * kWarp;

  const ProbeArguments& a;
  Shared<kGroup, kWarps>& shared;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Stage stage = kInter;
  int32_t block_begin = 0;
  int32_t begin = 0;   // of the warp's span
  int32_t end = 0;     // of the span, at most that of the stage
  int32_t limit = 0;   // end of the stage
  bool opens = false;  // the block's keys are the stage's first

  __device__ Walk(const ProbeArguments& arguments, Shared<kGroup, kWarps>& memory, const Spans& spans)
      : a(arguments), shared(memory) {
    int block = blockIdx.x, s = kInter;
    while (block >= spans.blocks[s]) block -= spans.blocks[s--];
    stage = static_cast<Stage>(s);
    const Span keys = stage_keys(stage, a.end - 1, a.chunk_len);
    block_begin = keys.begin + block * kWarps * spans.keys;
    begin = block_begin + warp * spans.keys;
    limit = keys.end;
    end = min(begin + spans.keys, limit);
    opens = block == 0;
  }

  __device__ int head(int h) const { return blockIdx.y * kGroup + h; }

  // The group's queries in one rotation; rows stand at the end of the 64, those before the first are zero.
  __device__ void load_queries(int rotation) const {
    const int missing = kProbeRows - a.rows;
    const T* q = static_cast<const T*>(a.q) + static_cast<int64_t>(rotation) * a.rows * a.heads * kHeadDim;
    __syncthreads();  // products with those before have ended
    for (int i = threadIdx.x; i < kGroup * kProbeRows * 16; i += kThreads) {
      const int h = i / (kProbeRows * 16), row = i / 16 % kProbeRows, chunk = i % 16, from = max(row - missing, 0);
      const T* source = q + (static_cast<int64_t>(from) * a.heads + head(h)) * kHeadDim + chunk * 8;
      copy_async_or_zero(
          shared_address(shared.queries[h][chunk / 8]) + row * kPanelRowBytes + ((chunk % 8 ^ row % 8) << 4), source,
          row >= missing);
    }
    copy_commit();
    copy_wait<0>();
    async_proxy_fence();
    __syncthreads();
  }

  // `tiles` tiles of the warp's keys from `first` on; visit(h, first key, scores) sees each head's products. Tiles
  // outside the sequence may hold anything, keys from `last` on are masked, as those that a row does not see.
  template <typename F>
  __device__ void operator()(int32_t first, int tiles, int32_t last, F&& visit) const {
    constexpr int kTileBytes = sizeof(shared.keys[0][0]), kChunks = SharedRows<kHeadDim>::kChunks;
    const uint32_t ring = shared_address(shared.keys[warp]), place = operand<kHeadDim>(lane);
    const int64_t cache_row = static_cast<int64_t>(a.cache.kv_heads) * kHeadDim;
    const T* pool = static_cast<const T*>(a.cache.key) + static_cast<int64_t>(blockIdx.y) * kHeadDim;
    const Pages pages(a.block_table, a.cache.page_size);
    const auto load = [&](int tile) {
      const int32_t key = first + tile * kTile;
      if (tile < tiles && key >= 0 && key < a.end) {
        const T* keys = pool + pages.slot(key) * cache_row + lane % kChunks * 8;
#pragma unroll
        for (int r = lane / kChunks; r < kTile; r += kWarp / kChunks) {
          const int readable = min(r, a.end - 1 - key);
          copy_async_or_zero(SharedRows<kHeadDim>::address(ring + tile % kRing * kTileBytes, r, lane % kChunks),
                             keys + readable * cache_row, r == readable);
        }
      }
      copy_commit();
    };
    for (int tile = 0; tile < kRing; ++tile) load(tile);
    for (int tile = 0; tile < tiles; ++tile) {
      const int32_t key = first + tile * kTile;
      copy_wait<kRing - 1>();
      __syncwarp();
      uint32_t keys[kHeadDim / 16][4];
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        load_left(keys[step], at<kHeadDim>(ring + tile % kRing * kTileBytes + place, 0, step));
      }
      __syncwarp();
      load(tile + kRing);
      const bool partial = key + kTile > min(last, a.end - a.rows);
#pragma unroll
      for (int h = 0; h < kGroup; ++h) {
        float scores[kProbeRows / 2];
        const uint32_t queries = rows_descriptor(shared_address(shared.queries[h][0]));
        products_begin();
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; ++step) {
          multiply_transposed<T>(scores, keys[step], queries + (step / 4 * kPanelBytes >> 4) + step % 4 * 2, step > 0);
        }
        products_commit();
        products_wait<0>();
        settle(scores);
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
    copy_wait<0>();
    __syncwarp();
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

// Each row's reference and sum over each span.
template <typename T, int kGroup>
__global__ void __launch_bounds__(statistic_warps(kGroup) * kWarp, 1)
    statistics_kernel(const __grid_constant__ ProbeArguments a) {
  constexpr int kWarps = statistic_warps(kGroup);
  extern __shared__ char memory[];
  auto& shared = *reinterpret_cast<Shared<kGroup, kWarps>*>(memory);
  const Walk<T, kGroup, kWarps> walk(a, shared, a.statistics);
  // This warp's references, of each head's rows: float2 number 4n of this lane's is that of rows 8n + 2p, 8n + 2p + 1.
  float2* references = reinterpret_cast<float2*>(memory + sizeof(shared)) + walk.warp * kGroup * kProbeRows / 2;
  for (int i = walk.lane; i < kGroup * kProbeRows / 2; i += kWarp) references[i] = make_float2(0, 0);
  references += walk.lane % 4;
  walk.load_queries(walk.stage);

  const float scale = a.scale * kLog2E;
  // Lanes below 16 sum rows 8n + 2p + e, n < 4, the others those with n >= 4: at 2 (n % 4) + e.
  const bool upper = walk.lane >= kWarp / 2;
  float sum[kGroup][kProbeRows / 8] = {};
  walk(walk.begin, a.statistics.keys / kTile, walk.limit, [&](int h, int32_t first, float (&scores)[kProbeRows / 2]) {
    float2* reference = references + h * kProbeRows / 2;
    float top = kNegativeInfinity;
#pragma unroll
    for (int n = 0; n < kRowTiles8; ++n) {
      const float2 origin = reference[4 * n];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[4 * n + i] = scores[4 * n + i] * scale - (i % 2 ? origin.y : origin.x);
        top = fmaxf(top, scores[4 * n + i]);
      }
    }
    const bool starts = first == walk.begin;
    if (__any_sync(kAllLanes, starts || top > kGrowth)) {
      // Moves the references of rows 8n + 2p and the next; returns by how much.
      const auto raise = [&](int n) {
        float lift[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float highest = fmaxf(scores[4 * n + e], scores[4 * n + 2 + e]);
#pragma unroll
          for (int mask = 4; mask < kWarp; mask *= 2) {
            highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, mask));
          }
          lift[e] = highest > kGrowth || (starts && highest > kNegativeInfinity) ? highest : 0.0f;
          scores[4 * n + e] -= lift[e];
          scores[4 * n + 2 + e] -= lift[e];
        }
        const float2 origin = reference[4 * n];
        __syncwarp();
        if (walk.lane < 4) reference[4 * n] = make_float2(origin.x + lift[0], origin.y + lift[1]);
        return make_float2(lift[0], lift[1]);
      };
#pragma unroll
      for (int n = 0; n < kRowTiles8 / 2; ++n) {
        const float2 low = raise(n), high = raise(n + kRowTiles8 / 2);
        sum[h][2 * n] *= exp2_fast(upper ? -high.x : -low.x);
        sum[h][2 * n + 1] *= exp2_fast(upper ? -high.y : -low.y);
      }
      __syncwarp();
    }
#pragma unroll
    for (int n = 0; n < kRowTiles8 / 2; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const auto weight = [&](int m) { return exp2_fast(scores[4 * m + e]) + exp2_fast(scores[4 * m + 2 + e]); };
        const float low = weight(n), high = weight(n + kRowTiles8 / 2);
        sum[h][2 * n + e] += (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, kWarp / 2);
      }
    }
    // Never. A branch ends what ptxas schedules together: it would begin the next head's product before these sums,
    // and spill the weights that its scores displace.
    if (sum[h][0] < 0) __trap();
  });

  const int spans = a.statistics.count() * kWarps;
#pragma unroll
  for (int h = 0; h < kGroup; ++h) {
    const int64_t span = static_cast<int64_t>(walk.head(h)) * spans + blockIdx.x * kWarps + walk.warp;
#pragma unroll
    for (int i = 0; i < kProbeRows / 8; ++i) {
      float total = sum[h][i];
      total += __shfl_xor_sync(kAllLanes, total, 4);
      total += __shfl_xor_sync(kAllLanes, total, 8);
      const int n = i / 2 + (upper ? kRowTiles8 / 2 : 0), row = 8 * n + 2 * (walk.lane % 4) + i % 2;
      const float2 origin = references[h * kProbeRows / 2 + 4 * n];
      if (walk.lane % (kWarp / 2) < 4) {
        const float reference = i % 2 ? origin.y : origin.x;
        a.statistic[span * kProbeRows + row] = make_float2(total > 0 ? reference : kNegativeInfinity, total);
      }
    }
  }
}

// The weights of the spans' keys, summed along columns and diagonals.
template <typename T, int kGroup>
__global__ void __launch_bounds__(kSumWarps* kWarp, 1) sums_kernel(const __grid_constant__ ProbeArguments a) {
  extern __shared__ char memory[];
  auto& shared = *reinterpret_cast<Shared<kGroup, kSumWarps>*>(memory);
  const Walk<T, kGroup, kSumWarps> walk(a, shared, a.sums);
  float* log_sums = reinterpret_cast<float*>(memory + sizeof(shared));
  for (int i = threadIdx.x; i < kGroup * kProbeRows; i += kSumWarps * kWarp) {
    log_sums[i] = a.log_sum[walk.head(0) * kProbeRows + i];
  }
  const float scale = a.scale * kLog2E;
  const int lane = walk.lane, g = lane / 4, p = lane % 4;
  OpenDiagonals<kTile> diagonals[kGroup];

  // Diagonal d of the 32 keys at `first` meets the last row at key first + d - 1. A span answers for the keys from the
  // one before its first; the sequence's last span for its own last key as well.
  const int32_t answers_to = walk.end == a.end && walk.begin < a.end ? a.end : walk.end - 1;
  const auto write_closed = [&](int h, int32_t first) {
    const float closed = diagonals[h].close();
    const int32_t key = first + 8 * p + g - 1;
    if (first >= walk.begin && key >= 0 && key < answers_to) {
      a.slash[static_cast<int64_t>(walk.head(h)) * a.end + key] = closed;
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
        const float weight = exp2_fast(score * scale - (e ? origin.y : origin.x));
        column[k] += weight;
        along[k + kRowTiles8 - n][e] += weight;
      });
      const bool second = (first - walk.begin) & kTile;
      diagonals[h].add(along, lane, second);
      if (second) write_closed(h, first - kTile);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        column[k] += __shfl_xor_sync(kAllLanes, column[k], 1);
        column[k] += __shfl_xor_sync(kAllLanes, column[k], 2);
      }
      const int32_t key = first + 8 * p + g;
      if (p < 2 && first >= walk.begin && key < walk.end) {
        a.vertical[static_cast<int64_t>(walk.head(h)) * a.end + key] = p == 0 ? column[0] : column[1];
      }
    };
  };

  // The first span of a stage shares diagonals with the keys of the one before, which meet another rotation.
  const bool first_span = walk.opens && walk.warp == 0;
  if (walk.opens && walk.block_begin > 0) {
    walk.load_queries(walk.stage + 1);
    walk(walk.begin - kHalo, kHalo / kTile, walk.begin, visit([&](int32_t) { return first_span; }));
  }
  walk.load_queries(walk.stage);
  walk(walk.begin - kHalo, (kHalo + a.sums.keys) / kTile, walk.limit,
       visit([&](int32_t first) { return first >= walk.begin || !first_span; }));
#pragma unroll
  for (int h = 0; h < kGroup; ++h) write_closed(h, walk.begin + a.sums.keys);
}

// Spans that keep every processor busy to the end, and read few keys twice.
Spans deal(const qwen1m_dca_probe& probe, int warps, int halo, int processors) {
  constexpr int kFixed = 64;  // what a block costs before its first key, in keys of a warp
  Spans best{};
  int64_t best_cost = INT64_MAX;
  for (int32_t keys = 2 * kPair; keys <= 4096; keys += kPair) {
    Spans spans{keys, {}};
    for (int stage = kIntra; stage < kStages; ++stage) {
      const Span span = stage_keys(static_cast<Stage>(stage), probe.end - 1, probe.chunk_len);
      spans.blocks[stage] = static_cast<int32_t>(ceil_div(span.end - span.begin, warps * keys));
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
  int device = 0, processors = 1;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  const int warps = statistic_warps(group_of(probe));
  ProbeArguments a{probe, static_cast<float2*>(workspace), nullptr, deal(probe, warps, 0, processors),
                   deal(probe, kSumWarps, kHalo, processors)};
  a.log_sum =
      reinterpret_cast<float*>(a.statistic + static_cast<int64_t>(a.heads) * a.statistics.count() * warps * kProbeRows);
  return a;
}

template <typename T, int kGroup>
int launch(const ProbeArguments& a, qwen1m_stream stream) {
  constexpr int kWarps = statistic_warps(kGroup);
  const auto run = [&](auto kernel, int blocks, int warps, int bytes) -> int {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
    kernel<<<dim3(blocks, a.cache.kv_heads), warps * kWarp, bytes, as_stream(stream)>>>(a);
    return cudaGetLastError();
  };
  constexpr int kReferenceBytes = kWarps * kGroup * kProbeRows * sizeof(float);
  const int status =
      run(statistics_kernel<T, kGroup>, a.statistics.count(), kWarps, sizeof(Shared<kGroup, kWarps>) + kReferenceBytes);
  if (status != cudaSuccess) return status;
  merge_statistics_kernel<<<a.heads, kMergeThreads, 0, as_stream(stream)>>>(a.statistic, a.log_sum,
                                                                            a.statistics.count() * kWarps, a.rows);
  return run(sums_kernel<T, kGroup>, a.sums.count(), kSumWarps,
             sizeof(Shared<kGroup, kSumWarps>) + kGroup * kProbeRows * sizeof(float));
}

}  // namespace

bool takes_probe(const qwen1m_dca_probe& a) {
  return (group_of(a) == 5 || group_of(a) == 7) && a.heads % a.cache.kv_heads == 0 && a.chunk_len % kHalo == 0;
}

int64_t dca_probe_workspace(const qwen1m_dca_probe& probe) {
  const ProbeArguments a = plan(probe, nullptr);
  const int64_t spans = static_cast<int64_t>(a.statistics.count()) * statistic_warps(group_of(a));
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
