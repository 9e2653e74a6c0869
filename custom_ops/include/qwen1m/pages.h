// Where keys and values lie: the pages of a layer.
#pragma once

#include "qwen1m/types.h"

// Rotated keys and values of one layer: [pages, page_size, G, D].
typedef struct {
  void* key;
  void* value;
  qwen1m_dtype dtype;
  int32_t page_size;
  int32_t kv_heads;
  int32_t head_dim;
} qwen1m_cache;

// The first `rows` tokens of page `source`, keys and values, become those of page `target`.
typedef struct {
  qwen1m_cache cache;
  int32_t source, target, rows;
} qwen1m_copy_page;

QWEN1M_API void qwen1m_cpu_copy_page(const qwen1m_copy_page*);

QWEN1M_API int qwen1m_cuda_copy_page(const qwen1m_copy_page*, qwen1m_stream);
