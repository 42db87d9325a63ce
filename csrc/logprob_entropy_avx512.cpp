#include "bfloat16.h"
#include "logprob_entropy.h"

namespace areal::avx512 {
#include "logprob_entropy_loop.h"
}  // namespace areal::avx512
