// Copies of pages.
#include "common.cuh"
#include "qwen1m/pages.h"

int qwen1m_cuda_copy_page(const qwen1m_copy_page* a, qwen1m_stream stream) {
  if (a->cache.dtype == QWEN1M_FLOAT32) return cudaErrorInvalidValue;
  const int64_t row_bytes = static_cast<int64_t>(a->cache.kv_heads) * a->cache.head_dim * 2;
  const int64_t page_bytes = a->cache.page_size * row_bytes;
  for (void* pool : {a->cache.key, a->cache.value}) {
    char* pages = static_cast<char*>(pool);
    const cudaError_t status =
        cudaMemcpyAsync(pages + a->target * page_bytes, pages + a->source * page_bytes, a->rows * row_bytes,
                        cudaMemcpyDeviceToDevice, qwen1m::cuda::as_stream(stream));
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}
