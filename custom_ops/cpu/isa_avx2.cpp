#define QWEN1M_ISA avx2
#define QWEN1M_VECTOR_BYTES 32
#define QWEN1M_TILE_ROWS 6
#include "isa.h"

const qwen1m::Kernels qwen1m::kAvx2 = qwen1m::avx2::table("avx2");
