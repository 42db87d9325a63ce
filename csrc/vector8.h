// Eight floats at a time, in GCC's and Clang's portable vectors: the compiler maps them to what the instruction set has. For the loops
// that are compiled per instruction set: included inside their namespace, so it has no include guard and includes nothing.

#define AREAL_INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define AREAL_SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define AREAL_SHUFFLE(x, ...) __builtin_shuffle(x, Int8{__VA_ARGS__})
#pragma GCC diagnostic ignored "-Wpsabi"  // everything that passes vectors is inlined
#endif
#pragma GCC diagnostic ignored "-Wunused-function"  // no loop uses all of these

typedef float Float8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));
constexpr int64_t kWidth = 8;

AREAL_INLINE Float8 load8(const float* p) {
  Float8 x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

AREAL_INLINE void store8(float* p, const Float8& x) { __builtin_memcpy(p, &x, sizeof(x)); }

AREAL_INLINE Float8 max8(const Float8& a, const Float8& b) { return a > b ? a : b; }
AREAL_INLINE Float8 min8(const Float8& a, const Float8& b) { return a < b ? a : b; }

AREAL_INLINE float sum8(const Float8& value) {
  Float8 x = value;
  x += AREAL_SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3);
  x += AREAL_SHUFFLE(x, 2, 3, 0, 1, 6, 7, 4, 5);
  return x[0] + x[1];
}

// 2^n * exp(x - n * ln(2)), whose second factor is a Taylor series on |r| <= ln(2) / 2.
AREAL_INLINE Float8 exp8_around(const Float8& x, const Int8& n) {
  const Float8 whole = __builtin_convertvector(n, Float8);
  const Float8 r = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
  Float8 y = r * (1.0f / 5040) + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const Int8 bits = (n + 127) << 23;
  Float8 power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return y * power;
}

// exp(x) for x <= 0, to 2 units in the last place; 0 below -87, minus infinity included.
AREAL_INLINE Float8 exp8(const Float8& value) {
  const Int8 tiny = value < -87.0f;
  const Float8 x = tiny ? Float8{} - 87.0f : value;
  const Float8 y = exp8_around(x, __builtin_convertvector(x * 1.44269504f - 0.5f, Int8));
  return tiny ? Float8{} : y;
}

// exp(x) for x in [-87, 88], to 2 units in the last place.
AREAL_INLINE Float8 exp8_either_sign(const Float8& x) {
  const Float8 scaled = x * 1.44269504f;
  return exp8_around(x, __builtin_convertvector(scaled + (scaled < 0.0f ? Float8{} - 0.5f : Float8{} + 0.5f), Int8));
}

// For templates that take float too: exp(x) for x in [-87, 88].
AREAL_INLINE Float8 exp_within(const Float8& x) { return exp8_either_sign(x); }
