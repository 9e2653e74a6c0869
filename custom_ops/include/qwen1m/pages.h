// Where keys and values lie: the pages of a layer.
#pragma once

#include "qwen1m/types.h"

// What the numbers of an 8-bit cache stand for: a key is (number * key_scale + centre) * power, a value is
// number * value_scale. Nothing in a cache of another type, whose numbers are keys and values themselves.
typedef struct {
  void* key_scale;      // float16 [pages, page_size, G]
  void* value_scale;    // the same
  const float* power;   // [G, D], powers of two, one of the two dims d and d + D / 2 that a rotation mixes
  const float* centre;  // [G, D]
} qwen1m_frame;

// Rotated keys and values of one layer: [pages, page_size, G, D].
typedef struct {
  void* key;
  void* value;
  qwen1m_dtype dtype;
  int32_t page_size;
  int32_t kv_heads;
  int32_t head_dim;
  qwen1m_frame frame;
} qwen1m_cache;

// The first `rows` tokens of page `source`, keys and values, become those of page `target`.
typedef struct {
  qwen1m_cache cache;
  int32_t source, target, rows;
} qwen1m_copy_page;

// Page n of `key` and `value`, keys and values of a floating type, is what page pages[n] of an 8-bit cache stands
// for.
typedef struct {
  qwen1m_cache cache;
  const int32_t* pages;  // [count]
  void* key;             // [count or more, page_size, G, D]
  void* value;
  qwen1m_dtype dtype;
  int32_t count;
} qwen1m_dequantize_pages;

QWEN1M_API void qwen1m_cpu_copy_page(const qwen1m_copy_page*);
QWEN1M_API void qwen1m_cpu_dequantize_pages(const qwen1m_dequantize_pages*);

QWEN1M_API int qwen1m_cuda_copy_page(const qwen1m_copy_page*, qwen1m_stream);
QWEN1M_API int qwen1m_cuda_dequantize_pages(const qwen1m_dequantize_pages*, qwen1m_stream);
