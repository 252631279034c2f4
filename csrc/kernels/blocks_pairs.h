// Cells that are pairs of bfloat16, and how weights become such cells. For float32 weights [blocks, height, width], with
// both sizes multiples of 16, and 512-bit vectors with avx512_bf16.
#pragma once
#include "blocks_product.h"

namespace rarefy::RAREFY_ISA {

static_assert(kLanes == 16, "these kernels are compiled for 512-bit vectors");

// 16 cells as 32 numbers of 16 bits.
typedef uint16_t WordVec __attribute__((vector_size(64), may_alias));
typedef uint16_t UnalignedWords __attribute__((vector_size(64), may_alias, aligned(2)));

RAREFY_INLINE void store_cells(float* p, WordVec cells) { store(p, reinterpret_cast<Vec>(cells)); }

// `first` and then `second` as bfloat16, rounded to nearest even; a NaN stays a (quiet) NaN.
RAREFY_INLINE WordVec narrowed(Vec first, Vec second) {
  return reinterpret_cast<WordVec>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
}

// Where the cell of a pair of inputs and an output lies in a block: pair after pair.
struct PairAfterPair {
  int outputs;

  size_t at(int pair, int output) const { return static_cast<size_t>(pair) * outputs + output; }
};

// block [height, width] -> cells of two rows each, at (row / 2, column) of `order`.
template <class Order>
void pair_rows(const float* block, int height, int width, Order order, float* cells) {
  for (int r = 0; r < height; r += 2)
    for (int c = 0; c < width; c += kLanes) {
      const float* even = block + static_cast<size_t>(r) * width + c;
      const WordVec both = narrowed(load(even), load(even + width));
      store_cells(cells + order.at(r / 2, c),
                  __builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25,
                                          10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
    }
}

// kColumns columns of 16 rows -> cells of two columns each, at (column / 2, row) of `order`.
template <int kColumns, class Order>
RAREFY_INLINE void pair_columns_of_strip(const float* block, int width, int row, int column, Order order, float* cells) {
  Vec square[kLanes];
  const float* strip = block + static_cast<size_t>(row) * width + column;
  RAREFY_UNROLL for (int i = 0; i < kLanes; i++) {
    const float* values = strip + static_cast<size_t>(i) * width;
    square[i] = reinterpret_cast<Vec>(narrowed(load(values), kColumns > kLanes ? load(values + kLanes) : Vec{}));
  }
  transpose(square);
  RAREFY_UNROLL for (int i = 0; i < kColumns / 2; i++) store(cells + order.at(column / 2 + i, row), square[i]);
}

// block [height, width] -> cells of two columns each, at (column / 2, row) of `order`.
template <class Order>
void pair_columns(const float* block, int height, int width, Order order, float* cells) {
  for (int r = 0; r < height; r += kLanes) {
    int c = 0;
    for (; c + 2 * kLanes <= width; c += 2 * kLanes)
      pair_columns_of_strip<2 * kLanes>(block, width, r, c, order, cells);
    if (c < width) pair_columns_of_strip<kLanes>(block, width, r, c, order, cells);
  }
}

}  // namespace rarefy::RAREFY_ISA
