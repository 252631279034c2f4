// The matrix unit (AMX): eight tiles of 16 rows of 64 bytes, and a product of two of them that is added to a third.
//
// GCC's intrinsics for it do not say that they read memory, so that each load here is also a barrier for the compiler.
// -DRAREFY_EMULATE_TILES computes the same in plain C++: a test build for machines that lack the unit.
#pragma once
#include "simd.h"

#if defined(RAREFY_EMULATE_TILES)

namespace rarefy::RAREFY_ISA {

struct EmulatedTile {
  int rows, bytes;
  alignas(64) unsigned char data[16][64];
};
inline thread_local EmulatedTile emulated_tiles[8];

inline void emulated_configure(const unsigned char* config) {
  for (int i = 0; i < 8; i++) {
    memset(&emulated_tiles[i], 0, sizeof(EmulatedTile));
    uint16_t bytes;
    memcpy(&bytes, config + 16 + 2 * i, 2);
    emulated_tiles[i].bytes = bytes;
    emulated_tiles[i].rows = config[48 + i];
  }
}
inline void emulated_load(EmulatedTile& t, const void* p, int64_t stride) {
  memset(t.data, 0, sizeof t.data);
  for (int r = 0; r < t.rows; r++) memcpy(t.data[r], static_cast<const char*>(p) + r * stride, t.bytes);
}
inline void emulated_store(const EmulatedTile& t, void* p, int64_t stride) {
  for (int r = 0; r < t.rows; r++) memcpy(static_cast<char*>(p) + r * stride, t.data[r], t.bytes);
}
inline float emulated_element(const EmulatedTile& t, int row, int column) {
  Bfloat16 element;
  memcpy(&element, t.data[row] + 2 * column, 2);
  return to_float(element);
}
inline void emulated_multiply(EmulatedTile& c, const EmulatedTile& a, const EmulatedTile& b) {
  for (int m = 0; m < c.rows; m++)
    for (int n = 0; n < c.bytes / 4; n++) {
      float sum;
      memcpy(&sum, c.data[m] + 4 * n, 4);
      for (int k = 0; k < a.bytes / 4; k++)
        for (int i = 0; i < 2; i++) sum += emulated_element(a, m, 2 * k + i) * emulated_element(b, k, 2 * n + i);
      memcpy(c.data[m] + 4 * n, &sum, 4);
    }
}

}  // namespace rarefy::RAREFY_ISA

#define RAREFY_TILE_CONFIGURE(config) emulated_configure(config)
#define RAREFY_TILE_RELEASE() static_cast<void>(0)
#define RAREFY_TILE_ZERO(tile) memset(emulated_tiles[tile].data, 0, sizeof emulated_tiles[tile].data)
#define RAREFY_TILE_LOAD(tile, p, stride) emulated_load(emulated_tiles[tile], p, stride)
#define RAREFY_TILE_STORE(tile, p, stride) emulated_store(emulated_tiles[tile], p, stride)
#define RAREFY_TILE_MULTIPLY(c, a, b) emulated_multiply(emulated_tiles[c], emulated_tiles[a], emulated_tiles[b])

#else

#define RAREFY_TILE_BARRIER() __asm__ volatile("" ::: "memory")
#define RAREFY_TILE_CONFIGURE(config) \
  do {                                \
    RAREFY_TILE_BARRIER();            \
    _tile_loadconfig(config);         \
  } while (false)
#define RAREFY_TILE_RELEASE() _tile_release()
#define RAREFY_TILE_ZERO(tile) _tile_zero(tile)
#define RAREFY_TILE_LOAD(tile, p, stride) \
  do {                                    \
    RAREFY_TILE_BARRIER();                \
    _tile_loadd(tile, p, stride);         \
  } while (false)
#define RAREFY_TILE_STORE(tile, p, stride) \
  do {                                     \
    _tile_stored(tile, p, stride);         \
    RAREFY_TILE_BARRIER();                 \
  } while (false)
#define RAREFY_TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)

#endif

namespace rarefy::RAREFY_ISA {

// Tiles 0 to 3 are sums [16][16] of float32; 4 and 5 have 16 rows of `cells` pairs of bfloat16; 6 and 7 have `cells`
// rows of 16 pairs: sums += rows · columns.
static inline void configure_tiles(int cells) {
  alignas(64) unsigned char config[64] = {1};
  for (int i = 0; i < 8; i++) {
    const uint16_t bytes = static_cast<uint16_t>(i == 4 || i == 5 ? cells * 4 : 64);
    memcpy(config + 16 + 2 * i, &bytes, 2);
    config[48 + i] = static_cast<unsigned char>(i >= 6 ? cells : 16);
  }
  RAREFY_TILE_CONFIGURE(config);
}

}  // namespace rarefy::RAREFY_ISA
