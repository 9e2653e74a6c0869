// Sparse dual chunk attention on Hopper: two neighbouring row blocks of one head share a stream of slots of 64 keys.
//
// A row block's keys are blocks of 64 that start anywhere, then single columns, 64 a slot; the next row block's blocks
// are mostly the same, shifted by 64. So the two lists are merged, a slot says which row block wants it, and what both
// want is read once. A row block only ever weighs the keys of its own lists, in their order.
//
//   producer   four warps. They merge the lists, a window of each at once, into a plan of slots and copy the planned
//              keys and values into a ring each
//   consumers  two warpgroups, a row block each, its queries in registers. A slot that a consumer does not want it
//              releases at once. It has the scores of the next slot that it wants under way, and the output of the one
//              before, while it weighs those of this one
//
// Keys are released once they were scored, values once they made output. A consumer that holds values waits only for
// slots that the producer can fill without them: kSoon says whether the next one is so near. Else the consumer first
// ends what it has begun.
//
// Row blocks 2i and 2i + 1 of a piece are always merged, wanted or not, so that rows do not depend on how it is cut. Of
// a piece of few rows, several blocks take a share of each list.
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
constexpr int kSlotKeys = kTileKeys;
constexpr int kKeyRing = 5, kValueRing = 7;   // slots
constexpr int kReach = (kValueRing - 1) / 2;  // a consumer holds the values of two slots while it waits for a third
constexpr int kWindow = 512;                  // entries of each list that are merged at once
constexpr int kMostShares = 64, kShareSlots = 64;  // of the lists of few rows; slots of a share at least
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
constexpr int32_t kNoKey = INT_MAX;
constexpr int kNone = -1;

enum NamedBarrier { kPlan = 1 };  // the producer's warps agree on a plan

constexpr int kSlotPanelBytes = kSlotKeys * kPanelRowBytes;

// What consumers know of a slot.
struct SlotInfo {
  int32_t first;    // its first key; kNoKey: the keys are columns; other fields hold for both
  int32_t end;      // keys from here on count for none
  uint32_t traits;  // the stage, or kLast; then bit by bit for each consumer:
};
enum Trait {
  kWanted = 8,  // its row block lists the slot
  kMasked = 16,
  kSoon = 24  // it wants one of the next kReach slots, of the same stage
};
constexpr uint32_t kLast = kStages;  // in place of a stage: no slot, the item ends
__device__ inline uint32_t traits_of(uint32_t stage, uint32_t wanted, uint32_t masked, uint32_t soon) {
  return stage | wanted << kWanted | masked << kMasked | soon << kSoon;
}
__device__ inline int stage_of(uint32_t traits) { return traits & 0xff; }

// A key with marks: the row blocks that list it, bit by bit.
constexpr int kMarkShift = 30;
__device__ inline uint32_t mark(int32_t key, int marks) { return key | static_cast<uint32_t>(marks) << kMarkShift; }
__device__ inline int32_t key_of(uint32_t marked) { return marked & ((1u << kMarkShift) - 1); }
__device__ inline int marks_of(uint32_t marked) { return marked >> kMarkShift; }

// One row block's list of a stage, or this share of it: entries [taken, end) are still to be merged.
struct List {
  const int32_t* entries;
  int32_t taken, end;

  __device__ bool more() const { return taken < end; }
};
using Pair = List[2];

// What the producer is about to load. A block's row r lies at number near + r of the pool before the border of the page
// that it begins in, at far + r behind it.
struct Plan {
  Pair blocks[kStages], columns[kStages];
  int32_t entry[2][kWindow];                 // of the two lists, kNoKey behind their ends
  uint32_t twice[kWindow / kWarp];           // bit by bit, which entries of the first list the second has as well
  uint32_t merged[2 * kWindow + kSlotKeys];  // marked keys, ascending
  int32_t near[2 * kWindow], far[2 * kWindow];
  uint8_t soon[2 * kWindow];
};

struct alignas(1024) Shared {
  char keys[kKeyRing][kPanels][kSlotPanelBytes];
  char values[kValueRing][kPanels][kSlotPanelBytes];
  uint64_t key_full[kKeyRing], key_empty[kKeyRing];
  uint64_t value_full[kValueRing], value_empty[kValueRing];
  // Of the slot whose values lie there.
  SlotInfo info[kValueRing];
  int32_t position[kValueRing][kSlotKeys];  // of columns; kNoKey where there is none
  uint64_t listed[kValueRing][kConsumers];  // which of them a consumer's row block lists
  Plan plan;
};
static_assert(sizeof(Shared) <= 227 << 10, "what a block may have");

struct SparseArguments : qwen1m_dca_sparse_prefill {
  Shares shares;
};

// Row blocks 2i and 2i + 1 of one head, and a share of their lists.
struct Item {
  const SparseArguments& a;
  int head, row_block;

  __device__ explicit Item(const SparseArguments& arguments)
      : a(arguments), head(blockIdx.y), row_block(2 * (a.first_block / 2 + static_cast<int>(blockIdx.x))) {}
  __device__ int share() const { return blockIdx.z; }
  __device__ int32_t begin() const { return a.begin + row_block * kRows; }    // position of the first row
  __device__ int32_t first_row() const { return a.row + row_block * kRows; }  // its number in the step
  __device__ int32_t rows() const { return min(a.rows - row_block * kRows, kConsumers * kRows); }
  // Whether row block 2i + c is to be computed, and as bits.
  __device__ bool has(int c) const {
    return row_block + c >= a.first_block && row_block + c < a.first_block + a.num_blocks;
  }
  __device__ int present() const { return (has(0) ? 1 : 0) | (has(1) ? 2 : 0); }
};

// How many of `count` ascending entries are below `value`.
__device__ inline int32_t count_below(const int32_t* entries, int32_t count, int32_t value) {
  int32_t from = 0;
  while (from < count) {
    const int32_t middle = (from + count) / 2;
    if (__ldg(entries + middle) < value) {
      from = middle + 1;
    } else {
      count = middle;
    }
  }
  return from;
}

// The same of `kWindow` in shared memory.
__device__ inline int count_below(const int32_t* entries, int32_t value) {
  int n = 0;
#pragma unroll
  for (int step = kWindow / 2; step > 0; step /= 2) {
    if (entries[n + step - 1] < value) n += step;
  }
  return n + (entries[n] < value);
}

template <typename T>
struct Producer {
  const SparseArguments& a;
  Shared& shared;
  RingPlace<kKeyRing> key;
  RingPlace<kValueRing> value;
  int32_t head_bytes = 0;  // where the item's head begins in a row of the pool

  __device__ void agree() const { named_sync(kPlan, kWarpgroup); }

  __device__ int32_t pool_row(int32_t position) const {
    return static_cast<int32_t>(Pages(a.block_table, a.cache.page_size).slot(position));
  }
  __device__ int32_t page_mask() const { return a.cache.page_size - 1; }

  __device__ void wait_for_slot() const {
    barrier_wait(shared_address(&shared.value_empty[value.index]), value.parity ^ 1);
    barrier_wait(shared_address(&shared.key_empty[key.index]), key.parity ^ 1);
  }

  // After the slot was described by thread 0 and the copies of its keys are under way.
  __device__ void hand_over_keys() {
    const uint32_t full = shared_address(&shared.key_full[key.index]);
    copy_arrive(full);
    if (threadIdx.x == 0) barrier_arrive(full);
    key.advance();
  }

  // The slot's keys and values; pool_row_of a row of this thread.
  template <typename F>
  __device__ void copy_slot(F&& pool_row_of) {
    constexpr int kAtOnce = kWarpgroup / 16, kEach = kSlotKeys / kAtOnce;
    const int row = threadIdx.x / 16, chunk = threadIdx.x % 16;  // of the first copy; the others 8 rows further
    const int32_t stride = a.cache.kv_heads * kHeadDim * static_cast<int32_t>(sizeof(T));
    const int place = chunk / 8 * kSlotPanelBytes + row * kPanelRowBytes + ((chunk % 8 ^ row) << 4);
    int32_t rows[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) rows[i] = pool_row_of(row + kAtOnce * i);
    const auto copy = [&](const void* pool, const void* target) {
      const char* source = static_cast<const char*>(pool) + head_bytes + chunk * 16;
      const uint32_t to = shared_address(target) + place;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        copy_async(to + i * kAtOnce * kPanelRowBytes, source + static_cast<int64_t>(rows[i]) * stride);
      }
    };
    copy(a.cache.key, shared.keys[key.index]);
    hand_over_keys();
    copy(a.cache.value, shared.values[value.index]);
    copy_arrive(shared_address(&shared.value_full[value.index]));
    value.advance();
  }

  __device__ void end_item() {
    wait_for_slot();
    if (threadIdx.x == 0) shared.info[value.index].traits = kLast;
    hand_over_keys();
  }

  // Which of `wanting` the slot's keys, the last of them `last`, need a mask for.
  __device__ int masked(const Item& item, int stage, int32_t last, int32_t end, int wanting) const {
    if (last >= end) return wanting;
    if (stage != kIntra) return 0;
    return wanting & ((last > item.begin() ? 1 : 0) | (last > item.begin() + kRows ? 2 : 0));
  }

  // This block's share of the lists of all stages, which stand one behind the other; a thread for a pair of lists.
  __device__ void open(const Item& item) const {
    const int stage = threadIdx.x % kStages, row_blocks = (a.rows + kRows - 1) / kRows;
    const bool columns = threadIdx.x >= kStages;
    if (threadIdx.x < kWarp) {
      Pair lists{};
      int32_t slots = 0;
      for (int c = 0; threadIdx.x < 2 * kStages && c < 2 && item.row_block + c < row_blocks; ++c) {
        const int64_t number = static_cast<int64_t>(item.head) * row_blocks + item.row_block + c;
        const int32_t* counts = a.tables.counts + number * 2 * kStages + (columns ? kStages : 0);
        lists[c].entries = columns ? a.tables.columns + number * a.tables.column_width
                                   : a.tables.blocks + number * a.tables.block_width;
        for (int before = kInter; before > stage; --before) lists[c].entries += __ldg(counts + before);
        lists[c].end = __ldg(counts + stage);
        slots = max(slots, columns ? lists[c].end / kSlotKeys : lists[c].end);
      }
      if (a.shares.count > 1) {
        const int32_t all_slots = __reduce_add_sync(kAllLanes, slots);
        const int count = max(1, min(a.shares.count, all_slots / kShareSlots));
        if (lists[0].end > 0) {
          cut(lists[0], lists[1], item.share(), count);
        } else {
          cut(lists[1], lists[0], item.share(), count);
        }
      }
      if (threadIdx.x < 2 * kStages) {
        Pair& opened = (columns ? shared.plan.columns : shared.plan.blocks)[stage];
        opened[0] = lists[0];
        opened[1] = lists[1];
      }
    }
    agree();
  }

  // Share number `share` of `count`: one list is cut into equal parts, the other where the entries are as large.
  __device__ static void cut(List& even, List& other, int share, int count) {
    const int64_t entries = even.end;
    const auto border = [&](int number) { return static_cast<int32_t>(entries * min(number, count) / count); };
    const auto other_border = [&](int32_t at) {
      return at == 0 ? 0 : at == entries ? other.end : count_below(other.entries, other.end, __ldg(even.entries + at));
    };
    const int32_t from = border(share), to = border(share + 1);
    if (entries > 0) {
      const int32_t first = other_border(from);
      other.end = other_border(to);
      other.taken = first;
    }
    even.taken = from;
    even.end = to;
  }

  // Appends to plan.merged from `at` on what the next windows surely hold of the lists' union, with its marks. Returns
  // how many entries that are.
  __device__ int merge(Pair& lists, int at) {
    Plan& plan = shared.plan;
    constexpr int kEach = kWindow / kWarpgroup;
    int lane = threadIdx.x % kWarp;
    asm("" : "+r"(lane));  // computed here each time: no registers are left to keep addresses in
    const int first_group = threadIdx.x / kWarp * kEach;
#pragma unroll
    for (int l = 0; l < 2; ++l) {
      for (int i = threadIdx.x; i < kWindow; i += kWarpgroup) {
        const int32_t number = lists[l].taken + i;
        plan.entry[l][i] = number < lists[l].end ? __ldg(lists[l].entries + number) : kNoKey;
      }
    }
    agree();
    const int32_t bound = min(plan.entry[0][kWindow - 1], plan.entry[1][kWindow - 1]);
    int taken[2];
#pragma unroll
    for (int l = 0; l < 2; ++l) {
      taken[l] = bound == kNoKey ? min(lists[l].end - lists[l].taken, kWindow) : count_below(plan.entry[l], bound + 1);
    }
#pragma unroll 1
    for (int k = 0; k < kEach; ++k) {
      const int i = (first_group + k) * kWarp + lane;
      const int32_t key = plan.entry[0][i];
      const int below = count_below(plan.entry[1], key);
      const bool twice = i < taken[0] && below < kWindow && plan.entry[1][below] == key;
      const unsigned both = __ballot_sync(kAllLanes, twice);
      if (lane == 0) plan.twice[first_group + k] = both;
    }
    agree();
    // Lane g holds how many entries of groups up to g are in both lists.
    int doubles = lane < kWindow / kWarp ? __popc(plan.twice[lane]) : 0;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int lower = __shfl_up_sync(kAllLanes, doubles, distance);
      if (lane >= distance) doubles += lower;
    }
    const auto doubles_before = [&](int i) {
      const int group = i / kWarp, before = __shfl_sync(kAllLanes, doubles, max(group - 1, 0));
      const unsigned own = group < kWindow / kWarp ? plan.twice[group] & ((1u << i % kWarp) - 1) : 0;
      return (group > 0 ? before : 0) + __popc(own);
    };
#pragma unroll 1
    for (int k = 0; k < kEach; ++k) {
      const int i = (first_group + k) * kWarp + lane;
      const int32_t key = plan.entry[0][i];
      const int below = count_below(plan.entry[1], key), rank = i + below - doubles_before(i);
      if (i < taken[0]) {
        plan.merged[at + rank] = mark(key, plan.twice[first_group + k] >> lane & 1 ? 3 : 1);
      }
    }
#pragma unroll 1
    for (int k = 0; k < kEach; ++k) {
      const int i = (first_group + k) * kWarp + lane;
      const int32_t key = plan.entry[1][i];
      const int before = count_below(plan.entry[0], key), rank = i + before - doubles_before(before);
      if (i < taken[1] && !(before < kWindow && plan.entry[0][before] == key)) {
        plan.merged[at + rank] = mark(key, 2);
      }
    }
    if (threadIdx.x == 0) {
      lists[0].taken += taken[0];
      lists[1].taken += taken[1];
    }
    const int total = taken[0] + taken[1] - __shfl_sync(kAllLanes, doubles, kWarp - 1);
    agree();
    return total;
  }

  __device__ void load_block(const Item& item, int stage, int32_t end, int number) {
    const uint32_t planned = shared.plan.merged[number];
    const int32_t first = key_of(planned), near = shared.plan.near[number], far = shared.plan.far[number];
    const int wanted = marks_of(planned) & item.present();
    if (wanted == 0) return;
    wait_for_slot();
    if (threadIdx.x == 0) {
      const int masks = masked(item, stage, first + kSlotKeys - 1, end, wanted);
      shared.info[value.index] = {first, end, traits_of(stage, wanted, masks, shared.plan.soon[number])};
    }
    // In place of no key stands the last one, whose weight the mask makes zero.
    const int32_t start = min(first, end - 1), border = page_mask() + 1 - (start & page_mask()), last = end - 1 - start;
    copy_slot([&](int32_t r) {
      r = min(r, last);
      return (r < border ? near : far) + r;
    });
  }

  __device__ void load_blocks(const Item& item, int stage, int32_t end) {
    Pair& lists = shared.plan.blocks[stage];
    while (lists[0].more() || lists[1].more()) {
      const int count = merge(lists, 0);
      for (int i = threadIdx.x; i < count; i += kWarpgroup) {
        const int32_t start = min(key_of(shared.plan.merged[i]), end - 1), border = (start | page_mask()) + 1;
        const int32_t near = pool_row(start);
        int soon = 0;
        for (int next = i + 1; next < min(i + 1 + kReach, count); ++next) soon |= marks_of(shared.plan.merged[next]);
        shared.plan.soon[i] = static_cast<uint8_t>(soon);
        shared.plan.near[i] = near;
        shared.plan.far[i] = border < min(start + kSlotKeys, end) ? pool_row(border) - (border - start) : near;
      }
      agree();
      for (int i = 0; i < count; ++i) load_block(item, stage, end, i);
    }
  }

  // `count` of the planned columns from `from` on, for the row blocks that list some of the stage.
  __device__ void load_slot_of_columns(const Item& item, int stage, int32_t end, int listing, int from, int count,
                                       bool more) {
    const uint32_t* columns = shared.plan.merged + from;
    wait_for_slot();
    if (threadIdx.x < kWarp) {
      uint64_t listed[kConsumers] = {};
      int32_t last = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = half * kWarp + threadIdx.x;
        const uint32_t column = i < count ? columns[i] : 0;
        const int32_t position = i < count ? key_of(column) : kNoKey;
        const int marks = marks_of(column);
        shared.position[value.index][i] = position;
        last = __shfl_sync(kAllLanes, position, kWarp - 1);
#pragma unroll
        for (int c = 0; c < kConsumers; ++c) {
          listed[c] |= static_cast<uint64_t>(__ballot_sync(kAllLanes, marks >> c & 1)) << half * kWarp;
        }
      }
      if (threadIdx.x == 0) {
        const int wanted = listing & item.present();
        int flags = masked(item, stage, last, end, wanted);
#pragma unroll
        for (int c = 0; c < kConsumers; ++c) {
          shared.listed[value.index][c] = listed[c];
          flags |= (listed[c] != ~0ull) << c;
        }
        shared.info[value.index] = {kNoKey, end, traits_of(stage, wanted, flags, more ? 3 : 0)};
      }
      __syncwarp();
    }
    // In place of no key stands the first one.
    copy_slot([&](int32_t r) { return pool_row(key_of(columns[r < count ? r : 0])); });
  }

  __device__ void load_columns(const Item& item, int stage, int32_t end) {
    Pair& lists = shared.plan.columns[stage];
    const int listing = (lists[0].more() ? 1 : 0) | (lists[1].more() ? 2 : 0);
    if ((listing & item.present()) == 0) return;
    int waiting = 0;
    for (bool more = true; more;) {
      const int count = waiting + merge(lists, waiting);
      more = lists[0].more() || lists[1].more();
      int from = 0;
      for (; from + kSlotKeys <= count || (!more && from < count); from += kSlotKeys) {
        const int slot = min(count - from, kSlotKeys);
        load_slot_of_columns(item, stage, end, listing, from, slot, more || from + kSlotKeys < count);
      }
      waiting = max(count - from, 0);
      if (more) {
        agree();
        const uint32_t left = threadIdx.x < waiting ? shared.plan.merged[from + threadIdx.x] : 0;
        agree();
        if (threadIdx.x < waiting) shared.plan.merged[threadIdx.x] = left;
      }
    }
  }

  __device__ void walk(const Item& item) {
    open(item);
    head_bytes = item.head / (a.heads / a.cache.kv_heads) * kHeadDim * static_cast<int32_t>(sizeof(T));
    for (int stage = kInter; stage >= kIntra; --stage) {
      const int32_t end = stage == kIntra ? item.begin() + item.rows()
                                          : stage_keys(static_cast<Stage>(stage), item.begin(), a.chunk_len).end;
      load_blocks(item, stage, end);
      load_columns(item, stage, end);
    }
    end_item();
  }
};

template <typename T>
struct Consumer {
  const SparseArguments& a;
  Shared& shared;
  const int number = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  RingPlace<kKeyRing> key;
  RingPlace<kValueRing> value;
  int before = kNone;  // whose output is under way
  Rows<T> rows;
  uint32_t queries[kHeadDim / 16][4];

  // After all of the warp have read what they need of the slot.
  __device__ void release(uint64_t& barrier) const {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) barrier_arrive(shared_address(&barrier));
  }

  // The rows' rotation of a stage, as left factors; rows that do not exist repeat the last one.
  __device__ void take_queries(const Item& item, int stage) {
    const int lane = threadIdx.x % kWarp, row = number * kRows + threadIdx.x / kWarp % 4 * 16 + lane / 4;
    const int64_t stride = static_cast<int64_t>(a.heads) * kHeadDim;
    const T* q = static_cast<const T*>(a.q) + (stage * static_cast<int64_t>(a.tokens) + item.first_row()) * stride +
                 item.head * kHeadDim + lane % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t* values = reinterpret_cast<const uint32_t*>(q + min(row + 8 * h, item.rows() - 1) * stride);
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        queries[step][h] = __ldg(values + step * 8);
        queries[step][h + 2] = __ldg(values + step * 8 + 4);
      }
    }
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) settle(queries[step]);
  }

  // scores = Q K^T of a slot, under way.
  __device__ void score(float (&scores)[kSlotKeys / 2], int place) {
    const uint32_t k = rows_descriptor(shared_address(shared.keys[place][0]));
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      multiply_transposed<T>(scores, queries[step], k + (step / 4 * kSlotPanelBytes >> 4) + step % 4 * 2, step > 0);
    }
  }

  __device__ uint32_t values_of(int place) const {
    return columns_descriptor(shared_address(shared.values[place][0]), kSlotKeys);
  }

  __device__ bool is(Trait trait, uint32_t traits) const { return traits >> trait >> number & 1; }

  __device__ void mask(const Item& item, int place, float (&scores)[kSlotKeys / 2]) const {
    const SlotInfo& info = shared.info[place];
    const int32_t position = item.begin() + number * kRows + threadIdx.x / kWarp % 4 * 16 + threadIdx.x % kWarp / 4;
    const int32_t limit[2] = {min(position, info.end - 1), min(position + 8, info.end - 1)};
    const bool columns = info.first == kNoKey;
    const int pair = threadIdx.x % 4 * 2;
    const uint64_t listed = columns ? shared.listed[place][number] >> pair : ~0ull;
    // Bit by bit, which of this thread's keys its two rows see: gathered one by one, since registers are few.
    uint32_t seen[2] = {};
#pragma unroll 1
    for (int i = 0; i < kSlotKeys / 4; ++i) {
      const int column = i / 2 * 8 + i % 2;
      const int32_t key = columns ? shared.position[place][pair + column] : info.first + pair + column;
      const uint32_t bit = static_cast<uint32_t>(listed >> column & 1) << i;
#pragma unroll
      for (int h = 0; h < 2; ++h) seen[h] |= key <= limit[h] ? bit : 0;
    }
#pragma unroll
    for (int i = 0; i < kSlotKeys / 2; ++i) {
      if (!(seen[i / 2 % 2] >> (i / 4 * 2 + i % 2) & 1)) scores[i] = kNegativeInfinity;
    }
  }

  // Moves on to the next slot that this row block wants, or to the item's end, and releases those between. Returns the
  // slot's traits, which one lane reads for all, so that who reads releases.
  __device__ uint32_t find() {
    for (;; key.advance(), value.advance()) {
      barrier_wait(shared_address(&shared.key_full[key.index]), key.parity);
      uint32_t traits = 0;
      if (threadIdx.x % kWarp == 0) traits = shared.info[value.index].traits;
      traits = __shfl_sync(kAllLanes, traits, 0);
      if (stage_of(traits) == kLast || is(kWanted, traits)) return traits;
      release(shared.key_empty[key.index]);
      release(shared.value_empty[value.index]);
    }
  }

  // A slot whose scores are under way.
  struct Slot {
    uint32_t traits;
    int key;
    RingPlace<kValueRing> value;
  };

  // The scores of the slot that was found, under way.
  __device__ Slot begin(uint32_t traits, Scores<T, kSlotKeys>& scores) {
    const Slot slot{traits, key.index, value};
    async_proxy_fence();
    products_begin();
    score(scores.value, slot.key);
    products_commit();
    key.advance();
    value.advance();
    return slot;
  }

  // Whether the consumer may wait for its next slot before it has made output of this one.
  __device__ bool comes_soon(const Slot& slot) const { return __any_sync(kAllLanes, is(kSoon, slot.traits)); }

  // The scores of `slot` are there: its keys are not needed any more.
  __device__ void end_scores(const Slot& slot, Scores<T, kSlotKeys>& scores) {
    products_wait<1>();
    settle(scores.value);
    release(shared.key_empty[slot.key]);
  }

  // The output of `slot` under way, behind that of the slot before, whose values are released. kGroups: of products
  // that were begun since.
  template <int kGroups>
  __device__ void attend(const Item& item, float scale, Scores<T, kSlotKeys>& scores,
                         uint32_t (&weights)[kSlotKeys / 4], const Slot& slot) {
    const int place = slot.value.index;
    if (is(kMasked, slot.traits)) mask(item, place, scores.value);
    rows.soften(scores, scale);
    settle(scores.value);
    rows.template settle_output<kGroups>();
    settle(weights);
    release_values();
    before = place;
    scores.pack(weights);
    barrier_wait(shared_address(&shared.value_full[place]), slot.value.parity);
    async_proxy_fence();
    settle(rows.out);
    settle(weights);
    products_begin();
    rows.template attend<kSlotKeys / 16>(weights, 0, values_of(place));
    products_commit();
  }

  __device__ void release_values() {
    if (before != kNone) release(shared.value_empty[before]);
    before = kNone;
  }

  // Attends to `slot` with the scores of the next one under way, and goes on to that one.
  __device__ void advance(const Item& item, float scale, Scores<T, kSlotKeys>& scores,
                          Scores<T, kSlotKeys>& next_scores, uint32_t (&weights)[kSlotKeys / 4], Slot& slot) {
    end_scores(slot, scores);
    const Slot next = begin(find(), next_scores);
    attend<1>(item, scale, scores, weights, slot);
    slot = next;
  }

  __device__ void end(const Item& item, float scale, Scores<T, kSlotKeys>& scores, uint32_t (&weights)[kSlotKeys / 4],
                      const Slot& slot) {
    end_scores(slot, scores);
    attend<0>(item, scale, scores, weights, slot);
    products_wait<0>();
    settle(rows.out);
    settle(weights);
    release_values();
  }

  __device__ void walk(const Item& item) {
    const float scale = a.scale * kLog2E;
    rows.start();
    int stage = kLast;
    for (;;) {
      const uint32_t traits = find();
      if (stage_of(traits) == kLast) break;
      if (stage_of(traits) != stage) {
        stage = stage_of(traits);
        take_queries(item, stage);
      }
      Scores<T, kSlotKeys> even, odd;
      uint32_t weights[kSlotKeys / 4];
      Slot slot = begin(traits, even);
      products_commit();  // in place of an output under way
      for (;;) {
        if (!comes_soon(slot)) {
          end(item, scale, even, weights, slot);
          break;
        }
        advance(item, scale, even, odd, weights, slot);
        if (!comes_soon(slot)) {
          end(item, scale, odd, weights, slot);
          break;
        }
        advance(item, scale, odd, even, weights, slot);
      }
    }
    if (!item.has(number)) return;
    const int64_t first_row = item.first_row() + number * kRows;
    if (a.shares.count > 1) {
      const int64_t line = (first_row - a.shares.first_row) * a.heads + item.head;
      rows.store_share(a.shares, item.rows() - number * kRows, scale, [&](int row) {
        return (line + static_cast<int64_t>(row) * a.heads) * a.shares.count + item.share();
      });
    } else {
      const int64_t place = first_row * a.heads + item.head;
      rows.store(static_cast<T*>(a.out) + place * kHeadDim, a.lse == nullptr ? nullptr : a.lse + place,
                 item.rows() - number * kRows, a.heads, scale);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) dca_sparse_prefill_kernel(const __grid_constant__ SparseArguments a) {
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
    for (uint64_t& full : shared.key_full) barrier_init(shared_address(&full), kWarpgroup + 1);
    for (uint64_t& full : shared.value_full) barrier_init(shared_address(&full), kWarpgroup);
    for (uint64_t& empty : shared.key_empty) barrier_init(shared_address(&empty), kConsumerWarps);
    for (uint64_t& empty : shared.value_empty) barrier_init(shared_address(&empty), kConsumerWarps);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    Producer<T>{a, shared}.walk(Item(a));
  } else {
    take_registers<kConsumerRegisters>();
    Consumer<T>{a, shared}.walk(Item(a));
  }
}

// How many shares the lists of a piece are cut into at most. It follows from the piece, not from the row blocks that
// are attended to, so that rows do not depend on how it is cut.
int32_t most_shares(const qwen1m_dca_sparse_prefill& a) {
  if (a.rows > kFewRows) return 1;
  const int32_t slots = a.tables.block_width + a.tables.column_width / kSlotKeys;
  return std::max(1, std::min({kMostShares, kSharedRows / a.rows, slots / kShareSlots}));
}

}  // namespace

int64_t dca_sparse_prefill_workspace(const qwen1m_dca_sparse_prefill& a) {
  return shares_bytes(static_cast<int64_t>(a.rows) * a.heads, kHeadDim, most_shares(a));
}

template <typename T>
int dca_sparse_prefill(const qwen1m_dca_sparse_prefill& piece, void* workspace, qwen1m_stream stream) {
  if (piece.num_blocks == 0) return cudaSuccess;
  const SparseArguments a{piece, Shares(workspace, static_cast<int64_t>(piece.rows) * piece.heads, kHeadDim,
                                        most_shares(piece), piece.row)};
  const auto kernel = dca_sparse_prefill_kernel<T>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (status != cudaSuccess) return status;
  const int pairs = (a.first_block + a.num_blocks - 1) / 2 - a.first_block / 2 + 1;
  kernel<<<dim3(pairs, a.heads, a.shares.count), kThreads, sizeof(Shared), as_stream(stream)>>>(a);
  if (a.shares.count == 1) return cudaGetLastError();
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess) return launched;
  const int32_t skipped = a.first_block * kRows;
  const MergedRows rows{{a.row + skipped}, {std::min(a.rows - skipped, a.num_blocks * kRows)}, 1, a.heads};
  return merge_shares<T, kHeadDim>(rows, a.shares, a.out, a.lse, as_stream(stream));
}

template int dca_sparse_prefill<bf16>(const qwen1m_dca_sparse_prefill&, void*, qwen1m_stream);
template int dca_sparse_prefill<f16>(const qwen1m_dca_sparse_prefill&, void*, qwen1m_stream);

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
