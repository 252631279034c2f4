// Rows in the order of their lengths. Where each row is as long as the one before it, no branch at its end is
// mispredicted. Connections are copied in that order: reading them out of order costs what the branches do.
#pragma once
#include "buffer.h"
#include "kernels.h"
#include "partition.h"
#include "tile.h"

namespace rarefy::RAREFY_ISA {

// Whether sorting pays: for rows whose ends branch predictors do not remember from tile to tile, with enough tiles to
// make up for it. As measured on Intel's processors with AVX-512.
RAREFY_INLINE bool sorting_pays(const Layout& m, int64_t tiles) {
  constexpr int64_t remembered = 8192, least_tiles = 8;
  return on_intel() && int64_t{m.count()} * m.rows > remembered && tiles >= least_tiles;
}

// A matrix whose rows may be sorted, panel by panel and block by block: row i of a panel of `layout` is then row
// rows[i] of the matrix, of the same block. `rows` is null where they are not sorted.
struct Matrix {
  Layout layout;
  const float* values;
  const int32_t* rows;
  int block;

  const int32_t* rows_of(int panel) const { return rows + static_cast<int64_t>(panel) * layout.rows; }
};

// The copy. It takes no memory where it is not wanted.
class SortedRows {
 public:
  SortedRows(const Layout& m, const float* values, int block, bool wanted)
      : source_{m, values, nullptr, block}, entries_(wanted ? int64_t{m.count()} * m.rows : 0),
        starts_(wanted ? (entries_ + 1) * 4 : 0), rows_(entries_ * 4), offsets_(wanted ? m.nonzeros() * 2 : 0),
        values_(wanted ? m.nonzeros() * 4 : 0) {
    if (wanted && starts_.ok()) starts_.as<int32_t>()[entries_] = static_cast<int32_t>(m.nonzeros());
  }

  bool ok() const { return starts_.ok() && rows_.ok() && offsets_.ok() && values_.ok(); }

  // The matrix, once all blocks are sorted.
  Matrix get() const {
    if (entries_ == 0) return source_;
    const Layout& m = source_.layout;
    return {{m.rows, m.columns, m.width, starts_.as<int32_t>(), offsets_.as<uint16_t>()},
            values_.as<float>(), rows_.as<int32_t>(), source_.block};
  }

  // Blocks to be sorted, in any order.
  int64_t count() const { return entries_ == 0 ? 0 : source_.layout.count() * blocks(); }
  void sort(int64_t id) const {
    const int64_t panel = id / blocks() * source_.layout.rows;
    const int begin = static_cast<int>(id % blocks()) * source_.block;
    const Range block{begin, min_of(begin + source_.block, source_.layout.rows)};
    const int32_t* starts = source_.layout.starts + panel;
    int32_t* rows = rows_.as<int32_t>() + panel;
    order(starts, block, rows);
    copy(starts, block, rows, starts_.as<int32_t>() + panel);
  }

 private:
  // Longer rows count as equally long: their ends are a small part of them.
  static constexpr int kLengths = 256;

  int64_t blocks() const { return (source_.layout.rows + source_.block - 1) / source_.block; }
  static int length(const int32_t* starts, int row) { return min_of(starts[row + 1] - starts[row], kLengths - 1); }

  static void order(const int32_t* starts, Range block, int32_t* rows) {
    int next[kLengths + 1] = {};
    for (int row = block.begin; row < block.end; row++) next[length(starts, row) + 1]++;
    for (int i = 0; i < kLengths; i++) next[i + 1] += next[i];
    for (int row = block.begin; row < block.end; row++) rows[block.begin + next[length(starts, row)]++] = row;
  }

  // A block has the same place in the copy.
  void copy(const int32_t* starts, Range block, const int32_t* rows, int32_t* sorted_starts) const {
    int32_t at = starts[block.begin];
    for (int i = block.begin; i < block.end; i++) {
      const int32_t from = starts[rows[i]], size = starts[rows[i] + 1] - from;
      sorted_starts[i] = at;
      for (int32_t k = 0; k < size; k++) offsets_.as<uint16_t>()[at + k] = source_.layout.offsets[from + k];
      for (int32_t k = 0; k < size; k++) values_.as<float>()[at + k] = source_.values[from + k];
      at += size;
    }
  }

  Matrix source_;
  int64_t entries_;
  Buffer starts_, rows_, offsets_, values_;
};

}  // namespace rarefy::RAREFY_ISA
