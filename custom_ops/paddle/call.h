// Argument checks of the bindings: what an op does not take stops with its name, the argument and what it got.
#pragma once

#include <string>
#include <vector>

#include "paddle/phi/api/all.h"
#include "qwen1m_ops.h"

namespace qwen1m {

using paddle::Tensor;
using Shape = std::vector<int64_t>;  // -1 stands for any size

inline std::string text(const Shape& shape) {
  std::string out;
  for (const int64_t size : shape) out += (out.empty() ? "" : ", ") + (size < 0 ? "*" : std::to_string(size));
  return "[" + out + "]";
}

// paddle_qwen1m/ops.py shows the user what stands between the marks.
[[noreturn]] inline void refuse(const std::string& reason) { PD_THROW("[qwen1m] " + reason + " [/qwen1m]"); }

// The reason is put together only when the condition does not hold.
#define QWEN1M_REQUIRE(condition, reason) \
  do {                                    \
    if (!(condition)) refuse(reason);     \
  } while (false)

inline void expect_shape(const Tensor& tensor, const char* name, const Shape& expected) {
  const Shape actual = tensor.shape();
  bool same = actual.size() == expected.size();
  for (size_t i = 0; same && i < actual.size(); ++i) same = expected[i] < 0 || actual[i] == expected[i];
  QWEN1M_REQUIRE(same, std::string(name) + " must have shape " + text(expected) + ", got " + text(actual));
}

inline void expect_type(const Tensor& tensor, const char* name, paddle::DataType type) {
  QWEN1M_REQUIRE(tensor.dtype() == type, std::string(name) + " must be " + phi::DataTypeToString(type) + ", got " +
                                             phi::DataTypeToString(tensor.dtype()));
}

inline void expect(const Tensor& tensor, const char* name, paddle::DataType type, const Shape& shape) {
  expect_type(tensor, name, type);
  expect_shape(tensor, name, shape);
}

inline qwen1m_dtype storage_type(const Tensor& tensor, const char* name) {
  switch (tensor.dtype()) {
    case paddle::DataType::FLOAT32: return QWEN1M_FLOAT32;
    case paddle::DataType::BFLOAT16: return QWEN1M_BFLOAT16;
    case paddle::DataType::FLOAT16: return QWEN1M_FLOAT16;
    default: break;
  }
  refuse(std::string(name) + " must be float32, bfloat16 or float16, got " + phi::DataTypeToString(tensor.dtype()));
}

inline qwen1m_cache paged_cache(const Tensor& key, const Tensor& value) {
  expect_shape(key, "key_cache", {-1, -1, -1, -1});
  expect(value, "value_cache", key.dtype(), key.shape());
  const Shape shape = key.shape();
  QWEN1M_REQUIRE(shape[3] == 64 || shape[3] == 128, "head_dim must be 64 or 128, got " + std::to_string(shape[3]));
  return {const_cast<void*>(key.data()),  const_cast<void*>(value.data()), storage_type(key, "key_cache"),
          static_cast<int32_t>(shape[1]), static_cast<int32_t>(shape[2]),  static_cast<int32_t>(shape[3])};
}

inline void expect_chunk(int64_t chunk_len, const qwen1m_cache& cache) {
  QWEN1M_REQUIRE(chunk_len >= cache.page_size && chunk_len % cache.page_size == 0,
                 "chunk_len (chunk_size - local_size) must be a multiple of page_size " +
                     std::to_string(cache.page_size) + ", got " + std::to_string(chunk_len));
}

// Query variants that a row at `position` needs.
inline int64_t variants_needed(int64_t position, int64_t chunk_len) {
  return position < chunk_len ? 1 : position < 2 * chunk_len ? 2 : 3;
}

// q is [V, rows, H, D] with H a multiple of the KV heads; returns H.
inline int32_t expect_queries(const Tensor& q, const qwen1m_cache& cache, int64_t rows, int64_t last_position,
                              int64_t chunk_len) {
  expect(q, "q", paddle::DataType::FLOAT32, {-1, rows, -1, cache.head_dim});
  const int64_t heads = q.shape()[2];
  QWEN1M_REQUIRE(heads > 0 && heads % cache.kv_heads == 0, "q's heads must be a multiple of the cache's " +
                                                               std::to_string(cache.kv_heads) + ", got " +
                                                               std::to_string(heads));
  const int64_t needed = variants_needed(last_position, chunk_len);
  QWEN1M_REQUIRE(q.shape()[0] >= needed && q.shape()[0] <= 3,
                 "q must hold " + std::to_string(needed) + " to 3 rotations for position " +
                     std::to_string(last_position) + " with chunk_len " + std::to_string(chunk_len) + ", got " +
                     std::to_string(q.shape()[0]));
  return static_cast<int32_t>(heads);
}

// The sequence's pages must exist for keys [0, end).
inline void expect_pages(const int32_t* table, int64_t width, int64_t end, const Tensor& key_cache) {
  const int64_t page_size = key_cache.shape()[1], pages = key_cache.shape()[0];
  QWEN1M_REQUIRE(
      end >= 1 && end <= width * page_size,
      "the block table has room for " + std::to_string(width * page_size) + " keys, got " + std::to_string(end));
  for (int64_t i = 0; i < (end + page_size - 1) / page_size; ++i) {
    QWEN1M_REQUIRE(table[i] >= 0 && table[i] < pages, "page " + std::to_string(table[i]) +
                                                          " of the block table is not one of " + "the cache's " +
                                                          std::to_string(pages));
  }
}

}  // namespace qwen1m
