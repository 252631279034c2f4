// Square tiles of a matrix: their scores, the keys that decide between equal ones, and where their masks go.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace rarefy::RAREFY_ISA {

// Where a tile begins in the matrix; tiles are numbered by row.
RAREFY_INLINE int64_t tile_begin(const KeepRegularCall& c, int64_t tile) {
  const int64_t width = c.columns / c.side;
  return (tile / width * c.columns + tile % width) * c.side;
}

// The scores of a tile, its rows `stride` apart. `side` is that of the call, and known to the compiler where it can be.
RAREFY_INLINE void load_tile(const KeepRegularCall& c, int64_t tile, int side, int stride, float* __restrict scores) {
  const int64_t begin = tile_begin(c, tile);
  for (int r = 0; r < side; r++) memcpy(scores + r * stride, c.scores + begin + r * c.columns, sizeof(float) * side);
  if (!c.marked && !c.by_size) return;
  if (!c.marked) {
    for (int r = 0; r < side; r++)
      for (int i = 0; i < side; i++) scores[r * stride + i] = __builtin_fabsf(scores[r * stride + i]);
    return;
  }
  const uint32_t bits = c.by_size ? 0x7fffffffu : 0xffffffffu;
  uint32_t fill;
  memcpy(&fill, &c.fill, 4);
  for (int r = 0; r < side; r++)
    for (int i = 0; i < side; i++) {
      uint32_t score;
      memcpy(&score, scores + r * stride + i, 4);
      // All bits of what is marked: no branch, as branches on masks are mispredicted.
      const uint32_t marked = c.marked[begin + r * c.columns + i];
      score = (score & (marked - 1) & bits) | (fill & -marked);
      memcpy(scores + r * stride + i, &score, 4);
    }
}

RAREFY_INLINE void store_tile(const KeepRegularCall& c, int64_t tile, int side, const uint8_t* __restrict kept) {
  uint8_t* mask = c.mask + tile_begin(c, tile);
  for (int r = 0; r < side; r++) memcpy(mask + r * c.columns, kept + r * side, static_cast<size_t>(side));
}

// SplitMix64's finalizer, of a number or of a vector of them.
template <class Word>
RAREFY_INLINE Word mixed(Word x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// The key of an entry by the order that rarefy/ties.py defines: the lowest wins.
RAREFY_INLINE int64_t tie_key(const KeepRegularCall& c, int64_t entry) {
  const int64_t place = c.places ? c.places[entry] : entry;
  return static_cast<int64_t>(mixed(static_cast<uint64_t>(place) + static_cast<uint64_t>(c.start)));
}

}  // namespace rarefy::RAREFY_ISA
