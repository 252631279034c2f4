// Causal attention with the matrix unit: 32 queries at a time, with all the keys that they see.
#include <omp.h>

#include "attention_operations.h"
#include "attention_tiles.h"
#include "buffer.h"
#include "partition.h"

namespace rarefy::RAREFY_ISA {
namespace {

struct ForwardBuffers {
  Bfloat16 *rows, *query, *key, *value, *weights;
  float *scores, *mixed;
  int64_t stride;  // of the scores: no power of two, or all rows would share a few lines of the cache

  ForwardBuffers(const HeadShape& s, Scratch& scratch) : stride(s.room + 16) {
    rows = scratch.take<Bfloat16>(s.cells());
    query = scratch.take<Bfloat16>(s.cells());
    key = scratch.take<Bfloat16>(s.cells());
    value = scratch.take<Bfloat16>(s.cells());
    weights = scratch.take<Bfloat16>(static_cast<size_t>(kSide) * s.room);
    scores = scratch.take<float>(kSide * stride);
    mixed = scratch.take<float>(kSide * kSide);
  }
};

struct Forward {
  const AttentionForwardCall& call;
  const HeadShape s;
  const ForwardBuffers b;

  float factor() const { return call.shape.scale * 1.4426950408889634f; }

  void pack(int64_t sample, int head) const {
    copy_rows(head_of(call.query, sample, head), call.query.position, s, b.query);
    copy_rows(head_of(call.key, sample, head), call.key.position, s, b.rows);
    pair_features(b.rows, s, b.key);
    copy_rows(head_of(call.value, sample, head), call.value.position, s, b.rows);
    pair_positions<false>(b.rows, s, b.value);
  }

  // Scores of 32 queries from `query` on.
  void score(int query) const {
    const Bfloat16* upper = b.query + static_cast<size_t>(query) * s.width;
    const int64_t column = static_cast<int64_t>(s.deep()) * kTile;
    for (int key = 0; key < query + kSide; key += kSide) {
      const Bfloat16* first = b.key + key / 16 * column;
      multiply<false>({.upper = upper,
                       .lower = upper + 16 * s.width,
                       .row_bytes = s.width * 2,
                       .left_step = kSide,
                       .first = first,
                       .second = first + column,
                       .right_step = kTile,
                       .depth = s.deep()},
                      b.scores + key, b.stride);
    }
  }

  // With intrinsics of its own: GCC 12 takes those for this for a use of uninitialized memory.
  static float lane_max(__m512 v) {
    v = _mm512_max_ps(v, _mm512_shuffle_f32x4(v, v, 0x4e));
    v = _mm512_max_ps(v, _mm512_shuffle_f32x4(v, v, 0xb1));
    v = _mm512_max_ps(v, _mm512_shuffle_ps(v, v, 0x4e));
    v = _mm512_max_ps(v, _mm512_shuffle_ps(v, v, 0xb1));
    return _mm512_cvtss_f32(v);
  }

  static float largest(const float* scores, int seen) {
    __m512 most = _mm512_set1_ps(-__builtin_inff());
    int i = 0;
    for (; i + kLanes <= seen; i += kLanes) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i));
    const auto rest = static_cast<__mmask16>((1u << (seen - i)) - 1);
    return lane_max(_mm512_mask_max_ps(most, rest, most, _mm512_maskz_loadu_ps(rest, scores + i)));
  }

  // Row `row` of the weights, not yet divided by their sum, which is returned; `log` becomes its logarithm.
  float weigh(int row, int seen, int keys, float* log) const {
    const float* scores = b.scores + row * b.stride;
    Bfloat16* weights = b.weights + row * kSide;  // tiles of 16 rows follow each other, two for each 32 keys
    const float most = largest(scores, seen) * factor();
    const __m512 by = _mm512_set1_ps(factor()), offset = _mm512_set1_ps(most);
    __m512 low_sum = _mm512_setzero_ps(), high_sum = _mm512_setzero_ps();
    for (int key = 0; key < keys; key += kSide, weights += 2 * kTile) {
      __m512 low = power_of_two(exponent(_mm512_load_ps(scores + key), by, offset));
      __m512 high = power_of_two(exponent(_mm512_load_ps(scores + key + 16), by, offset));
      if (key + kSide > seen) {  // the last of them are later positions
        const uint32_t mask = seen - key >= kSide ? ~0u : (1u << (seen - key)) - 1;
        low = _mm512_maskz_mov_ps(static_cast<__mmask16>(mask), low);
        high = _mm512_maskz_mov_ps(static_cast<__mmask16>(mask >> 16), high);
      }
      low_sum = _mm512_add_ps(low_sum, low);
      high_sum = _mm512_add_ps(high_sum, high);
      _mm512_store_si512(weights, narrow(low, high));
    }
    const float sum = lane_sum(reinterpret_cast<Vec>(_mm512_add_ps(low_sum, high_sum)));
    *log = most + __builtin_log2f(sum);
    return sum;
  }

  // The mixed values of 32 queries, each divided by its sum of weights.
  void mix(int64_t sample, int head, int query, const float* sums) const {
    const int64_t step = static_cast<int64_t>(s.across()) * kTile, stride = static_cast<int64_t>(call.shape.heads) * s.size;
    Bfloat16* out = static_cast<Bfloat16*>(call.mixed) + (sample * s.length + query) * stride + head * s.size;
    for (int d = 0; d < s.width; d += kSide) {
      const Bfloat16* first = b.value + d / 16 * kTile;
      multiply<false>({.upper = b.weights,
                       .lower = b.weights + kTile,
                       .row_bytes = 64,
                       .left_step = 2 * kTile,
                       .first = first,
                       .second = first + kTile,
                       .right_step = step,
                       .depth = query / kSide + 1},
                      b.mixed, kSide);
      for (int row = 0; row < min_of(kSide, s.length - query); row++)
        for (int i = 0; i < kSide && d + i < s.size; i += kLanes) {
          const __m512 v = _mm512_div_ps(_mm512_load_ps(b.mixed + row * kSide + i), _mm512_set1_ps(sums[row]));
          store_some(out + row * stride + d + i, v, s.size - d - i);
        }
    }
  }

  void run(int64_t sample, int head) const {
    pack(sample, head);
    float* logs = call.softmax + (sample * call.shape.heads + head) * s.length;
    for (int query = 0; query < s.length; query += kSide) {
      float sums[kSide], log[kSide];
      score(query);
      for (int row = 0; row < kSide; row++) sums[row] = weigh(row, query + row + 1, query + kSide, log + row);
      memcpy(logs + query, log, min_of(kSide, s.length - query) * sizeof(float));
      mix(sample, head, query, sums);
    }
  }
};

}  // namespace

bool attention_forward(const AttentionForwardCall& c) {
  const HeadShape s(c.shape);
  const int64_t tasks = c.shape.samples * c.shape.heads;
  const int64_t work = tasks * s.room * s.room * s.width;
  const int threads = static_cast<int>(min_of(tasks, static_cast<int64_t>(useful_threads(c.threads, work))));
  Scratch measure(nullptr);
  const ForwardBuffers empty(s, measure);
  const Buffer memory(measure.taken() * threads);
  if (!memory.ok()) return false;
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(memory.as<char>() + measure.taken() * omp_get_thread_num());
    const Forward forward{c, s, ForwardBuffers(s, scratch)};
    configure_tiles(16);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++)
      forward.run(task / c.shape.heads, static_cast<int>(task % c.shape.heads));
    RAREFY_TILE_RELEASE();
  }
  return true;
}

}  // namespace rarefy::RAREFY_ISA
