// The interface between the bindings and the kernels. Plain data only: every instruction set includes it.
//
// Storage of a sparse matrix [rows, columns] ("panels"). The columns are cut in panels of `width`; nonzeros are
// ordered by panel, then row, then column. Row r of panel p owns positions starts[p * rows + r] up to the next
// entry of `starts`, and offsets[position] is its column minus p * width: 16 bits suffice for any matrix.
//
// Every operation takes one struct. The bindings fill it by name on both sides of the language border, because a swap
// among a dozen addresses compiles, runs and writes into somebody else's memory.
#pragma once
#include <cstdint>

namespace rarefy {

struct Layout {
  int rows;
  int columns;
  int width;
  const int32_t* starts;    // [panels * rows + 1]
  const uint16_t* offsets;  // [nonzeros]

  int count() const { return columns > width ? (columns + width - 1) / width : 1; }
  int64_t nonzeros() const { return starts[static_cast<int64_t>(count()) * rows]; }
};

enum class Element : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };  // the last in half.h's kernels only

// y[token, row] = bias[row] + sum over the nonzeros of the row: values * x[token, column]
struct ForwardCall {
  int64_t tokens;
  Layout weight;
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
  Layout transposed;       // rows of Wᵀ: transposed.rows = columns of W
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
  int64_t size;
  int64_t count;
  uint8_t* mask;
  bool* cuts_tie;  // written: whether some of several equal scores were kept and others were not
  int threads;
};

// In place: data = mask ? data : fill.
struct SelectCall {
  void* data;
  const uint8_t* mask;
  uint64_t fill;  // the bits of an element, those above it ignored
  int64_t size;
  int element_bytes;  // 2, 4 or 8
  int threads;
};

// Whether data has only zeros, of either sign, where the mask has none.
struct HoldsZerosCall {
  const void* data;
  const uint8_t* mask;
  int64_t size;
  int element_bytes;  // 2, 4 or 8
  int threads;
};

// mask = the highest scores among the candidates of every `m` neighbours; of equal ones the first, NaN last.
struct KeepInGroupsCall {
  const float* scores;        // [groups, m]
  const uint8_t* candidates;  // [groups, m]; null: all
  const int32_t* counts;      // [m + 1] how many a group keeps, by the number of its candidates
  int64_t groups;
  int m;
  uint8_t* mask;
  uint8_t* contested;  // [groups] written: whether some of several equal scores were kept and others were not
  int threads;
};

// mask = as many of the highest scores in every row and column of each square tile, by rarefy/patterns/tiles.py.
struct KeepRegularCall {
  const float* scores;    // [rows, columns], multiples of side
  bool by_size;           // whether the score is what is there without its sign
  const uint8_t* marked;  // [rows, columns] where `fill` stands for the score; null: nowhere
  float fill;
  int64_t rows;
  int64_t columns;
  int side;                // up to 256
  int count;               // 0 < count < side
  const uint8_t* options;  // [option_count, side * side] all masks of a tile, or null: the highest scores that fit
  int option_count;
  // Entries are numbered tile by tile. To the place in the weight of each `start` is added, and the sum mixed.
  int64_t start;
  const int64_t* places;  // [rows * columns]; null: as they are numbered
  uint8_t* mask;          // [rows, columns]
  int threads;
};

// sums = the sum of each block [block_rows, block_columns] of a matrix [rows, columns] that the blocks divide.
struct BlockSumsCall {
  const float* scores;
  int64_t rows;
  int64_t columns;
  int block_rows;
  int block_columns;
  float* sums;  // [rows / block_rows, columns / block_columns]
  int threads;
};

// result = gelu(x), or grad * its derivative at x.
struct GeluCall {
  const void* x;
  const void* grad;  // null: forward
  void* result;      // apart from the others
  int64_t size;
  Element element;
  int threads;
};

// y = (x - mean) / sqrt(variance + epsilon) * weight + bias of each row, in bfloat16.
struct NormCall {
  const float* x;       // [rows, columns]
  const float* weight;  // [columns] or null
  const float* bias;    // [columns] or null
  void* y;              // [rows, columns]
  float* statistics;    // [rows, 2] written: the mean, and 1 / sqrt(variance + epsilon)
  int64_t rows;
  int columns;
  float epsilon;
  int threads;
};
struct NormBackwardCall {
  const float* x;
  const float* weight;
  const float* statistics;
  const void* grad;    // [rows, columns], bfloat16
  float* grad_x;       // [rows, columns]
  float* grad_weight;  // [columns] or null
  float* grad_bias;    // [columns] or null
  int64_t rows;
  int columns;
  int threads;
};

// sum = stream + part, where part is bfloat16.
struct AddPartCall {
  const float* stream;
  const void* part;
  float* sum;
  int64_t size;
  int threads;
};

struct AttentionForwardCall;  // these two: attention.h
struct AttentionBackwardCall;
struct BlocksForwardCall;  // these two: blocks.h
struct BlocksBackwardCall;

// The kernels of one instruction set. A call returns false when memory ran out, and has then done nothing lasting.
struct KernelTable {
  bool (*forward)(const ForwardCall&);
  bool (*backward)(const BackwardCall&);
  bool (*keep_top)(const KeepTopCall&);
  void (*select)(const SelectCall&);
  bool (*holds_zeros)(const HoldsZerosCall&);
  bool (*keep_in_groups)(const KeepInGroupsCall&);
  bool (*keep_regular)(const KeepRegularCall&);
  void (*block_sums)(const BlockSumsCall&);
  void (*tanh_gelu)(const GeluCall&);
  void (*exact_gelu)(const GeluCall&);
  void (*norm_forward)(const NormCall&);
  bool (*norm_backward)(const NormBackwardCall&);
  void (*add_part)(const AddPartCall&);
  bool (*attention_forward)(const AttentionForwardCall&);
  bool (*attention_backward)(const AttentionBackwardCall&);
  bool (*blocks_forward)(const BlocksForwardCall&);
  bool (*blocks_backward)(const BlocksBackwardCall&);
};

// ---- compiled once, for the baseline instruction set ---------------------------------------------------------

// The layout of a mask [rows, columns]: `panels_count` writes starts, whose last entry says how many offsets there are;
// `panels_fill` writes these.
struct MaskCall {
  const uint8_t* mask;
  int rows;
  int columns;
  int width;
  int32_t* starts;    // [panels * rows + 1]; written by panels_count, read by panels_fill
  uint16_t* offsets;  // [nonzeros]; written by panels_fill
  int threads;
};
void panels_count(const MaskCall&);
void panels_fill(const MaskCall&);

// The layout of the transpose, and the place in `panels` of each of its nonzeros.
struct TransposeCall {
  Layout panels;
  int width;          // of the transpose
  int32_t* starts;    // [panels of the transpose * columns + 1]
  uint16_t* offsets;  // [nonzeros]
  int32_t* order;     // [nonzeros]
  int threads;
};
void panels_transpose(const TransposeCall&);

// row * columns + column of each nonzero.
struct PositionsCall {
  Layout panels;
  int64_t* positions;  // [nonzeros]
  int threads;
};
void panels_positions(const PositionsCall&);

// For each nonzero the position in `previous` of the same place of the matrix, or -1.
struct SourcesCall {
  Layout panels;
  Layout previous;  // of a matrix of the same shape
  int32_t* places;  // [nonzeros of panels]
  int threads;
};
void panels_sources(const SourcesCall&);

// moved[i] = entries[places[i]], and 0 where a place is -1.
struct MoveCall {
  const uint32_t* entries;  // one at least
  const int32_t* places;
  uint32_t* moved;
  int64_t size;  // of places and moved
  int threads;
};
void panels_move(const MoveCall&);

// A matrix from values, zero elsewhere.
struct ScatterCall {
  Layout panels;
  const void* values;  // [nonzeros]
  void* matrix;        // [rows, columns]
  int element_bytes;   // 1 or 4
  int threads;
};
void panels_scatter(const ScatterCall&);

// The values of a matrix, whose elements have 1 or 4 bytes.
struct GatherCall {
  Layout panels;
  const void* matrix;  // [rows, columns]
  void* values;        // [nonzeros]
  int element_bytes;
  int threads;
};
void panels_gather(const GatherCall&);

// The k-th largest of `size` keys, 1 <= k <= size; reorders them.
uint32_t kth_largest(uint32_t* keys, int64_t size, int64_t k);

}  // namespace rarefy
