// y = x · Wᵀ + bias for a W of blocks, with the instructions of avx512_bf16.
#include "blocks_forward.h"
#include "blocks_dot.h"
#include "blocks_pairs_operations.h"

namespace rarefy::RAREFY_ISA {

bool blocks_forward(const BlocksForwardCall& c) {
  if (c.tokens <= 0 || c.shape.rows <= 0) return true;
  BlocksForwardCall call = c;
  call.threads = useful_threads(c.threads, c.by_row.starts[c.by_row.lines] * c.shape.size() * c.tokens);
  if (c.shape.width % 32) return BlocksForward<PairEngine<8>>{call}.run();
  return BlocksForward<PairEngine<16>>{call}.run();
}

}  // namespace rarefy::RAREFY_ISA
