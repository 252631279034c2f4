// How work is split over threads. Splits depend on the sizes and the thread count only, never on timing.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace rarefy::RAREFY_ISA {

struct Range {
  int begin, end;
};

// A row costs its nonzeros plus a constant for loading and storing its accumulators.
constexpr int64_t kRowCost = 4;

RAREFY_INLINE int64_t work_before(const Layout& m, int row) {
  int64_t work = row * kRowCost;
  for (int p = 0, panels = m.count(); p < panels; p++) {
    const int32_t* starts = m.starts + static_cast<int64_t>(p) * m.rows;
    work += starts[row] - starts[0];
  }
  return work;
}

// First row of part k of `parts` parts of about equal work, a multiple of kLanes.
RAREFY_INLINE int part_begin(const Layout& m, int parts, int k) {
  if (k <= 0) return 0;
  if (k >= parts) return m.rows;
  const int64_t wanted = work_before(m, m.rows) * k / parts;
  int low = 0, high = m.rows;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (work_before(m, middle) < wanted)
      low = middle + 1;
    else
      high = middle;
  }
  return min_of(m.rows, (low + kLanes / 2) / kLanes * kLanes);
}

RAREFY_INLINE Range part(const Layout& m, int parts, int k) {
  return {part_begin(m, parts, k), part_begin(m, parts, k + 1)};
}

// Share of thread `k` of `threads` in [0, size).
RAREFY_INLINE int64_t share_begin(int64_t size, int threads, int k) {
  return size / threads * k + size % threads * k / threads;
}

// Threads that are worth waking for `work` multiply-adds.
RAREFY_INLINE int useful_threads(int threads, int64_t work) {
  constexpr int64_t least = 1 << 19;
  return static_cast<int>(max_of(int64_t{1}, min_of(static_cast<int64_t>(threads), work / least)));
}

}  // namespace rarefy::RAREFY_ISA
