// Products of FP8 rows with FP8 weights: 128 rows by 256 features a block, 128 values deep a step, whose sums are
// scaled and added up in float32. Or the MLP's first product with what follows it: 128 features of the gate and as many
// of what goes up, of which SiLU makes 128 values of a row, rounded to FP8.
//
//   producer   one thread has the copy engine fill a ring: rows, two halves of features, and the rows' scales. Of two
//              neighbouring blocks of a gated product, which have the same features, each brings half of them to both
//   consumers  two warpgroups of 64 rows. A step's sums of a half of the features are products of their own, scaled and
//              added while the other warpgroup has the tensor cores
//
// Blocks stay, and take tiles until none is left.
#include "clusters.cuh"
#include "hopper.cuh"
#include "mma.cuh"
#include "product8.h"
#include "product_tiles.cuh"
#include "rows8.cuh"
#include "tensor_map.h"

namespace qwen1m {
namespace cuda {
namespace sm90 {
namespace {

constexpr int kDepth = QWEN1M_ROWS8_BLOCK;  // values of a step: bytes of a panel's row
constexpr int kConsumers = 2, kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerRows = 64, kTileRows = kConsumers * kConsumerRows;
constexpr int kHalfFeatures = 128, kHalves = 2;
constexpr int kRing = 4;
constexpr int kLanesARow = 4;  // of a consumer's warp
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
template <bool kGated>
constexpr int kBlocks = kGated ? kHalves : 1;  // of a cluster
constexpr uint16_t kAllBlocks = (1 << kHalves) - 1;
static_assert(kDepth == kPanelRowBytes && kHalfFeatures == QWEN1M_ROWS8_BLOCK, "");

struct alignas(1024) Shared {
  char rows[kRing][kTileRows * kDepth];
  char features[kRing][kHalves][kHalfFeatures * kDepth];
  float scales[kRing][kTileRows];
  uint64_t full[kRing], empty[kRing];
};

struct Product8Arguments {
  CUtensorMap rows_map, features_map;
  const float *row_scales, *weight_scales;
  void* y;                        // [rows, features]
  qwen1m_rows8 out;               // in its place, gated: [rows, features / 2]
  int32_t rows, features, steps;  // steps: of kDepth
  Tiles tiles;
};

// The first row of a tile, and the first features of its halves; behind all features where there are no more.
struct Tile {
  int row, feature[kHalves];
};

// f(tile) for the tiles of this block.
template <bool kGated, typename F>
__device__ void each_tile(const Product8Arguments& a, F&& f) {
  for (int32_t number = a.tiles.first(); number < a.tiles.count; number += a.tiles.step()) {
    const Tiles::Place at = a.tiles.place(number);
    const int feature = at.column * (kGated ? 1 : kHalves) * kHalfFeatures;
    f(Tile{at.row * kTileRows, {feature, feature + (kGated ? a.features / 2 : kHalfFeatures)}});
  }
}

template <bool kGated>
__device__ void produce(const Product8Arguments& a, Shared& shared) {
  RingPlace<kRing> place;
  each_tile<kGated>(a, [&](const Tile& tile) {
    // None where the last block of a cluster has no rows.
    const int scale_bytes = max(min(kTileRows, a.rows - tile.row), 0) * static_cast<int>(sizeof(float));
    for (int step = 0; step < a.steps; ++step) {
      const uint32_t full = shared_address(&shared.full[place.index]);
      barrier_wait(shared_address(&shared.empty[place.index]), place.parity ^ 1);
      barrier_arrive_expecting(full, (kTileRows + kHalves * kHalfFeatures) * kDepth + scale_bytes);
      copy_matrix(shared_address(shared.rows[place.index]), a.rows_map, full, step * kDepth, tile.row);
      if constexpr (kGated) {
        const int own = blockIdx.x % kBlocks<kGated>;
        copy_matrix_to(kAllBlocks, shared_address(shared.features[place.index][own]), a.features_map, full,
                       step * kDepth, own == 0 ? tile.feature[0] : tile.feature[1]);
      } else {
        for (int half = 0; half < kHalves; ++half) {
          copy_matrix(shared_address(shared.features[place.index][half]), a.features_map, full, step * kDepth,
                      tile.feature[half]);
        }
      }
      if (scale_bytes > 0) {
        copy_bytes(shared_address(shared.scales[place.index]),
                   a.row_scales + static_cast<int64_t>(step) * a.rows + tile.row, scale_bytes, full);
      }
      place.advance();
    }
  });
}

template <typename T, bool kGated>
struct Consumer {
  const Product8Arguments& a;
  Shared& shared;
  const int number = static_cast<int>(threadIdx.x) / kWarpgroup - 1, lane = threadIdx.x % kWarp;
  const int line = number * kConsumerRows + threadIdx.x / kWarp % 4 * 16 + lane / kLanesARow;  // and the one 8 below
  RingPlace<kRing> place;
  float sums[kHalves][64], part[64];

  // All threads say so, since all read scales; to the other block, which brings features alone, one of a warp.
  __device__ void release(int index) const {
    const uint32_t empty = shared_address(&shared.empty[index]);
    barrier_arrive(empty);
    if (kGated && lane == 0) barrier_arrive_in_block(empty, blockIdx.x % kBlocks<kGated> ^ 1);
  }

  __device__ void multiply(const Tile& tile) {
    const uint32_t rows_begin = rows_descriptor(shared_address(shared.rows[0] + number * kConsumerRows * kDepth));
    const uint32_t features_begin = rows_descriptor(shared_address(shared.features[0][0]));
    const float* weight_scales[kHalves];  // read a step ahead
    float weight_scale[kHalves];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int block = min(tile.feature[half], a.features - kHalfFeatures) / kHalfFeatures;
      weight_scales[half] = a.weight_scales + static_cast<int64_t>(block) * a.steps;
      weight_scale[half] = __ldg(weight_scales[half]);
#pragma unroll
      for (float& sum : sums[half]) sum = 0;
    }
    for (int step = 0; step < a.steps; ++step) {
      const int following = min(step + 1, a.steps - 1);
      const float next[kHalves] = {__ldg(weight_scales[0] + following), __ldg(weight_scales[1] + following)};
      barrier_wait(shared_address(&shared.full[place.index]), place.parity);
      const float row_scale[2] = {shared.scales[place.index][line], shared.scales[place.index][line + 8]};
      const uint32_t rows = rows_begin + place.index * (kTileRows * kDepth >> 4);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const uint32_t features = features_begin + (place.index * kHalves + half) * (kHalfFeatures * kDepth >> 4);
        settle(part);
        products_begin();
#pragma unroll
        for (int chunk = 0; chunk < kDepth / 16; chunk += 2) {
          multiply_bytes(part, rows + chunk, features + chunk, chunk > 0);
        }
        products_commit();
        const float scale[2] = {row_scale[0] * weight_scale[half], row_scale[1] * weight_scale[half]};
        products_wait<0>();
        settle(part);
        if (half == kHalves - 1) release(place.index);
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[half][i] += part[i] * scale[i / 2 % 2];
        weight_scale[half] = next[half];
      }
      place.advance();
    }
  }

  __device__ void store(const Tile& tile) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      if (tile.feature[half] >= a.features) continue;
      T* const y = static_cast<T*>(a.y) + tile.feature[half] + lane % 4 * 8;
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int64_t row = tile.row + line + below * 8;
#pragma unroll
        for (int n = 0; n < 16; n += 4) {
          uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* pair = sums[half] + 4 * (n + i) + 2 * below;
            words[i] = pack_pair<T>(pair[0], pair[1]);
          }
          transpose_words(words);
          if (row < a.rows) {
            *reinterpret_cast<uint4*>(y + row * a.features + n * 8) =
                make_uint4(words[0], words[1], words[2], words[3]);
          }
        }
      }
    }
  }

  // The gate's sums become SiLU of them times what goes up; the 128 of a row, in four lanes, are a block of FP8.
  __device__ void store_gated(const Tile& tile) {
    const int width = a.features / 2;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int64_t row = tile.row + line + below * 8;
      float most = 0;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& gate = sums[0][4 * n + 2 * below + c];
          gate = silu(gate) * sums[1][4 * n + 2 * below + c];
          most = fmaxf(most, fabsf(gate));
        }
      }
      const float scale = block_scale<4>(most), inverse = 1.0f / scale;
      if (row >= a.rows) continue;
      if (lane % 4 == 0) a.out.scales[static_cast<int64_t>(tile.feature[0] / kHalfFeatures) * a.rows + row] = scale;
      uint8_t* const numbers = a.out.numbers + row * width + tile.feature[0];
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const float* pair = sums[0] + 4 * n + 2 * below;
        *reinterpret_cast<uint16_t*>(numbers + n * 8 + lane % 4 * 2) = to_e4m3(pair[0] * inverse, pair[1] * inverse);
      }
    }
  }

  __device__ void run() {
    each_tile<kGated>(a, [&](const Tile& tile) {
      multiply(tile);
      kGated ? store_gated(tile) : store(tile);
    });
  }
};

template <typename T, bool kGated>
__global__ void __launch_bounds__(kThreads, 1) product8_kernel(const __grid_constant__ Product8Arguments a) {
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kArrivals = kConsumers * kWarpgroup + (kBlocks<kGated> - 1) * kConsumers * kWarpgroup / kWarp;
    for (uint64_t& barrier : shared.full) barrier_init(shared_address(&barrier), 1);
    for (uint64_t& barrier : shared.empty) barrier_init(shared_address(&barrier), kArrivals);
    barrier_init_fence();
  }
  const auto meet = [] {  // no block begins before the other has barriers, or ends while that may still write to it
    if constexpr (kGated) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  };
  meet();
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<kGated>(a, shared);
    __syncwarp();
  } else {
    take_registers<kConsumerRegisters>();
    Consumer<T, kGated>{a, shared}.run();
  }
  if (kGated) meet();
}

template <typename T, bool kGated>
int launch(const qwen1m_product8& product, const qwen1m_rows8& out, cudaStream_t stream) {
  Product8Arguments a{};
  a.row_scales = product.x.scales;
  a.weight_scales = product.weight.scales;
  a.y = product.y;
  a.out = out;
  a.rows = static_cast<int32_t>(product.x.rows);
  a.features = static_cast<int32_t>(product.out_features);
  a.steps = static_cast<int32_t>(product.in_features / kDepth);
  a.tiles = Tiles(a.rows, kTileRows, ceil_div(a.features, kHalves * kHalfFeatures), kBlocks<kGated>);
  int code = make_byte_map(a.rows_map, product.x.numbers, product.in_features, a.rows, kTileRows);
  if (code == cudaSuccess) {
    code = make_byte_map(a.features_map, product.weight.numbers, product.in_features, a.features, kHalfFeatures);
  }
  if (code != cudaSuccess) return code;
  const auto kernel = product8_kernel<T, kGated>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute cluster = clusters_of(kBlocks<kGated>);
  cudaLaunchConfig_t launch{};
  launch.gridDim = a.tiles.grid(processors());
  launch.blockDim = kThreads;
  launch.dynamicSmemBytes = sizeof(Shared);
  launch.stream = stream;
  launch.attrs = &cluster;
  launch.numAttrs = 1;
  return cudaLaunchKernelEx(&launch, kernel, a);
}

}  // namespace

template <typename T>
int product8(const qwen1m_product8& a, cudaStream_t stream) {
  return launch<T, false>(a, {}, stream);
}

int gated_product8(const qwen1m_product8& a, const qwen1m_rows8& out, cudaStream_t stream) {
  return launch<bf16, true>(a, out, stream);
}

template int product8<bf16>(const qwen1m_product8&, cudaStream_t);
template int product8<f16>(const qwen1m_product8&, cudaStream_t);

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
