// Device functions of CUDA that the kernels use. Shuffles and votes are for whole warps: their mask is not looked at, and every thread of
// the warp that has not ended takes part.
#pragma once

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::block_barrier); }
inline void __syncwarp(unsigned = ~0u) { cuda_on_host::exchange(0, cuda_on_host::lane()); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __shfl_sync(unsigned, T value, int from, int width = 32) {
  const unsigned lane = cuda_on_host::lane();
  return cuda_on_host::exchange(value, lane / width * width + from % width);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
  return cuda_on_host::exchange(value, cuda_on_host::lane() ^ mask);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta, int width = 32) {
  const unsigned lane = cuda_on_host::lane();
  return cuda_on_host::exchange(value, lane % width + delta < unsigned(width) ? lane + delta : lane);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta, int width = 32) {
  const unsigned lane = cuda_on_host::lane();
  return cuda_on_host::exchange(value, lane % width >= delta ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  unsigned ballot = 0;
  for (unsigned from = 0; from < cuda_on_host::kWarp; ++from) ballot |= unsigned{cuda_on_host::exchange(predicate, from)} << from;
  return ballot;
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(unsigned mask, bool predicate) { return !__any_sync(mask, !predicate); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <typename T, typename V>
T atomicAdd(T* target, V value) {
  const T old = *target;
  *target = old + static_cast<T>(value);
  return old;
}
template <typename T, typename V>
T atomicMax(T* target, V value) {
  const T old = *target;
  *target = std::max(old, static_cast<T>(value));
  return old;
}
template <typename T, typename V>
T atomicExch(T* target, V value) {
  const T old = *target;
  *target = static_cast<T>(value);
  return old;
}
// Counts up to `limit`, then from 0 again.
inline unsigned atomicInc(unsigned* target, unsigned limit) {
  const unsigned old = *target;
  *target = old >= limit ? 0 : old + 1;
  return old;
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}
template <typename T>
void __stcg(T* p, T value) {
  *p = value;
}

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return std::min(std::max(x, 0.0f), 1.0f); }
inline int __float_as_int(float x) {
  int i;
  std::memcpy(&i, &x, sizeof(i));
  return i;
}
inline float __int_as_float(int i) {
  float x;
  std::memcpy(&x, &i, sizeof(x));
  return x;
}
using std::isfinite;
using std::isnan;
using std::max;
using std::min;
