// Cutting a batch of sequences into micro-batches under a token capacity.
#pragma once

#include <cstdint>
#include <vector>

namespace areal {

using MicrobatchPlan = std::vector<std::vector<std::vector<int64_t>>>;  // [rank][micro-batch][sequence index]

// lengths[n] > 0 and <= capacity, capacity > 0, world_size > 0, k_min > 0: checked by the caller.
MicrobatchPlan plan_microbatches_ffd(const int64_t* lengths, int64_t n, int64_t capacity, int64_t world_size, int64_t k_min);

}  // namespace areal
