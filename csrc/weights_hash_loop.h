// The inner loop of the weight hash. Compiled once per instruction set: included inside a namespace of its own, after streaming.h.

typedef uint64_t Vector __attribute__((vector_size(VECTOR_BYTES)));
constexpr uint64_t kLanes = VECTOR_BYTES / 8;

inline __attribute__((always_inline)) Vector mix(Vector x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Hashes, and copies when kCopy, `words` words (a multiple of kLanes): each is loaded once, so that the hash is that of the copy.
// kStream: target is a multiple of VECTOR_BYTES.
template <bool kCopy, bool kStream>
inline __attribute__((always_inline)) uint64_t run(const uint8_t* source, uint8_t* target, uint64_t words, uint64_t first, uint64_t key) {
  Vector state, sum = {};
  for (uint64_t lane = 0; lane < kLanes; ++lane) state[lane] = key + (first + lane) * areal::kGolden;
  for (uint64_t i = 0; i < words; i += kLanes) {
    Vector value;
    __builtin_memcpy(&value, source + 8 * i, VECTOR_BYTES);
    if (kStream)
      STREAM_STORE(target + 8 * i, value);
    else if (kCopy)
      __builtin_memcpy(target + 8 * i, &value, VECTOR_BYTES);
    sum += mix(value ^ state);
    state += kLanes * areal::kGolden;
  }
  uint64_t total = 0;
  for (uint64_t lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return total;
}

uint64_t hash_words(const uint8_t* source, uint8_t* target, uint64_t words, uint64_t first, uint64_t key, bool stream) {
  if (target == nullptr) return run<false, false>(source, nullptr, words, first, key);
  if (stream && reinterpret_cast<uintptr_t>(target) % VECTOR_BYTES == 0) return run<true, true>(source, target, words, first, key);
  return run<true, false>(source, target, words, first, key);
}
