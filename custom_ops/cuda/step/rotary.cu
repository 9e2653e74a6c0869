// Rotary tables, the rotations of queries and keys, the cache write, and where a decode step's tokens go.
#include "overlap.cuh"
#include "qwen1m/dca_stages.h"
#include "qwen1m/step.h"
#include "vectors.cuh"

namespace qwen1m {
namespace cuda {

namespace {

// Cosine and sine of position * inv_freq, the product rounded to float32. The angle reaches 5e5: whole turns are taken
// off in float64, after which float32 is enough and no argument needs the slow reduction of sincosf.
__device__ inline void cosine_sine(int32_t position, float inv_freq, float* cosine, float* sine) {
  constexpr double kInversePi = 0.31830988618379067154;
  const float angle = static_cast<float>(position) * inv_freq;
  const double half_turns = static_cast<double>(angle) * kInversePi;
  sincospif(static_cast<float>(half_turns - 2.0 * rint(0.5 * half_turns)), sine, cosine);
}

constexpr int kTableThreads = 256;
constexpr int kAngles = 4;  // neighbouring angles of a thread

// Threads (D / 2 / kAngles, rows of a block).
__global__ void __launch_bounds__(kTableThreads) rotary_table_kernel(const qwen1m_rotary_table a) {
  await_previous();
  admit_next();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;
  const int angle = threadIdx.x * kAngles;
  float frequencies[kAngles], cosines[kAngles], sines[kAngles];
  load_widened(a.inv_freq + angle, frequencies);
  const int32_t position = a.positions[row];
#pragma unroll
  for (int i = 0; i < kAngles; ++i) cosine_sine(position, frequencies[i], cosines + i, sines + i);
  float* to = a.table + row * a.head_dim + angle;
  store_narrowed(cosines, to);
  store_narrowed(sines, to + a.head_dim / 2);
}

// A block a sequence; threads (D / 2, kStages), one angle each.
__global__ void decode_inputs_kernel(const qwen1m_decode_inputs a) {
  await_previous();
  admit_next();
  const int b = blockIdx.x, angle = threadIdx.x, stage = threadIdx.y;
  const int32_t position = a.lengths[b], length = position + 1, offset = position % a.chunk_len;
  const int32_t rotary_position = stage == kIntra  ? offset
                                  : stage == kSucc ? min(offset + a.chunk_len, a.chunk_size)
                                                   : min(2 * a.chunk_len - 1, a.chunk_size);
  float* row = a.table + (static_cast<int64_t>(stage) * a.batch + b) * a.head_dim;
  cosine_sine(rotary_position, a.inv_freq[angle], row + angle, row + a.head_dim / 2 + angle);

  if (stage == kIntra && angle == 0) {
    const int64_t page = a.block_tables[static_cast<int64_t>(b) * a.table_width + position / a.page_size];
    a.slots[b] = position > 0 ? page * a.page_size + position % a.page_size : -1;
  }
  if (stage == kSucc && angle == 0) {
    const int32_t original = a.original_max_position_embeddings;
    const double m = original > 0 ? fmax(1.0, 0.1 * log(static_cast<double>(length) / original) + 1.0) : 1.0;
    a.scale[b] = static_cast<float>(m * m * rsqrt(static_cast<double>(a.head_dim)));
  }
  __syncthreads();  // every thread has read the length
  if (stage == kIntra && angle == 0 && position > 0) a.lengths[b] = length;
}

constexpr int kPairs = 8;          // pairs (i, i + D / 2) of a thread: two accesses of 16 bytes
constexpr int kHeadThreads = 256;  // at most, of a block

// kPairs neighbouring pairs of one head, the bias added.
template <typename T, int D>
struct HeadPart {
  float low[kPairs], high[kPairs];

  HeadPart() = default;

  __device__ HeadPart(const T* x, const T* bias) {
    const auto x_low = load_vector<kPairs>(x), x_high = load_vector<kPairs>(x + D / 2);
    const auto bias_low = load_vector<kPairs>(bias), bias_high = load_vector<kPairs>(bias + D / 2);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      low[i] = widen(x_low.values[i]) + widen(bias_low.values[i]);
      high[i] = widen(x_high.values[i]) + widen(bias_high.values[i]);
    }
  }

  __device__ void store(T* to) const {
    store_narrowed(low, to);
    store_narrowed(high, to + D / 2);
  }

  // As numbers of an 8-bit cache: the nearest, for the scale of the whole head, whose other parts are neighbouring
  // lanes'.
  template <typename Number>
  __device__ void store(Number* to, f16* scale) const {
    constexpr int kParts = D / 2 / kPairs;
    const unsigned lanes = ((1u << kParts) - 1) << threadIdx.x % kWarp / kParts * kParts;
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) largest = fmaxf(largest, fmaxf(fabsf(low[i]), fabsf(high[i])));
#pragma unroll
    for (int mask = kParts / 2; mask > 0; mask /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(lanes, largest, mask));
    }
    const f16 step = narrow<f16>(largest / kLargest<Number>);
    if (threadIdx.x % kParts == 0) *scale = step;
    const float inverse = widen(step) > 0 ? 1.0f / widen(step) : 0.0f;
    Vector<Number, kPairs> first, second;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      first.values[i] = narrow<Number>(low[i] * inverse);
      second.values[i] = narrow<Number>(high[i] * inverse);
    }
    store_vector(first, to);
    store_vector(second, to + D / 2);
  }

  // `table` is cos[D / 2] | sin[D / 2], from this part's first pair on.
  __device__ HeadPart rotated(const float* table) const {
    HeadPart part;
#pragma unroll
    for (int i = 0; i < kPairs; i += 4) {
      float cosine[4], sine[4];
      load_widened(table + i, cosine);
      load_widened(table + D / 2 + i, sine);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        part.low[i + n] = low[i + n] * cosine[n] - high[i + n] * sine[n];
        part.high[i + n] = high[i + n] * cosine[n] + low[i + n] * sine[n];
      }
    }
    return part;
  }

  // A key in the frame of an 8-bit cache, from this part's first pair on.
  __device__ HeadPart framed(const float* power, const float* centre) const {
    HeadPart part;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      part.low[i] = low[i] / power[i] - centre[i];
      part.high[i] = high[i] / power[i + D / 2] - centre[i + D / 2];
    }
    return part;
  }
};

// Which part of which head of its row a thread has.
template <int D>
struct Place {
  static constexpr int kParts = D / 2 / kPairs;
  int head = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) / kParts;
  int pair = static_cast<int>(threadIdx.x) % kParts * kPairs;

  static dim3 grid(int64_t rows, int heads) {
    return dim3(static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(heads * kParts, kHeadThreads)));
  }

  // Equal shares, in whole warps.
  static unsigned threads(int heads) {
    const int64_t blocks = ceil_div(heads * kParts, kHeadThreads);
    return static_cast<unsigned>(ceil_div(ceil_div(heads * kParts, blocks), kWarp) * kWarp);
  }
};

// Kept: what the cache holds, T or 8-bit numbers.
template <typename T, int D, int V, typename Kept>
__global__ void __launch_bounds__(kHeadThreads, 4) rotate_and_cache_kernel(const qwen1m_rotate_and_cache a) {
  await_previous();
  admit_next();
  Place<D> at;
  const int kv_heads = a.cache.kv_heads, all_heads = a.heads + 2 * kv_heads;
  if (a.q == nullptr) at.head += a.heads;
  if (at.head >= all_heads) return;
  const int64_t t = blockIdx.x;
  const HeadPart<T, D> part(static_cast<const T*>(a.qkv) + (t * all_heads + at.head) * D + at.pair,
                            static_cast<const T*>(a.bias) + at.head * D + at.pair);
  if (at.head < a.heads) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t row = static_cast<int64_t>(v) * a.tokens + t;
      T* to = static_cast<T*>(a.q) + (row * a.heads + at.head) * D + at.pair;
      part.rotated(a.table + row * D + at.pair).store(to);
    }
    return;
  }
  if (a.slots[t] < 0) return;
  const bool is_key = at.head < a.heads + kv_heads;
  const int head = at.head - a.heads - (is_key ? 0 : kv_heads);
  const int64_t row = a.slots[t] * kv_heads + head, to = row * D + at.pair;
  const auto key = is_key ? part.rotated(a.table + t * D + at.pair) : part;
  if constexpr (!std::is_same_v<Kept, T>) {
    const int first = head * D + at.pair;
    auto* scales = static_cast<f16*>(is_key ? a.cache.frame.key_scale : a.cache.frame.value_scale);
    const auto kept = is_key ? key.framed(a.cache.frame.power + first, a.cache.frame.centre + first) : part;
    kept.store(static_cast<Kept*>(is_key ? a.cache.key : a.cache.value) + to, scales + row);
  } else {
    key.store(static_cast<T*>(is_key ? a.cache.key : a.cache.value) + to);
  }
}

template <typename T, int D, int V>
__global__ void __launch_bounds__(kHeadThreads, 4) rotate_queries_kernel(const qwen1m_rotate_queries a) {
  await_previous();
  admit_next();
  const Place<D> at;
  if (at.head >= a.heads) return;
  const int64_t t = blockIdx.x, all_heads = a.heads + 2 * a.kv_heads;
  const HeadPart<T, D> part(static_cast<const T*>(a.qkv) + ((a.row + t) * all_heads + at.head) * D + at.pair,
                            static_cast<const T*>(a.bias) + at.head * D + at.pair);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int64_t row = static_cast<int64_t>(v) * a.rows + t, of_table = int64_t{v} * a.table_rows + a.table_row + t;
    T* to = static_cast<T*>(a.q) + (row * a.heads + at.head) * D + at.pair;
    part.rotated(a.table + of_table * D + at.pair).store(to);
  }
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// f(T{}, Constant<D>, Constant<V>) for the activation's type, head_dim 64 or 128 and one to three variants.
template <typename F>
int with_heads(qwen1m_dtype dtype, int head_dim, int variants, F&& f) {
  return with_half_type(dtype, [&](auto type) -> int {
    const auto with_variants = [&](auto dim) -> int {
      switch (variants) {
        case 1: return f(type, dim, Constant<1>{});
        case 2: return f(type, dim, Constant<2>{});
        case 3: return f(type, dim, Constant<3>{});
        default: return cudaErrorInvalidValue;
      }
    };
    switch (head_dim) {
      case 64: return with_variants(Constant<64>{});
      case 128: return with_variants(Constant<128>{});
      default: return cudaErrorInvalidValue;
    }
  });
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

using namespace qwen1m::cuda;

int qwen1m_cuda_rotary_table(const qwen1m_rotary_table* a, qwen1m_stream stream) {
  const int row_threads = a->head_dim / 2 / kAngles;
  if (a->head_dim % (2 * kAngles) != 0 || row_threads < 1 || row_threads > kTableThreads) return cudaErrorInvalidValue;
  if (a->rows == 0) return cudaSuccess;
  const dim3 threads(row_threads, kTableThreads / row_threads);
  const auto blocks = static_cast<unsigned>(ceil_div(a->rows, threads.y));
  return launch_overlapping(rotary_table_kernel, blocks, threads, 0, as_stream(stream), *a);
}

int qwen1m_cuda_decode_inputs(const qwen1m_decode_inputs* a, qwen1m_stream stream) {
  if (a->head_dim % 2 != 0 || a->head_dim < 2 || qwen1m::kStages * a->head_dim / 2 > 1024) return cudaErrorInvalidValue;
  if (a->batch == 0) return cudaSuccess;
  return launch_overlapping(decode_inputs_kernel, a->batch, dim3(a->head_dim / 2, qwen1m::kStages), 0,
                            as_stream(stream), *a);
}

// The bias is of the activation's type, the cache too or of 8 bits.
int qwen1m_cuda_rotate_and_cache(const qwen1m_rotate_and_cache* a, qwen1m_stream stream) {
  const bool quantised = qwen1m_is_quantised(a->cache.dtype);
  if (a->bias_dtype != a->activation || (!quantised && a->cache.dtype != a->activation)) return cudaErrorInvalidValue;
  if (a->tokens == 0) return cudaSuccess;
  const int heads = (a->q == nullptr ? 0 : a->heads) + 2 * a->cache.kv_heads;
  return with_heads(a->activation, a->cache.head_dim, a->variants, [&](auto type, auto dim, auto variants) -> int {
    using On = Place<dim.value>;
    const auto keep_as = [&](auto kept) -> int {
      const auto kernel = rotate_and_cache_kernel<decltype(type), dim.value, variants.value, decltype(kept)>;
      return launch_overlapping(kernel, On::grid(a->tokens, heads), On::threads(heads), 0, as_stream(stream), *a);
    };
    return quantised ? with_number(a->cache.dtype, keep_as) : keep_as(type);
  });
}

// The bias is of the activation's type.
int qwen1m_cuda_rotate_queries(const qwen1m_rotate_queries* a, qwen1m_stream stream) {
  if (a->bias_dtype != a->activation) return cudaErrorInvalidValue;
  if (a->rows == 0) return cudaSuccess;
  return with_heads(a->activation, a->head_dim, a->variants, [&](auto type, auto dim, auto variants) -> int {
    using On = Place<dim.value>;
    return launch_overlapping(rotate_queries_kernel<decltype(type), dim.value, variants.value>,
                              On::grid(a->rows, a->heads), On::threads(a->heads), 0, as_stream(stream), *a);
  });
}
