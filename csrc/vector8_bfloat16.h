// bfloat16 in memory, float in registers. Included after vector8.h, in the same namespace; needs bfloat16.h outside of it.

typedef uint32_t Word8 __attribute__((vector_size(32)));
typedef uint16_t Short8 __attribute__((vector_size(16)));

AREAL_INLINE Float8 load8(const BFloat16* p) {
  Short8 halves;
  __builtin_memcpy(&halves, p, sizeof(halves));
  const Word8 bits = __builtin_convertvector(halves, Word8) << 16;
  Float8 x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

// Rounds to nearest, ties to even; NaN stays NaN.
AREAL_INLINE void store8(BFloat16* p, const Float8& x) {
  Word8 bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const Word8 rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const Int8 is_number = x == x;
  const Short8 halves = __builtin_convertvector(is_number ? rounded : (bits >> 16 | 0x40), Short8);
  __builtin_memcpy(p, &halves, sizeof(halves));
}
