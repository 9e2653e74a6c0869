// Exact top-k of column and diagonal sums: one launch for all heads, a block a row.
//
// A radix select over the bits of the sums finds the k-th largest in three sweeps over the row, each a histogram of
// what the next 11, 11 and 9 bits can be. A fourth sweep writes, in order, the indices whose sum is larger and the
// first of those whose sum is equal. In every sweep a warp reads 512 consecutive sums at a time, a lane 16 bytes.
#include <climits>

#include "block_scan.cuh"
#include "common.cuh"
#include "qwen1m/keys.h"

namespace qwen1m {
namespace cuda {
namespace {

constexpr int kThreads = kScanThreads, kWarps = kThreads / kWarp;
using Keys = Pack<int32_t>;
constexpr int kPacks = 4;                         // packs of a lane that are in flight together
constexpr int kPackStride = kWarp * Keys::kSize;  // from a lane's pack to its next one
constexpr int kTile = kWarps * kPacks * kPackStride;
constexpr int kKeyBits = 31, kDigitBits = 11, kDigits = 1 << kDigitBits;
constexpr int32_t kForced = INT32_MAX;

// Larger for what ranks higher: the sums are at least 0, so their bits order as they do; -0 counts as 0.
__device__ int32_t key_of(int32_t bits) { return max(bits, 0); }

// Sums by their bits. `first` is the index of a thread's first sum in tile 0. It lies 16-byte aligned, hence below 0 in
// some threads of a row that does not.
struct Row {
  const int32_t* sums;
  int32_t count;
  int32_t forced_begin, forced_end;
  int32_t tiles, first;

  __device__ Row(const float* row, int32_t count, int32_t forced_begin, int32_t forced_end)
      : sums(reinterpret_cast<const int32_t*>(row)), count(count), forced_begin(forced_begin), forced_end(forced_end) {
    const int32_t misaligned = reinterpret_cast<uintptr_t>(row) / sizeof(float) % Keys::kSize;
    tiles = ceil_div(count + misaligned, kTile);
    first = threadIdx.x / kWarp * kPacks * kPackStride + threadIdx.x % kWarp * Keys::kSize - misaligned;
  }

  __device__ bool holds(int32_t index) const { return static_cast<uint32_t>(index) < static_cast<uint32_t>(count); }

  // Forced entries rank above all others; what a pack holds outside of the row is 0.
  __device__ Keys load(int32_t index) const {
    const int32_t end = index + Keys::kSize;
    if (index >= 0 && end <= count && (end <= forced_begin || index >= forced_end)) {
      return *reinterpret_cast<const Keys*>(sums + index);
    }
    Keys keys{};
#pragma unroll
    for (int i = 0; i < Keys::kSize; ++i) {
      const int32_t at = index + i;
      if (holds(at)) keys.values[i] = at >= forced_begin && at < forced_end ? kForced : sums[at];
    }
    return keys;
  }
};

struct Tile {
  Keys packs[kPacks];

  __device__ Tile(const Row& row, int32_t first) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) packs[p] = row.load(first + p * kPackStride);
  }
};

// Where a row is cut: all that is larger than `key` is taken, and the first `ties` of those that are equal.
struct Cut {
  int32_t key;
  int32_t ties;
};

struct Shared {
  uint32_t histogram[kDigits];
  int32_t partial[kWarp];
  Cut cut;
  uint32_t warp_counts[2][kWarps];
};

// Adds up what the bits from `shift` on, up to those that are decided, are in keys that begin like `cut`.
__device__ void count_digits(Shared& shared, const Row& row, int32_t cut, int32_t decided, int shift) {
  const int32_t mask = (INT32_MAX ^ decided) >> shift;
  for (int32_t t = 0, first = row.first; t < row.tiles; ++t, first += kTile) {
    const Tile tile(row, first);
#pragma unroll
    for (int i = 0; i < kPacks * Keys::kSize; ++i) {
      const int32_t key = key_of(tile.packs[i / Keys::kSize].values[i % Keys::kSize]);
      if ((key & decided) == cut) atomicAdd(&shared.histogram[key >> shift & mask], 1);
    }
  }
}

// The cut that takes `size` entries, 0 < size < row.count. Zeros beyond the row's ends are counted too, below all that
// matters.
__device__ Cut find_cut(Shared& shared, const Row& row, int32_t size) {
  Cut cut{0, size};
  int32_t decided = 0;
  for (int shift = kKeyBits; shift > 0;) {
    shift = max(shift - kDigitBits, 0);
    for (int i = threadIdx.x; i < kDigits; i += kThreads) shared.histogram[i] = 0;
    __syncthreads();
    count_digits(shared, row, cut.key, decided, shift);
    __syncthreads();
    // A thread adds up two digits; the first thread has the largest.
    const int32_t high = kDigits - 1 - 2 * threadIdx.x, low = high - 1;
    const int32_t high_count = shared.histogram[high], count = high_count + shared.histogram[low];
    const int32_t above = block_sums(shared.partial, count).before;
    if (above < cut.ties && cut.ties <= above + count) {
      const bool in_high = cut.ties <= above + high_count;
      shared.cut = {cut.key | (in_high ? high : low) << shift, cut.ties - above - (in_high ? 0 : high_count)};
    }
    __syncthreads();
    cut = shared.cut;
    decided = INT32_MAX >> shift << shift;
  }
  return cut;
}

// Which sums of a lane's tile are taken or tie: a bit each.
struct Found {
  uint32_t larger = 0, equal = 0;

  __device__ Found(const Row& row, const Tile& tile, int32_t first, int32_t cut) {
#pragma unroll
    for (int i = 0; i < kPacks * Keys::kSize; ++i) {
      const int32_t key = key_of(tile.packs[i / Keys::kSize].values[i % Keys::kSize]);
      if (key > cut) larger |= 1u << i;
      if (key == cut) equal |= 1u << i;
    }
    for (uint32_t rest = equal; rest != 0; rest &= rest - 1) {
      const int i = __ffs(rest) - 1;
      if (!row.holds(first + i / Keys::kSize * kPackStride + i % Keys::kSize)) equal ^= 1u << i;
    }
  }

  __device__ static uint32_t of_pack(uint32_t bits, int pack) { return bits >> (pack * Keys::kSize) & 0xF; }
};

// Writes the indices that `cut` takes, ascending.
__device__ void compact(Shared& shared, const Row& row, Cut cut, int32_t* out) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int32_t larger_before = 0, equal_before = 0;  // in earlier tiles
  Tile tile(row, row.first);
  for (int32_t t = 0, first = row.first; t < row.tiles; ++t, first += kTile) {
    const Found found(row, tile, first, cut.key);
    tile = Tile(row, first + kTile);  // on its way during the rest
    // A byte a pack: at most 128 of a warp's pack are larger, or equal.
    uint32_t larger = 0, equal = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      larger |= __popc(Found::of_pack(found.larger, p)) << (8 * p);
      equal |= __popc(Found::of_pack(found.equal, p)) << (8 * p);
    }
    const uint32_t larger_through = inclusive_warp_sum(larger), equal_through = inclusive_warp_sum(equal);
    const uint32_t all_larger = __shfl_sync(kAllLanes, larger_through, kWarp - 1);
    const uint32_t all_equal = __shfl_sync(kAllLanes, equal_through, kWarp - 1);
    int32_t warp_larger = 0, warp_equal = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      warp_larger += all_larger >> (8 * p) & 0xFF;
      warp_equal += all_equal >> (8 * p) & 0xFF;
    }
    // Two sets of counts, so that one barrier a tile is enough: nobody writes a set that another warp still reads.
    if (lane == 0) shared.warp_counts[t % 2][warp] = warp_larger | warp_equal << 16;
    __syncthreads();
    const uint32_t counts = shared.warp_counts[t % 2][lane], counts_through = inclusive_warp_sum(counts);
    const uint32_t counts_before = __shfl_sync(kAllLanes, counts_through - counts, warp);
    const uint32_t tile_counts = __shfl_sync(kAllLanes, counts_through, kWarp - 1);
    int32_t pack_larger = larger_before + (counts_before & 0xFFFF), pack_equal = equal_before + (counts_before >> 16);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      int32_t taken = pack_larger + ((larger_through - larger) >> (8 * p) & 0xFF);
      int32_t tied = pack_equal + ((equal_through - equal) >> (8 * p) & 0xFF);
      const uint32_t larger_bits = Found::of_pack(found.larger, p);
      for (uint32_t rest = larger_bits | Found::of_pack(found.equal, p); rest != 0; rest &= rest - 1) {
        const int i = __ffs(rest) - 1;
        const int32_t index = first + p * kPackStride + i;
        if (larger_bits >> i & 1) {
          out[taken++ + min(tied, cut.ties)] = index;
        } else {
          if (tied < cut.ties) out[taken + tied] = index;
          ++tied;
        }
      }
      pack_larger += all_larger >> (8 * p) & 0xFF;
      pack_equal += all_equal >> (8 * p) & 0xFF;
    }
    larger_before += tile_counts & 0xFFFF;
    equal_before += tile_counts >> 16;
  }
}

__global__ void __launch_bounds__(kThreads) select_rows(const qwen1m_select_critical a) {
  __shared__ Shared shared;
  const int32_t line = blockIdx.x;
  const bool diagonals = line >= a.heads;
  const int64_t head = line % a.heads;
  const Row row((diagonals ? a.slash : a.vertical) + head * a.keys, a.keys,
                diagonals ? max(0, a.keys - a.forced_diagonals) : 0, diagonals ? a.keys : a.forced_columns);
  const int32_t width = diagonals ? a.slash_width : a.column_width;
  const int32_t size = max(0, min((diagonals ? a.slash_sizes : a.vertical_sizes)[head], min(a.keys, width)));
  int32_t* out = (diagonals ? a.slashes : a.columns) + head * width;
  if (size == a.keys) {
    for (int32_t i = threadIdx.x; i < size; i += kThreads) out[i] = i;
  } else if (size > 0) {
    compact(shared, row, find_cut(shared, row, size), out);
  }
  for (int32_t i = size + threadIdx.x; i < width; i += kThreads) out[i] = INT_MAX;
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

int qwen1m_cuda_select_critical(const qwen1m_select_critical* a, qwen1m_stream stream) {
  using namespace qwen1m::cuda;
  select_rows<<<2 * a->heads, kThreads, 0, as_stream(stream)>>>(*a);
  return cudaGetLastError();
}
