#include "ppo_loss.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "instruction_sets.h"
#include "parallel.h"

namespace areal {

using PPORange = void(const PPOLoss& call, int64_t begin, int64_t end, double* sums);

namespace baseline {
#include "ppo_loss_loop.h"
}  // namespace baseline

AREAL_VARIANTS(PPORange, ppo_span)
AREAL_VARIANTS(PPORange, ppo_sequences)

namespace {

constexpr int64_t kBlockTokens = 8192;   // sums are made per block, so that they do not depend on the number of threads
constexpr int64_t kBlocksPerThread = 4;  // fewer are not worth starting a thread for

void check_sequences(const PPOLoss& call) {
  const int32_t* at = call.cu_seqlens;
  if (at[0] != 0 || at[call.sequences] != call.tokens || !std::is_sorted(at, at + call.sequences + 1))
    throw std::invalid_argument("ppo_loss: cu_seqlens must rise from 0 to the number of tokens, " + std::to_string(call.tokens));
}

}  // namespace

void ppo_loss(const PPOLoss& call, int64_t threads, const std::string& instruction_set) {
  const bool of_sequences = call.cu_seqlens != nullptr;
  if (of_sequences) check_sequences(call);
  PPORange* const range = of_sequences ? select_ppo_sequences(instruction_set) : select_ppo_span(instruction_set);
  // A sequence belongs to the block where it begins.
  const auto cut = [&](int64_t token) {
    if (token >= call.tokens) return of_sequences ? call.sequences : call.tokens;
    return of_sequences ? std::lower_bound(call.cu_seqlens, call.cu_seqlens + call.sequences, token) - call.cu_seqlens : token;
  };
  const int64_t blocks = (call.tokens + kBlockTokens - 1) / kBlockTokens;
  const auto work = [&](int64_t block, double* sums) { range(call, cut(block * kBlockTokens), cut((block + 1) * kBlockTokens), sums); };

  double total[kStatistics] = {};
  if (blocks == 1) {
    work(0, total);
  } else {
    std::vector<double> sums(blocks * kStatistics);
    parallel_for(blocks, std::min(threads, std::max<int64_t>(1, blocks / kBlocksPerThread)),
                 [&](int64_t block) { work(block, &sums[block * kStatistics]); });
    for (int64_t i = 0; i < blocks * kStatistics; ++i) total[i % kStatistics] += sums[i];
  }
  for (int i = 0; i < kStatistics; ++i) call.sums[i] = static_cast<float>(total[i]);
  call.sums[kLoss] = *call.loss = static_cast<float>(total[kLoss] * static_cast<double>(call.scale));
}

}  // namespace areal
