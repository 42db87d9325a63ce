// What lies between the matrix products of linear_ppo_loss: from a chunk of logits to log-probs, entropies and, in place, the gradient
// by the logits (float32 or bfloat16, host).
#pragma once

#include <cstdint>
#include <string>

#include "ppo_parameters.h"

namespace areal {

struct LinearPPORows {
  void* logits;               // [rows, n]; overwritten by d(loss) / d(logits) if `gradients`
  const int64_t* targets;     // [rows], each in [0, n)
  const float* proximal;      // [rows]; null: the current policy is the proximal one
  const float* behavior;      // [rows]
  const float* advantages;    // [rows]
  const float* loss_weights;  // [rows]; 0: the token does not count, and its gradient is 0 whatever else it holds
  float* logprobs;            // [rows]
  float* entropy;             // [rows]
  int64_t rows, n;
  bool is_bfloat16;  // or float32
  bool gradients;
  float inverse_temperature;
  float entropy_coef;  // loss += -entropy_coef * loss_weight * entropy
  PPOParameters parameters;
};

// Results depend on the instruction set, not on the number of threads.
void linear_ppo_rows(const LinearPPORows& call, unsigned threads, const std::string& instruction_set);

}  // namespace areal
