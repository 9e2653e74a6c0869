// What the ops of attention and of its keys check alike: pieces, chunks, rotated queries.
#pragma once

#include <string>

#include "call.h"

namespace qwen1m {

inline void expect_chunk(int64_t chunk_len, int64_t page_size) {
  QWEN1M_REQUIRE(chunk_len >= page_size && chunk_len % page_size == 0,
                 "chunk_len (chunk_size - local_size) must be a multiple of page_size " + text(page_size) + ", got " +
                     text(chunk_len));
}

// A piece of at least one row that lies in one DCA chunk.
inline void expect_piece(int64_t begin, int64_t rows, int64_t chunk_len) {
  QWEN1M_REQUIRE(begin >= 0 && rows >= 1 && chunk_len >= 1 && begin / chunk_len == (begin + rows - 1) / chunk_len,
                 "the piece [" + text(begin) + ", " + text(begin + rows) + ") must lie in one chunk of chunk_len " +
                     text(chunk_len));
}

// Some row blocks of a piece, or none.
inline void expect_row_blocks(int64_t first, int64_t count, int64_t rows, int64_t block) {
  const int64_t all = (rows + block - 1) / block;
  QWEN1M_REQUIRE(
      first >= 0 && count >= 0 && first + count <= all,
      "row blocks " + text(first) + " to " + text(first + count) + " are not among the piece's " + text(all));
}

// q is [V, rows, H, D] with H a multiple of the KV heads and the rotations that a row at `last_position` needs;
// returns H.
inline int32_t expect_queries(Call& call, const Tensor& q, const qwen1m_cache& cache, int64_t rows,
                              int64_t last_position, int64_t chunk_len) {
  call.expect_activation(q, "q", {-1, rows, -1, cache.head_dim});
  const int64_t heads = q.shape()[2];
  QWEN1M_REQUIRE(heads > 0 && heads % cache.kv_heads == 0,
                 "q's heads must be a multiple of the cache's " + text(cache.kv_heads) + ", got " + text(heads));
  const int64_t needed = last_position < chunk_len ? 1 : last_position < 2 * chunk_len ? 2 : 3;
  QWEN1M_REQUIRE(q.shape()[0] >= needed && q.shape()[0] <= 3,
                 "q must hold " + text(needed) + " to 3 rotations for position " + text(last_position) +
                     " with chunk_len " + text(chunk_len) + ", got " + text(q.shape()[0]));
  return static_cast<int32_t>(heads);
}

}  // namespace qwen1m
