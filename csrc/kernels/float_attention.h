// One head of attention in float32 vectors: how it is laid out, and products whose sums stay in registers.
//
// A product takes six rows at a time. Its left operand is read number by number, its right one as rows of vectors. The
// scores of queries and keys take their right operand from "panels", [keys / kPanel][features][kPanel]; everything else
// takes rows as they are, filled up with zeros to whole vectors.
//
// What a position does not see is never multiplied, not even by a weight of zero: it may be infinite.
#pragma once
#include "attention.h"
#include "simd.h"

namespace rarefy::RAREFY_ISA {

constexpr int kGroup = 6;  // rows
// 24 of 32 registers hold sums with 512-bit vectors, 12 of 16 with shorter ones.
constexpr int kWide = RAREFY_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kPanel = kWide * kLanes;
// Blocks of queries and keys whose weights are computed at once. Both are multiples of kGroup, keys also of kPanel.
constexpr int kQueries = 96;
constexpr int kKeys = 192;
static_assert(kQueries % kGroup == 0 && kKeys % kGroup == 0 && kKeys % kPanel == 0 && kKeys % kQueries == 0);

struct HeadShape {
  int length, size;
  int room, width;  // length and size, filled up to whole groups and vectors

  explicit HeadShape(const AttentionShape& s)
      : length(s.length), size(s.size), room(up(up(s.length, kGroup), kLanes)), width(up(s.size, kLanes)) {}
  static int up(int n, int unit) { return (n + unit - 1) / unit * unit; }
  size_t cells() const { return static_cast<size_t>(room) * width; }
  size_t panel_cells() const { return static_cast<size_t>(up(room, kPanel)) * size; }
};

RAREFY_INLINE const float* head_of(const Heads& h, int64_t sample, int head) {
  return static_cast<const float*>(h.data) + sample * h.sample + head * h.head;
}

// source [length, size] -> rows [room][width]
RAREFY_INLINE void copy_rows(const float* source, int64_t stride, const HeadShape& s, float* rows) {
  for (int t = 0; t < s.length; t++, rows += s.width) {
    memcpy(rows, source + t * stride, s.size * sizeof(float));
    memset(rows + s.size, 0, (s.width - s.size) * sizeof(float));
  }
  memset(rows, 0, static_cast<size_t>(s.room - s.length) * s.width * sizeof(float));
}

// rows -> panels [up(room, kPanel) / kPanel][size][kPanel], of which only `room` columns are written
RAREFY_INLINE void make_panels(const float* rows, const HeadShape& s, float* panels) {
  for (int t = 0; t < s.room; t += kLanes) {
    float* panel = panels + static_cast<size_t>(t / kPanel) * s.size * kPanel + t % kPanel;
    for (int d = 0; d < s.size; d += kLanes) {
      Vec square[kLanes];
      RAREFY_UNROLL for (int i = 0; i < kLanes; i++) square[i] = load(rows + static_cast<size_t>(t + i) * s.width + d);
      transpose(square);
      for (int i = 0; i < min_of(kLanes, s.size - d); i++) store(panel + (d + i) * kPanel, square[i]);
    }
  }
}

// The left operand of six rows: number `k` of row `r` is data[r * row + k * step].
struct Left {
  const float* data;
  int64_t row;
  int64_t step;
};

template <int kVectors>
struct Sums {
  Vec of[kGroup][kVectors];

  RAREFY_INLINE Sums zero() {
    Sums s;
    RAREFY_UNROLL for (int r = 0; r < kGroup; r++)
      RAREFY_UNROLL for (int v = 0; v < kVectors; v++) s.of[r][v] = Vec{};
    return s;
  }
  RAREFY_INLINE Sums from(const float* rows, int64_t stride) {
    Sums s;
    RAREFY_UNROLL for (int r = 0; r < kGroup; r++)
      RAREFY_UNROLL for (int v = 0; v < kVectors; v++) s.of[r][v] = load(rows + r * stride + v * kLanes);
    return s;
  }
  inline __attribute__((always_inline)) void to(float* rows, int64_t stride) const {
    RAREFY_UNROLL for (int r = 0; r < kGroup; r++)
      RAREFY_UNROLL for (int v = 0; v < kVectors; v++) store(rows + r * stride + v * kLanes, of[r][v]);
  }

  // Adds number k of rows [first, last) times row k of the right operand.
  template <int kFirst, int kLast>
  inline __attribute__((always_inline)) void add(const Left& left, const float* right, int64_t stride, int k) {
    Vec input[kVectors];
    RAREFY_UNROLL for (int v = 0; v < kVectors; v++) input[v] = load(right + k * stride + v * kLanes);
    RAREFY_UNROLL for (int r = kFirst; r < kLast; r++) {
      const float factor = left.data[r * left.row + k * left.step];
      RAREFY_UNROLL for (int v = 0; v < kVectors; v++) of[r][v] += factor * input[v];
    }
  }
  inline __attribute__((always_inline)) void add_all(const Left& left, const float* right, int64_t stride, int begin,
                                                     int end) {
    for (int k = begin; k < end; k++) add<0, kGroup>(left, right, stride, k);
  }
  // Five numbers more, of which the first row takes none and each next row one more: later keys of six queries.
  inline __attribute__((always_inline)) void add_later_keys(const Left& left, const float* right, int64_t stride, int k) {
    add<1, kGroup>(left, right, stride, k);
    add<2, kGroup>(left, right, stride, k + 1);
    add<3, kGroup>(left, right, stride, k + 2);
    add<4, kGroup>(left, right, stride, k + 3);
    add<5, kGroup>(left, right, stride, k + 4);
  }
  // The first `count` of five numbers, of which the first row takes all and each next row one less: the queries that do not
  // see all of six keys.
  inline __attribute__((always_inline)) void add_first_queries(const Left& left, const float* right, int64_t stride,
                                                               int count) {
    if (count > 0) add<0, 1>(left, right, stride, 0);
    if (count > 1) add<0, 2>(left, right, stride, 1);
    if (count > 2) add<0, 3>(left, right, stride, 2);
    if (count > 3) add<0, 4>(left, right, stride, 3);
    if (count > 4) add<0, 5>(left, right, stride, 4);
  }
};

// Calls run<n>(column) for the vectors of a row in turn, n of them at a time: kWide, and what is left at the end.
template <class Run>
RAREFY_INLINE void each_width(int width, Run&& run) {
  int column = 0;
  for (; column + kPanel - kLanes < width; column += kPanel) run.template operator()<kWide>(column);
  const int vectors = (width - column + kLanes - 1) / kLanes;
  if (vectors == 1) run.template operator()<1>(column);
  if constexpr (kWide > 2) {
    if (vectors == 2) run.template operator()<2>(column);
    if (vectors == 3) run.template operator()<3>(column);
  }
}

// The products of six rows [depth], `stride` apart, with `width` rows of panels -> out [6][kKeys], each times `scale`.
RAREFY_INLINE void score_rows(const float* rows, int64_t stride, const float* panels, int depth, int width, float scale,
                              float* out) {
  each_width(width, [&]<int kVectors>(int column) __attribute__((always_inline)) {
    Sums<kVectors> sums = Sums<kVectors>::zero();
    sums.add_all({rows, stride, 1}, panels + static_cast<size_t>(column) * depth, kPanel, 0, depth);
    RAREFY_UNROLL for (int r = 0; r < kGroup; r++)
      RAREFY_UNROLL for (int v = 0; v < kVectors; v++) store(out + r * kKeys + column + v * kLanes, sums.of[r][v] * scale);
  });
}

// Adds weights [6][kKeys] · rows to sums [6][width]. All six queries see `common` keys; if `is_last`, each next one sees one
// more than the query before.
RAREFY_INLINE void mix_rows(const float* weights, const float* rows, int common, bool is_last, int width, float* sums) {
  const Left left{weights, kKeys, 1};
  each_width(width, [&]<int kVectors>(int column) __attribute__((always_inline)) {
    Sums<kVectors> sum = Sums<kVectors>::from(sums + column, width);
    sum.add_all(left, rows + column, width, 0, common);
    if (is_last) sum.add_later_keys(left, rows + column, width, common);
    sum.to(sums + column, width);
  });
}

// Parts of one thread's memory, one after the other.
class FloatScratch {
 public:
  explicit FloatScratch(float* begin) : next_(begin) {}
  float* take(size_t count) {
    float* part = next_;
    next_ += (count + 15) / 16 * 16;
    return part;
  }
  // Of nothing: how many bytes a row of takes needs.
  size_t taken() const { return reinterpret_cast<size_t>(next_); }

 private:
  float* next_;
};

// Multiply-adds of one head, about.
RAREFY_INLINE int64_t head_work(const HeadShape& s) { return static_cast<int64_t>(s.length) * s.length * s.width; }

}  // namespace rarefy::RAREFY_ISA
