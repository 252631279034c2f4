// Python bindings. Tensors come as addresses: an ndarray argument costs microseconds and may be a silent copy.
// The Python side checks shapes, types and contiguity; what a swapped or missing number would break is checked here.
#include "bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

namespace rarefy {
#define RAREFY_DECLARE(isa) \
  namespace isa {           \
  extern const KernelTable kernels; \
  }
#ifdef RAREFY_X86
RAREFY_DECLARE(v2)
RAREFY_DECLARE(v3)
RAREFY_DECLARE(v4)
#else
RAREFY_DECLARE(base)
#endif

namespace {

struct InstructionSet {
  const char* name;
  const KernelTable* kernels;
  bool available;
};

// From the oldest to the newest. Each needs all that the one before needs, so those that are available come first, and
// a place among them, which Python counts, is a place here.
std::vector<InstructionSet> instruction_sets() {
#ifdef RAREFY_X86
  __builtin_cpu_init();
  const bool second = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool third = second && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                     __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool fourth = third && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return {{"v2", &v2::kernels, second}, {"v3", &v3::kernels, third}, {"v4", &v4::kernels, fourth}};
#else
  return {{"base", &base::kernels, true}};
#endif
}

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const auto& isa : instruction_sets())
    if (isa.available) names.emplace_back(isa.name);
  return names;
}

void require_width(int width) {
  require(width >= 1 && width <= 1 << 16, "width: give a whole number from 1 to 65536, which 16 bits can count");
}
// Starts and offsets disagree when they belong to different matrices or widths; the kernels would then read past the end.
Layout layout(int rows, int columns, int width, Address starts, Address offsets, int64_t connections) {
  require(rows >= 0 && columns >= 0, "rows, columns: give whole numbers >= 0");
  require_width(width);
  require(starts, "starts: a null address");
  require(offsets || !connections, "offsets: a null address");
  const Layout made{
      .rows = rows,
      .columns = columns,
      .width = width,
      .starts = at<const int32_t>(starts),
      .offsets = at<const uint16_t>(offsets),
  };
  require(made.nonzeros() == connections, "starts, offsets: they do not belong to one matrix of this width");
  return made;
}

void forward(int isa, int64_t tokens, const Layout& weight, Address values, Address x, Address bias, Address y,
             int element, int threads) {
  want_large_pages(at<void>(y), tokens * weight.rows * bytes_of(element_of(element)));
  finish(table(isa).forward({
      .tokens = tokens,
      .weight = weight,
      .values = at<const float>(values),
      .x = at<const void>(x),
      .bias = at<const float>(bias),
      .y = at<void>(y),
      .element = element_of(element),
      .threads = threads,
  }));
}

void backward(int isa, int64_t tokens, const Layout& transposed, Address order, Address values, Address x, Address grad,
              Address grad_x, Address grad_values, Address grad_bias, int element, int threads) {
  want_large_pages(at<void>(grad_x), tokens * transposed.rows * bytes_of(element_of(element)));
  want_large_pages(at<void>(grad_values), transposed.nonzeros() * int64_t{sizeof(float)});
  finish(table(isa).backward({
      .tokens = tokens,
      .transposed = transposed,
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

// Whether equal scores were told apart by their places.
bool keep_top(int isa, Address scores, Address candidates, int64_t size, int64_t count, Address mask, int threads) {
  bool cuts_tie = false;
  finish(table(isa).keep_top({
      .scores = at<const float>(scores),
      .candidates = at<const uint8_t>(candidates),
      .size = size,
      .count = count,
      .mask = at<uint8_t>(mask),
      .cuts_tie = &cuts_tie,
      .threads = threads,
  }));
  return cuts_tie;
}

void select(int isa, Address data, Address mask, uint64_t fill, int64_t size, int element_bytes, int threads) {
  require(element_bytes == 2 || element_bytes == 4 || element_bytes == 8, "element_bytes: give 2, 4 or 8");
  table(isa).select({
      .data = at<void>(data),
      .mask = at<const uint8_t>(mask),
      .fill = fill,
      .size = size,
      .element_bytes = element_bytes,
      .threads = threads,
  });
}

bool holds_zeros(int isa, Address data, Address mask, int64_t size, int element_bytes, int threads) {
  require(element_bytes == 2 || element_bytes == 4 || element_bytes == 8, "element_bytes: give 2, 4 or 8");
  return table(isa).holds_zeros({
      .data = at<const void>(data),
      .mask = at<const uint8_t>(mask),
      .size = size,
      .element_bytes = element_bytes,
      .threads = threads,
  });
}

void keep_in_groups(int isa, Address scores, Address candidates, Address counts, int64_t groups, int m, Address mask,
                    Address contested, int threads) {
  require(m >= 1, "m: give a whole number >= 1");
  finish(table(isa).keep_in_groups({
      .scores = at<const float>(scores),
      .candidates = at<const uint8_t>(candidates),
      .counts = at<const int32_t>(counts),
      .groups = groups,
      .m = m,
      .mask = at<uint8_t>(mask),
      .contested = at<uint8_t>(contested),
      .threads = threads,
  }));
}

void keep_regular(int isa, Address scores, bool by_size, Address marked, float fill, int64_t rows, int64_t columns, int side,
                  int count, Address options, int option_count, int64_t start, Address places, Address mask, int threads) {
  require(count > 0 && count < side && side <= 256, "side, count: give 0 < count < side <= 256");
  require(rows % side == 0 && columns % side == 0, "side: give one that divides rows and columns");
  require(!options || (side <= 4 && option_count > 0 && option_count <= 90), "options: give up to 90, of a side up to 4");
  finish(table(isa).keep_regular({
      .scores = at<const float>(scores),
      .by_size = by_size,
      .marked = at<const uint8_t>(marked),
      .fill = fill,
      .rows = rows,
      .columns = columns,
      .side = side,
      .count = count,
      .options = at<const uint8_t>(options),
      .option_count = option_count,
      .start = start,
      .places = at<const int64_t>(places),
      .mask = at<uint8_t>(mask),
      .threads = threads,
  }));
}

void block_sums(int isa, Address scores, int64_t rows, int64_t columns, int block_rows, int block_columns, Address sums,
                int threads) {
  require(block_rows > 0 && block_columns > 0, "block_rows, block_columns: give whole numbers >= 1");
  table(isa).block_sums({
      .scores = at<const float>(scores),
      .rows = rows,
      .columns = columns,
      .block_rows = block_rows,
      .block_columns = block_columns,
      .sums = at<float>(sums),
      .threads = threads,
  });
}

// The layout of a mask in two passes over it: how many connections each row has in each panel, then where they are.
void from_mask(Address mask, int rows, int columns, int width, Address starts, Address offsets, int64_t connections,
               int threads) {
  require_width(width);
  require(starts, "starts: a null address");
  const MaskCall call{
      .mask = at<const uint8_t>(mask),
      .rows = rows,
      .columns = columns,
      .width = width,
      .starts = at<int32_t>(starts),
      .offsets = at<uint16_t>(offsets),
      .threads = threads,
  };
  panels_count(call);
  layout(rows, columns, width, starts, offsets, connections);  // offsets has room for what was counted
  panels_fill(call);
}

void transpose(const Layout& panels, int width, Address starts, Address offsets, Address order, int threads) {
  require_width(width);
  panels_transpose({
      .panels = panels,
      .width = width,
      .starts = at<int32_t>(starts),
      .offsets = at<uint16_t>(offsets),
      .order = at<int32_t>(order),
      .threads = threads,
  });
}

void find_positions(const Layout& panels, Address positions, int threads) {
  panels_positions({.panels = panels, .positions = at<int64_t>(positions), .threads = threads});
}

void find_sources(const Layout& panels, const Layout& previous, Address places, int threads) {
  require(panels.rows == previous.rows && panels.columns == previous.columns,
          "panels, previous: they must have the same rows and columns");
  panels_sources({.panels = panels, .previous = previous, .places = at<int32_t>(places), .threads = threads});
}

void move(Address entries, Address places, Address moved, int64_t size, int threads) {
  panels_move({
      .entries = at<const uint32_t>(entries),
      .places = at<const int32_t>(places),
      .moved = at<uint32_t>(moved),
      .size = size,
      .threads = threads,
  });
}

void scatter(const Layout& panels, Address values, Address matrix, int element_bytes, int threads) {
  require(element_bytes == 1 || element_bytes == 4, "element_bytes: give 1 or 4");
  panels_scatter({
      .panels = panels,
      .values = at<const void>(values),
      .matrix = at<void>(matrix),
      .element_bytes = element_bytes,
      .threads = threads,
  });
}

void gather(const Layout& panels, Address matrix, Address values, int element_bytes, int threads) {
  require(element_bytes == 1 || element_bytes == 4, "element_bytes: give 1 or 4");
  panels_gather({
      .panels = panels,
      .matrix = at<const void>(matrix),
      .values = at<void>(values),
      .element_bytes = element_bytes,
      .threads = threads,
  });
}

}  // namespace

const KernelTable& table(int index) {
  static const std::vector<InstructionSet> all = instruction_sets();
  if (index < 0 || index >= static_cast<int>(all.size()) || !all[index].available)
    throw std::invalid_argument("no such instruction set on this machine");
  return *all[index].kernels;
}

}  // namespace rarefy

// Every argument is given by its name: nanobind refuses a name that is missing, unknown or given twice, where a swap of
// two addresses in a row of integers would have gone through.
NB_MODULE(_C, m) {
  using namespace nb::literals;
  const nb::kw_only named;
  const nb::call_guard<nb::gil_scoped_release> release;
  m.def("instruction_sets", &rarefy::available);
  nb::class_<rarefy::Layout>(m, "Layout")
      .def(nb::new_(&rarefy::layout), named, "rows"_a, "columns"_a, "width"_a, "starts"_a, "offsets"_a,
           "connections"_a);
  m.def("forward", &rarefy::forward, release, named, "isa"_a, "tokens"_a, "weight"_a, "values"_a, "x"_a, "bias"_a,
        "y"_a, "element"_a, "threads"_a);
  m.def("backward", &rarefy::backward, release, named, "isa"_a, "tokens"_a, "transposed"_a, "order"_a, "values"_a,
        "x"_a, "grad"_a, "grad_x"_a, "grad_values"_a, "grad_bias"_a, "element"_a, "threads"_a);
  m.def("keep_top", &rarefy::keep_top, release, named, "isa"_a, "scores"_a, "candidates"_a, "size"_a, "count"_a,
        "mask"_a, "threads"_a);
  m.def("select", &rarefy::select, release, named, "isa"_a, "data"_a, "mask"_a, "fill"_a, "size"_a, "element_bytes"_a,
        "threads"_a);
  m.def("holds_zeros", &rarefy::holds_zeros, release, named, "isa"_a, "data"_a, "mask"_a, "size"_a, "element_bytes"_a,
        "threads"_a);
  m.def("keep_in_groups", &rarefy::keep_in_groups, release, named, "isa"_a, "scores"_a, "candidates"_a, "counts"_a,
        "groups"_a, "m"_a, "mask"_a, "contested"_a, "threads"_a);
  m.def("keep_regular", &rarefy::keep_regular, release, named, "isa"_a, "scores"_a, "by_size"_a, "marked"_a, "fill"_a,
        "rows"_a, "columns"_a, "side"_a, "count"_a, "options"_a, "option_count"_a, "start"_a, "places"_a, "mask"_a,
        "threads"_a);
  m.def("block_sums", &rarefy::block_sums, release, named, "isa"_a, "scores"_a, "rows"_a, "columns"_a, "block_rows"_a,
        "block_columns"_a, "sums"_a, "threads"_a);
  m.def("panels_from_mask", &rarefy::from_mask, release, named, "mask"_a, "rows"_a, "columns"_a, "width"_a, "starts"_a,
        "offsets"_a, "connections"_a, "threads"_a);
  m.def("panels_transpose", &rarefy::transpose, release, named, "panels"_a, "width"_a, "starts"_a, "offsets"_a,
        "order"_a, "threads"_a);
  m.def("panels_positions", &rarefy::find_positions, release, named, "panels"_a, "positions"_a, "threads"_a);
  m.def("panels_sources", &rarefy::find_sources, release, named, "panels"_a, "previous"_a, "places"_a, "threads"_a);
  m.def("panels_move", &rarefy::move, release, named, "entries"_a, "places"_a, "moved"_a, "size"_a, "threads"_a);
  m.def("panels_scatter", &rarefy::scatter, release, named, "panels"_a, "values"_a, "matrix"_a, "element_bytes"_a,
        "threads"_a);
  m.def("panels_gather", &rarefy::gather, release, named, "panels"_a, "matrix"_a, "values"_a, "element_bytes"_a,
        "threads"_a);
  rarefy::bind_blocks(m);
  rarefy::bind_attention(m);
  rarefy::bind_dense(m);
  rarefy::bind_half(m);
}
