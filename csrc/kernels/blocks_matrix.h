// Products of the block kernels with the matrix unit: 32 tokens and 32 outputs at a time, two tiles each way.
//
// A tile is 16 rows of tokens, and its rows may be any distance apart: inputs are read where they lie. Outputs are written 32
// at a time, whole lines of the cache, also where the two strips of 16 belong to different blocks.
#pragma once
#include "blocks_pairs.h"
#include "blocks_tiles.h"

namespace rarefy::RAREFY_ISA {

constexpr int kTokenStep = 32;
constexpr int kStrip = 16;  // outputs of a tile

// Rows of activations. Where the last step is short of tokens, it is read from a copy with rows of zeros below.
struct TokenRows {
  const Bfloat16* first;
  int64_t stride;
  int tokens;
  const Bfloat16* last_step;  // [32, stride]; null where the steps are whole

  const Bfloat16* step(int token) const {
    return token + kTokenStep <= tokens ? first + token * stride : last_step;
  }
};

// Copies the last step of `rows`, if it is short, to `copy` [32, stride].
static inline TokenRows with_whole_steps(const Bfloat16* rows, int64_t stride, int tokens, Bfloat16* copy) {
  const int whole = tokens / kTokenStep * kTokenStep;
  const size_t present = static_cast<size_t>((tokens - whole) * stride);
  if (present) {
    memcpy(copy, rows + whole * stride, present * sizeof(Bfloat16));
    memset(copy + present, 0, static_cast<size_t>(kTokenStep * stride) * sizeof(Bfloat16) - present * sizeof(Bfloat16));
  }
  return {.first = rows, .stride = stride, .tokens = tokens, .last_step = present ? copy : nullptr};
}

// Cells of weights tile after tile: kUnit pairs of inputs for 16 outputs, then the same pairs for the next outputs.
template <int kUnit>
struct TileAfterTile {
  int outputs;

  size_t at(int pair, int output) const {
    const int tile = pair / kUnit * (outputs / kStrip) + output / kStrip;
    return (static_cast<size_t>(tile) * kUnit + pair % kUnit) * kStrip + output % kStrip;
  }
};

// Rows that the next turn reads, fetched share by share meanwhile: tiles take their lines in an order that the processor does
// not guess. Long rows would push out what this turn needs.
struct RowsAhead {
  const Bfloat16* first;
  int64_t size;

  static RowsAhead of(const void* rows, int64_t columns, int64_t token, int64_t end, int64_t turn) {
    constexpr int64_t most = int64_t{48} << 10;
    const int64_t size = max_of(int64_t{0}, min_of(turn, end - token)) * columns;
    return {static_cast<const Bfloat16*>(rows) + token * columns, size > most ? 0 : size};
  }
  // The lines of strips `strip` and the next one, of `strips`.
  void fetch(int strip, int strips) const {
    constexpr int64_t line = 64 / sizeof(Bfloat16);
    const int64_t end = size * min_of(strip + 2, strips) / strips;
    for (int64_t i = size * strip / strips / line * line; i < end; i += line) __builtin_prefetch(first + i, 0, 2);
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
void add_strip(const Strip& strip, const Bfloat16* rows, int64_t stride, int depth, int64_t width) {
  const Bfloat16* lower = rows + 16 * stride;
  const float* cells = strip.cells;
  for (int q = 0; q < strip.blocks; q++) {
    const int64_t column = static_cast<int64_t>(strip.indices[q]) * depth;
    for (int k = 0; k < depth; k += 2 * kUnit, cells += kUnit * width) {
      RAREFY_TILE_LOAD(6, cells, 64);
      RAREFY_TILE_LOAD(4, rows + column + k, stride * 2);
      RAREFY_TILE_LOAD(5, lower + column + k, stride * 2);
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
void add_both_strips(const Strip& strip, const Bfloat16* rows, int64_t stride, int depth, int64_t width) {
  const Bfloat16* lower = rows + 16 * stride;
  const float* cells = strip.cells;
  for (int q = 0; q < strip.blocks; q++) {
    const int64_t column = static_cast<int64_t>(strip.indices[q]) * depth;
    for (int k = 0; k < depth; k += 2 * kUnit, cells += kUnit * width) {
      RAREFY_TILE_LOAD(6, cells, 64);
      RAREFY_TILE_LOAD(4, rows + column + k, stride * 2);
      RAREFY_TILE_LOAD(7, cells + kUnit * kStrip, 64);
      RAREFY_TILE_LOAD(5, lower + column + k, stride * 2);
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

// sums [2][16][16], of two neighbouring strips -> rows of `out`; of the second one nothing where that `is_alone`.
RAREFY_INLINE void write_rows(const float* sums, int tokens, bool is_alone, Bfloat16* out, int64_t stride) {
  if (tokens == 16 && !is_alone) {
    RAREFY_UNROLL for (int t = 0; t < 16; t++)
      *reinterpret_cast<UnalignedWords*>(out + t * stride) = narrowed(load(sums + t * 16), load(sums + 256 + t * 16));
    return;
  }
  const __mmask32 wanted = is_alone ? 0xffffu : 0xffffffffu;
  for (int t = 0; t < tokens; t++) {
    const WordVec both = narrowed(load(sums + t * 16), load(sums + 256 + t * 16));
    _mm512_mask_storeu_epi16(out + t * stride, wanted, reinterpret_cast<__m512i>(both));
  }
}

// out[token, output] = bias[output] + rows[token] · the blocks of this output.
struct RowProduct {
  CellBlocks weights;
  TokenRows rows;
  const float* bias;  // or null
  Bfloat16* out;
  int64_t stride;
  RowsAhead ahead;

  void write_sums(int token, int strip, bool is_alone, float* sums) const {
    Bfloat16* target = out + token * stride + static_cast<int64_t>(strip) * kStrip;
    RAREFY_TILE_STORE(0, sums, 64);
    RAREFY_TILE_STORE(1, sums + 256, 64);
    write_rows(sums, min_of(16, rows.tokens - token), is_alone, target, stride);
    if (token + 16 >= rows.tokens) return;
    RAREFY_TILE_STORE(2, sums, 64);
    RAREFY_TILE_STORE(3, sums + 256, 64);
    write_rows(sums, min_of(16, rows.tokens - token - 16), is_alone, target + 16 * stride, stride);
  }

  // Strip `number` and the next one, or that strip alone, for the tokens [begin, end).
  template <int kUnit>
  void run_strips(int number, bool is_alone, int begin, int end) const {
    const Strip left = weights.template strip<kUnit>(number);
    const Strip right = is_alone ? left : weights.template strip<kUnit>(number + 1);
    const bool is_one_line = !is_alone && left.line == right.line;
    const float* left_bias = bias ? bias + static_cast<int64_t>(number) * kStrip : nullptr;
    const float* right_bias = is_alone || !bias ? left_bias : left_bias + kStrip;
    alignas(64) float sums[2 * 256];
    for (int token = begin; token < end; token += kTokenStep) {
      const Bfloat16* inputs = rows.step(token);
      begin_sums(left_bias, right_bias);
      if (is_one_line) {
        add_both_strips<kUnit>(left, inputs, rows.stride, weights.depth, weights.width);
      } else {
        add_strip<true, kUnit>(left, inputs, rows.stride, weights.depth, weights.width);
        if (!is_alone) add_strip<false, kUnit>(right, inputs, rows.stride, weights.depth, weights.width);
      }
      write_sums(token, number, is_alone, sums);
    }
  }

  // Fetches the lines that a strip and the next one will be written to.
  void fetch_outputs(int strip, int begin, int end) const {
    const Bfloat16* target = out + static_cast<int64_t>(strip) * kStrip;
    for (int token = begin; token < end; token++) __builtin_prefetch(target + token * stride, 0, 2);
  }

  // The outputs of `lines`, for the tokens [begin, end), where begin is a multiple of 32. Tiles are configured for kUnit.
  template <int kUnit>
  void run(Range lines, int begin, int end) const {
    const int first = lines.begin * weights.strips(), last = lines.end * weights.strips();
    for (int number = first; number < last; number += 2) {
      ahead.fetch(number - first, last - first);
      if (number + 2 < last) fetch_outputs(number + 2, begin, end);
      run_strips<kUnit>(number, number + 1 == last, begin, end);
    }
  }
};

// Tokens that take their turn together: more where weights outgrow the second-level cache, so that they are read less often;
// as few as possible otherwise, so that rows of inputs and outputs stay near.
RAREFY_INLINE int tokens_of_a_turn(int64_t weights) {
  constexpr int64_t near = int64_t{600} << 10, far = int64_t{4} << 20;
  if (weights <= near) return kTokenStep;
  return weights <= far ? 2 * kTokenStep : 4 * kTokenStep;
}

}  // namespace rarefy::RAREFY_ISA
