// Products of FP8 rows with FP8 weights on Hopper, without a library.
#pragma once

#include <cuda_runtime.h>

#include "qwen1m/weight8.h"

namespace qwen1m {
namespace cuda {
namespace sm90 {

// Of arguments that fit, one row and one feature at least.
template <typename T>
int product8(const qwen1m_product8&, cudaStream_t);

// The gate's features, then as many of what goes up: SiLU of the first times the second, to `out` in the place of y.
int gated_product8(const qwen1m_product8&, const qwen1m_rows8& out, cudaStream_t);

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
