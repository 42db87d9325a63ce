// The copies of flatten_weights. Compiled once per instruction set: included inside a namespace of its own, after streaming.h.

typedef uint8_t Bytes __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t FewHalves __attribute__((vector_size(VECTOR_BYTES / 2)));
constexpr uint64_t kHalves = VECTOR_BYTES / 2;

template <bool kStream, typename Vector>
inline __attribute__((always_inline)) void put(uint8_t* target, const Vector& value) {
  if constexpr (kStream)
    STREAM_STORE(target, value);
  else
    __builtin_memcpy(target, &value, VECTOR_BYTES);
}

// The upper halves of the words of a and then of b.
inline __attribute__((always_inline)) Halves upper_halves(const Words& a, const Words& b) {
#if VECTOR_BYTES == 64
#define AREAL_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63
#elif VECTOR_BYTES == 32
#define AREAL_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif VECTOR_BYTES == 16
#define AREAL_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define AREAL_ODD 1, 3, 5, 7
#endif
#ifdef __clang__
  return __builtin_shufflevector((Halves)a, (Halves)b, AREAL_ODD);
#else
  return __builtin_shuffle((Halves)a, (Halves)b, Halves{AREAL_ODD});
#endif
#undef AREAL_ODD
}

// The bits of floats with the nearest bfloat16, ties to even, in their upper halves; not a number stays that.
template <typename Bits>
inline __attribute__((always_inline)) Bits round_to_bfloat16(const Bits& bits) {
  const Bits rounded = bits + 0x7FFF + (bits >> 16 & 1);
  return (bits & 0x7FFFFFFF) > 0x7F800000 ? Bits{} + 0x7FC00000 : rounded;
}

template <bool kStream>
inline __attribute__((always_inline)) void run_none(const uint8_t* source, uint8_t* target, uint64_t bytes) {
  uint64_t i = 0;
  for (; i + VECTOR_BYTES <= bytes; i += VECTOR_BYTES) {
    Bytes value;
    __builtin_memcpy(&value, source + i, sizeof(value));
    put<kStream>(target + i, value);
  }
  __builtin_memcpy(target + i, source + i, bytes - i);
}

template <bool kStream>
inline __attribute__((always_inline)) void run_narrow(const uint8_t* source, uint8_t* target, uint64_t n) {
  uint64_t i = 0;
  for (; i + kHalves <= n; i += kHalves) {
    Words low, high;
    __builtin_memcpy(&low, source + 4 * i, VECTOR_BYTES);
    __builtin_memcpy(&high, source + 4 * i + VECTOR_BYTES, VECTOR_BYTES);
    put<kStream>(target + 2 * i, upper_halves(round_to_bfloat16(low), round_to_bfloat16(high)));
  }
  for (; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, source + 4 * i, 4);
    const auto half = static_cast<uint16_t>(round_to_bfloat16(bits) >> 16);
    __builtin_memcpy(target + 2 * i, &half, 2);
  }
}

template <bool kStream>
inline __attribute__((always_inline)) void run_widen(const uint8_t* source, uint8_t* target, uint64_t n) {
  constexpr uint64_t kFew = kHalves / 2;
  uint64_t i = 0;
  for (; i + kFew <= n; i += kFew) {
    FewHalves halves;
    __builtin_memcpy(&halves, source + 2 * i, sizeof(halves));
    put<kStream>(target + 4 * i, __builtin_convertvector(halves, Words) << 16);
  }
  for (; i < n; ++i) {
    uint16_t half;
    __builtin_memcpy(&half, source + 2 * i, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    __builtin_memcpy(target + 4 * i, &bits, 4);
  }
}

// `count` elements of a conversion, else bytes. Streams only to a target that is a multiple of VECTOR_BYTES.
void copy_piece(const uint8_t* source, uint8_t* target, uint64_t count, areal::Conversion conversion, bool stream) {
  stream = stream && reinterpret_cast<uintptr_t>(target) % VECTOR_BYTES == 0;
  switch (conversion) {
    case areal::Conversion::none:
      return stream ? run_none<true>(source, target, count) : run_none<false>(source, target, count);
    case areal::Conversion::float_to_bfloat16:
      return stream ? run_narrow<true>(source, target, count) : run_narrow<false>(source, target, count);
    case areal::Conversion::bfloat16_to_float:
      return stream ? run_widen<true>(source, target, count) : run_widen<false>(source, target, count);
  }
}
