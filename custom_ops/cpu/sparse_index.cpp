// From selected columns and diagonals to what each row block visits: blocks of keys, and bits of the head's columns.
#include <algorithm>
#include <climits>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "qwen1m/dca_stages.h"
#include "qwen1m/keys.h"

using namespace qwen1m;

namespace {

// Columns and offsets of one stage in its own coordinates: columns ascending from the stage's first key, offsets
// descending, an offset s standing for key = E - s at the end of a row block (E of convert below).
struct StageLines {
  std::vector<int32_t> columns, offsets;
  int32_t first_key, keys;
};

// Five evenly spread entries keep a stage from being empty.
std::vector<int32_t> fallback(int32_t keys) {
  std::vector<int32_t> lines;
  const int32_t step = std::max(1, keys / 5);
  for (int32_t i = 0; i < keys && lines.size() < 5; i += step) lines.push_back(i);
  return lines;
}

StageLines split(Stage stage, const int32_t* columns, const int32_t* columns_end, const int32_t* slashes,
                 const int32_t* slashes_end, int32_t begin, int32_t rows, int32_t chunk_len) {
  const Span keys = stage_keys(stage, begin + rows - 1, chunk_len);
  StageLines lines;
  lines.first_key = keys.begin;
  lines.keys = keys.end - keys.begin;
  // A diagonal that hits a later stage on the last row passes through this one on earlier rows.
  const int32_t last_slash = stage == kIntra ? keys.end : keys.end + rows;
  const int32_t* column = std::lower_bound(columns, columns_end, lines.first_key);
  for (; column != columns_end && *column < keys.end; ++column) {
    lines.columns.push_back(*column - lines.first_key);
  }
  const int32_t* slash = std::lower_bound(slashes, slashes_end, lines.first_key);
  for (; slash != slashes_end && *slash < last_slash; ++slash) lines.offsets.push_back(last_slash - 1 - *slash);
  if (lines.columns.empty()) lines.columns = fallback(lines.keys);
  if (lines.offsets.empty()) {
    lines.offsets = fallback(lines.keys);
    std::reverse(lines.offsets.begin(), lines.offsets.end());
  }
  return lines;
}

// Into a head's columns; `counts` are its column_counts.
void lay_out(const StageLines (&stages)[kStages], int32_t* columns, int32_t* counts) {
  for (const Stage stage : {kInter, kSucc, kIntra}) {
    const StageLines& lines = stages[stage];
    counts[stage] = static_cast<int32_t>(lines.columns.size());
    int32_t* out = columns + first_column(counts, stage);
    for (const int32_t column : lines.columns) *out++ = lines.first_key + column;
    std::fill(out, columns + first_column(counts, stage - 1), INT32_MAX);
  }
}

// What a row block visits in a stage. listed: bits of the stage's columns, zero at first.
struct Visits {
  int32_t* blocks;
  uint32_t* listed;
  int32_t num_blocks = 0, num_columns = 0;
};

// Two-way merge of points and ranges in ascending key order for the row block starting at `start`.
void convert(const StageLines& lines, int32_t start, int32_t rows, bool causal, int32_t block, Visits* out) {
  const std::vector<int32_t>&V = lines.columns, &S = lines.offsets;
  const int32_t kv = lines.keys;
  const int32_t E = start + block + kv - (causal ? rows : 0);
  const int32_t sentinel = E + block;
  size_t v = 0, s = 0;
  int32_t column = V.empty() ? sentinel : V[0];
  bool offsets_left = true;
  int32_t range_begin, range_end;

  const auto flush = [&] {
    for (int32_t key = range_begin; key < std::min(range_end, kv); key += block) {
      out->blocks[out->num_blocks++] = lines.first_key + key;
    }
  };
  const auto emit = [&](size_t index) {
    out->listed[index / 32] |= uint32_t{1} << index % 32;
    ++out->num_columns;
  };

  int32_t offset = S[s++];
  while (offset >= E && s < S.size()) offset = S[s++];
  range_end = offset > E ? (causal ? E : kv) + block : std::max(E - offset, block);
  range_begin = range_end - block;

  for (;;) {
    if (column < range_end) {
      if (column < range_begin) emit(v);
      ++v;
      column = v < V.size() ? V[v] : sentinel;
    } else if (offsets_left && s < S.size() && (causal || S[s] >= start)) {
      const int32_t end = std::max(E - S[s++], block);
      if (end > range_end + block) {
        flush();
        range_begin = end - block;
        range_end = end;
      } else if (end > range_end) {
        range_end += block;
      }
    } else if (causal || v + 1 >= V.size()) {
      if (!causal && column < kv) emit(v);
      flush();
      return;
    } else {
      flush();
      range_begin = kv;
      range_end = kv + block;
      offsets_left = false;
    }
  }
}

}  // namespace

void qwen1m_cpu_sparse_index(const qwen1m_sparse_index* a) {
  const int threads = std::min(num_threads(), a->heads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int head = 0; head < a->heads; ++head) {
    const int32_t* columns = a->columns + static_cast<int64_t>(head) * a->selected_columns;
    const int32_t* slashes = a->slashes + static_cast<int64_t>(head) * a->selected_slashes;
    const int32_t* columns_end = std::lower_bound(columns, columns + a->selected_columns, INT_MAX);
    const int32_t* slashes_end = std::lower_bound(slashes, slashes + a->selected_slashes, INT_MAX);
    StageLines lines[kStages];
    for (const Stage stage : {kIntra, kSucc, kInter}) {
      lines[stage] = split(stage, columns, columns_end, slashes, slashes_end, a->begin, a->rows, a->chunk_len);
    }
    int32_t* column_counts = a->tables.column_counts + static_cast<int64_t>(head) * kStages;
    lay_out(lines, a->tables.columns + static_cast<int64_t>(head) * a->tables.column_width, column_counts);
    for (int32_t r = 0; r < a->num_blocks; ++r) {
      const int32_t start = (a->first_block + r) * a->block;
      const int64_t entry = static_cast<int64_t>(head) * a->num_blocks + r;
      int32_t* blocks = a->tables.blocks + entry * a->tables.block_width;
      uint32_t* listed = a->tables.listed + entry * (a->tables.column_width / 32);
      int32_t* counts = a->tables.counts + entry * 2 * kStages;
      std::fill_n(listed, columns_width(column_counts) / 32, 0);
      for (const Stage stage : {kInter, kSucc, kIntra}) {
        Visits out{blocks, listed + first_column(column_counts, stage) / 32};
        if (lines[stage].keys > 0) convert(lines[stage], start, a->rows, stage == kIntra, a->block, &out);
        counts[stage] = out.num_blocks;
        counts[kStages + stage] = out.num_columns;
        blocks += out.num_blocks;
      }
      advance();
    }
  }
}
