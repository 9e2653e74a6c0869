// Copies of pages.
#include "qwen1m/pages.h"

#include <string.h>

namespace {

// The first `rows` rows of a page, of any tensor [pages, page_size, ...].
void copy_rows(const qwen1m_copy_page& a, void* pool, size_t row_bytes) {
  char* pages = static_cast<char*>(pool);
  const size_t page_bytes = row_bytes * a.cache.page_size;
  memcpy(pages + a.target * page_bytes, pages + a.source * page_bytes, row_bytes * a.rows);
}

}  // namespace

void qwen1m_cpu_copy_page(const qwen1m_copy_page* a) {
  const qwen1m_cache& cache = a->cache;
  const size_t row_bytes = static_cast<size_t>(cache.kv_heads) * cache.head_dim * qwen1m_bytes_of(cache.dtype);
  copy_rows(*a, cache.key, row_bytes);
  copy_rows(*a, cache.value, row_bytes);
  if (!qwen1m_is_quantised(cache.dtype)) return;
  const size_t scale_bytes = cache.kv_heads * sizeof(uint16_t);
  copy_rows(*a, cache.frame.key_scale, scale_bytes);
  copy_rows(*a, cache.frame.value_scale, scale_bytes);
}
