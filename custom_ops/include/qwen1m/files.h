// Rows of a matrix in a file that are read by their columns: what a rank holds of a weight that is cut in columns.
#pragma once

#include "qwen1m/types.h"

// `rows` runs of `bytes` each: in the file `pitch` bytes from one to the next, in memory `out_pitch`.
typedef struct {
  void* out;
  int64_t position, rows, bytes, pitch, out_pitch;
  int64_t done;  // how many bytes were read, one run behind the other
  int32_t descriptor;
} qwen1m_read;

// Reads until all is there, the file ends, or reading fails: 0, or errno. Any thread may call it.
QWEN1M_API int qwen1m_cpu_read_rows(qwen1m_read*);
