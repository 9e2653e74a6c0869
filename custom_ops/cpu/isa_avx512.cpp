#define QWEN1M_ISA avx512
#define QWEN1M_VECTOR_BYTES 64
#define QWEN1M_TILE_ROWS 8
#include "isa.h"

const qwen1m::Kernels qwen1m::kAvx512 = qwen1m::avx512::table("avx512");
