// y = x · Wᵀ + bias for a W of blocks and bfloat16, with the matrix unit.
#include <omp.h>

#include "blocks_matrix.h"
#include "blocks_pairs_operations.h"
#include "buffer.h"

namespace rarefy::RAREFY_ISA {
namespace {

// How the work is cut: runs of tokens, each for all block rows or, where tokens are few, for a part of them.
struct ForwardPlan {
  int line_parts;  // of the block rows
  Turns turns;
  int64_t tasks;

  ForwardPlan(const BlocksForwardCall& c, int64_t weights)
      : line_parts(parts(c, turns_of(c, weights, 1))), turns(turns_of(c, weights, line_parts)),
        tasks((c.tokens + turns.tokens - 1) / turns.tokens * line_parts) {}

  static Turns turns_of(const BlocksForwardCall& c, int64_t weights, int parts) {
    constexpr int64_t often = 192;
    return {weights, c.shape.columns, parts, often};
  }
  static int parts(const BlocksForwardCall& c, const Turns& turns) {
    return c.tokens >= static_cast<int64_t>(turns.tokens) * c.threads ? 1 : c.threads;
  }
};

template <int kUnit>
bool forward_with(const BlocksForwardCall& c) {
  const BlockShape& s = c.shape;
  const int64_t blocks = c.by_row.starts[c.by_row.lines], cells = s.size() / 2;
  const ForwardPlan plan(c, blocks * s.size());
  const size_t copied = static_cast<size_t>(plan.turns.copied()) * s.columns;
  const Buffer weights(blocks * cells * sizeof(float)), copies(copied * c.threads * sizeof(Bfloat16));
  if (!weights.ok() || !copies.ok()) return false;
#pragma omp parallel num_threads(c.threads)
  {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++)
      pair_columns(c.values + b * s.size(), s.height, s.width, TileAfterTile<kUnit>{s.height}, weights.as<float>() + b * cells);
    Bfloat16* copy = copies.as<Bfloat16>() + copied * omp_get_thread_num();
    configure_tiles(kUnit);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < plan.tasks; task++) {
      const int64_t turn = plan.turns.tokens, token = task / plan.line_parts * turn;
      const int tokens = static_cast<int>(min_of(turn, c.tokens - token));
      const Bfloat16* rows = static_cast<const Bfloat16*>(c.x) + token * s.columns;
      const RowProduct product{
          .weights = {.lines = c.by_row, .depth = s.width, .width = s.height, .cells = weights.as<float>()},
          .rows = plan.turns.take<kUnit>(rows, s.columns, tokens, copy),
          .bias = c.bias,
          .out = static_cast<Bfloat16*>(c.y) + token * s.rows,
          .stride = s.rows,
          .is_streamed = plan.turns.are_long() && is_streamed(c.y, s.rows, c.tokens),
          .ahead = RowsAhead::of(c.x, s.columns, token + turn * c.threads, c.tokens, turn),
      };
      product.run<kUnit>(line_range(c.by_row, plan.line_parts, static_cast<int>(task % plan.line_parts)));
    }
    _mm_sfence();  // streamed outputs are there for all threads
    RAREFY_TILE_RELEASE();
  }
  return true;
}

}  // namespace

bool blocks_forward(const BlocksForwardCall& c) {
  if (c.tokens <= 0 || c.shape.rows <= 0) return true;
  BlocksForwardCall call = c;
  call.threads = useful_threads(c.threads, c.by_row.starts[c.by_row.lines] * c.shape.size() * c.tokens);
  return c.shape.width % 32 ? forward_with<8>(call) : forward_with<16>(call);
}

}  // namespace rarefy::RAREFY_ISA
