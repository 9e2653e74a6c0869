// Sparse dual chunk attention on Hopper: three neighbouring row blocks of one head share a stream of slots of 64 keys.
//
// A row block's keys are blocks of 64 that start anywhere, then single columns; the next row block's blocks are mostly
// the same, shifted by 64, and its columns are the same but for those that blocks cover. So the lists of blocks are
// merged, a slot says which row blocks want it, and what several want is read once. A row block only ever weighs the
// keys that its own tables name, in their order.
//
//   pack       before all else the head's columns are copied together, so that 64 of them are a slot in one piece
//   producer   four warps. They merge the lists, a window of each at once, into a plan of slots and bring the planned
//              keys and values into a ring each: slots that lie in one piece by the copy engine, as columns do, and all
//              blocks where pages follow each other in the pool, others row by row
//   consumers  three warpgroups, a row block each. A slot that a consumer does not want it releases at once. Output of
//              a slot and scores of the next one that it wants are under way together; then it is at its softmax, and
//              the tensor cores are the others'
//
// Keys are released once they were scored, values once they made output. A consumer that holds values waits only for
// slots that the producer can fill without them: kSoon says whether the next one is so near. Else the consumer first
// ends what it has begun.
//
// Which row blocks of a piece are merged does not depend on which are wanted, so that rows do not depend on how it is
// cut. Of a piece of few rows, several blocks take a share of each list.
#include <algorithm>
#include <climits>
#include <utility>

#include "attention.cuh"
#include "row_loads.cuh"
#include "rows.cuh"
#include "tensor_map.h"

namespace qwen1m {
namespace cuda {
namespace sm90 {
namespace {

constexpr int kConsumers = 3, kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kSlotKeys = kTileKeys;
static_assert(kSlotKeys == QWEN1M_COLUMN_GROUP, "a group of columns is a slot");
constexpr int kKeyRing = 4, kValueRing = 6;  // slots
constexpr int kReach = kValueRing - 1;       // a consumer holds the values of a slot while it waits for another
constexpr int kWindow = kWarpgroup;          // blocks of each list, groups of columns: planned at once, one a thread
constexpr int kMostShares = 64, kShareSlots = 64;  // of the lists of few rows; slots of a share at least
constexpr int kProducerRegisters = 56, kConsumerRegisters = 152;
constexpr int kAll = (1 << kConsumers) - 1;  // row blocks, bit by bit
constexpr int32_t kNoKey = INT_MAX;
constexpr int kNone = -1;
constexpr int64_t kAnyRow = INT32_MAX;  // the pages' number is not known here; tables name only those that exist

// The producer's warps agree on a plan; kQueries + consumer: its warps on the queries that lie there.
enum NamedBarrier { kPlan = 1, kQueries };

constexpr int kSlotPanelBytes = kSlotKeys * kPanelRowBytes;

// What consumers know of a slot.
struct SlotInfo {
  int32_t first;    // its first key, or where its first column stands among the head's
  int32_t end;      // keys from here on count for none
  uint32_t traits;  // the stage, or kLast; then bit by bit for each consumer, but for the last two:
};
enum Trait {
  kWanted = 8,     // its row block lists the slot
  kBounded = 12,   // some keys lie behind a row or behind the end
  kHoles = 16,     // it does not list some of the columns
  kSoon = 20,      // it wants one of the next kReach slots, of the same stage
  kGathered = 24,  // the slot was copied row by row, which the tensor cores see behind a fence alone
  kColumns = 25    // its keys are columns
};
static_assert(kConsumers <= kBounded - kWanted, "the bits of a trait");
constexpr uint32_t kLast = kStages;  // in place of a stage: no slot, the item ends
__device__ inline uint32_t traits_of(uint32_t stage, uint32_t wanted, uint32_t bounded, uint32_t soon) {
  return stage | wanted << kWanted | bounded << kBounded | soon << kSoon;
}
__device__ inline int stage_of(uint32_t traits) { return traits & 0xff; }
__device__ inline bool is_gathered(uint32_t traits) { return traits >> kGathered & 1; }
__device__ inline bool has_columns(uint32_t traits) { return traits >> kColumns & 1; }

// A key with marks: the row blocks that list it, bit by bit.
constexpr int kMarkShift = 32 - kConsumers;
__device__ inline uint32_t mark(int32_t key, int marks) { return key | static_cast<uint32_t>(marks) << kMarkShift; }
__device__ inline int32_t key_of(uint32_t marked) { return marked & ((1u << kMarkShift) - 1); }
__device__ inline int marks_of(uint32_t marked) { return marked >> kMarkShift; }

// One row block's list of a stage, or this share of it: entries [taken, end) are still to be merged.
struct List {
  const int32_t* entries;
  int32_t taken, end;

  __device__ bool more() const { return taken < end; }
};
using Lists = List[kConsumers];

// A stage's groups of columns, or this share of them.
struct Groups {
  int32_t first;       // column of the stage, among the head's
  int32_t taken, end;  // groups
  int listing;         // bit by bit, the row blocks that visit some of the stage's columns
};

// What the producer is about to load. A block's row r lies at number near + r of the pool before the border of the page
// that it begins in, at far + r behind it.
struct Plan {
  Lists blocks[kStages];
  Groups columns[kStages];
  int32_t entry[kConsumers][kWindow];            // of the lists, kNoKey behind their ends
  uint32_t firsts[kConsumers][kWindow / kWarp];  // bit by bit, which entries of a list no list before it has
  uint32_t merged[kConsumers * kWindow];         // marked keys, ascending
  int32_t near[kConsumers * kWindow], far[kConsumers * kWindow];
  uint8_t soon[kConsumers * kWindow];
  uint64_t listed[kWindow][kConsumers];  // of a group's columns, bit by bit, those that a row block visits
  uint8_t bounded[kWindow];              // for which of them some of the group lie behind a row or the end
  uint32_t listing[kWindow / kWarp];     // bit by bit, groups that some row block visits columns of
};

struct alignas(1024) Shared {
  char queries[kConsumers][kPanels][kSlotPanelBytes];
  char keys[kKeyRing][kPanels][kSlotPanelBytes];
  char values[kValueRing][kPanels][kSlotPanelBytes];
  uint64_t key_full[kKeyRing], key_empty[kKeyRing];
  uint64_t value_full[kValueRing], value_empty[kValueRing];
  // Of the slot whose values lie there.
  SlotInfo info[kValueRing];
  uint64_t listed[kValueRing][kConsumers];  // which of its columns a consumer's row block visits
  Plan plan;
};
static_assert(sizeof(Shared) <= kMostSharedBytes, "what a block may have");

// The keys and values of all columns, a head's behind those of the head before, [all_columns, D] each.
struct PackedColumns {
  char *keys, *values;

  PackedColumns(char* memory, const qwen1m_dca_sparse_prefill& a) : keys(memory), values(memory + bytes(a) / 2) {}

  static int64_t bytes(const qwen1m_dca_sparse_prefill& a) {
    return 2 * static_cast<int64_t>(a.all_columns) * kHeadDim * sizeof(bf16);
  }

  // The row of a head's first column. All lanes of a warp call it.
  __device__ static int32_t first_row(const qwen1m_index_tables& tables, int head) {
    int32_t rows = 0;
    for (int before = threadIdx.x % kWarp; before < head; before += kWarp) {
      rows += columns_width(tables.column_counts + before * kStages);
    }
    return __reduce_add_sync(kAllLanes, rows);
  }
};

struct SparseArguments : qwen1m_dca_sparse_prefill {
  CUtensorMap key_map, value_map;
  CUtensorMap column_key_map, column_value_map;  // PackedColumns
  Shares shares;
};

// Neighbouring row blocks of one head, and a share of their lists.
struct Item {
  const SparseArguments& a;
  int head, row_block;

  __device__ explicit Item(const SparseArguments& arguments)
      : a(arguments),
        head(ordered_head(arguments, blockIdx.y)),
        row_block(kConsumers * (a.first_block / kConsumers + static_cast<int>(blockIdx.x))) {}
  __device__ int share() const { return blockIdx.z; }
  __device__ int32_t begin() const { return a.begin + row_block * kRows; }    // position of the first row
  __device__ int32_t first_row() const { return a.row + row_block * kRows; }  // its number in the step
  __device__ int32_t rows() const { return min(a.rows - row_block * kRows, kConsumers * kRows); }
  // Whether its c-th row block is to be computed, and as bits.
  __device__ bool has(int c) const {
    return row_block + c >= a.first_block && row_block + c < a.first_block + a.num_blocks;
  }
  __device__ int present() const {
    int bits = 0;
#pragma unroll
    for (int c = 0; c < kConsumers; ++c) bits |= has(c) << c;
    return bits;
  }
};

// How many of kWindow ascending entries in shared memory are below `value`.
__device__ inline int window_below(const int32_t* entries, int32_t value) {
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
  int32_t packed_row = 0;  // where its columns begin

  __device__ void agree() const { named_sync(kPlan, kWarpgroup); }

  __device__ int32_t pool_row(int32_t position) const {
    return static_cast<int32_t>(Pages(a.block_table, a.cache.page_size).slot(position));
  }
  __device__ int32_t page_mask() const { return a.cache.page_size - 1; }

  __device__ void wait_for_slot() const {
    barrier_wait(shared_address(&shared.value_empty[value.index]), value.parity ^ 1);
    barrier_wait(shared_address(&shared.key_empty[key.index]), key.parity ^ 1);
  }

  // The slot's keys, or its values, once their copies are under way, and thread 0 has described the slot.
  __device__ void hand_over(uint64_t& barrier) const {
    const uint32_t full = shared_address(&barrier);
    copy_arrive(full);
    if (threadIdx.x == 0) barrier_arrive(full);
  }

  // The slot's keys and values; pool_row_of a row of this thread.
  template <typename F>
  __device__ void copy_slot(F&& pool_row_of) {
    constexpr int kAtOnce = kWarpgroup / 16, kEach = kSlotKeys / kAtOnce;
    int thread = threadIdx.x;
    asm("" : "+r"(thread));                            // as in merge
    const int row = thread / 16, chunk = thread % 16;  // of the first copy; the others 8 rows further
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
    hand_over(shared.key_full[key.index]);
    key.advance();
    copy(a.cache.value, shared.values[value.index]);
    hand_over(shared.value_full[value.index]);
    value.advance();
  }

  __device__ void end_item() {
    wait_for_slot();
    if (threadIdx.x == 0) shared.info[value.index].traits = kLast;
    hand_over(shared.key_full[key.index]);
  }

  // For which of `wanting` some of the slot's keys, the last of them `last`, lie behind a row or the end.
  __device__ int bounded(const Item& item, int stage, int32_t last, int32_t end, int wanting) const {
    if (last >= end) return wanting;
    if (stage != kIntra) return 0;
    int below = 0;
#pragma unroll
    for (int c = 0; c < kConsumers; ++c) below |= (last > item.begin() + c * kRows) << c;
    return wanting & below;
  }

  // This block's share of the lists of all stages, which stand one behind the other, and of columns; a thread for those
  // of a kind.
  __device__ void open(const Item& item) const {
    const int stage = threadIdx.x % kStages, row_blocks = (a.rows + kRows - 1) / kRows;
    const bool columns = threadIdx.x >= kStages;
    if (threadIdx.x < kWarp) {
      Lists lists{};
      Groups groups{};
      int32_t slots = 0;
#pragma unroll
      for (int c = 0; c < kConsumers; ++c) {
        if (threadIdx.x >= 2 * kStages || item.row_block + c >= row_blocks) continue;
        const int64_t number = static_cast<int64_t>(item.head) * row_blocks + item.row_block + c;
        const int32_t* counts = a.tables.counts + number * 2 * kStages;
        if (columns) {
          groups.listing |= (__ldg(counts + kStages + stage) > 0) << c;
          continue;
        }
        lists[c].entries = a.tables.blocks + number * a.tables.block_width;
        for (int before = kInter; before > stage; --before) lists[c].entries += __ldg(counts + before);
        lists[c].end = __ldg(counts + stage);
        slots = max(slots, lists[c].end);
      }
      if (groups.listing != 0) {
        const int32_t* counts = a.tables.column_counts + item.head * kStages;
        groups.first = first_column(counts, stage);
        groups.end = (counts[stage] + kSlotKeys - 1) / kSlotKeys;
        slots = groups.end;
      }
      if (a.shares.count > 1) {
        const int32_t all_slots = __reduce_add_sync(kAllLanes, slots);
        const int count = max(1, min(a.shares.count, all_slots / kShareSlots));
        cut(lists, item.share(), count);
        const int32_t all = groups.end;
        groups.taken = all * min(item.share(), count) / count;
        groups.end = all * min(item.share() + 1, count) / count;
      }
      if (threadIdx.x < kStages) {
#pragma unroll
        for (int c = 0; c < kConsumers; ++c) shared.plan.blocks[stage][c] = lists[c];
      } else if (threadIdx.x < 2 * kStages) {
        shared.plan.columns[stage] = groups;
      }
    }
    agree();
  }

  // Share number `share` of `count`: the first list with entries is cut into equal parts, the others where theirs are
  // as large.
  __device__ static void cut(Lists& lists, int share, int count) {
    List even{};
#pragma unroll
    for (int c = kConsumers - 1; c >= 0; --c) {
      if (lists[c].end > 0) even = lists[c];
    }
    const int64_t entries = even.end;
    const auto border = [&](int number) { return static_cast<int32_t>(entries * min(number, count) / count); };
    const auto border_in = [&](const List& list, int32_t at) {
      return at == 0 ? 0 : at == entries ? list.end : count_below(list.entries, list.end, __ldg(even.entries + at));
    };
    const int32_t from = border(share), to = border(share + 1);
    if (entries == 0) return;
#pragma unroll
    for (int c = 0; c < kConsumers; ++c) {
      lists[c].taken = border_in(lists[c], from);
      lists[c].end = border_in(lists[c], to);
    }
  }

  // Plans in plan.merged what the next windows surely hold of the lists' union, with its marks. Returns how many
  // entries that are.
  __device__ int merge(Lists& lists) {
    Plan& plan = shared.plan;
    constexpr int kGroups = kWindow / kWarp;
    int i = threadIdx.x;
    asm("" : "+r"(i));  // computed here each time: no registers are left to keep addresses in
    const int lane = i % kWarp, group = i / kWarp;
#pragma unroll
    for (int l = 0; l < kConsumers; ++l) {
      const int32_t number = lists[l].taken + i;
      plan.entry[l][i] = number < lists[l].end ? __ldg(lists[l].entries + number) : kNoKey;
    }
    agree();
    int32_t bound = kNoKey;
#pragma unroll
    for (int l = 0; l < kConsumers; ++l) bound = min(bound, plan.entry[l][kWindow - 1]);
    int taken[kConsumers];
#pragma unroll
    for (int l = 0; l < kConsumers; ++l) {
      taken[l] = bound == kNoKey ? min(lists[l].end - lists[l].taken, kWindow) : window_below(plan.entry[l], bound + 1);
    }
#pragma unroll
    for (int l = 0; l < kConsumers; ++l) {
      const int32_t key = plan.entry[l][i];
      bool first = i < taken[l];
#pragma unroll
      for (int before = 0; before < l; ++before) {
        first = first && !holds(before, window_below(plan.entry[before], key), key);
      }
      const unsigned all = __ballot_sync(kAllLanes, first);
      if (lane == 0) plan.firsts[l][group] = all;
    }
    agree();
    // Lane g holds how many entries of a list's groups up to g are firsts.
    int firsts[kConsumers];
#pragma unroll
    for (int l = 0; l < kConsumers; ++l) {
      firsts[l] = lane < kGroups ? __popc(plan.firsts[l][lane]) : 0;
#pragma unroll
      for (int distance = 1; distance < kGroups; distance *= 2) {
        const int lower = __shfl_up_sync(kAllLanes, firsts[l], distance);
        if (lane >= distance) firsts[l] += lower;
      }
    }
    const auto firsts_before = [&](int l, int place) {
      const int group = place / kWarp, before = __shfl_sync(kAllLanes, firsts[l], max(group - 1, 0));
      const unsigned own = group < kGroups ? plan.firsts[l][group] & ((1u << place % kWarp) - 1) : 0;
      return (group > 0 ? before : 0) + __popc(own);
    };
    int total = 0;
#pragma unroll
    for (int l = 0; l < kConsumers; ++l) {
      const int32_t key = plan.entry[l][i];
      int rank = 0, marks = 1 << l;
#pragma unroll
      for (int other = 0; other < kConsumers; ++other) {
        const int below = other == l ? i : window_below(plan.entry[other], key);
        if (other != l) marks |= holds(other, below, key) << other;
        rank += firsts_before(other, below);
      }
      if (i < taken[l] && (marks & ((1 << l) - 1)) == 0) plan.merged[rank] = mark(key, marks);
      if (threadIdx.x == 0) lists[l].taken += taken[l];
      total += __shfl_sync(kAllLanes, firsts[l], kGroups - 1);
    }
    agree();
    return total;
  }

  // Whether entry number `place` of a list's window is `key`.
  __device__ bool holds(int list, int place, int32_t key) const {
    return place < kWindow && shared.plan.entry[list][place] == key;
  }

  __device__ static int more_of(const Lists& lists) {
    int more = 0;
#pragma unroll
    for (int c = 0; c < kConsumers; ++c) more |= lists[c].more() << c;
    return more;
  }

  __device__ void load_block(const Item& item, int stage, int32_t end, int number) {
    const uint32_t planned = shared.plan.merged[number];
    const int32_t first = key_of(planned), near = shared.plan.near[number], far = shared.plan.far[number];
    const int wanted = marks_of(planned) & item.present();
    if (wanted == 0) return;
    const int32_t start = min(first, end - 1), border = page_mask() + 1 - (start & page_mask()), last = end - 1 - start;
    const bool gathered = near != far || last < kSlotKeys - 1;
    wait_for_slot();
    if (threadIdx.x == 0) {
      const int bounds = bounded(item, stage, first + kSlotKeys - 1, end, wanted);
      const uint32_t traits = traits_of(stage, wanted, bounds, shared.plan.soon[number]);
      shared.info[value.index] = {first, end, traits | static_cast<uint32_t>(gathered) << kGathered};
    }
    if (!gathered) {
      copy_boxes(a.key_map, a.value_map, head_bytes / (kHeadDim * static_cast<int32_t>(sizeof(T))), near);
    } else {
      // In place of no key stands the last one, whose weight the mask makes zero.
      copy_slot([&](int32_t r) {
        r = min(r, last);
        return (r < border ? near : far) + r;
      });
    }
  }

  // The slot's keys and values, which lie one behind the other from row `first` on.
  __device__ void copy_boxes(const CUtensorMap& keys, const CUtensorMap& values, int head, int32_t first) {
    const auto copy = [&](const CUtensorMap& map, char (&target)[kPanels][kSlotPanelBytes], uint32_t full) {
      if (threadIdx.x != 0) return;
      barrier_arrive_expecting(full, sizeof(target));
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        copy_box(shared_address(target[panel]), map, full, panel * kPanelValues, head, first);
      }
      barrier_arrive(full, kWarpgroup);  // for the threads that copy row by row
    };
    copy(keys, shared.keys[key.index], shared_address(&shared.key_full[key.index]));
    key.advance();
    copy(values, shared.values[value.index], shared_address(&shared.value_full[value.index]));
    value.advance();
  }

  __device__ void load_blocks(const Item& item, int stage, int32_t end) {
    Lists& lists = shared.plan.blocks[stage];
    while (more_of(lists) != 0) {
      const int count = merge(lists);
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

  // A group of columns of the window, for the row blocks that visit some of the stage.
  __device__ void load_group(const Item& item, int stage, int32_t end, int wanted, int number, int32_t first,
                             bool more) {
    wait_for_slot();
    if (threadIdx.x == 0) {
      uint32_t holes = 0;
#pragma unroll
      for (int c = 0; c < kConsumers; ++c) {
        const uint64_t listed = shared.plan.listed[number][c];
        shared.listed[value.index][c] = listed;
        holes |= static_cast<uint32_t>(listed != ~0ull) << c;
      }
      const uint32_t traits = traits_of(stage, wanted, shared.plan.bounded[number] & wanted, more ? kAll : 0);
      shared.info[value.index] = {first, end, traits | holes << kHoles | 1u << kColumns};
    }
    copy_boxes(a.column_key_map, a.column_value_map, 0, packed_row + first);
  }

  __device__ void load_columns(const Item& item, int stage, int32_t end) {
    const Groups groups = shared.plan.columns[stage];
    const int wanted = groups.listing & item.present();
    if (wanted == 0) return;
    const int row_blocks = (a.rows + kRows - 1) / kRows;
    const int32_t words = a.tables.column_width / kSlotKeys;
    const auto* bits = reinterpret_cast<const uint64_t*>(a.tables.listed) +
                       (static_cast<int64_t>(item.head) * row_blocks + item.row_block) * words +
                       groups.first / kSlotKeys;
    const int32_t* columns = a.tables.columns + static_cast<int64_t>(item.head) * a.tables.column_width + groups.first;
    const int32_t count = __ldg(a.tables.column_counts + item.head * kStages + stage);
    for (int32_t begin = groups.taken; begin < groups.end; begin += kWindow) {
      const int32_t group = begin + static_cast<int32_t>(threadIdx.x);
      bool listing = false;
      if (group < groups.end) {
#pragma unroll
        for (int c = 0; c < kConsumers; ++c) {
          const uint64_t listed = groups.listing >> c & 1 ? __ldg(bits + c * words + group) : 0;
          shared.plan.listed[threadIdx.x][c] = listed;
          listing |= listed != 0;
        }
        const int32_t last = __ldg(columns + min((group + 1) * kSlotKeys, count) - 1);
        shared.plan.bounded[threadIdx.x] = static_cast<uint8_t>(bounded(item, stage, last, end, kAll));
      }
      const unsigned all = __ballot_sync(kAllLanes, listing);
      if (threadIdx.x % kWarp == 0) shared.plan.listing[threadIdx.x / kWarp] = all;
      agree();
      for (int word = 0; word < kWindow / kWarp; ++word) {
        for (uint32_t left = shared.plan.listing[word]; left != 0; left &= left - 1) {
          const int number = word * kWarp + __ffs(left) - 1;
          // Of the next windows nobody knows yet.
          const bool more = (left & (left - 1)) != 0 || more_listed(word + 1);
          load_group(item, stage, end, wanted, number, groups.first + (begin + number) * kSlotKeys, more);
        }
      }
      agree();
    }
  }

  // Whether the window has a group to be loaded in this word of bits or a later one.
  __device__ bool more_listed(int word) const {
    bool more = false;
    for (; word < kWindow / kWarp; ++word) more |= shared.plan.listing[word] != 0;
    return more;
  }

  __device__ void walk(const Item& item) {
    open(item);
    packed_row = PackedColumns::first_row(a.tables, item.head);
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
  Scores<T, kSlotKeys> scores;
  uint32_t weights[kSlotKeys / 4];

  // After all of the warp have read what they need of the slot.
  __device__ void release(uint64_t& barrier) const {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) barrier_arrive(shared_address(&barrier));
  }

  // The rows' rotation of a stage, once no product reads the last one's; rows that do not exist repeat the last one.
  __device__ void take_queries(const Item& item, int stage) const {
    named_sync(kQueries + number, kWarpgroup);
    const int first = threadIdx.x % kWarpgroup / 16, chunk = threadIdx.x % 16;
    const int64_t stride = static_cast<int64_t>(a.heads) * kHeadDim;
    const T* q = static_cast<const T*>(a.q) + (stage * static_cast<int64_t>(a.tokens) + item.first_row()) * stride +
                 item.head * kHeadDim + chunk * 8;
    char* target = shared.queries[number][chunk / 8];
#pragma unroll
    for (int r = first; r < kRows; r += kWarpgroup / 16) {
      const uint4 values = __ldg(reinterpret_cast<const uint4*>(q + min(number * kRows + r, item.rows() - 1) * stride));
      *reinterpret_cast<uint4*>(target + r * kPanelRowBytes + ((chunk % 8 ^ r % 8) << 4)) = values;
    }
    async_proxy_fence();
    named_sync(kQueries + number, kWarpgroup);
  }

  // scores = Q K^T of a slot, under way.
  __device__ void score(int place) {
    const uint32_t q = rows_descriptor(shared_address(shared.queries[number][0]));
    const uint32_t k = rows_descriptor(shared_address(shared.keys[place][0]));
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int on = (step / 4 * kSlotPanelBytes >> 4) + step % 4 * 2;
      multiply_shared<T>(scores.value, q + on, k + on, step > 0);
    }
  }

  __device__ uint32_t values_of(int place) const {
    return columns_descriptor(shared_address(shared.values[place][0]), kSlotKeys);
  }

  __device__ bool is(Trait trait, uint32_t traits) const { return traits >> trait >> number & 1; }

  // Columns that the row block does not list count for none.
  __device__ void skip_holes(int place) {
    const int pair = threadIdx.x % 4 * 2;
    const uint64_t listed = shared.listed[place][number] >> pair;
    mask_scores(scores.value, [&](int column, int) { return (listed >> (column - pair) & 1) != 0; });
  }

  // Nor do keys behind a row or the end.
  __device__ void skip_what_is_behind(const Item& item, uint32_t traits, int place) {
    const SlotInfo& info = shared.info[place];
    const int32_t position = item.begin() + number * kRows + threadIdx.x / kWarp % 4 * 16 + threadIdx.x % kWarp / 4;
    const int32_t limit[2] = {min(position, info.end - 1), min(position + 8, info.end - 1)};
    const bool columns = has_columns(traits);
    const int32_t* column_keys = a.tables.columns + item.head * a.tables.column_width + info.first;
    const int pair = threadIdx.x % 4 * 2;
    // Bit by bit, which of this thread's keys its two rows see: gathered one by one, since registers are few.
    uint32_t seen[2] = {};
#pragma unroll 1
    for (int i = 0; i < kSlotKeys / 4; ++i) {
      const int column = i / 2 * 8 + i % 2;
      const int32_t key = columns ? __ldg(column_keys + pair + column) : info.first + pair + column;
#pragma unroll
      for (int h = 0; h < 2; ++h) seen[h] |= (key <= limit[h]) << i;
    }
#pragma unroll
    for (int i = 0; i < kSlotKeys / 2; ++i) {
      if (!(seen[i / 2 % 2] >> (i / 4 * 2 + i % 2) & 1)) scores.value[i] = kNegativeInfinity;
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
  __device__ Slot begin(uint32_t traits) {
    const Slot slot{traits, key.index, value};
    if (is_gathered(traits)) async_proxy_fence();
    products_begin();
    score(slot.key);
    products_commit();
    key.advance();
    value.advance();
    return slot;
  }

  // Whether the consumer may wait for its next slot before it has made output of this one.
  __device__ bool comes_soon(const Slot& slot) const { return __any_sync(kAllLanes, is(kSoon, slot.traits)); }

  // What is under way ends: `out` holds all slots so far.
  __device__ void end_products() {
    products_wait<0>();
    settle(scores.value);
    settle(rows.out);
    settle(weights);
    if (before != kNone) release(shared.value_empty[before]);
    before = kNone;
  }

  // The output of the slot whose scores are there, under way.
  __device__ void attend(const Item& item, float scale, const Slot& slot) {
    const int place = slot.value.index;
    if (is(kHoles, slot.traits)) skip_holes(place);
    if (is(kBounded, slot.traits)) skip_what_is_behind(item, slot.traits, place);
    rows.soften_at_rest(scores, scale);
    scores.pack(weights);
    barrier_wait(shared_address(&shared.value_full[place]), slot.value.parity);
    if (is_gathered(slot.traits)) async_proxy_fence();
    settle(rows.out);
    settle(weights);
    products_begin();
    rows.template attend<kSlotKeys / 16>(weights, 0, values_of(place));
    products_commit();
    before = place;
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
      Slot slot = begin(traits);
      for (;;) {
        end_products();
        release(shared.key_empty[slot.key]);
        attend(item, scale, slot);
        if (!comes_soon(slot)) break;
        slot = begin(find());
      }
      end_products();
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
    for (uint64_t& full : shared.value_full) barrier_init(shared_address(&full), kWarpgroup + 1);
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

// Copies the keys and values of a head's columns together, a block a group; where a group has no more, its last one
// stands. kPackThreads copy some rows at once, 16 bytes each.
constexpr int kPackThreads = 256, kRowThreads = kHeadDim * sizeof(bf16) / 16;

__global__ void __launch_bounds__(kPackThreads) pack_columns(const qwen1m_dca_sparse_prefill a, PackedColumns packed) {
  constexpr int kAtOnce = kPackThreads / kRowThreads, kEach = kSlotKeys / kAtOnce, kRowBytes = kRowThreads * 16;
  const int32_t head = blockIdx.y, first = blockIdx.x * kSlotKeys;
  if (first >= columns_width(a.tables.column_counts + head * kStages)) return;
  const int32_t* columns = a.tables.columns + head * a.tables.column_width + first;
  const int64_t packed_row = PackedColumns::first_row(a.tables, head) + first;
  const int row = threadIdx.x / kRowThreads, chunk = threadIdx.x % kRowThreads;
  const Pages pages(a.block_table, a.cache.page_size);
  const int64_t stride = static_cast<int64_t>(a.cache.kv_heads) * kRowBytes;
  const int64_t from = head / (a.heads / a.cache.kv_heads) * kRowBytes + chunk * 16;
  uint4 keys[kEach], values[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int32_t* column = columns + row + i * kAtOnce;
    int32_t key = __ldg(column);
    while (key == kNoKey) key = __ldg(--column);
    const int64_t place = pages.slot(key) * stride + from;
    keys[i] = __ldg(reinterpret_cast<const uint4*>(static_cast<const char*>(a.cache.key) + place));
    values[i] = __ldg(reinterpret_cast<const uint4*>(static_cast<const char*>(a.cache.value) + place));
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t place = (packed_row + row + i * kAtOnce) * kRowBytes + chunk * 16;
    *reinterpret_cast<uint4*>(packed.keys + place) = keys[i];
    *reinterpret_cast<uint4*>(packed.values + place) = values[i];
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
  return PackedColumns::bytes(a) + shares_bytes(static_cast<int64_t>(a.rows) * a.heads, kHeadDim, most_shares(a));
}

template <typename T>
int dca_sparse_prefill(const qwen1m_dca_sparse_prefill& piece, void* workspace, qwen1m_stream stream) {
  if (piece.num_blocks == 0) return cudaSuccess;
  auto* memory = static_cast<char*>(workspace);
  const PackedColumns packed(memory, piece);
  SparseArguments a{piece,
                    {},
                    {},
                    {},
                    {},
                    Shares(memory + PackedColumns::bytes(piece), static_cast<int64_t>(piece.rows) * piece.heads,
                           kHeadDim, most_shares(piece), piece.row)};
  for (const auto& [map, pool] : {std::pair{&a.key_map, a.cache.key}, std::pair{&a.value_map, a.cache.value}}) {
    const int code = make_tensor_map(*map, a.activation, pool, kHeadDim, a.cache.kv_heads, kAnyRow);
    if (code != cudaSuccess) return code;
  }
  for (const auto& [map, rows] :
       {std::pair{&a.column_key_map, packed.keys}, std::pair{&a.column_value_map, packed.values}}) {
    const int code = make_tensor_map(*map, a.activation, rows, kHeadDim, 1, a.all_columns);
    if (code != cudaSuccess) return code;
  }
  pack_columns<<<dim3(a.tables.column_width / kSlotKeys, a.heads), kPackThreads, 0, as_stream(stream)>>>(piece, packed);
  if (const cudaError_t packing = cudaGetLastError()) return packing;
  const auto kernel = dca_sparse_prefill_kernel<T>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (status != cudaSuccess) return status;
  const int items = (a.first_block + a.num_blocks - 1) / kConsumers - a.first_block / kConsumers + 1;
  kernel<<<dim3(items, a.heads, a.shares.count), kThreads, sizeof(Shared), as_stream(stream)>>>(a);
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
