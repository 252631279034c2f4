// Gradients of causal attention with the matrix unit. The weights are computed anew, 64 keys and 128 queries at a time, as
// [keys, queries]: so they are left operands for the gradients of keys and values, and what belongs to a query is a vector.
#include <omp.h>

#include "attention_operations.h"
#include "attention_tiles.h"
#include "buffer.h"
#include "partition.h"

namespace rarefy::RAREFY_ISA {
namespace {

constexpr int kKeys = 64, kQueries = 128;  // at a time

struct BackwardBuffers {
  Bfloat16 *rows, *key, *key_columns, *value, *query, *query_pairs, *grad, *grad_pairs;
  Bfloat16 *weights, *slopes, *slope_pairs;  // of the scores, of which slopes are the gradients
  float *scores, *slope_sums, *dots, *logs, *grad_query, *grad_key, *grad_value;
  int64_t stride;  // of grad_query, which is transposed

  BackwardBuffers(const HeadShape& s, Scratch& scratch) : stride(s.room + 16) {
    Bfloat16** const operands[] = {&rows, &key, &key_columns, &value, &query, &query_pairs, &grad, &grad_pairs};
    for (Bfloat16** operand : operands) *operand = scratch.take<Bfloat16>(s.cells());
    Bfloat16** const parts[] = {&weights, &slopes, &slope_pairs};
    for (Bfloat16** part : parts) *part = scratch.take<Bfloat16>(kKeys * kQueries);
    scores = scratch.take<float>(kSide * kSide);
    slope_sums = scratch.take<float>(kSide * kSide);
    dots = scratch.take<float>(s.room);
    logs = scratch.take<float>(s.room);
    grad_query = scratch.take<float>(s.width * stride);
    grad_key = scratch.take<float>(s.cells());
    grad_value = scratch.take<float>(s.cells());
  }
};

struct Backward {
  const AttentionBackwardCall& call;
  const HeadShape s;
  const BackwardBuffers b;

  float factor() const { return call.shape.scale * 1.4426950408889634f; }

  // The row sums of grad · mixed, which are those of weights · (their gradients).
  void dot(int64_t sample, int head) const {
    const Bfloat16* grad = head_of(call.grad, sample, head);
    const Bfloat16* mixed = head_of(call.mixed, sample, head);
    memset(b.dots, 0, s.room * sizeof(float));
    for (int t = 0; t < s.length; t++, grad += call.grad.position, mixed += call.mixed.position) {
      Vec sum{};
      int i = 0;
      for (; i + kLanes <= s.size; i += kLanes) sum += load(grad + i) * load(mixed + i);
      float rest = 0;
      for (; i < s.size; i++) rest += to_float(grad[i]) * to_float(mixed[i]);
      b.dots[t] = lane_sum(sum) + rest;
    }
  }

  void pack(int64_t sample, int head) const {
    copy_rows(head_of(call.key, sample, head), call.key.position, s, b.key);
    pair_positions<true>(b.key, s, b.key_columns);
    copy_rows(head_of(call.value, sample, head), call.value.position, s, b.value);
    copy_rows(head_of(call.query, sample, head), call.query.position, s, b.rows);
    pair_features(b.rows, s, b.query);
    pair_positions<false>(b.rows, s, b.query_pairs);
    copy_rows(head_of(call.grad, sample, head), call.grad.position, s, b.rows);
    pair_features(b.rows, s, b.grad);
    pair_positions<false>(b.rows, s, b.grad_pairs);
    const float* logs = call.softmax + (sample * call.shape.heads + head) * s.length;
    memcpy(b.logs, logs, s.length * sizeof(float));
    memset(b.logs + s.length, 0, (s.room - s.length) * sizeof(float));
    dot(sample, head);
    memset(b.grad_query, 0, s.width * b.stride * sizeof(float));
    memset(b.grad_key, 0, s.cells() * sizeof(float));
    memset(b.grad_value, 0, s.cells() * sizeof(float));
  }

  // rows · columnsᵀ of 32 keys and 32 queries.
  void products(const Bfloat16* rows, const Bfloat16* columns, int key, int query, float* sums) const {
    const Bfloat16* upper = rows + static_cast<size_t>(key) * s.width;
    const int64_t column = static_cast<int64_t>(s.deep()) * kTile;
    const Bfloat16* first = columns + query / 16 * column;
    multiply<false>({.upper = upper,
                     .lower = upper + 16 * s.width,
                     .row_bytes = s.width * 2,
                     .left_step = kSide,
                     .first = first,
                     .second = first + column,
                     .right_step = kTile,
                     .depth = s.deep()},
                    sums, kSide);
  }

  struct Row {
    __m512i weights, slopes;  // of 32 queries
  };

  // Of one key, seen by the queries from `first` on.
  RAREFY_INLINE Row weigh_row(const Backward& m, int row, int query, int first) {
    __m512 weights[2], slopes[2];
    const uint32_t mask = first <= 0 ? ~0u : first >= kSide ? 0 : ~0u << first;
    RAREFY_UNROLL for (int i = 0; i < 2; i++) {
      const int at = row * kSide + i * kLanes, column = query + i * kLanes;
      const __m512 logs = _mm512_load_ps(m.b.logs + column), dots = _mm512_load_ps(m.b.dots + column);
      const __m512 scores = exponent(_mm512_load_ps(m.b.scores + at), _mm512_set1_ps(m.factor()), logs);
      const auto seen = static_cast<__mmask16>(mask >> 16 * i);
      weights[i] = _mm512_maskz_mov_ps(seen, power_of_two(scores));
      const __m512 change = _mm512_sub_ps(_mm512_load_ps(m.b.slope_sums + at), dots);
      slopes[i] = _mm512_maskz_mul_ps(seen, weights[i], change);
    }
    return {narrow(weights[0], weights[1]), narrow(slopes[0], slopes[1])};
  }

  // The weights and slopes of 32 keys and 32 queries, which go to places `left` and, as pairs of keys, `right`.
  void weigh(int key, int query, size_t left, size_t right, size_t next) const {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                         36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int row = 0; row < kSide; row += 2) {
      const size_t at = left + (row / 16) * (kQueries / kSide * kTile) + row % 16 * kSide;
      const Row even = weigh_row(*this, row, query, key + row - query);
      const Row odd = weigh_row(*this, row + 1, query, key + row + 1 - query);
      _mm512_store_si512(b.weights + at, even.weights);
      _mm512_store_si512(b.weights + at + kSide, odd.weights);
      _mm512_store_si512(b.slopes + at, even.slopes);
      _mm512_store_si512(b.slopes + at + kSide, odd.slopes);
      Bfloat16* pairs = b.slope_pairs + right + row / 2 * kSide;
      _mm512_store_si512(pairs, _mm512_permutex2var_epi16(even.slopes, low, odd.slopes));
      _mm512_store_si512(pairs + next, _mm512_permutex2var_epi16(even.slopes, high, odd.slopes));
    }
  }

  void weigh_block(int key, int keys, int query, int queries) const {
    for (int k = 0; k < keys; k += kSide)
      for (int q = 0; q < queries; q += kSide) {
        products(b.key, b.query, key + k, query + q, b.scores);
        products(b.value, b.grad, key + k, query + q, b.slope_sums);
        const size_t left = k / 16 * (kQueries / kSide * kTile) + q / kSide * kTile;
        const size_t next = kKeys / kSide * kTile;
        weigh(key + k, query + q, left, q / 16 * next + k / kSide * kTile, next);
      }
  }

  // sums [keys, features] += left [keys, queries] · right
  void add_to_keys(const Bfloat16* left, const Bfloat16* right, int key, int keys, int query, int queries, float* sums) const {
    const int64_t step = static_cast<int64_t>(s.across()) * kTile;
    for (int k = 0; k < keys; k += kSide)
      for (int d = 0; d < s.width; d += kSide) {
        const Bfloat16* upper = left + k / 16 * (kQueries / kSide * kTile);
        const Bfloat16* first = right + query / kSide * step + d / 16 * kTile;
        multiply<true>({.upper = upper,
                        .lower = upper + kQueries / kSide * kTile,
                        .row_bytes = 64,
                        .left_step = kTile,
                        .first = first,
                        .second = first + kTile,
                        .right_step = step,
                        .depth = queries / kSide},
                       sums + static_cast<size_t>(key + k) * s.width + d, s.width);
      }
  }

  // grad_query [features, queries] += keysᵀ · slopes
  void add_to_queries(int key, int keys, int query, int queries) const {
    const int64_t step = static_cast<int64_t>(s.across()) * kTile;
    for (int q = 0; q < queries; q += kSide)
      for (int d = 0; d < s.width; d += kSide) {
        const Bfloat16* upper = b.key_columns + key / kSide * step + d / 16 * kTile;
        const Bfloat16* first = b.slope_pairs + q / 16 * (kKeys / kSide * kTile);
        multiply<true>({.upper = upper,
                        .lower = upper + kTile,
                        .row_bytes = 64,
                        .left_step = step,
                        .first = first,
                        .second = first + kKeys / kSide * kTile,
                        .right_step = kTile,
                        .depth = keys / kSide},
                       b.grad_query + d * b.stride + query + q, b.stride);
      }
  }

  Bfloat16* target(void* tensor, int64_t sample, int head) const {
    const int64_t at = (sample * s.length * call.shape.heads + head) * s.size;
    return static_cast<Bfloat16*>(tensor) + at;
  }

  void write_rows(const float* sums, float scale, Bfloat16* out) const {
    for (int t = 0; t < s.length; t++, sums += s.width, out += static_cast<int64_t>(call.shape.heads) * s.size)
      for (int d = 0; d < s.size; d += kLanes)
        store_some(out + d, _mm512_mul_ps(_mm512_load_ps(sums + d), _mm512_set1_ps(scale)), s.size - d);
  }

  void write_columns(const float* sums, float scale, Bfloat16* out) const {
    const int64_t stride = static_cast<int64_t>(call.shape.heads) * s.size;
    for (int t = 0; t < s.length; t += kLanes)
      for (int d = 0; d < s.size; d += kLanes) {
        Vec square[kLanes];
        RAREFY_UNROLL for (int i = 0; i < kLanes; i++) square[i] = load(sums + (d + i) * b.stride + t) * scale;
        transpose(square);
        for (int i = 0; i < min_of(kLanes, s.length - t); i++)
          store_some(out + (t + i) * stride + d, reinterpret_cast<__m512>(square[i]), s.size - d);
      }
  }

  void run(int64_t sample, int head) const {
    pack(sample, head);
    for (int key = 0; key < s.room; key += kKeys)
      for (int query = key; query < s.room; query += kQueries) {
        const int keys = min_of(kKeys, s.room - key), queries = min_of(kQueries, s.room - query);
        weigh_block(key, keys, query, queries);
        add_to_keys(b.weights, b.grad_pairs, key, keys, query, queries, b.grad_value);
        add_to_keys(b.slopes, b.query_pairs, key, keys, query, queries, b.grad_key);
        add_to_queries(key, keys, query, queries);
      }
    write_columns(b.grad_query, call.shape.scale, target(call.grad_query, sample, head));
    write_rows(b.grad_key, call.shape.scale, target(call.grad_key, sample, head));
    write_rows(b.grad_value, 1, target(call.grad_value, sample, head));
  }
};

}  // namespace

bool attention_backward(const AttentionBackwardCall& c) {
  const HeadShape s(c.shape);
  const int64_t tasks = c.shape.samples * c.shape.heads;
  const int64_t work = tasks * s.room * s.room * s.width;
  const int threads = static_cast<int>(min_of(tasks, static_cast<int64_t>(useful_threads(c.threads, work))));
  Scratch measure(nullptr);
  const BackwardBuffers empty(s, measure);
  const Buffer memory(measure.taken() * threads);
  if (!memory.ok()) return false;
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(memory.as<char>() + measure.taken() * omp_get_thread_num());
    const Backward backward{c, s, BackwardBuffers(s, scratch)};
    configure_tiles(16);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++)
      backward.run(task / c.shape.heads, static_cast<int>(task % c.shape.heads));
    RAREFY_TILE_RELEASE();
  }
  return true;
}

extern const AttentionTable attention_kernels;
const AttentionTable attention_kernels{.forward = attention_forward, .backward = attention_backward};

}  // namespace rarefy::RAREFY_ISA
