#include "ppo_loss.h"

namespace areal::avx512 {
#include "ppo_loss_loop.h"
}  // namespace areal::avx512
