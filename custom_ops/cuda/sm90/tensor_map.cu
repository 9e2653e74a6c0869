// Descriptions of tensors in global memory for the copy engine; the driver's encoder is found at run time.
#include "driver.h"
#include "tensor_map.h"

namespace qwen1m {
namespace cuda {
namespace sm90 {

namespace {

constexpr int kMostDimensions = 3;

// Of `dimensions` sizes, the innermost first, and the bytes from one to the next of all but that.
int encode_map(CUtensorMap& map, CUtensorMapDataType type, int dimensions, const void* base, const cuuint64_t* sizes,
               const cuuint64_t* strides, const cuuint32_t* box) {
  static const auto encode = find_driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled", 12000);
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint32_t steps[kMostDimensions] = {1, 1, 1};
  const CUresult status = encode(&map, type, static_cast<cuuint32_t>(dimensions), const_cast<void*>(base), sizes,
                                 strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

int make_tensor_map(CUtensorMap& map, qwen1m_dtype dtype, const void* base, int values, int heads, int64_t rows,
                    int box_heads) {
  const auto type = dtype == QWEN1M_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto value_count = static_cast<cuuint64_t>(values), head_count = static_cast<cuuint64_t>(heads);
  const cuuint64_t sizes[] = {value_count, head_count, static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {2 * value_count, 2 * value_count * head_count};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_heads), static_cast<cuuint32_t>(kBoxRows / box_heads)};
  return encode_map(map, type, 3, base, sizes, strides, box);
}

int make_byte_map(CUtensorMap& map, const void* base, int64_t width, int64_t rows, int box_rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(width)};
  const cuuint32_t box[] = {128, static_cast<cuuint32_t>(box_rows)};
  return encode_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, base, sizes, strides, box);
}

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
