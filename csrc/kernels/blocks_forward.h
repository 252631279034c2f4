// The forward pass of the block kernels, whatever computes the products.
#pragma once
#include <omp.h>

#include "blocks_product.h"
#include "buffer.h"

namespace rarefy::RAREFY_ISA {

template <class Engine>
struct BlocksForward {
  using Element = typename Engine::Element;
  const BlocksForwardCall& call;

  // What this thread reads next, if threads take their turns; where they share the same tokens that is beyond the end.
  Ahead next_inputs(int64_t token, int tokens, Range lines) const {
    if constexpr (Engine::kMayAsk) {
      const BlockShape& s = call.shape;
      const int64_t next = token + static_cast<int64_t>(tokens) * call.threads;
      const int64_t present = min_of(static_cast<int64_t>(tokens), call.tokens - next);
      if (present <= 0) return {};
      const int64_t blocks = call.by_row.starts[lines.end] - call.by_row.starts[lines.begin];
      const int64_t bytes = present * s.columns * static_cast<int64_t>(sizeof(Element));
      const Element* first = static_cast<const Element*>(call.x) + next * s.columns;
      return {first, bytes, blocks * Engine::product_steps(tokens, s.width, s.height)};
    }
    return {};
  }

  void run_chunk(int64_t token, int tokens, Range lines, const float* weights, float* panels) const {
    const BlockShape& s = call.shape;
    const Element* x = static_cast<const Element*>(call.x) + token * s.columns;
    Element* y = static_cast<Element*>(call.y) + token * s.rows;
    const int room = round_up_to(tokens, Engine::kRoom);
    Engine::pack_inputs(x, s.columns, tokens, room, s.columns, panels, nullptr);
    Ahead ahead = next_inputs(token, tokens, lines);
    for (int line = lines.begin; line < lines.end; line++) {
      const int32_t begin = call.by_row.starts[line];
      const LineProduct product{
          .indices = call.by_row.indices + begin,
          .places = nullptr,
          .blocks = call.by_row.starts[line + 1] - begin,
          .depth = s.width / Engine::kCell,
          .width = s.height,
          .weights = weights + begin * (s.size() / Engine::kCell),
          .panels = panels,
          .room = room,
          .bias = call.bias ? call.bias + static_cast<int64_t>(line) * s.height : nullptr,
          .ahead = &ahead,
      };
      Engine::multiply(product, 0, tokens, y + static_cast<int64_t>(line) * s.height, s.rows);
    }
  }

  bool run() const {
    const BlockShape& s = call.shape;
    const int64_t blocks = call.by_row.starts[call.by_row.lines];
    const int64_t cells = s.size() / Engine::kCell;
    const int line_parts = call.tokens >= Engine::kRun * call.threads ? 1 : call.threads;
    const int chunk = chunk_tokens(call.tokens, Engine::kRun, Engine::kRun, line_parts == 1 ? call.threads : 1);
    const int64_t tasks = (call.tokens + chunk - 1) / chunk * line_parts;
    const size_t per_thread = static_cast<size_t>(chunk) * s.columns / Engine::kCell;
    const Buffer weights(blocks * cells * sizeof(float)), panels(per_thread * call.threads * sizeof(float));
    if (!weights.ok() || !panels.ok()) return false;
#pragma omp parallel num_threads(call.threads)
    {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < blocks; b++)
        Engine::forward_weights(call.values + b * s.size(), s, weights.as<float>() + b * cells);
      float* mine = panels.as<float>() + per_thread * omp_get_thread_num();
      Engine::begin_products();
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < tasks; task++) {
        const int64_t token = task / line_parts * chunk;
        const int tokens = static_cast<int>(min_of(static_cast<int64_t>(chunk), call.tokens - token));
        const Range lines = line_range(call.by_row, line_parts, static_cast<int>(task % line_parts));
        run_chunk(token, tokens, lines, weights.as<float>(), mine);
      }
      Engine::end();
    }
    return true;
  }
};

}  // namespace rarefy::RAREFY_ISA
