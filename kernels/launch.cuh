// What every .cu file needs to launch its kernels. Compiled by nvcc, or, for the tests, as C++ with tests/cuda_on_host before it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define AREAL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), reinterpret_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
// Dynamic shared memory: its size is the launch's shared_bytes.
#define AREAL_DYNAMIC_SHARED(type, name)                            \
  extern __shared__ __align__(16) unsigned char areal_shared_mem[]; \
  type* const name = reinterpret_cast<type*>(areal_shared_mem)
#endif

namespace areal {

// The error text of what was launched last on this thread, or null.
inline const char* launch_error() {
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// Multiprocessors of the current device; 1 where it cannot be told (the launch that follows will say why).
inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count;
}

}  // namespace areal
