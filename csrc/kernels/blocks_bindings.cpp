// Python bindings of the block kernels.
#include "bindings.h"
#include "blocks.h"

namespace rarefy {
namespace {

BlockShape shape(int rows, int columns, int height, int width) {
  require(height > 0 && width > 0 && height % 8 == 0 && width % 8 == 0, "height, width: give multiples of 8");
  require(rows >= 0 && columns >= 0 && rows % height == 0 && columns % width == 0,
          "rows, columns: give multiples of height and width");
  return {.rows = rows, .columns = columns, .height = height, .width = width};
}

// Starts and indices disagree when they belong to different matrices; the kernels would then read past the end.
BlockLines lines(int lines, Address starts, Address indices, int64_t blocks) {
  require(lines >= 0, "lines: give a whole number >= 0");
  require(starts, "starts: a null address");
  require(indices || !blocks, "indices: a null address");
  const BlockLines made{.lines = lines, .starts = at<const int32_t>(starts), .indices = at<const int32_t>(indices)};
  require(made.starts[lines] == blocks, "starts, indices: they do not belong to one matrix");
  return made;
}

void forward(int isa, int64_t tokens, const BlockShape& shape, const BlockLines& by_row, Address values, Address x,
             Address bias, Address y, int element, int threads) {
  require(by_row.lines == shape.rows / shape.height, "by_row: it has another number of lines than the matrix");
  finish(table(isa).blocks_forward({
      .tokens = tokens,
      .shape = shape,
      .by_row = by_row,
      .values = at<const float>(values),
      .x = at<const void>(x),
      .bias = at<const float>(bias),
      .y = at<void>(y),
      .element = element_of(element),
      .threads = threads,
  }));
}

void backward(int isa, int64_t tokens, const BlockShape& shape, const BlockLines& by_column, Address order,
              Address values, Address x, Address grad, Address grad_x, Address grad_values, Address grad_bias,
              int element, int threads) {
  require(by_column.lines == shape.columns / shape.width, "by_column: it has another number of lines than the matrix");
  finish(table(isa).blocks_backward({
      .tokens = tokens,
      .shape = shape,
      .by_column = by_column,
      .order = at<const int32_t>(order),
      .values = at<const float>(values),
      .x = at<const void>(x),
      .grad = at<const void>(grad),
      .grad_x = at<void>(grad_x),
      .grad_values = at<float>(grad_values),
      .grad_bias = at<float>(grad_bias),
      .element = element_of(element),
      .threads = threads,
  }));
}

}  // namespace

void bind_blocks(nb::module_& m) {
  using namespace nb::literals;
  const nb::kw_only named;
  const nb::call_guard<nb::gil_scoped_release> release;
  nb::class_<BlockShape>(m, "BlockShape")
      .def(nb::new_(&shape), named, "rows"_a, "columns"_a, "height"_a, "width"_a);
  nb::class_<BlockLines>(m, "BlockLines")
      .def(nb::new_(&lines), named, "lines"_a, "starts"_a, "indices"_a, "blocks"_a);
  m.def("blocks_forward", &forward, release, named, "isa"_a, "tokens"_a, "shape"_a, "by_row"_a, "values"_a, "x"_a,
        "bias"_a, "y"_a, "element"_a, "threads"_a);
  m.def("blocks_backward", &backward, release, named, "isa"_a, "tokens"_a, "shape"_a, "by_column"_a, "order"_a,
        "values"_a, "x"_a, "grad"_a, "grad_x"_a, "grad_values"_a, "grad_bias"_a, "element"_a, "threads"_a);
}

}  // namespace rarefy
