// The MLP's first product and SiLU, of many rows in 16 bits, on Hopper.
#pragma once

#include <cuda_runtime.h>

#include "qwen1m/step.h"

namespace qwen1m {
namespace cuda {
namespace sm90 {

// Of what fits qwen1m_gated_linear; K and the number of features in whole eights.
template <typename T>
int gated_product(const qwen1m_linear&, cudaStream_t);

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
