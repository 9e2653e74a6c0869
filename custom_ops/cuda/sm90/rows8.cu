// Rows of activations that are rounded to FP8, a scale for each 128 of a row: by RMSNorm as it makes them, and what
// comes from elsewhere. Bound by memory, as rms_norm, of which they write half.
#include "overlap.cuh"
#include "qwen1m/weight8.h"
#include "rows8.cuh"
#include "step/rms_norm.cuh"
#include "vectors.cuh"

namespace qwen1m {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kGridRows = 65535;  // of gridDim.y; rows beyond it are taken by a loop

template <int N>
__device__ inline float largest_of(const float (&values)[N]) {
  float most = 0.0f;
#pragma unroll
  for (int n = 0; n < N; ++n) most = fmaxf(most, fabsf(values[n]));
  return most;
}

constexpr int kUsualThreads = 640;  // of a row of up to 5,120 values: two blocks of them have room on a processor

// A block a row: a warp has 128 neighbours of it at a time.
template <typename T, int kMostThreads, int kBlocks>
__global__ void __launch_bounds__(kMostThreads, kBlocks) rms_norm8_kernel(const qwen1m_rms_norm8 a) {
  static_assert(kNormVector * kWarp == QWEN1M_ROWS8_BLOCK, "a block of a row is a warp's");
  const int64_t row = blockIdx.x;
  uint8_t* numbers = a.out.numbers + row * a.norm.width;
  const auto put = [&](int i, bool inside, const float (&values)[kNormVector]) {
    const float scale = block_scale<kWarp>(inside ? largest_of(values) : 0.0f), inverse = 1.0f / scale;
    if (!inside) return;
    if (threadIdx.x % kWarp == 0) a.out.scales[i / QWEN1M_ROWS8_BLOCK * a.out.rows + row] = scale;
    *reinterpret_cast<uint32_t*>(numbers + i) =
        to_e4m3(values[0] * inverse, values[1] * inverse, values[2] * inverse, values[3] * inverse);
  };
  if (row < a.norm.tokens) {
    normalise_row<T>(a.norm, AddDelta{}, put);
    return;
  }
  await_previous();
  admit_next();
  const float zeros[kNormVector] = {};
  for (int64_t i = threadIdx.x * kNormVector; i < a.norm.width; i += blockDim.x * kNormVector) {
    put(static_cast<int>(i), true, zeros);
  }
}

constexpr int kBlockLanes = QWEN1M_ROWS8_BLOCK / kPack;  // have a block of a row

template <typename T>
__global__ void __launch_bounds__(kThreads) round_rows_kernel(const qwen1m_round_rows a) {
  await_previous();
  admit_next();
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPack;
  for (int64_t t = blockIdx.y; t < a.out.rows; t += gridDim.y) {
    float values[kPack] = {};
    if (i < a.width && t < a.tokens) load_widened(static_cast<const T*>(a.values) + t * a.width + i, values);
    const float scale = block_scale<kBlockLanes>(largest_of(values)), inverse = 1.0f / scale;
    if (i >= a.width) continue;
    if (threadIdx.x % kBlockLanes == 0) a.out.scales[i / QWEN1M_ROWS8_BLOCK * a.out.rows + t] = scale;
#pragma unroll
    for (int n = 0; n < kPack; ++n) values[n] *= inverse;
    const uint2 bytes = {to_e4m3(values[0], values[1], values[2], values[3]),
                         to_e4m3(values[4], values[5], values[6], values[7])};
    *reinterpret_cast<uint2*>(a.out.numbers + t * a.width + i) = bytes;
  }
}

dim3 round_grid(const qwen1m_rows8& out, int64_t width) {
  return dim3(static_cast<unsigned>(ceil_div(width, kThreads * kPack)),
              static_cast<unsigned>(out.rows < kGridRows ? out.rows : kGridRows));
}

bool fits(const qwen1m_rows8& out, int64_t tokens, int64_t width) {
  return width % QWEN1M_ROWS8_BLOCK == 0 && out.rows >= tokens && aligned(out.numbers, out.scales);
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

using namespace qwen1m::cuda;

// Rows of at most 8,192 values.
int qwen1m_cuda_rms_norm8(const qwen1m_rms_norm8* a, qwen1m_stream stream) {
  const qwen1m_rms_norm& norm = a->norm;
  if (!is_hopper()) return cudaErrorNotSupported;
  if (!fits(a->out, norm.tokens, norm.width) || norm.width > kNormThreads * kNormValues ||
      norm.dtype != norm.activation || !aligned(norm.delta, norm.residual, norm.weight)) {
    return cudaErrorInvalidValue;
  }
  if (a->out.rows == 0) return cudaSuccess;
  return with_half_type(norm.activation, [&](auto type) -> int {
    using T = decltype(type);
    const unsigned threads = norm_threads(norm.width);
    const auto kernel =
        threads <= kUsualThreads ? rms_norm8_kernel<T, kUsualThreads, 2> : rms_norm8_kernel<T, kNormThreads, 1>;
    return launch_overlapping(kernel, static_cast<unsigned>(a->out.rows), threads, 0, as_stream(stream), *a);
  });
}

int qwen1m_cuda_round_rows(const qwen1m_round_rows* a, qwen1m_stream stream) {
  if (!is_hopper()) return cudaErrorNotSupported;
  if (!fits(a->out, a->tokens, a->width) || !aligned(a->values)) return cudaErrorInvalidValue;
  if (a->out.rows == 0) return cudaSuccess;
  return with_half_type(a->activation, [&](auto type) -> int {
    return launch_overlapping(round_rows_kernel<decltype(type)>, round_grid(a->out, a->width), kThreads, 0,
                              as_stream(stream), *a);
  });
}
