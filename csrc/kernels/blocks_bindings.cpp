// Python bindings of the block kernels.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

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

std::vector<std::string> names_of_units() {
  std::vector<std::string> names;
  for (const MatrixUnit* unit : {&matrix_units().dot, &matrix_units().matrix})
    if (unit->available) names.emplace_back(unit->name);
  return names;
}

std::string best_unit() {
  const MatrixUnits& units = matrix_units();
  if (units.matrix.available && units.matrix.pays) return units.matrix.name;
  return units.dot.available && units.dot.pays ? units.dot.name : "";
}

// The kernels of an instruction set, or those of the matrix unit of this name ("" for none) where they take the call.
BlocksTable kernels(int isa, const std::string& unit, int64_t tokens, const BlockShape& shape, int element) {
  constexpr int64_t few = 4;  // for which weights are not converted
  const BlocksTable plain{.forward = table(isa).blocks_forward, .backward = table(isa).blocks_backward};
  if (unit.empty()) return plain;
  for (const MatrixUnit* known : {&matrix_units().dot, &matrix_units().matrix})
    if (known->available && unit == known->name) {
      const bool fits = shape.height % 16 == 0 && shape.width % 16 == 0;
      return fits && tokens > few && element_of(element) == Element::kBfloat16 ? *known->kernels : plain;
    }
  throw std::invalid_argument("no such matrix unit on this machine");
}

void forward(int isa, const std::string& unit, int64_t tokens, const BlockShape& shape, const BlockLines& by_row,
             Address values, Address x, Address bias, Address y, int element, int threads) {
  require(by_row.lines == shape.rows / shape.height, "by_row: it has another number of lines than the matrix");
  const BlocksTable chosen = kernels(isa, unit, tokens, shape, element);
  const nb::gil_scoped_release release;
  want_large_pages(at<void>(y), tokens * shape.rows * bytes_of(element_of(element)));
  finish(chosen.forward({
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

void backward(int isa, const std::string& unit, int64_t tokens, const BlockShape& shape, const BlockLines& by_column,
              Address order, Address values, Address x, Address grad, Address grad_x, Address grad_values,
              Address grad_bias, int element, int threads) {
  require(by_column.lines == shape.columns / shape.width, "by_column: it has another number of lines than the matrix");
  const BlocksTable chosen = kernels(isa, unit, tokens, shape, element);
  const nb::gil_scoped_release release;
  const int64_t blocks = by_column.starts[by_column.lines];
  want_large_pages(at<void>(grad_x), tokens * shape.columns * bytes_of(element_of(element)));
  want_large_pages(at<void>(grad_values), blocks * shape.size() * int64_t{sizeof(float)});
  finish(chosen.backward({
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
  m.def("matrix_units", &names_of_units);
  m.def("best_matrix_unit", &best_unit);
  nb::class_<BlockShape>(m, "BlockShape")
      .def(nb::new_(&shape), named, "rows"_a, "columns"_a, "height"_a, "width"_a);
  nb::class_<BlockLines>(m, "BlockLines")
      .def(nb::new_(&lines), named, "lines"_a, "starts"_a, "indices"_a, "blocks"_a);
  m.def("blocks_forward", &forward, named, "isa"_a, "unit"_a, "tokens"_a, "shape"_a, "by_row"_a, "values"_a, "x"_a,
        "bias"_a, "y"_a, "element"_a, "threads"_a);
  m.def("blocks_backward", &backward, named, "isa"_a, "unit"_a, "tokens"_a, "shape"_a, "by_column"_a, "order"_a,
        "values"_a, "x"_a, "grad"_a, "grad_x"_a, "grad_values"_a, "grad_bias"_a, "element"_a, "threads"_a);
}

}  // namespace rarefy
