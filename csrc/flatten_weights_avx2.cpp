#include "flatten_weights.h"
#include "streaming.h"

namespace areal::avx2 {
#include "flatten_weights_loop.h"
}  // namespace areal::avx2
