// The interface of the attention kernels, bfloat16 with the matrix unit and float32 with vectors. Plain data only.
//
// Causal attention of each head: mixed = softmax(scale · Q · Kᵀ) · V, where a position sees itself and what came before.
#pragma once
#include <cstdint>

namespace rarefy {

struct AttentionShape {
  int64_t samples;
  int heads;
  int length;
  int size;  // of a head
  float scale;
};

// [samples, length, heads, size] with any distances between samples, positions and heads, counted in elements.
struct Heads {
  const void* data;
  int64_t sample;
  int64_t position;
  int64_t head;
};

struct AttentionForwardCall {
  AttentionShape shape;
  Heads query;
  Heads key;
  Heads value;
  void* mixed;  // [samples, length, heads, size], contiguous
  // Of each position what the backward pass takes. bfloat16: [samples, heads, length], the logarithm of the sum of
  // exponentials, to the base 2. float32: [samples, heads, length, 2], the largest score, and 1 / the sum of
  // e^(score - largest).
  float* softmax;
  int threads;
};

struct AttentionBackwardCall {
  AttentionShape shape;
  Heads query;
  Heads key;
  Heads value;
  Heads mixed;
  Heads grad;            // dL/dmixed
  const float* softmax;  // as the forward pass wrote it
  void* grad_query;      // these three as `mixed` of the forward pass
  void* grad_key;
  void* grad_value;
  int threads;
};

// A call returns false when memory ran out, and has then done nothing lasting.
struct AttentionTable {
  bool (*forward)(const AttentionForwardCall&);
  bool (*backward)(const AttentionBackwardCall&);
};

}  // namespace rarefy
