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

// The bytes of `words` times 8 places of a mask as bits: the product brings byte k of a word to bit k of its highest.
uint64_t pack(const uint8_t* mask, int words) {
  uint64_t bits = 0;
  for (int i = 0; i < words; i++) {
    uint64_t word;
    memcpy(&word, mask + 8 * i, 8);
    bits |= (word * 0x0102040810204080u >> 56) << 8 * i;
  }
  return bits;
}

// Calls f(column) for each True byte of mask[begin, end): one branch a call, as branches on masks are mispredicted.
template <class Function>
void for_each_active(const uint8_t* mask, int begin, int end, Function f) {
  int c = begin;
  for (int words; (words = (end - c) / 8) > 0; c += 8 * words) {
    if (words > 8) words = 8;
    for (uint64_t bits = pack(mask + c, words); bits; bits &= bits - 1) f(c + __builtin_ctzll(bits));
  }
  for (; c < end; c++)
    if (mask[c]) f(c);
}

// Bytes of mask[begin, end) that are 1, eight at a time: the product adds the bytes of a word up in its highest one.
int32_t count_active(const uint8_t* mask, int begin, int end) {
  int32_t total = 0;
  int c = begin;
  for (; c + 8 <= end; c += 8) {
    uint64_t word;
    memcpy(&word, mask + c, 8);
    total += static_cast<int32_t>(word * 0x0101010101010101u >> 56);
  }
  for (; c < end; c++) total += mask[c];
  return total;
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

// Calls f(column, position) for the nonzeros of a row, panel by panel.
template <class Function>
void for_each_in_row(const Panels& m, int row, Function f) {
  for (int p = 0, panels = m.count(); p < panels; p++) {
    const int32_t* starts = m.starts + static_cast<int64_t>(p) * m.rows;
    for (int32_t q = starts[row]; q < starts[row + 1]; q++) f(p * m.width + m.offsets[q], q);
  }
}

template <class Bits>
void scatter(const Panels& m, const Bits* values, Bits* matrix, int threads) {
  if (m.columns == 0) return;  // memset takes no null pointer
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int row = 0; row < m.rows; row++) {
    Bits* line = matrix + static_cast<int64_t>(row) * m.columns;
    memset(line, 0, static_cast<size_t>(m.columns) * sizeof(Bits));
    for_each_in_row(m, row, [&](int column, int32_t q) { line[column] = values[q]; });
  }
}

}  // namespace

void panels_count(const uint8_t* mask, int rows, int columns, int width, int32_t* starts, int threads) {
  const Panels m{rows, columns, width, starts, nullptr};
  const int panels = m.count();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int row = 0; row < rows; row++)
    for (int p = 0; p < panels; p++) {
      const uint8_t* line = mask + static_cast<int64_t>(row) * columns;
      starts[static_cast<int64_t>(p) * rows + row + 1] = count_active(line, p * width, last_column(m, p));
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
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int row = 0; row < m.rows; row++)
    for_each_in_row(m, row, [&](int column, int32_t q) {
      positions[q] = static_cast<int64_t>(row) * m.columns + column;
    });
}

void panels_sources(const Panels& m, const Panels& previous, int64_t* sources, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<int32_t> places(static_cast<size_t>(m.columns), -1);
#pragma omp for schedule(static)
    for (int row = 0; row < m.rows; row++) {
      for_each_in_row(previous, row, [&](int column, int32_t q) { places[column] = q; });
      for_each_in_row(m, row, [&](int column, int32_t q) { sources[q] = places[column]; });
      for_each_in_row(previous, row, [&](int column, int32_t) { places[column] = -1; });
    }
  }
}

void panels_scatter(const Panels& m, const void* values, void* matrix, int element_bytes, int threads) {
  if (element_bytes == 1) scatter(m, static_cast<const uint8_t*>(values), static_cast<uint8_t*>(matrix), threads);
  if (element_bytes == 4) scatter(m, static_cast<const uint32_t*>(values), static_cast<uint32_t*>(matrix), threads);
}

void panels_gather(const Panels& m, const uint32_t* matrix, uint32_t* values, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int row = 0; row < m.rows; row++) {
    const uint32_t* line = matrix + static_cast<int64_t>(row) * m.columns;
    for_each_in_row(m, row, [&](int column, int32_t q) { values[q] = line[column]; });
  }
}

}  // namespace rarefy
