// Sparse dual chunk attention of one piece: a row block's blocks of 64 keys, which start anywhere, then single columns,
// a group of 64 a tile, of which those that it does not visit are masked.
#include "prefill_tile.cuh"

namespace qwen1m {
namespace cuda {
namespace sm80 {

namespace {

constexpr int kLookahead = 4;  // tiles whose keys are known: loading, multiplying, masking, and the one being written

struct SparseWalk {
  static constexpr int kWarps = 2, kRing = 2, kBlocks = 4, kTileRows = kWarps * kWarpRows;
  static_assert(kWarps * kWarp == kTileKeys, "a thread looks up one key of a tile");
  using Arguments = qwen1m_dca_sparse_prefill;
  struct Shared {
    int32_t position[kLookahead][kTileKeys];
    int32_t slot[kLookahead][kTileKeys];
  };

  const Arguments& a;
  Shared& shared;
  int32_t begin;
  float scale;
  Pages pages;

  const int32_t* blocks;
  int32_t column_place, word_place;  // where the stage's columns and their bits begin, in all tables

  __device__ SparseWalk(const Arguments& arguments, Shared& shared_memory)
      : a(arguments),
        shared(shared_memory),
        scale(arguments.scale),
        pages(arguments.block_table, arguments.cache.page_size) {
    begin = a.begin + skipped();
  }

  // Kept by nobody: registers are scarce.
  __device__ int head() const { return ordered_head(a, block_y()); }
  __device__ int skipped() const { return (a.first_block + static_cast<int>(blockIdx.x)) * kTileRows; }
  __device__ int rows() const { return min(a.rows - skipped(), kTileRows); }
  __device__ int64_t entry() const {
    return static_cast<int64_t>(head()) * ((a.rows + kTileRows - 1) / kTileRows) + skipped() / kTileRows;
  }
  __device__ int64_t first_row() const { return a.row + static_cast<int64_t>(skipped()); }

  int num_blocks = 0;  // of the stage
  int32_t limit;       // the stage's keys, and those that a row of this block sees, end here
  int32_t following;   // key of this thread's row, two tiles after the one being multiplied

  __device__ int stage(Stage stage) {
    const int64_t own = entry();
    const int32_t* counts = a.tables.counts + own * 2 * kStages;
    const int32_t* column_counts = a.tables.column_counts + head() * kStages;
    const int32_t first = first_column(column_counts, stage);
    blocks = a.tables.blocks + own * a.tables.block_width;
    for (int before = kInter; before > stage; --before) blocks += counts[before];
    column_place = head() * a.tables.column_width + first;
    word_place = static_cast<int32_t>((own * a.tables.column_width + first) / kWarp);
    num_blocks = counts[stage];
    limit = stage == kIntra ? anew(begin) + rows() : stage_keys(stage, begin, a.chunk_len).end;
    const bool listing = counts[kStages + stage] > 0;
    const int num_columns = listing ? count_below(a.tables.columns + column_place, column_counts[stage], limit) : 0;
    const int tiles = num_blocks + (num_columns + kTileKeys - 1) / kTileKeys;
    __syncthreads();
    prefetch(0, tiles);
    publish(0, tiles);
    prefetch(1, tiles);
    publish(1, tiles);
    __syncthreads();
    return tiles;
  }

  template <typename T, int D>
  __device__ void load(int tile, const T* pool, uint32_t target) const {
    load_slots<T, D, kWarps * kWarp>(target, pool, a.cache.kv_heads * D, shared.slot[tile % kLookahead]);
  }
  __device__ int32_t position(int tile, int column) const { return shared.position[tile % kLookahead][column]; }
  __device__ bool needs_mask(Stage, int tile) const {
    const int lane = threadIdx.x % kWarp;
    return __any_sync(kAllLanes, max(position(tile, lane), position(tile, kWarp + lane)) > begin);
  }

  __device__ void prefetch(int tile, int tiles) {
    if (tile >= tiles) return;
    const int row = threadIdx.x, column = (tile - num_blocks) * kTileKeys + row;
    if (tile < num_blocks) {
      following = __ldg(blocks + tile) + row;
    } else {
      const uint32_t listed = __ldg(a.tables.listed + word_place + column / kWarp);
      following = listed >> column % kWarp & 1 ? __ldg(a.tables.columns + column_place + column) : kNoKey;
    }
    if (following >= limit) following = kNoKey;
  }

  __device__ void publish(int tile, int tiles) {
    if (tile >= tiles) return;
    shared.position[tile % kLookahead][threadIdx.x] = following;
    // In place of no key stands the last one, whose weight the mask makes zero.
    shared.slot[tile % kLookahead][threadIdx.x] = static_cast<int32_t>(pages.slot(min(following, limit - 1)));
  }
};

}  // namespace

template <typename T, int D>
int dca_sparse_prefill(const qwen1m_dca_sparse_prefill& a, qwen1m_stream stream) {
  if (a.num_blocks == 0) return cudaSuccess;
  return launch_prefill<T, D, SparseWalk>(a, dim3(a.num_blocks, a.heads), stream);
}

QWEN1M_INSTANTIATE(dca_sparse_prefill, (const qwen1m_dca_sparse_prefill&, qwen1m_stream));

}  // namespace sm80
}  // namespace cuda
}  // namespace qwen1m
