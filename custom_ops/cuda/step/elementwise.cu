// Embedding and row gathering, casts, RMSNorm and SiLU: all bound by memory, each value read and written once.
#include "overlap.cuh"
#include "qwen1m/step.h"
#include "step/rms_norm.cuh"
#include "vectors.cuh"

namespace qwen1m {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kGridRows = 65535;  // of gridDim.y; rows beyond it are taken by a loop

// Blocks for rows of `width` values, of which a thread takes `per_thread` vectors of N.
template <int N>
dim3 row_grid(int64_t rows, int64_t width, int per_thread) {
  return dim3(static_cast<unsigned>(ceil_div(width, static_cast<int64_t>(kThreads) * per_thread * N)),
              static_cast<unsigned>(rows < kGridRows ? rows : kGridRows));
}

// Where vector j of this thread begins in its row.
template <int N, int kPerThread>
__device__ int64_t column_of(int j) {
  return (static_cast<int64_t>(blockIdx.x * kPerThread + j) * kThreads + threadIdx.x) * N;
}

constexpr int kEmbeddingVectors = 4;

template <typename T, typename Out, int N>
__global__ void __launch_bounds__(kThreads) embedding_kernel(const qwen1m_embedding a) {
  await_previous();
  admit_next();
  for (int64_t t = blockIdx.y; t < a.tokens; t += gridDim.y) {
    const int64_t row = a.ids[t] - a.first;
    const bool held = row >= 0 && row < a.rows;
    const T* from = static_cast<const T*>(a.table) + (held ? row : 0) * a.width;
    Out* to = static_cast<Out*>(a.out) + t * a.width;
    Vector<T, N> values[kEmbeddingVectors];
#pragma unroll
    for (int j = 0; j < kEmbeddingVectors; ++j) {
      const int64_t i = column_of<N, kEmbeddingVectors>(j);
      values[j] = held && i < a.width ? load_vector<N>(from + i) : Vector<T, N>{};
    }
#pragma unroll
    for (int j = 0; j < kEmbeddingVectors; ++j) {
      const int64_t i = column_of<N, kEmbeddingVectors>(j);
      if (i < a.width) store_cast(values[j], to + i);
    }
  }
}

template <typename T, typename Out, int N>
int launch_embedding(const qwen1m_embedding& a, cudaStream_t stream) {
  return launch_overlapping(embedding_kernel<T, Out, N>, row_grid<N>(a.tokens, a.width, kEmbeddingVectors), kThreads, 0,
                            stream, a);
}

constexpr int kJoinValues = 4;  // of a thread

__global__ void __launch_bounds__(kThreads) join_columns_kernel(const qwen1m_join_columns a) {
  await_previous();
  admit_next();
  const auto share = static_cast<uint32_t>(a.share);
  for (int64_t r = blockIdx.y; r < a.rows; r += gridDim.y) {
    float values[kJoinValues];
#pragma unroll
    for (int j = 0; j < kJoinValues; ++j) {
      const auto column = static_cast<uint32_t>(column_of<1, kJoinValues>(j));
      const uint32_t part = column / share;
      values[j] = column < a.columns ? a.parts[(part * a.rows + r) * a.share + (column - part * share)] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kJoinValues; ++j) {
      const int64_t column = column_of<1, kJoinValues>(j);
      if (column < a.columns) a.out[r * a.columns + column] = values[j];
    }
  }
}

constexpr int kCastVectors = 4;
constexpr int kCastValues = 4 * kCastVectors;  // of a thread

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads) cast_kernel(const T* from, Out* to, int64_t count) {
  await_previous();
  admit_next();
  constexpr int N = 4;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kCastVectors * kThreads + threadIdx.x) * N;
  Vector<T, N> values[kCastVectors];
#pragma unroll
  for (int j = 0; j < kCastVectors; ++j) {
    const int64_t i = first + j * kThreads * N;
    if (i + N <= count) values[j] = load_vector<N>(from + i);
  }
#pragma unroll
  for (int j = 0; j < kCastVectors; ++j) {
    const int64_t i = first + j * kThreads * N;
    if (i + N <= count) {
      store_cast(values[j], to + i);
    } else {
#pragma unroll 1
      for (int64_t k = i; k < count; ++k) to[k] = narrow<Out>(widen(from[k]));
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kNormThreads) rms_norm_kernel(const qwen1m_rms_norm a) {
  write_normalised_row<T>(a, AddDelta{});
}

constexpr int kSiluVectors = 2;

template <typename T>
__global__ void __launch_bounds__(kThreads) silu_mul_kernel(const qwen1m_silu_mul a) {
  await_previous();
  admit_next();
  constexpr int N = kPack;
  for (int64_t t = blockIdx.y; t < a.tokens; t += gridDim.y) {
    const T* from = static_cast<const T*>(a.gate_up) + t * 2 * a.width;
    T* to = static_cast<T*>(a.out) + t * a.width;
    Vector<T, N> gates[kSiluVectors], ups[kSiluVectors];
#pragma unroll
    for (int j = 0; j < kSiluVectors; ++j) {
      const int64_t i = column_of<N, kSiluVectors>(j);
      if (i < a.width) {
        gates[j] = load_vector<N>(from + i);
        ups[j] = load_vector<N>(from + a.width + i);
      }
    }
#pragma unroll
    for (int j = 0; j < kSiluVectors; ++j) {
      const int64_t i = column_of<N, kSiluVectors>(j);
      if (i >= a.width) continue;
      float products[N];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float gate = widen(gates[j].values[n]);
        products[n] = silu(gate) * widen(ups[j].values[n]);
      }
      store_narrowed(products, to + i);
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

using namespace qwen1m::cuda;

// Of any width, so that a vocabulary of any size can be shared among ranks.
int qwen1m_cuda_join_columns(const qwen1m_join_columns* a, qwen1m_stream stream) {
  if (a->rows == 0 || a->columns == 0) return cudaSuccess;
  return launch_overlapping(join_columns_kernel, row_grid<1>(a->rows, a->columns, kJoinValues), kThreads, 0,
                            as_stream(stream), *a);
}

// In all that follow a width is a multiple of 8 and addresses are multiples of 16.

// `out_dtype` is float32 or the table's type.
int qwen1m_cuda_embedding(const qwen1m_embedding* a, qwen1m_stream stream) {
  if (a->width % kPack != 0 || !aligned(a->table, a->out)) return cudaErrorInvalidValue;
  if (a->tokens == 0 || a->width == 0) return cudaSuccess;
  return with_type(a->dtype, [&](auto type) -> int {
    using T = decltype(type);
    if (a->out_dtype == a->dtype) return launch_embedding<T, T, 16 / sizeof(T)>(*a, as_stream(stream));
    if (a->out_dtype == QWEN1M_FLOAT32) return launch_embedding<T, float, 4>(*a, as_stream(stream));
    return cudaErrorInvalidValue;
  });
}

int qwen1m_cuda_cast(const qwen1m_cast* a, qwen1m_stream stream) {
  if (!aligned(a->values, a->out)) return cudaErrorInvalidValue;
  if (a->count == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(ceil_div(a->count, kThreads * kCastValues));
  return with_type(a->dtype, [&](auto from) {
    return with_type(a->out_dtype, [&](auto to) -> int {
      using T = decltype(from);
      using Out = decltype(to);
      return launch_overlapping(cast_kernel<T, Out>, blocks, kThreads, 0, as_stream(stream),
                                static_cast<const T*>(a->values), static_cast<Out*>(a->out), a->count);
    });
  });
}

// Rows of at most 8,192 values; the weight is of the activation's type.
int qwen1m_cuda_rms_norm(const qwen1m_rms_norm* a, qwen1m_stream stream) {
  if (a->width % kPack != 0 || a->width > kNormThreads * kNormValues || a->dtype != a->activation ||
      !aligned(a->delta, a->residual, a->weight, a->out)) {
    return cudaErrorInvalidValue;
  }
  if (a->tokens == 0 || a->width == 0) return cudaSuccess;
  const unsigned threads = norm_threads(a->width);
  return with_half_type(a->activation, [&](auto type) -> int {
    return launch_overlapping(rms_norm_kernel<decltype(type)>, static_cast<unsigned>(a->tokens), threads, 0,
                              as_stream(stream), *a);
  });
}

int qwen1m_cuda_silu_mul(const qwen1m_silu_mul* a, qwen1m_stream stream) {
  if (a->width % kPack != 0 || !aligned(a->gate_up, a->out)) return cudaErrorInvalidValue;
  if (a->tokens == 0 || a->width == 0) return cudaSuccess;
  return with_half_type(a->activation, [&](auto type) -> int {
    return launch_overlapping(silu_mul_kernel<decltype(type)>, row_grid<kPack>(a->tokens, a->width, kSiluVectors),
                              kThreads, 0, as_stream(stream), *a);
  });
}
