// Merges what shares of the keys made of a row: a warp a row and head.
#include "attention.cuh"
#include "block_scan.cuh"
#include "mma.cuh"
#include "shares.cuh"
#include "vectors.cuh"

namespace qwen1m {
namespace cuda {
namespace {

constexpr int kMergeWarps = 4;
constexpr int kAtOnce = 8;  // shares that are read together

template <typename T, int D>
__global__ void __launch_bounds__(kMergeWarps* kWarp)
    merge_kernel(const __grid_constant__ MergedRows rows, const Shares shares, T* out, float* lse) {
  constexpr int kEach = D / kWarp;
  const int lane = threadIdx.x % kWarp, number = blockIdx.x * kMergeWarps + threadIdx.x / kWarp;
  int32_t row = number / rows.heads, range = 0;
  while (range < rows.ranges && row >= rows.rows[range]) row -= rows.rows[range++];
  if (range == rows.ranges) return;
  const int64_t head = number % rows.heads, step_row = rows.first[range] + row;
  const int64_t line = step_row * rows.heads + head, shared = (step_row - shares.first_row) * rows.heads + head;
  const float2* statistic = shares.statistic + shared * shares.count;
  const float* partial = shares.partial + shared * shares.count * D + lane * kEach;

  float top = kNegativeInfinity;
  for (int s = lane; s < shares.count; s += kWarp) top = fmaxf(top, statistic[s].x);
  top = warp_largest(top);
  const float origin = top == kNegativeInfinity ? 0.0f : top;
  float total = 0, values[kEach] = {};
  for (int first = 0; first < shares.count; first += kAtOnce) {
    float weight[kAtOnce];
    Vector<float, kEach> part[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int s = first + i;
      const float2 own = s < shares.count ? statistic[s] : make_float2(kNegativeInfinity, 0);
      weight[i] = own.y > 0 ? exp2_fast(own.x - origin) : 0;
      total += own.y * weight[i];
      if (own.y > 0) part[i] = load_vector<kEach>(partial + static_cast<int64_t>(s) * D);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int n = 0; n < kEach; ++n) values[n] += weight[i] > 0 ? weight[i] * part[i].values[n] : 0;
    }
  }
  const float inverse = total > 0 ? 1.0f / total : 0.0f;
#pragma unroll
  for (float& value : values) value *= inverse;
  store_narrowed(values, out + line * D + lane * kEach);
  if (lse != nullptr && lane == 0) lse[line] = (top + log2f(total)) * kLn2;
}

}  // namespace

template <typename T, int D>
int merge_shares(const MergedRows& rows, const Shares& shares, void* out, float* lse, cudaStream_t stream) {
  int64_t lines = 0;
  for (int range = 0; range < rows.ranges; ++range) lines += static_cast<int64_t>(rows.rows[range]) * rows.heads;
  const auto blocks = static_cast<unsigned>(ceil_div(lines, kMergeWarps));
  merge_kernel<T, D><<<blocks, kMergeWarps * kWarp, 0, stream>>>(rows, shares, static_cast<T*>(out), lse);
  return cudaGetLastError();
}

QWEN1M_INSTANTIATE(merge_shares, (const MergedRows&, const Shares&, void*, float*, cudaStream_t));

}  // namespace cuda
}  // namespace qwen1m
