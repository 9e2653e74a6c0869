// Sparse dual chunk attention on Hopper: two neighbouring row blocks of one head share a stream of slots of 64 keys.
//
// A row block's keys are blocks of 64 that start anywhere, then single columns, 64 a slot; the next row block's blocks
// are mostly the same, shifted by 64. So the two lists are merged, a slot says which row block wants it, and what both
// want is read once. A row block only ever weighs the keys of its own lists, in their order.
//
//   producer   four warps. The first merges the lists, a window of 32 entries of each at once, into a plan of slots;
//              all four copy the planned keys and values into a ring
//   consumers  two warpgroups, a row block each, its queries in registers. A slot that a consumer does not want it
//              releases at once. The scores of a slot run beside the output of the slot before
//
// Row blocks 2i and 2i + 1 of a piece are always merged, wanted or not, so that rows do not depend on how it is cut.
#include <algorithm>
#include <climits>

#include "attention.cuh"
#include "row_loads.cuh"
#include "rows.cuh"

namespace qwen1m {
namespace cuda {
namespace sm90 {
namespace {

constexpr int kConsumers = 2, kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kSlotKeys = kTileKeys, kRing = 5;
constexpr int kPlanned = 2 * kWarp;  // slots of a plan: a window of each list
constexpr int kProducerRegisters = 104, kConsumerRegisters = 200;
constexpr int32_t kNoKey = INT_MAX;

enum NamedBarrier { kPlan = 1 };  // the producer's warps agree on a plan

constexpr int kSlotPanelBytes = kSlotKeys * kPanelRowBytes;

// What consumers know of a slot. Bit c of `wanted` and `masked`: of consumer c.
struct SlotInfo {
  int32_t first;  // its first key; kNoKey: the keys are columns; other fields hold for both
  int32_t end;    // keys from here on count for none
  uint8_t stage, wanted, masked, last;  // last: no slot, the item ends
};

// A block of 64 keys: row r lies at number `near + r` of the pool before the page's border, at `far + r` behind it.
struct alignas(16) PlannedBlock {
  int32_t first, near, far;
  uint32_t wanted;
};

struct alignas(1024) Shared {
  char keys[kRing][kPanels][kSlotPanelBytes];
  char values[kRing][kPanels][kSlotPanelBytes];
  char queries[kConsumers][kRows * kHeadDim * 2];
  int32_t position[kRing][kSlotKeys];  // of a slot of columns; kNoKey where there is none
  uint64_t listed[kRing][kConsumers];  // which of them a consumer's row block lists
  SlotInfo info[kRing];
  PlannedBlock blocks[kPlanned];
  int32_t column[2 * kSlotKeys];          // merged and not yet planned
  uint8_t column_wanted[2 * kSlotKeys];
  int32_t column_slot[kSlotKeys];
  int32_t planned;
  uint64_t full[kRing], empty[kRing];
  uint64_t query_full[kConsumers], query_empty[kConsumers];
};

// Row blocks 2i and 2i + 1 of one head. Bit c of `present`: row block 2i + c is to be computed.
struct Item {
  int head, row_block, present;
  int32_t begin, rows;  // position of the first row, rows of both
  int64_t first_row;

  __device__ Item(const qwen1m_dca_sparse_prefill& a, int number) {
    const int first_pair = a.first_block / 2, pairs = (a.first_block + a.num_blocks - 1) / 2 - first_pair + 1;
    head = number / pairs;
    row_block = 2 * (first_pair + number % pairs);
    present = 0;
    for (int c = 0; c < kConsumers; ++c) {
      if (row_block + c >= a.first_block && row_block + c < a.first_block + a.num_blocks) present |= 1 << c;
    }
    const int32_t skipped = row_block * kRows;
    begin = a.begin + skipped;
    first_row = a.row + static_cast<int64_t>(skipped);
    rows = min(a.rows - skipped, kConsumers * kRows);
  }
};

__host__ __device__ inline int count_items(const qwen1m_dca_sparse_prefill& a) {
  return ((a.first_block + a.num_blocks - 1) / 2 - a.first_block / 2 + 1) * a.heads;
}

// An ascending list as a warp reads it: 32 entries, an entry a lane, and the 32 behind them under way.
struct Window {
  const int32_t* list = nullptr;
  int32_t count = 0;
  int32_t these = kNoKey, following = kNoKey;

  __device__ int32_t entry(int32_t i) const { return i < count ? __ldg(list + i) : kNoKey; }

  __device__ void enter(const int32_t* entries, int32_t size) {
    list = entries;
    count = size;
    these = entry(threadIdx.x);
    following = entry(kWarp + threadIdx.x);
  }
  __device__ void advance(int n) {
    const int from = threadIdx.x + n;
    const int32_t near = __shfl_sync(kAllLanes, these, from % kWarp), far = __shfl_sync(kAllLanes, following, from % kWarp);
    these = from < kWarp ? near : far;
    list += n;
    count -= n;
    following = entry(kWarp + threadIdx.x);
  }
  // How many entries of the window are below `value`, a value a lane.
  __device__ int below(int32_t value) const {
    int n = 0;
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      if (__shfl_sync(kAllLanes, these, n + step - 1) < value) n += step;
    }
    return n + (__shfl_sync(kAllLanes, these, n) < value);
  }
};

// Takes what two windows surely hold of their lists' union, ascending: write(number, entry, which lists have it as
// bits). Returns how many entries that are, 64 at most; 0 when both lists are at their end.
template <typename F>
__device__ int merge(Window (&lists)[2], F&& write) {
  const int lane = threadIdx.x;
  const int32_t bound = min(__shfl_sync(kAllLanes, lists[0].these, kWarp - 1),
                            __shfl_sync(kAllLanes, lists[1].these, kWarp - 1));
  bool taken[2];
  int below[2], taken_count[2];
#pragma unroll
  for (int l = 0; l < 2; ++l) {
    taken[l] = lists[l].these <= bound && lists[l].these != kNoKey;
    taken_count[l] = __popc(__ballot_sync(kAllLanes, taken[l]));
    below[l] = lists[1 - l].below(lists[l].these);
  }
  const int32_t equal = __shfl_sync(kAllLanes, lists[1].these, below[0] % kWarp);
  const bool twice = taken[0] && below[0] < kWarp && equal == lists[0].these;
  const unsigned doubles = __ballot_sync(kAllLanes, twice);
  if (taken[0]) {
    write(lane + below[0] - __popc(doubles & ((1u << lane) - 1)), lists[0].these, twice ? 3 : 1);
  }
  const int32_t other = __shfl_sync(kAllLanes, lists[0].these, below[1] % kWarp);
  if (taken[1] && !(below[1] < kWarp && other == lists[1].these)) {
    const unsigned before = below[1] < kWarp ? (1u << below[1]) - 1 : kAllLanes;
    write(lane + below[1] - __popc(doubles & before), lists[1].these, 2);
  }
  __syncwarp();
  lists[0].advance(taken_count[0]);
  lists[1].advance(taken_count[1]);
  return taken_count[0] + taken_count[1] - __popc(doubles);
}

template <typename T>
struct Producer {
  const qwen1m_dca_sparse_prefill& a;
  Shared& shared;
  const Pages pages{a.block_table, a.cache.page_size};
  const int row = threadIdx.x / 16, chunk = threadIdx.x % 16;  // of this thread's first copy; the others 8 rows further
  RingPlace<kRing> ring;
  uint32_t query_parity[kConsumers] = {};
  const char *keys = nullptr, *values = nullptr;  // of the item's head, this thread's chunk
  int32_t columns_waiting = 0;

  __device__ bool plans() const { return threadIdx.x < kWarp; }
  __device__ void agree() const { named_sync(kPlan, kWarpgroup); }

  __device__ int32_t pool_row(int32_t position) const { return static_cast<int32_t>(pages.slot(position)); }

  // For the consumers in `wanting`.
  __device__ void load_queries(const Item& item, int stage, int wanting) {
    const int64_t stride = static_cast<int64_t>(a.heads) * kHeadDim;
#pragma unroll
    for (int c = 0; c < kConsumers; ++c) {
      if (!(wanting >> c & 1)) continue;
      barrier_wait(shared_address(&shared.query_empty[c]), query_parity[c] ^ 1);
      query_parity[c] ^= 1;
      const int64_t first = stage * static_cast<int64_t>(a.tokens) + item.first_row + c * kRows;
      load_rows<T, kHeadDim, kRows, kWarpgroup>(shared_address(shared.queries[c]),
                                                static_cast<const T*>(a.q) + first * stride + item.head * kHeadDim,
                                                stride, 0, item.rows - c * kRows);
      copy_arrive(shared_address(&shared.query_full[c]));
    }
  }

  // A slot begins: its description, then its rows, then finish_slot().
  __device__ void begin_slot(const SlotInfo& info) {
    barrier_wait(shared_address(&shared.empty[ring.index]), ring.parity ^ 1);
    if (threadIdx.x == 0) shared.info[ring.index] = info;
  }
  template <typename F>
  __device__ void copy_rows(F&& pool_row_of) {
    const int32_t stride = a.cache.kv_heads * kHeadDim * static_cast<int32_t>(sizeof(T));
    const int place = chunk / 8 * kSlotPanelBytes + row * kPanelRowBytes + ((chunk % 8 ^ row) << 4);
    const uint32_t key_target = shared_address(shared.keys[ring.index]) + place;
    const uint32_t value_target = shared_address(shared.values[ring.index]) + place;
#pragma unroll
    for (int i = 0; i < kSlotKeys / 8; ++i) {
      const int64_t offset = static_cast<int64_t>(pool_row_of(row + 8 * i)) * stride;
      copy_async(key_target + i * 8 * kPanelRowBytes, keys + offset);
      copy_async(value_target + i * 8 * kPanelRowBytes, values + offset);
    }
  }
  __device__ void finish_slot() {
    const uint32_t full = shared_address(&shared.full[ring.index]);
    copy_arrive(full);
    if (threadIdx.x == 0) barrier_arrive(full);  // for what was stored
    ring.advance();
  }

  // Which of `wanting` the slot's keys, the last of them `last`, need a mask for.
  __device__ int masked(const Item& item, int stage, int32_t last, int32_t end, int wanting) const {
    if (last >= end) return wanting;
    if (stage != kIntra) return 0;
    return wanting & ((last > item.begin ? 1 : 0) | (last > item.begin + kRows ? 2 : 0));
  }

  // ---- blocks ----

  __device__ void plan_blocks(Window (&lists)[2], int32_t end) {
    const int count = merge(lists, [&](int number, int32_t first, int wanted) {
      const int32_t start = min(first, end - 1), border = (start | pages.mask) + 1;
      const int32_t near = pool_row(start);
      const int32_t far = border < min(start + kSlotKeys, end) ? pool_row(border) - (border - start) : near;
      shared.blocks[number] = {first, near, far, static_cast<uint32_t>(wanted)};
    });
    if (threadIdx.x == 0) shared.planned = count;
  }

  __device__ void load_block(const Item& item, int stage, int32_t end, const PlannedBlock& block) {
    const int wanted = block.wanted & item.present;
    if (wanted == 0) return;
    const int flags = masked(item, stage, block.first + kSlotKeys - 1, end, wanted);
    begin_slot({block.first, end, static_cast<uint8_t>(stage), static_cast<uint8_t>(wanted),
                static_cast<uint8_t>(flags), 0});
    // In place of no key stands the last one, whose weight the mask makes zero.
    const int32_t start = min(block.first, end - 1), border = pages.mask + 1 - (start & pages.mask), last = end - 1 - start;
    copy_rows([&](int32_t r) {
      r = min(r, last);
      return (r < border ? block.near : block.far) + r;
    });
    finish_slot();
  }

  __device__ void load_blocks(const Item& item, int stage, int32_t end, const int32_t* table, const int32_t (&at)[2],
                              const int32_t (&count)[2]) {
    Window lists[2];
    if (plans()) {
      lists[0].enter(table + at[0], count[0]);
      lists[1].enter(table + a.tables.block_width + at[1], count[1]);
    }
    for (;;) {
      if (plans()) plan_blocks(lists, end);
      agree();
      const int planned = shared.planned;
      for (int i = 0; i < planned; ++i) load_block(item, stage, end, shared.blocks[i]);
      agree();
      if (planned == 0) break;
    }
  }

  // ---- columns ----

  // Until there are enough for a slot or no more.
  __device__ void plan_columns(Window (&lists)[2]) {
    int count = columns_waiting;
    while (count < kSlotKeys) {
      const int more = merge(lists, [&](int number, int32_t column, int wanted) {
        shared.column[count + number] = column;
        shared.column_wanted[count + number] = static_cast<uint8_t>(wanted);
      });
      if (more == 0) break;
      count += more;
    }
    __syncwarp();
    for (int i = threadIdx.x; i < kSlotKeys; i += kWarp) {
      // In place of no key stands the first one.
      shared.column_slot[i] = count > 0 ? pool_row(shared.column[i < count ? i : 0]) : 0;
    }
    columns_waiting = count;
    if (threadIdx.x == 0) shared.planned = min(count, kSlotKeys);
  }

  __device__ void load_slot_of_columns(const Item& item, int stage, int32_t end, int count) {
    unsigned listed[kConsumers][2] = {};
    int32_t positions[2], wanted[2];
    if (plans()) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = half * kWarp + threadIdx.x;
        positions[half] = i < count ? shared.column[i] : kNoKey;
        wanted[half] = i < count ? shared.column_wanted[i] & item.present : 0;
#pragma unroll
        for (int c = 0; c < kConsumers; ++c) listed[c][half] = __ballot_sync(kAllLanes, wanted[half] >> c & 1);
      }
    }
    barrier_wait(shared_address(&shared.empty[ring.index]), ring.parity ^ 1);
    if (plans()) {
      int wanting = 0, partly = 0;
#pragma unroll
      for (int c = 0; c < kConsumers; ++c) {
        const uint64_t both = static_cast<uint64_t>(listed[c][1]) << kWarp | listed[c][0];
        if (both != 0) wanting |= 1 << c;
        if (both != ~0ull) partly |= 1 << c;
        if (threadIdx.x == 0) shared.listed[ring.index][c] = both;
      }
      const int32_t last = __shfl_sync(kAllLanes, positions[1], kWarp - 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) shared.position[ring.index][half * kWarp + threadIdx.x] = positions[half];
      const int flags = (partly & wanting) | masked(item, stage, last, end, wanting);
      if (threadIdx.x == 0) {
        shared.info[ring.index] = {kNoKey, end, static_cast<uint8_t>(stage), static_cast<uint8_t>(wanting),
                                   static_cast<uint8_t>(flags), 0};
      }
      __syncwarp();
    }
    copy_rows([&](int32_t r) { return shared.column_slot[r]; });
    finish_slot();
  }

  __device__ void drop_columns() {
    const int left = max(columns_waiting - kSlotKeys, 0);
    int32_t column[2];
    uint8_t wanted[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = kSlotKeys + half * kWarp + threadIdx.x;
      column[half] = shared.column[i];
      wanted[half] = shared.column_wanted[i];
    }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = half * kWarp + threadIdx.x;
      shared.column[i] = column[half];
      shared.column_wanted[i] = wanted[half];
    }
    columns_waiting = left;
    __syncwarp();
  }

  __device__ void load_columns(const Item& item, int stage, int32_t end, const int32_t* table, const int32_t (&at)[2],
                               const int32_t (&count)[2]) {
    Window lists[2];
    if (plans()) {
      lists[0].enter(table + at[0], count[0]);
      lists[1].enter(table + a.tables.column_width + at[1], count[1]);
    }
    columns_waiting = 0;
    for (;;) {
      if (plans()) plan_columns(lists);
      agree();
      const int planned = shared.planned;
      if (planned > 0) load_slot_of_columns(item, stage, end, planned);
      agree();
      if (planned == 0) break;
      if (plans()) drop_columns();
    }
  }

  __device__ void walk(const Item& item) {
    const int64_t offset = static_cast<int64_t>(item.head / (a.heads / a.cache.kv_heads)) * kHeadDim * sizeof(T) + chunk * 16;
    keys = static_cast<const char*>(a.cache.key) + offset;
    values = static_cast<const char*>(a.cache.value) + offset;
    const int row_blocks = (a.rows + kRows - 1) / kRows;
    const int64_t entry = static_cast<int64_t>(item.head) * row_blocks + item.row_block;
    const int32_t* counts = a.tables.counts + entry * 2 * kStages;
    int32_t block_at[2] = {}, column_at[2] = {};
    for (int stage = kInter; stage >= kIntra; --stage) {
      const int32_t end = stage == kIntra ? item.begin + item.rows
                                          : stage_keys(static_cast<Stage>(stage), item.begin, a.chunk_len).end;
      int32_t blocks[2], columns[2];
#pragma unroll
      for (int c = 0; c < kConsumers; ++c) {
        const bool exists = item.row_block + c < row_blocks;
        blocks[c] = exists ? __ldg(counts + c * 2 * kStages + stage) : 0;
        columns[c] = exists ? __ldg(counts + c * 2 * kStages + kStages + stage) : 0;
      }
      const int listing = (blocks[0] + columns[0] > 0 ? 1 : 0) | (blocks[1] + columns[1] > 0 ? 2 : 0);
      if (listing == 0) continue;
      load_queries(item, stage, listing & item.present);
      load_blocks(item, stage, end, a.tables.blocks + entry * a.tables.block_width, block_at, blocks);
      load_columns(item, stage, end, a.tables.columns + entry * a.tables.column_width, column_at, columns);
#pragma unroll
      for (int c = 0; c < kConsumers; ++c) {
        block_at[c] += blocks[c];
        column_at[c] += columns[c];
      }
    }
    begin_slot({0, 0, 0, 0, 0, 1});
    finish_slot();
  }

  __device__ void run() {
    const int items = count_items(a);
    for (int number = blockIdx.x; number < items; number += gridDim.x) walk(Item(a, number));
  }
};

template <typename T>
struct Consumer {
  const qwen1m_dca_sparse_prefill& a;
  Shared& shared;
  const int number = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  RingPlace<kRing> ring;
  uint32_t query_parity = 0;
  Rows<T> rows;
  Scores<T, kSlotKeys> scores;
  uint32_t queries[kHeadDim / 16][4];
  uint32_t weights[kSlotKeys / 4];

  __device__ void release(uint64_t& barrier) const {
    if (threadIdx.x % kWarp == 0) barrier_arrive(shared_address(&barrier));
  }

  // The next slot that this row block wants, or the item's end; its place is ring.index.
  __device__ SlotInfo next() {
    for (;;) {
      barrier_wait(shared_address(&shared.full[ring.index]), ring.parity);
      const SlotInfo info = shared.info[ring.index];
      if (info.last || info.wanted >> number & 1) return info;
      release(shared.empty[ring.index]);
      ring.advance();
    }
  }

  // The rows' rotation of the next stage; no product may be under way that reads the last one.
  __device__ void take_queries() {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4;
    barrier_wait(shared_address(&shared.query_full[number]), query_parity);
    query_parity ^= 1;
    const uint32_t place = at<kHeadDim>(shared_address(shared.queries[number]) + operand<kHeadDim>(lane), 16 * warp, 0);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) load_left(queries[step], at<kHeadDim>(place, 0, step));
    release(shared.query_empty[number]);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) settle(queries[step]);
  }

  // scores = Q K^T of the slot at ring.index, under way.
  __device__ void score() {
    const uint64_t k = rows_descriptor(shared_address(shared.keys[ring.index][0]));
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      multiply_transposed<T>(scores.value, queries[step], k + (step / 4 * kSlotPanelBytes >> 4) + step % 4 * 2, step > 0);
    }
    products_commit();
  }

  // out += weights V of the slot at `place`, under way.
  __device__ void attend(int place) {
    rows.attend(weights, columns_descriptor(shared_address(shared.values[place][0]), kSlotKeys));
    products_commit();
  }

  __device__ void weigh(const Item& item, const SlotInfo& info, float scale) {
    if (info.masked >> number & 1) {
      const int lane = threadIdx.x % kWarp;
      const int32_t position = item.begin + number * kRows + threadIdx.x / kWarp % 4 * 16 + lane / 4;
      const int32_t limit[2] = {min(position, info.end - 1), min(position + 8, info.end - 1)};
      if (info.first != kNoKey) {
        scores.mask([&](int column, int h) { return info.first + column <= limit[h]; });
      } else {
        const uint64_t listed = shared.listed[ring.index][number];
        const int32_t* keys = shared.position[ring.index];
        scores.mask([&](int column, int h) { return (listed >> column & 1) && keys[column] <= limit[h]; });
      }
    }
    rows.soften(scores, scale);
  }

  __device__ void walk(const Item& item) {
    const float scale = a.scale * kLog2E;
    rows.start();
    SlotInfo info = next();
    if (!info.last) {
      take_queries();
      int stage = info.stage;
      async_proxy_fence();
      products_begin();
      score();
      products_wait<0>();
      settle(scores.value);
      weigh(item, info, scale);
      scores.pack(weights);
      int before = ring.index;
      ring.advance();
      for (info = next(); !info.last; info = next()) {
        if (info.stage != stage) {
          take_queries();
          stage = info.stage;
        }
        async_proxy_fence();
        settle(rows.out);
        settle(weights);
        products_begin();
        score();
        attend(before);
        products_wait<1>();
        settle(scores.value);
        weigh(item, info, scale);
        settle(scores.value);
        rows.settle_output();
        settle(weights);
        release(shared.empty[before]);
        scores.pack(weights);
        before = ring.index;
        ring.advance();
      }
      settle(rows.out);
      settle(weights);
      products_begin();
      attend(before);
      products_wait<0>();
      settle(rows.out);
      release(shared.empty[before]);
    }
    release(shared.empty[ring.index]);
    ring.advance();
    if (item.present >> number & 1) {
      const int64_t place = (item.first_row + number * kRows) * a.heads + item.head;
      rows.store(static_cast<T*>(a.out) + place * kHeadDim, a.lse == nullptr ? nullptr : a.lse + place,
                 item.rows - number * kRows, a.heads, scale);
    }
  }

  __device__ void run() {
    const int items = count_items(a);
    for (int number = blockIdx.x; number < items; number += gridDim.x) walk(Item(a, number));
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    dca_sparse_prefill_kernel(const __grid_constant__ qwen1m_dca_sparse_prefill a) {
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
    for (int i = 0; i < kRing; ++i) {
      barrier_init(shared_address(&shared.full[i]), kWarpgroup + 1);
      barrier_init(shared_address(&shared.empty[i]), kConsumerWarps);
    }
    for (int c = 0; c < kConsumers; ++c) {
      barrier_init(shared_address(&shared.query_full[c]), kWarpgroup);
      barrier_init(shared_address(&shared.query_empty[c]), kConsumerWarps / kConsumers);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    Producer<T>{a, shared}.run();
  } else {
    take_registers<kConsumerRegisters>();
    Consumer<T>{a, shared}.run();
  }
}

}  // namespace

template <typename T>
int dca_sparse_prefill(const qwen1m_dca_sparse_prefill& a, qwen1m_stream stream) {
  if (a.num_blocks == 0) return cudaSuccess;
  const auto kernel = dca_sparse_prefill_kernel<T>;
  int device = 0, processors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  }
  if (status != cudaSuccess) return status;
  kernel<<<std::min(count_items(a), processors), kThreads, sizeof(Shared), as_stream(stream)>>>(a);
  return cudaGetLastError();
}

template int dca_sparse_prefill<bf16>(const qwen1m_dca_sparse_prefill&, qwen1m_stream);
template int dca_sparse_prefill<f16>(const qwen1m_dca_sparse_prefill&, qwen1m_stream);

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
