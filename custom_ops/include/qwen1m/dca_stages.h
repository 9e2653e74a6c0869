// Which keys each stage of dual chunk attention covers; for host and device code.
#pragma once

#include <stdint.h>

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

}  // namespace qwen1m
