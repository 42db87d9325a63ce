// The PPO loss of packed tokens, its gradient and its statistics, in one pass (two or three over each sequence where something is of the
// sequence's level). python/areal/ops/ppo_loss.py defines what is computed.
#pragma once

#include <cstdint>
#include <string>

#include "ppo_parameters.h"

namespace areal {

// In the order of STATISTICS in python/areal/ops/ppo_loss.py.
enum PPOStatistic {
  kLoss,
  kTokens,
  kClipped,
  kClippedHigh,
  kClippedLow,
  kDualClipped,
  kRatio,
  kImportanceWeight,
  kWeightTruncated,
  kFiltered,
  kKlProximal,
  kKlBehaviour,
  kEntropy,
  kStatistics,
};

struct PPOLoss {
  const float *current, *proximal, *behavior, *advantages;  // [tokens]
  const uint8_t* mask;                                      // [tokens]: a token counts unless its mask is 0; or null:
  const float* float_mask;                                  // [tokens], the same in floats, or null
  const int32_t* cu_seqlens;                                // [sequences + 1], or null where nothing is of the sequence's level
  const float* entropy;                                     // [tokens] or null
  const float* denominator;                                 // CUDA: where `scale` is still to be divided by it; null elsewhere
  float* gradient;                                          // [tokens] or null: d(loss) / d(current)
  float* entropy_gradient;                                  // [tokens] or null
  float* loss;                                              // []
  float* sums;                                              // [kStatistics]
  int64_t tokens, sequences;
  PPOParameters parameters;
  float scale;         // 1 / denominator; times 1 / length for the normalisation by a fixed length
  float entropy_coef;  // of the bonus in the loss
  int sequence_ratio, sequence_weight, sequence_filter, sequence_mean;  // booleans; the last: each sequence counts 1, not each token
};

// On the host. The result does not depend on `threads`. std::invalid_argument unless cu_seqlens rises from 0 to the number of tokens.
void ppo_loss(const PPOLoss& call, int64_t threads, const std::string& instruction_set);

}  // namespace areal
