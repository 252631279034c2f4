// Cells that are pairs of bfloat16: how inputs, gradients and weights become such cells. For float32 weights [blocks,
// height, width], with both sizes multiples of 16, and 512-bit vectors.
#pragma once
#include "blocks_product.h"

namespace rarefy::RAREFY_ISA {

static_assert(kLanes == 16, "these kernels are compiled for 512-bit vectors");

// The upper halves of float32, rounded to nearest even, as numbers below 65536; a NaN stays a (quiet) NaN.
RAREFY_INLINE UintVec rounded(Vec v) {
  const UintVec bits = reinterpret_cast<UintVec>(v);
  const UintVec is_nan = reinterpret_cast<UintVec>(v != v);
  return (((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) & ~is_nan) | (((bits >> 16) | 0x40u) & is_nan);
}

RAREFY_INLINE void store_cells(float* p, UintVec cells) { store(p, reinterpret_cast<Vec>(cells)); }

// matrix [rows, columns] -> cells [rows / 2][columns]: pairs of rows.
RAREFY_INLINE void pair_rows(const float* matrix, int rows, int columns, float* cells) {
  for (int r = 0; r < rows; r += 2)
    for (int c = 0; c < columns; c += kLanes) {
      const UintVec even = rounded(load(matrix + static_cast<size_t>(r) * columns + c));
      const UintVec odd = rounded(load(matrix + static_cast<size_t>(r + 1) * columns + c));
      store_cells(cells + static_cast<size_t>(r / 2) * columns + c, even | odd << 16);
    }
}

// block [height, width] -> cells [width / 2][height], a strip of 32 columns at a time.
RAREFY_INLINE void pair_columns(const float* block, int height, int width, float* cells) {
  for (int c = 0; c < width; c += kLanes)
    for (int r = 0; r < height; r += kLanes) {
      Vec square[kLanes];
      RAREFY_UNROLL for (int i = 0; i < kLanes; i++) square[i] = load(block + static_cast<size_t>(r + i) * width + c);
      transpose(square);
      RAREFY_UNROLL for (int i = 0; i < kLanes; i += 2)
        store_cells(cells + static_cast<size_t>((c + i) / 2) * height + r, rounded(square[i]) | rounded(square[i + 1]) << 16);
    }
}

RAREFY_INLINE UintVec halves(const Bfloat16* p) {
  return __builtin_convertvector(*reinterpret_cast<const HalfVec*>(p), UintVec);
}

// source [tokens, columns] -> cells of two neighbouring features, [columns / 2 / kUnit][room][kUnit]; tokens from `tokens`
// to `room` are zero. Adds the column sums to `sums` where that is not null.
template <int kUnit>
void pack_features(const Bfloat16* source, int64_t stride, int tokens, int room, int columns, float* panels, float* sums) {
  for (int begin = 0; begin < tokens; begin += kTokenRun) {
    const int end = min_of(tokens, begin + kTokenRun);
    for (int c = 0; c < columns; c += 2 * kUnit) {
      float* panel = panels + static_cast<size_t>(c / 2) * room;
      Vec sum[kUnit / 8] = {};
      for (int t = begin; t < end; t++) {
        const Bfloat16* p = source + t * stride + c;
        memcpy(panel + static_cast<size_t>(t) * kUnit, p, kUnit * 4);
        if (sums)
          RAREFY_UNROLL for (int i = 0; i < kUnit / 8; i++) sum[i] += load(p + i * kLanes);
      }
      if (sums)
        RAREFY_UNROLL for (int i = 0; i < kUnit / 8; i++)
          store(sums + c + i * kLanes, load(sums + c + i * kLanes) + sum[i]);
    }
  }
  for (int c = 0; c < columns && tokens < room; c += 2 * kUnit)
    memset(panels + static_cast<size_t>(c / 2) * room + static_cast<size_t>(tokens) * kUnit, 0,
           static_cast<size_t>(room - tokens) * kUnit * 4);
}

// source [tokens, columns] -> cells of two neighbouring tokens, [columns / 16][room / 2][16]; tokens from `tokens` to `room`
// are zero. `kTransposed`: squares of 16 pairs of tokens become [16 columns][16 pairs]; room is then a multiple of 32.
template <bool kTransposed>
void pack_tokens(const Bfloat16* source, int64_t stride, int tokens, int room, int columns, float* panels) {
  constexpr int kStep = 32;
  for (int begin = 0; begin < room; begin += kStep)
    for (int c = 0; c < columns; c += kLanes) {
      float* panel = panels + static_cast<size_t>(c) * (room / 2) + static_cast<size_t>(begin / 2) * kLanes;
      Vec square[kLanes];
      RAREFY_UNROLL for (int i = 0; i < kLanes; i++) {
        const int t = begin + 2 * i;
        const UintVec even = t < tokens ? halves(source + t * stride + c) : UintVec{};
        const UintVec odd = t + 1 < tokens ? halves(source + (t + 1) * stride + c) : UintVec{};
        square[i] = reinterpret_cast<Vec>(even | odd << 16);
      }
      if (kTransposed) transpose(square);
      const int present = min_of(kLanes, (room - begin) / 2);
      for (int i = 0; i < present; i++) store(panel + i * kLanes, square[i]);
    }
}

}  // namespace rarefy::RAREFY_ISA
