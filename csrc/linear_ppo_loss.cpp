#include "linear_ppo_loss.h"

#include <algorithm>

#include "bfloat16.h"
#include "instruction_sets.h"
#include "parallel.h"

namespace areal {

using LinearPPORange = void(const LinearPPORows& call, int64_t begin, int64_t end);

namespace baseline {
#include "linear_ppo_loss_loop.h"
}  // namespace baseline

AREAL_VARIANTS(LinearPPORange, linear_ppo_range)

namespace {

constexpr int64_t kPerTurn = int64_t{1} << 15;    // elements that a thread takes at a time: some 50 microseconds
constexpr int64_t kPerThread = int64_t{1} << 17;  // elements: fewer are not worth starting a thread for

}  // namespace

void linear_ppo_rows(const LinearPPORows& call, unsigned threads, const std::string& instruction_set) {
  LinearPPORange* const linear_ppo_range = select_linear_ppo_range(instruction_set);
  const int64_t n = std::max<int64_t>(1, call.n);
  const int64_t per_turn = std::max<int64_t>(1, kPerTurn / n), useful = std::max<int64_t>(1, call.rows * n / kPerThread);
  parallel_for((call.rows + per_turn - 1) / per_turn, std::min<int64_t>(threads, useful),
               [&](int64_t turn) { linear_ppo_range(call, turn * per_turn, std::min(call.rows, (turn + 1) * per_turn)); });
}

}  // namespace areal
