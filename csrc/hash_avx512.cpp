// Compiled with -mavx512f -mavx512dq (whose 64-bit product is what makes it worth having); only called where the CPU has it.
#include <immintrin.h>

#include <cstdint>

#include "hash_mix.h"

#define VECTOR_BYTES 64
#define STREAM_STORE(address, value) _mm512_stream_si512(reinterpret_cast<__m512i*>(address), (__m512i)(value))

namespace areal::avx512 {
#include "hash_loop.h"
}
