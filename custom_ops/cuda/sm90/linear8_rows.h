// Up to eight rows times a weight of 8 bits on Hopper.
#pragma once

#include <cuda_runtime.h>

#include "qwen1m/weight8.h"

namespace qwen1m {
namespace cuda {
namespace sm90 {

// Whether there are so few rows, not too long, and blocks of 128 columns.
bool takes_linear8_rows(const qwen1m_linear8&);

template <typename T>
int linear8_rows(const qwen1m_linear8&, cudaStream_t);

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
