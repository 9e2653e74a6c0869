// Dense dual chunk attention on Hopper: 128 rows of one head walk over all their keys, 128 at a time, the three stages
// under one online softmax. Few rows over many keys: blocks take a share of the keys each, and where that leaves less
// unused, the heads of a group make up the 128 rows.
//
//   producer   one warp has the copy engine fill rings of key and value tiles, a page lookup every 64 keys, and the
//              rows' rotation of each stage ahead of its use
//   consumers  two warpgroups of 64 rows. One takes the tensor cores for a step (scores of this tile, output of the
//              last one) while the other is at its softmax; they take turns
//
// Blocks stay: each takes work items (heads, a tile of rows, a share of the keys) until none is left.
#include <algorithm>
#include <utility>

#include "attention.cuh"
#include "row_loads.cuh"
#include "rows.cuh"
#include "tensor_map.h"

namespace qwen1m {
namespace cuda {
namespace sm90 {
namespace {

constexpr int kMaxPieces = 64;  // of one launch; they travel as kernel parameters
constexpr int kConsumers = 2, kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kStepKeys = 128, kBoxes = kStepKeys / kBoxRows;  // pages hold whole boxes
constexpr int kRing = 2;                                       // tiles of keys, and of values
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kSectionBytes = 32 << 20;  // of keys and values that blocks share in L2

// How a step is shared out. All of it follows from the step, not from the pieces that are attended to, so that rows do
// not depend on how a piece is cut; but where the pieces are on the device, the shares of a piece are as long as its
// keys need.
struct Split {
  int32_t packed;      // heads whose rows lie one behind the other in a tile
  int32_t share_keys;  // of a share; the next one begins behind them
  int32_t count;       // of shares

  explicit Split(const qwen1m_dca_prefill& a) : packed(1), share_keys(INT32_MAX), count(1) {
    const int group = a.heads / a.cache.kv_heads;
    const int64_t keys = static_cast<int64_t>(a.table_width) * a.cache.page_size, steps = ceil_div(keys, kStepKeys);
    if (a.tokens == 0 || a.tokens > kFewRows) return;
    const auto items = [&](int heads) { return a.heads / heads * ceil_div(a.tokens, kConsumers * (kRows / heads)); };
    const int heads = group <= kRows && items(group) < items(1) ? group : 1;
    const int32_t most = std::min(processors(), kSharedRows / a.tokens);
    const int64_t share_steps = steps_of_share(items(heads), steps, processors(), most);
    if (share_steps >= steps) return;
    packed = heads;
    share_keys = static_cast<int32_t>(share_steps * kStepKeys);
    count = static_cast<int32_t>(ceil_div(steps, share_steps));
  }

  // Of a share, where the keys of all shares are known to end.
  __device__ int32_t keys_of_share(int32_t end) const {
    const int32_t steps = (end + kStepKeys - 1) / kStepKeys;
    return (steps + count - 1) / count * kStepKeys;
  }
};

struct DenseArguments : qwen1m_dca_prefill {
  CUtensorMap query_map, key_map, value_map;
  Split split;
  Shares shares;
  int32_t tiles, section_heads;
  qwen1m_piece piece[kMaxPieces];  // with tiles: unless on_device

  __device__ const qwen1m_piece& piece_at(int p) const { return on_device ? pieces[p] : piece[p]; }
  __host__ __device__ int32_t items_of(int32_t all_tiles) const {
    return all_tiles * (heads / split.packed) * split.count;
  }
};

constexpr int kPanelBytes = kStepKeys * kPanelRowBytes, kBoxBytes = kBoxRows * kPanelRowBytes;

struct alignas(1024) Shared {
  char queries[2][kConsumers][kPanels][kBoxBytes];  // of this stage and the next
  char keys[kRing][kPanels][kPanelBytes];
  char values[kRing][kPanels][kPanelBytes];
  uint64_t query_full[2], query_empty[2];
  uint64_t key_full[kRing], key_empty[kRing];
  uint64_t value_full[kRing], value_empty[kRing];
  uint64_t last_values;  // a tile of values that the producer must complete with zeros has arrived
};

enum NamedBarrier { kTurn = 1 };  // kTurn + consumer: that consumer may take the tensor cores

// Rows [first_row, + rows) of the step, at positions from `begin` on, of heads [head, + packed), and their keys
// [first_key, end_key). A consumer has `tile_rows` of the rows, whose heads are lines of its tile one after the other.
struct Item {
  int head, rows, sequence, share, packed, tile_rows;
  int32_t begin, first_row, first_key, end_key;

  __device__ int32_t begin_of(int consumer) const { return begin + consumer * tile_rows; }
  // How many lines of a consumer's tile are rows.
  __device__ int lines_of(int consumer) const { return packed * min(rows - consumer * tile_rows, tile_rows); }
};

// Of all pieces.
__device__ int32_t count_tiles(const DenseArguments& a) {
  if (!a.on_device) return a.tiles;
  const int item_rows = kConsumers * (kRows / a.split.packed);
  int32_t tiles = 0;
  for (int p = 0; p < a.num_pieces; ++p) tiles += (a.pieces[p].rows + item_rows - 1) / item_rows;
  return tiles;
}

template <bool kShared>
__device__ Item item_of(const DenseArguments& a, int number, int tiles_of_all) {
  Item item;
  item.packed = kShared ? a.split.packed : 1;
  item.tile_rows = kShared ? kRows / a.split.packed : kRows;
  item.first_key = 0, item.end_key = INT32_MAX, item.share = 0;
  int tile;
  if (kShared) {
    // Who reads the same keys goes at the same time.
    const int sets = a.heads / item.packed, rest = number / tiles_of_all;
    tile = number % tiles_of_all;
    item.head = rest % sets * item.packed;
    item.share = rest / sets;
  } else {
    // Longest rows go first. Heads come in sections whose keys and values share L2.
    const int section_items = a.section_heads * tiles_of_all, first_head = number / section_items * a.section_heads;
    const int heads = min(a.section_heads, a.heads - first_head), within = number % section_items;
    item.head = first_head + within % heads;
    tile = tiles_of_all - 1 - within / heads;
  }
  const int item_rows = kConsumers * item.tile_rows;
  int p = 0;
  for (;; ++p) {
    const int tiles = (a.piece_at(p).rows + item_rows - 1) / item_rows;
    if (tile < tiles) break;
    tile -= tiles;
  }
  const qwen1m_piece piece = a.piece_at(p);
  item.rows = min(piece.rows - tile * item_rows, item_rows);
  item.begin = piece.begin + tile * item_rows;
  item.first_row = piece.row + tile * item_rows;
  item.sequence = piece.sequence;
  if (kShared) {
    const int32_t share_keys = a.on_device ? a.split.keys_of_share(piece.begin + piece.rows) : a.split.share_keys;
    item.first_key = item.share * share_keys;
    item.end_key = item.first_key + share_keys;
  }
  return item;
}

// f(item) for the items of this block. Every other round runs backwards, which evens out their lengths.
template <bool kShared, typename F>
__device__ void each_item(const DenseArguments& a, F&& f) {
  const int blocks = gridDim.x, block = blockIdx.x, tiles = count_tiles(a), items = a.items_of(tiles);
  for (int round = 0;; ++round) {
    const int number = round * blocks + (round % 2 ? blocks - 1 - block : block);
    if (round * blocks >= items) break;
    if (number < items) f(item_of<kShared>(a, number, tiles));
  }
}

// The tiles of an item, stage after stage.
struct Steps {
  const int32_t last_position, first_key, end_key, chunk_len;
  int stage = kStages;  // before the first
  Span span{0, 0};
  int32_t first = 0;  // key of the tile

  __device__ Steps(const DenseArguments& a, const Item& item)
      : last_position(item.begin + item.rows - 1),
        first_key(item.first_key),
        end_key(item.end_key),
        chunk_len(a.chunk_len) {}

  __device__ bool next() {
    first += kStepKeys;
    while (first >= span.end) {
      if (stage == kIntra) return false;
      span = stage_keys(static_cast<Stage>(--stage), last_position, chunk_len);
      span = {max(span.begin, first_key), min(span.end, end_key)};
      first = span.begin;
    }
    return true;
  }
  __device__ bool enters() const { return first == span.begin; }  // a stage
};

// Where the boxes of a stage lie in the cache: 32 looked up at once, a box a lane, and the next 32 ahead of their use.
struct BoxSlots {
  const Pages pages;
  const int lane = threadIdx.x % kWarp;
  Span span{0, 0};
  int32_t these = 0, following = 0;

  __device__ int32_t look_up(int32_t box) const {
    return static_cast<int32_t>(pages.slot(min(span.begin + box * kBoxRows, (span.end - 1) / kBoxRows * kBoxRows)));
  }
  __device__ void enter(Span stage) {
    span = stage;
    following = look_up(lane);
  }
  // In ascending order; every box with a number that is a multiple of 32 must be asked for.
  __device__ int32_t operator()(int32_t box) {
    if (box % kWarp == 0) {
      these = following;
      following = look_up(box + kWarp + lane);
    }
    return __shfl_sync(kAllLanes, these, box % kWarp);
  }
};

template <typename T, bool kShared>
struct Producer {
  const DenseArguments& a;
  Shared& shared;
  const int lane = threadIdx.x % kWarp;
  RingPlace<2> query;
  RingPlace<kRing> key, value;
  uint32_t last_parity = 0;

  // A tile of keys or values: where its boxes lie, and how many of its rows are keys of the stage.
  struct Tile {
    int32_t slot[kBoxes];
    int32_t rows;
  };

  __device__ void load_queries(const Item& item, int stage) {
    const uint32_t full = shared_address(&shared.query_full[query.index]);
    barrier_wait(shared_address(&shared.query_empty[query.index]), query.parity ^ 1);
    if (lane == 0) {
      barrier_arrive_expecting(full, kConsumers * kPanels * item.tile_rows * item.packed * kPanelRowBytes);
      for (int consumer = 0; consumer < kConsumers; ++consumer) {
        for (int panel = 0; panel < kPanels; ++panel) {
          copy_box(shared_address(shared.queries[query.index][consumer][panel]), a.query_map, full,
                   panel * kPanelValues, item.head, stage * a.tokens + item.first_row + consumer * item.tile_rows);
        }
      }
    }
    query.advance();
  }

  __device__ void load_boxes(char (&target)[kPanels][kPanelBytes], const CUtensorMap& map, uint32_t full,
                             const Tile& tile, int kv_head) const {
    if (lane != 0) return;
    const int boxes = tile.rows > kBoxRows ? kBoxes : 1;
    barrier_arrive_expecting(full, boxes * kPanels * kBoxBytes);
    for (int box = 0; box < boxes; ++box) {
      for (int panel = 0; panel < kPanels; ++panel) {
        copy_box(shared_address(target[panel] + box * kBoxBytes), map, full, panel * kPanelValues, kv_head,
                 tile.slot[box]);
      }
    }
  }

  __device__ void load_keys(const Tile& tile, int kv_head) {
    barrier_wait(shared_address(&shared.key_empty[key.index]), key.parity ^ 1);
    load_boxes(shared.keys[key.index], a.key_map, shared_address(&shared.key_full[key.index]), tile, kv_head);
    key.advance();
  }

  // Weights of zero make no output of a row that is no key only if that row is finite: such rows are zeros.
  __device__ void load_values(const Tile& tile, int kv_head) {
    auto& target = shared.values[value.index];
    const uint32_t full = shared_address(&shared.value_full[value.index]);
    barrier_wait(shared_address(&shared.value_empty[value.index]), value.parity ^ 1);
    value.advance();
    if (tile.rows >= kStepKeys) {
      load_boxes(target, a.value_map, full, tile, kv_head);
      return;
    }
    const uint32_t arrived = shared_address(&shared.last_values);
    load_boxes(target, a.value_map, arrived, tile, kv_head);
    barrier_wait(arrived, last_parity);
    last_parity ^= 1;
    for (int panel = 0; panel < kPanels; ++panel) {
      for (int at = tile.rows * kPanelRowBytes + lane * 16; at < kPanelBytes; at += kWarp * 16) {
        *reinterpret_cast<uint4*>(target[panel] + at) = make_uint4(0, 0, 0, 0);
      }
    }
    async_proxy_fence();
    __syncwarp();
    if (lane == 0) barrier_arrive(full);
  }

  // Keys are loaded a tile ahead of values, as they are used.
  __device__ void run() {
    each_item<kShared>(a, [&](const Item& item) {
      const int kv_head = item.head / (a.heads / a.cache.kv_heads);
      BoxSlots slots{Pages(a.block_tables + static_cast<int64_t>(item.sequence) * a.table_width, a.cache.page_size)};
      Steps steps(a, item);
      Tile before{};
      for (bool more = true; more;) {
        more = steps.next();
        Tile tile{};
        if (more) {
          if (steps.enters()) {
            slots.enter(steps.span);
            load_queries(item, steps.stage);
          }
          const int32_t box = (steps.first - steps.span.begin) / kBoxRows;
#pragma unroll
          for (int i = 0; i < kBoxes; ++i) tile.slot[i] = slots(box + i);
          tile.rows = steps.span.end - steps.first;
          load_keys(tile, kv_head);
        }
        if (before.rows > 0) load_values(before, kv_head);
        before = tile;
      }
    });
  }
};

template <typename T, bool kShared>
struct Consumer {
  const DenseArguments& a;
  Shared& shared;
  const int number = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  RingPlace<2> query;
  RingPlace<kRing> key, value;
  Rows<T> rows;
  Scores<T, kStepKeys> scores;
  uint32_t weights[kStepKeys / 4];

  __device__ void release(uint64_t& barrier) const {
    if (threadIdx.x % kWarp == 0) barrier_arrive(shared_address(&barrier));
  }
  __device__ void wait_turn() const { named_sync(kTurn + number, kConsumers * kWarpgroup); }
  __device__ void pass_turn() const { named_arrive(kTurn + 1 - number, kConsumers * kWarpgroup); }

  // scores = Q K^T, under way.
  __device__ void score() {
    const uint32_t q = rows_descriptor(shared_address(shared.queries[query.index][number][0]));
    const uint32_t k = rows_descriptor(shared_address(shared.keys[key.index][0]));
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int panel = step / 4, chunk = step % 4 * 2;
      multiply_shared<T>(scores.value, q + (panel * kBoxBytes >> 4) + chunk, k + (panel * kPanelBytes >> 4) + chunk,
                         step > 0);
    }
    products_commit();
  }

  // out += weights V, under way.
  __device__ void attend() {
    rows.template attend<kStepKeys / 16>(weights, 0,
                                         columns_descriptor(shared_address(shared.values[value.index][0]), kStepKeys));
    products_commit();
  }

  __device__ void wait_queries() { barrier_wait(shared_address(&shared.query_full[query.index]), query.parity); }
  __device__ void wait_keys() { barrier_wait(shared_address(&shared.key_full[key.index]), key.parity); }
  __device__ void wait_values() { barrier_wait(shared_address(&shared.value_full[value.index]), value.parity); }
  __device__ void release_queries() {
    release(shared.query_empty[query.index]);
    query.advance();
  }
  __device__ void release_keys() {
    release(shared.key_empty[key.index]);
    key.advance();
  }
  __device__ void release_values() {
    release(shared.value_empty[value.index]);
    value.advance();
  }

  // The keys that a row must not see, and the softmax of the others.
  __device__ void weigh(const Item& item, const Steps& steps, float scale) {
    const bool causal = steps.stage == kIntra;
    const int32_t begin = item.begin_of(number), end = steps.span.end - 1, last = steps.first + kStepKeys - 1;
    if (last > (causal ? min(begin, end) : end)) {
      const int line = threadIdx.x / kWarp % 4 * 16 + threadIdx.x % kWarp / 4;
      int32_t limit[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        limit[h] = (causal ? min(begin + (line + 8 * h) / item.packed, end) : end) - steps.first;
      }
      mask_scores(scores.value, [&](int column, int h) { return column <= limit[h]; });
    }
    rows.soften(scores, scale);
  }

  __device__ void store(const Item& item, float scale) const {
    const int64_t row = item.first_row + number * item.tile_rows;
    if constexpr (kShared) {
      rows.store_share(a.shares, item.lines_of(number), scale, [&](int line) {
        const int64_t place = (row + line / item.packed) * a.heads + item.head + line % item.packed;
        return place * a.shares.count + item.share;
      });
    } else {
      const int64_t place = row * a.heads + item.head;
      rows.store(static_cast<T*>(a.out) + place * kHeadDim, a.lse == nullptr ? nullptr : a.lse + place,
                 item.lines_of(number), a.heads, scale);
    }
  }

  __device__ void walk(const Item& item) {
    const float scale = a.scale[item.sequence] * kLog2E;
    rows.start();
    Steps steps(a, item);
    if (!steps.next()) return store(item, scale);
    wait_queries();
    wait_keys();
    products_begin();
    score();
    products_wait<0>();
    settle(scores.value);
    release_keys();
    weigh(item, steps, scale);
    scores.pack(weights);

    while (steps.next()) {
      if (steps.enters()) {
        release_queries();
        wait_queries();
      }
      wait_keys();
      wait_turn();
      settle(rows.out);
      settle(weights);
      products_begin();
      score();
      wait_values();
      products_begin();
      attend();
      pass_turn();
      products_wait<1>();
      settle(scores.value);
      release_keys();
      weigh(item, steps, scale);
      settle(scores.value);
      rows.settle_output();
      settle(weights);
      release_values();
      scores.pack(weights);
    }
    release_queries();
    wait_values();
    settle(rows.out);
    settle(weights);
    products_begin();
    attend();
    products_wait<0>();
    settle(rows.out);
    release_values();

    store(item, scale);
  }

  __device__ void run() {
    if (number == 1) pass_turn();
    each_item<kShared>(a, [&](const Item& item) { walk(item); });
    if (number == 0) wait_turn();
  }
};

template <typename T, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) dca_prefill_kernel(const __grid_constant__ DenseArguments a) {
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
    const auto init = [](uint64_t& barrier, int arrivals) { barrier_init(shared_address(&barrier), arrivals); };
    for (auto* full : {&shared.query_full, &shared.key_full, &shared.value_full}) {
      for (uint64_t& barrier : *full) init(barrier, 1);
    }
    for (auto* empty : {&shared.query_empty, &shared.key_empty, &shared.value_empty}) {
      for (uint64_t& barrier : *empty) init(barrier, kConsumerWarps);
    }
    init(shared.last_values, 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x < kWarp) Producer<T, kShared>{a, shared}.run();
  } else {
    take_registers<kConsumerRegisters>();
    Consumer<T, kShared>{a, shared}.run();
  }
}

}  // namespace

int64_t dca_prefill_workspace(const qwen1m_dca_prefill& a) {
  return shares_bytes(static_cast<int64_t>(a.tokens) * a.heads, kHeadDim, Split(a).count);
}

template <typename T>
int dca_prefill(const qwen1m_dca_prefill& a, void* workspace, qwen1m_stream stream) {
  const Split split(a);
  const Shares shares(workspace, static_cast<int64_t>(a.tokens) * a.heads, kHeadDim, split.count, 0);
  const bool sharing = split.count > 1;
  const auto kernel = sharing ? dca_prefill_kernel<T, true> : dca_prefill_kernel<T, false>;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (status != cudaSuccess) return status;
  if (a.on_device && a.num_pieces > kMaxPieces) return cudaErrorInvalidValue;
  const int item_rows = kConsumers * (kRows / split.packed);
  for (int first = 0; first < a.num_pieces; first += kMaxPieces) {
    DenseArguments arguments{a, {}, {}, {}, split, shares, 0, 0, {}};
    MergedRows merged{{0}, {a.tokens}, 1, a.heads};
    // Where the pieces are on the device: what the rows can come to in so many.
    int32_t tiles = static_cast<int32_t>(ceil_div(a.tokens, item_rows)) + a.num_pieces - 1;
    int64_t most_keys = static_cast<int64_t>(a.table_width) * a.cache.page_size;
    if (!a.on_device) {
      arguments.num_pieces = merged.ranges = std::min(a.num_pieces - first, kMaxPieces);
      most_keys = tiles = 0;
      for (int p = 0; p < arguments.num_pieces; ++p) {
        const qwen1m_piece& piece = arguments.piece[p] = a.pieces[first + p];
        tiles += static_cast<int32_t>(ceil_div(piece.rows, item_rows));
        most_keys = std::max<int64_t>(most_keys, piece.begin + piece.rows);
        merged.first[p] = piece.row;
        merged.rows[p] = piece.rows;
      }
    }
    const int group = a.heads / a.cache.kv_heads;
    const int64_t head_bytes = most_keys * kHeadDim * 2 * sizeof(T);
    const int64_t sections = std::max<int64_t>(1, kSectionBytes / std::max<int64_t>(head_bytes, 1));
    arguments.section_heads = group * static_cast<int>(std::min<int64_t>(sections, a.cache.kv_heads));
    arguments.tiles = tiles;
    const int32_t items = arguments.items_of(tiles);
    if (items == 0) continue;

    const int64_t variants = std::min<int64_t>((most_keys - 1) / a.chunk_len, kInter) + 1;
    constexpr int64_t kAnyRow = INT32_MAX;  // the pages' number is not known here; tables name only those that exist
    int code =
        make_tensor_map(arguments.query_map, a.activation, a.q, kHeadDim, a.heads, variants * a.tokens, split.packed);
    for (const auto& [map, pool] :
         {std::pair{&arguments.key_map, a.cache.key}, std::pair{&arguments.value_map, a.cache.value}}) {
      if (code == cudaSuccess) {
        code = make_tensor_map(*map, a.activation, pool, kHeadDim, a.cache.kv_heads, kAnyRow);
      }
    }
    if (code != cudaSuccess) return code;
    kernel<<<std::min(items, processors()), kThreads, sizeof(Shared), as_stream(stream)>>>(arguments);
    status = cudaGetLastError();
    if (status != cudaSuccess) return status;
    if (!sharing) continue;
    code = merge_shares<T, kHeadDim>(merged, shares, a.out, a.lse, as_stream(stream));
    if (code != cudaSuccess) return code;
  }
  return cudaSuccess;
}

template int dca_prefill<bf16>(const qwen1m_dca_prefill&, void*, qwen1m_stream);
template int dca_prefill<f16>(const qwen1m_dca_prefill&, void*, qwen1m_stream);

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
