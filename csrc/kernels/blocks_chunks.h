// How the work of the block kernels is split: sizes and thread count decide, never timing.
#pragma once
#include "blocks.h"
#include "partition.h"

namespace rarefy::RAREFY_ISA {

// Tokens that are copied, or written back, for all features before the next ones: a piece of a row is short and the next
// row is on another page, so that a longer run would miss the translations of addresses (up to twice the time). A
// multiple of the tokens of every tile.
constexpr int kTokenRun = 48;

RAREFY_INLINE int round_up_to(int n, int step) { return (n + step - 1) / step * step; }

// Tokens of the chunks in which `tokens` are cut for `parts` threads: about equal ones, multiples of `step`, at most `most`.
RAREFY_INLINE int chunk_tokens(int64_t tokens, int64_t most, int step, int parts) {
  const int64_t share = max_of(int64_t{1}, (tokens + parts - 1) / parts);
  const int64_t chunks = (share + most - 1) / most;
  const int64_t wanted = (share + chunks - 1) / chunks;
  return round_up_to(static_cast<int>(wanted), step);
}

// Weights for each feature of x and y: how much the products weigh against passes over activations.
RAREFY_INLINE int64_t values_a_feature(const BlocksBackwardCall& c) {
  return c.blocks() * c.shape.size() / max_of(1, c.shape.rows + c.shape.columns);
}

// First line of part k of `parts` parts with about equal numbers of blocks; an empty line counts as one block.
RAREFY_INLINE int line_begin(const BlockLines& b, int parts, int k) {
  if (k <= 0) return 0;
  if (k >= parts) return b.lines;
  const int64_t wanted = (static_cast<int64_t>(b.starts[b.lines]) + b.lines) * k / parts;
  int low = 0, high = b.lines;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (static_cast<int64_t>(b.starts[middle]) + middle < wanted)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

RAREFY_INLINE Range line_range(const BlockLines& b, int parts, int k) {
  return {line_begin(b, parts, k), line_begin(b, parts, k + 1)};
}

}  // namespace rarefy::RAREFY_ISA
