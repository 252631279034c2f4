// Panels from a mask, their transpose, and positions: integer work, compiled once. Every loop over tasks writes to
// disjoint places that depend on the sizes only, so results are the same for every thread count.
#include <cstring>
#include <vector>

#include "kernels.h"

namespace rarefy {
namespace {

// starts holds counts in [1, size]; turns them into running totals.
void accumulate(int32_t* starts, int64_t size) {
  starts[0] = 0;
  for (int64_t i = 0; i < size; i++) starts[i + 1] += starts[i];
}

// Calls f(column) for each True byte of mask[begin, end), eight bytes at a time.
template <class Function>
void for_each_active(const uint8_t* mask, int begin, int end, Function f) {
  int c = begin;
  for (; c + 8 <= end; c += 8) {
    uint64_t word;
    memcpy(&word, mask + c, 8);
    if (word == 0) continue;
    for (int i = 0; i < 8; i++)
      if (mask[c + i]) f(c + i);
  }
  for (; c < end; c++)
    if (mask[c]) f(c);
}

int last_column(const Panels& m, int panel) {
  const int64_t end = (panel + int64_t{1}) * m.width;
  return static_cast<int>(end < m.columns ? end : m.columns);
}

// A block of the matrix that lies in one panel of W and in one panel of Wᵀ.
struct Block {
  int panel, transposed_panel, first_row, last_row;
};
Block block_of(const Panels& m, int transposed_width, int64_t task) {
  const int panel = static_cast<int>(task % m.count()), across = static_cast<int>(task / m.count());
  const int64_t end = (across + int64_t{1}) * transposed_width;
  return {panel, across, across * transposed_width, static_cast<int>(end < m.rows ? end : m.rows)};
}

// Calls f(row, column, position) for the nonzeros of the block in order of rows.
template <class Function>
void for_each_nonzero(const Panels& m, const Block& b, Function f) {
  const int32_t* starts = m.starts + static_cast<int64_t>(b.panel) * m.rows;
  for (int row = b.first_row; row < b.last_row; row++)
    for (int32_t q = starts[row]; q < starts[row + 1]; q++) f(row, b.panel * m.width + m.offsets[q], q);
}

}  // namespace

void panels_count(const uint8_t* mask, int rows, int columns, int width, int32_t* starts, int threads) {
  const Panels m{rows, columns, width, starts, nullptr};
  const int panels = m.count();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int row = 0; row < rows; row++)
    for (int p = 0; p < panels; p++) {
      int32_t count = 0;
      const uint8_t* line = mask + static_cast<int64_t>(row) * columns;
      for (int c = p * width, end = last_column(m, p); c < end; c++) count += line[c];
      starts[static_cast<int64_t>(p) * rows + row + 1] = count;
    }
  accumulate(starts, static_cast<int64_t>(panels) * rows);
}

void panels_fill(const uint8_t* mask, const Panels& m, uint16_t* offsets, int threads) {
  const int panels = m.count();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int row = 0; row < m.rows; row++)
    for (int p = 0; p < panels; p++) {
      uint16_t* next = offsets + m.starts[static_cast<int64_t>(p) * m.rows + row];
      const int first = p * m.width;
      for_each_active(mask + static_cast<int64_t>(row) * m.columns, first, last_column(m, p),
                      [&](int column) { *next++ = static_cast<uint16_t>(column - first); });
    }
}

void panels_transpose(const Panels& m, int width, int32_t* starts, uint16_t* offsets, int32_t* order, int threads) {
  const Panels t{m.columns, m.rows, width, starts, offsets};
  const int64_t entries = static_cast<int64_t>(t.count()) * t.rows, tasks = static_cast<int64_t>(t.count()) * m.count();
  memset(starts, 0, static_cast<size_t>(entries + 1) * sizeof(int32_t));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t task = 0; task < tasks; task++) {
    const Block b = block_of(m, width, task);
    int32_t* counts = starts + static_cast<int64_t>(b.transposed_panel) * t.rows + 1;
    for_each_nonzero(m, b, [&](int, int column, int32_t) { counts[column]++; });
  }
  accumulate(starts, entries);
  std::vector<int32_t> next(starts, starts + entries);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t task = 0; task < tasks; task++) {
    const Block b = block_of(m, width, task);
    int32_t* places = next.data() + static_cast<int64_t>(b.transposed_panel) * t.rows;
    for_each_nonzero(m, b, [&](int row, int column, int32_t q) {
      const int32_t place = places[column]++;
      offsets[place] = static_cast<uint16_t>(row - b.first_row);
      order[place] = q;
    });
  }
}

void panels_positions(const Panels& m, int64_t* positions, int threads) {
  const int panels = m.count();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int row = 0; row < m.rows; row++)
    for (int p = 0; p < panels; p++) {
      const int32_t* starts = m.starts + static_cast<int64_t>(p) * m.rows;
      for (int32_t q = starts[row]; q < starts[row + 1]; q++)
        positions[q] = static_cast<int64_t>(row) * m.columns + static_cast<int64_t>(p) * m.width + m.offsets[q];
    }
}

}  // namespace rarefy
