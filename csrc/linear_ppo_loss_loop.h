// The rows of linear_ppo_loss, compiled once per instruction set: included inside a namespace of its own.

// clang-format off
#include "vector8.h"
#include "vector8_bfloat16.h"
#include "softmax_row.h"
#include "ppo_token.h"
// clang-format on

// A row is read twice, the second time from the cache, and written once.
template <typename E>
AREAL_INLINE void ppo_row(const LinearPPORows& call, int64_t r) {
  E* const z = static_cast<E*>(call.logits) + r * call.n;
  const RowStatistics row = row_statistics(z, call.n, call.inverse_temperature);
  const float current = row_logprob(row, load1(z + call.targets[r]), call.inverse_temperature);
  call.logprobs[r] = current;
  call.entropy[r] = row.entropy;
  if (!call.gradients) return;
  const float loss_weight = call.loss_weights[r];
  const float proximal = call.proximal == nullptr ? current : call.proximal[r];
  const float grad_logprob = ppo_token_gradient(call.parameters, current, proximal, call.behavior[r], call.advantages[r], loss_weight);
  const float grad_entropy = -call.entropy_coef * loss_weight;
  if (grad_logprob == 0 && grad_entropy == 0)
    __builtin_memset(z, 0, call.n * sizeof(E));
  else
    write_row_gradient(z, z, call.n, call.targets[r], row, grad_logprob, grad_entropy, call.inverse_temperature);
}

void linear_ppo_range(const LinearPPORows& call, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) call.is_bfloat16 ? ppo_row<BFloat16>(call, r) : ppo_row<float>(call, r);
}
