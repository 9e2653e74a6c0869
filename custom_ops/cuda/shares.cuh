// Few rows over many keys: the keys are shared out among blocks, and what each made of a row is merged afterwards.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace qwen1m {
namespace cuda {

constexpr int32_t kFewRows = 1024;     // up to here rows may share the keys out; more fill the device
constexpr int32_t kSharedRows = 8192;  // rows times shares at most: what the memory plan counts, paddle_qwen1m/plan.py

// What every share of the keys made of rows [first_row, + rows) of a step, in the workspace. A share's number for a row
// and a head is ((row - first_row) * heads + head) * count + share.
struct Shares {
  float* partial;     // [rows, H, count, D], not normalised; never read where the sum is 0
  float2* statistic;  // [rows, H, count]: maximum in units of log2, sum
  int32_t count, first_row;

  // `lines`: rows times heads.
  Shares(void* workspace, int64_t lines, int head_dim, int32_t shares, int32_t first)
      : partial(static_cast<float*>(workspace)),
        statistic(reinterpret_cast<float2*>(partial + lines * shares * head_dim)),
        count(shares),
        first_row(first) {}
};

// One share needs no workspace.
inline int64_t shares_bytes(int64_t lines, int head_dim, int32_t count) {
  return count == 1 ? 0 : lines * count * static_cast<int64_t>(head_dim * sizeof(float) + sizeof(float2));
}

// How many steps make a share, where `items` walk `steps` steps each and `at_once` of them run at a time: what ends
// soonest, if beginning and ending a share costs as much as kShareCost steps, in `most` shares at most. `steps` unless
// sharing saves a tenth.
inline int64_t steps_of_share(int64_t items, int64_t steps, int64_t at_once, int64_t most) {
  constexpr int64_t kShareCost = 4, kFewestSteps = 8;
  const auto time = [&](int64_t share) {
    return ceil_div(items * ceil_div(steps, share), at_once) * (share + kShareCost);
  };
  int64_t best = steps, bound = time(steps) * 9 / 10;
  for (int64_t count = 2; count <= most && steps >= count * kFewestSteps; ++count) {
    const int64_t share = ceil_div(steps, count);
    if (time(share) < bound) bound = time(best = share);
  }
  return best;
}

// Rows of the step whose shares are merged.
struct MergedRows {
  static constexpr int kMost = 64;
  int32_t first[kMost], rows[kMost];
  int32_t ranges, heads;
};

// out [T, H, D] and lse [T, H], which may be null, from what the shares made of those rows.
template <typename T, int D>
int merge_shares(const MergedRows& rows, const Shares& shares, void* out, float* lse, cudaStream_t stream);

}  // namespace cuda
}  // namespace qwen1m
