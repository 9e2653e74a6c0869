// A few rows times a weight matrix: the weights stream once from memory straight into tensor core operands.
//
// A block owns 16 output features; its warps take turns at steps of 64 values along K and their sums are added up at
// the end. An mma adds its products over k in any order as long as both operands agree on it. So lane 4g + p, which
// should hold pairs of k from all over a row, holds 8p to 8p + 7 of it: 16 bytes as they lie in memory, of two of the
// weight's rows and of x's row g. Nothing passes through shared memory, and what is under way is kept in registers.
// The first weights are already under way while the launch before, which makes x, still runs.
//
// What follows the product in a step may be done where its sums are: of the MLP's first product SiLU, whose block has
// 8 features of the gate and the same ones of what goes up; of the projections of q, k and v their rotations and the
// write to the cache, whose block has 8 pairs of a head.
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

// What becomes of a block's sums. weight_row(a, n): which row of the weight its feature n of kFeatures is. finish(a,
// token, total) has the number threadIdx.x % kValues of the values that it makes of a token; total(n) is feature n's
// sum.

template <typename T, typename Out>
struct Features {
  using Arguments = qwen1m_linear;
  static constexpr int kValues = kFeatures;
  static __host__ __device__ const qwen1m_linear& linear(const Arguments& a) { return a; }
  static __device__ int64_t number(int n) { return static_cast<int64_t>(blockIdx.x) * kFeatures + n; }

  const int64_t own = number(threadIdx.x % kValues);
  const float bias;

  __device__ explicit Features(const Arguments& a)
      : bias(a.bias && own < a.out_features ? widen(static_cast<const T*>(a.bias)[own]) : 0.0f) {}

  static __device__ int64_t weight_row(const Arguments& a, int n) { return min(number(n), a.out_features - 1); }

  template <typename Total>
  __device__ void finish(const Arguments& a, int token, Total&& total) const {
    if (own >= a.out_features) return;
    static_cast<Out*>(a.y)[token * a.out_features + own] = narrow<Out>(bias + total(threadIdx.x % kValues));
  }
};

// SiLU of a gate times what goes up, both rounded as a product in memory is.
template <typename T>
struct Gated {
  using Arguments = qwen1m_linear;
  static constexpr int kValues = kFeatures / 2;
  static __host__ __device__ const qwen1m_linear& linear(const Arguments& a) { return a; }

  __device__ explicit Gated(const Arguments&) {}

  static __device__ int64_t weight_row(const Arguments& a, int n) {
    const int64_t width = a.out_features / 2, value = static_cast<int64_t>(blockIdx.x) * kValues + n % kValues;
    return n / kValues * width + min(value, width - 1);
  }

  template <typename Total>
  __device__ void finish(const Arguments& a, int token, Total&& total) const {
    const int n = threadIdx.x % kValues;
    const int64_t width = a.out_features / 2, value = static_cast<int64_t>(blockIdx.x) * kValues + n;
    if (value >= width) return;
    const float gate = widen(narrow<T>(total(n))), up = widen(narrow<T>(total(n + kValues)));
    static_cast<T*>(a.y)[token * width + value] = narrow<T>(silu(gate) * up);
  }
};

// Pairs (i, i + D / 2) of a head, rounded likewise, to where qwen1m_rotate_and_cache puts them.
template <typename T, int D>
struct Rotated {
  using Arguments = qwen1m_rotating_linear;
  static constexpr int kValues = kFeatures / 2, kBlocksAHead = D / kFeatures;
  static __host__ __device__ const qwen1m_linear& linear(const Arguments& a) { return a.linear; }
  static __device__ int head() { return blockIdx.x / kBlocksAHead; }
  static __device__ int dim(int n) { return blockIdx.x % kBlocksAHead * kValues + n % kValues + n / kValues * (D / 2); }

  float bias[2];

  __device__ explicit Rotated(const Arguments& a) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = threadIdx.x % kValues + half * kValues;
      bias[half] = widen(static_cast<const T*>(a.rotation.bias)[weight_row(a, n)]);
    }
  }

  static __device__ int64_t weight_row(const Arguments&, int n) { return head() * D + dim(n); }

  template <typename Total>
  __device__ void finish(const Arguments& a, int token, Total&& total) const {
    const qwen1m_rotate_and_cache& to = a.rotation;
    const int n = threadIdx.x % kValues, kv_heads = to.cache.kv_heads;
    const float low = widen(narrow<T>(total(n))) + bias[0], high = widen(narrow<T>(total(n + kValues))) + bias[1];
    const auto put = [&](void* rows, int64_t row, float first, float second) {
      T* const at = static_cast<T*>(rows) + row * D + dim(n);
      at[0] = narrow<T>(first);
      at[D / 2] = narrow<T>(second);
    };
    const auto put_rotated = [&](void* rows, int64_t row, int64_t table_row) {
      const float* table = to.table + table_row * D + dim(n);
      const float cosine = table[0], sine = table[D / 2];
      put(rows, row, low * cosine - high * sine, high * cosine + low * sine);
    };
    if (head() < to.heads) {
      for (int v = 0; v < to.variants; ++v) {
        const int64_t table_row = static_cast<int64_t>(v) * to.tokens + token;
        put_rotated(to.q, table_row * to.heads + head(), table_row);
      }
      return;
    }
    const int64_t slot = to.slots[token];
    if (slot < 0) return;
    const int of_keys = head() - to.heads, of_values = of_keys - kv_heads;
    if (of_values < 0) {
      put_rotated(to.cache.key, slot * kv_heads + of_keys, token);
    } else {
      put(to.cache.value, slot * kv_heads + of_values, low, high);
    }
  }
};

// GROUPS groups of kTokenGroup tokens; STAGES steps of every warp are under way.
template <typename T, typename Result, int WARPS, int GROUPS, int STAGES>
__global__ void __launch_bounds__(WARPS* kWarp, kProcessorWarps / WARPS)
    linear_kernel(const __grid_constant__ typename Result::Arguments arguments) {
  __shared__ WarpSums<WARPS, GROUPS> of_warps;
  const qwen1m_linear& a = Result::linear(arguments);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = lane / 4, part = lane % 4;
  const int depth = static_cast<int>(a.in_features), tokens = static_cast<int>(a.tokens);
  const Result result(arguments);

  // Where this lane's operands of its warp's next step are.
  int k = warp * kStep + part * kPack;
  const T* weight[2];
  const T* x[GROUPS];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t row = Result::weight_row(arguments, r * (kFeatures / 2) + group);
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
  for (int t = threadIdx.x / Result::kValues; t < tokens; t += WARPS * kWarp / Result::kValues) {
    result.finish(arguments, t, [&](int n) { return of_warps.total(t, n); });
  }
}

template <typename T, typename Result, int WARPS>
int launch_linear(const typename Result::Arguments& arguments, cudaStream_t stream) {
  const qwen1m_linear& a = Result::linear(arguments);
  const auto blocks = static_cast<unsigned>(ceil_div(a.out_features, kFeatures));
  const auto kernel =
      a.tokens <= kTokenGroup ? linear_kernel<T, Result, WARPS, 1, 4> : linear_kernel<T, Result, WARPS, 2, 2>;
  return launch_overlapping(kernel, blocks, WARPS * kWarp, 0, stream, arguments);
}

template <typename T, typename Result>
int choose_linear(const typename Result::Arguments& a, cudaStream_t stream) {
  return takes_eight_warps(Result::linear(a).out_features) ? launch_linear<T, Result, 8>(a, stream)
                                                           : launch_linear<T, Result, 4>(a, stream);
}

// K in whole packs of eight; x and weight are of one type.
bool takes(const qwen1m_linear& a) {
  return a.in_features % kPack == 0 && a.dtype == a.activation && aligned(a.x, a.weight);
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

using namespace qwen1m::cuda;

// Every 16 tokens read the weights once more.
int qwen1m_cuda_linear(const qwen1m_linear* a, qwen1m_stream stream) {
  if (!takes(*a) || (a->out_dtype != a->activation && a->out_dtype != QWEN1M_FLOAT32)) return cudaErrorInvalidValue;
  if (a->out_features == 0) return cudaSuccess;
  return with_half_type(a->activation, [&](auto type) -> int {
    using T = decltype(type);
    const auto all_tokens = [&](auto out) {
      using Out = decltype(out);
      return few_at_a_time<T, Out>(*a, a->out_features, choose_linear<T, Features<T, Out>>, as_stream(stream));
    };
    return a->out_dtype == QWEN1M_FLOAT32 ? all_tokens(float{}) : all_tokens(T{});
  });
}

// The same.
int qwen1m_cuda_gated_linear(const qwen1m_linear* a, qwen1m_stream stream) {
  if (!takes(*a) || a->out_dtype != a->activation || a->bias != nullptr || a->out_features % 2 != 0) {
    return cudaErrorInvalidValue;
  }
  if (a->out_features == 0) return cudaSuccess;
  return with_half_type(a->activation, [&](auto type) -> int {
    using T = decltype(type);
    return few_at_a_time<T, T>(*a, a->out_features / 2, choose_linear<T, Gated<T>>, as_stream(stream));
  });
}

int qwen1m_cuda_rotating_linear(const qwen1m_rotating_linear* a, qwen1m_stream stream) {
  const qwen1m_linear& linear = a->linear;
  const qwen1m_rotate_and_cache& rotation = a->rotation;
  const int64_t heads = rotation.heads + 2 * rotation.cache.kv_heads;
  if (!takes(linear) || linear.tokens > kMaxTokens || linear.tokens != rotation.tokens ||
      linear.out_features != heads * rotation.cache.head_dim || rotation.bias_dtype != linear.activation ||
      rotation.activation != linear.activation || rotation.cache.dtype != linear.activation || rotation.q == nullptr) {
    return cudaErrorInvalidValue;
  }
  if (linear.tokens == 0) return cudaSuccess;
  return with_half_type(linear.activation, [&](auto type) -> int {
    using T = decltype(type);
    switch (rotation.cache.head_dim) {
      case 64: return choose_linear<T, Rotated<T, 64>>(*a, as_stream(stream));
      case 128: return choose_linear<T, Rotated<T, 128>>(*a, as_stream(stream));
      default: return cudaErrorInvalidValue;
    }
  });
}
