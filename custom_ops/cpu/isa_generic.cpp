#define QWEN1M_ISA generic
#define QWEN1M_VECTOR_BYTES 16
#define QWEN1M_TILE_ROWS 6
#include "isa.h"

const qwen1m::Kernels qwen1m::kGeneric = qwen1m::generic::table("generic");
