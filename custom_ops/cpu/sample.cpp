// Sampling, a row a sequence: bans, bias, penalties, temperature, min-p, top-k, top-p, draw. Log-probabilities.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
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

// Larger logits first, then lower ids.
struct Order {
  const std::vector<float>& logits;
  bool operator()(int32_t x, int32_t y) const { return logits[x] > logits[y] || (logits[x] == logits[y] && x < y); }
};

// NaN counts as -inf.
std::vector<float> read_row(const float* source, int vocab) {
  std::vector<float> logits(source, source + vocab);
  for (float& x : logits) x = std::fmax(x, -std::numeric_limits<float>::infinity());
  return logits;
}

// The first `count` ids in order.
std::vector<int32_t> first_ids(const std::vector<float>& logits, int count) {
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::partial_sort(ids.begin(), ids.begin() + count, ids.end(), Order{logits});
  return ids;
}

void process(const qwen1m_sample& a, int row, std::vector<float>& logits) {
  const int64_t begin = static_cast<int64_t>(row) * a.vocab;
  if (a.masked[row]) {
    const uint32_t* mask = a.mask + row * ((a.vocab + int64_t{31}) / 32);
    for (int i = 0; i < a.vocab; ++i) {
      if (!(mask[i / 32] >> (i % 32) & 1)) logits[i] = -std::numeric_limits<float>::infinity();
    }
  }
  if (a.biased[row]) {
    for (int i = 0; i < a.vocab; ++i) logits[i] += a.bias[begin + i];
  }
  const float repetition = a.repetition_penalty[row], frequency = a.frequency_penalty[row];
  const float presence = a.presence_penalty[row];
  if (repetition == 1.0f && frequency == 0.0f && presence == 0.0f) return;
  for (int i = 0; i < a.vocab; ++i) {
    const int count = a.counts[begin + i];
    if (count == 0) continue;
    float x = logits[i];
    x = x > 0 ? x / repetition : x * repetition;
    const int in_answer = count & QWEN1M_LARGEST_COUNT;
    if (in_answer != 0) x = x - frequency * static_cast<float>(in_answer) - presence;
    logits[i] = x;
  }
}

void sample_row(const qwen1m_sample& a, int row) {
  const int64_t step = a.steps[row];
  if (step < 0) {  // no sequence
    a.ids[row] = 0;
    a.logprobs[row] = 0;
    return;
  }
  std::vector<float> logits = read_row(a.logits + static_cast<int64_t>(row) * a.vocab, a.vocab);
  process(a, row, logits);
  const auto best = std::max_element(logits.begin(), logits.end());
  int64_t chosen = best - logits.begin();
  if (a.temperature[row] > 0) {
    const int k = a.top_k[row] > 0 ? std::min(a.top_k[row], a.vocab) : a.vocab;
    const std::vector<int32_t> order = first_ids(logits, k);
    std::vector<double> weights;
    double total = 0;
    for (int i = 0; i < k; ++i) {
      const double weight = std::exp((static_cast<double>(logits[order[i]]) - *best) / a.temperature[row]);
      if (i > 0 && weight < a.min_p[row]) break;
      weights.push_back(weight);
      total += weight;
    }
    double kept = 0;
    int count = 0;
    for (; count < static_cast<int>(weights.size()) && (count == 0 || kept / total < a.top_p[row]); ++count) {
      kept += weights[count];
    }
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
  uint16_t& count = a.counts[static_cast<int64_t>(row) * a.vocab + chosen];
  if ((count & QWEN1M_LARGEST_COUNT) != QWEN1M_LARGEST_COUNT) ++count;
  a.steps[row] = step + 1;
}

void top_logprobs_row(const qwen1m_top_logprobs& a, int row) {
  const std::vector<float> logits = read_row(a.logits + static_cast<int64_t>(row) * a.vocab, a.vocab);
  const std::vector<int32_t> order = first_ids(logits, a.k);
  const double total = log_sum_exp(logits, logits[order[0]]);
  for (int i = 0; i < a.k; ++i) {
    const int64_t place = static_cast<int64_t>(row) * a.k + i;
    a.top_ids[place] = order[i];
    a.top_logprobs[place] = static_cast<float>(logits[order[i]] - total);
  }
  const float given = logits[a.ids[row]];
  a.logprobs[row] = static_cast<float>(given - total);
  a.ranks[row] = static_cast<int32_t>(std::count_if(logits.begin(), logits.end(), [&](float x) { return x >= given; }));
}

}  // namespace

void qwen1m_cpu_sample(const qwen1m_sample* a) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(std::min(qwen1m::num_threads(), a->batch))
  for (int row = 0; row < a->batch; ++row) {
    sample_row(*a, row);
    qwen1m::advance();
  }
}

void qwen1m_cpu_top_logprobs(const qwen1m_top_logprobs* a) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(std::min(qwen1m::num_threads(), a->batch))
  for (int row = 0; row < a->batch; ++row) {
    top_logprobs_row(*a, row);
    qwen1m::advance();
  }
}
