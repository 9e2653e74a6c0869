// FP8 numbers, E4M3: a sign, four bits of exponent with a bias of 7, three of mantissa, no infinities; for host and
// device code.
#pragma once

#include <stdint.h>
#include <string.h>

#include "qwen1m/types.h"

namespace qwen1m {

constexpr float kLargestE4M3 = 448;

// The nearest number, of two as near the even one; what is larger than the largest becomes that. Not for NaN.
// Static: CPU kernels of several instruction sets include this, and the linker must not share one's code with another.
QWEN1M_HOST_DEVICE static inline uint8_t to_e4m3(float x) {
  uint32_t word;
  memcpy(&word, &x, sizeof(word));
  const uint32_t sign = word >> 24 & 0x80;
  word &= 0x7fffffff;
  if (word < (127u - 6) << 23) {  // below 2^-6 numbers are multiples of 2^-9, as floats of 2^14 and more are
    float magnitude;
    memcpy(&magnitude, &word, sizeof(magnitude));
    const float sum = magnitude + 0x1p14f;
    memcpy(&word, &sum, sizeof(word));
    return static_cast<uint8_t>(sign | (word & 0xf));
  }
  const uint32_t number = ((word + 0x7ffff + (word >> 20 & 1)) >> 20) - (120 << 3);
  return static_cast<uint8_t>(sign | (number < 0x7e ? number : 0x7e));
}

}  // namespace qwen1m
