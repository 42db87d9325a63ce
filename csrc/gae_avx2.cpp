#include "gae.h"

namespace areal::avx2 {
#include "gae_loop.h"
}  // namespace areal::avx2
