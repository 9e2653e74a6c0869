// Copies of pages, and what 8-bit pages stand for.
#include "qwen1m/pages.h"
#include "vectors.cuh"

namespace qwen1m {
namespace cuda {
namespace {

// The first `rows` rows of a page, of any tensor [pages, page_size, ...].
cudaError_t copy_rows(const qwen1m_copy_page& a, void* pool, int64_t row_bytes, cudaStream_t stream) {
  char* pages = static_cast<char*>(pool);
  const int64_t page_bytes = a.cache.page_size * row_bytes;
  return cudaMemcpyAsync(pages + a.target * page_bytes, pages + a.source * page_bytes, a.rows * row_bytes,
                         cudaMemcpyDeviceToDevice, stream);
}

constexpr int kNumbers = kPack;  // of a thread, so that neighbours store what lies together
constexpr int kDequantiseThreads = 256;

// A block a KV head and page: threads (D / kNumbers, tokens), the same dims of one token after the other.
template <typename T, typename Number, int D>
__global__ void __launch_bounds__(kDequantiseThreads) dequantize_kernel(const qwen1m_dequantize_pages a) {
  constexpr int kChunks = D / kNumbers, kTokens = kDequantiseThreads / kChunks;
  const qwen1m_cache& cache = a.cache;
  const int head = blockIdx.x, dim = threadIdx.x % kChunks * kNumbers;
  const int64_t page = a.pages[blockIdx.y], page_rows = static_cast<int64_t>(cache.page_size) * cache.kv_heads;
  float power[kNumbers], centre[kNumbers];
#pragma unroll
  for (int i = 0; i < kNumbers; i += 4) {
    load_widened<4>(cache.frame.power + head * D + dim + i, *reinterpret_cast<float (*)[4]>(power + i));
    load_widened<4>(cache.frame.centre + head * D + dim + i, *reinterpret_cast<float (*)[4]>(centre + i));
  }
  const auto* key_scales = static_cast<const f16*>(cache.frame.key_scale);
  const auto* value_scales = static_cast<const f16*>(cache.frame.value_scale);
#pragma unroll 4
  for (int token = threadIdx.x / kChunks; token < cache.page_size; token += kTokens) {
    const int64_t from = page * page_rows + static_cast<int64_t>(token) * cache.kv_heads + head;
    const int64_t to = blockIdx.y * page_rows + static_cast<int64_t>(token) * cache.kv_heads + head;
    const auto keys = load_vector<kNumbers>(static_cast<const Number*>(cache.key) + from * D + dim);
    const auto values = load_vector<kNumbers>(static_cast<const Number*>(cache.value) + from * D + dim);
    const float key_scale = widen(key_scales[from]), value_scale = widen(value_scales[from]);
    float key[kNumbers], value[kNumbers];
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) {
      key[n] = (widen(keys.values[n]) * key_scale + centre[n]) * power[n];
      value[n] = widen(values.values[n]) * value_scale;
    }
    store_narrowed(key, static_cast<T*>(a.key) + to * D + dim);
    store_narrowed(value, static_cast<T*>(a.value) + to * D + dim);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace qwen1m

using namespace qwen1m::cuda;

int qwen1m_cuda_copy_page(const qwen1m_copy_page* a, qwen1m_stream stream) {
  const qwen1m_cache& cache = a->cache;
  if (cache.dtype == QWEN1M_FLOAT32) return cudaErrorInvalidValue;
  const int64_t row_bytes = static_cast<int64_t>(cache.kv_heads) * cache.head_dim * qwen1m_bytes_of(cache.dtype);
  cudaError_t status = copy_rows(*a, cache.key, row_bytes, as_stream(stream));
  if (status == cudaSuccess) status = copy_rows(*a, cache.value, row_bytes, as_stream(stream));
  if (status != cudaSuccess || !qwen1m_is_quantised(cache.dtype)) return status;
  const int64_t scale_bytes = cache.kv_heads * qwen1m_bytes_of(QWEN1M_FLOAT16);
  status = copy_rows(*a, cache.frame.key_scale, scale_bytes, as_stream(stream));
  return status != cudaSuccess ? status : copy_rows(*a, cache.frame.value_scale, scale_bytes, as_stream(stream));
}

int qwen1m_cuda_dequantize_pages(const qwen1m_dequantize_pages* a, qwen1m_stream stream) {
  if (a->count == 0) return cudaSuccess;
  const dim3 grid(a->cache.kv_heads, a->count);
  return with_half_type(a->dtype, [&](auto type) {
    return with_number(a->cache.dtype, [&](auto number) -> int {
      using T = decltype(type);
      using Number = decltype(number);
      switch (a->cache.head_dim) {
        case 64: dequantize_kernel<T, Number, 64><<<grid, kDequantiseThreads, 0, as_stream(stream)>>>(*a); break;
        case 128: dequantize_kernel<T, Number, 128><<<grid, kDequantiseThreads, 0, as_stream(stream)>>>(*a); break;
        default: return cudaErrorInvalidValue;
      }
      return cudaGetLastError();
    });
  });
}
