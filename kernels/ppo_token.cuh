// csrc/ppo_token.h as device code.
#pragma once

#include "../csrc/ppo_parameters.h"

namespace areal::device {
#include "../csrc/ppo_token.h"
}  // namespace areal::device
