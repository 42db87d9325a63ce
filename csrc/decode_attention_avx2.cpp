#include "decode_attention.h"

namespace areal::avx2 {
#include "decode_attention_loop.h"
}  // namespace areal::avx2
