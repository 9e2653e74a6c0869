// Dual chunk attention on the CPU: dense prefill, decode, probe and sparse prefill over the tile of tiles.h.
#pragma once

#include "parallel.h"
#include "qwen1m/attention.h"
#include "qwen1m/dca_stages.h"
#include "tiles.h"

namespace qwen1m {
namespace QWEN1M_ISA {

// The order in which a row meets its keys.
constexpr Stage kWalk[kStages] = {kInter, kSucc, kIntra};

// Rows of a tile are (step row, query head of one KV head) pairs: row r of the tile is step row r / group.
template <int D>
void prefill_tile(const qwen1m_dca_prefill& a, const qwen1m_piece& piece, int first, int rows, int kv_head,
                  float* arena, int max_rows) {
  const int group = a.heads / a.cache.kv_heads;
  const PagedRows pages(a.cache, a.block_tables + static_cast<int64_t>(piece.sequence) * a.table_width, kv_head);
  const int32_t begin = piece.begin + first;
  const int64_t step_row = static_cast<int64_t>(piece.row) + first;
  Rows<D> tile_rows(arena, max_rows);
  tile_rows.start(rows * group);
  KeyTile tile;
  for (const Stage stage : kWalk) {
    const Span keys = stage_keys(stage, begin + rows - 1, a.chunk_len);
    if (keys.begin == keys.end) continue;
    for (int r = 0; r < rows * group; ++r) {
      const int64_t row = stage * static_cast<int64_t>(a.tokens) + step_row + r / group;
      tile_rows.set_query(r, floats(a.q) + (row * a.heads + kv_head * group + r % group) * D,
                          a.scale[piece.sequence] * kLog2E);
    }
    for (int32_t k = keys.begin; k < keys.end; k += kTileKeys) {
      tile.count = 0;
      for (int32_t p = k; p < keys.end && p < k + kTileKeys; ++p) pages.put(&tile, p);
      tile.pad();
      tile_rows.score(tile);
      if (stage == kIntra) {
        for (int r = 0; r < rows * group; ++r) {
          if (begin + r / group < k + tile.count - 1) tile_rows.mask_after(tile, r, begin + r / group);
        }
      }
      tile_rows.attend(tile);
    }
  }
  for (int r = 0; r < rows * group; ++r) {
    const int64_t place = (step_row + r / group) * a.heads + kv_head * group + r % group;
    tile_rows.finish(r, floats(a.out) + place * D);
    if (a.lse) a.lse[place] = tile_rows.lse(r);
  }
}

constexpr int kPrefillRows = 32 * kTileRows;  // (row, head) pairs that share one packed tile of keys

inline int rows_a_tile(int group) { return group < kPrefillRows ? kPrefillRows / group : 1; }

template <int D>
void dca_prefill(const qwen1m_dca_prefill& a) {
  const int group = a.heads / a.cache.kv_heads;
  const int height = rows_a_tile(group);
  const int max_rows = height * group;
  int64_t tiles = 0;
  for (int p = 0; p < a.num_pieces; ++p) tiles += (a.pieces[p].rows + height - 1) / height;
  // The last rows see the most keys: they go first.
  parallel_tasks(tiles * a.cache.kv_heads, Rows<D>::floats(max_rows), [&](int64_t task, float* arena) {
    const int kv_head = static_cast<int>(task % a.cache.kv_heads);
    int64_t index = tiles - 1 - task / a.cache.kv_heads;
    int p = 0;
    for (int64_t here; index >= (here = (a.pieces[p].rows + height - 1) / height); ++p) index -= here;
    const int first = static_cast<int>(index) * height;
    const int rows = a.pieces[p].rows - first < height ? a.pieces[p].rows - first : height;
    prefill_tile<D>(a, a.pieces[p], first, rows, kv_head, arena, max_rows);
  });
}

constexpr int32_t kSplitKeys = 4096;  // keys of one task of decode and probe

template <int D>
void dca_decode(const qwen1m_dca_decode& a) {
  const int group = a.heads / a.cache.kv_heads;
  int32_t longest = 0;
  for (int b = 0; b < a.batch; ++b) longest = a.lengths[b] > longest ? a.lengths[b] : longest;
  const int64_t splits = (longest + kSplitKeys - 1) / kSplitKeys;
  const int64_t partial_floats = D + 2;  // output, maximum, sum
  Scratch partials(static_cast<size_t>(a.batch) * a.heads * splits * partial_floats);
  parallel_tasks(a.batch * a.cache.kv_heads * splits, Rows<D>::floats(group), [&](int64_t task, float* arena) {
    const int64_t split = task % splits;
    const int kv_head = static_cast<int>(task / splits % a.cache.kv_heads);
    const int b = static_cast<int>(task / splits / a.cache.kv_heads);
    const PagedRows pages(a.cache, a.block_tables + static_cast<int64_t>(b) * a.table_width, kv_head);
    Rows<D> rows(arena, group);
    rows.start(group);
    KeyTile tile;
    for (const Stage stage : kWalk) {
      const Span keys = stage_keys(stage, a.lengths[b] - 1, a.chunk_len);
      const int32_t split_begin = static_cast<int32_t>(split * kSplitKeys);
      const int32_t begin = keys.begin > split_begin ? keys.begin : split_begin;
      const int32_t end = keys.end < split_begin + kSplitKeys ? keys.end : split_begin + kSplitKeys;
      if (begin >= end) continue;
      for (int r = 0; r < group; ++r) {
        const int64_t row = stage * static_cast<int64_t>(a.batch) + b;
        rows.set_query(r, floats(a.q) + (row * a.heads + kv_head * group + r) * D, a.scale[b] * kLog2E);
      }
      for (int32_t k = begin; k < end; k += kTileKeys) {
        tile.count = 0;
        for (int32_t p = k; p < end && p < k + kTileKeys; ++p) pages.put(&tile, p);
        tile.pad();
        rows.score(tile);
        rows.attend(tile);
      }
    }
    for (int r = 0; r < group; ++r) {
      float* partial =
          partials.data + ((static_cast<int64_t>(b) * a.heads + kv_head * group + r) * splits + split) * partial_floats;
      memcpy(partial, rows.out + r * D, sizeof(float) * D);
      partial[D] = rows.maximum_row[r];
      partial[D + 1] = rows.sum_row[r];
    }
  });
  for (int64_t row = 0; row < static_cast<int64_t>(a.batch) * a.heads; ++row) {
    const float* partial = partials.data + row * splits * partial_floats;
    float* out = floats(a.out) + row * D;
    float top = kNegativeInfinity, total = 0;
    for (int64_t s = 0; s < splits; ++s)
      top = partial[s * partial_floats + D] > top ? partial[s * partial_floats + D] : top;
    memset(out, 0, sizeof(float) * D);
    if (top == kNegativeInfinity) continue;
    for (int64_t s = 0; s < splits; ++s) {
      const float* part = partial + s * partial_floats;
      const float weight = exp2(broadcast(part[D] - top))[0];
      total += weight * part[D + 1];
      for (int d = 0; d < D; d += kLanes) store(out + d, load(out + d) + load(part + d) * broadcast(weight));
    }
    for (int d = 0; d < D; d += kLanes) store(out + d, load(out + d) * broadcast(1.0f / total));
  }
}

// Two passes over K: the first finds each probe row's maximum and sum, the second adds up its softmax along columns
// and diagonals. Keys are split into spans, a task each; a span's diagonals reach rows - 1 columns past its end.
template <int D>
void dca_probe(const qwen1m_dca_probe& a) {
  const int group = a.heads / a.cache.kv_heads;
  const int max_rows = a.rows * group;
  const int64_t splits = (a.end + kSplitKeys - 1) / kSplitKeys;
  const int64_t tasks = splits * a.cache.kv_heads;
  const int64_t slash_floats = kSplitKeys + kProbeRows + kTileKeys;
  Scratch statistics(static_cast<size_t>(tasks) * max_rows * 2);
  Scratch slashes(static_cast<size_t>(tasks) * group * slash_floats);

  // Calls visit(rows, tile) for every scored tile of the task's span.
  const auto walk = [&](int64_t task, Rows<D>& rows, auto&& visit) {
    const int kv_head = static_cast<int>(task / splits);
    const int32_t split_begin = static_cast<int32_t>(task % splits * kSplitKeys);
    const PagedRows pages(a.cache, a.block_table, kv_head);
    KeyTile tile;
    for (const Stage stage : kWalk) {
      const Span keys = stage_keys(stage, a.end - 1, a.chunk_len);
      const int32_t begin = keys.begin > split_begin ? keys.begin : split_begin;
      const int32_t end = keys.end < split_begin + kSplitKeys ? keys.end : split_begin + kSplitKeys;
      if (begin >= end) continue;
      for (int r = 0; r < max_rows; ++r) {
        const int64_t row = stage * static_cast<int64_t>(a.rows) + r / group;
        rows.set_query(r, floats(a.q) + (row * a.heads + kv_head * group + r % group) * D, a.scale * kLog2E);
      }
      for (int32_t k = begin; k < end; k += kTileKeys) {
        tile.count = 0;
        for (int32_t p = k; p < end && p < k + kTileKeys; ++p) pages.put(&tile, p);
        tile.pad();
        rows.score(tile);
        for (int r = 0; r < max_rows; ++r) {
          const int32_t position = a.end - a.rows + r / group;
          if (position < k + tile.count - 1) rows.mask_after(tile, r, position);
        }
        visit(tile);
      }
    }
  };

  parallel_tasks(tasks, Rows<D>::floats(max_rows), [&](int64_t task, float* arena) {
    Rows<D> rows(arena, max_rows);
    rows.start(max_rows);
    walk(task, rows, [&](const KeyTile& tile) {
      for (int r = 0; r < max_rows; ++r) rows.soften(r, tile.padded());
    });
    float* mine = statistics.data + task * max_rows * 2;
    memcpy(mine, rows.maximum_row, sizeof(float) * max_rows);
    memcpy(mine + max_rows, rows.sum_row, sizeof(float) * max_rows);
  });

  // Of each (KV head, row): the maximum and 1 / sum over all spans, left in the head's first span.
  for (int kv_head = 0; kv_head < a.cache.kv_heads; ++kv_head) {
    float* head = statistics.data + kv_head * splits * max_rows * 2;
    for (int r = 0; r < max_rows; ++r) {
      float top = kNegativeInfinity, total = 0;
      for (int64_t s = 0; s < splits; ++s) {
        const float m = head[s * max_rows * 2 + r];
        top = m > top ? m : top;
      }
      for (int64_t s = 0; s < splits; ++s) {
        const float* span = head + s * max_rows * 2;
        total += span[max_rows + r] * exp2(broadcast(span[r] - top))[0];
      }
      head[r] = top;
      head[max_rows + r] = 1.0f / total;
    }
  }

  parallel_tasks(tasks, Rows<D>::floats(max_rows), [&](int64_t task, float* arena) {
    const int kv_head = static_cast<int>(task / splits);
    const int32_t split_begin = static_cast<int32_t>(task % splits * kSplitKeys);
    const float* top = statistics.data + kv_head * splits * max_rows * 2;
    const float* inverse = top + max_rows;
    float* slash = slashes.data + task * group * slash_floats;
    memset(slash, 0, sizeof(float) * group * slash_floats);
    Rows<D> rows(arena, max_rows);
    rows.count = max_rows;
    walk(task, rows, [&](const KeyTile& tile) {
      const int32_t first = tile.position[0];
      for (int g = 0; g < group; ++g) {
        float columns[kTileKeys] = {};
        for (int row = 0; row < a.rows; ++row) {
          const int r = row * group + g;
          const float* scores = rows.scores + r * kTileKeys;
          float* diagonals = slash + g * slash_floats + (first - split_begin) + (a.rows - 1 - row);
          for (int i = 0; i < tile.padded(); i += kLanes) {
            const Floats weight = exp2(load(scores + i) - broadcast(top[r])) * broadcast(inverse[r]);
            store(columns + i, load(columns + i) + weight);
            store(diagonals + i, load(diagonals + i) + weight);
          }
        }
        memcpy(a.vertical + static_cast<int64_t>(kv_head * group + g) * a.end + first, columns,
               sizeof(float) * tile.count);
      }
    });
  });

  for (int head = 0; head < a.heads; ++head) {
    float* out = a.slash + static_cast<int64_t>(head) * a.end;
    memset(out, 0, sizeof(float) * a.end);
    for (int64_t s = 0; s < splits; ++s) {
      const float* part = slashes.data + ((head / group * splits + s) * group + head % group) * slash_floats;
      const int64_t begin = s * kSplitKeys;
      const int64_t reach = begin + kSplitKeys + a.rows - 1 < a.end ? kSplitKeys + a.rows - 1 : a.end - begin;
      for (int64_t t = 0; t < reach; ++t) out[begin + t] += part[t];
    }
  }
}

// Keys of one (row block, head) in walking order: the blocks of a stage, then the columns that are listed there.
template <int D>
void sparse_tile(const qwen1m_dca_sparse_prefill& a, int block, int head, float* arena) {
  const int group = a.heads / a.cache.kv_heads;
  const PagedRows pages(a.cache, a.block_table, head / group);
  const int row_blocks = (a.rows + kBlock - 1) / kBlock;
  const int64_t entry = static_cast<int64_t>(head) * row_blocks + block;
  const int32_t* blocks = a.tables.blocks + entry * a.tables.block_width;
  const int32_t* counts = a.tables.counts + entry * 2 * kStages;
  const uint32_t* listed = a.tables.listed + entry * (a.tables.column_width / 32);
  const int32_t* columns = a.tables.columns + static_cast<int64_t>(head) * a.tables.column_width;
  const int32_t* column_counts = a.tables.column_counts + static_cast<int64_t>(head) * kStages;
  const int first = block * kBlock;
  const int rows = a.rows - first < kBlock ? a.rows - first : kBlock;
  const int32_t begin = a.begin + first;
  const int64_t step_row = static_cast<int64_t>(a.row) + first;
  const int32_t last = a.begin + a.rows - 1;

  Rows<D> tile_rows(arena, kBlock);
  tile_rows.start(rows);
  KeyTile tile;
  const auto flush = [&](Stage stage) {
    if (tile.count == 0) return;
    tile.pad();
    tile_rows.score(tile);
    if (stage == kIntra) {
      int32_t highest = tile.position[0];
      for (int i = 1; i < tile.count; ++i) highest = tile.position[i] > highest ? tile.position[i] : highest;
      for (int r = 0; r < rows && begin + r < highest; ++r) tile_rows.mask_after(tile, r, begin + r);
    }
    tile_rows.attend(tile);
    tile.count = 0;
  };
  for (const Stage stage : kWalk) {
    const Span keys = stage_keys(stage, last, a.chunk_len);
    if (keys.begin == keys.end) continue;
    for (int r = 0; r < rows; ++r) {
      const int64_t row = stage * static_cast<int64_t>(a.tokens) + step_row + r;
      tile_rows.set_query(r, floats(a.q) + (row * a.heads + head) * D, a.scale * kLog2E);
    }
    // A block may overrun the stage's last key, and in the intra stage the block's last row.
    const int32_t limit = stage == kIntra ? begin + rows : keys.end;
    for (int32_t n = counts[stage]; n > 0; --n, ++blocks) {
      for (int32_t p = *blocks; p < *blocks + kBlock && p < limit; ++p) pages.put(&tile, p);
      if (tile.count > kTileKeys - kBlock) flush(stage);
    }
    const int32_t first_of_stage = first_column(column_counts, stage);
    for (int32_t c = first_of_stage; c < first_of_stage + column_counts[stage]; c += 32) {
      for (uint32_t word = listed[c / 32]; word != 0; word &= word - 1) {
        const int32_t column = columns[c + __builtin_ctz(word)];
        if (column < limit) pages.put(&tile, column);
        if (tile.count == kTileKeys) flush(stage);
      }
    }
    flush(stage);
  }
  for (int r = 0; r < rows; ++r) {
    const int64_t place = (step_row + r) * a.heads + head;
    tile_rows.finish(r, floats(a.out) + place * D);
    if (a.lse) a.lse[place] = tile_rows.lse(r);
  }
}

template <int D>
void dca_sparse_prefill(const qwen1m_dca_sparse_prefill& a) {
  parallel_tasks(static_cast<int64_t>(a.num_blocks) * a.heads, Rows<D>::floats(kBlock),
                 [&](int64_t task, float* arena) {
                   const int block = a.first_block + static_cast<int>(task % a.num_blocks);
                   sparse_tile<D>(a, block, static_cast<int>(task / a.num_blocks), arena);
                 });
}

}  // namespace QWEN1M_ISA
}  // namespace qwen1m
