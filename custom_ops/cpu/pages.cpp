// Copies of pages.
#include "qwen1m/pages.h"

#include <string.h>

#include <initializer_list>

void qwen1m_cpu_copy_page(const qwen1m_copy_page* a) {
  const size_t value_bytes = a->cache.dtype == QWEN1M_FLOAT32 ? 4 : 2;
  const size_t row_bytes = value_bytes * a->cache.kv_heads * a->cache.head_dim;
  const size_t page_bytes = row_bytes * a->cache.page_size;
  for (void* pool : {a->cache.key, a->cache.value}) {
    char* pages = static_cast<char*>(pool);
    memcpy(pages + a->target * page_bytes, pages + a->source * page_bytes, row_bytes * a->rows);
  }
}
