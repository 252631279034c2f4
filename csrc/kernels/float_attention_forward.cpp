// Causal attention in float32: 96 queries at a time, with 192 keys at a time. A later key may have a larger score than all
// before; what was summed until then is scaled to it.
#include <omp.h>

#include "buffer.h"
#include "exponential.h"
#include "float_attention.h"
#include "operations.h"
#include "partition.h"

namespace rarefy::RAREFY_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

struct ForwardBuffers {
  float *rows, *keys, *values;
  float *weights, *mixed;  // of a block of queries
  float *most, *sums;      // of each query: the largest score until now, and the sum of weights

  ForwardBuffers(const HeadShape& s, FloatScratch& scratch) {
    rows = scratch.take(s.cells());
    keys = scratch.take(s.panel_cells());
    values = scratch.take(s.cells());
    weights = scratch.take(kQueries * kKeys);
    mixed = scratch.take(static_cast<size_t>(kQueries) * s.width);
    most = scratch.take(kQueries);
    sums = scratch.take(kQueries);
  }
};

struct Forward {
  const AttentionForwardCall& call;
  const HeadShape s;
  const ForwardBuffers b;

  void pack(int64_t sample, int head) const {
    copy_rows(head_of(call.key, sample, head), call.key.position, s, b.rows);
    make_panels(b.rows, s, b.keys);
    copy_rows(head_of(call.value, sample, head), call.value.position, s, b.values);
    copy_rows(head_of(call.query, sample, head), call.query.position, s, b.rows);
  }

  RAREFY_INLINE Vec seen_of(Vec scores, int from, int seen) {
    IntVec place;
    RAREFY_UNROLL for (int i = 0; i < kLanes; i++) place[i] = i;
    return choose(place < seen - from, scores, all(-kInfinity));
  }

  // NaN is passed over: its weight will be NaN anyway.
  RAREFY_INLINE float largest(Vec most) {
    float found = most[0];
    for (int i = 1; i < kLanes; i++) found = most[i] > found ? most[i] : found;
    return found;
  }

  // The scores of `seen` keys become weights; what was mixed before is scaled to them.
  void weigh(int row, int seen) const {
    float* weights = b.weights + row * kKeys;
    Vec most = all(b.most[row]);
    for (int i = 0; i < seen; i += kLanes) {
      Vec scores = load(weights + i);
      if (i + kLanes > seen) {
        scores = seen_of(scores, i, seen);
        store(weights + i, scores);
      }
      most = choose(scores > most, scores, most);
    }
    const float largest_now = largest(most);
    // Of infinitely small scores alone every difference would be NaN, until a finite one comes.
    const float offset = largest_now == -kInfinity ? 0 : largest_now;
    Vec sum{};
    for (int i = 0; i < seen; i += kLanes) {
      const Vec weight = decay(load(weights + i) - offset);
      store(weights + i, weight);
      sum += weight;
    }
    const float kept = decay(all(b.most[row] - offset))[0];
    b.sums[row] = b.sums[row] * kept + lane_sum(sum);
    b.most[row] = largest_now;
    if (kept != 1) scale(b.mixed + static_cast<size_t>(row) * s.width, kept);
  }

  void scale(float* row, float factor) const {
    for (int d = 0; d < s.width; d += kLanes) store(row + d, load(row + d) * factor);
  }

  // Six queries from `query` on, of which the block began at `begin`, with the keys from `key` on that they see.
  void attend(int begin, int query, int key) const {
    const int row = query - begin;
    const int common = min_of(kKeys, query - key + 1), seen = min_of(kKeys, query - key + kGroup);
    score_rows(b.rows + static_cast<size_t>(query) * s.width, s.width, b.keys + static_cast<size_t>(key) * s.size, s.size,
               seen, call.shape.scale, b.weights + row * kKeys);
    for (int i = 0; i < kGroup; i++) weigh(row + i, min_of(kKeys, query + i - key + 1));
    mix_rows(b.weights + row * kKeys, b.values + static_cast<size_t>(key) * s.width, common, common < seen, s.width,
             b.mixed + static_cast<size_t>(row) * s.width);
  }

  void clear() const {
    memset(b.mixed, 0, static_cast<size_t>(kQueries) * s.width * sizeof(float));
    for (int i = 0; i < kQueries; i++) {
      b.most[i] = -kInfinity;
      b.sums[i] = 0;
    }
  }

  void write(int64_t sample, int head, int begin) const {
    const int64_t stride = static_cast<int64_t>(call.shape.heads) * s.size;
    float* out = static_cast<float*>(call.mixed) + (sample * s.length + begin) * stride + head * s.size;
    float* softmax = call.softmax + 2 * ((sample * call.shape.heads + head) * s.length + begin);
    for (int i = 0; i < min_of(kQueries, s.length - begin); i++, out += stride) {
      const float share = 1 / b.sums[i];
      float* row = b.mixed + static_cast<size_t>(i) * s.width;
      scale(row, share);
      memcpy(out, row, s.size * sizeof(float));
      softmax[2 * i] = b.most[i];
      softmax[2 * i + 1] = share;
    }
  }

  void run(int64_t sample, int head) const {
    pack(sample, head);
    for (int begin = 0; begin < s.length; begin += kQueries) {
      clear();
      const int end = min_of(s.length, begin + kQueries);
      for (int key = 0; key < end; key += kKeys)
        for (int query = begin; query < end; query += kGroup) attend(begin, query, key);
      write(sample, head, begin);
    }
  }
};

}  // namespace

bool attention_forward(const AttentionForwardCall& c) {
  const HeadShape s(c.shape);
  const int64_t tasks = c.shape.samples * c.shape.heads;
  const int threads = static_cast<int>(min_of(tasks, static_cast<int64_t>(useful_threads(c.threads, tasks * head_work(s)))));
  FloatScratch measure(nullptr);
  const ForwardBuffers empty(s, measure);
  const Buffer memory(measure.taken() * threads);
  if (!memory.ok()) return false;
#pragma omp parallel num_threads(threads)
  {
    FloatScratch scratch(memory.as<float>() + measure.taken() / sizeof(float) * omp_get_thread_num());
    const Forward forward{c, s, ForwardBuffers(s, scratch)};
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++)
      forward.run(task / c.shape.heads, static_cast<int>(task % c.shape.heads));
  }
  return true;
}

}  // namespace rarefy::RAREFY_ISA
