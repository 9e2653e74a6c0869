// Exact top-k of column and diagonal sums: one launch for all heads; on Hopper a cluster of blocks shares a row.
//
// A sample of the row says which entries are likely to be among the k largest, and some more. One sweep over the row
// lists these in shared memory, where a radix select finds the k-th. Then every tile of the row knows how many of its
// entries are taken, hence where the first of them goes. Where the sample misled, a larger part of it is taken. A
// list that is full, of many that are equal, is made anew whenever it is read, a tile at a time.
#include <algorithm>
#include <climits>

#include "block_scan.cuh"
#include "clusters.cuh"
#include "common.cuh"
#include "qwen1m/keys.h"

namespace qwen1m {
namespace cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kBlocksPerProcessor = 2, kMostBlocks = 8;  // of a cluster, without asking the device for more
constexpr int kFewestTiles = kWarps;                     // of a block, where a row has several
using Keys = Pack<int32_t>;
constexpr int kPacks = 4;  // of a lane, in flight together
constexpr int kTilePacks = kPacks * kWarp, kTile = kTilePacks * Keys::kSize;
constexpr int kSampled = 64;  // one pack of so many at least
constexpr int32_t kForced = INT32_MAX, kNone = -1;

constexpr int kKeyBits = 31, kDigitBits = 11, kDigits = 1 << kDigitBits, kMostDigits = 3, kSampleDigits = 2;

// How many bits lie below a key's first digits.
__device__ constexpr int bits_below(int digits) {
  return digits * kDigitBits < kKeyBits ? kKeyBits - digits * kDigitBits : 0;
}

// A row's sums, by keys: larger for what ranks higher. Sums are at least 0, so their bits order as they do, but that of
// -0 is 0. Packs begin 16-byte aligned, hence before the row where that does not.
struct Row {
  const int32_t* sums;
  int32_t count, forced_begin, forced_end, misaligned;

  __device__ Row(const float* row, int32_t count, int32_t forced_begin, int32_t forced_end)
      : sums(reinterpret_cast<const int32_t*>(row)), count(count), forced_begin(forced_begin), forced_end(forced_end) {
    misaligned = reinterpret_cast<uintptr_t>(row) / sizeof(float) % Keys::kSize;
  }

  __device__ int32_t first_of(int32_t pack) const { return pack * Keys::kSize - misaligned; }

  // Forced entries rank above all others; outside of the row is none.
  __device__ Keys load(int32_t pack) const {
    const int32_t index = first_of(pack), end = index + Keys::kSize;
    Keys keys;
    if (index >= 0 && end <= count && (end <= forced_begin || index >= forced_end)) {
      keys = *reinterpret_cast<const Keys*>(sums + index);
#pragma unroll
      for (int32_t& key : keys.values) key = max(key, 0);
      return keys;
    }
#pragma unroll
    for (int i = 0; i < Keys::kSize; ++i) {
      const int32_t at = index + i;
      keys.values[i] = kNone;
      if (at >= 0 && at < count) keys.values[i] = at >= forced_begin && at < forced_end ? kForced : max(sums[at], 0);
    }
    return keys;
  }
};

// The blocks that share a row. Its tiles go round the blocks, and those of a block, its places, round the warps.
struct Cluster {
  int32_t blocks, block, places;

  __device__ Cluster(int32_t blocks, int32_t places) : blocks(blocks), block(blockIdx.x % blocks), places(places) {}

  __device__ int32_t tile(int32_t place) const { return place * blocks + block; }
  __device__ int32_t lane_pack(int32_t place) const {
    return tile(place) * kTilePacks + static_cast<int32_t>(threadIdx.x % kWarp);
  }

  // What all have written to shared memory is visible to all.
  __device__ static void sync() {
    cluster_arrive();
    cluster_wait();
  }

  // Where `other` block has what this one has at `own`, in shared memory.
  template <typename T>
  __device__ static const T* of_block(const T* own, int32_t other) {
#if __CUDA_ARCH__ >= 900
    uint64_t there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(other));
    return reinterpret_cast<const T*>(there);
#else
    return own;
#endif
  }

  // f(block, what it has at `own`) for all blocks in their order; some are read together.
  template <typename T, typename F>
  __device__ void each_block(const T* own, F&& f) const {
    constexpr int kTogether = 4;
    for (int first = 0; first < blocks; first += kTogether) {
      T values[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first + i < blocks) values[i] = *of_block(own, first + i);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first + i < blocks) f(first + i, values[i]);
      }
    }
  }
};

// Where a row is cut: all that is larger than `key` is taken, and the first `ties` of those that are equal.
struct Cut {
  int32_t key, ties;
};

// How many entries of a tile rank above the cut, and at it.
struct Found {
  uint16_t larger, equal;
};

// Of a tile: its entries in the list.
struct Listed {
  uint16_t first, count;
};

// Of a tile: where its first taken entry goes, and how many are taken of those at the cut.
struct Taken {
  int32_t begin, ties;
};

struct alignas(16) Shared {
  uint32_t counts[2][kDigits];  // how many entries of this block have a digit; that before, which others still read
  int32_t partial[kWarps];
  uint64_t found_partial[kWarps];
  Cut cut;
  int32_t listed;
};

// Keys of one pack in `stride` of the whole row, anywhere in each group of them, so that no period of the row is met:
// in every block the same.
struct Sample {
  static constexpr int32_t lowest = 0;
  int32_t* keys;
  int32_t count;

  __device__ Sample(const Row& row, int32_t stride, int32_t* keys) : keys(keys) {
    const int32_t group = stride * Keys::kSize, packs = (row.count + group - 1) / group;
    count = packs * Keys::kSize;
    for (int32_t first = threadIdx.x; first < packs; first += kPacks * kThreads) {
      Keys loaded[kPacks];
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const uint32_t pack = first + i * kThreads, anywhere = pack * 2654435761u >> 16;
        loaded[i] = row.load(pack * stride + anywhere % stride);
      }
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const int32_t pack = first + i * kThreads;
        if (pack < packs) *reinterpret_cast<Keys*>(keys + pack * Keys::kSize) = loaded[i];
      }
    }
  }

  // f(key) for all keys that the calling thread has.
  template <typename F>
  __device__ void each_key(F&& f) const {
    for (int32_t i = threadIdx.x; i < count; i += kThreads) f(keys[i]);
  }
};

// A warp's packs of a tile, or one of them, and which of their entries are at least `lowest`.
template <int PACKS>
struct Likely {
  Keys packs[PACKS];
  int32_t lowest, first[PACKS], count = 0;  // where a lane's first one goes in each; of all

  __device__ Likely(const Row& row, int32_t lane_pack, int32_t lowest) : lowest(lowest) {
#pragma unroll
    for (int p = 0; p < PACKS; ++p) packs[p] = row.load(lane_pack + p * kWarp);
#pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      int32_t own = 0;
#pragma unroll
      for (const int32_t key : packs[p].values) own += key >= lowest;
      const int32_t through = inclusive_warp_sum(own);
      first[p] = count + through - own;
      count += __shfl_sync(kAllLanes, through, kWarp - 1);
    }
  }

  // Writes keys, and numbers in the tile, of which the warp's first is `number`, in order.
  __device__ void list(int32_t* keys, uint16_t* numbers, int32_t number) const {
#pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      int32_t at = first[p];
#pragma unroll
      for (int i = 0; i < Keys::kSize; ++i) {
        if (packs[p].values[i] < lowest) continue;
        keys[at] = packs[p].values[i];
        numbers[at++] = static_cast<uint16_t>(number + (p * kWarp + threadIdx.x % kWarp) * Keys::kSize + i);
      }
    }
  }
};

// Entries of a block that may be taken, tile by tile as the warps come, and what is known of its tiles.
struct List {
  const Row& row;
  const Cluster& cluster;
  char* memory;
  int32_t& size;  // in shared memory
  int32_t room;

  int32_t lowest = 0;
  bool whole = true;  // else it has become full, and each warp has a part of it for a tile at a time

  static constexpr int64_t kBytesOfEntry = sizeof(int32_t) + sizeof(uint16_t);
  static constexpr int64_t kBytesOfPlace = sizeof(Taken) + sizeof(Found) + sizeof(Listed);

  __device__ int32_t* keys() const { return reinterpret_cast<int32_t*>(memory); }
  __device__ Taken* taken() const { return reinterpret_cast<Taken*>(keys() + room); }
  __device__ Found* found() const { return reinterpret_cast<Found*>(taken() + cluster.places); }
  __device__ Listed* listed() const { return reinterpret_cast<Listed*>(found() + cluster.places); }
  __device__ uint16_t* numbers() const { return reinterpret_cast<uint16_t*>(listed() + cluster.places); }

  // Whether it has room for the whole row.
  __device__ bool holds_all() const { return cluster.places * kTile <= room; }

  __device__ void fill(int32_t at_least) {
    lowest = at_least;
    if (threadIdx.x == 0) size = 0;
    __syncthreads();
    for (int32_t place = threadIdx.x / kWarp; place < cluster.places; place += kWarps) {
      const Likely<kPacks> likely(row, cluster.lane_pack(place), lowest);
      int32_t first = threadIdx.x % kWarp == 0 ? atomicAdd(&size, likely.count) : 0;
      first = __shfl_sync(kAllLanes, first, 0);
      if (first + likely.count > room) break;
      likely.list(keys() + first, numbers() + first, 0);
      if (threadIdx.x % kWarp == 0) {
        listed()[place] = {static_cast<uint16_t>(first), static_cast<uint16_t>(likely.count)};
      }
    }
    __syncthreads();
    whole = size <= room;
  }

  // f(place, first, count) for every tile of the calling warp, whose entries are [first, first + count) of the list.
  template <typename F>
  __device__ void each_tile(F&& f) const {
    for (int32_t place = threadIdx.x / kWarp; place < cluster.places; place += kWarps) {
      if (whole) {
        f(place, listed()[place].first, listed()[place].count);
      } else {
        const int32_t first = threadIdx.x / kWarp * kTile;
        int32_t count = 0;
        __syncwarp();
#pragma unroll 1
        for (int p = 0; p < kPacks; ++p) {
          const Likely<1> likely(row, cluster.lane_pack(place) + p * kWarp, lowest);
          likely.list(keys() + first + count, numbers() + first + count, p * kWarp * Keys::kSize);
          count += likely.count;
        }
        __syncwarp();
        f(place, first, count);
      }
    }
  }

  // f(key) for all keys, a thread a key.
  template <typename F>
  __device__ void each_key(F&& f) const {
    if (whole) {
      for (int32_t i = threadIdx.x; i < size; i += kThreads) f(keys()[i]);
    } else {
      each_tile([&](int32_t, int32_t first, int32_t count) {
        for (int32_t i = threadIdx.x % kWarp; i < count; i += kWarp) f(keys()[first + i]);
      });
    }
  }
};

// The first `digits` of the cut that takes `size` of the keys, 0 < size, and the ties among those that begin so; kNone
// where there are fewer. The keys are the cluster's, or each block's own.
template <bool OF_CLUSTER, typename Source>
__device__ Cut find_cut(Shared& shared, const Cluster& cluster, Source& source, int32_t size, int digits) {
  constexpr int kEach = kDigits / kThreads;
  static_assert(kEach * sizeof(uint32_t) == sizeof(uint4), "a load of each block's counts");
  const int lowest = kDigits - (threadIdx.x + 1) * kEach;  // of a thread's digits; the first thread has the largest
  Cut cut{0, size};
  for (int d = 0; d < digits; ++d) {
    const int above_bits = bits_below(d), below_bits = bits_below(d + 1), mask = (1 << (above_bits - below_bits)) - 1;
    const bool may_have_any = lowest <= mask && (d > 0 || lowest + kEach > source.lowest >> below_bits);
    uint32_t* own = shared.counts[d % 2];
    for (int i = threadIdx.x; i < kDigits; i += kThreads) own[i] = 0;
    __syncthreads();
    source.each_key([&](int32_t key) {
      if (key >> above_bits == cut.key) atomicAdd(own + (key >> below_bits & mask), 1);
    });
    int32_t counts[kEach] = {}, count = 0;
    const auto add = [&](int, const uint4& of_block) {
      counts[0] += of_block.x, counts[1] += of_block.y, counts[2] += of_block.z, counts[3] += of_block.w;
    };
    const auto* digits_of_thread = reinterpret_cast<const uint4*>(own + lowest);
    if (OF_CLUSTER) {
      Cluster::sync();
      if (may_have_any) cluster.each_block(digits_of_thread, add);
    } else {
      __syncthreads();
      add(0, *digits_of_thread);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) count += counts[i];
    const Sums<int32_t> sums = block_sums(shared.partial, count);
    if (sums.total < cut.ties) return {kNone, 0};
    int32_t above = sums.before;
#pragma unroll
    for (int i = kEach - 1; i >= 0; --i) {
      if (above < cut.ties && cut.ties <= above + counts[i]) shared.cut = {lowest + i, cut.ties - above};
      above += counts[i];
    }
    __syncthreads();
    cut = {cut.key << (above_bits - below_bits) | shared.cut.key, shared.cut.ties};
  }
  return cut;
}

// Lists what a sample takes for the `size` largest, and some more, and says where the row is cut.
__device__ Cut list_and_cut(Shared& shared, List& list, int32_t size, int32_t stride) {
  const Cluster& cluster = list.cluster;
  // Neighbours are alike, so that packs of four are the sample: two standard deviations of their number.
  const float expected = __fdividef(size, stride), deviation = 2.0f * expected * rsqrtf(expected);
  for (auto likely = static_cast<int32_t>(expected + 2.0f * deviation) + 16;; likely *= 4) {
    int32_t lowest = 0;
    if (!list.holds_all()) {
      const Sample sample(list.row, stride, list.keys());
      const Cut cut = find_cut<false>(shared, cluster, sample, likely, kSampleDigits);
      if (cut.key != kNone) lowest = cut.key << bits_below(kSampleDigits);
    }
    list.fill(lowest);
    const Cut cut = find_cut<true>(shared, cluster, list, size, kMostDigits);
    if (cut.key != kNone) return cut;
    Cluster::sync();  // all have read what is counted anew
  }
}

// Writes the indices of the `size` largest, 0 < size < row.count, ascending.
__device__ void select(Shared& shared, List& list, int32_t size, int32_t stride, int32_t* out) {
  const Cluster& cluster = list.cluster;
  const int lane = threadIdx.x % kWarp;
  const Cut cut = list_and_cut(shared, list, size, stride);

  list.each_tile([&](int32_t place, int32_t begin, int32_t count) {
    int32_t larger = 0, equal = 0;
    for (int32_t first = 0; first < count; first += kWarp) {
      const int32_t key = first + lane < count ? list.keys()[begin + first + lane] : kNone;
      larger += __popc(__ballot_sync(kAllLanes, key > cut.key));
      equal += __popc(__ballot_sync(kAllLanes, key == cut.key));
    }
    if (lane == 0) list.found()[place] = {static_cast<uint16_t>(larger), static_cast<uint16_t>(equal)};
  });
  Cluster::sync();

  // A thread has some neighbouring places of all blocks, the tiles of these in order.
  const int32_t each = (cluster.places + kThreads - 1) / kThreads;
  const int32_t begin = min(static_cast<int32_t>(threadIdx.x) * each, cluster.places);
  const int32_t end = min(begin + each, cluster.places);
  uint64_t own = 0;  // larger ones above equal ones
  for (int32_t place = begin; place < end; ++place) {
    cluster.each_block(list.found() + place,
                       [&](int, Found of_tile) { own += static_cast<uint64_t>(of_tile.larger) << 32 | of_tile.equal; });
  }
  const uint64_t before = block_sums(shared.found_partial, own).before;
  int32_t larger = before >> 32, equal = before & UINT32_MAX;
  for (int32_t place = begin; place < end; ++place) {
    cluster.each_block(list.found() + place, [&](int block, Found of_tile) {
      const int32_t ties = max(0, min(int32_t{of_tile.equal}, cut.ties - equal));
      if (block == cluster.block) list.taken()[place] = {larger + min(equal, cut.ties), ties};
      larger += of_tile.larger;
      equal += of_tile.equal;
    });
  }
  __syncthreads();

  list.each_tile([&](int32_t place, int32_t begin, int32_t count) {
    const uint32_t below = (1u << lane) - 1;
    const int32_t index = list.row.first_of(cluster.tile(place) * kTilePacks);
    auto [to, ties] = list.taken()[place];
    for (int32_t first = 0; first < count; first += kWarp) {
      const int32_t at = begin + first + lane;
      const int32_t key = first + lane < count ? list.keys()[at] : kNone;
      const uint32_t equals = __ballot_sync(kAllLanes, key == cut.key);
      const bool taken = key > cut.key || (key == cut.key && __popc(equals & below) < ties);
      const uint32_t all_taken = __ballot_sync(kAllLanes, taken);
      if (taken) out[to + __popc(all_taken & below)] = index + list.numbers()[at];
      to += __popc(all_taken);
      ties -= min(ties, __popc(equals));
    }
  });
  Cluster::sync();  // nobody ends while others read what it found
}

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    select_rows(const qwen1m_select_critical a, int32_t blocks, int32_t places, int32_t room, int32_t stride) {
  __shared__ Shared shared;
  extern __shared__ __align__(16) char memory[];
  const int32_t line = blockIdx.x / blocks;
  const bool diagonals = line >= a.heads;
  const int64_t head = line % a.heads;
  const Row row((diagonals ? a.slash : a.vertical) + head * a.keys, a.keys,
                diagonals ? max(0, a.keys - a.forced_diagonals) : 0, diagonals ? a.keys : a.forced_columns);
  const Cluster cluster(blocks, places);
  const int32_t width = diagonals ? a.slash_width : a.column_width;
  const int32_t size = max(0, min((diagonals ? a.slash_sizes : a.vertical_sizes)[head], min(a.keys, width)));
  int32_t* out = (diagonals ? a.slashes : a.columns) + head * width;
  const int32_t thread = cluster.block * kThreads + threadIdx.x, threads = blocks * kThreads;
  for (int32_t i = size + thread; i < width; i += threads) out[i] = INT_MAX;
  if (size == a.keys) {
    for (int32_t i = thread; i < size; i += threads) out[i] = i;
  } else if (size > 0) {
    List list{row, cluster, memory, shared.listed, room};
    select(shared, list, size, stride, out);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

int qwen1m_cuda_select_critical(const qwen1m_select_critical* a, qwen1m_stream stream) {
  using namespace qwen1m::cuda;
  int device = 0, of_processor = 0, of_block = 0, reserved = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&of_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
  // The first tile may begin three entries before its row. Of clusters a processor group holds whole ones: an eighth of
  // the places may stay empty.
  const int64_t tiles = ceil_div(int64_t{a->keys} + Keys::kSize - 1, kTile), lines = 2 * a->heads;
  const int64_t fitting = std::min(kBlocksPerProcessor * processors() * 7 / 8 / lines, tiles / kFewestTiles);
  const auto blocks = static_cast<int32_t>(is_hopper() ? std::clamp<int64_t>(fitting, 1, kMostBlocks) : 1);
  const auto places = static_cast<int32_t>(ceil_div(tiles, blocks));
  const int64_t bytes_of_places = places * List::kBytesOfPlace;
  const int64_t most_bytes = is_hopper() ? of_processor / kBlocksPerProcessor - reserved : of_block;
  const int64_t for_list = most_bytes - static_cast<int64_t>(sizeof(Shared)) - bytes_of_places;
  // Numbers of entries have 16 bits; a warp has room for a tile.
  const auto room = static_cast<int32_t>(std::min<int64_t>(for_list / List::kBytesOfEntry, UINT16_MAX) / 2 * 2);
  if (room < kWarps * kTile) return cudaErrorInvalidValue;
  int32_t stride = kSampled;  // so that the list has room for the sample
  while (a->keys / stride + Keys::kSize > for_list / static_cast<int64_t>(sizeof(int32_t))) stride *= 2;

  const auto bytes = static_cast<size_t>(bytes_of_places + room * List::kBytesOfEntry);
  const cudaError_t status =
      cudaFuncSetAttribute(select_rows, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute cluster = clusters_of(static_cast<unsigned>(blocks));
  cudaLaunchConfig_t launch{};
  launch.gridDim = static_cast<unsigned>(lines * blocks);
  launch.blockDim = kThreads;
  launch.dynamicSmemBytes = bytes;
  launch.stream = as_stream(stream);
  launch.attrs = &cluster;
  launch.numAttrs = is_hopper() ? 1 : 0;
  return cudaLaunchKernelEx(&launch, select_rows, *a, blocks, places, room, stride);
}
