// One row times a weight of 8 bits on Hopper.
#pragma once

#include <cuda_runtime.h>

#include "qwen1m/weight8.h"

namespace qwen1m {
namespace cuda {
namespace sm90 {

// Of one token, and blocks of 128 columns.
template <typename T>
int linear8_row(const qwen1m_linear8&, cudaStream_t);

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
