// The block kernels for pairs of bfloat16: their operations.
#pragma once
#include "blocks.h"

namespace rarefy::RAREFY_ISA {

bool blocks_forward(const BlocksForwardCall&);
bool blocks_backward(const BlocksBackwardCall&);

}  // namespace rarefy::RAREFY_ISA
