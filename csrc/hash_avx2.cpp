// Compiled with -mavx2; only called where the CPU has it.
#include <immintrin.h>

#include <cstdint>

#include "hash_mix.h"

#define VECTOR_BYTES 32
#define STREAM_STORE(address, value) _mm256_stream_si256(reinterpret_cast<__m256i*>(address), (__m256i)(value))

namespace areal::avx2 {
#include "hash_loop.h"
}
