// PD_BUILD_OP bindings of copies of pages.
#include "qwen1m/pages.h"

#include <string>

#include "call.h"

namespace qwen1m {
namespace {

void copy_page(Tensor& key_cache, Tensor& value_cache, const OptionalTensor& scales, const OptionalTensor& frame,
               int64_t source, int64_t target, int64_t rows) {
  Call call(key_cache);
  const qwen1m_cache cache = call.expect_cache(key_cache, value_cache, scales, frame);
  const int64_t pages = key_cache.shape()[0];
  QWEN1M_REQUIRE(source >= 0 && source < pages && target >= 0 && target < pages && source != target,
                 "source and target must be two of the cache's " + text(pages) + " pages, got " + text(source) +
                     " and " + text(target));
  QWEN1M_REQUIRE(rows >= 0 && rows <= cache.page_size,
                 "rows must be 0 to page_size " + text(cache.page_size) + ", got " + text(rows));
  call.run(
      qwen1m_copy_page{
          .cache = cache,
          .source = static_cast<int32_t>(source),
          .target = static_cast<int32_t>(target),
          .rows = static_cast<int32_t>(rows),
      },
      QWEN1M_KERNEL(copy_page));
}

void dequantize_pages(const Tensor& key_cache, const Tensor& value_cache, const OptionalTensor& scales,
                      const OptionalTensor& frame, const Tensor& pages, Tensor& keys, Tensor& values) {
  Call call(key_cache);
  const qwen1m_cache cache = call.expect_cache(key_cache, value_cache, scales, frame);
  QWEN1M_REQUIRE(qwen1m_is_quantised(cache.dtype),
                 "key_cache must be int8 or uint8, got " + phi::DataTypeToString(key_cache.dtype()));
  call.expect(pages, "pages", DataType::INT32, {-1});
  const int64_t count = pages.shape()[0], held = key_cache.shape()[0];
  for (int64_t i = 0; !call.on_gpu() && i < count; ++i) {
    const int32_t page = pages.data<int32_t>()[i];
    QWEN1M_REQUIRE(page >= 0 && page < held, "page " + text(page) + " is not one of the cache's " + text(held));
  }
  const qwen1m_dtype type = call.expect_stored(keys, "keys", {-1, cache.page_size, cache.kv_heads, cache.head_dim});
  call.expect(values, "values", keys.dtype(), keys.shape());
  QWEN1M_REQUIRE(keys.shape()[0] >= count, "keys has room for " + text(keys.shape()[0]) + " pages, got " + text(count));
  call.run(
      qwen1m_dequantize_pages{
          .cache = cache,
          .pages = pages.data<int32_t>(),
          .key = memory(keys),
          .value = memory(values),
          .dtype = type,
          .count = static_cast<int32_t>(count),
      },
      QWEN1M_KERNEL(dequantize_pages));
}

}  // namespace
}  // namespace qwen1m

PD_BUILD_OP(qwen1m_copy_page)
    .Inputs({"key_cache", "value_cache", paddle::Optional("scales"), paddle::Optional("frame")})
    .Outputs({"written_keys", "written_values"})
    .Attrs({"source: int64_t", "target: int64_t", "rows: int64_t"})
    .SetInplaceMap({{"key_cache", "written_keys"}, {"value_cache", "written_values"}})
    .SetKernelFn(PD_KERNEL(qwen1m::copy_page));

PD_BUILD_OP(qwen1m_dequantize_pages)
    .Inputs({"key_cache", "value_cache", paddle::Optional("scales"), paddle::Optional("frame"), "pages", "keys",
             "values"})
    .Outputs({"written_keys", "written_values"})
    .SetInplaceMap({{"keys", "written_keys"}, {"values", "written_values"}})
    .SetKernelFn(PD_KERNEL(qwen1m::dequantize_pages));
