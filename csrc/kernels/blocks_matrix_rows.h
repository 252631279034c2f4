// Rows of activations as the matrix unit takes them, and how many take their turn together.
#pragma once
#include "blocks_pairs.h"
#include "blocks_tiles.h"

namespace rarefy::RAREFY_ISA {

constexpr int kTokenStep = 32;
constexpr int kStrip = 16;  // rows of a tile, and outputs

// Columns from `c` on of token t, where a tile begins at c, are at first + t * stride + c * across.
struct TokenRows {
  const Bfloat16* first;
  int64_t stride;
  int64_t across;
  int tokens;
  const Bfloat16* last_step;  // of 32 tokens, where not all of them are there; null where the steps are whole

  const Bfloat16* step(int token) const {
    return last_step && token + kTokenStep > tokens ? last_step : first + token * stride;
  }
};

// `rows` where they lie. A last step that is short is read from `copy` [32, stride], with rows of zeros below.
static inline TokenRows with_whole_steps(const Bfloat16* rows, int64_t stride, int tokens, Bfloat16* copy) {
  const int whole = tokens / kTokenStep * kTokenStep;
  const size_t present = static_cast<size_t>((tokens - whole) * stride);
  if (present) {
    memcpy(copy, rows + whole * stride, present * sizeof(Bfloat16));
    memset(copy + present, 0, static_cast<size_t>(kTokenStep * stride) * sizeof(Bfloat16) - present * sizeof(Bfloat16));
  }
  return {.first = rows, .stride = stride, .across = 1, .tokens = tokens, .last_step = present ? copy : nullptr};
}

// `rows` copied tile after tile: `copy` [columns / kColumns, tokens in whole steps, kColumns].
template <int kColumns>
TokenRows tile_after_tile(const Bfloat16* rows, int64_t columns, int tokens, Bfloat16* copy) {
  const int64_t room = (tokens + kTokenStep - 1) / kTokenStep * kTokenStep;
  for (int token = 0; token < room; token += kStrip)
    for (int64_t column = 0; column < columns; column += kColumns) {
      Bfloat16* tile = copy + column * room + token * kColumns;
      const Bfloat16* source = rows + token * columns + column;
      const int present = max_of(0, min_of(kStrip, tokens - token));
      for (int t = 0; t < present; t++) memcpy(tile + t * kColumns, source + t * columns, kColumns * sizeof(Bfloat16));
      if (present < kStrip) memset(tile + present * kColumns, 0, (kStrip - present) * kColumns * sizeof(Bfloat16));
    }
  return {.first = copy, .stride = kColumns, .across = room, .tokens = tokens, .last_step = nullptr};
}

// Tokens that take their turn together, and whether their rows are copied for it.
//
// More tokens where weights outgrow the second-level cache, so that they are read less often; as few as possible otherwise,
// so that rows of inputs and outputs stay near. Rows of tiles that are kilobytes apart fall into the same few sets of the
// first-level cache, and every one is on a page of its own: copying them pays where blocks read each column `often`.
struct Turns {
  int tokens;
  bool are_copied;

  // `parts`: of the outputs, each of which makes a copy for itself.
  Turns(int64_t weights, int64_t columns, int parts, int64_t often) {
    constexpr int64_t near = int64_t{600} << 10, far = int64_t{3} << 19;
    tokens = weights <= near ? kTokenStep : weights <= far ? 2 * kTokenStep : 4 * kTokenStep;
    are_copied = weights > near && weights / parts >= often * columns;
  }

  bool are_long() const { return tokens > kTokenStep; }
  // Tokens for which a copy has room.
  int copied() const { return are_copied ? tokens : kTokenStep; }

  template <int kUnit>
  TokenRows take(const Bfloat16* rows, int64_t columns, int tokens_now, Bfloat16* copy) const {
    return are_copied ? tile_after_tile<2 * kUnit>(rows, columns, tokens_now, copy)
                      : with_whole_steps(rows, columns, tokens_now, copy);
  }
};

// Whether outputs are written past the caches: so many would push out what is near, and each line be read before it is
// written. Only whole lines can be.
RAREFY_INLINE bool is_streamed(const void* out, int64_t columns, int64_t tokens) {
  constexpr int64_t most = int64_t{2} << 20;  // values
  return columns % (2 * kStrip) == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0 && columns * tokens > most;
}

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

}  // namespace rarefy::RAREFY_ISA
