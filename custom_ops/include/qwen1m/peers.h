// Memory of the other ranks of one machine: how it is found, rows that go there beside the computation, their sums.
#pragma once

#include "qwen1m/step.h"

enum {
  QWEN1M_PEER_RANKS = 8,      // at most
  QWEN1M_PEER_NUMBERS = 256,  // that flags can hold
  QWEN1M_COPIER_MARKS = 8,
  QWEN1M_MEMORY_NAME_BYTES = 64,
};

// Copies for `count` other ranks, one behind the other, each followed by `number` in the flag, uint32, of that rank's
// that stands for it. They are behind what is queued, and what is queued from now on is not behind them. Their end is
// the copier's mark of this number, until others are sent under it.
typedef struct {
  int64_t copier;
  const int64_t* from;   // [count] addresses, in host memory as the two others
  const int64_t* to;     // [count]
  const int64_t* flags;  // [count]
  int64_t bytes;         // of each
  int32_t count, number, mark;
} qwen1m_send_rows;

// What is queued from now on is behind the copies that others make here, whose `number` comes into this rank's flags,
// and behind those that this rank's copier, where it is not 0, has made for others under the mark.
typedef struct {
  int64_t copier;
  const int64_t* flags;  // [count] addresses, in host memory
  int32_t count, number, mark;
} qwen1m_await_rows;

// residual += the ranks' deltas, added up in float32 in the order of the ranks; then as qwen1m_rms_norm.
typedef struct {
  qwen1m_rms_norm norm;  // delta: this rank's
  const void* parts;     // the other ranks' [tokens, width], ascending, each `stride` values behind the one before
  int64_t stride;
  int32_t rank, degree;
} qwen1m_parts_rms_norm;

QWEN1M_API void qwen1m_cpu_send_rows(const qwen1m_send_rows*);
QWEN1M_API void qwen1m_cpu_await_rows(const qwen1m_await_rows*);
QWEN1M_API void qwen1m_cpu_parts_rms_norm(const qwen1m_parts_rms_norm*);

QWEN1M_API int qwen1m_cuda_send_rows(const qwen1m_send_rows*, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_await_rows(const qwen1m_await_rows*, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_parts_rms_norm(const qwen1m_parts_rms_norm*, qwen1m_stream);

// What copies for the current device until the process ends: a stream beside the computation's.
QWEN1M_API int qwen1m_cuda_make_copier(int64_t* copier);
// The name by which other processes of the machine find the allocation that an address on the current device lies in,
// and how far behind its beginning that is.
QWEN1M_API int qwen1m_cuda_name_memory(int64_t address, char* name, int64_t* offset);
// Where another process's allocation begins in this one.
QWEN1M_API int qwen1m_cuda_open_memory(const char* name, int64_t* address);
