#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "bindings.h"
#include "linear_ppo_loss.h"

namespace py = pybind11;

namespace {

// addresses: logits, targets, proximal or 0, behavior, advantages, loss_weights, logprobs, entropy; sizes: rows, n; scalars:
// inverse_temperature, entropy_coef; parameters: the fields of PPOParameters.
void call_linear_ppo_rows(const std::array<uintptr_t, 8>& addresses, const std::array<int64_t, 2>& sizes, bool is_bfloat16, bool gradients,
                          const std::array<float, 2>& scalars, const std::array<float, 10>& p, unsigned threads,
                          const std::string& instruction_set) {
  py::gil_scoped_release release;
  const auto floats = [&](int i) { return reinterpret_cast<float*>(addresses[i]); };
  areal::LinearPPORows call{};
  call.logits = reinterpret_cast<void*>(addresses[0]);
  call.targets = reinterpret_cast<const int64_t*>(addresses[1]);
  call.proximal = floats(2);
  call.behavior = floats(3);
  call.advantages = floats(4);
  call.loss_weights = floats(5);
  call.logprobs = floats(6);
  call.entropy = floats(7);
  call.rows = sizes[0];
  call.n = sizes[1];
  call.is_bfloat16 = is_bfloat16;
  call.gradients = gradients;
  call.inverse_temperature = scalars[0];
  call.entropy_coef = scalars[1];
  call.parameters = {p[0], p[1], p[2], p[3], p[4], p[5], p[6] != 0, p[7] != 0, p[8] != 0, p[9] != 0};
  areal::linear_ppo_rows(call, threads, instruction_set);
}

}  // namespace

void areal::bind_linear_ppo_loss(py::module_& module) {
  module.def("linear_ppo_rows", &call_linear_ppo_rows, py::arg("addresses"), py::arg("sizes"), py::arg("is_bfloat16"), py::arg("gradients"),
             py::arg("scalars"), py::arg("parameters"), py::arg("threads"), py::arg("instruction_set") = "");
}
