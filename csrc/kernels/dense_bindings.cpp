// Python bindings of what a model computes beside its sparse layers.
#include "bindings.h"

namespace rarefy {
namespace {

template <void (*KernelTable::*kKernel)(const GeluCall&)>
void gelu(int isa, Address x, Address grad, Address result, int64_t size, int element, int threads) {
  want_large_pages(at<void>(result), size * bytes_of(element_of(element)));
  (table(isa).*kKernel)({
      .x = at<const void>(x),
      .grad = at<const void>(grad),
      .result = at<void>(result),
      .size = size,
      .element = element_of(element),
      .threads = threads,
  });
}

void norm_forward(int isa, Address x, Address weight, Address bias, Address y, Address statistics, int64_t rows, int columns,
                  float epsilon, int threads) {
  table(isa).norm_forward({
      .x = at<const float>(x),
      .weight = at<const float>(weight),
      .bias = at<const float>(bias),
      .y = at<void>(y),
      .statistics = at<float>(statistics),
      .rows = rows,
      .columns = columns,
      .epsilon = epsilon,
      .threads = threads,
  });
}

void norm_backward(int isa, Address x, Address weight, Address statistics, Address grad, Address grad_x, Address grad_weight,
                   Address grad_bias, int64_t rows, int columns, int threads) {
  finish(table(isa).norm_backward({
      .x = at<const float>(x),
      .weight = at<const float>(weight),
      .statistics = at<const float>(statistics),
      .grad = at<const void>(grad),
      .grad_x = at<float>(grad_x),
      .grad_weight = at<float>(grad_weight),
      .grad_bias = at<float>(grad_bias),
      .rows = rows,
      .columns = columns,
      .threads = threads,
  }));
}

void add_part(int isa, Address stream, Address part, Address sum, int64_t size, int threads) {
  table(isa).add_part({
      .stream = at<const float>(stream),
      .part = at<const void>(part),
      .sum = at<float>(sum),
      .size = size,
      .threads = threads,
  });
}

}  // namespace

void bind_dense(nb::module_& m) {
  using namespace nb::literals;
  const nb::kw_only named;
  const nb::call_guard<nb::gil_scoped_release> release;
  m.def("gelu_tanh", &gelu<&KernelTable::tanh_gelu>, release, named, "isa"_a, "x"_a, "grad"_a, "result"_a, "size"_a,
        "element"_a, "threads"_a);
  m.def("gelu_exact", &gelu<&KernelTable::exact_gelu>, release, named, "isa"_a, "x"_a, "grad"_a, "result"_a, "size"_a,
        "element"_a, "threads"_a);
  m.def("norm_forward", &norm_forward, release, named, "isa"_a, "x"_a, "weight"_a, "bias"_a, "y"_a, "statistics"_a, "rows"_a,
        "columns"_a, "epsilon"_a, "threads"_a);
  m.def("norm_backward", &norm_backward, release, named, "isa"_a, "x"_a, "weight"_a, "statistics"_a, "grad"_a, "grad_x"_a,
        "grad_weight"_a, "grad_bias"_a, "rows"_a, "columns"_a, "threads"_a);
  m.def("add_part", &add_part, release, named, "isa"_a, "stream"_a, "part"_a, "sum"_a, "size"_a, "threads"_a);
}

}  // namespace rarefy
