// Descriptions of tensors in global memory for the copy engine; the driver's encoder is found at run time.
#include "driver.h"
#include "tensor_map.h"

namespace qwen1m {
namespace cuda {
namespace sm90 {

int make_tensor_map(CUtensorMap& map, qwen1m_dtype dtype, const void* base, int values, int heads, int64_t rows,
                    int box_heads) {
  static const auto encode = find_driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled", 12000);
  if (encode == nullptr) return cudaErrorNotSupported;
  const auto type = dtype == QWEN1M_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto value_count = static_cast<cuuint64_t>(values), head_count = static_cast<cuuint64_t>(heads);
  const cuuint64_t sizes[] = {value_count, head_count, static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {2 * value_count, 2 * value_count * head_count};  // bytes
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_heads), static_cast<cuuint32_t>(kBoxRows / box_heads)};
  const cuuint32_t steps[] = {1, 1, 1};
  const CUresult status =
      encode(&map, type, 3, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
