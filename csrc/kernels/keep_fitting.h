// Tiles up to a side of 16, as many at once as a vector has lanes: the highest scores that fit, one after the other,
// and exchanges where rows and columns are left with fewer.
#pragma once
#include "keys.h"
#include "lanes.h"
#include "tiles.h"

namespace rarefy::RAREFY_ISA {

constexpr int kMostFitting = 16;

// What a place is sorted by, in one signed number, lowest first: 32 bits of the score, 24 of the tie key, 4 of its row
// and 4 of its column.
constexpr int kPlaceBits = 8;

// Some tiles, and the memory in which their thread works. There is room for a side of kRoom, which is that of the tiles
// where that is said; the bits of a mask are places, row · kRoom + column.
template <int kRoom, bool kIsSide>
struct Fitting {
  static constexpr int kSize = kRoom * kRoom;
  static constexpr int kWords = kSize / 64;

  explicit Fitting(const KeepRegularCall& c) : call(c) {}
  int side() const { return kIsSide ? kRoom : call.side; }

  const KeepRegularCall& call;
  int64_t tiles[kTiles] = {};
  float scores[kTiles][kSize] = {};  // rows of kRoom
  Longs items[kSize] = {};           // side · side
  Words kept[kWords] = {};
  // How many more connections each row and each column takes, four bits each.
  Words rows = {}, columns = {};
};

// As many tiles as are wanted, from the first one on; the rest of the vector repeats the last.
template <int kRoom, bool kIsSide>
RAREFY_INLINE void load_scores(Fitting<kRoom, kIsSide>& f, int64_t first, int wanted) {
  for (int t = 0; t < kTiles; t++) {
    f.tiles[t] = first + min_of(t, wanted - 1);
    load_tile(f.call, f.tiles[t], f.side(), kRoom, f.scores[t]);
  }
}

// The tie keys of one place in all tiles, as `tie_key` makes them.
template <int kRoom, bool kIsSide>
RAREFY_INLINE Words tie_keys(const Fitting<kRoom, kIsSide>& f, int entry) {
  const int size = f.side() * f.side();
  Words x;
  for (int t = 0; t < kTiles; t++) {
    const int64_t numbered = f.tiles[t] * size + entry;
    x[t] = static_cast<uint64_t>(f.call.places ? f.call.places[numbered] : numbered);
  }
  return mixed(x + static_cast<uint64_t>(f.call.start));
}

template <int kRoom, bool kIsSide>
RAREFY_INLINE void fill_items(Fitting<kRoom, kIsSide>& f) {
  uint32_t keys[kTiles][Fitting<kRoom, kIsSide>::kSize];
  for (int t = 0; t < kTiles; t++)
    for (int i = 0; i < f.kSize; i++) keys[t][i] = key_of(f.scores[t][i]);
  for (int r = 0, entry = 0; r < f.side(); r++)
    for (int c = 0; c < f.side(); c++, entry++) {
      Words high;
      for (int t = 0; t < kTiles; t++) high[t] = keys[t][r * kRoom + c];
      // The sign of a tie key turned, so that it sorts the same way without one; and the highest scores come first.
      const Words tie = tie_keys(f, entry) ^ uint64_t{1} << 63;
      const Words place = Words{} + static_cast<uint64_t>(r << 4 | c);
      f.items[entry] = reinterpret_cast<Longs>((high ^ 0x7fffffffu) << 32 | tie >> 40 << kPlaceBits | place);
    }
}

RAREFY_INLINE void put_in_order(Longs& first, Longs& second) {
  const Longs a = first, b = second;
  first = smaller(a, b);
  second = larger(a, b);
}

// Batcher's merge exchange (Knuth, The Art of Computer Programming, volume 3, algorithm 5.2.2 M): which items are
// compared does not depend on them.
RAREFY_INLINE void sort_items(Longs* items, int size) {
  int half = 1;
  while (2 * half < size) half *= 2;
  for (int run = half; run > 0; run /= 2) {
    int phase = 0, distance = run;
    for (int reach = half;; reach /= 2) {
      for (int begin = phase; begin < size - distance; begin += 2 * run)
        for (int i = begin, end = min_of(begin + run, size - distance); i < end; i++)
          put_in_order(items[i], items[i + distance]);
      if (reach == run) break;
      distance = reach - run;
      phase = run;
    }
  }
}

// Items that are equal but for their places are told apart by whole tie keys.
template <int kRoom, bool kIsSide>
void settle_lane(Fitting<kRoom, kIsSide>& f, int lane) {
  const int side = f.side(), size = side * side;
  const auto key = [&](int64_t item) {
    return tie_key(f.call, f.tiles[lane] * size + (item >> 4 & 15) * side + (item & 15));
  };
  for (int i = 1; i < size; i++)
    for (int j = i; j > 0 && f.items[j][lane] >> kPlaceBits == f.items[j - 1][lane] >> kPlaceBits; j--) {
      const int64_t above = f.items[j - 1][lane], below = f.items[j][lane];
      if (key(above) <= key(below)) break;
      f.items[j - 1][lane] = below;
      f.items[j][lane] = above;
    }
}

template <int kRoom, bool kIsSide>
RAREFY_INLINE void settle_items(Fitting<kRoom, kIsSide>& f) {
  Longs open = {};
  for (int i = 1; i < f.side() * f.side(); i++)
    open |= f.items[i] >> kPlaceBits == f.items[i - 1] >> kPlaceBits;
  for (int t = 0; t < kTiles; t++)
    if (open[t]) settle_lane(f, t);
}

// As long as row and column have room.
template <int kRoom, bool kIsSide>
RAREFY_INLINE void take_highest(Fitting<kRoom, kIsSide>& f) {
  const Words none = {};
  Words rows = none + (~uint64_t{0} >> (64 - 4 * f.side())) / 15 * static_cast<unsigned>(f.call.count);
  Words columns = rows;
  for (int w = 0; w < f.kWords; w++) f.kept[w] = none;
  for (int i = 0; i < f.side() * f.side(); i++) {
    const Words item = reinterpret_cast<Words>(f.items[i]);
    const Words row = item >> 4 & 15, column = item & 15;
    const Words fits = reinterpret_cast<Words>(((rows >> 4 * row & 15) != 0) & ((columns >> 4 * column & 15) != 0)) & 1;
    rows -= fits << 4 * row;
    columns -= fits << 4 * column;
    const Words place = row * kRoom + column;
    for (int w = 0; w < f.kWords; w++) {
      const Words here = f.kWords == 1 ? fits : fits & reinterpret_cast<Words>(place >> 6 == w);
      f.kept[w] |= here << (place & 63);
    }
  }
  f.rows = rows;
  f.columns = columns;
}

template <int kRoom, bool kIsSide>
RAREFY_INLINE uint32_t row_of(const Fitting<kRoom, kIsSide>& f, int row, int lane) {
  const int place = row * kRoom;
  return static_cast<uint32_t>(f.kept[place / 64][lane] >> place % 64) & ((1u << kRoom) - 1);
}

// One tile whose rows and columns are filled up. What lies outside of it is inactive, and nothing gives way to it.
template <int kRoom>
struct Tile {
  static constexpr int kVectors = kRoom / kTiles;  // of a row

  double at(int x, int y) const { return finite[x][y / kTiles][y % kTiles]; }

  Doubles finite[kRoom][kVectors];
  uint32_t rows[kRoom];  // a bit for each active connection
};

typedef float HalfVector __attribute__((vector_size(RAREFY_VECTOR_BYTES / 2), aligned(4), may_alias));

// As numbers, since differences of infinities would be NaN; the lowest is what was NaN.
RAREFY_INLINE Doubles finite_of(const float* scores) {
  const Doubles zero = {};
  const Doubles score = __builtin_convertvector(*reinterpret_cast<const HalfVector*>(scores), Doubles);
  const Doubles bounded = where(score > 3.5e38, zero + 1e100, where(score < -3.5e38, zero - 1e100, score));
  return where(score != score, zero - 1e200, bounded);
}

// All bits where columns from `first` on have theirs among `bits`.
RAREFY_INLINE Longs lanes_of(uint32_t bits, int first) {
  Longs lane;
  for (int y = 0; y < kTiles; y++) lane[y] = int64_t{1} << y;
  return (lane & static_cast<int64_t>(bits >> first)) != 0;
}

// What would be gained by each (x, y) that gave way to (row, y) and (x, column): the best of each y, and its x.
template <int kRoom>
RAREFY_INLINE void gains_of(const Tile<kRoom>& tile, int row, int column, Doubles* highest, Doubles* from) {
  const Doubles none = Doubles{} - __builtin_inf();
  for (int v = 0; v < tile.kVectors; v++) {
    const Doubles base = where(lanes_of(tile.rows[row], v * kTiles), none, tile.finite[row][v]);
    highest[v] = none;
    from[v] = Doubles{};
    for (int x = 0; x < kRoom; x++) {
      if (tile.rows[x] >> column & 1) continue;
      const Doubles sum = base + tile.at(x, column) - tile.finite[x][v];
      const Doubles gain = where(lanes_of(tile.rows[x], v * kTiles), sum, none);
      from[v] = where(gain > highest[v], Doubles{} + x, from[v]);
      highest[v] = where(gain > highest[v], gain, highest[v]);
    }
  }
}

// One active (x, y) gives way to (row, y) and (x, column): the one that costs least, of equal ones the first.
template <int kRoom>
RAREFY_INLINE void exchange(Tile<kRoom>& tile, int row, int column) {
  Doubles highest[Tile<kRoom>::kVectors], from[Tile<kRoom>::kVectors];
  gains_of(tile, row, column, highest, from);
  double best = highest[0][0], x = from[0][0];
  int y = 0;
  for (int i = 1; i < kRoom; i++) {
    const double gain = highest[i / kTiles][i % kTiles], where = from[i / kTiles][i % kTiles];
    const bool better = (gain > best) | ((gain == best) & (where < x));
    best = better ? gain : best;
    x = better ? where : x;
    y = better ? i : y;
  }
  uint32_t& changed = tile.rows[static_cast<int>(x)];
  changed = (changed & ~(1u << y)) | 1u << column;
  tile.rows[row] |= 1u << y;
}

template <int kRoom, bool kIsSide>
void fill_up(Fitting<kRoom, kIsSide>& f, int lane) {
  Tile<kRoom> tile;
  for (int x = 0; x < kRoom; x++) {
    tile.rows[x] = row_of(f, x, lane);
    for (int v = 0; v < tile.kVectors; v++) tile.finite[x][v] = finite_of(f.scores[lane] + x * kRoom + v * kTiles);
  }
  uint64_t rows = f.rows[lane], columns = f.columns[lane];
  while (rows) {
    const int row = __builtin_ctzll(rows) / 4, column = __builtin_ctzll(columns) / 4;
    exchange(tile, row, column);
    rows -= uint64_t{1} << 4 * row;
    columns -= uint64_t{1} << 4 * column;
  }
  for (int w = 0; w < f.kWords; w++) f.kept[w][lane] = 0;
  for (int x = 0; x < kRoom; x++) f.kept[x * kRoom / 64][lane] |= static_cast<uint64_t>(tile.rows[x]) << x * kRoom % 64;
}

// Eight bits as bytes of 0 and 1.
RAREFY_INLINE uint64_t bytes_of(uint32_t bits) {
  const uint64_t low = (bits & 127) * 0x0002040810204081u & 0x0101010101010101u;
  return low | static_cast<uint64_t>(bits >> 7 & 1) << 56;
}

template <int kRoom, bool kIsSide>
RAREFY_INLINE void store_lane(const Fitting<kRoom, kIsSide>& f, int lane) {
  uint8_t* to = f.call.mask + tile_begin(f.call, f.tiles[lane]);
  for (int r = 0; r < f.side(); r++) {
    const uint32_t row = row_of(f, r, lane);
    const uint64_t bytes[2] = {bytes_of(row & 255), bytes_of(row >> 8)};
    memcpy(to + r * f.call.columns, bytes, static_cast<size_t>(f.side()));
  }
}

template <int kRoom, bool kIsSide>
void keep_batch(Fitting<kRoom, kIsSide>& f, int64_t first, int wanted) {
  load_scores(f, first, wanted);
  fill_items(f);
  sort_items(f.items, f.side() * f.side());
  settle_items(f);
  take_highest(f);
  for (int t = 0; t < wanted; t++) {
    if (f.rows[t]) fill_up(f, t);
    store_lane(f, t);
  }
}

template <int kRoom, bool kIsSide>
void keep_fitting(const KeepRegularCall& c) {
  const int64_t tiles = c.rows / c.side * (c.columns / c.side);
  const int64_t batches = (tiles + kTiles - 1) / kTiles;
#pragma omp parallel num_threads(c.threads)
  {
    Fitting<kRoom, kIsSide> f(c);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < batches; b++)
      keep_batch(f, b * kTiles, static_cast<int>(min_of(int64_t{kTiles}, tiles - b * kTiles)));
  }
}

}  // namespace rarefy::RAREFY_ISA
