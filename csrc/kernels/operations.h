// The kernels of this instruction set; table.cpp puts them in a KernelTable.
#pragma once
#include "attention.h"
#include "kernels.h"
#include "simd.h"

namespace rarefy::RAREFY_ISA {

bool forward(const ForwardCall&);
bool backward(const BackwardCall&);
bool keep_top(const KeepTopCall&);
void select(const SelectCall&);
bool holds_zeros(const HoldsZerosCall&);
bool keep_in_groups(const KeepInGroupsCall&);
bool keep_regular(const KeepRegularCall&);
void block_sums(const BlockSumsCall&);
void tanh_gelu(const GeluCall&);
void exact_gelu(const GeluCall&);
void norm_forward(const NormCall&);
bool norm_backward(const NormBackwardCall&);
void add_part(const AddPartCall&);
bool attention_forward(const AttentionForwardCall&);
bool attention_backward(const AttentionBackwardCall&);
bool blocks_forward(const BlocksForwardCall&);
bool blocks_backward(const BlocksBackwardCall&);

}  // namespace rarefy::RAREFY_ISA
