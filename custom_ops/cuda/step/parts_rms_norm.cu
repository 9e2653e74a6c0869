// RMSNorm of the residual stream and what the ranks add to it, which the others have brought here. A block a row.
#include "overlap.cuh"
#include "qwen1m/peers.h"
#include "step/rms_norm.cuh"
#include "vectors.cuh"

namespace qwen1m {
namespace cuda {
namespace {

// The ranks' parts of a row, added up in their order.
template <typename T>
struct AddRanks {
  const T* parts;
  int64_t stride;
  int rank, degree;

  __device__ void operator()(const T* own_part, const NormColumns& own,
                             float (&values)[kNormVectors][kNormVector]) const {
    const T* row = parts + static_cast<int64_t>(blockIdx.x) * own.width;
    float sums[kNormVectors][kNormVector] = {};
#pragma unroll 2
    for (int from = 0; from < degree; ++from) {
      AddDelta{}(from == rank ? own_part : row + (from - (from > rank)) * stride, own, sums);
    }
#pragma unroll
    for (int j = 0; j < kNormVectors; ++j) {
#pragma unroll
      for (int n = 0; n < kNormVector; ++n) values[j][n] += sums[j][n];
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kNormThreads) parts_rms_norm_kernel(const qwen1m_parts_rms_norm a) {
  write_normalised_row<T>(a.norm, AddRanks<T>{static_cast<const T*>(a.parts), a.stride, a.rank, a.degree});
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

using namespace qwen1m::cuda;

// Rows of at most 8,192 values; all but the residual stream is of one type of 16 bits.
int qwen1m_cuda_parts_rms_norm(const qwen1m_parts_rms_norm* a, qwen1m_stream stream) {
  const qwen1m_rms_norm& norm = a->norm;
  if (norm.width % kPack != 0 || norm.width > kNormThreads * kNormValues || norm.dtype != norm.activation ||
      norm.delta == nullptr || a->stride % kPack != 0 || a->rank < 0 || a->rank >= a->degree ||
      a->degree > QWEN1M_PEER_RANKS || !aligned(norm.delta, norm.residual, norm.weight, norm.out, a->parts)) {
    return cudaErrorInvalidValue;
  }
  if (norm.tokens == 0 || norm.width == 0) return cudaSuccess;
  return with_half_type(norm.activation, [&](auto type) -> int {
    return launch_overlapping(parts_rms_norm_kernel<decltype(type)>, static_cast<unsigned>(norm.tokens),
                              norm_threads(norm.width), 0, as_stream(stream), *a);
  });
}
