#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "ppo_loss.h"
#ifdef AREAL_CUDA_VERSION
#include "../kernels/ppo_loss.cuh"
#endif

namespace py = pybind11;

namespace {

enum Flag {
  kCispo = 1,
  kDecoupled = 2,
  kMaskWeights = 4,
  kSequenceRatio = 8,
  kSequenceWeight = 16,
  kSequenceFilter = 32,
  kSequenceMean = 64,
  kFilterByAdvantage = 128,
  kFloatMask = 1024
};

// addresses: current, proximal, behaviour, advantages, mask, cu_seqlens, entropy, denominator, gradient, entropy's gradient, loss, sums;
// numbers: lower, upper, c_clip, weight_cap, filter_lower, filter_upper, entropy_coef. The 0 of an address stands for none.
areal::PPOLoss make_call(const std::array<uintptr_t, 12>& addresses, int64_t tokens, int64_t sequences, const std::array<float, 7>& numbers,
                         float scale, int flags) {
  const auto floats = [&](int i) { return reinterpret_cast<float*>(addresses[i]); };
  const auto has = [&](Flag flag) { return (flags & flag) != 0 ? 1 : 0; };
  const areal::PPOParameters parameters = {numbers[0], numbers[1],  numbers[2],      numbers[3],        numbers[4],
                                           numbers[5], has(kCispo), has(kDecoupled), has(kMaskWeights), has(kFilterByAdvantage)};
  return {floats(0),
          floats(1),
          floats(2),
          floats(3),
          has(kFloatMask) ? nullptr : reinterpret_cast<const uint8_t*>(addresses[4]),
          has(kFloatMask) ? floats(4) : nullptr,
          reinterpret_cast<const int32_t*>(addresses[5]),
          floats(6),
          floats(7),
          floats(8),
          floats(9),
          floats(10),
          floats(11),
          tokens,
          sequences,
          parameters,
          scale,
          numbers[6],
          has(kSequenceRatio),
          has(kSequenceWeight),
          has(kSequenceFilter),
          has(kSequenceMean)};
}

void call_ppo_loss(const std::array<uintptr_t, 12>& addresses, int64_t tokens, int64_t sequences, const std::array<float, 7>& numbers,
                   float scale, int flags, int64_t threads, const std::string& instruction_set) {
  py::gil_scoped_release release;
  areal::ppo_loss(make_call(addresses, tokens, sequences, numbers, scale, flags), threads, instruction_set);
}

#ifdef AREAL_CUDA_VERSION
void call_ppo_loss_cuda(const std::array<uintptr_t, 12>& addresses, int64_t tokens, int64_t sequences, const std::array<float, 7>& numbers,
                        float scale, int flags, uintptr_t workspace, uintptr_t stream) {
  const char* error =
      areal::ppo_loss_cuda(make_call(addresses, tokens, sequences, numbers, scale, flags), reinterpret_cast<void*>(workspace), stream);
  if (error != nullptr) throw std::runtime_error(std::string("ppo_loss: ") + error);
}
#endif

}  // namespace

void areal::bind_ppo_loss(py::module_& module) {
  module.def("ppo_loss", &call_ppo_loss, py::arg("addresses"), py::arg("tokens"), py::arg("sequences"), py::arg("numbers"),
             py::arg("scale"), py::arg("flags"), py::arg("threads"), py::arg("instruction_set") = "");
#ifdef AREAL_CUDA_VERSION
  module.def("ppo_loss_cuda_workspace", &areal::ppo_loss_cuda_workspace);
  module.def("ppo_loss_cuda", &call_ppo_loss_cuda, py::arg("addresses"), py::arg("tokens"), py::arg("sequences"), py::arg("numbers"),
             py::arg("scale"), py::arg("flags"), py::arg("workspace"), py::arg("stream"));
#endif
}
