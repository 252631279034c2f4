// How threads share the backward pass, and how their sums are put together.
#pragma once
#include "kernels.h"
#include "partition.h"

namespace rarefy::RAREFY_ISA {

// Threads = token groups × row groups. Token groups need a copy of the value sums each, so their number is limited.
struct Grid {
  int token_groups, row_groups;
};
RAREFY_INLINE Grid make_grid(const BackwardCall& c, int64_t tiles, int64_t nonzeros) {
  constexpr int64_t most_sums = int64_t{32} << 20;
  Grid grid{1, c.threads};
  for (int groups = 1; groups <= c.threads && groups <= tiles; groups++)
    if (c.threads % groups == 0 && (groups <= 2 || groups * nonzeros <= most_sums)) grid = {groups, c.threads / groups};
  if (c.transposed.rows < grid.row_groups * kLanes) grid.row_groups = 1;
  return grid;
}

// target[index(i)] = sums[i] over the token groups, added in order.
RAREFY_INLINE void reduce(const float* sums, int64_t size, int groups, const int32_t* index, float* target) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < size; i++) {
    float sum = sums[i];
    for (int g = 1; g < groups; g++) sum += sums[size * g + i];
    target[index ? index[i] : i] = sum;
  }
}

}  // namespace rarefy::RAREFY_ISA
