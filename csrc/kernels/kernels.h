// The interface between the bindings and the kernels. Plain data only: every instruction set includes it.
//
// Storage of a sparse matrix [rows, columns] ("panels"). The columns are cut in panels of `width`; nonzeros are
// ordered by panel, then row, then column. Row r of panel p owns positions starts[p * rows + r] up to the next
// entry of `starts`, and offsets[position] is its column minus p * width: 16 bits suffice for any matrix.
#pragma once
#include <cstdint>

namespace rarefy {

struct Panels {
  int rows, columns, width;
  const int32_t* starts;    // [panels * rows + 1]
  const uint16_t* offsets;  // [nonzeros]

  int count() const { return columns > width ? (columns + width - 1) / width : 1; }
  int64_t nonzeros() const { return starts[static_cast<int64_t>(count()) * rows]; }
};

enum class Element : int { kFloat32 = 0, kBfloat16 = 1 };

// y[token, row] = bias[row] + sum over the nonzeros of the row: values * x[token, column]
struct ForwardCall {
  int64_t tokens;
  Panels weight;
  const float* values;  // in the order of `weight`
  const void* x;        // [tokens, weight.columns], contiguous, of type `element`
  const float* bias;    // [weight.rows] or null
  void* y;              // [tokens, weight.rows], contiguous, of type `element`
  Element element;
  int threads;
};

// From grad = dL/dy: grad_x = grad · W, grad_values = (gradᵀ · x) at the nonzeros, grad_bias = column sums of grad.
struct BackwardCall {
  int64_t tokens;
  Panels transposed;       // rows of Wᵀ: transposed.rows = columns of W
  const int32_t* order;    // position in `values` of each nonzero of `transposed`
  const float* values;     // in the order of W
  const void* x;           // [tokens, transposed.rows]; read only if grad_values is wanted
  const void* grad;        // [tokens, transposed.columns]
  void* grad_x;            // [tokens, transposed.rows] or null
  float* grad_values;      // [nonzeros], in the order of W, or null
  float* grad_bias;        // [transposed.columns] or null
  Element element;
  int threads;
};

// mask = the `count` highest scores among the candidates; ties go to the lowest index, NaN ranks last.
struct KeepTopCall {
  const float* scores;
  const uint8_t* candidates;  // null: all are candidates
  int64_t size, count;
  uint8_t* mask;
  int threads;
};

// The kernels of one instruction set. A call returns false when memory ran out, and has then done nothing lasting.
struct KernelTable {
  bool (*forward)(const ForwardCall&);
  bool (*backward)(const BackwardCall&);
  bool (*keep_top)(const KeepTopCall&);
  void (*select)(void* data, const uint8_t* mask, int64_t size, int element_bytes, int threads);
  void (*keep_n_of_m)(const float* scores, int64_t groups, int n, int m, uint8_t* mask, int threads);
  void (*block_sums)(const float* scores, int64_t rows, int64_t columns, int block_rows, int block_columns,
                     float* sums, int threads);
};

// ---- compiled once, for the baseline instruction set ---------------------------------------------------------

void panels_count(const uint8_t* mask, int rows, int columns, int width, int32_t* starts, int threads);
void panels_fill(const uint8_t* mask, const Panels& panels, uint16_t* offsets, int threads);
void panels_transpose(const Panels& panels, int width, int32_t* starts, uint16_t* offsets, int32_t* order,
                      int threads);
void panels_positions(const Panels& panels, int64_t* positions, int threads);

// For each nonzero the position in `previous` of the same place of the matrix, or -1.
void panels_sources(const Panels& panels, const Panels& previous, int64_t* sources, int threads);

// A matrix from values, zero elsewhere, with elements of 1 or 4 bytes; and the reverse for elements of 4 bytes.
void panels_scatter(const Panels& panels, const void* values, void* matrix, int element_bytes, int threads);
void panels_gather(const Panels& panels, const uint32_t* matrix, uint32_t* values, int threads);

// The k-th largest of `size` keys, 1 <= k <= size; reorders them.
uint32_t kth_largest(uint32_t* keys, int64_t size, int64_t k);

}  // namespace rarefy
