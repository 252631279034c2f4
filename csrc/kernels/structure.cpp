// Panels from a mask, their transpose, and positions: integer work, compiled once. Every loop over tasks writes to
// disjoint places that depend on the sizes only, so results are the same for every thread count.
#include <algorithm>
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

int last_column(const Layout& m, int panel) {
  const int64_t end = (panel + int64_t{1}) * m.width;
  return static_cast<int>(end < m.columns ? end : m.columns);
}

// A block of the matrix that lies in one panel of W and in one panel of Wᵀ.
struct Block {
  int panel, transposed_panel, first_row, last_row;
};
Block block_of(const Layout& m, int transposed_width, int64_t task) {
  const int panel = static_cast<int>(task % m.count()), across = static_cast<int>(task / m.count());
  const int64_t end = (across + int64_t{1}) * transposed_width;
  return {panel, across, across * transposed_width, static_cast<int>(end < m.rows ? end : m.rows)};
}

// Calls f(row, column, position) for the nonzeros of the block in order of rows.
template <class Function>
void for_each_nonzero(const Layout& m, const Block& b, Function f) {
  const int32_t* starts = m.starts + static_cast<int64_t>(b.panel) * m.rows;
  for (int row = b.first_row; row < b.last_row; row++)
    for (int32_t q = starts[row]; q < starts[row + 1]; q++) f(row, b.panel * m.width + m.offsets[q], q);
}

// Some neighbouring rows, which are walked together: of one row, the runs in its panels are too short to be read ahead.
struct Rows {
  int first, last;
};
constexpr int kRows = 8;

int groups_of(const Layout& m) { return (m.rows + kRows - 1) / kRows; }

Rows rows_of(const Layout& m, int group) {
  const int first = group * kRows;
  return {first, m.rows - first < kRows ? m.rows : first + kRows};
}

// Calls f(row, column, position) for the nonzeros of some rows, panel by panel.
template <class Function>
void for_each_in_rows(const Layout& m, const Rows& r, Function f) {
  for (int p = 0, panels = m.count(); p < panels; p++) {
    const int32_t* starts = m.starts + static_cast<int64_t>(p) * m.rows;
    for (int row = r.first; row < r.last; row++)
      for (int32_t q = starts[row]; q < starts[row + 1]; q++) f(row, p * m.width + m.offsets[q], q);
  }
}

template <class Bits>
void scatter(const Layout& m, const Bits* values, Bits* matrix, int threads) {
  if (m.columns == 0) return;  // memset takes no null pointer
  const int64_t columns = m.columns;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int group = 0; group < groups_of(m); group++) {
    const Rows r = rows_of(m, group);
    memset(matrix + r.first * columns, 0, static_cast<size_t>((r.last - r.first) * columns) * sizeof(Bits));
    for_each_in_rows(m, r, [&](int row, int column, int32_t q) { matrix[row * columns + column] = values[q]; });
  }
}

template <class Bits>
void gather(const Layout& m, const Bits* matrix, Bits* values, int threads) {
  const int64_t columns = m.columns;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int group = 0; group < groups_of(m); group++)
    for_each_in_rows(m, rows_of(m, group),
                     [&](int row, int column, int32_t q) { values[q] = matrix[row * columns + column]; });
}

}  // namespace

void panels_count(const MaskCall& c) {
  const Layout m{c.rows, c.columns, c.width, c.starts, nullptr};
  const int panels = m.count();
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int row = 0; row < m.rows; row++)
    for (int p = 0; p < panels; p++) {
      const uint8_t* line = c.mask + static_cast<int64_t>(row) * m.columns;
      c.starts[static_cast<int64_t>(p) * m.rows + row + 1] = count_active(line, p * m.width, last_column(m, p));
    }
  accumulate(c.starts, static_cast<int64_t>(panels) * m.rows);
}

void panels_fill(const MaskCall& c) {
  const Layout m{c.rows, c.columns, c.width, c.starts, c.offsets};
  const int panels = m.count();
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int row = 0; row < m.rows; row++)
    for (int p = 0; p < panels; p++) {
      uint16_t* next = c.offsets + m.starts[static_cast<int64_t>(p) * m.rows + row];
      const int first = p * m.width;
      for_each_active(c.mask + static_cast<int64_t>(row) * m.columns, first, last_column(m, p),
                      [&](int column) { *next++ = static_cast<uint16_t>(column - first); });
    }
}

void panels_transpose(const TransposeCall& c) {
  const Layout& m = c.panels;
  const Layout t{m.columns, m.rows, c.width, c.starts, c.offsets};
  const int64_t entries = static_cast<int64_t>(t.count()) * t.rows;
  const int64_t tasks = static_cast<int64_t>(t.count()) * m.count();
  memset(c.starts, 0, static_cast<size_t>(entries + 1) * sizeof(int32_t));
#pragma omp parallel for schedule(dynamic, 1) num_threads(c.threads)
  for (int64_t task = 0; task < tasks; task++) {
    const Block b = block_of(m, c.width, task);
    int32_t* counts = c.starts + static_cast<int64_t>(b.transposed_panel) * t.rows + 1;
    for_each_nonzero(m, b, [&](int, int column, int32_t) { counts[column]++; });
  }
  accumulate(c.starts, entries);
  // Two tasks never share a transposed row of one panel, so each counts on in a run of `next` that is its own.
  std::vector<int32_t> next(c.starts, c.starts + entries);
#pragma omp parallel for schedule(dynamic, 1) num_threads(c.threads)
  for (int64_t task = 0; task < tasks; task++) {
    const Block b = block_of(m, c.width, task);
    int32_t* places = next.data() + static_cast<int64_t>(b.transposed_panel) * t.rows;
    for_each_nonzero(m, b, [&](int row, int column, int32_t q) {
      const int32_t place = places[column]++;
      c.offsets[place] = static_cast<uint16_t>(row - b.first_row);
      c.order[place] = q;
    });
  }
}

void panels_positions(const PositionsCall& c) {
  const Layout& m = c.panels;
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int group = 0; group < groups_of(m); group++)
    for_each_in_rows(m, rows_of(m, group), [&](int row, int column, int32_t q) {
      c.positions[q] = static_cast<int64_t>(row) * m.columns + column;
    });
}

void panels_sources(const SourcesCall& c) {
  const Layout& m = c.panels;
#pragma omp parallel num_threads(c.threads)
  {
    // Some rows of the matrix.
    std::vector<int32_t> places(static_cast<size_t>(m.columns) * kRows);
    const int64_t columns = m.columns;
#pragma omp for schedule(static)
    for (int group = 0; group < groups_of(m); group++) {
      const Rows r = rows_of(m, group);
      std::fill(places.begin(), places.end(), -1);
      int32_t* const found = places.data();
      for_each_in_rows(c.previous, r,
                       [&](int row, int column, int32_t q) { found[(row - r.first) * columns + column] = q; });
      for_each_in_rows(m, r,
                       [&](int row, int column, int32_t q) { c.places[q] = found[(row - r.first) * columns + column]; });
    }
  }
}

void panels_move(const MoveCall& c) {
  // Without a branch, which would be mispredicted: where there is no source, the first entry is read and its bits go.
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int64_t i = 0; i < c.size; i++) {
    const int32_t has_source = ~(c.places[i] >> 31);
    c.moved[i] = c.entries[c.places[i] & has_source] & static_cast<uint32_t>(has_source);
  }
}

void panels_scatter(const ScatterCall& c) {
  if (c.element_bytes == 1)
    scatter(c.panels, static_cast<const uint8_t*>(c.values), static_cast<uint8_t*>(c.matrix), c.threads);
  if (c.element_bytes == 4)
    scatter(c.panels, static_cast<const uint32_t*>(c.values), static_cast<uint32_t*>(c.matrix), c.threads);
}

void panels_gather(const GatherCall& c) {
  if (c.element_bytes == 1)
    gather(c.panels, static_cast<const uint8_t*>(c.matrix), static_cast<uint8_t*>(c.values), c.threads);
  if (c.element_bytes == 4)
    gather(c.panels, static_cast<const uint32_t*>(c.matrix), static_cast<uint32_t*>(c.values), c.threads);
}

}  // namespace rarefy
