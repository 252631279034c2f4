// The inner loops of the block kernels on vectors: dense products of small tiles whose sums stay in registers.
//
// They count in cells of 32 bits: a float32, or a pair of bfloat16 whose two products are added at once.
//
// Vectors run along the outputs, so that results are written as they are and nothing is transposed: one product of a
// token is a broadcast of its input. Inputs are first copied to "panels": runs of `unit` cells (16, or 8 where 16 does
// not divide the block) of all tokens of a chunk, [cells / unit][room][unit]. That makes every address of an inner loop
// a constant offset, and keeps rows whose distance is a power of two from meeting in one set of the cache.
#pragma once
#include "blocks_ahead.h"
#include "blocks_chunks.h"
#include "blocks_vectors.h"

namespace rarefy::RAREFY_ISA {

// Sums in registers: 24 of 32 with 512-bit vectors, 12 of 16 with shorter ones.
constexpr int kSums = RAREFY_VECTOR_BYTES == 64 ? 24 : 12;

// Rows of a tile of dL/dW: two vectors of each make 16 or 8 sums, enough to hide the latency of a multiply-add.
constexpr int kGradRows = RAREFY_VECTOR_BYTES == 64 ? 8 : 4;
// The same of a tile that is one vector wide; no more than a panel of dL/dy has columns.
template <int kGradUnit>
constexpr int kTallGradRows = kGradUnit < 2 * kGradRows ? kGradUnit : 2 * kGradRows;

// Whether lines are fetched ahead: those of the next block while one is multiplied, and those of the results. Two units for
// 512-bit vectors wait for the second-level cache otherwise, for up to a fifth of the time.
constexpr bool kFetches = RAREFY_VECTOR_BYTES == 64;

// sum + input * weight for cells that are float32.
struct FloatProduct {
  template <class Floats>
  static inline __attribute__((always_inline)) Floats add(Floats sum, float input, Floats weight) {
    return sum + input * weight;
  }
};

// source [tokens, columns] with rows `stride` apart -> panels [columns / kUnit][room][kUnit]; adds the column sums to
// `sums` where that is not null.
template <int kLength, int kUnit, class Element>
void pack_panels(const Element* source, int64_t stride, int tokens, int room, int columns, float* panels, float* sums) {
  using V = Lanes<kLength>;
  for (int begin = 0; begin < tokens; begin += kTokenRun) {
    const int end = min_of(tokens, begin + kTokenRun);
    for (int c = 0; c < columns; c += kUnit) {
      typename V::Floats sum[kUnit / kLength] = {};
      float* panel = panels + static_cast<size_t>(c) * room;
      for (int t = begin; t < end; t++)
        RAREFY_UNROLL for (int i = 0; i < kUnit / kLength; i++) {
          const typename V::Floats v = V::load(source + t * stride + c + i * kLength);
          V::store(panel + static_cast<size_t>(t) * kUnit + i * kLength, v);
          sum[i] += v;
        }
      if (sums)
        for (int i = 0; i < kUnit / kLength; i++) {
          float* target = sums + c + i * kLength;
          V::store(target, V::load(target) + sum[i]);
        }
    }
  }
}

// outputs[token, 0 .. width) = bias + sum over the blocks of one line: inputs[token, block] · weights[block], where a
// weight block is [depth][width] and its inputs are `depth` cells from indices[q] * depth on.
struct LineProduct {
  const int32_t* indices;  // [blocks of the line]
  const int32_t* places;   // [blocks of the line] number of the weight block; null: the line's blocks are consecutive
  int blocks;
  int depth;
  int width;
  const float* weights;  // all blocks; where `places` is null, from the first of the line on
  const float* panels;   // inputs
  int room;              // tokens for which the panels have room
  const float* bias;     // [width] or null
  Ahead* ahead;          // asked for meanwhile

  const float* weight(int q) const {
    return weights + static_cast<size_t>(places ? places[q] : q) * depth * width;
  }
  const float* inputs(int q, int token, int unit) const {
    return panels + static_cast<size_t>(indices[q]) * depth * room + token * unit;
  }
};

// kTokens tokens and kVectors vectors of outputs.
template <class Product, int kLength, int kVectors, int kTokens, int kUnit, bool kAsks, class Element>
void multiply_tile(const LineProduct& p, int token, int output, Element* out, int64_t stride) {
  using V = Lanes<kLength>;
  typename V::Floats sum[kTokens][kVectors];
  RAREFY_UNROLL for (int v = 0; v < kVectors; v++) {
    const typename V::Floats start = p.bias ? V::load(p.bias + output + v * kLength) : typename V::Floats{};
    _Pragma("GCC unroll 32") for (int t = 0; t < kTokens; t++) sum[t][v] = start;
  }
  if constexpr (kFetches)
    _Pragma("GCC unroll 32") for (int t = 0; t < kTokens; t++)
      RAREFY_UNROLL for (int v = 0; v < kVectors; v++)
        __builtin_prefetch(out + (token + t) * stride + output + v * kLength, 1);
  const size_t panel = static_cast<size_t>(p.room) * kUnit;
  Ahead ahead = kAsks ? *p.ahead : Ahead{};
  for (int q = 0; q < p.blocks; q++) {
    const float* w = p.weight(q) + output;
    const float* x = p.inputs(q, token, kUnit);
    const int next = min_of(q + 1, p.blocks - 1);
    const int64_t next_w = p.weight(next) + output - w, next_x = p.inputs(next, token, kUnit) - x;
    for (int unit = 0; unit < p.depth; unit += kUnit, x += panel)
      for (int k = 0; k < kUnit; k++, w += p.width) {
        if constexpr (kFetches) {
          RAREFY_UNROLL for (int v = 0; v < kVectors; v++) __builtin_prefetch(w + next_w + v * kLength);
          __builtin_prefetch(x + next_x + k * kUnit);
        }
        if constexpr (kAsks) ahead.ask();
        typename V::Floats weight[kVectors];
        RAREFY_UNROLL for (int v = 0; v < kVectors; v++) weight[v] = V::load(w + v * kLength);
        _Pragma("GCC unroll 32") for (int t = 0; t < kTokens; t++) {
          const float input = x[t * kUnit + k];
          RAREFY_UNROLL for (int v = 0; v < kVectors; v++) sum[t][v] = Product::add(sum[t][v], input, weight[v]);
        }
      }
  }
  if constexpr (kAsks) *p.ahead = ahead;
  _Pragma("GCC unroll 32") for (int t = 0; t < kTokens; t++)
    RAREFY_UNROLL for (int v = 0; v < kVectors; v++)
      V::store(out + (token + t) * stride + output + v * kLength, sum[t][v]);
}

// Tokens [token, end): whole tiles, then halves of them, so that a ragged end costs about its share. It asks for nothing.
template <class Product, int kLength, int kVectors, int kTokens, int kUnit, bool kAsks, class Element>
void multiply_tokens(const LineProduct& p, int token, int end, int output, Element* out, int64_t stride) {
  for (; token + kTokens <= end; token += kTokens)
    multiply_tile<Product, kLength, kVectors, kTokens, kUnit, kAsks>(p, token, output, out, stride);
  if constexpr (kTokens > 1)
    if (token < end)
      multiply_tokens<Product, kLength, kVectors, kTokens / 2, kUnit, false>(p, token, end, output, out, stride);
}

// The same for all outputs of a line.
template <class Product, int kLength, int kUnit, bool kAsks, class Element>
void multiply_outputs(const LineProduct& p, int token, int end, Element* out, int64_t stride) {
  int output = 0;
  for (; output + 2 * kLength <= p.width; output += 2 * kLength)
    multiply_tokens<Product, kLength, 2, kSums / 2, kUnit, kAsks>(p, token, end, output, out, stride);
  if (output < p.width)
    multiply_tokens<Product, kLength, 1, kSums, kUnit, kAsks>(p, token, end, output, out, stride);
}

// Rows [token, end) of out [tokens, width], which are `stride` apart. kMayAsk: asks for what `p.ahead` still has.
template <class Product, int kLength, int kUnit, bool kMayAsk, class Element>
void multiply_line(const LineProduct& p, int token, int end, Element* out, int64_t stride) {
  if constexpr (kMayAsk)
    if (p.ahead->asks()) return multiply_outputs<Product, kLength, kUnit, true>(p, token, end, out, stride);
  multiply_outputs<Product, kLength, kUnit, false>(p, token, end, out, stride);
}

// sums [height, width] of one block, += gradᵀ · x over the tokens of a chunk; `first` starts from zero.
struct BlockGradient {
  const float* grad;  // panels of the block's rows: cells of one token, or of a pair of tokens
  const float* x;     // the same of the block's columns
  int steps;          // tokens, or pairs of tokens
  int height;
  int width;
  float* sums;
  bool first;
  Ahead* ahead;  // asked for meanwhile
};

template <class Product, int kLength, int kVectors, int kRows, int kGradUnit, int kUnit, bool kAsks>
void gradient_tile(const BlockGradient& g, int row, int column) {
  using V = Lanes<kLength>;
  const float* grad = g.grad + static_cast<size_t>(row / kGradUnit) * g.steps * kGradUnit + row % kGradUnit;
  const float* x[kVectors];
  RAREFY_UNROLL for (int v = 0; v < kVectors; v++) {
    const int at = column + v * kLength;
    x[v] = g.x + static_cast<size_t>(at / kUnit) * g.steps * kUnit + at % kUnit;
  }
  float* out = g.sums + static_cast<size_t>(row) * g.width + column;
  typename V::Floats sum[kRows][kVectors];
  RAREFY_UNROLL for (int r = 0; r < kRows; r++)
    RAREFY_UNROLL for (int v = 0; v < kVectors; v++)
      sum[r][v] = g.first ? typename V::Floats{} : V::load(out + r * g.width + v * kLength);
  Ahead ahead = kAsks ? *g.ahead : Ahead{};
  for (size_t t = 0; t < static_cast<size_t>(g.steps); t++) {
    if constexpr (kAsks) ahead.ask();
    typename V::Floats input[kVectors];
    RAREFY_UNROLL for (int v = 0; v < kVectors; v++) input[v] = V::load(x[v] + t * kUnit);
    RAREFY_UNROLL for (int r = 0; r < kRows; r++) {
      const float factor = grad[t * kGradUnit + r];
      RAREFY_UNROLL for (int v = 0; v < kVectors; v++) sum[r][v] = Product::add(sum[r][v], factor, input[v]);
    }
  }
  if constexpr (kAsks) *g.ahead = ahead;
  RAREFY_UNROLL for (int r = 0; r < kRows; r++)
    RAREFY_UNROLL for (int v = 0; v < kVectors; v++) V::store(out + r * g.width + v * kLength, sum[r][v]);
}

template <class Product, int kLength, int kGradUnit, int kUnit, bool kAsks>
void gradient_tiles(const BlockGradient& g) {
  constexpr int kTallRows = kTallGradRows<kGradUnit>;
  int column = 0;
  for (; column + 2 * kLength <= g.width; column += 2 * kLength)
    for (int row = 0; row < g.height; row += kGradRows)
      gradient_tile<Product, kLength, 2, kGradRows, kGradUnit, kUnit, kAsks>(g, row, column);
  if (column < g.width)
    for (int row = 0; row < g.height; row += kTallRows)
      gradient_tile<Product, kLength, 1, kTallRows, kGradUnit, kUnit, kAsks>(g, row, column);
}

template <class Product, int kLength, int kGradUnit, int kUnit, bool kMayAsk>
void gradient_block(const BlockGradient& g) {
  if constexpr (kMayAsk)
    if (g.ahead->asks()) return gradient_tiles<Product, kLength, kGradUnit, kUnit, true>(g);
  gradient_tiles<Product, kLength, kGradUnit, kUnit, false>(g);
}

// One block [height, width] -> [width, height].
RAREFY_INLINE void transpose_block(const float* block, int height, int width, float* target) {
  if (height % kLanes || width % kLanes) {
    for (int r = 0; r < height; r++)
      for (int c = 0; c < width; c++) target[c * height + r] = block[r * width + c];
    return;
  }
  for (int r = 0; r < height; r += kLanes)
    for (int c = 0; c < width; c += kLanes) {
      Vec square[kLanes];
      RAREFY_UNROLL for (int i = 0; i < kLanes; i++) square[i] = load(block + (r + i) * width + c);
      transpose(square);
      RAREFY_UNROLL for (int i = 0; i < kLanes; i++) store(target + (c + i) * height + r, square[i]);
    }
}

}  // namespace rarefy::RAREFY_ISA
