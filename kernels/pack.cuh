// Launchers of the pack kernels; structures and meaning as in csrc/pack.h, addresses on the device.
#pragma once

#include <cstdint>
#include <vector>

#include "../csrc/pack.h"

namespace areal {

// The error's text, or null. One launch for up to 16 columns.
const char* pack_cuda(const std::vector<PackColumn>& columns, const SequenceLayout& layout, const PackDerived& derived, uintptr_t stream);
const char* unpack_cuda(const std::vector<PackColumn>& columns, const SequenceLayout& layout, uintptr_t stream);

}  // namespace areal
