// The interface of the block kernels. Plain data only: every instruction set includes it.
//
// Storage of a matrix W [rows, columns] of which whole blocks [height, width] are active: values [blocks, height, width],
// ordered by block row, then block column. Both sizes are multiples of 8 and divide the matrix.
#pragma once
#include "kernels.h"

namespace rarefy {

// Where the blocks of each line are: a block row of W, or in `by_column` a block column.
struct BlockLines {
  int lines;
  const int32_t* starts;   // [lines + 1] first block of each line
  const int32_t* indices;  // [blocks] the other coordinate of each block, in units of blocks
};

struct BlockShape {
  int rows;
  int columns;
  int height;
  int width;

  int64_t size() const { return static_cast<int64_t>(height) * width; }
};

// y[token, row] = bias[row] + sum over the active blocks: values * x[token, column]
struct BlocksForwardCall {
  int64_t tokens;
  BlockShape shape;
  BlockLines by_row;
  const float* values;  // [blocks, height, width]
  const void* x;        // [tokens, columns], contiguous, of type `element`
  const float* bias;    // [rows] or null
  void* y;              // [tokens, rows], contiguous, of type `element`
  Element element;
  int threads;
};

// From grad = dL/dy: grad_x = grad · W, grad_values = (gradᵀ · x) in the active blocks, grad_bias = column sums of grad.
struct BlocksBackwardCall {
  int64_t tokens;
  BlockShape shape;
  BlockLines by_column;
  const int32_t* order;  // [blocks] the place in `values` of each block of `by_column`
  const float* values;   // [blocks, height, width]
  const void* x;         // [tokens, columns]; read only if grad_values is wanted
  const void* grad;      // [tokens, rows]
  void* grad_x;          // [tokens, columns] or null
  float* grad_values;    // [blocks, height, width] or null
  float* grad_bias;      // [rows] or null
  Element element;
  int threads;

  int64_t blocks() const { return by_column.starts[by_column.lines]; }
};

// The block kernels for pairs of bfloat16: element is bfloat16, and both sizes of a block are multiples of 16. A call
// returns false when memory ran out, and has then done nothing lasting.
struct BlocksTable {
  bool (*forward)(const BlocksForwardCall&);
  bool (*backward)(const BlocksBackwardCall&);
};

// What multiplies pairs of bfloat16 on this machine beside the instruction sets; asked for by its name.
struct MatrixUnit {
  const char* name;
  const BlocksTable* kernels;  // null: not in this build
  bool available;
  bool pays;  // whether it is faster than float32 vectors on this processor
};
struct MatrixUnits {
  MatrixUnit dot;     // avx512_bf16
  MatrixUnit matrix;  // AMX
};
const MatrixUnits& matrix_units();

}  // namespace rarefy
