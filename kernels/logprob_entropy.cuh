// Launchers of logprob_entropy on the GPU.
#pragma once

#include <cstdint>

#include "../csrc/logprob_entropy.h"

namespace areal {

// As on the host, but all addresses are of device memory, and a target that is no column gives NaN. On `stream` of the current device.
// Return an error text, or null. Asynchronous. rows > 0.
const char* logprob_entropy_cuda(const LogprobEntropy& call, uintptr_t stream);
const char* logprob_entropy_gradient_cuda(const LogprobEntropyGradient& call, uintptr_t stream);

}  // namespace areal
