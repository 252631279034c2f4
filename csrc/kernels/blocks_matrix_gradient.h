// dL/dW of blocks with the matrix unit: a product over tokens, of which two neighbours make a cell.
#pragma once
#include "blocks_matrix.h"

namespace rarefy::RAREFY_ISA {

// Cells of two neighbouring tokens, [columns / 16][room / 2][16]; `kTransposed`: squares of 16 such cells of 16 columns become
// [16 columns][16 pairs]. `room` is a multiple of 32.
struct PairPanels {
  float* cells;
  int room;

  size_t panel() const { return static_cast<size_t>(room / 2) * kStrip; }
  float* square(int strip, int token) const { return cells + panel() * strip + static_cast<size_t>(token / 2) * kStrip; }
};

// Words 0 to 15 (kHalf = 0) or 16 to 31 of two rows in turn: cells of two tokens.
template <int kHalf>
RAREFY_INLINE Vec interleaved(WordVec even, WordVec odd) {
  constexpr int h = 16 * kHalf, o = 32 + h;
  return reinterpret_cast<Vec>(__builtin_shufflevector(
      even, odd, h, o, h + 1, o + 1, h + 2, o + 2, h + 3, o + 3, h + 4, o + 4, h + 5, o + 5, h + 6, o + 6, h + 7, o + 7, h + 8,
      o + 8, h + 9, o + 9, h + 10, o + 10, h + 11, o + 11, h + 12, o + 12, h + 13, o + 13, h + 14, o + 14, h + 15, o + 15));
}

// Sum over the tokens of the cells of 16 columns.
RAREFY_INLINE Vec add_pairs(Vec sum, const Vec* cells) {
  const __m512i ones = _mm512_set1_epi16(0x3f80);
  __m512 sums = reinterpret_cast<__m512>(sum);
  RAREFY_UNROLL for (int i = 0; i < kLanes; i++)
    sums = _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(cells[i]), reinterpret_cast<__m512bh>(ones));
  return reinterpret_cast<Vec>(sums);
}

// Row t of 32 columns of which `present` are there; of zeros where t is not among the tokens.
template <bool kWhole>
RAREFY_INLINE WordVec row_of(const Bfloat16* source, int64_t stride, int t, int tokens, __mmask32 present) {
  if constexpr (kWhole) return *reinterpret_cast<const UnalignedWords*>(source + t * stride);
  return reinterpret_cast<WordVec>(_mm512_maskz_loadu_epi16(t < tokens ? present : 0, source + t * stride));
}

// 16 columns of 32 tokens: half kHalf of 32 columns. `kWhole`: all of the tokens and columns are there.
template <bool kTransposed, bool kWhole, int kHalf>
RAREFY_INLINE void pack_square(const Bfloat16* source, int64_t stride, int tokens, __mmask32 present, float* square,
                               float* sums) {
  Vec cells[kLanes];
  RAREFY_UNROLL for (int i = 0; i < kLanes; i++)
    cells[i] = interleaved<kHalf>(row_of<kWhole>(source, stride, 2 * i, tokens, present),
                                  row_of<kWhole>(source, stride, 2 * i + 1, tokens, present));
  if (sums) store(sums, add_pairs(load(sums), cells));
  if constexpr (kTransposed) transpose(cells);
  RAREFY_UNROLL for (int i = 0; i < kLanes; i++) store(square + i * kLanes, cells[i]);
}

// source [tokens, columns] -> panels at `token`, for 32 tokens of which `tokens` are there and the others are zero. Adds the
// column sums to `sums` where that is not null.
template <bool kTransposed>
void pack_pairs(const Bfloat16* source, int64_t stride, int tokens, int columns, const PairPanels& panels, int token,
                float* sums) {
  for (int c = 0; c < columns; c += 2 * kLanes) {
    float *left = panels.square(c / kStrip, token), *right = left + panels.panel();
    float *left_sums = sums ? sums + c : nullptr, *right_sums = sums ? sums + c + kLanes : nullptr;
    if (tokens >= kTokenStep && c + 2 * kLanes <= columns) {
      pack_square<kTransposed, true, 0>(source + c, stride, tokens, 0, left, left_sums);
      pack_square<kTransposed, true, 1>(source + c, stride, tokens, 0, right, right_sums);
      continue;
    }
    const bool is_half = c + kLanes == columns;
    const __mmask32 present = is_half ? 0xffffu : 0xffffffffu;
    pack_square<kTransposed, false, 0>(source + c, stride, tokens, present, left, left_sums);
    if (is_half) break;
    pack_square<kTransposed, false, 1>(source + c, stride, tokens, present, right, right_sums);
  }
}

// What up to four strips of rows of dL/dW, each 16 rows of any block in one block column, add up.
struct StripGradients {
  const float* grad[4];  // panels of dL/dy
  float* sums[4];
  const float* next[4];  // sums that come next
  const float* x;  // panels of 16 or 32 columns
  size_t panel;    // cells
  int64_t bytes;   // of a row of sums
  bool first;      // sums start from zero
};

// Two rows of the sums that come next: those of another block, whose place the processor does not guess.
template <int kRows, int kColumns>
RAREFY_INLINE void fetch_sums(const StripGradients& g, int row) {
  for (int r = row & 15; r < (row & 15) + 2; r++)
    RAREFY_UNROLL for (int i = 0; i < kRows * kColumns; i++)
      __builtin_prefetch(reinterpret_cast<const char*>(g.next[i / kColumns]) + r * g.bytes + i % kColumns * 64, 1);
}

#define RAREFY_WHERE(condition, ...) \
  do {                               \
    if constexpr (condition) {       \
      __VA_ARGS__;                   \
    }                                \
  } while (false)

// kRows strips (1 or 2) with 32 columns.
template <int kRows>
void add_wide_gradients(const StripGradients& g) {
  const float *upper = g.grad[0], *lower = g.grad[kRows - 1], *left = g.x, *right = g.x + g.panel;
  float *above = g.sums[0], *below = g.sums[kRows - 1];
  const int64_t bytes = g.bytes;
  if (g.first) {
    begin_sums(nullptr, nullptr);
  } else {
    RAREFY_TILE_LOAD(0, above, bytes);
    RAREFY_TILE_LOAD(1, above + kStrip, bytes);
    RAREFY_WHERE(kRows == 2, RAREFY_TILE_LOAD(2, below, bytes));
    RAREFY_WHERE(kRows == 2, RAREFY_TILE_LOAD(3, below + kStrip, bytes));
  }
  const size_t panel = g.panel;
  int row = 0;
  for (size_t at = 0; at < panel; at += 256, row += 2) {
    fetch_sums<kRows, 2>(g, row);
    RAREFY_TILE_LOAD(6, left + at, 64);
    RAREFY_TILE_LOAD(4, upper + at, 64);
    RAREFY_TILE_LOAD(7, right + at, 64);
    RAREFY_WHERE(kRows == 2, RAREFY_TILE_LOAD(5, lower + at, 64));
    RAREFY_TILE_MULTIPLY(0, 4, 6);
    RAREFY_TILE_MULTIPLY(1, 4, 7);
    RAREFY_WHERE(kRows == 2, RAREFY_TILE_MULTIPLY(2, 5, 6));
    RAREFY_WHERE(kRows == 2, RAREFY_TILE_MULTIPLY(3, 5, 7));
  }
  RAREFY_TILE_STORE(0, above, bytes);
  RAREFY_TILE_STORE(1, above + kStrip, bytes);
  RAREFY_WHERE(kRows == 2, RAREFY_TILE_STORE(2, below, bytes));
  RAREFY_WHERE(kRows == 2, RAREFY_TILE_STORE(3, below + kStrip, bytes));
}

// kRows strips (1 to 4) with 16 columns.
template <int kRows>
void add_narrow_gradients(const StripGradients& g) {
  const float *a = g.grad[0], *b = g.grad[1], *c = g.grad[2], *d = g.grad[3], *x = g.x;
  const int64_t bytes = g.bytes;
  if (g.first) {
    begin_sums(nullptr, nullptr);
  } else {
    RAREFY_TILE_LOAD(0, g.sums[0], bytes);
    RAREFY_WHERE(kRows > 1, RAREFY_TILE_LOAD(1, g.sums[1], bytes));
    RAREFY_WHERE(kRows > 2, RAREFY_TILE_LOAD(2, g.sums[2], bytes));
    RAREFY_WHERE(kRows > 3, RAREFY_TILE_LOAD(3, g.sums[3], bytes));
  }
  const size_t panel = g.panel;
  int row = 0;
  for (size_t at = 0; at < panel; at += 256, row += 2) {
    fetch_sums<kRows, 1>(g, row);
    RAREFY_TILE_LOAD(6, x + at, 64);
    RAREFY_TILE_LOAD(4, a + at, 64);
    RAREFY_TILE_MULTIPLY(0, 4, 6);
    RAREFY_WHERE(kRows > 1, RAREFY_TILE_LOAD(5, b + at, 64); RAREFY_TILE_MULTIPLY(1, 5, 6));
    RAREFY_WHERE(kRows > 2, RAREFY_TILE_LOAD(4, c + at, 64); RAREFY_TILE_MULTIPLY(2, 4, 6));
    RAREFY_WHERE(kRows > 3, RAREFY_TILE_LOAD(5, d + at, 64); RAREFY_TILE_MULTIPLY(3, 5, 6));
  }
  RAREFY_TILE_STORE(0, g.sums[0], bytes);
  RAREFY_WHERE(kRows > 1, RAREFY_TILE_STORE(1, g.sums[1], bytes));
  RAREFY_WHERE(kRows > 2, RAREFY_TILE_STORE(2, g.sums[2], bytes));
  RAREFY_WHERE(kRows > 3, RAREFY_TILE_STORE(3, g.sums[3], bytes));
}
#undef RAREFY_WHERE

// `count` strips of rows.
RAREFY_INLINE void add_gradients(const StripGradients& g, int count, bool is_wide) {
  if (is_wide)
    count == 2 ? add_wide_gradients<2>(g) : add_wide_gradients<1>(g);
  else if (count > 2)
    count == 4 ? add_narrow_gradients<4>(g) : add_narrow_gradients<3>(g);
  else
    count == 2 ? add_narrow_gradients<2>(g) : add_narrow_gradients<1>(g);
}

}  // namespace rarefy::RAREFY_ISA
