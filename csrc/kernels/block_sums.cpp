// Sums of scores over blocks [block_rows, block_columns]; both divide the matrix.
#include "kernels.h"
#include "operations.h"

namespace rarefy::RAREFY_ISA {

void block_sums(const BlockSumsCall& c) {
  const int64_t across = c.columns / c.block_columns;
  const int64_t blocks = c.rows / c.block_rows * across;
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int64_t b = 0; b < blocks; b++) {
    const float* block = c.scores + b / across * c.block_rows * c.columns + b % across * c.block_columns;
    float sum = 0;
    for (int row = 0; row < c.block_rows; row++)
      for (int column = 0; column < c.block_columns; column++) sum += block[row * c.columns + column];
    c.sums[b] = sum;
  }
}

}  // namespace rarefy::RAREFY_ISA
