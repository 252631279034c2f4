// Products of the block kernels with the matrix unit: 32 tokens and 32 outputs at a time, two tiles each way.
//
// A tile is 16 rows of tokens, and its rows may be any distance apart: inputs are read where they lie, or from a copy. Outputs
// are written 32 at a time, whole lines of the cache, also where the two strips of 16 belong to different blocks.
#pragma once
#include "blocks_matrix_rows.h"

namespace rarefy::RAREFY_ISA {

// Cells of weights tile after tile: kUnit pairs of inputs for 16 outputs, then the same pairs for the next outputs.
template <int kUnit>
struct TileAfterTile {
  int outputs;

  size_t at(int pair, int output) const {
    const int tile = pair / kUnit * (outputs / kStrip) + output / kStrip;
    return (static_cast<size_t>(tile) * kUnit + pair % kUnit) * kStrip + output % kStrip;
  }
};

// The blocks that give 16 outputs.
struct Strip {
  const int32_t* indices;  // [blocks] inputs from indices[q] * depth on
  int blocks;
  const float* cells;  // of the first block, from the tile of these outputs on
  int line;
};

// W or its transpose as blocks of cells, line after line.
struct CellBlocks {
  BlockLines lines;
  int depth;  // inputs
  int width;  // outputs
  const float* cells;

  int strips() const { return width / kStrip; }  // of a line
  template <int kUnit>
  Strip strip(int number) const {
    const int line = number / strips();
    const int32_t begin = lines.starts[line];
    return {
        .indices = lines.indices + begin,
        .blocks = lines.starts[line + 1] - begin,
        .cells = cells + begin * (static_cast<int64_t>(depth / 2) * width) + number % strips() * (kUnit * kStrip),
        .line = line,
    };
  }
};

// sums of tiles 0 and 2 (left), or 1 and 3, += inputs of 32 tokens · the blocks of a strip. Tiles of inputs have kUnit cells.
template <bool kLeft, int kUnit>
void add_strip(const Strip& strip, const TokenRows& rows, int token, int depth, int64_t width) {
  const Bfloat16 *upper = rows.step(token), *lower = upper + kStrip * rows.stride;
  const int64_t across = rows.across, bytes = rows.stride * static_cast<int64_t>(sizeof(Bfloat16));
  const float* cells = strip.cells;
  for (int q = 0; q < strip.blocks; q++) {
    int64_t at = strip.indices[q] * depth * across;
    for (int k = 0; k < depth; k += 2 * kUnit, at += 2 * kUnit * across, cells += kUnit * width) {
      RAREFY_TILE_LOAD(6, cells, 64);
      RAREFY_TILE_LOAD(4, upper + at, bytes);
      RAREFY_TILE_LOAD(5, lower + at, bytes);
      if constexpr (kLeft) {
        RAREFY_TILE_MULTIPLY(0, 4, 6);
        RAREFY_TILE_MULTIPLY(2, 5, 6);
      } else {
        RAREFY_TILE_MULTIPLY(1, 4, 6);
        RAREFY_TILE_MULTIPLY(3, 5, 6);
      }
    }
  }
}

// The same for two strips of one line, which share their inputs.
template <int kUnit>
void add_both_strips(const Strip& strip, const TokenRows& rows, int token, int depth, int64_t width) {
  const Bfloat16 *upper = rows.step(token), *lower = upper + kStrip * rows.stride;
  const int64_t across = rows.across, bytes = rows.stride * static_cast<int64_t>(sizeof(Bfloat16));
  const float* cells = strip.cells;
  for (int q = 0; q < strip.blocks; q++) {
    int64_t at = strip.indices[q] * depth * across;
    for (int k = 0; k < depth; k += 2 * kUnit, at += 2 * kUnit * across, cells += kUnit * width) {
      RAREFY_TILE_LOAD(6, cells, 64);
      RAREFY_TILE_LOAD(4, upper + at, bytes);
      RAREFY_TILE_LOAD(7, cells + kUnit * kStrip, 64);
      RAREFY_TILE_LOAD(5, lower + at, bytes);
      RAREFY_TILE_MULTIPLY(0, 4, 6);
      RAREFY_TILE_MULTIPLY(1, 4, 7);
      RAREFY_TILE_MULTIPLY(2, 5, 6);
      RAREFY_TILE_MULTIPLY(3, 5, 7);
    }
  }
}

// Tiles 0 to 3 begin as the bias of two strips: 16 times the same row.
RAREFY_INLINE void begin_sums(const float* left, const float* right) {
  if (!left) {
    RAREFY_TILE_ZERO(0);
    RAREFY_TILE_ZERO(1);
    RAREFY_TILE_ZERO(2);
    RAREFY_TILE_ZERO(3);
    return;
  }
  RAREFY_TILE_LOAD(0, left, 0);
  RAREFY_TILE_LOAD(1, right, 0);
  RAREFY_TILE_LOAD(2, left, 0);
  RAREFY_TILE_LOAD(3, right, 0);
}

// Row t of sums [2][16][16], of two neighbouring strips.
RAREFY_INLINE WordVec output_row(const float* sums, int t) { return narrowed(load(sums + t * 16), load(sums + 256 + t * 16)); }

// The same sums -> rows of `out`, past the caches where `is_past`; of the second strip nothing where that `is_alone`.
RAREFY_INLINE void write_rows(const float* sums, int tokens, bool is_alone, Bfloat16* out, int64_t stride, bool is_past) {
  if (tokens == 16 && !is_alone) {
    if (is_past) {
      RAREFY_UNROLL for (int t = 0; t < 16; t++)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + t * stride), reinterpret_cast<__m512i>(output_row(sums, t)));
    } else {
      RAREFY_UNROLL for (int t = 0; t < 16; t++)
        *reinterpret_cast<UnalignedWords*>(out + t * stride) = output_row(sums, t);
    }
    return;
  }
  const __mmask32 wanted = is_alone ? 0xffffu : 0xffffffffu;
  for (int t = 0; t < tokens; t++) {
    _mm512_mask_storeu_epi16(out + t * stride, wanted, reinterpret_cast<__m512i>(output_row(sums, t)));
  }
}

// out[token, output] = bias[output] + rows[token] · the blocks of this output.
struct RowProduct {
  CellBlocks weights;
  TokenRows rows;
  const float* bias;  // or null
  Bfloat16* out;
  int64_t stride;
  bool is_streamed;  // where two strips are a line of the cache
  RowsAhead ahead;

  void write_sums(int token, int strip, bool is_alone, float* sums) const {
    Bfloat16* target = out + token * stride + static_cast<int64_t>(strip) * kStrip;
    const bool is_past = is_streamed && strip % 2 == 0;
    RAREFY_TILE_STORE(0, sums, 64);
    RAREFY_TILE_STORE(1, sums + 256, 64);
    write_rows(sums, min_of(16, rows.tokens - token), is_alone, target, stride, is_past);
    if (token + 16 >= rows.tokens) return;
    RAREFY_TILE_STORE(2, sums, 64);
    RAREFY_TILE_STORE(3, sums + 256, 64);
    write_rows(sums, min_of(16, rows.tokens - token - 16), is_alone, target + 16 * stride, stride, is_past);
  }

  // Strip `number` and the next one, or that strip alone.
  template <int kUnit>
  void run_strips(int number, bool is_alone) const {
    const Strip left = weights.template strip<kUnit>(number);
    const Strip right = is_alone ? left : weights.template strip<kUnit>(number + 1);
    const bool is_one_line = !is_alone && left.line == right.line;
    const float* left_bias = bias ? bias + static_cast<int64_t>(number) * kStrip : nullptr;
    const float* right_bias = is_alone || !bias ? left_bias : left_bias + kStrip;
    alignas(64) float sums[2 * 256];
    for (int token = 0; token < rows.tokens; token += kTokenStep) {
      begin_sums(left_bias, right_bias);
      if (is_one_line) {
        add_both_strips<kUnit>(left, rows, token, weights.depth, weights.width);
      } else {
        add_strip<true, kUnit>(left, rows, token, weights.depth, weights.width);
        if (!is_alone) add_strip<false, kUnit>(right, rows, token, weights.depth, weights.width);
      }
      write_sums(token, number, is_alone, sums);
    }
  }

  // Fetches the lines that a strip and the next one will be written to.
  void fetch_outputs(int strip) const {
    const Bfloat16* target = out + static_cast<int64_t>(strip) * kStrip;
    for (int token = 0; token < rows.tokens; token++) __builtin_prefetch(target + token * stride, 0, 2);
  }

  // The outputs of `lines`. Tiles are configured for kUnit.
  template <int kUnit>
  void run(Range lines) const {
    const int first = lines.begin * weights.strips(), last = lines.end * weights.strips();
    for (int number = first; number < last; number += 2) {
      ahead.fetch(number - first, last - first);
      if (number + 2 < last && !is_streamed) fetch_outputs(number + 2);
      run_strips<kUnit>(number, number + 1 == last);
    }
  }
};

}  // namespace rarefy::RAREFY_ISA
