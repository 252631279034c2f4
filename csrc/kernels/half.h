// The interface of the half-precision kernels: the products of forward.cpp and backward.cpp with tiles and weights in
// float16, for processors with avx512_fp16. Activations are bfloat16 or float16, values and their gradients float32.
#pragma once
#include "kernels.h"

namespace rarefy {

enum class HalfResult {
  kDone,
  kNoMemory,
  kNotFinite,  // an input is infinite or NaN, which float16 would spread: nothing of what was written counts
};

struct HalfTable {
  HalfResult (*forward)(const ForwardCall&);
  HalfResult (*backward)(const BackwardCall&);
};

// Null where `half_obstacle` says why there are none.
const HalfTable* half_kernels();

// What this build or this processor lacks for them; empty where they are there.
const char* half_obstacle();

}  // namespace rarefy
