// Python module areal._C. Takes addresses and sizes as integers: everything is checked on the Python side (areal/ops), so that the
// module depends on no version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "decode_attention.h"
#include "plan_microbatches.h"
#include "weights_hash.h"
#ifdef AREAL_CUDA_VERSION
#include "../kernels/weights_hash.cuh"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["instruction_sets"] = areal::hash_instruction_sets();
#ifdef AREAL_CUDA_VERSION
  info["cuda"] = AREAL_CUDA_VERSION;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

areal::MicrobatchPlan plan_microbatches_ffd(uintptr_t lengths, int64_t n, int64_t capacity, int64_t world_size, int64_t k_min) {
  py::gil_scoped_release release;
  return areal::plan_microbatches_ffd(reinterpret_cast<const int64_t*>(lengths), n, capacity, world_size, k_min);
}

// Rows of (source address, target address or 0, bytes, key).
uint64_t copy_and_hash(const std::vector<std::array<uint64_t, 4>>& rows, unsigned threads, const std::string& instruction_set) {
  py::gil_scoped_release release;
  std::vector<areal::Segment> segments;
  segments.reserve(rows.size());
  for (const auto& [source, target, bytes, key] : rows)
    segments.push_back({reinterpret_cast<const uint8_t*>(source), reinterpret_cast<uint8_t*>(target), bytes, key});
  return areal::copy_and_hash(segments, threads, instruction_set);
}

// addresses: q, k, v, k_cache, v_cache, positions, slots or 0, out; sizes: rows, heads, kv_heads, capacity, d, row strides of q, k, v,
// window.
void decode_attention(const std::array<uintptr_t, 8>& addresses, const std::array<int64_t, 9>& sizes, float scaling, unsigned threads,
                      const std::string& instruction_set) {
  py::gil_scoped_release release;
  const auto floats = [&](int i) { return reinterpret_cast<float*>(addresses[i]); };
  const auto integers = [&](int i) { return reinterpret_cast<const int64_t*>(addresses[i]); };
  areal::decode_attention({floats(0), floats(1), floats(2), floats(3), floats(4), integers(5), integers(6), floats(7), sizes[0], sizes[1],
                           sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8], scaling},
                          threads, instruction_set);
}

#ifdef AREAL_CUDA_VERSION
void weights_hash_cuda(uintptr_t data, uint64_t bytes, uint64_t key, uintptr_t sum, uintptr_t stream) {
  const char* error = areal::weights_hash_cuda(reinterpret_cast<const void*>(data), bytes, key, reinterpret_cast<uint64_t*>(sum), stream);
  if (error != nullptr) throw std::runtime_error(std::string("weights_hash: ") + error);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "areal's compiled host code and CUDA launchers; use it through areal.ops";
  module.def("build_info", &build_info,
             "What this module was built with, and the instruction sets of this CPU that it can use, best first.");
  module.def("plan_microbatches_ffd", &plan_microbatches_ffd, py::arg("lengths"), py::arg("n"), py::arg("capacity"), py::arg("world_size"),
             py::arg("k_min"));
  module.def("copy_and_hash", &copy_and_hash, py::arg("rows"), py::arg("threads"), py::arg("instruction_set") = "");
  module.def("decode_attention", &decode_attention, py::arg("addresses"), py::arg("sizes"), py::arg("scaling"), py::arg("threads"),
             py::arg("instruction_set") = "");
#ifdef AREAL_CUDA_VERSION
  module.def("weights_hash_cuda", &weights_hash_cuda, py::arg("data"), py::arg("bytes"), py::arg("key"), py::arg("sum"), py::arg("stream"));
#endif
}
