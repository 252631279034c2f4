// Gradients of y = x · Wᵀ + bias for a W of blocks, with the instructions of avx512_bf16.
#include "blocks_backward.h"
#include "blocks_dot.h"
#include "blocks_pairs_operations.h"

namespace rarefy::RAREFY_ISA {

bool blocks_backward(const BlocksBackwardCall& c) {
  if (c.tokens <= 0) {
    clear_gradients(c);
    return true;
  }
  BlocksBackwardCall call = c;
  call.threads = useful_threads(c.threads, c.blocks() * c.shape.size() * c.tokens);
  if (c.shape.height % 32) return BlocksBackward<PairEngine<8>>{call}.run();
  return BlocksBackward<PairEngine<16>>{call}.run();
}

extern const BlocksTable blocks_kernels;
const BlocksTable blocks_kernels{.forward = blocks_forward, .backward = blocks_backward};

}  // namespace rarefy::RAREFY_ISA
