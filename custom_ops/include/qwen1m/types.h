// The C interface of every kernel, a header a family: plain structs and raw pointers, no framework header.
//
// T rows of a step, S sequences, H query heads, G KV heads, D head_dim, V query variants in the order intra, succ,
// inter. All arrays are dense and row-major. Arguments are checked by the caller (custom_ops/paddle).
//
// `activation` is the type of the values that pass between ops: float32 on a CPU, bfloat16 or float16 on a GPU, where
// weights are of that type too, or bytes with scales, and caches of it or bytes with scales. The residual stream,
// rotary tables, LSE, sums and logits are float32 everywhere.
//
// The CPU kernels, qwen1m_cpu_*, run on the number of threads set last.
//
// The CUDA kernels, qwen1m_cuda_*: pointers are device memory except those of qwen1m_dca_prefill's pieces that are in
// host memory; page_size is a power of two from 64 on, widths are multiples of 8 and tensors begin at multiples of 16
// bytes. Everything is launched on
// `stream`, a cudaStream_t, and nothing waits for it. Returns a cudaError_t, 0 for success. `workspace` is device
// memory of as many bytes as the function of that name says; its contents do not matter.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
#define QWEN1M_API extern "C" __attribute__((visibility("default")))
#else
#define QWEN1M_API __attribute__((visibility("default")))
#endif

#ifdef __CUDACC__
#define QWEN1M_HOST_DEVICE __host__ __device__
#else
#define QWEN1M_HOST_DEVICE
#endif

// The last two are bytes that mean nothing without the scales beside them.
typedef enum {
  QWEN1M_FLOAT32 = 0,
  QWEN1M_BFLOAT16 = 1,
  QWEN1M_FLOAT16 = 2,
  QWEN1M_INT8 = 3,
  QWEN1M_E4M3 = 4,  // FP8: 4 bits of exponent, 3 of mantissa, no infinities
} qwen1m_dtype;

static inline int qwen1m_is_quantised(qwen1m_dtype type) { return type == QWEN1M_INT8 || type == QWEN1M_E4M3; }

static inline int32_t qwen1m_bytes_of(qwen1m_dtype type) {
  return type == QWEN1M_FLOAT32 ? 4 : qwen1m_is_quantised(type) ? 1 : 2;
}

typedef void* qwen1m_stream;

enum { QWEN1M_ROW_BLOCK = 64 };  // rows that visit the same keys in a sparse prefill

QWEN1M_API void qwen1m_cpu_set_num_threads(int count);
QWEN1M_API const char* qwen1m_cpu_isa(void);
