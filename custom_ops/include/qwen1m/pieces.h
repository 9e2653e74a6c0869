// Pieces of memory of one size, gathered into a parcel or scattered out of it: pages of a cache on their way to a file
// and back. Any thread may call these; on a GPU copies run on a stream of their own, beside whatever is computed.
#pragma once

#include "qwen1m/post.h"

// `count` pieces of `bytes` each, one behind the other in the parcel from `offset` on; null ones are left out.
typedef struct {
  void** pieces;
  int64_t count, bytes;
  qwen1m_parcel* parcel;
  int64_t offset;
} qwen1m_pieces;

// Queues the copies; they are done when qwen1m_*_await_parcel says so. Returns 0 or a CUDA error.
QWEN1M_API int qwen1m_cpu_gather(const qwen1m_pieces*);
QWEN1M_API int qwen1m_cpu_scatter(const qwen1m_pieces*);
QWEN1M_API int qwen1m_cuda_gather(const qwen1m_pieces*);
QWEN1M_API int qwen1m_cuda_scatter(const qwen1m_pieces*);
