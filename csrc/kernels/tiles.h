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

RAREFY_INLINE void load_tile(const KeepRegularCall& c, int64_t tile, float* __restrict scores) {
  const int64_t begin = tile_begin(c, tile);
  for (int r = 0; r < c.side; r++)
    for (int i = 0; i < c.side; i++) scores[r * c.side + i] = c.scores[begin + r * c.columns + i];
  if (!c.marked) return;
  for (int r = 0; r < c.side; r++)
    for (int i = 0; i < c.side; i++) {
      float& score = scores[r * c.side + i];
      score = c.marked[begin + r * c.columns + i] ? c.fill : score;
    }
}

RAREFY_INLINE void store_tile(const KeepRegularCall& c, int64_t tile, const uint8_t* __restrict kept) {
  uint8_t* mask = c.mask + tile_begin(c, tile);
  for (int r = 0; r < c.side; r++)
    for (int i = 0; i < c.side; i++) mask[r * c.columns + i] = kept[r * c.side + i];
}

// The key of an entry by the order that rarefy/ties.py defines (SplitMix64's finalizer): the lowest wins.
RAREFY_INLINE int64_t tie_key(const KeepRegularCall& c, int64_t entry) {
  const int64_t place = c.places ? c.places[entry] : entry;
  uint64_t x = static_cast<uint64_t>(place) + static_cast<uint64_t>(c.start);
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return static_cast<int64_t>(x ^ (x >> 31));
}

}  // namespace rarefy::RAREFY_ISA
