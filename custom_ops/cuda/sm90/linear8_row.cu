// One row times a weight of 8 bits: its bytes stream once through shared memory, where the copy engine puts them, into
// operands of the tensor cores.
//
//   tile     up to 16 features, the launch's `height`, whose warps take turns at steps of 128 values along K; of fewer
//            the rest of 16 is computed from whatever lies there, and is nobody's
//   box      a warp's step of a tile, lines of 128 bytes; each warp has a ring of its own, and waits for no other
//   x        f16 in shared memory, each step of it times a power of two that keeps all digits there: for a pair of
//            numbers becomes f16 in one instruction, or two, where bf16 takes five
//   blocks   one a processor, whose loads go on from one tile of features to the next; what is under way is not in the
//            first level cache, which a launch before may have left no room
//
// Lane 4g + p has of a step bytes 32p to 32p + 31 of rows g and g + 8, as they lie in memory, and the same values of x:
// an mma may add its products over k in any order. x is a column of eight; lanes of the others have zeros.
#include <algorithm>

#include "hopper.cuh"
#include "linear8_row.h"
#include "mma.cuh"
#include "overlap.cuh"
#include "tensor_map.h"
#include "vectors.cuh"
#include "weight8.cuh"

namespace qwen1m {
namespace cuda {
namespace sm90 {

namespace {

constexpr int kWarps = 16, kThreads = kWarps * kWarp, kStages = 3;
constexpr int kFeatures = 16, kFewest = 8, kStep = 128;  // of a tile; of a step
constexpr int kBoxBytes = kFeatures * kStep;             // of the highest tile
constexpr int kLongSteps = 4;                            // of a warp
constexpr int kRun = 2 * kPack;                          // of x, of a thread
constexpr int kStepBytes = kStep * sizeof(f16);          // of x

struct SharedPlan {
  char boxes[kWarps][kStages][kBoxBytes];
  float scales[kWarps][kStages][kFeatures];
  float sums[2][kWarps][kFeatures];  // of two tiles in turn
  uint64_t full[kWarps][kStages];
};  // then x, f16 [K], and what it is to be multiplied by, float [K / kStep]
static_assert(sizeof(SharedPlan) % 16 == 0, "x is read 16 bytes at a time");

int shared_bytes(int64_t depth) {
  return static_cast<int>(sizeof(SharedPlan) + depth * sizeof(f16) + depth / kStep * sizeof(float));
}

// As load_shared where `valid`; else v stays as it is.
__device__ inline void load_shared_where(bool valid, uint4& v, uint32_t at) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %5, 0;\n"
      "@p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "r"(at), "r"(static_cast<int>(valid)));
}

__device__ inline void copy_word(void* shared, const float* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// x to shared memory: of a step the first 16 bytes of every lane's values, then their second ones, ...
template <typename T>
__device__ void stage_x(const T* x, int depth, char* to, float* powers) {
  constexpr int kAtOnce = 3;
  const int runs = depth / kRun;
  for (int first = threadIdx.x; first < runs; first += kAtOnce * kThreads) {
    Pack<T> packs[kAtOnce][2];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int run = first + n * kThreads;
      if (run >= runs) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) packs[n][half] = reinterpret_cast<const Pack<T>*>(x)[run * 2 + half];
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int run = first + n * kThreads, part = run % 8 / 2, place = run % 2 * 2;
      if (run >= runs) break;
      float values[2][kPack], largest = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          values[half][i] = widen(packs[n][half].values[i]);
          largest = fmaxf(largest, fabsf(values[half][i]));
        }
      }
      const unsigned of_step = 0xffu << (threadIdx.x % kWarp & ~7);
#pragma unroll
      for (int other = 1; other < 8; other *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(of_step, largest, other));
      }
      // The largest comes to lie in [2^14, 2^15).
      const int exponent = max(static_cast<int>(__float_as_uint(largest) >> 23), 15);
      const float power = __uint_as_float(static_cast<uint32_t>(2 * 127 + 14 - exponent) << 23);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        for (float& value : values[half]) value *= power;
        store_narrowed(values[half],
                       reinterpret_cast<f16*>(to + run / 8 * kStepBytes + (place + half) * 64 + part * 16));
      }
      if (run % 8 == 0) powers[run / 8] = __uint_as_float(static_cast<uint32_t>(exponent - 14) << 23);
    }
  }
}

template <typename Kind, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    linear8_row_kernel(const qwen1m_linear8 a, const __grid_constant__ CUtensorMap map, int height) {
  extern __shared__ __align__(1024) char shared[];
  SharedPlan& plan = *reinterpret_cast<SharedPlan*>(shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, group = lane / 4, part = lane % 4;
  const int depth = static_cast<int>(a.in_features), features = static_cast<int>(a.out_features);
  const int steps = depth / kStep, tiles = (features + height - 1) / height;
  const int own_steps = (steps - warp + kWarps - 1) / kWarps;
  const int rows_shift = 31 - __clz(a.weight.rows);
  char* const x = shared + sizeof(SharedPlan);
  float* const powers = reinterpret_cast<float*>(x + depth * sizeof(f16));

  const uint32_t boxes = shared_address(plan.boxes[warp]), full = shared_address(plan.full[warp]);
  if (lane == 0) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) barrier_init(full + 8 * s, 1);
    barrier_init_fence();
  }
  __syncwarp();

  // The warp's next step to be loaded.
  int next_tile = own_steps > 0 ? static_cast<int>(blockIdx.x) : tiles, next_step = warp;
  const auto load = [&](int stage) {
    if (next_tile < tiles) {
      if (lane == 0) {
        barrier_arrive_expecting(full + 8 * stage, height * kStep);
        copy_matrix(boxes + stage * kBoxBytes, map, full + 8 * stage, next_step * kStep, next_tile * height);
      }
      if (lane < height) {
        const int block = min(next_tile * height + lane, features - 1) >> rows_shift;
        copy_word(&plan.scales[warp][stage][lane], a.weight.scales + (block * steps + next_step));
      }
      next_step += kWarps;
      if (next_step >= steps) {
        next_step = warp;
        next_tile += gridDim.x;
      }
    }
    copy_commit();
  };
#pragma unroll
  for (int s = 0; s < kStages; ++s) load(s);
  await_previous();
  admit_next();
  stage_x(static_cast<const T*>(a.x), depth, x, powers);
  __syncthreads();

  // Chunks of a line are permuted: see hopper.cuh.
  const uint32_t own_line = group * kStep + ((2 * part ^ group) << 4);
  uint4 column[4] = {};
  int stage = 0, turn = 0;
  uint32_t parity = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float sums[2] = {0, 0};
    for (int i = 0; i < own_steps; ++i) {
      const int step = warp + i * kWarps;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        load_shared_where(group == 0, column[n], shared_address(x) + step * kStepBytes + n * 64 + part * 16);
      }
      copy_wait<kStages - 1>();
      __syncwarp();
      barrier_wait(full + 8 * stage, parity);
      const uint32_t lines = boxes + stage * kBoxBytes + own_line;
      float products[2][4] = {};  // two sums, so that products wait less for each other
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 w0 = load_shared(lines ^ half << 4), w1 = load_shared((lines ^ half << 4) + 8 * kStep);
        const uint32_t words[2][4] = {{w0.x, w0.y, w0.z, w0.w}, {w1.x, w1.y, w1.z, w1.w}};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          uint32_t upper[2], lower[2];
          widen_bytes<Kind, f16>(words[0][n], upper);
          widen_bytes<Kind, f16>(words[1][n], lower);
          const uint32_t left[4] = {upper[0], lower[0], upper[1], lower[1]};
          const uint4 right = column[2 * half + n / 2];
          multiply_add<f16>(products[n % 2], left, n % 2 ? right.z : right.x, n % 2 ? right.w : right.y);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float scale = plan.scales[warp][stage][8 * r + group] * powers[step];
        sums[r] += (products[0][2 * r] + products[1][2 * r]) * scale;
      }
      __syncwarp();
      load(stage);
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
    if (part == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) plan.sums[turn][warp][8 * r + group] = sums[r];
    }
    __syncthreads();
    const int feature = tile * height + threadIdx.x;
    if (threadIdx.x < height && feature < features) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += plan.sums[turn][w][threadIdx.x];
      static_cast<T*>(a.y)[feature] = narrow<T>(sum);
    }
    turn ^= 1;
  }
}

// Of all heights the largest with which no block has more features than it must. Where a warp has but a few steps of a
// tile, more tiles cost more than blocks that end together save.
int choose_height(const qwen1m_linear8& a) {
  if (a.in_features <= kLongSteps * kWarps * kStep) return kFeatures;
  const int64_t blocks = processors();
  const auto of_block = [&](int height) { return ceil_div(ceil_div(a.out_features, height), blocks) * height; };
  int best = kFeatures;
  for (int height = kFeatures - 1; height >= kFewest; --height) {
    if (of_block(height) < of_block(best)) best = height;
  }
  return best;
}

}  // namespace

template <typename T>
int linear8_row(const qwen1m_linear8& a, cudaStream_t stream) {
  const int height = choose_height(a);
  CUtensorMap map;
  if (const int error = make_byte_map(map, a.weight.numbers, a.in_features, a.out_features, height)) return error;
  const int bytes = shared_bytes(a.in_features);
  const int64_t tiles = ceil_div(a.out_features, height);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, processors()));
  const auto kernel = a.weight.kind == QWEN1M_INT8 ? linear8_row_kernel<Int8, T> : linear8_row_kernel<E4M3, T>;
  if (const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
  return launch_overlapping(kernel, blocks, kThreads, bytes, stream, a, map, height);
}

template int linear8_row<bf16>(const qwen1m_linear8&, cudaStream_t);
template int linear8_row<f16>(const qwen1m_linear8&, cudaStream_t);

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
