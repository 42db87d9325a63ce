#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "bindings.h"
#include "decode_attention.h"

namespace py = pybind11;

namespace {

// addresses: q, k_cache, v_cache, lengths, slots or 0, new_k or 0, new_v or 0, out; sizes: rows, heads, kv_heads, slots, capacity, d,
// strides (row, head) of q, of new_k and of new_v, window or 0, whether the caches are bfloat16.
void call_decode_attention(const std::array<uintptr_t, 8>& addresses, const std::array<int64_t, 14>& sizes, float scaling, float softcap,
                           unsigned threads, const std::string& instruction_set) {
  py::gil_scoped_release release;
  const auto at = [&](int i) { return reinterpret_cast<void*>(addresses[i]); };
  areal::DecodeAttention call;
  call.q = static_cast<const float*>(at(0));
  call.k_cache = at(1);
  call.v_cache = at(2);
  call.lengths = static_cast<const int64_t*>(at(3));
  call.slots = static_cast<const int64_t*>(at(4));
  call.new_k = at(5);
  call.new_v = at(6);
  call.out = static_cast<float*>(at(7));
  call.rows = sizes[0];
  call.heads = sizes[1];
  call.kv_heads = sizes[2];
  call.n_slots = sizes[3];
  call.capacity = sizes[4];
  call.d = sizes[5];
  for (int i = 0; i < 2; ++i) {
    call.q_strides[i] = sizes[6 + i];
    call.new_k_strides[i] = sizes[8 + i];
    call.new_v_strides[i] = sizes[10 + i];
  }
  call.window = sizes[12];
  call.bf16 = sizes[13] != 0;
  call.scaling = scaling;
  call.softcap = softcap;
  areal::decode_attention(call, threads, instruction_set);
}

}  // namespace

void areal::bind_decode_attention(py::module_& module) {
  module.def("decode_attention", &call_decode_attention, py::arg("addresses"), py::arg("sizes"), py::arg("scaling"), py::arg("softcap"),
             py::arg("threads"), py::arg("instruction_set") = "");
}
