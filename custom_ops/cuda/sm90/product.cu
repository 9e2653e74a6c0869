// Products of many rows in 16 bits: 192 rows by 256 features a block, 64 values deep a step. Or the MLP's first product
// with SiLU: 128 features of the gate and the same ones of what goes up.
//
// Three warpgroups have 64 rows each. There is no producer beside them, which would leave a thread too few registers
// for its 128 sums: one thread of the first warpgroup has the copy engine fill a ring, each time with the step two
// ahead of its own, in the place of the one two behind, which the other warpgroups have mostly left.
//
// A warpgroup that stores leaves the tensor cores to the others, which are some steps behind.
#include "hopper.cuh"
#include "product.h"
#include "product_tiles.cuh"
#include "tensor_map.h"

namespace qwen1m {
namespace cuda {
namespace sm90 {
namespace {

constexpr int kWarpgroups = 3, kThreads = kWarpgroups * kWarpgroup;
constexpr int kGroupRows = 64, kTileRows = kWarpgroups * kGroupRows;
constexpr int kHalfFeatures = 128, kHalves = 2, kTileFeatures = kHalves * kHalfFeatures;
constexpr int kRing = 4, kAhead = kRing - 2;  // steps
constexpr int kStepBytes = (kTileRows + kTileFeatures) * kPanelRowBytes;
constexpr int kLanesARow = 4;  // of a warp

// What the copy engine is asked for next, by one thread: a step of a tile.
struct Request {
  RingPlace<kRing> place;
  int32_t tile, step;
  int32_t row, feature;  // the tile's first, and the first half's
};

struct alignas(1024) Shared {
  char rows[kRing][kTileRows * kPanelRowBytes];
  char features[kRing][kHalves][kHalfFeatures * kPanelRowBytes];
  uint64_t full[kRing], empty[kRing];
  Request request;  // here, where it takes no registers
};
static_assert(sizeof(Shared) <= kMostSharedBytes, "what a block may have");

struct ProductArguments {
  CUtensorMap rows_map, features_map;
  void* y;                     // [rows, width]
  int32_t rows, width, steps;  // width: the features, or those of the gate; steps: of kPanelValues
  Tiles tiles;
};

// Where the features of a tile's column begin, the gate's where it has some.
template <bool kGated>
__device__ int32_t first_feature(const Tiles::Place& at) {
  return at.column * (kGated ? kHalfFeatures : kTileFeatures);
}

template <bool kGated>
__device__ void begin_tile(const ProductArguments& a, Request& next, int32_t tile) {
  const Tiles::Place at = a.tiles.place(tile);
  next.tile = tile;
  next.step = 0;
  next.row = at.row * kTileRows;
  next.feature = first_feature<kGated>(at);
}

template <bool kGated>
__device__ void copy_step(const ProductArguments& a, Shared& shared) {
  Request& next = shared.request;
  if (next.tile >= a.tiles.count) return;
  const int place = next.place.index, from = next.step * kPanelRowBytes;
  const uint32_t full = shared_address(&shared.full[place]);
  barrier_wait(shared_address(&shared.empty[place]), next.place.parity ^ 1);
  barrier_arrive_expecting(full, kStepBytes);
  copy_matrix(shared_address(shared.rows[place]), a.rows_map, full, from, next.row);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    copy_matrix(shared_address(shared.features[place][half]), a.features_map, full, from,
                next.feature + half * (kGated ? a.width : kHalfFeatures));
  }
  next.place.advance();
  if (++next.step == a.steps) begin_tile<kGated>(a, next, next.tile + a.tiles.step());
}

template <typename T, bool kGated>
struct Multiplier {
  const ProductArguments& a;
  Shared& shared;
  const int number = static_cast<int>(threadIdx.x) / kWarpgroup, lane = threadIdx.x % kWarp;
  RingPlace<kRing> place;
  float sums[kTileFeatures / 2];

  __device__ void ask_for_next() {
    if (threadIdx.x == 0) copy_step<kGated>(a, shared);
    __syncwarp();
  }

  __device__ void release(int index) const {
    if (lane == 0) barrier_arrive(shared_address(&shared.empty[index]));
  }

  __device__ void multiply() {
    const uint32_t rows_begin = rows_descriptor(shared_address(shared.rows[0] + number * kGroupRows * kPanelRowBytes));
    const uint32_t features_begin = rows_descriptor(shared_address(shared.features[0][0]));
    int before = 0;
    settle(sums);
    for (int step = 0; step < a.steps; ++step) {
      barrier_wait(shared_address(&shared.full[place.index]), place.parity);
      const uint32_t rows = rows_begin + place.index * (kTileRows * kPanelRowBytes >> 4);
      const uint32_t features = features_begin + place.index * (kTileFeatures * kPanelRowBytes >> 4);
      products_begin();
#pragma unroll
      for (int chunk = 0; chunk < kPanelRowBytes / 16; chunk += 2) {
        multiply_shared<T>(sums, rows + chunk, features + chunk, step > 0 || chunk > 0);
      }
      products_commit();
      products_wait<1>();
      if (step > 0) release(before);
      before = place.index;
      ask_for_next();
      place.advance();
    }
    products_wait<0>();
    settle(sums);
    release(before);
  }

  // Two neighbouring features' values, of sums i and i + 1.
  __device__ uint32_t pair(int i) const {
    const uint32_t found = pack_pair<T>(sums[i], sums[i + 1]);
    if (!kGated) return found;
    // SiLU of the gate times what goes up, both rounded as a product in memory is. In pairs, since ptxas else reads
    // sums while they are still added to, and waits for each product.
    const uint32_t ups = pack_pair<T>(sums[64 + i], sums[64 + i + 1]);
    const T* const gate = reinterpret_cast<const T*>(&found);
    const T* const up = reinterpret_cast<const T*>(&ups);
    return pack_pair<T>(silu(widen(gate[0])) * widen(up[0]), silu(widen(gate[1])) * widen(up[1]));
  }

  __device__ void store(const Tiles::Place& at) const {
    const int line = number * kGroupRows + threadIdx.x / kWarp % 4 * 16 + lane / kLanesARow;
    const int feature = first_feature<kGated>(at) + lane % kLanesARow * 8;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int64_t row = at.row * kTileRows + line + below * 8;
      T* const y = static_cast<T*>(a.y) + row * a.width + feature;
#pragma unroll
      for (int n = 0; n < (kGated ? kHalfFeatures : kTileFeatures) / 8; n += 4) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = pair(4 * (n + i) + 2 * below);
        transpose_words(words);
        if (row < a.rows && feature + n * 8 < a.width) {
          *reinterpret_cast<uint4*>(y + n * 8) = make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
    }
  }

  __device__ void run() {
    for (int i = 0; i < kAhead; ++i) ask_for_next();
    for (int32_t tile = a.tiles.first(); tile < a.tiles.count; tile += a.tiles.step()) {
      multiply();
      store(a.tiles.place(tile));
    }
  }
};

template <typename T, bool kGated>
__global__ void __launch_bounds__(kThreads, 1) product_kernel(const __grid_constant__ ProductArguments a) {
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    shared.request.place = {};
    begin_tile<kGated>(a, shared.request, a.tiles.first());
    for (uint64_t& full : shared.full) barrier_init(shared_address(&full), 1);
    for (uint64_t& empty : shared.empty) barrier_init(shared_address(&empty), kThreads / kWarp);
    barrier_init_fence();
  }
  __syncthreads();
  Multiplier<T, kGated>{a, shared}.run();
}

Tiles tiles_of(int64_t rows, int64_t features) { return Tiles(rows, kTileRows, ceil_div(features, kTileFeatures)); }

template <typename T, bool kGated>
int launch(const qwen1m_linear& product, cudaStream_t stream) {
  ProductArguments a{};
  a.y = product.y;
  a.rows = static_cast<int32_t>(product.tokens);
  a.width = static_cast<int32_t>(kGated ? product.out_features / kHalves : product.out_features);
  a.steps = static_cast<int32_t>(ceil_div(product.in_features, kPanelValues));
  a.tiles = tiles_of(a.rows, product.out_features);
  const int64_t row_bytes = product.in_features * static_cast<int64_t>(sizeof(T));
  int code = make_byte_map(a.rows_map, product.x, row_bytes, a.rows, kTileRows);
  if (code == cudaSuccess) {
    code = make_byte_map(a.features_map, product.weight, row_bytes, product.out_features, kHalfFeatures);
  }
  if (code != cudaSuccess) return code;
  const auto kernel = product_kernel<T, kGated>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (status != cudaSuccess) return status;
  kernel<<<a.tiles.grid(processors()), kThreads, sizeof(Shared), stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

bool fills_rounds(int64_t rows, int64_t features) {
  constexpr int64_t kOf = 16, kFull = 15;
  const int64_t tiles = tiles_of(rows, features).count, blocks = processors();
  return kOf * tiles >= kFull * ceil_div(tiles, blocks) * blocks;
}

template <typename T>
int product(const qwen1m_linear& a, cudaStream_t stream) {
  return launch<T, false>(a, stream);
}

template <typename T>
int gated_product(const qwen1m_linear& a, cudaStream_t stream) {
  return launch<T, true>(a, stream);
}

template int product<bf16>(const qwen1m_linear&, cudaStream_t);
template int product<f16>(const qwen1m_linear&, cudaStream_t);
template int gated_product<bf16>(const qwen1m_linear&, cudaStream_t);
template int gated_product<f16>(const qwen1m_linear&, cudaStream_t);

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
