// The attention kernels of the matrix unit; attention_backward.cpp puts them in an AttentionTable.
#pragma once
#include "attention.h"
#include "simd.h"

namespace rarefy::RAREFY_ISA {

bool attention_forward(const AttentionForwardCall&);
bool attention_backward(const AttentionBackwardCall&);

}  // namespace rarefy::RAREFY_ISA
