// A few rows times a weight of 8 bits: its bytes stream once from memory into registers, where they become operands of
// the tensor cores. Many rows: the weight is widened to 16 bits, for a GEMM.
//
// A block owns 16 output features; its warps take turns at steps of 128 values along K, a line of each feature. As in
// linear.cu an mma may add its products over k in any order: lane 4g + p holds values 16p to 16p + 15 of a half step,
// as they lie in memory, of the weight's rows g and g + 8 and of x's row g. The products of a half step, of one scale a
// row, are added up by the tensor cores, times the scale in float32.
#include "mma.cuh"
#include "overlap.cuh"
#include "qwen1m/weight8.h"
#include "sm90/linear8_rows.h"
#include "step/few_rows.cuh"
#include "vectors.cuh"
#include "weight8.cuh"

namespace qwen1m {
namespace cuda {

namespace {

constexpr int kTokenGroup = 8;  // columns of one mma
constexpr int kBytes = 16;      // of a lane's load
constexpr int kHalfStep = 4 * kBytes;
constexpr int kStep = 2 * kHalfStep;

// What a lane loads for one step.
template <int GROUPS>
struct Operands {
  uint4 weight[2][2];  // rows g and g + 8; two halves of the step
  float scale[2][2];
  uint4 x[GROUPS][2][2];  // two packs a half
};

// GROUPS groups of kTokenGroup tokens; STAGES steps of every warp are under way.
template <typename Kind, typename T, int WARPS, int GROUPS, int STAGES>
__global__ void __launch_bounds__(WARPS* kWarp, kProcessorWarps / WARPS) linear8_kernel(const qwen1m_linear8 a) {
  __shared__ PartialSums<WARPS, GROUPS * kTokenGroup> of_warps;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = lane / 4, part = lane % 4;
  const int depth = static_cast<int>(a.in_features), tokens = static_cast<int>(a.tokens);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFeatures;
  const int blocks = depth / a.weight.columns, shift = 31 - __clz(a.weight.columns);

  // Where this lane's operands of its warp's next step are.
  int k = warp * kStep;
  const uint8_t* weight[2];
  const float* scales[2];
  const T* x[GROUPS];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t row = min(first + r * 8 + group, a.out_features - 1);
    weight[r] = a.weight.numbers + row * depth + k + part * kBytes;
    scales[r] = a.weight.scales + row / a.weight.rows * blocks;
  }
#pragma unroll
  for (int t = 0; t < GROUPS; ++t) {
    x[t] = static_cast<const T*>(a.x) + static_cast<int64_t>(t * kTokenGroup + group) * depth + k + part * kBytes;
  }

  // f(half, values ahead of k, whether they are in the row) for the halves of the step that is so many of the warp's
  // ahead.
  const auto each_half = [&](int steps, auto&& f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int ahead = steps * WARPS * kStep + half * kHalfStep;
      f(half, ahead, k + ahead < depth);
    }
  };
  const auto load_weight = [&](Operands<GROUPS>& to, int steps) {
    each_half(steps, [&](int half, int ahead, bool in_row) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        to.weight[r][half] = load_once(weight[r] + ahead, in_row);
        to.scale[r][half] = in_row ? __ldg(scales[r] + ((k + ahead) >> shift)) : 0.0f;
      }
    });
  };
  const auto load_x = [&](Operands<GROUPS>& to, int steps) {
    each_half(steps, [&](int half, int ahead, bool in_row) {
#pragma unroll
      for (int t = 0; t < GROUPS; ++t) {
        const bool valid = in_row && t * kTokenGroup + group < tokens;
        to.x[t][half][0] = load_cached(x[t] + ahead, valid);
        to.x[t][half][1] = load_cached(x[t] + ahead + kPack, valid);
      }
    });
  };
  float sums[GROUPS][4] = {};
  const auto multiply = [&](const Operands<GROUPS>& from) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 w0 = from.weight[0][half], w1 = from.weight[1][half];
      const uint32_t words[2][4] = {{w0.x, w0.y, w0.z, w0.w}, {w1.x, w1.y, w1.z, w1.w}};
      float products[GROUPS][4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t upper[2], lower[2];
        widen_bytes<Kind, T>(words[0][i], upper);
        widen_bytes<Kind, T>(words[1][i], lower);
        const uint32_t left[4] = {upper[0], lower[0], upper[1], lower[1]};
#pragma unroll
        for (int t = 0; t < GROUPS; ++t) {
          const uint4 pack = from.x[t][half][i / 2];
          multiply_add<T>(products[t], left, i % 2 ? pack.z : pack.x, i % 2 ? pack.w : pack.y);
        }
      }
#pragma unroll
      for (int t = 0; t < GROUPS; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[t][i] += products[t][i] * from.scale[i / 2][half];
      }
    }
  };

  // Each step is loaded where the one STAGES before it has been multiplied; weights come while the launch before, which
  // makes x, still runs.
  constexpr int kAdvance = STAGES * WARPS * kStep;
  Operands<GROUPS> stages[STAGES];
#pragma unroll
  for (int s = 0; s < STAGES; ++s) load_weight(stages[s], s);
  await_previous();
#pragma unroll
  for (int s = 0; s < STAGES; ++s) load_x(stages[s], s);
  while (k < depth) {
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
      multiply(stages[s]);
      load_weight(stages[s], s + STAGES);
      load_x(stages[s], s + STAGES);
    }
    k += kAdvance;
#pragma unroll
    for (int r = 0; r < 2; ++r) weight[r] += kAdvance;
#pragma unroll
    for (int t = 0; t < GROUPS; ++t) x[t] += kAdvance;
  }

#pragma unroll
  for (int t = 0; t < GROUPS; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      of_warps.parts[warp][t * kTokenGroup + part * 2 + i % 2][group + i / 2 * 8] = sums[t][i];
    }
  }
  admit_next();
  __syncthreads();
  // A thread finishes one feature, of one token or more.
  const int64_t feature = first + threadIdx.x % kFeatures;
  if (feature >= a.out_features) return;
  for (int t = threadIdx.x / kFeatures; t < tokens; t += WARPS * kWarp / kFeatures) {
    const float sum = of_warps.total(t, threadIdx.x % kFeatures);
    static_cast<T*>(a.y)[t * a.out_features + feature] = narrow<T>(sum * kPower<Kind, T>);
  }
}

template <typename Kind, typename T, int WARPS>
int launch_linear8(const qwen1m_linear8& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(a.out_features, kFeatures));
  const auto kernel =
      a.tokens <= kTokenGroup ? linear8_kernel<Kind, T, WARPS, 1, 2> : linear8_kernel<Kind, T, WARPS, 2, 1>;
  return launch_overlapping(kernel, blocks, WARPS * kWarp, 0, stream, a);
}

constexpr int kWidenThreads = 256;

// A thread widens 16 bytes.
template <typename Kind, typename T>
__global__ void __launch_bounds__(kWidenThreads) widen_kernel(const qwen1m_widen_weight a) {
  const auto depth = static_cast<uint32_t>(a.in_features);
  const uint32_t loads = depth / kBytes;
  const uint64_t number = static_cast<uint64_t>(blockIdx.x) * kWidenThreads + threadIdx.x;
  const auto row = static_cast<uint32_t>(number / loads), k = static_cast<uint32_t>(number % loads) * kBytes;
  await_previous();
  if (row >= a.out_features) return;
  const float scale =
      a.weight.scales[row / a.weight.rows * (depth / a.weight.columns) + k / a.weight.columns] * kPower<Kind, f16>;
  const int64_t at = static_cast<int64_t>(row) * depth + k;
  const uint4 bytes = *reinterpret_cast<const uint4*>(a.weight.numbers + at);
  const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float wide[kPack];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t pairs[2];
      widen_bytes<Kind, f16>(words[2 * half + i], pairs);
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&pairs[p]));
        wide[4 * i + 2 * p] = pair.x * scale;
        wide[4 * i + 2 * p + 1] = pair.y * scale;
      }
    }
    store_narrowed(wide, static_cast<T*>(a.out) + at + half * kPack);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

using namespace qwen1m::cuda;

// Blocks of 64 columns or more; x and y are of one type of 16 bits. Every 16 tokens read the weights once more.
int qwen1m_cuda_linear8(const qwen1m_linear8* a, qwen1m_stream stream) {
  if (a->in_features % kHalfStep != 0 || a->weight.columns < kHalfStep || a->out_dtype != a->activation ||
      !aligned(a->x, a->weight.numbers)) {
    return cudaErrorInvalidValue;
  }
  if (a->out_features == 0) return cudaSuccess;
  if (sm90::takes_linear8_rows(*a) && is_hopper()) {
    return with_half_type(a->activation,
                          [&](auto type) { return sm90::linear8_rows<decltype(type)>(*a, as_stream(stream)); });
  }
  const bool eight = takes_eight_warps(a->out_features);
  return with_weight8(a->weight.kind, a->activation, [&](auto kind, auto type) -> int {
    using Kind = decltype(kind);
    using T = decltype(type);
    return few_at_a_time<T, T>(*a, a->out_features, eight ? launch_linear8<Kind, T, 8> : launch_linear8<Kind, T, 4>,
                               as_stream(stream));
  });
}

// K in whole loads of 16 bytes.
int qwen1m_cuda_widen_weight(const qwen1m_widen_weight* a, qwen1m_stream stream) {
  if (a->in_features % kBytes != 0 || !aligned(a->weight.numbers, a->out)) return cudaErrorInvalidValue;
  const int64_t loads = a->out_features * (a->in_features / kBytes);
  if (loads == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(ceil_div(loads, kWidenThreads));
  return with_weight8(a->weight.kind, a->out_dtype, [&](auto kind, auto type) -> int {
    return launch_overlapping(widen_kernel<decltype(kind), decltype(type)>, blocks, kWidenThreads, 0, as_stream(stream),
                              *a);
  });
}
