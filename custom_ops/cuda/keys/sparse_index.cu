// From selected columns and diagonals to what each row block visits: blocks of keys and single columns, per stage.
//
// A diagonal t (the key it hits on the piece's last row) crosses, in the row block whose first row is `start`, the
// `block` keys that end at t + start + block - rows + 1. In ascending order such ranges are covered greedily by blocks
// (spec section 6), and a column is listed by itself where no block covers it. The blocks do not depend on the columns:
//
//   list_blocks   a lane a row block. Measured from the diagonals, whose keys move with the row block, most row blocks'
//                 blocks end at the same places: the warp finds the next diagonal once for all lanes that stand there.
//   list_columns  a warp a row block. Its lanes look 32 columns at a time up in the blocks.
#include <climits>

#include "common.cuh"
#include "qwen1m/dca_stages.h"
#include "qwen1m/keys.h"

namespace qwen1m {
namespace cuda {
namespace {

constexpr int kFallback = 5;     // entries that keep a stage without any from being empty (spec section 5.5)
constexpr int kColumnWarps = 8;  // of a block of list_columns

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

// Ascending diagonals as a warp reads them: 32 at once, a diagonal a lane, and the 32 behind them under way.
class DiagonalWindow {
 public:
  __device__ DiagonalWindow(const Lines& lines, int32_t first) : lines_(lines), base_(first) {
    these_ = entry(base_);
    following_ = entry(base_ + kWarp);
  }

  // The first diagonal above `place`, which ascends from call to call; INT_MAX for none. The same in all lanes.
  __device__ int32_t above(int32_t place) {
    for (;;) {
      const unsigned found = __ballot_sync(kAllLanes, these_ > place);
      if (found != 0) return __shfl_sync(kAllLanes, these_, __ffs(found) - 1);
      base_ += kWarp;
      these_ = following_;
      following_ = entry(base_ + kWarp);
    }
  }

 private:
  __device__ int32_t entry(int32_t first) const {
    const int32_t i = first + static_cast<int32_t>(threadIdx.x % kWarp);
    return i < lines_.count ? lines_[i] : INT_MAX;
  }

  const Lines lines_;
  int32_t base_, these_, following_;
};

// Covers the ranges of `diagonals`, a diagonal t's range ending at t + shift, by blocks of one stage. A range that
// begins left of the stage counts as its first block. Without a range, intra visits the keys from row_block_end on
// (spec section 6, which masks them). Returns the number of blocks. All lanes of the warp call it, each with a shift of
// its own; those with `listing` false list nothing.
__device__ int32_t cover(const Lines& diagonals, int32_t shift, Stage stage, Span keys, int32_t row_block_end,
                         int32_t block, bool listing, int32_t* blocks) {
  const int32_t at = min(first_above(diagonals, 0, diagonals.count, keys.begin - shift), diagonals.count - 1);
  const int32_t diagonal = diagonals[at];
  int32_t begin = max(diagonal + shift - block, keys.begin);
  if (diagonal + shift < keys.begin) begin = stage == kIntra ? row_block_end : keys.end;
  DiagonalWindow window(diagonals, __reduce_min_sync(kAllLanes, at));
  int32_t count = 0;
  // Where this lane's block ends, measured from the diagonals; INT_MAX when the lane is through.
  int32_t place = listing && begin < keys.end ? begin + block - shift : INT_MAX;
  for (;;) {
    const int32_t nearest = __reduce_min_sync(kAllLanes, place);
    if (nearest == INT_MAX) break;
    const int32_t next = window.above(nearest);
    if (place != nearest) continue;
    blocks[count++] = begin;
    place = INT_MAX;
    if (next == INT_MAX) continue;
    begin = max(next + shift - block, begin + block);
    if (begin < keys.end) place = begin + block - shift;
  }
  return count;
}

__global__ void __launch_bounds__(kWarp) list_blocks(const qwen1m_sparse_index a, int32_t row_blocks) {
  const int32_t row_block = blockIdx.x * kWarp + threadIdx.x, start = row_block * a.block;
  const bool exists = row_block < row_blocks;
  const int64_t head = blockIdx.y, entry = head * row_blocks + min(row_block, row_blocks - 1);
  const int32_t* slashes = a.slashes + head * a.selected_slashes;
  int32_t* blocks = a.tables.blocks + entry * a.tables.block_width;
  int32_t* counts = a.tables.counts + entry * 2 * kStages;
  for (int s = kInter; s >= kIntra; --s) {
    const Stage stage = static_cast<Stage>(s);
    const Span keys = stage_keys(stage, a.begin + a.rows - 1, a.chunk_len);
    int32_t count = 0;
    if (keys.begin < keys.end) {
      const Lines diagonals = stage_diagonals(slashes, a.selected_slashes, stage, keys, a.rows);
      count = cover(diagonals, start + a.block - a.rows + 1, stage, keys, a.begin + start + a.block, a.block, exists,
                    blocks);
    }
    if (exists) counts[stage] = count;
    blocks += count;
  }
}

// Lists the columns that no block covers; intra has none beyond its last block. Returns their number, in all lanes.
__device__ int32_t list_uncovered(const Lines& columns, const int32_t* blocks, int32_t num_blocks, Stage stage,
                                  int32_t block, int32_t* out) {
  const int lane = threadIdx.x % kWarp;
  const int32_t end = stage == kIntra && num_blocks > 0 ? __ldg(blocks + num_blocks - 1) + block : INT_MAX;
  int32_t count = 0;
  int32_t passed = 0;  // blocks that begin at or before the columns so far
  for (int32_t i = 0; i < columns.count; i += kWarp) {
    const int32_t column = columns[min(i + lane, columns.count - 1)];
    const int32_t last = __shfl_sync(kAllLanes, column, kWarp - 1);
    int32_t before = passed;
    if (passed < num_blocks && __ldg(blocks + passed) <= last) before = first_above(blocks, passed, num_blocks, column);
    const bool covered = before > 0 && column < __ldg(blocks + before - 1) + block;
    const bool listed = i + lane < columns.count && !covered && column < end;
    const unsigned listing = __ballot_sync(kAllLanes, listed);
    if (listed) out[count + __popc(listing & ((1u << lane) - 1))] = column;
    count += __popc(listing);
    passed = __shfl_sync(kAllLanes, before, kWarp - 1);
  }
  return count;
}

__global__ void __launch_bounds__(kColumnWarps* kWarp) list_columns(const qwen1m_sparse_index a, int32_t row_blocks) {
  const int32_t row_block = blockIdx.x * kColumnWarps + threadIdx.x / kWarp;
  if (row_block >= row_blocks) return;
  const int64_t head = blockIdx.y, entry = head * row_blocks + row_block;
  const int32_t* columns = a.columns + head * a.selected_columns;
  const int32_t* blocks = a.tables.blocks + entry * a.tables.block_width;
  int32_t* out = a.tables.columns + entry * a.tables.column_width;
  int32_t* counts = a.tables.counts + entry * 2 * kStages;
  for (int s = kInter; s >= kIntra; --s) {
    const Stage stage = static_cast<Stage>(s);
    const Span keys = stage_keys(stage, a.begin + a.rows - 1, a.chunk_len);
    const int32_t num_blocks = counts[stage];
    int32_t count = 0;
    if (keys.begin < keys.end) {
      const Lines lines = stage_columns(columns, a.selected_columns, keys);
      count = list_uncovered(lines, blocks, num_blocks, stage, a.block, out);
    }
    if (threadIdx.x % kWarp == 0) counts[kStages + stage] = count;
    blocks += num_blocks;
    out += count;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

int qwen1m_cuda_sparse_index(const qwen1m_sparse_index* a, qwen1m_stream stream) {
  using namespace qwen1m::cuda;
  const int32_t row_blocks = ceil_div(a->rows, a->block);
  list_blocks<<<dim3(ceil_div(row_blocks, kWarp), a->heads), kWarp, 0, as_stream(stream)>>>(*a, row_blocks);
  list_columns<<<dim3(ceil_div(row_blocks, kColumnWarps), a->heads), kColumnWarps * kWarp, 0, as_stream(stream)>>>(
      *a, row_blocks);
  return cudaGetLastError();
}
