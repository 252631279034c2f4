// y = x · Wᵀ + bias for a W of blocks.
#include <omp.h>

#include "operations.h"
#include "blocks_product.h"
#include "buffer.h"

namespace rarefy::RAREFY_ISA {
namespace {

// One block [height, width] -> [width, height], so that vectors run along the outputs.
void transpose_block(const float* block, const BlockShape& s, float* target) {
  if (s.height % kLanes || s.width % kLanes) {
    for (int r = 0; r < s.height; r++)
      for (int c = 0; c < s.width; c++) target[c * s.height + r] = block[r * s.width + c];
    return;
  }
  for (int r = 0; r < s.height; r += kLanes)
    for (int c = 0; c < s.width; c += kLanes) {
      Vec square[kLanes];
      RAREFY_UNROLL for (int i = 0; i < kLanes; i++) square[i] = load(block + (r + i) * s.width + c);
      transpose(square);
      RAREFY_UNROLL for (int i = 0; i < kLanes; i++) store(target + (c + i) * s.height + r, square[i]);
    }
}

template <int kLength, int kUnit, class Element>
void forward_chunk(const BlocksForwardCall& c, int64_t token, int tokens, Range lines, const float* weights,
                   float* panels) {
  const BlockShape& s = c.shape;
  const Element* x = static_cast<const Element*>(c.x) + token * s.columns;
  Element* y = static_cast<Element*>(c.y) + token * s.rows;
  constexpr int kPacked = kUnit < kLanes ? kUnit : kLanes;
  pack_panels<kPacked, kUnit>(x, s.columns, tokens, s.columns, panels, nullptr);
  for (int line = lines.begin; line < lines.end; line++) {
    const int32_t begin = c.by_row.starts[line];
    const LineProduct product{
        .indices = c.by_row.indices + begin,
        .places = nullptr,
        .blocks = c.by_row.starts[line + 1] - begin,
        .depth = s.width,
        .width = s.height,
        .weights = weights + begin * s.size(),
        .panels = panels,
        .tokens = tokens,
        .bias = c.bias ? c.bias + static_cast<int64_t>(line) * s.height : nullptr,
    };
    multiply_line<kLength, kUnit>(product, 0, tokens, y + static_cast<int64_t>(line) * s.height, s.rows);
  }
}

template <int kLength, int kUnit, class Element>
bool forward_of(const BlocksForwardCall& c) {
  const BlockShape& s = c.shape;
  const int64_t blocks = c.by_row.starts[c.by_row.lines];
  const int line_parts = c.tokens >= kTokenRun * c.threads ? 1 : c.threads;
  const int chunk = chunk_tokens(c.tokens, kTokenRun, line_parts == 1 ? c.threads : 1);
  const int64_t tasks = (c.tokens + chunk - 1) / chunk * line_parts;
  const size_t per_thread = static_cast<size_t>(chunk) * s.columns;
  const Buffer weights(blocks * s.size() * sizeof(float)), panels(per_thread * c.threads * sizeof(float));
  if (!weights.ok() || !panels.ok()) return false;
#pragma omp parallel num_threads(c.threads)
  {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++)
      transpose_block(c.values + b * s.size(), s, weights.as<float>() + b * s.size());
    float* mine = panels.as<float>() + per_thread * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t token = task / line_parts * chunk;
      const int tokens = static_cast<int>(min_of(static_cast<int64_t>(chunk), c.tokens - token));
      const Range lines = line_range(c.by_row, line_parts, static_cast<int>(task % line_parts));
      forward_chunk<kLength, kUnit, Element>(c, token, tokens, lines, weights.as<float>(), mine);
    }
  }
  return true;
}

template <int kLength, class Element>
bool forward_with(const BlocksForwardCall& c) {
  return c.shape.width % 16 ? forward_of<kLength, 8, Element>(c) : forward_of<kLength, 16, Element>(c);
}

template <class Element>
bool forward_in(const BlocksForwardCall& c) {
  if constexpr (kLanes > 8)
    if (c.shape.height % kLanes) return forward_with<8, Element>(c);
  return forward_with<kLanes, Element>(c);
}

}  // namespace

bool blocks_forward(const BlocksForwardCall& c) {
  if (c.tokens <= 0 || c.shape.rows <= 0) return true;
  BlocksForwardCall call = c;
  call.threads = useful_threads(c.threads, c.by_row.starts[c.by_row.lines] * c.shape.size() * c.tokens);
  return c.element == Element::kFloat32 ? forward_in<float>(call) : forward_in<Bfloat16>(call);
}

}  // namespace rarefy::RAREFY_ISA
