// Scores as unsigned integers that sort the same way: -0 equals +0, NaN is below -inf, and 0 is below every score.
#pragma once
#include "simd.h"

namespace rarefy::RAREFY_ISA {

constexpr uint32_t kNanKey = 1;

RAREFY_INLINE uint32_t key_of(float score) {
  const float x = score + 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return x != x ? kNanKey : key;
}

}  // namespace rarefy::RAREFY_ISA
