// Runs CUDA kernels on the CPU, for tests of their arithmetic and indexing where there is no GPU: the .cu files are compiled as C++ with
// this header before them. Blocks run one after another; the threads of a block are fibers that take turns at barriers and shuffles, in
// alternating order, so that a missing barrier tends to show. One launch at a time. Memory ordering and speed are not modelled.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static
#define __constant__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

#include "cuda_types.h"

namespace cuda_on_host {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;

struct Barrier {
  unsigned expected = 0, arrived = 0;
  uint64_t generation = 0;
  void release_if_all() {
    if (expected != 0 && arrived == expected) {
      arrived = 0;
      ++generation;
    }
  }
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char slots[kWarp][16];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 index;
  bool done = true;
};

// One for the whole module: inline variables are shared by all files.
inline std::mutex launching;
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline unsigned current = 0;
inline dim3 grid_size, block_size, block_index;
inline std::function<void()> body;
inline std::vector<unsigned char> dynamic_shared;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

inline void wait(Barrier& barrier) {
  const uint64_t generation = barrier.generation;
  ++barrier.arrived;
  barrier.release_if_all();
  while (barrier.generation == generation) yield();
}

inline void run_fiber() {
  body();
  fibers[current].done = true;
  for (Barrier* barrier : {&block_barrier, &warps[current / kWarp].barrier}) {
    --barrier->expected;
    barrier->release_if_all();
  }
  yield();
}

inline void run_block(unsigned n_threads) {
  block_barrier = {n_threads, 0, 0};
  warps.assign((n_threads + kWarp - 1) / kWarp, Warp{});
  for (unsigned t = 0; t < n_threads; ++t) {
    Fiber& fiber = fibers[t];
    ++warps[t / kWarp].barrier.expected;
    fiber.index = {t % block_size.x, t / block_size.x % block_size.y, t / block_size.x / block_size.y};
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  const auto progress = [&] {
    uint64_t sum = block_barrier.generation;
    for (const Warp& warp : warps) sum += warp.barrier.generation;
    for (unsigned t = 0; t < n_threads; ++t) sum += fibers[t].done;
    return sum;
  };
  uint64_t before = ~uint64_t{0};
  for (bool backward = false;; backward = !backward) {
    bool all_done = true;
    for (unsigned i = 0; i < n_threads; ++i) {
      current = backward ? n_threads - 1 - i : i;
      if (fibers[current].done) continue;
      all_done = false;
      swapcontext(&scheduler, &fibers[current].context);
    }
    if (all_done) return;
    const uint64_t now = progress();
    if (now == before) {
      std::fprintf(stderr, "cuda_on_host: the threads of a block wait for each other at different barriers\n");
      std::abort();
    }
    before = now;
  }
}

inline void launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
  const std::lock_guard<std::mutex> lock(launching);
  const unsigned n_threads = block.x * block.y * block.z;
  grid_size = grid;
  block_size = block;
  body = std::move(kernel);
  dynamic_shared.assign(shared_bytes + 16, 0xAB);
  while (fibers.size() < n_threads) {
    fibers.emplace_back();
    fibers.back().stack = std::make_unique<char[]>(kStackBytes);
  }
  for (block_index.z = 0; block_index.z < grid.z; ++block_index.z)
    for (block_index.y = 0; block_index.y < grid.y; ++block_index.y)
      for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) run_block(n_threads);
}

inline unsigned char* shared_start() {
  return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(dynamic_shared.data()) + 15) / 16 * 16);
}

// Every thread of the warp shows `value` and reads that of lane `from`.
template <typename T>
T exchange(T value, unsigned from) {
  static_assert(sizeof(T) <= 16);
  Warp& warp = warps[current / kWarp];
  std::memcpy(warp.slots[current % kWarp], &value, sizeof(T));
  wait(warp.barrier);
  T other;
  std::memcpy(&other, warp.slots[from % kWarp], sizeof(T));
  wait(warp.barrier);
  return other;
}

inline unsigned lane() { return current % kWarp; }

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::fibers[cuda_on_host::current].index)
#define blockIdx cuda_on_host::block_index
#define gridDim cuda_on_host::grid_size
#define blockDim cuda_on_host::block_size
#define warpSize 32
#define AREAL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream), cuda_on_host::launch((grid), (block), (shared_bytes), [=] { kernel(__VA_ARGS__); }))
#define AREAL_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(cuda_on_host::shared_start())

#include "cuda_intrinsics.h"
