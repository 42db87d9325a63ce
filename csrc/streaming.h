// The widest store that bypasses the caches, for files that are compiled per instruction set: VECTOR_BYTES, and
// STREAM_STORE(address, vector) to an address that is a multiple of it. Included before their namespace, and outside of it.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#define VECTOR_BYTES 64
#define STREAM_STORE(address, value) _mm512_stream_si512(reinterpret_cast<__m512i*>(address), (__m512i)(value))
#elif defined(__AVX2__)
#include <immintrin.h>
#define VECTOR_BYTES 32
#define STREAM_STORE(address, value) _mm256_stream_si256(reinterpret_cast<__m256i*>(address), (__m256i)(value))
#elif defined(__SSE2__)
#include <emmintrin.h>
#define VECTOR_BYTES 16
#define STREAM_STORE(address, value) _mm_stream_si128(reinterpret_cast<__m128i*>(address), (__m128i)(value))
#else
#define VECTOR_BYTES 8
#define STREAM_STORE(address, value) __builtin_memcpy(address, &(value), VECTOR_BYTES)
#endif
