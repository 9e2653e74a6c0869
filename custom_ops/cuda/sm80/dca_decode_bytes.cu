// Decode over an 8-bit cache, int8 or E4M3: one query a sequence against all of its keys, split over the keys as in
// dca_decode.cu.
//
// A warp takes 16 keys of a tile at a time, in a ring of its own in shared memory: no warp waits for another. Numbers
// are widened to the activations' type in registers, exactly, on their way from shared memory into the products: the
// dims of a product, and the columns of its result, may be taken in any order, so that a lane's part of an operand is
// bytes that lie together. What the numbers stand for is put around the products: powers go into the query once, a
// token's scale multiplies its score, the query's product with the centre is added to it, and the scale of a value
// multiplies its weight.
#include "attention.cuh"
#include "decode_shares.cuh"
#include "overlap.cuh"
#include "qwen1m/dca_stages.h"
#include "row_loads.cuh"

namespace qwen1m {
namespace cuda {
namespace sm80 {

namespace {

constexpr int kDim = 128;
constexpr int kWarpKeys = kTileKeys / kWarps;  // of a tile, of a warp
constexpr int kRing = 4;
constexpr int kPartBytes = kWarpKeys * kDim;  // of a warp's keys or values
constexpr int kRingBytes = kWarps * kRing * 2 * kPartBytes;
constexpr int kSharedBytes = kRingBytes > WarpResult<kDim>::kBytes ? kRingBytes : WarpResult<kDim>::kBytes;
static_assert(kWarpKeys == 16, "a warp's keys are the columns of two products, and the depth of one");

// Where 16 numbers of a row of 128 lie in shared memory: permuted so that eight lanes read from different banks.
__device__ inline uint32_t chunk_address(uint32_t part, int row, int chunk) {
  return part + row * kDim + ((chunk ^ (row & 7)) << 4);
}

__device__ inline uint4 load_chunk(uint32_t address) {
  uint4 words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(address));
  return words;
}

// Two bytes of a word, the lower pair or the upper one, as a pair of T.
template <typename T, typename Number>
__device__ uint32_t widen_pair(uint32_t bytes, int upper);

// 128 + the low seven bits, less 128 where the sign is clear or 256 where it is set: all of them exact.
template <>
__device__ inline uint32_t widen_pair<bf16, int8_t>(uint32_t bytes, int upper) {
  const uint32_t pair = __byte_perm(bytes, 0x43434343u, upper ? 0x4342 : 0x4140);
  uint32_t low = pair & 0xff7fff7fu, sign = pair & 0xff80ff80u;
  const __nv_bfloat162 number =
      __hsub2(reinterpret_cast<const __nv_bfloat162&>(low), reinterpret_cast<const __nv_bfloat162&>(sign));
  return reinterpret_cast<const uint32_t&>(number);
}

// 1024 + the byte above -128, less 1152.
template <>
__device__ inline uint32_t widen_pair<f16, int8_t>(uint32_t bytes, int upper) {
  const uint32_t pair = __byte_perm(bytes ^ 0x80808080u, 0x64646464u, upper ? 0x4342 : 0x4140), origin = 0x64806480u;
  const __half2 number = __hsub2(reinterpret_cast<const __half2&>(pair), reinterpret_cast<const __half2&>(origin));
  return reinterpret_cast<const uint32_t&>(number);
}

// The bytes above zeros; their exponent and mantissa at the lower end of the exponent of T, and its bias is 120 larger.
template <>
__device__ inline uint32_t widen_pair<bf16, fp8>(uint32_t bytes, int upper) {
  const uint32_t pair = __byte_perm(bytes, 0, upper ? 0x3424 : 0x1404), power = 0x7b807b80u;  // 2^120
  uint32_t small = (pair & 0x80008000u) | (pair & 0x7f007f00u) >> 4;
  const __nv_bfloat162 number =
      __hmul2(reinterpret_cast<const __nv_bfloat162&>(small), reinterpret_cast<const __nv_bfloat162&>(power));
  return reinterpret_cast<const uint32_t&>(number);
}

// Here it is 8 larger.
template <>
__device__ inline uint32_t widen_pair<f16, fp8>(uint32_t bytes, int upper) {
  const uint32_t pair = __byte_perm(bytes, 0, upper ? 0x3424 : 0x1404), power = 0x5c005c00u;  // 2^8
  uint32_t small = (pair & 0x80008000u) | (pair & 0x7f007f00u) >> 1;
  const __half2 number = __hmul2(reinterpret_cast<const __half2&>(small), reinterpret_cast<const __half2&>(power));
  return reinterpret_cast<const uint32_t&>(number);
}

__device__ inline uint32_t word(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// The running softmax of one warp: 16 query rows, of which only eight are there unless kUpper; 16 keys a call.
//
// Lane 4g + p holds, of the query rows g and g + 8, dims [32p, 32p + 32); of the output dims 32p + n and 32p + 16 + n.
template <typename T, typename Number, bool kUpper>
struct ByteRows {
  static constexpr int kHalves = kUpper ? 2 : 1;

  uint32_t query[kDim / 16][2 * kHalves];
  float factor[kHalves], offset[kHalves];  // of a score in units of log2: sum * scale * factor + offset
  float out[kDim / 8][2 * kHalves];
  float maximum[kHalves], sum[kHalves];

  __device__ void start() {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) out[n][i] = 0;
    }
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      maximum[h] = kNegativeInfinity;
      sum[h] = 0;
    }
  }

  // Rows [0, rows) of q, one rotation of a KV head's query heads, times its powers; the largest of these is left out,
  // so that no product is larger than q.
  __device__ void set_query(const T* q, int rows, const float* power, const float* centre, float scale, int lane) {
    const int first = lane % 4 * 32;
    float largest = 0;
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      float powers[4];
      load_widened(power + first + 4 * step, powers);
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = fmaxf(largest, powers[i]);
    }
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    const float inverse = 1.0f / largest;
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const int row = 8 * h + lane / 4;
      float at_centre = 0;
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) {
        float numbers[4] = {}, powers[4], centres[4];
        if (row < rows) load_widened(q + row * kDim + first + 4 * step, numbers);
        load_widened(power + first + 4 * step, powers);
        load_widened(centre + first + 4 * step, centres);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          numbers[i] *= powers[i];
          at_centre += numbers[i] * centres[i];
          numbers[i] *= inverse;
        }
        query[step][h] = pack_pair<T>(numbers[0], numbers[1]);
        query[step][kHalves + h] = pack_pair<T>(numbers[2], numbers[3]);
      }
      at_centre += __shfl_xor_sync(kAllLanes, at_centre, 1);
      at_centre += __shfl_xor_sync(kAllLanes, at_centre, 2);
      factor[h] = scale * largest;
      offset[h] = scale * at_centre;
    }
  }

  __device__ void multiply(float (&c)[4], const uint32_t (&a)[2 * kHalves], uint32_t b0, uint32_t b1) {
    if constexpr (kUpper) {
      multiply_add<T>(c, a, b0, b1);
    } else {
      const uint32_t whole[4] = {a[0], 0, a[1], 0};
      multiply_add<T>(c, whole, b0, b1);
    }
  }

  // 16 keys and values of a part of the ring, of which `count` are there. Lane i < 16 has the scale of key i, lane 16 +
  // i that of value i.
  __device__ void attend(uint32_t keys, uint32_t values, int count, float scale, int lane) {
    const int g = lane / 4, p = lane % 4;
    float scores[2][4] = {};
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 words = load_chunk(chunk_address(keys, 8 * tile + g, 2 * p + half));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          multiply(scores[tile], query[4 * half + i], widen_pair<T, Number>(word(words, i), 0),
                   widen_pair<T, Number>(word(words, i), 1));
        }
      }
    }
    float value_scale[4];
    bool valid[4];
    float key_scale[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = 8 * (i / 2) + 2 * p + i % 2;
      key_scale[i] = __shfl_sync(kAllLanes, scale, key);
      value_scale[i] = __shfl_sync(kAllLanes, scale, kWarpKeys + key);
      valid[i] = key < count;
    }
    uint32_t weights[2 * kHalves];
    float shrink[kHalves];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      float top = maximum[h], weight[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float score = scores[i / 2][2 * h + i % 2] * (key_scale[i] * factor[h]) + offset[h];
        weight[i] = valid[i] ? score : kNegativeInfinity;
        top = fmaxf(top, weight[i]);
      }
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float origin = top == kNegativeInfinity ? 0.0f : top;
      shrink[h] = exp2_fast(maximum[h] - origin);
      maximum[h] = top;
      float total = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weight[i] = exp2_fast(weight[i] - origin);
        total += weight[i];
        weight[i] = valid[i] ? weight[i] * value_scale[i] : 0.0f;
      }
      sum[h] = sum[h] * shrink[h] + total;
      weights[h] = pack_pair<T>(weight[0], weight[1]);
      weights[kHalves + h] = pack_pair<T>(weight[2], weight[3]);
    }
    bool same = shrink[0] == 1.0f;
    if constexpr (kUpper) same = same && shrink[1] == 1.0f;
    if (!__all_sync(kAllLanes, same)) {
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2 * kHalves; ++i) out[n][i] *= shrink[i / 2];
      }
    }
    uint4 rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i] = load_chunk(chunk_address(values, 8 * (i / 2) + 2 * p + i % 2, g));
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 4) {
      uint32_t pairs[2][2];  // of keys 2p and 2p + 1, then of those 8 further: dims n, n + 1, then n + 2, n + 3
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t one = word(rows[2 * i], n / 4), other = word(rows[2 * i + 1], n / 4);
        pairs[i][0] = __byte_perm(one, other, 0x5140);
        pairs[i][1] = __byte_perm(one, other, 0x7362);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t b0 = widen_pair<T, Number>(pairs[0][i / 2], i % 2),
                       b1 = widen_pair<T, Number>(pairs[1][i / 2], i % 2);
        if constexpr (kUpper) {
          multiply_add<T>(out[n + i], weights, b0, b1);
        } else {
          float whole[4] = {out[n + i][0], out[n + i][1], 0, 0};
          multiply(whole, weights, b0, b1);
          out[n + i][0] = whole[0];
          out[n + i][1] = whole[1];
        }
      }
    }
  }
};

template <typename T, typename Number, bool kUpper>
__global__ void __launch_bounds__(kThreads, kUpper ? kBlocksPerProcessor : kMostBlocksPerProcessor)
    decode_bytes_kernel(const __grid_constant__ DecodeArguments a) {
  extern __shared__ char shared[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Share share(a);
  if (share.is_empty()) {
    await_previous();
    return;
  }
  const int kv_heads = a.cache.kv_heads;
  const Pages pages(a.block_tables + static_cast<int64_t>(share.sequence) * a.table_width, a.cache.page_size);
  const auto* keys = static_cast<const Number*>(a.cache.key);
  const auto* values = static_cast<const Number*>(a.cache.value);
  const auto* scales = static_cast<const f16*>(lane < kWarpKeys ? a.cache.frame.key_scale : a.cache.frame.value_scale);
  const uint32_t ring = shared_address(shared) + warp * kRing * 2 * kPartBytes;

  // Eight lanes a row: rows lane / 8, + 4, ... Nothing here waits for what it loads: a tile's slot was asked for with
  // the tile before, and its scales are widened where they are used.
  int64_t slot = share.first < share.last ? pages.slot(share.first * kTileKeys) : 0;
  int fill = 0;
  const auto load = [&](int tile) {
    f16 scale = f16(0.0f);
    if (tile < share.last) {
      const int64_t first = (slot + warp * kWarpKeys) * kv_heads + share.kv_head;
      if (tile + 1 < share.last) slot = pages.slot((tile + 1) * kTileKeys);
      const uint32_t part = ring + fill * 2 * kPartBytes;
#pragma unroll
      for (int i = 0; i < kWarpKeys; i += kWarp / 8) {
        const int row = lane / 8 + i, chunk = lane % 8;
        const int64_t from = (first + static_cast<int64_t>(row) * kv_heads) * kDim + chunk * 16;
        copy_async(chunk_address(part, row, chunk), keys + from);
        copy_async(chunk_address(part + kPartBytes, row, chunk), values + from);
      }
      scale = scales[first + static_cast<int64_t>(lane % kWarpKeys) * kv_heads];
    }
    copy_commit();
    fill = fill == kRing - 1 ? 0 : fill + 1;
    return scale;
  };

  // The newest key, and q, are what the launch before writes.
  if (share.has_newest()) await_previous();
  f16 waiting[kRing - 1];  // scales of the tiles that are under way
#pragma unroll
  for (int i = 0; i < kRing - 1; ++i) waiting[i] = load(share.first + i);
  if (!share.has_newest()) await_previous();

  const T* q = static_cast<const T*>(a.q) + (static_cast<int64_t>(share.sequence) * a.heads + share.first_head) * kDim;
  const int64_t variant = static_cast<int64_t>(a.batch) * a.heads * kDim;
  const float* power = a.cache.frame.power + share.kv_head * kDim;
  const float* centre = a.cache.frame.centre + share.kv_head * kDim;
  const float scale = a.scale[share.sequence] * kLog2E;

  using Rows = ByteRows<T, Number, kUpper>;
  Rows state;
  state.start();
  Stage current = kStages;
  int use = 0;
  const int32_t chunk = (share.length - 1) / a.chunk_len * a.chunk_len;
  for (int tile = share.first; tile < share.last; ++tile) {
    copy_wait<kRing - 2>();
    __syncwarp();
    const int32_t key = tile * kTileKeys;
    const Stage stage = key >= chunk ? kIntra : key >= chunk - a.chunk_len ? kSucc : kInter;
    if (stage != current) {
      current = stage;
      state.set_query(q + stage * variant, share.rows, power, centre, scale, lane);
    }
    const uint32_t part = ring + use * 2 * kPartBytes;
    const f16 own = waiting[0];
#pragma unroll
    for (int i = 0; i + 1 < kRing - 1; ++i) waiting[i] = waiting[i + 1];
    waiting[kRing - 2] = load(tile + kRing - 1);
    const int count = share.length - key - warp * kWarpKeys;
    if (count > 0) state.attend(part, part + kPartBytes, count, widen(own), lane);
    use = use == kRing - 1 ? 0 : use + 1;
  }
  copy_wait<0>();
  __syncthreads();

  const WarpResult<kDim> result(shared, warp);
#pragma unroll
  for (int h = 0; h < Rows::kHalves; ++h) {
    const int row = 8 * h + lane / 4;
    result.keep_statistic(row, lane, state.maximum[h], state.sum[h]);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) result.row(row)[32 * (lane % 4) + 16 * i + n] = state.out[n][2 * h + i];
    }
  }
  finish_share<T, kDim>(a, share, shared);
}

}  // namespace

template <typename T>
int dca_decode_bytes(const qwen1m_dca_decode& decode, void* workspace, qwen1m_stream stream) {
  const DecodeArguments a = decode_arguments(decode, workspace);
  const bool upper = a.heads / a.cache.kv_heads > kGroupRows / 2;
  return with_number(a.cache.dtype, [&](auto number) -> int {
    using Number = decltype(number);
    const auto kernel = upper ? decode_bytes_kernel<T, Number, true> : decode_bytes_kernel<T, Number, false>;
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (status != cudaSuccess) return status;
    return launch_overlapping(kernel, decode_grid(a), kThreads, kSharedBytes, as_stream(stream), a);
  });
}

template int dca_decode_bytes<bf16>(const qwen1m_dca_decode&, void*, qwen1m_stream);
template int dca_decode_bytes<f16>(const qwen1m_dca_decode&, void*, qwen1m_stream);

}  // namespace sm80
}  // namespace cuda
}  // namespace qwen1m
