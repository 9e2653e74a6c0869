// From selected columns and diagonals to what each row block visits: blocks of keys and single columns, per stage.
//
// A diagonal t (the key it hits on the piece's last row) crosses, in the row block whose first row is `start`, the
// `block` keys that end at t + start + block - rows + 1. In ascending order such ranges are covered greedily by
// blocks, and a column is listed by itself where no block covers it. The blocks do not depend on the columns.
//
// Measured from the diagonals, whose keys move with the row block, the greedy cover is the same chain of block ends in
// every row block, once a row block's own chain, which begins where the stage does, has met it:
//
//   chain_blocks    a head's chain in a stage. The first block end that is not left of a diagonal is less than a block
//                   behind it: from each such end the chain is walked through the next 64 diagonals, all at once, and
//                   then only looked up from one 64 to the next
//   lay_out_columns a head's columns, by stages
//   list_row_blocks a warp a row block: its own chain up to where it meets the head's, whose rest it copies. Of the
//                   columns it lists all but those that its blocks cover. Its neighbours' blocks of the same end in the
//                   chain lie side by side, so that it is looked up once for all of them which columns these cover
#include <climits>

#include "block_scan.cuh"
#include "qwen1m/dca_stages.h"
#include "qwen1m/keys.h"

namespace qwen1m {
namespace cuda {
namespace {

constexpr int kFallback = 5;    // entries that keep a stage without any from being empty
constexpr int kSegment = 64;    // diagonals that a thread walks a chain through
constexpr int kLookups = 6144;  // ends that chains are walked from at once
constexpr int kMostSegments = kLookups / kSegment;
constexpr int kListWarps = 8;  // of a block of list_row_blocks
constexpr int kColumnsAtOnce = 16384, kWordsAtOnce = kColumnsAtOnce / kWarp;

// Ascending absolute columns or diagonals: a part of a head's list, or evenly spread ones.
struct Lines {
  const int32_t* list;  // null: first, first + step, ...
  int32_t first, step, count;

  __device__ int32_t operator[](int32_t i) const { return list != nullptr ? __ldg(list + i) : first + i * step; }
};

// The first of from .. to - 1 whose value is above `value`, or `to`. Values ascend.
template <typename Values>
__device__ int32_t first_above(const Values& values, int32_t from, int32_t to, int32_t value) {
  while (from < to) {
    const int32_t middle = (from + to) >> 1;
    if (values[middle] > value) {
      to = middle;
    } else {
      from = middle + 1;
    }
  }
  return from;
}

// The columns of one stage.
__device__ Lines stage_columns(const int32_t* columns, int32_t count, Span keys) {
  const int32_t from = first_above(columns, 0, count, keys.begin - 1);
  const int32_t to = first_above(columns, from, count, keys.end - 1);
  if (from < to) return {columns + from, 0, 0, to - from};
  const int32_t length = keys.end - keys.begin;
  return {nullptr, keys.begin, max(1, length / kFallback), min(length, kFallback)};
}

// The diagonals of one stage: a diagonal that hits a later stage on the last row passes through this one before.
__device__ Lines stage_diagonals(const int32_t* slashes, int32_t count, Stage stage, Span keys, int32_t rows) {
  const int32_t end = stage == kIntra ? keys.end : keys.end + rows;
  const int32_t from = first_above(slashes, 0, count, keys.begin - 1);
  const int32_t to = first_above(slashes, from, count, end - 1);
  if (from < to) return {slashes + from, 0, 0, to - from};
  const int32_t length = keys.end - keys.begin;
  const int32_t step = max(1, length / kFallback), entries = min(length, kFallback);
  return {nullptr, end - 1 - (entries - 1) * step, step, entries};
}

static_assert(QWEN1M_CHAIN_WIDTH(0) == 1 + kFallback);

// Of a head in a stage, behind its length.
__device__ int32_t* chain_of(const qwen1m_sparse_index& a, int64_t head, int stage) {
  return a.chains + (head * kStages + stage) * QWEN1M_CHAIN_WIDTH(a.selected_slashes) + 1;
}

// The ends of blocks from `end` on, which is not left of the diagonal at `first`, nor a block right of it: f(end) for
// those left of the one at `last`. Returns how far the next one lies behind that.
template <typename F>
__device__ int32_t walk_chain(const int32_t* first, const int32_t* last, int32_t end, int32_t block, F&& f) {
  for (const int32_t* diagonal = first; end < *last; end = max(*diagonal, end + block)) {
    f(end);
    while (diagonal < last && *diagonal <= end) ++diagonal;
  }
  return end - *last;
}

__global__ void __launch_bounds__(kScanThreads) chain_blocks(const qwen1m_sparse_index a) {
  __shared__ int32_t partial[kWarp];
  __shared__ int32_t near[kLookups + 1];  // diagonals of all segments, and the one behind them
  __shared__ uint16_t arrival[kLookups];  // [segments, block]: where a chain enters the next segment, by where this one
  __shared__ int32_t entry[kMostSegments + 1];
  const Stage stage = static_cast<Stage>(blockIdx.x);
  const int32_t thread = threadIdx.x;
  const Span keys = stage_keys(stage, a.begin + a.rows - 1, a.chunk_len);
  if (keys.begin >= keys.end) return;
  const int32_t* slashes = a.slashes + static_cast<int64_t>(blockIdx.y) * a.selected_slashes;
  const Lines diagonals = stage_diagonals(slashes, a.selected_slashes, stage, keys, a.rows);
  const int32_t all_segments = (diagonals.count + kSegment - 1) / kSegment;
  const int32_t at_once = min(kLookups / a.block, kMostSegments);
  int32_t* ends = chain_of(a, blockIdx.y, stage);
  if (thread == 0) entry[0] = 0;
  int32_t listed = 0;
  for (int32_t first = 0; first < all_segments; first += at_once) {
    const int32_t segments = min(at_once, all_segments - first), before = first * kSegment;
    for (int32_t i = thread; i <= segments * kSegment; i += kScanThreads) {
      near[i] = before + i < diagonals.count ? diagonals[before + i] : INT_MAX;
    }
    __syncthreads();
    const auto walk = [&](int32_t segment, int32_t offset, auto&& f) {
      const int32_t* from = near + segment * kSegment;
      return walk_chain(from, from + min(kSegment, diagonals.count - before - segment * kSegment), *from + offset,
                        a.block, f);
    };
    for (int32_t i = thread; i < segments * a.block; i += kScanThreads) {
      arrival[i] = static_cast<uint16_t>(walk(i / a.block, i % a.block, [](int32_t) {}));
    }
    __syncthreads();
    if (thread == 0) {
      for (int32_t s = 0; s < segments; ++s) entry[s + 1] = arrival[s * a.block + entry[s]];
    }
    __syncthreads();
    int32_t count = 0;
    if (thread < segments) walk(thread, entry[thread], [&](int32_t) { ++count; });
    const Sums<int32_t> sums = block_sums(partial, count);
    int32_t* out = ends + listed + sums.before;
    if (thread < segments) walk(thread, entry[thread], [&](int32_t end) { *out++ = end; });
    listed += sums.total;
    __syncthreads();
    if (thread == 0) entry[0] = entry[segments];
    __syncthreads();
  }
  if (thread == 0) ends[-1] = listed;
}

// first_above for a warp whose lanes all ask the same.
template <typename Values>
__device__ int32_t warp_first_above(const Values& values, int32_t from, int32_t to, int32_t value) {
  const int lane = threadIdx.x % kWarp;
  while (to - from > kWarp) {
    const int32_t stride = (to - from) / kWarp;
    const unsigned above = __ballot_sync(kAllLanes, values[from + (lane + 1) * stride - 1] > value);
    if (above == 0) {
      from += kWarp * stride;
    } else {
      from += (__ffs(above) - 1) * stride;
      to = from + stride - 1;
    }
  }
  const unsigned above = __ballot_sync(kAllLanes, from + lane < to && values[min(from + lane, to - 1)] > value);
  return above != 0 ? from + __ffs(above) - 1 : to;
}

// The same where the answer is most likely among the next 32.
template <typename Values>
__device__ int32_t warp_next_above(const Values& values, int32_t from, int32_t to, int32_t value) {
  const int32_t near = warp_first_above(values, from, min(from + kWarp, to), value);
  return near < min(from + kWarp, to) ? near : warp_first_above(values, near, to, value);
}

// The blocks of a row block in a stage: `own` of them by themselves, in `listed`, then entries of the head's chain.
struct Cover {
  const int32_t *listed, *chain;  // the chain from the first that counts on
  int32_t own, count, shift;      // from a block's end in the chain to its first key

  __device__ int32_t operator[](int32_t i) const { return i < own ? listed[i] : __ldg(chain + i - own) + shift; }
};

// Lists the blocks that cover the ranges of `diagonals`, a diagonal t's range ending at t + shift. A range that begins
// left of the stage counts as its first block. Without a range, intra visits the keys from row_block_end on,
// which are masked. All lanes of the warp call it.
__device__ Cover cover(const Lines& diagonals, const int32_t* chain, int32_t length, int32_t shift, Stage stage,
                       Span keys, int32_t row_block_end, int32_t block, int32_t* blocks) {
  const int lane = threadIdx.x % kWarp;
  const int32_t edge = keys.begin - shift, to_key = shift - block, limit = keys.end - to_key;
  const auto list = [&](int32_t number, int32_t first) {
    if (lane == 0) blocks[number] = first;
  };
  int32_t at = warp_first_above(diagonals, 0, diagonals.count, edge);
  Cover cover{blocks, chain, 0, 0, to_key};
  if (at == diagonals.count) {
    const int32_t first = diagonals[at - 1] == edge ? keys.begin : stage == kIntra ? row_block_end : keys.end;
    if (first < keys.end) list(cover.own++, first);
    cover.count = cover.own;
    return cover;
  }
  const Lines ends{chain, 0, 0, length};
  int32_t met = 0, end = max(diagonals[at], edge + block);
  while (end < limit) {
    met = warp_next_above(ends, met, length, end - 1);
    if (met < length && ends[met] == end) {
      const int32_t rest = warp_first_above(ends, met, length, limit - 1) - met;
#pragma unroll 4
      for (int32_t i = lane; i < rest; i += kWarp) blocks[cover.own + i] = ends[met + i] + to_key;
      cover.chain = chain + met;
      cover.count = cover.own + rest;
      return cover;
    }
    list(cover.own++, end + to_key);
    at = warp_next_above(diagonals, at, diagonals.count, end);
    if (at == diagonals.count) break;
    end = max(diagonals[at], end + block);
  }
  cover.count = cover.own;
  return cover;
}

// What covers a row block's keys in a stage, for the warps that look columns up.
struct RowBlockCover {
  const int32_t* listed;  // blocks of its own
  int32_t own;
  int32_t chain_begin;  // from this key on the chain's blocks are its
  int32_t to_key;       // from a block's end in the chain to its first key
  int32_t end;          // columns from here on are not listed
};

__global__ void __launch_bounds__(kScanThreads) lay_out_columns(const qwen1m_sparse_index a) {
  const int64_t head = blockIdx.x;
  const int32_t* selected = a.columns + head * a.selected_columns;
  int32_t* out = a.tables.columns + head * a.tables.column_width;
  for (int s = kInter; s >= kIntra; --s) {
    const Span keys = stage_keys(static_cast<Stage>(s), a.begin + a.rows - 1, a.chunk_len);
    const Lines columns =
        keys.begin < keys.end ? stage_columns(selected, a.selected_columns, keys) : Lines{nullptr, 0, 0, 0};
    const int32_t width = whole_groups(columns.count);
    for (int32_t i = threadIdx.x; i < width; i += kScanThreads) out[i] = i < columns.count ? columns[i] : INT_MAX;
    out += width;
    if (threadIdx.x == 0) a.tables.column_counts[head * kStages + s] = columns.count;
  }
}

struct ListShared {
  RowBlockCover covers[kListWarps];
  uint32_t listed[kListWarps][kWordsAtOnce];  // a bit a column
};

// Says which of a stage's columns no block covers, for the row blocks of all warps. `bits` are those of this warp's, or
// null where there is none; returns its number of them in all lanes.
__device__ int32_t list_uncovered(ListShared& shared, const Lines& columns, const Lines& chain, int32_t block,
                                  uint32_t* bits) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, shift = 31 - __clz(block);
  const RowBlockCover& own = shared.covers[warp];
  int32_t count = 0;
  for (int32_t first = 0; first < columns.count; first += kColumnsAtOnce) {
    const Lines here{columns.list + first, 0, 0, min(columns.count - first, kColumnsAtOnce)};
    const int32_t words = whole_groups(here.count) / kWarp;
    const int32_t seen = warp_first_above(here, 0, here.count, own.end - 1);
    for (int32_t word = lane; word < words; word += kWarp) {
      const int32_t bits_left = seen - word * kWarp;
      shared.listed[warp][word] = bits_left >= kWarp ? kAllLanes : bits_left > 0 ? (1u << bits_left) - 1 : 0;
    }
    __syncthreads();
    // Strikes out what lies in the block at `key`, and side by side with it in those of `row_blocks` from one on.
    const auto strike = [&](int32_t key, int row_blocks, auto&& row_block_of) {
      for (int32_t i = first_above(here, 0, here.count, key - 1); i < here.count; ++i) {
        const int32_t column = here[i], beside = (column - key) >> shift;
        if (beside >= row_blocks) break;
        const int row_block = row_block_of(beside, column);
        if (row_block >= 0) atomicAnd(&shared.listed[row_block][i / kWarp], ~(1u << i % kWarp));
      }
    };
    for (int32_t i = lane; i < own.own; i += kWarp) {
      strike(own.listed[i], 1, [&](int, int32_t) { return warp; });
    }
    for (int32_t i = threadIdx.x; i < chain.count; i += kListWarps * kWarp) {
      strike(chain[i] + shared.covers[0].to_key, kListWarps, [&](int row_block, int32_t column) {
        return column >= shared.covers[row_block].chain_begin ? row_block : -1;
      });
    }
    __syncthreads();
    for (int32_t word = lane; bits != nullptr && word < words; word += kWarp) {
      const uint32_t listed = shared.listed[warp][word];
      bits[first / kWarp + word] = listed;
      count += __popc(listed);
    }
  }
  return __reduce_add_sync(kAllLanes, count);
}

__global__ void __launch_bounds__(kListWarps* kWarp) list_row_blocks(const qwen1m_sparse_index a) {
  __shared__ ListShared shared;
  const int warp = threadIdx.x / kWarp;
  const int32_t number = blockIdx.x * kListWarps + warp, start = (a.first_block + number) * a.block;
  const bool exists = number < a.num_blocks;
  const int64_t head = blockIdx.y, entry = head * a.num_blocks + min(number, a.num_blocks - 1);
  const int32_t* columns = a.tables.columns + head * a.tables.column_width;
  const int32_t* slashes = a.slashes + head * a.selected_slashes;
  int32_t* blocks = a.tables.blocks + entry * a.tables.block_width;
  int32_t* counts = a.tables.counts + entry * 2 * kStages;
  uint32_t* bits = a.tables.listed + entry * (a.tables.column_width / kWarp);
  for (int s = kInter; s >= kIntra; --s) {
    const Stage stage = static_cast<Stage>(s);
    const Span keys = stage_keys(stage, a.begin + a.rows - 1, a.chunk_len);
    int32_t num_blocks = 0, num_columns = 0;
    if (keys.begin < keys.end) {
      const Lines diagonals = stage_diagonals(slashes, a.selected_slashes, stage, keys, a.rows);
      const int32_t* chain = chain_of(a, head, s);
      const int32_t length = chain[-1], shift = start + a.block - a.rows + 1;
      // No column is listed where no row block is.
      RowBlockCover covering{blocks, 0, INT_MAX, shift - a.block, 0};
      if (exists) {
        const Cover own =
            cover(diagonals, chain, length, shift, stage, keys, a.begin + start + a.block, a.block, blocks);
        __syncwarp();
        num_blocks = own.count;
        covering.own = own.own;
        if (own.count > own.own) covering.chain_begin = own[own.own];
        // Intra has no columns beyond its last block.
        covering.end = stage == kIntra && own.count > 0 ? own[own.count - 1] + a.block : INT_MAX;
      }
      __syncthreads();  // all have done with the stage before
      if (threadIdx.x % kWarp == 0) shared.covers[warp] = covering;
      __syncthreads();
      const int32_t of_stage = a.tables.column_counts[head * kStages + s];
      num_columns = list_uncovered(shared, Lines{columns, 0, 0, of_stage}, Lines{chain, 0, 0, length}, a.block,
                                   exists ? bits : nullptr);
      columns += whole_groups(of_stage);
      bits += whole_groups(of_stage) / kWarp;
    }
    if (exists && threadIdx.x % kWarp == 0) {
      counts[stage] = num_blocks;
      counts[kStages + stage] = num_columns;
    }
    blocks += num_blocks;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

int qwen1m_cuda_index_chains(const qwen1m_sparse_index* a, qwen1m_stream stream) {
  using namespace qwen1m;
  using namespace qwen1m::cuda;
  chain_blocks<<<dim3(kStages, a->heads), kScanThreads, 0, as_stream(stream)>>>(*a);
  return cudaGetLastError();
}

int64_t qwen1m_cuda_sparse_index_workspace(const qwen1m_sparse_index* a) {
  const int64_t width = QWEN1M_CHAIN_WIDTH(a->selected_slashes);
  return a->chains != nullptr ? 0 : a->heads * qwen1m::kStages * width * static_cast<int64_t>(sizeof(int32_t));
}

int qwen1m_cuda_sparse_index(const qwen1m_sparse_index* a, void* workspace, qwen1m_stream stream) {
  using namespace qwen1m;
  using namespace qwen1m::cuda;
  if (a->num_blocks == 0) return cudaSuccess;
  qwen1m_sparse_index index = *a;
  if (index.chains == nullptr) {
    index.chains = static_cast<int32_t*>(workspace);
    const int status = qwen1m_cuda_index_chains(&index, stream);
    if (status != cudaSuccess) return status;
  }
  lay_out_columns<<<index.heads, kScanThreads, 0, as_stream(stream)>>>(index);
  const dim3 blocks(ceil_div(index.num_blocks, kListWarps), index.heads);
  list_row_blocks<<<blocks, kListWarps * kWarp, 0, as_stream(stream)>>>(index);
  return cudaGetLastError();
}
