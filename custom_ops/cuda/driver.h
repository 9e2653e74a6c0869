// Functions of the CUDA driver, found at run time: the ops are not linked against it.
#pragma once

#include <cuda_runtime.h>

namespace qwen1m {
namespace cuda {

// As it is since `version` of CUDA; null where the driver has none.
template <typename Function>
Function find_driver_function(const char* name, [[maybe_unused]] unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(function) : nullptr;
}

}  // namespace cuda
}  // namespace qwen1m
