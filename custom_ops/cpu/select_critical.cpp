// Exact top-k of column and diagonal sums, a head at a time.
#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "qwen1m/keys.h"

namespace {

// Sums are at least 0, so their bits order as they do. Larger sums give smaller ranks, ties the lower index.
uint64_t rank(float sum, bool forced, uint32_t index) {
  sum += 0.0f;  // -0 becomes 0
  uint32_t bits;
  std::memcpy(&bits, &sum, sizeof(bits));
  return (static_cast<uint64_t>(forced ? 0 : UINT32_MAX - bits) << 32) | index;
}

// The k best of `count` sums, [forced_begin, forced_end) before all others, as ascending indices.
void select(const float* sums, int32_t count, int32_t forced_begin, int32_t forced_end, int32_t k, int32_t width,
            std::vector<uint64_t>* ranks, int32_t* out) {
  if (k < count) {
    ranks->resize(count);
    for (int32_t i = 0; i < count; ++i) (*ranks)[i] = rank(sums[i], i >= forced_begin && i < forced_end, i);
    if (k > 0) std::nth_element(ranks->begin(), ranks->begin() + (k - 1), ranks->end());
    for (int32_t i = 0; i < k; ++i) out[i] = static_cast<int32_t>((*ranks)[i] & UINT32_MAX);
    std::sort(out, out + k);
  } else {
    for (int32_t i = 0; i < k; ++i) out[i] = i;
  }
  std::fill(out + k, out + width, INT_MAX);
}

}  // namespace

void qwen1m_cpu_select_critical(const qwen1m_select_critical* a) {
  const int threads = std::min(qwen1m::num_threads(), a->heads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint64_t> ranks;
#pragma omp for schedule(dynamic, 1)
    for (int head = 0; head < a->heads; ++head) {
      const int64_t row = static_cast<int64_t>(head) * a->keys;
      select(a->vertical + row, a->keys, 0, a->forced_columns, std::min(a->vertical_sizes[head], a->keys),
             a->column_width, &ranks, a->columns + static_cast<int64_t>(head) * a->column_width);
      select(a->slash + row, a->keys, a->keys - a->forced_diagonals, a->keys, std::min(a->slash_sizes[head], a->keys),
             a->slash_width, &ranks, a->slashes + static_cast<int64_t>(head) * a->slash_width);
      qwen1m::advance();
    }
  }
}
