// RMSNorm of the residual stream and what all ranks add to it. A block a row: it sends its rank's part into the
// mailboxes of the others, and has their parts from its own.
#include "mailbox.cuh"
#include "overlap.cuh"
#include "step/rms_norm.cuh"
#include "vectors.cuh"

namespace qwen1m {
namespace cuda {
namespace {

static_assert(kNormVector == kLineValues, "a thread's vector is a line");
static_assert(QWEN1M_MAILBOX_WIDTH == kNormThreads * kNormValues, "the widest row");

// The parts of all ranks, added up in their order; `turn` is that of the sum.
template <typename T, int kOthers>
struct AddParts {
  const Mailboxes& boxes;
  uint32_t& turn;

  __device__ void operator()(const T* delta, const NormColumns& own, float (&values)[kNormVectors][kNormVector]) const {
    const int row = static_cast<int>(blockIdx.x);
    Vector<T, kNormVector> mine[kNormVectors];
    turn = turn_after(*boxes.turn(row));
#pragma unroll
    for (int j = 0; j < kNormVectors; ++j) {
      if (own.has(j)) mine[j] = load_vector<kNormVector>(delta + own.column(j));
    }
    send(mine, own, row);

    Vector<T, kNormVector> parts[kOthers][kNormVectors];
    bool waiting = true;
    while (waiting) {
      waiting = false;
#pragma unroll
      for (int other = 0; other < kOthers; ++other) {
        if (other + 1 >= boxes.degree) continue;
        const Line* lines = boxes.lines(boxes.rank, rank_of(other), turn, row);
#pragma unroll
        for (int j = 0; j < kNormVectors; ++j) {
          if (!own.has(j)) continue;
          const Line seen = look_at_line(lines + own.column(j) / kLineValues);
          waiting |= !is_of(seen, turn);
          *reinterpret_cast<uint2*>(parts[other][j].values) = values_of(seen);
        }
      }
    }

#pragma unroll
    for (int j = 0; j < kNormVectors; ++j) {
      if (!own.has(j)) continue;
      float sums[kNormVector] = {};
#pragma unroll
      for (int other = 0; other < kOthers; ++other) {
        if (other == boxes.rank) add(mine[j], sums);
        if (other + 1 < boxes.degree) add(parts[other][j], sums);
      }
      if (boxes.rank + 1 == boxes.degree) add(mine[j], sums);
#pragma unroll
      for (int n = 0; n < kNormVector; ++n) values[j][n] += sums[n];
    }
  }

 private:
  // The ranks but this one, ascending.
  __device__ int rank_of(int other) const { return other + (other >= boxes.rank); }

  __device__ void send(const Vector<T, kNormVector> (&mine)[kNormVectors], const NormColumns& own, int row) const {
#pragma unroll
    for (int other = 0; other < kOthers; ++other) {
      if (other + 1 >= boxes.degree) continue;
      Line* lines = boxes.lines(rank_of(other), boxes.rank, turn, row);
#pragma unroll
      for (int j = 0; j < kNormVectors; ++j) {
        if (own.has(j)) {
          send_line(lines + own.column(j) / kLineValues, *reinterpret_cast<const uint2*>(mine[j].values), turn);
        }
      }
    }
  }

  __device__ static void add(const Vector<T, kNormVector>& part, float (&sums)[kNormVector]) {
#pragma unroll
    for (int n = 0; n < kNormVector; ++n) sums[n] += widen(part.values[n]);
  }
};

template <typename T, int kOthers>
__global__ void __launch_bounds__(kNormThreads)
    sum_rms_norm_kernel(const qwen1m_rms_norm a, const __grid_constant__ Mailboxes boxes) {
  uint32_t turn = 0;
  T* out = static_cast<T*>(a.out) + blockIdx.x * a.width;
  normalise_row<T>(a, AddParts<T, kOthers>{boxes, turn}, [&](int i, bool inside, const float (&values)[kNormVector]) {
    if (inside) store_narrowed(values, out + i);
  });
  // All threads have read the last one, or the row's sum of squares would not be there.
  if (threadIdx.x == 0) *boxes.turn(blockIdx.x) = turn;
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

using namespace qwen1m::cuda;

int qwen1m_cuda_sum_rms_norm(const qwen1m_sum_rms_norm* a, qwen1m_stream stream) {
  const qwen1m_rms_norm& norm = a->norm;
  if (norm.width % kPack != 0 || norm.width > QWEN1M_MAILBOX_WIDTH || norm.tokens > QWEN1M_MAILBOX_ROWS ||
      norm.dtype != norm.activation || norm.delta == nullptr || a->degree < 2 || a->degree > QWEN1M_MAILBOX_RANKS ||
      a->rank < 0 || a->rank >= a->degree || !aligned(norm.delta, norm.residual, norm.weight, norm.out)) {
    return cudaErrorInvalidValue;
  }
  if (norm.tokens == 0 || norm.width == 0) return cudaSuccess;
  Mailboxes boxes{};
  for (int rank = 0; rank < a->degree; ++rank) boxes.of[rank] = reinterpret_cast<char*>(a->boxes[rank]);
  boxes.rank = a->rank;
  boxes.degree = a->degree;
  return with_half_type(norm.activation, [&](auto type) -> int {
    using T = decltype(type);
    const auto launch = [&](auto kernel) {
      return launch_overlapping(kernel, static_cast<unsigned>(norm.tokens), norm_threads(norm.width), 0,
                                as_stream(stream), norm, boxes);
    };
    if (a->degree == 2) return launch(sum_rms_norm_kernel<T, 1>);
    if (a->degree <= 4) return launch(sum_rms_norm_kernel<T, 3>);
    return launch(sum_rms_norm_kernel<T, QWEN1M_MAILBOX_RANKS - 1>);
  });
}
