#include "ppo_loss.h"

namespace areal::avx2 {
#include "ppo_loss_loop.h"
}  // namespace areal::avx2
