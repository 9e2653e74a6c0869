// Logits processing and sampling, a row a sequence: penalty, bans, temperature, top-k, top-p, draw.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "parallel.h"
#include "qwen1m/sampling.h"

namespace {

// Uniform in [0, 1) with 24 bits, a function of (seed, step) alone: splitmix64's finaliser.
float uniform(uint64_t seed, uint64_t step) {
  uint64_t z = seed + 0x9E3779B97F4A7C15ull * (step + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  z ^= z >> 31;
  return static_cast<float>(z >> 40) * 0x1p-24f;
}

double log_sum_exp(const std::vector<float>& logits, float top) {
  double total = 0;
  for (const float x : logits) total += std::exp(static_cast<double>(x) - top);
  return top + std::log(total);
}

void sample_row(const qwen1m_sample& a, int row) {
  const float* source = a.logits + static_cast<int64_t>(row) * a.vocab;
  uint8_t* seen = a.seen + static_cast<int64_t>(row) * a.vocab;
  std::vector<float> logits(source, source + a.vocab);
  for (float& x : logits) x = std::fmax(x, -std::numeric_limits<float>::infinity());  // NaN counts as -inf
  const float penalty = a.repetition_penalty[row];
  if (penalty != 1.0f) {
    for (int i = 0; i < a.vocab; ++i) {
      if (seen[i]) logits[i] = logits[i] > 0 ? logits[i] / penalty : logits[i] * penalty;
    }
  }
  const int64_t step = a.steps[row]++;
  const int num_banned = step < a.banned_steps[row] ? a.banned_width : 0;
  for (int i = 0; i < num_banned; ++i) {
    const int32_t id = a.banned[static_cast<int64_t>(row) * a.banned_width + i];
    if (id >= 0) logits[id] = -std::numeric_limits<float>::infinity();
  }
  const auto best = std::max_element(logits.begin(), logits.end());
  int64_t chosen = best - logits.begin();
  if (a.temperature[row] > 0) {
    const auto before = [&](int32_t x, int32_t y) {
      return logits[x] > logits[y] || (logits[x] == logits[y] && x < y);
    };
    std::vector<int32_t> order(a.vocab);
    for (int i = 0; i < a.vocab; ++i) order[i] = i;
    const int k = a.top_k[row] > 0 ? std::min(a.top_k[row], a.vocab) : a.vocab;
    std::partial_sort(order.begin(), order.begin() + k, order.end(), before);
    std::vector<double> weights(k);
    double total = 0;
    for (int i = 0; i < k; ++i) {
      weights[i] = std::exp((static_cast<double>(logits[order[i]]) - *best) / a.temperature[row]);
      total += weights[i];
    }
    double kept = 0;
    int count = 0;
    for (; count < k && (count == 0 || kept / total < a.top_p[row]); ++count) kept += weights[count];
    const double goal = static_cast<double>(uniform(a.seeds[row], step)) * kept;
    double running = 0;
    int i = 0;
    for (; i < count - 1; ++i) {
      running += weights[i];
      if (running > goal) break;
    }
    chosen = order[i];
  }
  a.ids[row] = chosen;
  a.logprobs[row] = static_cast<float>(logits[chosen] - log_sum_exp(logits, *best));
  seen[chosen] = 1;
}

}  // namespace

void qwen1m_cpu_sample(const qwen1m_sample* a) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(std::min(qwen1m::num_threads(), a->batch))
  for (int row = 0; row < a->batch; ++row) {
    sample_row(*a, row);
    qwen1m::advance();
  }
}
