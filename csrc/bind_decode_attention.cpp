#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "bindings.h"
#include "decode_attention.h"

namespace py = pybind11;

namespace {

// addresses: q, k, v, k_cache, v_cache, positions, slots or 0, out; sizes: rows, heads, kv_heads, capacity, d, row strides of q, k, v,
// window.
void call_decode_attention(const std::array<uintptr_t, 8>& addresses, const std::array<int64_t, 9>& sizes, float scaling, unsigned threads,
                           const std::string& instruction_set) {
  py::gil_scoped_release release;
  const auto floats = [&](int i) { return reinterpret_cast<float*>(addresses[i]); };
  const auto integers = [&](int i) { return reinterpret_cast<const int64_t*>(addresses[i]); };
  areal::decode_attention({floats(0), floats(1), floats(2), floats(3), floats(4), integers(5), integers(6), floats(7), sizes[0], sizes[1],
                           sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8], scaling},
                          threads, instruction_set);
}

}  // namespace

void areal::bind_decode_attention(py::module_& module) {
  module.def("decode_attention", &call_decode_attention, py::arg("addresses"), py::arg("sizes"), py::arg("scaling"), py::arg("threads"),
             py::arg("instruction_set") = "");
}
