// The half-precision kernels; half_backward.cpp puts them in a HalfTable.
#pragma once
#include "half.h"
#include "simd.h"

namespace rarefy::RAREFY_ISA {

HalfResult half_forward(const ForwardCall&);
HalfResult half_backward(const BackwardCall&);

}  // namespace rarefy::RAREFY_ISA
