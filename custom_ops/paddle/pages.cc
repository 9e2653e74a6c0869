// PD_BUILD_OP binding of copies of pages.
#include "qwen1m/pages.h"

#include <string>

#include "call.h"

namespace qwen1m {
namespace {

void copy_page(Tensor& key_cache, Tensor& value_cache, int64_t source, int64_t target, int64_t rows) {
  Call call(key_cache);
  const qwen1m_cache cache = call.expect_cache(key_cache, value_cache);
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

}  // namespace
}  // namespace qwen1m

PD_BUILD_OP(qwen1m_copy_page)
    .Inputs({"key_cache", "value_cache"})
    .Outputs({"written_keys", "written_values"})
    .Attrs({"source: int64_t", "target: int64_t", "rows: int64_t"})
    .SetInplaceMap({{"key_cache", "written_keys"}, {"value_cache", "written_values"}})
    .SetKernelFn(PD_KERNEL(qwen1m::copy_page));
