// Up to eight rows times a weight of 8 bits: its bytes stream once through shared memory, where the copy engine puts
// them, into operands of the tensor cores.
//
//   tile     up to 16 features, the launch's `height`, whose warps take turns at steps of 128 values along K; of fewer
//            the rest of 16 is computed from whatever lies there, and is nobody's
//   box      a warp's step of a tile, lines of 128 bytes; each warp has a ring of its own, and waits for no other
//   x        f16 in shared memory, each step of a row times a power of two that keeps all digits there: for a pair of
//            numbers becomes f16 in one instruction, or two, where bf16 takes five. All of x, so that its rows are few
//            where they are long
//   blocks   one a processor, whose loads go on from one tile of features to the next; what is under way is not in the
//            first level cache, which a launch before may have left no room
//
// Lane 4g + p has of a step bytes 32p to 32p + 31 of the weight's rows g and g + 8, as they lie in memory, and the same
// values of x's row g, which is a column of the product: an mma may add its products over k in any order. Lanes of rows
// that are not there have zeros.
#include <algorithm>

#include "hopper.cuh"
#include "linear8_rows.h"
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
constexpr int kMostRows = 8;

// For up to ROWS rows of x, one or kMostRows.
template <int ROWS>
struct SharedPlan {
  static constexpr int kPad = ROWS == 1 ? 0 : 64;  // two rows side by side in all banks

  char boxes[kWarps][kStages][kBoxBytes];
  float scales[kWarps][kStages][kFeatures];
  float sums[2][kWarps][kFeatures][ROWS];  // of two tiles in turn
  uint64_t full[kWarps][kStages];
  // Then x, f16 [tokens, K], and what it is to be multiplied by, float [K / kStep, ROWS]. Bytes of a row of x:
  static __host__ __device__ int row_bytes(int64_t depth) { return static_cast<int>(depth * sizeof(f16)) + kPad; }

  static int64_t bytes(int64_t depth, int64_t tokens) {
    return sizeof(SharedPlan) + depth / kStep * ROWS * sizeof(float) + tokens * row_bytes(depth);
  }
};
static_assert(sizeof(SharedPlan<1>) % 16 == 0 && sizeof(SharedPlan<kMostRows>) % 16 == 0,
              "x is read so many at a time");

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
template <int ROWS, typename T>
__device__ void stage_x(const T* x, int tokens, int depth, char* to, float* powers) {
  constexpr int kAtOnce = 3;
  const int of_row = depth / kRun, runs = tokens * of_row;
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
      const int number = first + n * kThreads, row = ROWS == 1 ? 0 : number / of_row, run = number - row * of_row;
      const int part = run % 8 / 2, place = run % 2 * 2;
      if (number >= runs) break;
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
        store_narrowed(values[half], reinterpret_cast<f16*>(to + row * SharedPlan<ROWS>::row_bytes(depth) +
                                                            run / 8 * kStepBytes + (place + half) * 64 + part * 16));
      }
      if (run % 8 == 0) powers[run / 8 * ROWS + row] = __uint_as_float(static_cast<uint32_t>(exponent - 14) << 23);
    }
  }
}

template <int ROWS, typename Kind, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    linear8_rows_kernel(const qwen1m_linear8 a, const __grid_constant__ CUtensorMap map, int height) {
  extern __shared__ __align__(1024) char shared[];
  using Plan = SharedPlan<ROWS>;
  constexpr int kColumns = std::min(ROWS, 2);  // of a lane's sums: 2 * part and the next
  Plan& plan = *reinterpret_cast<Plan*>(shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, group = lane / 4, part = lane % 4;
  const int depth = static_cast<int>(a.in_features), features = static_cast<int>(a.out_features);
  const int steps = depth / kStep, tiles = (features + height - 1) / height;
  const int own_steps = (steps - warp + kWarps - 1) / kWarps;
  const int rows_shift = 31 - __clz(a.weight.rows);
  const int tokens = ROWS == 1 ? 1 : static_cast<int>(a.tokens);
  char* const x = shared + sizeof(Plan);
  float* const powers = reinterpret_cast<float*>(x + tokens * Plan::row_bytes(depth));

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
  stage_x<ROWS>(static_cast<const T*>(a.x), tokens, depth, x, powers);
  __syncthreads();

  // Chunks of a line are permuted: see hopper.cuh.
  const uint32_t own_x = shared_address(x) + group * Plan::row_bytes(depth) + part * 16;
  const uint32_t own_line = group * kStep + ((2 * part ^ group) << 4);
  uint4 column[4] = {};
  int stage = 0, turn = 0;
  uint32_t parity = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float sums[2][kColumns] = {};
    for (int i = 0; i < own_steps; ++i) {
      const int step = warp + i * kWarps;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        load_shared_where(group < tokens, column[n], own_x + step * kStepBytes + n * 64);
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
      for (int c = 0; c < kColumns; ++c) {
        const float power = powers[step * ROWS + (ROWS == 1 ? 0 : 2 * part + c)];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float scale = plan.scales[warp][stage][8 * r + group] * power;
          sums[r][c] += (products[0][2 * r + c] + products[1][2 * r + c]) * scale;
        }
      }
      __syncwarp();
      load(stage);
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
    if (part < ROWS) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) plan.sums[turn][warp][8 * r + group][(2 * part + c) % ROWS] = sums[r][c];
      }
    }
    __syncthreads();
    const int own = threadIdx.x % kFeatures, row = threadIdx.x / kFeatures, feature = tile * height + own;
    if (own < height && row < tokens && feature < features) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += plan.sums[turn][w][own][row];
      static_cast<T*>(a.y)[static_cast<int64_t>(row) * features + feature] = narrow<T>(sum);
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

template <int ROWS, typename T>
int launch(const qwen1m_linear8& a, cudaStream_t stream) {
  const int height = choose_height(a);
  CUtensorMap map;
  if (const int error = make_byte_map(map, a.weight.numbers, a.in_features, a.out_features, height)) return error;
  const auto bytes = static_cast<int>(SharedPlan<ROWS>::bytes(a.in_features, a.tokens));
  const int64_t tiles = ceil_div(a.out_features, height);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, processors()));
  const auto kernel =
      a.weight.kind == QWEN1M_INT8 ? linear8_rows_kernel<ROWS, Int8, T> : linear8_rows_kernel<ROWS, E4M3, T>;
  if (const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
  return launch_overlapping(kernel, blocks, kThreads, bytes, stream, a, map, height);
}

}  // namespace

bool takes_linear8_rows(const qwen1m_linear8& a) {
  return a.tokens >= 1 && a.tokens <= kMostRows && a.weight.columns == kStep &&
         (a.tokens == 1 || SharedPlan<kMostRows>::bytes(a.in_features, a.tokens) <= kMostSharedBytes);
}

template <typename T>
int linear8_rows(const qwen1m_linear8& a, cudaStream_t stream) {
  return a.tokens == 1 ? launch<1, T>(a, stream) : launch<kMostRows, T>(a, stream);
}

template int linear8_rows<bf16>(const qwen1m_linear8&, cudaStream_t);
template int linear8_rows<f16>(const qwen1m_linear8&, cudaStream_t);

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
