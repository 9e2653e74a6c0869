// A few rows times a weight matrix: the weights stream once from memory straight into tensor core operands.
//
// A block owns 16 output features; its warps take turns at steps of 64 values along K and their sums are added up at
// the end. An mma adds its products over k in any order as long as both operands agree on it. So lane 4g + p, which
// should hold pairs of k from all over a row, holds 8p to 8p + 7 of it: 16 bytes as they lie in memory, of the weight's
// rows g and g + 8 and of x's row g. Nothing passes through shared memory, and what is under way is kept in registers.
// The first weights are already under way while the launch before, which makes x, still runs.
#include "mma.cuh"
#include "overlap.cuh"
#include "qwen1m/step.h"
#include "step/few_rows.cuh"
#include "vectors.cuh"

namespace qwen1m {
namespace cuda {

namespace {

constexpr int kStep = 8 * kPack;  // whole lines of 128 bytes

// What a lane loads for one step.
template <int GROUPS>
struct Operands {
  uint4 weight[2][2];  // rows g and g + 8; two halves of the step
  uint4 x[GROUPS][2];
};

// GROUPS groups of kTokenGroup tokens; STAGES steps of every warp are under way.
template <typename T, typename Out, int WARPS, int GROUPS, int STAGES>
__global__ void __launch_bounds__(WARPS* kWarp, kProcessorWarps / WARPS) linear_kernel(const qwen1m_linear a) {
  __shared__ WarpSums<WARPS, GROUPS> of_warps;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = lane / 4, part = lane % 4;
  const int depth = static_cast<int>(a.in_features), tokens = static_cast<int>(a.tokens);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFeatures;

  // A thread finishes one feature, of one token or more.
  const int64_t feature = first + threadIdx.x % kFeatures;
  const bool inside = feature < a.out_features;
  const float bias = a.bias && inside ? widen(static_cast<const T*>(a.bias)[feature]) : 0.0f;

  // Where this lane's operands of its warp's next step are.
  int k = warp * kStep + part * kPack;
  const T* weight[2];
  const T* x[GROUPS];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t row = min(first + r * 8 + group, a.out_features - 1);
    weight[r] = static_cast<const T*>(a.weight) + row * depth + k;
  }
#pragma unroll
  for (int t = 0; t < GROUPS; ++t) {
    x[t] = static_cast<const T*>(a.x) + static_cast<int64_t>(t * kTokenGroup + group) * depth + k;
  }

  const auto load_weight = [&](Operands<GROUPS>& to, int steps_ahead) {
    each_half<WARPS, kStep>(k, depth, steps_ahead, [&](int half, int ahead, bool in_row) {
#pragma unroll
      for (int r = 0; r < 2; ++r) to.weight[r][half] = load_once(weight[r] + ahead, in_row);
    });
  };
  const auto load_x = [&](Operands<GROUPS>& to, int steps_ahead) {
    each_half<WARPS, kStep>(k, depth, steps_ahead, [&](int half, int ahead, bool in_row) {
#pragma unroll
      for (int t = 0; t < GROUPS; ++t) {
        to.x[t][half] = load_cached(x[t] + ahead, in_row && t * kTokenGroup + group < tokens);
      }
    });
  };
  float sums[GROUPS][4] = {};
  const auto multiply = [&](const Operands<GROUPS>& from) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 w0 = from.weight[0][half], w1 = from.weight[1][half];
      const uint32_t left[2][4] = {{w0.x, w1.x, w0.y, w1.y}, {w0.z, w1.z, w0.w, w1.w}};
#pragma unroll
      for (int t = 0; t < GROUPS; ++t) {
        multiply_add<T>(sums[t], left[0], from.x[t][half].x, from.x[t][half].y);
        multiply_add<T>(sums[t], left[1], from.x[t][half].z, from.x[t][half].w);
      }
    }
  };

  Operands<GROUPS> stages[STAGES];
  walk_row(
      stages, [&] { return k - part * kPack < depth; }, load_weight, load_x, multiply,
      [&] {
        constexpr int kAdvance = STAGES * WARPS * kStep;
        k += kAdvance;
#pragma unroll
        for (int r = 0; r < 2; ++r) weight[r] += kAdvance;
#pragma unroll
        for (int t = 0; t < GROUPS; ++t) x[t] += kAdvance;
      });

  of_warps.put(sums);
  admit_next();  // blocks that began among these would crowd the processors whose blocks end first
  __syncthreads();
  if (!inside) return;
  of_warps.each_token(
      tokens, bias, [&](int t, float sum) { static_cast<Out*>(a.y)[t * a.out_features + feature] = narrow<Out>(sum); });
}

template <typename T, typename Out, int WARPS>
int launch_linear(const qwen1m_linear& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(a.out_features, kFeatures));
  const auto kernel = a.tokens <= kTokenGroup ? linear_kernel<T, Out, WARPS, 1, 4> : linear_kernel<T, Out, WARPS, 2, 2>;
  return launch_overlapping(kernel, blocks, WARPS * kWarp, 0, stream, a);
}

template <typename T, typename Out>
int choose_linear(const qwen1m_linear& a, cudaStream_t stream) {
  bool at_once;
  if (const int error = all_at_once(a.out_features, at_once)) return error;
  return at_once ? launch_linear<T, Out, 8>(a, stream) : launch_linear<T, Out, 4>(a, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

using namespace qwen1m::cuda;

// K in whole packs of eight; x and weight are of one type, which y is of unless it is float32. Every 16 tokens read the
// weights once more.
int qwen1m_cuda_linear(const qwen1m_linear* a, qwen1m_stream stream) {
  if (a->in_features % kPack != 0 || a->dtype != a->activation || !aligned(a->x, a->weight)) {
    return cudaErrorInvalidValue;
  }
  if (a->out_dtype != a->activation && a->out_dtype != QWEN1M_FLOAT32) return cudaErrorInvalidValue;
  if (a->out_features == 0) return cudaSuccess;
  return with_half_type(a->activation, [&](auto type) -> int {
    using T = decltype(type);
    return a->out_dtype == QWEN1M_FLOAT32 ? few_at_a_time<T, float>(*a, choose_linear<T, float>, as_stream(stream))
                                          : few_at_a_time<T, T>(*a, choose_linear<T, T>, as_stream(stream));
  });
}
