// Cutting a batch of sequences into micro-batches under a token capacity. The rules are those of areal/ops/plan_microbatches.py, tie
// by tie: both give the same plan.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace areal {

using MicrobatchPlan = std::vector<std::vector<std::vector<int64_t>>>;  // [rank][micro-batch][sequence index]

struct MicrobatchProblem {
  const int64_t* lengths;  // [n], 1 to capacity
  const double* costs;     // [n], above 0
  const int64_t* order;    // [n], indices, longest first
  int64_t n, capacity, world_size;
  int64_t least;  // no packing has fewer micro-batches, or k_min if that is more; at most n
  int64_t k_min;  // 0 to n
};

// algorithm: "lpt", "kk" or "ffd". Everything is checked by the caller.
MicrobatchPlan plan_microbatches(const std::string& algorithm, const MicrobatchProblem& problem);

}  // namespace areal
