// The block kernels for pairs of bfloat16: their operations, and the engine that this instruction set has.
#pragma once
#include "blocks.h"
#if defined(RAREFY_MATRIX_UNIT)
#include "blocks_matrix.h"
#else
#include "blocks_dot.h"
#endif

namespace rarefy::RAREFY_ISA {

bool blocks_forward(const BlocksForwardCall&);
bool blocks_backward(const BlocksBackwardCall&);

}  // namespace rarefy::RAREFY_ISA
