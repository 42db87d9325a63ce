#include "gae.h"

namespace areal::avx512 {
#include "gae_loop.h"
}  // namespace areal::avx512
