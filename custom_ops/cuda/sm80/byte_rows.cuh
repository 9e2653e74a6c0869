// The softmax of a warp of decode over an 8-bit cache, int8 or E4M3, of the query heads of one KV head.
//
// A warp takes 16 keys of a tile at a time, in a ring of its own in shared memory: no warp waits for another. Numbers
// are widened to f16 in registers, exactly, on their way from shared memory into the products, whose rows are keys, and
// then dims of values: eight query heads of a KV head are all the columns there are. The dims of a product, and the
// rows of its result, may be taken in any order, so that a lane's part of an operand is bytes that lie together. What
// the numbers stand for is put around the products: powers go into the query once, a token's scale multiplies its
// score, the query's product with the centre is added to it, and the scale of a value multiplies its weight.
#pragma once

#include "decode_shares.cuh"
#include "mma.cuh"
#include "qwen1m/dca_stages.h"
#include "row_loads.cuh"
#include "vectors.cuh"

namespace qwen1m {
namespace cuda {
namespace sm80 {
namespace {

constexpr int kDim = 128;
constexpr int kWarpKeys = kTileKeys / kWarps;  // of a tile, of a warp
constexpr int kRing = 4;                       // tiles
constexpr int kPartBytes = kWarpKeys * kDim;   // of a warp's keys or values
constexpr int kRingBytes = kWarps * kRing * 2 * kPartBytes;
static_assert(kWarpKeys == 16, "a warp's keys are the columns of two products, and the depth of one");

// Where 16 numbers of a row of 128 lie in shared memory: permuted so that eight lanes read from different banks.
__device__ inline uint32_t chunk_address(uint32_t part, int row, int chunk) {
  return part + row * kDim + ((chunk ^ (row & 7)) << 4);
}

// Two bytes of a word, the lower pair or the upper one, as a pair of f16.
template <typename Number>
__device__ uint32_t widen_pair(uint32_t bytes, int upper);

template <>
__device__ inline uint32_t widen_pair<int8_t>(uint32_t bytes, int upper) {
  return widen_int8_pair(bytes, upper);
}

template <>
__device__ inline uint32_t widen_pair<fp8>(uint32_t bytes, int upper) {
  const uint32_t small = spread_fp8_pair(bytes, upper), power = 0x5c005c00u;  // 2^8
  const __half2 number = __hmul2(reinterpret_cast<const __half2&>(small), reinterpret_cast<const __half2&>(power));
  return reinterpret_cast<const uint32_t&>(number);
}

// An 8 x 8 matrix of 16-bit values, a pair of a row in each lane, turned.
__device__ inline uint32_t transpose(uint32_t pair) {
  uint32_t turned;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
  return turned;
}

__device__ inline uint32_t word(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

constexpr float kMostWeight = 256;      // relative to `maximum`, which stays as it is so long
constexpr float kMostScaled = 32768;    // of a weight times its value's scale and `unit`, in f16
constexpr float kLargestScaled = 1024;  // that unit is chosen for

// The running softmax of one warp: eight query rows, or 16 with kUpper; 16 keys a call.
//
// Lane 4g + p holds of the query rows g and g + 8 dims [32p, 32p + 32); of the rows 2p, 2p + 1 and those 8 further what
// is known, and dims [16g, 16g + 16) of the output.
template <typename T, typename Number, bool kUpper>
struct ByteRows {
  static constexpr int kHalves = kUpper ? 2 : 1;

  uint32_t query[kDim / 16][kHalves][2];
  float factor[kHalves][2], offset[kHalves][2];  // of a score in units of log2: sum * scale * factor + offset
  float out[kHalves][kDim / 16][4];              // times `unit`: [.][t][2d + i] of row 2p + i, dim 16g + 2t + d
  float maximum[kHalves][2];                     // no score is larger than log2(kMostWeight) above it
  float sum[kHalves][2];                         // of this lane's keys, g and g + 8 of each 16
  float unit[kHalves][2];

  __device__ void start() {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
#pragma unroll
      for (int t = 0; t < kDim / 16; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[h][t][i] = 0;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        maximum[h][i] = kNegativeInfinity;
        sum[h][i] = 0;
        unit[h][i] = 0x1p60f;
      }
    }
  }

  // Rows [0, rows) of q, one rotation of a KV head's query heads, times its powers, each over its largest number.
  __device__ void set_query(const T* q, int rows, const float* power, const float* centre, float scale, int lane) {
    const int g = lane / 4, p = lane % 4, first = 32 * p;
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const int row = 8 * h + g;
      float numbers[kDim / 16][4] = {}, at_centre = 0, largest = 0;
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) {
        float powers[4], centres[4];
        if (row < rows) load_widened(q + row * kDim + first + 4 * step, numbers[step]);
        load_widened(power + first + 4 * step, powers);
        load_widened(centre + first + 4 * step, centres);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          numbers[step][i] *= powers[i];
          at_centre += numbers[step][i] * centres[i];
          largest = fmaxf(largest, fabsf(numbers[step][i]));
        }
      }
#pragma unroll
      for (int other = 1; other < 4; other *= 2) {
        at_centre += __shfl_xor_sync(kAllLanes, at_centre, other);
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, other));
      }
      const float inverse = largest > 0 ? 1.0f / largest : 0.0f;
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) {
        const float (&own)[4] = numbers[step];
        query[step][h][0] = pack_pair<f16>(own[0] * inverse, own[1] * inverse);
        query[step][h][1] = pack_pair<f16>(own[2] * inverse, own[3] * inverse);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        factor[h][i] = scale * __shfl_sync(kAllLanes, largest, 4 * (2 * p + i));
        offset[h][i] = scale * __shfl_sync(kAllLanes, at_centre, 4 * (2 * p + i));
      }
    }
  }

  // 16 keys and values of a part of the ring, of which `count` are there. Lane i < 16 has the scale of key i, lane 16 +
  // i that of value i.
  __device__ void attend(uint32_t keys, uint32_t values, int count, float scale, int lane) {
    const int g = lane / 4, p = lane % 4;
    float scores[kHalves][4] = {};  // [.][2k + i] of key g + 8k, row 2p + i
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 upper = load_shared(chunk_address(keys, g, 2 * p + half)),
                  lower = load_shared(chunk_address(keys, 8 + g, 2 * p + half));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t one = word(upper, i), other = word(lower, i);
        const uint32_t rows[4] = {widen_pair<Number>(one, 0), widen_pair<Number>(other, 0), widen_pair<Number>(one, 1),
                                  widen_pair<Number>(other, 1)};
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
          multiply_add<f16>(scores[h], rows, query[4 * half + i][h][0], query[4 * half + i][h][1]);
        }
      }
    }
    float value_scale[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int key = g + 8 * k;
      const float key_scale = __shfl_sync(kAllLanes, scale, key);
      value_scale[k] = __shfl_sync(kAllLanes, scale, kWarpKeys + key);
      const bool valid = key < count;
      if (!valid) value_scale[k] = 0;
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[h][2 * k + i];
          score = valid ? score * (key_scale * factor[h][i]) + offset[h][i] : kNegativeInfinity;
        }
      }
    }
    float weights[kHalves][4], scaled[kHalves][4];
    if (!__all_sync(kAllLanes, weigh(scores, value_scale, weights, scaled))) {
      raise(scores, value_scale);
      weigh(scores, value_scale, weights, scaled);
    }
    uint32_t columns[kHalves][2];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
#pragma unroll
      for (int k = 0; k < 2; ++k) columns[h][k] = transpose(pack_pair<f16>(scaled[h][2 * k], scaled[h][2 * k + 1]));
#pragma unroll
      for (int i = 0; i < 2; ++i) sum[h][i] += weights[h][i] + weights[h][2 + i];
    }
    uint4 rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i] = load_shared(chunk_address(values, 8 * (i / 2) + 2 * p + i % 2, g));
#pragma unroll
    for (int t = 0; t < kDim / 16; ++t) {
      uint32_t pairs[2];  // of keys 2p and 2p + 1, then of those 8 further: dims 2t, then 2t + 1
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t one = word(rows[2 * k], t / 2), other = word(rows[2 * k + 1], t / 2);
        pairs[k] = __byte_perm(one, other, t % 2 ? 0x7362 : 0x5140);
      }
      const uint32_t dims[4] = {widen_pair<Number>(pairs[0], 0), widen_pair<Number>(pairs[0], 1),
                                widen_pair<Number>(pairs[1], 0), widen_pair<Number>(pairs[1], 1)};
#pragma unroll
      for (int h = 0; h < kHalves; ++h) multiply_add<f16>(out[h][t], dims, columns[h][0], columns[h][1]);
    }
  }

  // Leaves the rows' output and its maximum and sum.
  __device__ void finish(const WarpResult<kDim>& result, int lane) {
    const int g = lane / 4, p = lane % 4;
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 8 * h + 2 * p + i;
        float total = sum[h][i];
#pragma unroll
        for (int other = 4; other < kWarp; other *= 2) total += __shfl_xor_sync(kAllLanes, total, other);
        if (g == 0) result.statistics[row] = make_float2(maximum[h][i], total);
        const float inverse = 1.0f / unit[h][i];
#pragma unroll
        for (int t = 0; t < kDim / 16; ++t) {
#pragma unroll
          for (int d = 0; d < 2; ++d) result.row(row)[16 * g + 2 * t + d] = out[h][t][2 * d + i] * inverse;
        }
      }
    }
  }

 private:
  using Numbers = float[kHalves][4];

  // What 16 scores weigh, and that times their values' scales, in f16's range; whether it is within it.
  __device__ bool weigh(const Numbers& scores, const float (&value_scale)[2], Numbers& weights, Numbers& scaled) const {
    bool fits = true;
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[h][i] = exp2_fast(scores[h][i] - maximum[h][i % 2]);
        scaled[h][i] = weights[h][i] * (value_scale[i / 2] * unit[h][i % 2]);
        fits = fits && weights[h][i] <= kMostWeight && scaled[h][i] <= kMostScaled;
      }
    }
    return fits;
  }

  // Makes the largest of all scores the maximum, and the unit smaller where they would not be in f16's range.
  __device__ void raise(const Numbers& scores, const float (&value_scale)[2]) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float top = over_keys(fmaxf(maximum[h][i], fmaxf(scores[h][i], scores[h][2 + i])));
        const float largest = over_keys(
            fmaxf(exp2_fast(scores[h][i] - top) * value_scale[0], exp2_fast(scores[h][2 + i] - top) * value_scale[1]));
        const float shrink = exp2_fast(maximum[h][i] - top), next = fminf(unit[h][i], kLargestScaled / largest);
        const float change = shrink * (next / unit[h][i]);
        maximum[h][i] = top;
        sum[h][i] *= shrink;
        unit[h][i] = next;
#pragma unroll
        for (int t = 0; t < kDim / 16; ++t) {
#pragma unroll
          for (int d = 0; d < 2; ++d) out[h][t][2 * d + i] *= change;
        }
      }
    }
  }

  // The largest of the lanes that have other keys of the same rows.
  __device__ static float over_keys(float value) {
#pragma unroll
    for (int other = 4; other < kWarp; other *= 2) {
      value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, other));
    }
    return value;
  }
};

// A warp's part of tiles [first, last) of a KV head's keys on their way into its ring. Eight lanes a row: rows lane /
// 8, + 4, ... Nothing here waits for what it loads: a tile's page was asked for with the tile before, and its scales
// are widened where they are used.
template <typename Number, typename PageTable>
class ByteRing {
 public:
  __device__ ByteRing(const qwen1m_cache& cache, const PageTable& pages, int kv_head, uint32_t ring, int first,
                      int last)
      : pages_(pages), kv_heads_(cache.kv_heads), last_(last) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t row = static_cast<int64_t>(warp * kWarpKeys + lane / 8) * kv_heads_ + kv_head;
    keys_ = static_cast<const Number*>(cache.key) + (row * kDim + lane % 8 * 16);
    values_ = static_cast<const Number*>(cache.value) + (row * kDim + lane % 8 * 16);
    scales_ = static_cast<const f16*>(lane < kWarpKeys ? cache.frame.key_scale : cache.frame.value_scale) +
              (static_cast<int64_t>(warp * kWarpKeys + lane % kWarpKeys) * kv_heads_ + kv_head);
#pragma unroll
    for (int i = 0; i < 2; ++i) places_[i] = chunk_address(ring, lane / 8 + i * kStep, lane % 8);
    page_ = first < last ? pages.page(first * kTileKeys) : 0;
  }

  // Begins a group of copies, of nothing from tile `last` on. Returns a scale of the tile, see ByteRows::attend.
  __device__ f16 load(int tile) {
    f16 scale = f16(0.0f);
    if (tile < last_) {
      const int64_t first = pages_.slot(page_, tile * kTileKeys) * kv_heads_;
      if (tile + 1 < last_) page_ = pages_.page((tile + 1) * kTileKeys);
      const int64_t step = static_cast<int64_t>(kStep) * kv_heads_ * kDim;
      const Number *key = keys_ + first * kDim, *value = values_ + first * kDim;
      const uint32_t part = fill_ * 2 * kPartBytes;
#pragma unroll
      for (int i = 0; i < kWarpKeys / kStep; ++i) {
        const uint32_t to = places_[i % 2] + part + i / 2 * 2 * kStep * kDim;
        copy_async(to, key);
        copy_async(to + kPartBytes, value);
        key += step;
        value += step;
      }
      scale = scales_[first];
    }
    copy_commit();
    fill_ = fill_ == kRing - 1 ? 0 : fill_ + 1;
    return scale;
  }

 private:
  static constexpr int kStep = kWarp / 8;  // rows of a copy

  PageTable pages_;
  const Number *keys_, *values_;
  const f16* scales_;
  uint32_t places_[2];
  int32_t page_;
  int kv_heads_, last_, fill_ = 0;
};

// Attends with a warp to its part of a share's tiles, which come through `ring` at own_ring; `waiting` are the scales
// of those that are under way. q: the share's first row, of one rotation of the batch after the other.
template <typename T, typename Number, bool kUpper, typename Share, typename PageTable>
__device__ void attend_tiles(ByteRows<T, Number, kUpper>& state, const qwen1m_dca_decode& a, const Share& share,
                             const T* q, ByteRing<Number, PageTable>& ring, uint32_t own_ring,
                             f16 (&waiting)[kRing - 1]) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t variant = static_cast<int64_t>(a.batch) * a.heads * kDim;
  const float* power = a.cache.frame.power + share.kv_head * kDim;
  const float* centre = a.cache.frame.centre + share.kv_head * kDim;
  const float scale = a.scale[share.sequence] * kLog2E;

  Stage current = kStages;
  int use = 0;
  const int32_t chunk = (share.length - 1) / a.chunk_len * a.chunk_len;
  for (int tile = share.first; tile < share.last; ++tile) {
    const int32_t key = tile * kTileKeys;
    const Stage stage = key_stage(key, chunk, a.chunk_len);
    if (stage != current) {
      current = stage;
      state.set_query(q + stage * variant, share.rows, power, centre, scale, lane);
    }
    copy_wait<kRing - 2>();
    __syncwarp();
    const uint32_t part = own_ring + use * 2 * kPartBytes;
    const f16 own = waiting[0];
#pragma unroll
    for (int i = 0; i + 1 < kRing - 1; ++i) waiting[i] = waiting[i + 1];
    waiting[kRing - 2] = ring.load(tile + kRing - 1);
    const int count = share.length - key - warp * kWarpKeys;
    if (count > 0) state.attend(part, part + kPartBytes, count, widen(own), lane);
    use = use == kRing - 1 ? 0 : use + 1;
  }
  copy_wait<0>();
  __syncthreads();
}

}  // namespace
}  // namespace sm80
}  // namespace cuda
}  // namespace qwen1m
