// Attention and probe as templates over the activations' type and the head size: what dispatch.cu chooses from.
#pragma once

#include "common.cuh"
#include "qwen1m/attention.h"
#include "qwen1m/keys.h"

namespace qwen1m {
namespace cuda {

// The head of a thread block of a sparse prefill. What takes longest is best begun first: little is idle at the end
// then.
__device__ inline int ordered_head(const qwen1m_dca_sparse_prefill& a, int number) {
  return a.order == nullptr ? number : a.order[number];
}

// How many of `count` ascending entries are below `value`.
__device__ inline int32_t count_below(const int32_t* entries, int32_t count, int32_t value) {
  int32_t from = 0;
  while (from < count) {
    const int32_t middle = (from + count) / 2;
    if (__ldg(entries + middle) < value) {
      from = middle + 1;
    } else {
      count = middle;
    }
  }
  return from;
}

template <typename T, int D>
int dca_probe(const qwen1m_dca_probe&, void* workspace, qwen1m_stream);
int64_t dca_probe_workspace(const qwen1m_dca_probe&);

// For compute capability 8.0 and everything newer.
namespace sm80 {

template <typename T, int D>
int dca_prefill(const qwen1m_dca_prefill&, qwen1m_stream);
template <typename T, int D>
int dca_sparse_prefill(const qwen1m_dca_sparse_prefill&, qwen1m_stream);
template <typename T, int D>
int dca_decode(const qwen1m_dca_decode&, void* workspace, qwen1m_stream);
// Of an 8-bit cache, and a head size of 128.
template <typename T>
int dca_decode_bytes(const qwen1m_dca_decode&, void* workspace, qwen1m_stream);

}  // namespace sm80

// For compute capability 9.0 alone, and a head size of 128.
namespace sm90 {

int64_t dca_prefill_workspace(const qwen1m_dca_prefill&);
template <typename T>
int dca_prefill(const qwen1m_dca_prefill&, void* workspace, qwen1m_stream);
int64_t dca_sparse_prefill_workspace(const qwen1m_dca_sparse_prefill&);
template <typename T>
int dca_sparse_prefill(const qwen1m_dca_sparse_prefill&, void* workspace, qwen1m_stream);

// Decode of few keys, of a 16-bit cache and of an 8-bit one; whether it takes such a call.
bool takes_decode(const qwen1m_dca_decode&);
template <typename T>
int dca_decode(const qwen1m_dca_decode&, qwen1m_stream);
bool takes_decode_bytes(const qwen1m_dca_decode&);
template <typename T>
int dca_decode_bytes(const qwen1m_dca_decode&, qwen1m_stream);

// The probe, for the groups of query heads and the chunks that it takes.
bool takes_probe(const qwen1m_dca_probe&);
int64_t dca_probe_workspace(const qwen1m_dca_probe&);
template <typename T>
int dca_probe(const qwen1m_dca_probe&, void* workspace, qwen1m_stream);

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m

// At the end of a kernel's file: function<T, D> for every type and head size, its parameters in parentheses.
#define QWEN1M_INSTANTIATE(function, parameters)             \
  template int function<qwen1m::cuda::bf16, 64> parameters;  \
  template int function<qwen1m::cuda::bf16, 128> parameters; \
  template int function<qwen1m::cuda::f16, 64> parameters;   \
  template int function<qwen1m::cuda::f16, 128> parameters
