#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "logprob_entropy.h"
#ifdef AREAL_CUDA_VERSION
#include "../kernels/logprob_entropy.cuh"
#endif

namespace py = pybind11;

namespace {

// addresses: logits, targets, logprobs, entropy, max, log_sum; sizes: rows, n.
areal::LogprobEntropy arguments(const std::array<uintptr_t, 6>& addresses, const std::array<int64_t, 2>& sizes, int element,
                                float inverse_temperature) {
  const auto floats = [&](int i) { return reinterpret_cast<float*>(addresses[i]); };
  return {reinterpret_cast<const void*>(addresses[0]),
          reinterpret_cast<const int64_t*>(addresses[1]),
          sizes[0],
          sizes[1],
          element,
          inverse_temperature,
          floats(2),
          floats(3),
          floats(4),
          floats(5)};
}

void call_logprob_entropy(const std::array<uintptr_t, 6>& addresses, const std::array<int64_t, 2>& sizes, int element,
                          float inverse_temperature, unsigned threads, const std::string& instruction_set) {
  py::gil_scoped_release release;
  areal::logprob_entropy(arguments(addresses, sizes, element, inverse_temperature), threads, instruction_set);
}

// gradients: the addresses of grad_logprob, grad_entropy and of the result.
areal::LogprobEntropyGradient gradient_arguments(const areal::LogprobEntropy& forward, const std::array<uintptr_t, 3>& gradients) {
  return {forward, reinterpret_cast<const float*>(gradients[0]), reinterpret_cast<const float*>(gradients[1]),
          reinterpret_cast<void*>(gradients[2])};
}

void call_logprob_entropy_gradient(const std::array<uintptr_t, 6>& addresses, const std::array<uintptr_t, 3>& gradients,
                                   const std::array<int64_t, 2>& sizes, int element, float inverse_temperature, unsigned threads,
                                   const std::string& instruction_set) {
  py::gil_scoped_release release;
  areal::logprob_entropy_gradient(gradient_arguments(arguments(addresses, sizes, element, inverse_temperature), gradients), threads,
                                  instruction_set);
}

#ifdef AREAL_CUDA_VERSION
void raise_if(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("logprob_entropy: ") + error);
}

void call_logprob_entropy_cuda(const std::array<uintptr_t, 6>& addresses, const std::array<int64_t, 2>& sizes, int element,
                               float inverse_temperature, uintptr_t stream) {
  raise_if(areal::logprob_entropy_cuda(arguments(addresses, sizes, element, inverse_temperature), stream));
}

void call_logprob_entropy_gradient_cuda(const std::array<uintptr_t, 6>& addresses, const std::array<uintptr_t, 3>& gradients,
                                        const std::array<int64_t, 2>& sizes, int element, float inverse_temperature, uintptr_t stream) {
  raise_if(areal::logprob_entropy_gradient_cuda(gradient_arguments(arguments(addresses, sizes, element, inverse_temperature), gradients),
                                                stream));
}
#endif

}  // namespace

void areal::bind_logprob_entropy(py::module_& module) {
  module.def("logprob_entropy", &call_logprob_entropy, py::arg("addresses"), py::arg("sizes"), py::arg("element"),
             py::arg("inverse_temperature"), py::arg("threads"), py::arg("instruction_set") = "");
  module.def("logprob_entropy_gradient", &call_logprob_entropy_gradient, py::arg("addresses"), py::arg("gradients"), py::arg("sizes"),
             py::arg("element"), py::arg("inverse_temperature"), py::arg("threads"), py::arg("instruction_set") = "");
#ifdef AREAL_CUDA_VERSION
  module.def("logprob_entropy_cuda", &call_logprob_entropy_cuda, py::arg("addresses"), py::arg("sizes"), py::arg("element"),
             py::arg("inverse_temperature"), py::arg("stream"));
  module.def("logprob_entropy_gradient_cuda", &call_logprob_entropy_gradient_cuda, py::arg("addresses"), py::arg("gradients"),
             py::arg("sizes"), py::arg("element"), py::arg("inverse_temperature"), py::arg("stream"));
#endif
}
