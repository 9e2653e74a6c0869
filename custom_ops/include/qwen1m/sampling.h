// Choosing tokens from logits.
#pragma once

#include "qwen1m/types.h"

typedef struct {
  const float* logits;  // [B, vocab]
  uint8_t* seen;        // [B, vocab]; the sampled token is marked
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* repetition_penalty;
  const int32_t* banned;        // [B, banned_width], -1 for none
  const int64_t* banned_steps;  // [B]: banned ids are so while the step is below this
  const int64_t* seeds;
  int64_t* steps;  // [B], grow by one
  int64_t* ids;
  float* logprobs;
  int32_t batch, vocab, banned_width;
} qwen1m_sample;

QWEN1M_API void qwen1m_cpu_sample(const qwen1m_sample*);

QWEN1M_API int qwen1m_cuda_sample(const qwen1m_sample*, qwen1m_stream);
