#include "bfloat16.h"
#include "linear_ppo_loss.h"

namespace areal::avx2 {
#include "linear_ppo_loss_loop.h"
}  // namespace areal::avx2
