// Vectors of 64-bit lanes, one lane a tile.
#pragma once
#include "simd.h"

namespace rarefy::RAREFY_ISA {

constexpr int kTiles = RAREFY_VECTOR_BYTES / 8;

typedef double Doubles __attribute__((vector_size(RAREFY_VECTOR_BYTES)));
typedef int64_t Longs __attribute__((vector_size(RAREFY_VECTOR_BYTES)));
typedef uint64_t Words __attribute__((vector_size(RAREFY_VECTOR_BYTES)));

RAREFY_INLINE Longs where(Longs condition, Longs yes, Longs no) { return condition ? yes : no; }
RAREFY_INLINE Doubles where(Longs condition, Doubles yes, Doubles no) { return condition ? yes : no; }

template <class Lanes>
RAREFY_INLINE Lanes larger(Lanes a, Lanes b) {
  return a > b ? a : b;
}
template <class Lanes>
RAREFY_INLINE Lanes smaller(Lanes a, Lanes b) {
  return a < b ? a : b;
}

}  // namespace rarefy::RAREFY_ISA
