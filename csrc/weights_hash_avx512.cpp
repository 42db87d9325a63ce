#include <cstdint>

#include "hash_mix.h"
#include "streaming.h"

namespace areal::avx512 {
#include "weights_hash_loop.h"
}  // namespace areal::avx512
