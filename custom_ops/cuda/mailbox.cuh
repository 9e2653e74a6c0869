// What lies in a mailbox, and how a row gets from one rank's card into those of all others in a single trip.
//
// A row's values travel in lines of 16 bytes: four values, and twice the turn that they belong to, so that whoever sees
// a turn sees the values beside it. A row's turns count its sums, each row by itself. Lines of a turn lie where those
// of the turn before do not: a rank that writes the next but one has seen everybody's of the next, and they had read
// this one's before they sent these.
#pragma once

#include "common.cuh"
#include "qwen1m/mailbox.h"

namespace qwen1m {
namespace cuda {

constexpr int kLineValues = 4;  // of 16 bits

// Halves of a line: two values below, their turn above.
struct alignas(16) Line {
  uint64_t halves[2];
};

__host__ __device__ constexpr int64_t turns_bytes() { return ceil_div(QWEN1M_MAILBOX_ROWS * 4, 128) * 128; }

__host__ __device__ constexpr int64_t mailbox_bytes(int degree) {
  return turns_bytes() +
         2LL * degree * QWEN1M_MAILBOX_ROWS * (QWEN1M_MAILBOX_WIDTH / kLineValues) * static_cast<int64_t>(sizeof(Line));
}

// Those of all ranks, as one of them sees them.
struct Mailboxes {
  char* of[QWEN1M_PEER_RANKS];
  int rank, degree;

  // The turn of a row's last sum, in this rank's mailbox.
  __device__ uint32_t* turn(int row) const { return reinterpret_cast<uint32_t*>(of[rank]) + row; }

  // The ranks but this one, ascending.
  __device__ int other(int number) const { return number + (number >= rank); }

  // In the mailbox of `to`, the lines of a row that `from` sends.
  __device__ Line* lines(int to, int from, uint32_t turn, int row) const {
    const int64_t sender = static_cast<int64_t>(turn % 2) * degree + from;
    return reinterpret_cast<Line*>(of[to] + turns_bytes()) +
           (sender * QWEN1M_MAILBOX_ROWS + row) * (QWEN1M_MAILBOX_WIDTH / kLineValues);
  }
};

inline bool takes_mailboxes(int32_t rank, int32_t degree) {
  return degree >= 2 && degree <= QWEN1M_PEER_RANKS && rank >= 0 && rank < degree;
}

inline Mailboxes mailboxes_of(const int64_t* boxes, int32_t rank, int32_t degree) {
  Mailboxes mailboxes{};
  for (int32_t of = 0; of < degree; ++of) mailboxes.of[of] = reinterpret_cast<char*>(boxes[of]);
  mailboxes.rank = rank;
  mailboxes.degree = degree;
  return mailboxes;
}

// Behind the largest, which is odd, comes an even one, and never the zero that a new mailbox is full of.
__device__ inline uint32_t turn_after(uint32_t turn) { return turn == ~0u ? 2 : turn + 1; }

__device__ inline void send_line(Line* to, uint2 values, uint32_t turn) {
  const uint64_t above = static_cast<uint64_t>(turn) << 32;
  asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(above | values.x), "l"(above | values.y)
               : "memory");
}

__device__ inline Line look_at_line(const Line* line) {
  Line seen;
  asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];"
               : "=l"(seen.halves[0]), "=l"(seen.halves[1])
               : "l"(line)
               : "memory");
  return seen;
}

__device__ inline bool is_of(const Line& line, uint32_t turn) {
  return line.halves[0] >> 32 == turn && line.halves[1] >> 32 == turn;
}

__device__ inline uint2 values_of(const Line& line) {
  return {static_cast<uint32_t>(line.halves[0]), static_cast<uint32_t>(line.halves[1])};
}

}  // namespace cuda
}  // namespace qwen1m
