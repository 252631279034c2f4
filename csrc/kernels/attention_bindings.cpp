// Python bindings of the attention kernels: number -1 for an instruction set means the matrix unit.
#include "attention.h"

#include "bindings.h"
#include "blocks.h"

namespace rarefy {

#if defined(RAREFY_PAIRS)
namespace v4_amx {
extern const AttentionTable attention_kernels;
}
#endif

namespace {

const AttentionTable& kernels() {
  require(matrix_units().matrix.available, "this machine has no matrix unit");
#if defined(RAREFY_PAIRS)
  return v4_amx::attention_kernels;
#else
  throw std::invalid_argument("this build has no kernels for the matrix unit");
#endif
}

AttentionShape attention_shape(int64_t samples, int heads, int length, int size, float scale) {
  require(samples > 0 && heads > 0 && length > 0 && size > 0, "samples, heads, length, size: give numbers above 0");
  require(length <= 1 << 16 && size <= 1 << 12, "length, size: too large");
  require(scale > 0, "scale: give a number above 0");
  return {.samples = samples, .heads = heads, .length = length, .size = size, .scale = scale};
}

Heads heads_at(Address data, int64_t sample, int64_t position, int64_t head) {
  require(data, "heads: a null address");
  return {.data = at<const void>(data), .sample = sample, .position = position, .head = head};
}

AttentionTable kernels_of(int isa) {
  if (isa < 0) return kernels();
  return {.forward = table(isa).attention_forward, .backward = table(isa).attention_backward};
}

void forward(int isa, const AttentionShape& shape, const Heads& query, const Heads& key, const Heads& value, Address mixed,
             Address softmax, int threads) {
  const AttentionTable chosen = kernels_of(isa);
  const nb::gil_scoped_release release;
  finish(chosen.forward({
      .shape = shape,
      .query = query,
      .key = key,
      .value = value,
      .mixed = at<void>(mixed),
      .softmax = at<float>(softmax),
      .threads = threads,
  }));
}

void backward(int isa, const AttentionShape& shape, const Heads& query, const Heads& key, const Heads& value,
              const Heads& mixed, const Heads& grad, Address softmax, Address grad_query, Address grad_key,
              Address grad_value, int threads) {
  const AttentionTable chosen = kernels_of(isa);
  const nb::gil_scoped_release release;
  finish(chosen.backward({
      .shape = shape,
      .query = query,
      .key = key,
      .value = value,
      .mixed = mixed,
      .grad = grad,
      .softmax = at<const float>(softmax),
      .grad_query = at<void>(grad_query),
      .grad_key = at<void>(grad_key),
      .grad_value = at<void>(grad_value),
      .threads = threads,
  }));
}

// Where the kernels of float32 were measured against torch's.
bool is_intel() {
#if defined(RAREFY_X86)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

void bind_attention(nb::module_& m) {
  using namespace nb::literals;
  const nb::kw_only named;
  nb::class_<AttentionShape>(m, "AttentionShape")
      .def(nb::new_(&attention_shape), named, "samples"_a, "heads"_a, "length"_a, "size"_a, "scale"_a);
  nb::class_<Heads>(m, "Heads")
      .def(nb::new_(&heads_at), named, "data"_a, "sample"_a, "position"_a, "head"_a);
  m.def("is_intel", &is_intel);
  m.def("attention_forward", &forward, named, "isa"_a, "shape"_a, "query"_a, "key"_a, "value"_a, "mixed"_a,
        "softmax"_a, "threads"_a);
  m.def("attention_backward", &backward, named, "isa"_a, "shape"_a, "query"_a, "key"_a, "value"_a, "mixed"_a, "grad"_a,
        "softmax"_a, "grad_query"_a, "grad_key"_a, "grad_value"_a, "threads"_a);
}

}  // namespace rarefy
