// Which keys each stage of dual chunk attention covers; for host and device code.
#pragma once

#include <stdint.h>

#include "qwen1m/keys.h"
#include "qwen1m/types.h"

namespace qwen1m {

enum Stage { kIntra = 0, kSucc = 1, kInter = 2, kStages = 3 };

struct Span {
  int32_t begin, end;
};

// The keys that `stage` covers for a row at `position`, itself the last key. Succ and inter are empty early on.
// Static: CPU kernels of several instruction sets include this, and the linker must not share one's code with another.
QWEN1M_HOST_DEVICE static inline Span stage_keys(Stage stage, int32_t position, int32_t chunk_len) {
  const int32_t chunk = position / chunk_len * chunk_len;
  const int32_t before = chunk > chunk_len ? chunk - chunk_len : 0;
  switch (stage) {
    case kInter: return {0, before};
    case kSucc: return {before, chunk};
    default: return {chunk, position + 1};
  }
}

// The stage of a key for rows of the chunk that begins at `chunk`.
QWEN1M_HOST_DEVICE static inline Stage key_stage(int32_t key, int32_t chunk, int32_t chunk_len) {
  return key >= chunk ? kIntra : key >= chunk - chunk_len ? kSucc : kInter;
}

// So many columns, filled up to groups.
QWEN1M_HOST_DEVICE static inline int32_t whole_groups(int32_t columns) {
  return (columns + QWEN1M_COLUMN_GROUP - 1) / QWEN1M_COLUMN_GROUP * QWEN1M_COLUMN_GROUP;
}

// Where the columns of a stage begin in a head's row of qwen1m_index_tables.columns; counts: its column_counts.
QWEN1M_HOST_DEVICE static inline int32_t first_column(const int32_t* counts, int stage) {
  int32_t first = 0;
  for (int before = kInter; before > stage; --before) first += whole_groups(counts[before]);
  return first;
}

// How many columns a head has there, each stage filled up.
QWEN1M_HOST_DEVICE static inline int32_t columns_width(const int32_t* counts) {
  return first_column(counts, kIntra - 1);
}

}  // namespace qwen1m
