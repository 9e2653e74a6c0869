// RMSNorm of the residual stream and what all ranks add to it. A block a row: it sends its rank's part into the
// mailboxes of the others, unless the product that made it did, and has their parts from its own.
#include "mailbox.cuh"
#include "overlap.cuh"
#include "step/rms_norm.cuh"
#include "vectors.cuh"

namespace qwen1m {
namespace cuda {
namespace {

static_assert(kNormVector == kLineValues, "a thread's vector is a line");

constexpr int kSumThreads = QWEN1M_MAILBOX_WIDTH / kNormValues;  // of the widest row, so that all fits into registers

using Values = float[kNormVectors][kNormVector];

// The parts of all ranks, added up in their order, kAtOnce of the others being waited for together; `turn` is the
// sum's.
template <typename T, int kAtOnce>
struct AddParts {
  using Part = Vector<T, kNormVector>[kNormVectors];
  const Mailboxes& boxes;
  bool sent;
  uint32_t& turn;

  __device__ void operator()(const T* delta, const NormColumns& own, Values& values) const {
    const int row = static_cast<int>(blockIdx.x), others = boxes.degree - 1;
    Part mine;
    turn = turn_after(*boxes.turn(row));
#pragma unroll
    for (int j = 0; j < kNormVectors; ++j) {
      if (own.has(j)) mine[j] = load_vector<kNormVector>(delta + own.column(j));
    }
    for (int other = 0; !sent && other < others; ++other) {
      send(mine, own, boxes.lines(boxes.other(other), boxes.rank, turn, row));
    }

    Values sums = {};
#pragma unroll 1
    for (int first = 0; first < others; first += kAtOnce) {
      Part parts[kAtOnce];
      while (!all_there(first, own, row, parts)) {
      }
#pragma unroll
      for (int k = 0; k < kAtOnce && first + k < others; ++k) {
        if (first + k == boxes.rank) add(mine, own, sums);
        add(parts[k], own, sums);
      }
    }
    if (boxes.rank == others) add(mine, own, sums);
#pragma unroll
    for (int j = 0; j < kNormVectors; ++j) {
#pragma unroll
      for (int n = 0; n < kNormVector; ++n) values[j][n] += sums[j][n];
    }
  }

 private:
  __device__ void send(const Part& mine, const NormColumns& own, Line* lines) const {
#pragma unroll
    for (int j = 0; j < kNormVectors; ++j) {
      if (!own.has(j)) continue;
      send_line(lines + own.column(j) / kLineValues, *reinterpret_cast<const uint2*>(mine[j].values), turn);
    }
  }

  // Whether what this thread has of kAtOnce others from `first` on has come, which then is in `parts`.
  __device__ bool all_there(int first, const NormColumns& own, int row, Part (&parts)[kAtOnce]) const {
    bool there = true;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + k + 1 >= boxes.degree) continue;
      const Line* lines = boxes.lines(boxes.rank, boxes.other(first + k), turn, row);
#pragma unroll
      for (int j = 0; j < kNormVectors; ++j) {
        if (!own.has(j)) continue;
        const Line seen = look_at_line(lines + own.column(j) / kLineValues);
        there &= is_of(seen, turn);
        *reinterpret_cast<uint2*>(parts[k][j].values) = values_of(seen);
      }
    }
    return there;
  }

  __device__ static void add(const Part& part, const NormColumns& own, Values& sums) {
#pragma unroll
    for (int j = 0; j < kNormVectors; ++j) {
#pragma unroll
      for (int n = 0; n < kNormVector && own.has(j); ++n) sums[j][n] += widen(part[j].values[n]);
    }
  }
};

template <typename T, int kAtOnce>
__global__ void __launch_bounds__(kSumThreads)
    sum_rms_norm_kernel(const qwen1m_rms_norm a, const __grid_constant__ Mailboxes boxes, bool sent) {
  uint32_t turn = 0;
  write_normalised_row<T>(a, AddParts<T, kAtOnce>{boxes, sent, turn});
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
      norm.dtype != norm.activation || norm.delta == nullptr || !takes_mailboxes(a->rank, a->degree) ||
      !aligned(norm.delta, norm.residual, norm.weight, norm.out)) {
    return cudaErrorInvalidValue;
  }
  if (norm.tokens == 0 || norm.width == 0) return cudaSuccess;
  const Mailboxes boxes = mailboxes_of(a->boxes, a->rank, a->degree);
  return with_half_type(norm.activation, [&](auto type) -> int {
    using T = decltype(type);
    const auto launch = [&](auto kernel) {
      return launch_overlapping(kernel, static_cast<unsigned>(norm.tokens), norm_threads(norm.width), 0,
                                as_stream(stream), norm, boxes, a->sent != 0);
    };
    if (a->degree == 2) return launch(sum_rms_norm_kernel<T, 1>);
    return launch(sum_rms_norm_kernel<T, 3>);
  });
}
