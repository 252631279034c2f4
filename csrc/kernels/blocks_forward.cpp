// y = x · Wᵀ + bias for a W of blocks, in float32.
#include "blocks_forward.h"

#include "blocks_few.h"
#include "blocks_floats.h"
#include "operations.h"

namespace rarefy::RAREFY_ISA {
namespace {

template <int kLength, class Element>
bool forward_with(const BlocksForwardCall& c) {
  if (c.shape.width % 16) return BlocksForward<FloatEngine<kLength, 8, 8, Element>>{c}.run();
  return BlocksForward<FloatEngine<kLength, 16, 16, Element>>{c}.run();
}

template <class Element>
bool few_in(const BlocksForwardCall& c) {
  if constexpr (kLanes > 8)
    if (c.shape.width % kLanes) return forward_few_tokens<8, 1, Element>(c);
  return forward_few_tokens<kLanes, 1, Element>(c);
}

template <class Element>
bool forward_in(const BlocksForwardCall& c) {
  if (c.tokens <= kFewBlockTokens) return few_in<Element>(c);
  if constexpr (kLanes > 8)
    if (c.shape.height % kLanes) return forward_with<8, Element>(c);
  return forward_with<kLanes, Element>(c);
}

}  // namespace

bool blocks_forward(const BlocksForwardCall& c) {
  if (c.tokens <= 0 || c.shape.rows <= 0) return true;
  BlocksForwardCall call = c;
  const int64_t tokens = max_of(c.tokens, int64_t{8});  // few are bound by memory
  call.threads = useful_threads(c.threads, c.by_row.starts[c.by_row.lines] * c.shape.size() * tokens);
  return c.element == Element::kFloat32 ? forward_in<float>(call) : forward_in<Bfloat16>(call);
}

}  // namespace rarefy::RAREFY_ISA
