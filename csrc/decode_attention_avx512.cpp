#include "decode_attention.h"

namespace areal::avx512 {
#include "decode_attention_loop.h"
}  // namespace areal::avx512
