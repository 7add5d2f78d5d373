/* What the sources of this folder know of CUDA: the only file that names its headers.
 *
 * The same sources are compiled twice: by nvcc for devices, and by g++ as C++17 with KV_CUDA_EMU
 * for the emulation of tests/gpu/emu, which defines the runtime's calls that are used here over
 * host memory and runs kernels on the CPU, with the mistakes of streams, barriers and lifetimes
 * made visible. So a kernel keeps to: grid-stride loops, vector loads (float4, uint4, …),
 * __shared__ arrays of fixed size and of plain types, __syncthreads, atomicAdd and its like. No
 * warp intrinsics, cooperative groups, dynamic shared memory, __constant__ or __device__ variables,
 * and no thread_local anywhere in the plug-in (the emulation keeps its shared arrays there).
 *
 * KV_LAUNCH((kernel<T, 4>), grid, block, stream, arguments...) launches, with at least one
 * argument; what is wrong with the launch itself is told by cudaGetLastError behind it. Arguments
 * are converted to the kernel's parameter types and copied at the launch. A kernel needs no mark
 * that it has barriers: the emulation finds out when the first thread comes to one.
 */
#ifndef KV_CUDA_GPU_H
#define KV_CUDA_GPU_H

#ifdef KV_CUDA_EMU
#include <emu_cuda.h>
#else
#include <cuda_runtime.h>
#define KV_LAUNCH(kernel, grid, block, stream, ...)                                                \
    KV_LAUNCHED kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#define KV_LAUNCHED(...) __VA_ARGS__
#endif

#endif
