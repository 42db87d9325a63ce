#include "logprob_entropy.h"

#include <algorithm>
#include <stdexcept>

#include "bfloat16.h"
#include "instruction_sets.h"
#include "parallel.h"

namespace areal {

using LogprobRows = void(const LogprobEntropy& call, int64_t begin, int64_t end);
using GradientRows = void(const LogprobEntropyGradient& call, int64_t begin, int64_t end);

namespace baseline {
#include "logprob_entropy_loop.h"
}  // namespace baseline

AREAL_VARIANTS(LogprobRows, logprob_rows)
AREAL_VARIANTS(GradientRows, gradient_rows)

namespace {

constexpr int64_t kPerTurn = int64_t{1} << 15;    // elements that a thread takes at a time: some 20 microseconds
constexpr int64_t kPerThread = int64_t{1} << 17;  // elements: fewer are not worth starting a thread for

template <typename Call>
void over_rows(void (*work)(const Call&, int64_t, int64_t), const Call& call, int64_t rows, int64_t n, unsigned threads) {
  const int64_t per_turn = std::max<int64_t>(1, kPerTurn / n);
  const int64_t useful = std::max<int64_t>(1, rows * n / kPerThread);
  parallel_for((rows + per_turn - 1) / per_turn, std::min<int64_t>(threads, useful),
               [&](int64_t turn) { work(call, turn * per_turn, std::min(rows, (turn + 1) * per_turn)); });
}

}  // namespace

void logprob_entropy(const LogprobEntropy& call, unsigned threads, const std::string& instruction_set) {
  LogprobRows* const logprob_rows = select_logprob_rows(instruction_set);
  for (int64_t r = 0; r < call.rows; ++r)
    if (call.targets[r] < 0 || call.targets[r] >= call.n)
      throw std::invalid_argument("logprob_entropy: targets[" + std::to_string(r) + "] is " + std::to_string(call.targets[r]) +
                                  "; it must lie in [0, " + std::to_string(call.n) + ")");
  over_rows(logprob_rows, call, call.rows, call.n, threads);
}

void logprob_entropy_gradient(const LogprobEntropyGradient& call, unsigned threads, const std::string& instruction_set) {
  over_rows(select_gradient_rows(instruction_set), call, call.forward.rows, call.forward.n, threads);
}

}  // namespace areal
