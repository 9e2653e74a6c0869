// The prefill kernel: a tile of query rows of one head walks over tiles of keys, three stages under one online softmax.
//
//   queries  32 rows a warp, so that every operand of keys or values read from shared memory serves two products
//   keys     64 a tile, gathered from the pages row by row
//   loads    K0 V0 K1 V1 ... go round a ring of buffers, all but one of them under way while one is multiplied
//
// Which keys a tile holds is the Walk's affair:
//   kWarps, kRing, kBlocks             warps of a block, buffers of the ring, blocks that share a processor
//   Walk(arguments, shared)            finds its rows; head(), rows(), `begin` (position of the first), first_row()
//   stage(s)                           enters stage s and returns its number of tiles
//   load(tile, pool, shared)           starts the copies of a tile's rows; a row that is no key must be finite
//   position(tile, column)             of a key, for the mask; kNoKey for none
//   needs_mask(stage, tile)            whether some row must not see some key of the tile
//   prefetch(tile), publish(tile)      called around the products of tile - 2: time to look up the tile's slots
#pragma once

#include "attention.cuh"
#include "mma.cuh"
#include "qwen1m/dca_stages.h"
#include "row_loads.cuh"

namespace qwen1m {
namespace cuda {
namespace sm80 {

constexpr int kRowTiles = 2;
constexpr int kWarpRows = 16 * kRowTiles;
constexpr int kNoKey = 0x7fffffff;

// Registers are scarce, and what stands outside of the walk over tiles is cheap: of x, and of the block's number, the
// compiler keeps nothing that it has computed elsewhere.
__device__ inline int32_t anew(int32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ inline int block_y() {
  int y;
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(y));
  return y;
}

// Running softmax of the rows of one warp: maximum[t][h] and sum[t][h] belong to row 16t + 8h + lane / 4.
template <typename T, int D>
struct WarpRows {
  float out[kRowTiles][D / 8][4];
  float scores[kRowTiles][kTileKeys / 8][4];
  float maximum[kRowTiles][2];
  float sum[kRowTiles][2];  // of this lane's columns

  __device__ void start() {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        maximum[t][h] = kNegativeInfinity;
        sum[t][h] = 0;
      }
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[t][n][i] = 0;
      }
    }
  }

  // scores = Q K^T; `queries` is an operand of the warp's rows, `keys` a transposed one.
  __device__ void score(uint32_t queries, uint32_t keys) {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[t][n][i] = 0;
      }
    }
    // Right operands are loaded one product ahead of their use.
    constexpr int kColumns = kTileKeys / 16, kProducts = D / 16 * kColumns;
    uint32_t a[kRowTiles][4], b[2][4];
    load_transposed(b[0], keys);
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const int step = i / kColumns, n = i % kColumns, next = i + 1;
      if (n == 0) {
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) load_left(a[t], at<D>(queries, 16 * t, step));
      }
      if (next < kProducts) load_transposed(b[next % 2], at<D>(keys, next % kColumns * 16, next / kColumns));
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        multiply_add<T>(scores[t][2 * n], a[t], b[i % 2][0], b[i % 2][1]);
        multiply_add<T>(scores[t][2 * n + 1], a[t], b[i % 2][2], b[i % 2][3]);
      }
    }
  }

  // The warp's rows begin at `position`; key_position(column) is a key's.
  template <typename F>
  __device__ void mask(int32_t position, int lane, F&& key_position) {
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int32_t key = key_position(8 * n + 2 * (lane % 4) + c);
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            if (key > position + 16 * t + 8 * h + lane / 4) scores[t][n][2 * h + c] = kNegativeInfinity;
          }
        }
      }
    }
  }

  // Scores become weights; earlier output shrinks where a row's maximum has grown. `scale` includes log2(e).
  __device__ void soften(float scale) {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
      float shrink[2];
      bool grown = false;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = maximum[t][h];
#pragma unroll
        for (int n = 0; n < kTileKeys / 8; ++n) {
          top = fmaxf(top, fmaxf(scores[t][n][2 * h], scores[t][n][2 * h + 1]));
        }
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
        const float base = top == kNegativeInfinity ? 0.0f : top, origin = base * scale;
        shrink[h] = exp2_fast((maximum[t][h] - base) * scale);  // exactly 1 when the maximum stays
        grown |= top != maximum[t][h];
        maximum[t][h] = top;
        float total = 0;
#pragma unroll
        for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float weight = exp2_fast(scores[t][n][2 * h + c] * scale - origin);
            scores[t][n][2 * h + c] = weight;
            total += weight;
          }
        }
        sum[t][h] = sum[t][h] * shrink[h] + total;
      }
      if (__any_sync(kAllLanes, grown)) {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out[t][n][i] *= shrink[i / 2];
        }
      }
    }
  }

  // out += weights * V; `values` is an operand.
  __device__ void attend(uint32_t values) {
    constexpr int kColumns = D / 16, kProducts = kTileKeys / 16 * kColumns;
    uint32_t a[kRowTiles][4], b[2][4];
    load_right(b[0], values);
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const int step = i / kColumns, n = i % kColumns, next = i + 1;
      if (n == 0) {
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          const auto& low = scores[t][2 * step];
          const auto& high = scores[t][2 * step + 1];
          a[t][0] = pack_pair<T>(low[0], low[1]);
          a[t][1] = pack_pair<T>(low[2], low[3]);
          a[t][2] = pack_pair<T>(high[0], high[1]);
          a[t][3] = pack_pair<T>(high[2], high[3]);
        }
      }
      if (next < kProducts) load_right(b[next % 2], at<D>(values, next / kColumns * 16, next % kColumns));
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        multiply_add<T>(out[t][2 * n], a[t], b[i % 2][0], b[i % 2][1]);
        multiply_add<T>(out[t][2 * n + 1], a[t], b[i % 2][2], b[i % 2][3]);
      }
    }
  }

  // Calls write(row, values, lse) for each of the warp's rows; values[2 * n + c] is out[8 * n + 2 * (lane % 4) + c].
  template <typename F>
  __device__ void finish(float scale, int lane, F&& write) {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float total = sum[t][h];
        total += __shfl_xor_sync(kAllLanes, total, 1);
        total += __shfl_xor_sync(kAllLanes, total, 2);
        const float inverse = total > 0 ? 1.0f / total : 0.0f;
        uint32_t values[D / 8];
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          values[n] = pack_pair<T>(out[t][n][2 * h] * inverse, out[t][n][2 * h + 1] * inverse);
        }
        write(16 * t + 8 * h + lane / 4, values, (maximum[t][h] * scale + log2f(total)) * kLn2);
      }
    }
  }
};

template <int D, typename Walk>
constexpr int prefill_shared_bytes() {
  return (Walk::kWarps * kWarpRows + Walk::kRing * kTileKeys) * SharedRows<D>::kRowBytes;
}

template <typename T, int D, typename Walk>
__global__ void __launch_bounds__(Walk::kWarps* kWarp, Walk::kBlocks)
    prefill_kernel(const __grid_constant__ typename Walk::Arguments a) {
  constexpr int kRows = Walk::kWarps * kWarpRows, kRing = Walk::kRing;
  constexpr int kTileBytes = kTileKeys * SharedRows<D>::kRowBytes;
  extern __shared__ char shared[];
  const uint32_t queries = shared_address(shared), ring = queries + kRows * SharedRows<D>::kRowBytes;
  const int lane = threadIdx.x % kWarp, warp_row = threadIdx.x / kWarp * kWarpRows;
  const uint32_t rows_place = operand<D>(lane), transposed_place = transposed_operand<D>(lane);
  const uint32_t warp_queries = at<D>(queries + rows_place, warp_row, 0);

  static_assert(sizeof(typename Walk::Shared) % SharedRows<D>::kRowBytes == 0, "`shared` lies behind it");
  __shared__ typename Walk::Shared walk_shared;
  Walk walk(a, walk_shared);
  if (walk.rows() <= 0) return;
  const float scale = walk.scale * kLog2E;
  const int64_t row_values = static_cast<int64_t>(a.heads) * D;
  const int kv_offset = walk.head() / (a.heads / a.cache.kv_heads) * D;

  WarpRows<T, D> rows;
  rows.start();

  for (int s = kInter; s >= kIntra; --s) {
    const Stage stage = static_cast<Stage>(s);
    const int tiles = walk.stage(stage);
    if (tiles == 0) continue;
    const T* q = static_cast<const T*>(a.q) + (static_cast<int64_t>(stage) * a.tokens + walk.first_row()) * row_values +
                 static_cast<int64_t>(walk.head()) * D;
    load_rows<T, D, kRows, Walk::kWarps * kWarp>(queries, q, row_values, 0, walk.rows());

    // Load 2t is that of the keys of tile t, load 2t + 1 that of its values; phase p multiplies by what load p brought.
    int fill = 0, use = 0;
    const auto load = [&](int number, bool is_key) {
      if (number / 2 < tiles) {
        const T* pool = static_cast<const T*>(is_key ? a.cache.key : a.cache.value) + kv_offset;
        walk.template load<T, D>(number / 2, pool, ring + fill * kTileBytes);
      }
      copy_commit();
      fill = fill == kRing - 1 ? 0 : fill + 1;
    };
    const auto next = [&] {
      copy_wait<kRing - 2>();
      __syncthreads();
      const uint32_t tile = ring + use * kTileBytes;
      use = use == kRing - 1 ? 0 : use + 1;
      return tile;
    };
#pragma unroll
    for (int number = 0; number < kRing - 1; ++number) load(number, number % 2 == 0);
    for (int tile = 0; tile < tiles; ++tile) {
      const uint32_t key_tile = next();
      load(2 * tile + kRing - 1, kRing % 2 == 1);
      rows.score(warp_queries, key_tile + transposed_place);

      const uint32_t value_tile = next();
      load(2 * tile + kRing, kRing % 2 == 0);
      walk.prefetch(tile + 2, tiles);
      if (walk.needs_mask(stage, tile)) {
        rows.mask(walk.begin + warp_row, lane, [&](int column) { return walk.position(tile, column); });
      }
      rows.soften(scale);
      rows.attend(value_tile + rows_place);
      walk.publish(tile + 2, tiles);
    }
    copy_wait<0>();
    __syncthreads();
  }

  rows.finish(scale, lane, [&](int r, const auto& packed, float lse) {
    const int row = warp_row + r;
    if (row >= walk.rows()) return;
    const int64_t place = (walk.first_row() + row) * a.heads + walk.head();
    uint32_t* out = reinterpret_cast<uint32_t*>(static_cast<T*>(a.out) + place * D);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) out[4 * n + lane % 4] = packed[n];
    if (a.lse && lane % 4 == 0) a.lse[place] = lse;
  });
}

template <typename T, int D, typename Walk>
int launch_prefill(const typename Walk::Arguments& a, dim3 grid, qwen1m_stream stream) {
  const auto kernel = prefill_kernel<T, D, Walk>;
  constexpr int kBytes = prefill_shared_bytes<D, Walk>();
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  kernel<<<grid, Walk::kWarps * kWarp, kBytes, as_stream(stream)>>>(a);
  return cudaGetLastError();
}

}  // namespace sm80
}  // namespace cuda
}  // namespace qwen1m
