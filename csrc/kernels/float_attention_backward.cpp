// Gradients of causal attention in float32. The weights are computed anew, 96 queries and 192 keys at a time.
#include <omp.h>

#include "buffer.h"
#include "exponential.h"
#include "float_attention.h"
#include "operations.h"
#include "partition.h"

namespace rarefy::RAREFY_ISA {
namespace {

struct BackwardBuffers {
  float *query, *key, *grad;     // rows
  float *key_panels, *value_panels;
  float *grad_key, *grad_value;  // rows, of all positions
  float* grad_query;             // of a block of queries
  float *weights, *slopes;       // of a block: slopes are the gradients of the scores
  float* dots;                   // of each query: grad · mixed, which is the sum of weights · (their gradients)

  BackwardBuffers(const HeadShape& s, FloatScratch& scratch) {
    float** const rows[] = {&query, &key, &grad, &grad_key, &grad_value};
    for (float** part : rows) *part = scratch.take(s.cells());
    key_panels = scratch.take(s.panel_cells());
    value_panels = scratch.take(s.panel_cells());
    grad_query = scratch.take(static_cast<size_t>(kQueries) * s.width);
    weights = scratch.take(kQueries * kKeys);
    slopes = scratch.take(kQueries * kKeys);
    dots = scratch.take(s.room);
  }
};

// Of six queries: what makes weights and slopes of products.
struct Softmax {
  float most[kGroup], share[kGroup], dots[kGroup];
};

struct Backward {
  const AttentionBackwardCall& call;
  const HeadShape s;
  const BackwardBuffers b;

  float* row_of(float* rows, int position) const { return rows + static_cast<size_t>(position) * s.width; }

  void dot(int64_t sample, int head) const {
    const float* mixed = head_of(call.mixed, sample, head);
    memset(b.dots, 0, s.room * sizeof(float));
    for (int t = 0; t < s.length; t++, mixed += call.mixed.position) {
      const float* grad = row_of(b.grad, t);
      Vec sum{};
      int i = 0;
      for (; i + kLanes <= s.size; i += kLanes) sum += load(grad + i) * load(mixed + i);
      float rest = 0;
      for (; i < s.size; i++) rest += grad[i] * mixed[i];
      b.dots[t] = lane_sum(sum) + rest;
    }
  }

  void pack(int64_t sample, int head) const {
    // The rows of the values are needed for their panels only; queries take their place.
    copy_rows(head_of(call.value, sample, head), call.value.position, s, b.query);
    make_panels(b.query, s, b.value_panels);
    copy_rows(head_of(call.query, sample, head), call.query.position, s, b.query);
    copy_rows(head_of(call.key, sample, head), call.key.position, s, b.key);
    make_panels(b.key, s, b.key_panels);
    copy_rows(head_of(call.grad, sample, head), call.grad.position, s, b.grad);
    dot(sample, head);
    memset(b.grad_key, 0, s.cells() * sizeof(float));
    memset(b.grad_value, 0, s.cells() * sizeof(float));
  }

  Softmax softmax_of(int64_t sample, int head, int query) const {
    const float* softmax = call.softmax + 2 * ((sample * call.shape.heads + head) * s.length + query);
    Softmax found{};  // of what is no position: weights of zero
    for (int r = 0; r < min_of(kGroup, s.length - query); r++) {
      found.most[r] = softmax[2 * r];
      found.share[r] = softmax[2 * r + 1];
      found.dots[r] = b.dots[query + r];
    }
    return found;
  }

  // The weights and slopes of six queries, `row` of their block, and the keys from `key` on that they see.
  void weigh(const Softmax& softmax, int query, int row, int key) const {
    const int seen = min_of(kKeys, query - key + kGroup);
    const size_t panels = static_cast<size_t>(key) * s.size;
    float *weights = b.weights + row * kKeys, *slopes = b.slopes + row * kKeys;
    score_rows(row_of(b.query, query), s.width, b.key_panels + panels, s.size, seen, call.shape.scale, weights);
    score_rows(row_of(b.grad, query), s.width, b.value_panels + panels, s.size, seen, 1, slopes);
    for (int r = 0; r < kGroup; r++, weights += kKeys, slopes += kKeys)
      for (int i = 0; i < seen; i += kLanes) {
        const Vec weight = decay(load(weights + i) - softmax.most[r]) * softmax.share[r];
        store(weights + i, weight);
        store(slopes + i, weight * (load(slopes + i) - softmax.dots[r]));
      }
  }

  // Adds parts [queries, keys]ᵀ · rows to the sums of six keys: from query `first` of the block to `last`. The first five
  // see some of these keys only where `is_first`.
  RAREFY_INLINE void add_to_keys(int width, const float* parts, const float* rows, int first, int last, bool is_first,
                                 float* sums) {
    const int some = is_first ? min_of(kGroup - 1, last - first) : 0;
    const Left left{parts + first * kKeys, 1, kKeys};
    each_width(width, [&]<int kVectors>(int column) __attribute__((always_inline)) {
      const float* right = rows + static_cast<size_t>(first) * width + column;
      Sums<kVectors> sum = Sums<kVectors>::from(sums + column, width);
      if (is_first) sum.add_first_queries(left, right, width, some);
      sum.add_all(left, right, width, some, last - first);
      sum.to(sums + column, width);
    });
  }

  void add_keys(int begin, int end, int key) const {
    for (int k = key; k < min_of(key + kKeys, end); k += kGroup) {
      const int first = max_of(begin, k);
      const bool is_first = first == k;
      const int from = first - begin, to = end - begin;
      add_to_keys(s.width, b.weights + k - key, row_of(b.grad, begin), from, to, is_first, row_of(b.grad_value, k));
      add_to_keys(s.width, b.slopes + k - key, row_of(b.query, begin), from, to, is_first, row_of(b.grad_key, k));
    }
  }

  void add_queries(int begin, int end, int key) const {
    for (int query = begin; query < end; query += kGroup) {
      const int common = min_of(kKeys, query - key + 1), row = query - begin;
      mix_rows(b.slopes + row * kKeys, row_of(b.key, key), common, common < kKeys, s.width, row_of(b.grad_query, row));
    }
  }

  void write(const float* rows, float scale, void* tensor, int64_t sample, int head, int begin, int end) const {
    const int64_t stride = static_cast<int64_t>(call.shape.heads) * s.size;
    float* out = static_cast<float*>(tensor) + (sample * s.length + begin) * stride + head * s.size;
    for (int t = begin; t < end; t++, rows += s.width, out += stride) {
      int d = 0;
      for (; d + kLanes <= s.size; d += kLanes) store(out + d, load(rows + d) * scale);
      for (; d < s.size; d++) out[d] = rows[d] * scale;
    }
  }

  void run(int64_t sample, int head) const {
    pack(sample, head);
    for (int begin = 0; begin < s.length; begin += kQueries) {
      const int end = min_of(s.length, begin + kQueries);
      memset(b.grad_query, 0, static_cast<size_t>(kQueries) * s.width * sizeof(float));
      for (int key = 0; key < end; key += kKeys) {
        for (int query = begin; query < end; query += kGroup)
          weigh(softmax_of(sample, head, query), query, query - begin, key);
        add_keys(begin, end, key);
        add_queries(begin, end, key);
      }
      write(b.grad_query, call.shape.scale, call.grad_query, sample, head, begin, end);
    }
    write(b.grad_key, call.shape.scale, call.grad_key, sample, head, 0, s.length);
    write(b.grad_value, 1, call.grad_value, sample, head, 0, s.length);
  }
};

}  // namespace

bool attention_backward(const AttentionBackwardCall& c) {
  const HeadShape s(c.shape);
  const int64_t tasks = c.shape.samples * c.shape.heads;
  const int threads = static_cast<int>(min_of(tasks, static_cast<int64_t>(useful_threads(c.threads, tasks * head_work(s)))));
  FloatScratch measure(nullptr);
  const BackwardBuffers empty(s, measure);
  const Buffer memory(measure.taken() * threads);
  if (!memory.ok()) return false;
#pragma omp parallel num_threads(threads)
  {
    FloatScratch scratch(memory.as<float>() + measure.taken() / sizeof(float) * omp_get_thread_num());
    const Backward backward{c, s, BackwardBuffers(s, scratch)};
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++)
      backward.run(task / c.shape.heads, static_cast<int>(task % c.shape.heads));
  }
  return true;
}

}  // namespace rarefy::RAREFY_ISA
