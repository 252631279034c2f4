// The kernels of this instruction set; table.cpp puts them in a KernelTable.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace rarefy::RAREFY_ISA {

bool forward(const ForwardCall&);
bool backward(const BackwardCall&);
bool keep_top(const KeepTopCall&);
void select(void* data, const uint8_t* mask, int64_t size, int element_bytes, int threads);
void keep_n_of_m(const float* scores, int64_t groups, int n, int m, uint8_t* mask, int threads);
void block_sums(const float* scores, int64_t rows, int64_t columns, int block_rows, int block_columns, float* sums,
                int threads);

}  // namespace rarefy::RAREFY_ISA
