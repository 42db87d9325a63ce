// The type of bfloat16 elements on the host.
#pragma once

#include <cstdint>

namespace areal {

struct BFloat16 {
  uint16_t bits;  // the upper half of a float
};

}  // namespace areal
