#include <cstdint>

#include "hash_mix.h"
#include "streaming.h"

namespace areal::avx2 {
#include "weights_hash_loop.h"
}  // namespace areal::avx2
