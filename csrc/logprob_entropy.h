// Log-probability of a target and entropy of the softmax of every row of logits (float32 or bfloat16, host).
#pragma once

#include <cstdint>
#include <string>

namespace areal {

struct LogprobEntropy {
  const void* logits;      // [rows, n]
  const int64_t* targets;  // [rows], each in [0, n)
  int64_t rows, n;
  int element;  // of the logits: 0 float32, 1 bfloat16, 2 float16 (CUDA only)
  float inverse_temperature;
  float* logprobs;  // [rows]
  float* entropy;   // [rows]
  float* max;       // [rows]
  float* log_sum;   // [rows]
};

struct LogprobEntropyGradient {
  LogprobEntropy forward;     // its results are read
  const float* grad_logprob;  // [rows]
  const float* grad_entropy;  // [rows]
  void* out;                  // [rows, n], of the type of the logits; may be the logits
};

// std::invalid_argument for a target that is no column. Results depend on the instruction set, not on the number of threads.
void logprob_entropy(const LogprobEntropy& call, unsigned threads, const std::string& instruction_set);
void logprob_entropy_gradient(const LogprobEntropyGradient& call, unsigned threads, const std::string& instruction_set);

}  // namespace areal
