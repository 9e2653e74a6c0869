// Descriptions of tensors in global memory for the copy engine.
#pragma once

#include <cuda.h>
#include <stdint.h>

#include "qwen1m/types.h"

namespace qwen1m {
namespace cuda {
namespace sm90 {

constexpr int kBoxRows = 64;

// `base` [rows, heads, values] of 16 bits, copied by boxes of 64 values of `box_heads` heads of as many rows as make 64
// lines, head after head of a row, at (value, head, row). Lines are 128 bytes apart in shared memory with permuted
// chunks (see hopper.cuh). Rows from `rows` on come as zeros. Returns a cudaError_t.
int make_tensor_map(CUtensorMap& map, qwen1m_dtype dtype, const void* base, int values, int heads, int64_t rows,
                    int box_heads = 1);

// `base` [rows, width] of bytes, copied by boxes of 128 bytes of box_rows rows at (byte, row), permuted alike.
int make_byte_map(CUtensorMap& map, const void* base, int64_t width, int64_t rows, int box_rows);

}  // namespace sm90
}  // namespace cuda
}  // namespace qwen1m
