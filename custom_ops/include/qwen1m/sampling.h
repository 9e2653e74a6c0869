// Choosing tokens from logits, and how likely tokens are.
#pragma once

#include "qwen1m/types.h"

// A token's count: how often the answer has it, and a bit that says that the prompt has it.
enum { QWEN1M_IN_PROMPT = 0x8000, QWEN1M_LARGEST_COUNT = 0x7FFF };
enum { QWEN1M_MOST_TOP_LOGPROBS = 512 };

typedef struct {
  const float* logits;    // [B, vocab]
  uint16_t* counts;       // [B, vocab]; the chosen token is counted
  const uint32_t* mask;   // [B, ceil(vocab / 32)]: bit t % 32 of word t / 32 allows token t
  const uint8_t* masked;  // [B]: whether the row's mask is read
  const float* bias;      // [B, vocab]
  const uint8_t* biased;  // [B]: whether the row's bias is read
  const float* repetition_penalty;
  const float* frequency_penalty;
  const float* presence_penalty;
  const float* temperature;
  const float* min_p;
  const int32_t* top_k;
  const float* top_p;
  const int64_t* seeds;
  int64_t* steps;  // [B], grow by one; below 0 the row is empty
  int64_t* ids;
  float* logprobs;
  int32_t batch, vocab;
} qwen1m_sample;

QWEN1M_API void qwen1m_cpu_sample(const qwen1m_sample*);

QWEN1M_API int qwen1m_cuda_sample(const qwen1m_sample*, qwen1m_stream);

typedef struct {
  const float* logits;  // [B, vocab]
  const int64_t* ids;   // [B]
  int32_t* top_ids;     // [B, k]
  float* top_logprobs;  // [B, k]
  float* logprobs;      // [B]: of ids
  int32_t* ranks;       // [B]: of ids, from 1
  int32_t batch, vocab, k;
} qwen1m_top_logprobs;

QWEN1M_API void qwen1m_cpu_top_logprobs(const qwen1m_top_logprobs*);

QWEN1M_API int qwen1m_cuda_top_logprobs(const qwen1m_top_logprobs*, qwen1m_stream);
