// Sums of a few rows over the ranks of one machine: each rank's card has a mailbox that the other ranks write to.
#pragma once

#include "qwen1m/peers.h"

enum {
  QWEN1M_MAILBOX_ROWS = 64,     // of a sum, at most
  QWEN1M_MAILBOX_WIDTH = 6144,  // values of a row, at most
};

// residual += the ranks' deltas, added up in float32 in the order of the ranks; then as qwen1m_rms_norm, on every rank.
// All ranks call it as often and for as many rows. 16 bits alone.
typedef struct {
  qwen1m_rms_norm norm;  // delta: this rank's
  const int64_t* boxes;  // [degree], in host memory: where this process has each rank's mailbox
  int32_t rank, degree;
  int32_t sent;  // 1: qwen1m_sending_linear has made delta; 0: it is still to be sent
} qwen1m_sum_rms_norm;

// qwen1m_linear of few rows, without a bias, that sends y, this rank's delta of the sum that comes next, as it is made.
typedef struct {
  qwen1m_linear linear;
  const int64_t* boxes;
  int32_t rank, degree;
} qwen1m_sending_linear;

QWEN1M_API int qwen1m_cuda_sum_rms_norm(const qwen1m_sum_rms_norm*, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_sending_linear(const qwen1m_sending_linear*, qwen1m_stream);

// Bytes of a mailbox, all zero before the first sum.
QWEN1M_API int64_t qwen1m_cuda_mailbox_bytes(int32_t degree);
// A mailbox on the current device until the process ends; qwen1m_cuda_name_memory has its name for other processes.
QWEN1M_API int qwen1m_cuda_make_mailbox(int32_t degree, int64_t* address);
