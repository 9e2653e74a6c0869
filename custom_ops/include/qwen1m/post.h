// Small tensors on their way between a device and the host, without a wait: host memory that the device copies to and
// from by itself, and an event behind the copies.
#pragma once

#include "qwen1m/types.h"

// Whoever takes a parcel has it alone until it is given back. Then it is kept for others, who get it when the copies
// that are under way still are done.
typedef struct {
  void* memory;  // of the host, `bytes` of it
  int64_t bytes;
  void* event;  // behind the last copy, where a GPU makes them
  int32_t device;
} qwen1m_parcel;

// One with room for so many bytes, which no copy uses any more; null where there is no memory.
QWEN1M_API qwen1m_parcel* qwen1m_cpu_take_parcel(int64_t bytes);
QWEN1M_API void qwen1m_cpu_give_parcel(qwen1m_parcel*);
QWEN1M_API qwen1m_parcel* qwen1m_cuda_take_parcel(int64_t bytes);
QWEN1M_API void qwen1m_cuda_give_parcel(qwen1m_parcel*);

// Waits for the copies, `seconds` at most. Returns 0 when they are done, cudaErrorNotReady, or what went wrong before
// them. Not to be called in a capture.
QWEN1M_API int qwen1m_cpu_await_parcel(qwen1m_parcel*, double seconds);
QWEN1M_API int qwen1m_cuda_await_parcel(qwen1m_parcel*, double seconds);

// From `values` to the parcel.
typedef struct {
  const void* values;
  qwen1m_parcel* parcel;
  int64_t offset, bytes;
} qwen1m_post;

// From the parcel to `values`.
typedef struct {
  void* values;
  qwen1m_parcel* parcel;
  int64_t offset, bytes;
} qwen1m_upload;

QWEN1M_API void qwen1m_cpu_post(const qwen1m_post*);
QWEN1M_API void qwen1m_cpu_upload(const qwen1m_upload*);

QWEN1M_API int qwen1m_cuda_post(const qwen1m_post*, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_upload(const qwen1m_upload*, qwen1m_stream);
