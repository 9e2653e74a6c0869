// Dense dual chunk attention: tiles of 64 consecutive keys of each stage, whole pages at a time.
#include "prefill_tile.cuh"

namespace qwen1m {
namespace cuda {
namespace sm80 {

namespace {

constexpr int kMaxPieces = 64;  // of one launch; they travel as kernel parameters

struct DenseArguments : qwen1m_dca_prefill {
  qwen1m_piece piece[kMaxPieces];  // unless on_device

  __device__ const qwen1m_piece& piece_at(int p) const { return on_device ? pieces[p] : piece[p]; }
};

struct DenseWalk {
  static constexpr int kWarps = 4, kRing = 3, kBlocks = 2, kTileRows = kWarps * kWarpRows;
  using Arguments = DenseArguments;
  struct alignas(256) Shared {
    int64_t first_row;
  };

  const Arguments& a;
  Shared& shared;
  int count;
  int32_t begin;
  float scale;
  Pages pages;

  __device__ DenseWalk(const Arguments& arguments, Shared& shared_memory)
      : a(arguments), shared(shared_memory), count(0), scale(0), pages(nullptr, arguments.cache.page_size) {
    // The last rows see the most keys: they go first.
    int tile = gridDim.x - 1 - blockIdx.x;
    for (int p = 0; p < a.num_pieces; ++p) {
      const qwen1m_piece& piece = a.piece_at(p);
      const int tiles = (piece.rows + kTileRows - 1) / kTileRows;
      if (tile < tiles) {
        count = min(piece.rows - tile * kTileRows, kTileRows);
        begin = piece.begin + tile * kTileRows;
        if (threadIdx.x == 0) shared.first_row = piece.row + tile * kTileRows;
        scale = a.scale[piece.sequence];
        pages.table = a.block_tables + static_cast<int64_t>(piece.sequence) * a.table_width;
        __syncthreads();
        return;
      }
      tile -= tiles;
    }
  }

  __device__ int head() const { return block_y(); }
  __device__ int rows() const { return count; }
  __device__ int64_t first_row() const { return shared.first_row; }

  Span span;
  int64_t even_slot, odd_slot;  // where the even and the odd tile that are loaded next begin

  __device__ int stage(Stage stage) {
    span = stage_keys(stage, anew(begin + count - 1), a.chunk_len);
    const int tiles = (span.end - span.begin + kTileKeys - 1) / kTileKeys;
    prefetch(0, tiles);
    prefetch(1, tiles);
    return tiles;
  }

  // A stage begins at a page's border, and pages hold a multiple of kTileKeys keys.
  template <typename T, int D>
  __device__ void load(int tile, const T* pool, uint32_t shared) const {
    const int64_t cache_row = static_cast<int64_t>(a.cache.kv_heads) * D;
    const T* first = pool + (tile % 2 ? odd_slot : even_slot) * cache_row;
    load_rows<T, D, kTileKeys, kWarps * kWarp>(shared, first, cache_row, 0, span.end - position(tile, 0));
  }
  __device__ int32_t position(int tile, int column) const { return span.begin + tile * kTileKeys + column; }
  __device__ bool needs_mask(Stage stage, int tile) const {
    return stage == kIntra && position(tile, kTileKeys - 1) > begin;
  }

  __device__ void prefetch(int tile, int tiles) {
    if (tile < tiles) (tile % 2 ? odd_slot : even_slot) = pages.slot(span.begin + tile * kTileKeys);
  }
  __device__ void publish(int, int) {}
};

}  // namespace

template <typename T, int D>
int dca_prefill(const qwen1m_dca_prefill& a, qwen1m_stream stream) {
  if (a.on_device) {  // as many tiles as the rows can come to in so many pieces
    const int64_t tiles = ceil_div(a.tokens, DenseWalk::kTileRows) + a.num_pieces - 1;
    return launch_prefill<T, D, DenseWalk>(DenseArguments{a, {}}, dim3(static_cast<unsigned>(tiles), a.heads), stream);
  }
  for (int first = 0; first < a.num_pieces; first += kMaxPieces) {
    DenseArguments arguments{a, {}};
    arguments.num_pieces = a.num_pieces - first < kMaxPieces ? a.num_pieces - first : kMaxPieces;
    int64_t tiles = 0;
    for (int p = 0; p < arguments.num_pieces; ++p) {
      arguments.piece[p] = a.pieces[first + p];
      tiles += ceil_div(arguments.piece[p].rows, DenseWalk::kTileRows);
    }
    const dim3 grid(static_cast<unsigned>(tiles), a.heads);
    const int status = launch_prefill<T, D, DenseWalk>(arguments, grid, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

QWEN1M_INSTANTIATE(dca_prefill, (const qwen1m_dca_prefill&, qwen1m_stream));

}  // namespace sm80
}  // namespace cuda
}  // namespace qwen1m
