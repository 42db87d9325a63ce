// ppo_loss on a GPU. csrc/ppo_loss.h says what is computed.
#pragma once

#include <cstdint>

#include "../csrc/ppo_loss.h"

namespace areal {

// Words of 4 bytes that a launch needs, zero before the first one; every launch leaves them fit for the next on the same stream.
int64_t ppo_loss_cuda_workspace();

// One launch. All pointers are of the device of the stream; those of the tokens need no alignment, with 16 bytes it is faster. The error
// text, or null.
const char* ppo_loss_cuda(const PPOLoss& call, void* workspace, uintptr_t stream);

}  // namespace areal
