// The ranks' shares of logits, side by side.
#include <string.h>

#include <algorithm>

#include "qwen1m/step.h"

void qwen1m_cpu_join_columns(const qwen1m_join_columns* a) {
  for (int64_t r = 0; r < a->rows; ++r) {
    const float* from = a->parts + r * a->share;
    for (int64_t begin = 0; begin < a->columns; begin += a->share, from += a->rows * a->share) {
      memcpy(a->out + r * a->columns + begin, from, sizeof(float) * std::min(a->share, a->columns - begin));
    }
  }
}
