// Python bindings of the half-precision kernels.
#include "half.h"

#include "bindings.h"

namespace rarefy {
namespace {

const HalfTable& kernels() {
  require(half_kernels(), "no float16 kernels on this machine");
  return *half_kernels();
}

Element half_element(int number) {
  require(number == 1 || number == 2, "element: give 1 (bfloat16) or 2 (float16)");
  return static_cast<Element>(number);
}

// Whether it was done: not where an input is infinite or NaN.
bool done(HalfResult result) {
  finish(result != HalfResult::kNoMemory);
  return result == HalfResult::kDone;
}

bool forward(int64_t tokens, const Layout& weight, Address values, Address x, Address bias, Address y,
             int element, int threads) {
  want_large_pages(at<void>(y), tokens * weight.rows * bytes_of(half_element(element)));
  return done(kernels().forward({
      .tokens = tokens,
      .weight = weight,
      .values = at<const float>(values),
      .x = at<const void>(x),
      .bias = at<const float>(bias),
      .y = at<void>(y),
      .element = half_element(element),
      .threads = threads,
  }));
}

bool backward(int64_t tokens, const Layout& transposed, Address order, Address values, Address x, Address grad,
              Address grad_x, Address grad_values, Address grad_bias, int element, int threads) {
  require(grad_x || grad_values, "grad_x, grad_values: a null address for both");
  want_large_pages(at<void>(grad_x), tokens * transposed.rows * bytes_of(half_element(element)));
  want_large_pages(at<void>(grad_values), transposed.nonzeros() * int64_t{sizeof(float)});
  return done(kernels().backward({
      .tokens = tokens,
      .transposed = transposed,
      .order = at<const int32_t>(order),
      .values = at<const float>(values),
      .x = at<const void>(x),
      .grad = at<const void>(grad),
      .grad_x = at<void>(grad_x),
      .grad_values = at<float>(grad_values),
      .grad_bias = at<float>(grad_bias),
      .element = half_element(element),
      .threads = threads,
  }));
}

}  // namespace

void bind_half(nb::module_& m) {
  using namespace nb::literals;
  const nb::kw_only named;
  const nb::call_guard<nb::gil_scoped_release> release;
  m.def("half_obstacle", &half_obstacle);
  m.def("half_forward", &forward, release, named, "tokens"_a, "weight"_a, "values"_a, "x"_a, "bias"_a, "y"_a, "element"_a,
        "threads"_a);
  m.def("half_backward", &backward, release, named, "tokens"_a, "transposed"_a, "order"_a, "values"_a, "x"_a, "grad"_a,
        "grad_x"_a, "grad_values"_a, "grad_bias"_a, "element"_a, "threads"_a);
}

}  // namespace rarefy
