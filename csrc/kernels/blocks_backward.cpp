// Gradients of y = x · Wᵀ + bias for a W of blocks, in float32.
#include "blocks_backward.h"

#include "blocks_floats.h"
#include "operations.h"

namespace rarefy::RAREFY_ISA {
namespace {

template <int kLength, int kUnit, int kXUnit, class Element>
bool backward_of(const BlocksBackwardCall& c) {
  return BlocksBackward<FloatEngine<kLength, kUnit, kXUnit, Element>>{c}.run();
}

template <class Element>
bool backward_in(const BlocksBackwardCall& c) {
  constexpr int kNarrow = kLanes < 8 ? kLanes : 8;
  const bool tall = c.shape.height % 16 == 0, wide = c.shape.width % 16 == 0;
  if (wide) return tall ? backward_of<kLanes, 16, 16, Element>(c) : backward_of<kLanes, 8, 16, Element>(c);
  return tall ? backward_of<kNarrow, 16, 8, Element>(c) : backward_of<kNarrow, 8, 8, Element>(c);
}

}  // namespace

bool blocks_backward(const BlocksBackwardCall& c) {
  if (c.tokens <= 0) {
    clear_gradients(c);
    return true;
  }
  BlocksBackwardCall call = c;
  call.threads = useful_threads(c.threads, c.blocks() * c.shape.size() * c.tokens);
  return c.element == Element::kFloat32 ? backward_in<float>(call) : backward_in<Bfloat16>(call);
}

}  // namespace rarefy::RAREFY_ISA
