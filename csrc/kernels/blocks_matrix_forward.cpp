// y = x · Wᵀ + bias for a W of blocks and bfloat16, with the matrix unit.
#include <omp.h>

#include "blocks_matrix.h"
#include "blocks_pairs_operations.h"
#include "buffer.h"

namespace rarefy::RAREFY_ISA {
namespace {

// How the work is cut: runs of tokens, each for all block rows or, where tokens are few, for a part of them.
struct ForwardPlan {
  int turn;        // tokens
  int chunk;       // tokens
  int line_parts;  // of the block rows
  int64_t tasks;

  explicit ForwardPlan(const BlocksForwardCall& c, int64_t weights) : turn(tokens_of_a_turn(weights)) {
    line_parts = c.tokens >= static_cast<int64_t>(turn) * c.threads ? 1 : c.threads;
    chunk = chunk_tokens(c.tokens, turn, turn, line_parts == 1 ? c.threads : 1);
    tasks = (c.tokens + chunk - 1) / chunk * line_parts;
  }
};

template <int kUnit>
bool forward_with(const BlocksForwardCall& c) {
  const BlockShape& s = c.shape;
  const int64_t blocks = c.by_row.starts[c.by_row.lines], cells = s.size() / 2;
  const ForwardPlan plan(c, blocks * s.size());
  const size_t step = static_cast<size_t>(kTokenStep) * s.columns;
  const Buffer weights(blocks * cells * sizeof(float)), last_steps(step * c.threads * sizeof(Bfloat16));
  if (!weights.ok() || !last_steps.ok()) return false;
#pragma omp parallel num_threads(c.threads)
  {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++)
      pair_columns(c.values + b * s.size(), s.height, s.width, TileAfterTile<kUnit>{s.height}, weights.as<float>() + b * cells);
    Bfloat16* copy = last_steps.as<Bfloat16>() + step * omp_get_thread_num();
    configure_tiles(kUnit);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < plan.tasks; task++) {
      const int64_t token = task / plan.line_parts * plan.chunk;
      const int tokens = static_cast<int>(min_of(static_cast<int64_t>(plan.chunk), c.tokens - token));
      const RowProduct product{
          .weights = {.lines = c.by_row, .depth = s.width, .width = s.height, .cells = weights.as<float>()},
          .rows = with_whole_steps(static_cast<const Bfloat16*>(c.x) + token * s.columns, s.columns, tokens, copy),
          .bias = c.bias,
          .out = static_cast<Bfloat16*>(c.y) + token * s.rows,
          .stride = s.rows,
          .ahead = RowsAhead::of(c.x, s.columns, token + plan.chunk * c.threads, c.tokens, plan.chunk),
      };
      product.run<kUnit>(line_range(c.by_row, plan.line_parts, static_cast<int>(task % plan.line_parts)), 0, tokens);
    }
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
