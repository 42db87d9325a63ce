#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "gae.h"
#ifdef AREAL_CUDA_VERSION
#include "../kernels/gae.cuh"
#endif

namespace py = pybind11;

namespace {

// addresses: rewards, values, cu_seqlens, bootstrap or 0, advantages, returns.
areal::Gae make_call(const std::array<uintptr_t, 6>& addresses, int64_t n, int64_t total, double gamma, double lam) {
  const auto floats = [&](int i) { return reinterpret_cast<float*>(addresses[i]); };
  return {floats(0), floats(1), reinterpret_cast<const int32_t*>(addresses[2]), floats(3), floats(4), floats(5), n, total, gamma, lam};
}

void call_gae(const std::array<uintptr_t, 6>& addresses, int64_t n, int64_t total, double gamma, double lam, unsigned threads,
              const std::string& instruction_set) {
  py::gil_scoped_release release;
  areal::gae(make_call(addresses, n, total, gamma, lam), threads, instruction_set);
}

#ifdef AREAL_CUDA_VERSION
void call_gae_cuda(const std::array<uintptr_t, 6>& addresses, int64_t n, int64_t total, double gamma, double lam, uintptr_t workspace,
                   uintptr_t stream) {
  py::gil_scoped_release release;
  const char* error = areal::gae_cuda(make_call(addresses, n, total, gamma, lam), reinterpret_cast<float*>(workspace), stream);
  if (error != nullptr) throw std::runtime_error(std::string("gae: ") + error);
}
#endif

}  // namespace

void areal::bind_gae(py::module_& module) {
  module.def("gae", &call_gae, py::arg("addresses"), py::arg("n"), py::arg("total"), py::arg("gamma"), py::arg("lam"), py::arg("threads"),
             py::arg("instruction_set") = "");
#ifdef AREAL_CUDA_VERSION
  module.attr("gae_cuda_tile") = areal::kGaeTile;
  module.def("gae_cuda", &call_gae_cuda, py::arg("addresses"), py::arg("n"), py::arg("total"), py::arg("gamma"), py::arg("lam"),
             py::arg("workspace"), py::arg("stream"));
#endif
}
