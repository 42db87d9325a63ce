// The rows of logprob_entropy, compiled once per instruction set: included inside a namespace of its own.

// clang-format off
#include "vector8.h"
#include "vector8_bfloat16.h"
#include "softmax_row.h"
// clang-format on

template <typename E>
AREAL_INLINE void rows_forward(const LogprobEntropy& call, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const E* const z = static_cast<const E*>(call.logits) + r * call.n;
    const RowStatistics row = row_statistics(z, call.n, call.inverse_temperature);
    call.logprobs[r] = row_logprob(row, load1(z + call.targets[r]), call.inverse_temperature);
    call.entropy[r] = row.entropy;
    call.max[r] = row.max;
    call.log_sum[r] = row.log_sum;
  }
}

template <typename E>
AREAL_INLINE void rows_gradient(const LogprobEntropyGradient& call, int64_t begin, int64_t end) {
  const LogprobEntropy& forward = call.forward;
  for (int64_t r = begin; r < end; ++r) {
    const RowStatistics row = {forward.max[r], forward.log_sum[r], forward.entropy[r]};
    write_row_gradient(static_cast<const E*>(forward.logits) + r * forward.n, static_cast<E*>(call.out) + r * forward.n, forward.n,
                       forward.targets[r], row, call.grad_logprob[r], call.grad_entropy[r], forward.inverse_temperature);
  }
}

void logprob_rows(const LogprobEntropy& call, int64_t begin, int64_t end) {
  call.element == 1 ? rows_forward<BFloat16>(call, begin, end) : rows_forward<float>(call, begin, end);
}

void gradient_rows(const LogprobEntropyGradient& call, int64_t begin, int64_t end) {
  call.forward.element == 1 ? rows_gradient<BFloat16>(call, begin, end) : rows_gradient<float>(call, begin, end);
}
