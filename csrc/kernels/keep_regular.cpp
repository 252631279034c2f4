// Square tiles with as many active connections in every row and in every column: the best of all masks where they are
// given (keep_best.h), else the highest scores that fit, one after the other, and exchanges: of many tiles at once up to
// a side of 16 (keep_fitting.h), and here tile by tile.
#include "buffer.h"
#include "keep_best.h"
#include "keep_fitting.h"
#include "keys.h"
#include "operations.h"
#include "tiles.h"

namespace rarefy::RAREFY_ISA {
namespace {

// An item is what a place is sorted by, in one number, lowest first: 32 bits of the score, 16 of the tie key, and the
// place itself, 8 bits each of its row and column.
constexpr int kLargePlaceBits = 16;
constexpr uint64_t kLast = ~uint64_t{0};

// One tile, and the memory in which its thread works.
struct LargeTile {
  const KeepRegularCall& call;
  int64_t first;    // of its entries
  uint64_t* items;  // [length], a power of two
  uint64_t* spare;  // [length]
  int length;
  double* finite;  // [side · side]
  double* base;    // [side]
  double* gains;   // [side]
  float* scores;   // [side · side]
  int* rows;      // [side] how many are kept
  int* columns;   // [side]
  uint8_t* mask;  // [side · side]
};

RAREFY_INLINE int entry_of(uint64_t item, int side) {
  return static_cast<int>(item >> 8 & 0xff) * side + static_cast<int>(item & 0xff);
}

void fill_items(const LargeTile& t) {
  const int side = t.call.side;
  for (int r = 0; r < side; r++)
    for (int c = 0; c < side; c++) {
      const int i = r * side + c;
      // The sign turned, so that keys sort the same way without one.
      const uint64_t tie = static_cast<uint64_t>(tie_key(t.call, t.first + i)) ^ uint64_t{1} << 63;
      const uint64_t score = ~key_of(t.scores[i]);
      t.items[i] = (score & 0xffffffffu) << 32 | tie >> 48 << kLargePlaceBits | static_cast<uint64_t>(r << 8 | c);
    }
  for (int i = side * side; i < t.length; i++) t.items[i] = kLast;
}

// Two sorted runs of equal length become one, from both ends at once: the lower half takes no more than either run
// has, and so does the upper one, so that no step asks whether a run has ended.
RAREFY_INLINE void merge(const uint64_t* __restrict from, int run, uint64_t* __restrict to) {
  const uint64_t *left = from, *right = from + run;
  const uint64_t *left_end = right - 1, *right_end = right + run - 1;
  for (int i = 0; i < run; i++) {
    const bool takes_right = *right < *left;
    to[i] = takes_right ? *right : *left;
    right += takes_right;
    left += !takes_right;
    const bool takes_left = *left_end > *right_end;
    to[2 * run - 1 - i] = takes_left ? *left_end : *right_end;
    left_end -= takes_left;
    right_end -= !takes_left;
  }
}

// The items in order; where that is.
const uint64_t* sorted(const LargeTile& t) {
  uint64_t *from = t.items, *to = t.spare;
  for (int run = 1; run < t.length; run *= 2) {
    for (int i = 0; i < t.length; i += 2 * run) merge(from + i, run, to + i);
    uint64_t* const swapped = from;
    from = to;
    to = swapped;
  }
  // Equal scores whose tie keys begin with the same bits are told apart by all of them.
  const int size = t.call.side * t.call.side;
  for (int i = 1; i < size; i++)
    for (int j = i; j > 0 && from[j] >> kLargePlaceBits == from[j - 1] >> kLargePlaceBits; j--) {
      const uint64_t above = from[j - 1], below = from[j];
      if (tie_key(t.call, t.first + entry_of(above, t.call.side)) <=
          tie_key(t.call, t.first + entry_of(below, t.call.side)))
        break;
      from[j - 1] = below;
      from[j] = above;
    }
  return from;
}

// As long as row and column have room; how many.
int take_highest(const LargeTile& t) {
  const int side = t.call.side, count = t.call.count;
  const uint64_t* sequence = sorted(t);
  memset(t.rows, 0, sizeof(int) * side);
  memset(t.columns, 0, sizeof(int) * side);
  int taken = 0;
  for (int i = 0; i < side * side; i++) {
    int& row = t.rows[sequence[i] >> 8 & 0xff];
    int& column = t.columns[sequence[i] & 0xff];
    const int fits = (row < count) & (column < count);
    row += fits;
    column += fits;
    taken += fits;
    t.mask[entry_of(sequence[i], side)] = static_cast<uint8_t>(fits);
  }
  return taken;
}

// As numbers, since differences of infinities would be NaN; the lowest is what was NaN.
void fill_finite(const LargeTile& t) {
  for (int i = 0; i < t.call.side * t.call.side; i++) {
    const float score = t.scores[i];
    const double bounded = score > 3.5e38 ? 1e100 : score < -3.5e38 ? -1e100 : static_cast<double>(score);
    t.finite[i] = score != score ? -1e200 : bounded;
  }
}

int first_with_room(const int* counts, int count) {
  int i = 0;
  while (counts[i] >= count) i++;
  return i;
}

// The best of row x to give way, where `base` has what (row, y) brings and -∞ where it is active; how good it is.
RAREFY_INLINE double best_gain(const LargeTile& t, int x, double brought, const double* __restrict base,
                               double* __restrict gains) {
  const int side = t.call.side;
  const double none = -__builtin_inf();
  for (int y = 0; y < side; y++) {
    const double gain = base[y] + brought - t.finite[x * side + y];
    gains[y] = t.mask[x * side + y] ? gain : none;
  }
  double highest = none;
  for (int y = 0; y < side; y++) highest = gains[y] > highest ? gains[y] : highest;
  return highest;
}

// One active (x, y) gives way to (row, y) and (x, column): the one that costs least, of equal ones the first.
void exchange(const LargeTile& t) {
  const int side = t.call.side;
  const int row = first_with_room(t.rows, t.call.count), column = first_with_room(t.columns, t.call.count);
  for (int y = 0; y < side; y++)
    t.base[y] = t.mask[row * side + y] ? -__builtin_inf() : t.finite[row * side + y];
  double highest = -__builtin_inf();
  int best_x = 0, best_y = 0;
  for (int x = 0; x < side; x++) {
    if (t.mask[x * side + column]) continue;
    const double gain = best_gain(t, x, t.finite[x * side + column], t.base, t.gains);
    if (gain <= highest) continue;
    highest = gain;
    best_x = x;
    best_y = 0;
    while (t.gains[best_y] != gain) best_y++;
  }
  t.mask[best_x * side + best_y] = 0;
  t.mask[row * side + best_y] = 1;
  t.mask[best_x * side + column] = 1;
  t.rows[row]++;
  t.columns[column]++;
}

void keep_tile(const LargeTile& t) {
  fill_items(t);
  const int missing = t.call.side * t.call.count - take_highest(t);
  if (missing) fill_finite(t);
  for (int i = 0; i < missing; i++) exchange(t);
}

// The memory of a tile of this side, in bytes.
int64_t memory_of(int side, int length) {
  const int64_t size = int64_t{side} * side;
  const int64_t bytes = 8 * (2 * length + size + 2 * side) + 4 * (size + 2 * side) + size;
  return (bytes + 63) / 64 * 64;
}

void keep_tiles(const KeepRegularCall& c, int64_t begin, int64_t end, int length, char* memory) {
  const int size = c.side * c.side;
  uint64_t* items = reinterpret_cast<uint64_t*>(memory);
  double* finite = reinterpret_cast<double*>(items + 2 * length);
  float* scores = reinterpret_cast<float*>(finite + size + 2 * c.side);
  int* rows = reinterpret_cast<int*>(scores + size);
  uint8_t* mask = reinterpret_cast<uint8_t*>(rows + 2 * c.side);
  for (int64_t i = begin; i < end; i++) {
    load_tile(c, i, c.side, c.side, scores);
    keep_tile({
        .call = c,
        .first = i * size,
        .items = items,
        .spare = items + length,
        .length = length,
        .finite = finite,
        .base = finite + size,
        .gains = finite + size + c.side,
        .scores = scores,
        .rows = rows,
        .columns = rows + c.side,
        .mask = mask,
    });
    store_tile(c, i, c.side, mask);
  }
}

bool keep_greedy(const KeepRegularCall& c) {
  int length = 1;
  while (length < c.side * c.side) length *= 2;
  const int64_t tiles = c.rows / c.side * (c.columns / c.side);
  const int64_t share = (tiles + c.threads - 1) / c.threads;
  const int64_t each = memory_of(c.side, length);
  const Buffer scratch(each * c.threads);
  if (!scratch.ok()) return false;
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (int k = 0; k < c.threads; k++)
    keep_tiles(c, k * share, min_of((k + 1) * share, tiles), length, scratch.as<char>() + each * k);
  return true;
}

}  // namespace

bool keep_regular(const KeepRegularCall& c) {
  if (!c.options && c.side > kMostFitting) return keep_greedy(c);
  if (c.options) keep_best(c);
  else if (c.side == 8) keep_fitting<8, true>(c);
  else if (c.side < 8) keep_fitting<8, false>(c);
  else if (c.side == 16) keep_fitting<16, true>(c);
  else keep_fitting<16, false>(c);
  return true;
}

}  // namespace rarefy::RAREFY_ISA
