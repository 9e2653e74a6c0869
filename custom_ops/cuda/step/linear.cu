// A few rows times a weight matrix: the weights stream once from memory straight into tensor core operands.
//
// A block owns 16 output features; its warps take turns at steps of 64 values along K and their sums are added up at
// the end. Nothing passes through shared memory, and what is under way is kept in registers. The first weights are
// already under way while the launch before, which makes x, still runs.
//
// Loads go by whole lines of 128 bytes, a load of a warp by four of them: lane l has 16 bytes, chunk l % 8, of the
// weight's row l / 8 of four. An mma wants lanes 4g to 4g + 3 to have its row g: so it has each weight row twice, as
// rows 2j and 2j + 1, once with the first four chunks and once with the last. Of its eight columns four are tokens with
// the first chunks of x and four the same tokens with the last: rows 2j at the former and 2j + 1 at the latter are sums
// that count. It adds its products over k in any order as long as both operands agree on it, here as they lie in
// memory.
//
// What follows the product in a step may be done where its sums are: of the MLP's first product SiLU, whose block has
// 8 features of the gate and the same ones of what goes up; of the projections of q, k and v their rotations and the
// write to the cache, whose block has 8 pairs of a head; of several ranks' products, which are summed, the way to the
// others' mailboxes.
#include <cstdint>

#include "mailbox.cuh"
#include "mma.cuh"
#include "overlap.cuh"
#include "qwen1m/step.h"
#include "sm90/product.h"
#include "step/few_rows.cuh"
#include "vectors.cuh"

namespace qwen1m {
namespace cuda {

namespace {

constexpr int kChunks = 8, kStep = kChunks * kPack;  // of a line
constexpr int kLoadRows = kWarp / kChunks, kLoads = kFeatures / kLoadRows;
constexpr int kTokenGroup = 4;  // half of the columns of an mma

// What becomes of a block's sums. weight_row(a, n): which row of the weight its feature n of kFeatures is. look(a)
// reads what finish() takes besides them. finish(a, token, n, total) makes number n, threadIdx.x % kValues, of the
// values of a token, of which a thread has one or more; total(n) is feature n's sum.

template <typename T, typename Out>
struct Features {
  using Arguments = qwen1m_linear;
  static constexpr int kValues = kFeatures;
  static __host__ __device__ const qwen1m_linear& linear(const Arguments& a) { return a; }
  static __device__ int64_t number(int n) { return static_cast<int64_t>(blockIdx.x) * kFeatures + n; }

  float bias = 0;

  __device__ void look(const Arguments& a) {
    const int64_t own = number(threadIdx.x % kValues);
    if (a.bias && own < a.out_features) bias = widen(static_cast<const T*>(a.bias)[own]);
  }

  static __device__ int64_t weight_row(const Arguments& a, int n) { return min(number(n), a.out_features - 1); }

  template <typename Total>
  __device__ void finish(const Arguments& a, int token, int n, Total&& total) const {
    if (number(n) >= a.out_features) return;
    static_cast<Out*>(a.y)[token * a.out_features + number(n)] = narrow<Out>(bias + total(n));
  }
};

// SiLU of a gate times what goes up, both rounded as a product in memory is.
template <typename T>
struct Gated {
  using Arguments = qwen1m_linear;
  static constexpr int kValues = kFeatures / 2;
  static __host__ __device__ const qwen1m_linear& linear(const Arguments& a) { return a; }

  __device__ void look(const Arguments&) {}

  static __device__ int64_t weight_row(const Arguments& a, int n) {
    const int64_t width = a.out_features / 2, value = static_cast<int64_t>(blockIdx.x) * kValues + n % kValues;
    return n / kValues * width + min(value, width - 1);
  }

  template <typename Total>
  __device__ void finish(const Arguments& a, int token, int n, Total&& total) const {
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

  __device__ void look(const Arguments& a) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = threadIdx.x % kValues + half * kValues;
      bias[half] = widen(static_cast<const T*>(a.rotation.bias)[weight_row(a, n)]);
    }
  }

  static __device__ int64_t weight_row(const Arguments&, int n) { return head() * D + dim(n); }

  template <typename Total>
  __device__ void finish(const Arguments& a, int token, int n, Total&& total) const {
    const qwen1m_rotate_and_cache& to = a.rotation;
    const int kv_heads = to.cache.kv_heads;
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

struct SendingArguments {
  qwen1m_linear linear;
  Mailboxes boxes;
};

// Lines of neighbouring values, to y and to the other ranks.
template <typename T>
struct Sent {
  using Arguments = SendingArguments;
  static constexpr int kValues = kFeatures / kLineValues;
  static __host__ __device__ const qwen1m_linear& linear(const Arguments& a) { return a.linear; }

  uint32_t turn = 0;  // of the thread's token: it has no other

  __device__ void look(const Arguments& a) {
    const int token = threadIdx.x / kValues;
    if (token < a.linear.tokens) turn = turn_after(*a.boxes.turn(token));
  }

  static __device__ int64_t weight_row(const Arguments& a, int n) { return Features<T, T>::weight_row(a.linear, n); }

  template <typename Total>
  __device__ void finish(const Arguments& a, int token, int n, Total&& total) const {
    const int64_t first = Features<T, T>::number(n * kLineValues), width = a.linear.out_features;
    if (first >= width) return;
    Vector<T, kLineValues> line;
#pragma unroll
    for (int i = 0; i < kLineValues; ++i) line.values[i] = narrow<T>(total(n * kLineValues + i));
    store_vector(line, static_cast<T*>(a.linear.y) + token * width + first);
    for (int other = 0; other + 1 < a.boxes.degree; ++other) {
      Line* const lines = a.boxes.lines(a.boxes.other(other), a.boxes.rank, turn, token);
      send_line(lines + first / kLineValues, *reinterpret_cast<const uint2*>(line.values), turn);
    }
  }
};

// GROUPS groups of kTokenGroup tokens; STAGES steps of every warp are under way.
template <typename T, typename Result, int WARPS, int GROUPS, int STAGES>
__global__ void __launch_bounds__(WARPS* kWarp, kProcessorWarps / WARPS)
    linear_kernel(const __grid_constant__ typename Result::Arguments arguments) {
  __shared__ PartialSums<2 * WARPS, GROUPS * kTokenGroup> of_warps;
  const qwen1m_linear& a = Result::linear(arguments);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = lane / 4, part = lane % 4;
  const int depth = static_cast<int>(a.in_features), tokens = static_cast<int>(a.tokens);
  static_assert(WARPS * kWarp / (kFeatures / kLineValues) >= GROUPS * kTokenGroup, "a thread sends of one token");

  // Where this lane's operands of its warp's next steps are. kRun of them lie one behind the other: that is sooner with
  // eight warps, and with four it is not.
  constexpr int kRun = WARPS == 8 ? STAGES : 1, kAdvance = STAGES * WARPS * kStep;
  int step = warp * kRun * kStep;
  const int chunk = lane % kChunks * kPack, x_chunk = (group / 4 * 4 + part) * kPack;
  const auto row_of = [&](int load) { return Result::weight_row(arguments, load * kLoadRows + lane / kChunks); };
  const T* weight = static_cast<const T*>(a.weight) + row_of(0) * depth + step + chunk;
  int rows_on[kLoads];  // from the first load's row to the others'
#pragma unroll
  for (int r = 0; r < kLoads; ++r) rows_on[r] = static_cast<int>((row_of(r) - row_of(0)) * depth);
  const T* x = static_cast<const T*>(a.x) + static_cast<int64_t>(group % kTokenGroup) * depth + step + x_chunk;

  const auto ahead_of = [](int steps) { return (steps / kRun * kRun * WARPS + steps % kRun) * kStep; };
  const auto load_weight = [&](uint4(&to)[kLoads], int steps) {
    const int ahead = ahead_of(steps);
    const bool in_row = step + chunk + ahead < depth;
#pragma unroll
    for (int r = 0; r < kLoads; ++r) to[r] = load_once(weight + ahead + rows_on[r], in_row);
  };
  const auto load_x = [&](uint4(&to)[GROUPS], int steps) {
    const int ahead = ahead_of(steps);
    const bool in_row = step + x_chunk + ahead < depth;
#pragma unroll
    for (int t = 0; t < GROUPS; ++t) {
      const int token = t * kTokenGroup;
      to[t] = load_cached(x + ahead + token * depth, in_row && token + group % kTokenGroup < tokens);
    }
  };
  float sums[GROUPS][kLoads / 2][4] = {};
  const auto multiply = [&](const uint4(&w)[kLoads], const uint4(&of_x)[GROUPS]) {
#pragma unroll
    for (int r = 0; r < kLoads; r += 2) {
      const uint32_t left[2][4] = {{w[r].x, w[r + 1].x, w[r].y, w[r + 1].y}, {w[r].z, w[r + 1].z, w[r].w, w[r + 1].w}};
#pragma unroll
      for (int t = 0; t < GROUPS; ++t) {
        multiply_add<T>(sums[t][r / 2], left[0], of_x[t].x, of_x[t].y);
        multiply_add<T>(sums[t][r / 2], left[1], of_x[t].z, of_x[t].w);
      }
    }
  };

  // Each step is loaded where the one STAGES before it has been multiplied.
  uint4 weights[STAGES][kLoads], xs[STAGES][GROUPS];
#pragma unroll
  for (int s = 0; s < STAGES; ++s) load_weight(weights[s], s);
  await_previous();
#pragma unroll
  for (int s = 0; s < STAGES; ++s) load_x(xs[s], s);
  Result result;
  result.look(arguments);
  while (step < depth) {
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
      multiply(weights[s], xs[s]);
      load_weight(weights[s], s + STAGES);
      load_x(xs[s], s + STAGES);
    }
    step += kAdvance;
    weight += kAdvance;
    x += kAdvance;
  }

  // Of the accumulator of loads 2n and 2n + 1 this lane has rows g and g + 8 at columns 2p and 2p + 1.
  const int half = group % 2;
  if (part / 2 == half) {
#pragma unroll
    for (int t = 0; t < GROUPS; ++t) {
#pragma unroll
      for (int n = 0; n < kLoads / 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = t * kTokenGroup + part % 2 * 2 + i % 2, feature = (2 * n + i / 2) * kLoadRows + group / 2;
          of_warps.parts[2 * warp + half][token][feature] = sums[t][n][i];
        }
      }
    }
  }
  admit_next();  // blocks that began among these would crowd the processors whose blocks end first
  __syncthreads();
  for (int t = threadIdx.x / Result::kValues; t < tokens; t += WARPS * kWarp / Result::kValues) {
    result.finish(arguments, t, threadIdx.x % Result::kValues, [&](int n) { return of_warps.total(t, n); });
  }
}

template <typename T, typename Result, int WARPS>
int launch_linear(const typename Result::Arguments& arguments, cudaStream_t stream) {
  const qwen1m_linear& a = Result::linear(arguments);
  const auto blocks = static_cast<unsigned>(ceil_div(a.out_features, kFeatures));
  const auto kernel = a.tokens <= kTokenGroup       ? linear_kernel<T, Result, WARPS, 1, 4>
                      : a.tokens <= 2 * kTokenGroup ? linear_kernel<T, Result, WARPS, 2, 3>
                                                    : linear_kernel<T, Result, WARPS, 4, 2>;
  return launch_overlapping(kernel, blocks, WARPS * kWarp, 0, stream, arguments);
}

template <typename T, typename Result>
int choose_linear(const typename Result::Arguments& a, cudaStream_t stream) {
  return takes_eight_warps(Result::linear(a).out_features) ? launch_linear<T, Result, 8>(a, stream)
                                                           : launch_linear<T, Result, 4>(a, stream);
}

// K in whole packs of eight; x and weight are of one type; 32 bits number the weight's values.
bool takes(const qwen1m_linear& a) {
  return a.in_features % kPack == 0 && a.dtype == a.activation && aligned(a.x, a.weight) &&
         a.in_features * a.out_features <= INT32_MAX;
}

// Whether the rows, whose results are so wide, are many, for a product of Hopper's.
bool are_many(const qwen1m_linear& a, int64_t width) {
  return a.tokens >= QWEN1M_MANY_ROWS && a.in_features > 0 && a.bias == nullptr && a.out_dtype == a.activation &&
         width % kPack == 0 && aligned(a.y) && is_hopper();
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

using namespace qwen1m::cuda;

// Every 16 tokens read the weights once more, but for many on Hopper.
int qwen1m_cuda_linear(const qwen1m_linear* a, qwen1m_stream stream) {
  if (!takes(*a) || (a->out_dtype != a->activation && a->out_dtype != QWEN1M_FLOAT32)) return cudaErrorInvalidValue;
  if (a->out_features == 0) return cudaSuccess;
  const bool many = are_many(*a, a->out_features);
  return with_half_type(a->activation, [&](auto type) -> int {
    using T = decltype(type);
    if (many) return sm90::product<T>(*a, as_stream(stream));
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
  const bool many = are_many(*a, a->out_features / 2);
  return with_half_type(a->activation, [&](auto type) -> int {
    using T = decltype(type);
    if (many) return sm90::gated_product<T>(*a, as_stream(stream));
    return few_at_a_time<T, T>(*a, a->out_features / 2, choose_linear<T, Gated<T>>, as_stream(stream));
  });
}

int qwen1m_cuda_multiplies_many_rows(int64_t rows, int64_t features) {
  const bool fits = rows >= QWEN1M_MANY_ROWS && features % (2 * kPack) == 0;
  return fits && is_hopper() && sm90::fills_rounds(rows, features) ? 1 : 0;
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

int qwen1m_cuda_sending_linear(const qwen1m_sending_linear* a, qwen1m_stream stream) {
  const qwen1m_linear& linear = a->linear;
  if (!takes(linear) || !takes_mailboxes(a->rank, a->degree) || linear.tokens > kMaxTokens || linear.bias != nullptr ||
      linear.out_dtype != linear.activation || linear.out_features % kPack != 0 ||
      linear.out_features > QWEN1M_MAILBOX_WIDTH) {
    return cudaErrorInvalidValue;
  }
  if (linear.tokens == 0 || linear.out_features == 0) return cudaSuccess;
  const SendingArguments arguments{linear, mailboxes_of(a->boxes, a->rank, a->degree)};
  return with_half_type(linear.activation, [&](auto type) -> int {
    using T = decltype(type);
    return choose_linear<T, Sent<T>>(arguments, as_stream(stream));
  });
}
