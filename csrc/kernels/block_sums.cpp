// Sums of scores over blocks [block_rows, block_columns]; both divide the matrix.
#include "kernels.h"
#include "operations.h"

namespace rarefy::RAREFY_ISA {

void block_sums(const float* scores, int64_t rows, int64_t columns, int block_rows, int block_columns, float* sums,
                int threads) {
  const int64_t across = columns / block_columns, blocks = rows / block_rows * across;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < blocks; b++) {
    const float* block = scores + b / across * block_rows * columns + b % across * block_columns;
    float sum = 0;
    for (int r = 0; r < block_rows; r++)
      for (int c = 0; c < block_columns; c++) sum += block[r * columns + c];
    sums[b] = sum;
  }
}

}  // namespace rarefy::RAREFY_ISA
