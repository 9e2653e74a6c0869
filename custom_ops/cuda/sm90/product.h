// Products of many rows in 16 bits on Hopper, without a library.
#pragma once

#include <cuda_runtime.h>

#include "qwen1m/step.h"

namespace qwen1m {
namespace cuda {
namespace sm90 {

// Whether the tiles of such a product nearly fill all rounds of the device's processors.
bool fills_rounds(int64_t rows, int64_t features);

// Of what fits qwen1m_linear, without a bias; K and the number of features in whole eights.
template <typename T>
int product(const qwen1m_linear&, cudaStream_t);

// Of what fits qwen1m_gated_linear, likewise.
template <typename T>
int gated_product(const qwen1m_linear&, cudaStream_t);

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
