/* What the emulation has of CUDA, under CUDA's own names: the words of kernels, vector types, the
 * runtime's calls, KV_LAUNCH. For sources compiled by g++ as C++17 with KV_CUDA_EMU; they get it
 * from src/cuda/gpu.h. What the emulation promises is written in emu.h, what tests may ask of it in
 * emu_control.h.
 */
#ifndef EMU_CUDA_H
#define EMU_CUDA_H

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define EMU_API extern "C" __attribute__((visibility("default")))

/* -------------------------------------------------------------------------- words of kernels */

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
/* Every launch runs in one thread of the host, block after block, so this is a block's own memory;
 * its place in the module is known, so it can be spoilt between blocks. */
#define __shared__ static thread_local

#define EMU_VECTOR(type, element, alignment)                                                       \
    struct alignas(alignment) type##2                                                              \
    {                                                                                              \
        element x, y;                                                                              \
    };                                                                                             \
    struct type##3                                                                                 \
    {                                                                                              \
        element x, y, z;                                                                           \
    };                                                                                             \
    struct alignas(2 * (alignment) < 16 ? 2 * (alignment) : 16) type##4                            \
    {                                                                                              \
        element x, y, z, w;                                                                        \
    };                                                                                             \
    static inline type##2 make_##type##2(element x, element y)                                     \
    {                                                                                              \
        return {x, y};                                                                             \
    }                                                                                              \
    static inline type##3 make_##type##3(element x, element y, element z)                          \
    {                                                                                              \
        return {x, y, z};                                                                          \
    }                                                                                              \
    static inline type##4 make_##type##4(element x, element y, element z, element w)               \
    {                                                                                              \
        return {x, y, z, w};                                                                       \
    }
EMU_VECTOR(char, signed char, 2)
EMU_VECTOR(uchar, unsigned char, 2)
EMU_VECTOR(short, short, 4)
EMU_VECTOR(ushort, unsigned short, 4)
EMU_VECTOR(int, int, 8)
EMU_VECTOR(uint, unsigned, 8)
EMU_VECTOR(longlong, long long, 16)
EMU_VECTOR(ulonglong, unsigned long long, 16)
EMU_VECTOR(float, float, 8)
EMU_VECTOR(double, double, 16)
#undef EMU_VECTOR

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_)
    {
    }
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

void emu_barrier(int line);
static inline void __syncthreads(int line = __builtin_LINE())
{
    emu_barrier(line);
}

/* One thread of a kernel runs at a time, so these need nothing. */
template <class T> struct emu_same {
    typedef T type;
};
#define EMU_ATOMIC(name, result)                                                                   \
    template <class T> static inline T name(T *address, typename emu_same<T>::type value)          \
    {                                                                                              \
        T old = *address;                                                                          \
        *address = (result);                                                                       \
        return old;                                                                                \
    }
EMU_ATOMIC(atomicAdd, old + value)
EMU_ATOMIC(atomicOr, old | value)
EMU_ATOMIC(atomicAnd, old &value)
EMU_ATOMIC(atomicExch, value)
EMU_ATOMIC(atomicMin, value < old ? value : old)
EMU_ATOMIC(atomicMax, value > old ? value : old)
#undef EMU_ATOMIC

/* -------------------------------------------------------------------------------- the runtime */

#define EMU_ERRORS(X)                                                                              \
    X(cudaSuccess, 0, "no error")                                                                  \
    X(cudaErrorInvalidValue, 1, "invalid argument")                                                \
    X(cudaErrorMemoryAllocation, 2, "out of memory")                                               \
    X(cudaErrorInitializationError, 3, "initialization error")                                     \
    X(cudaErrorCudartUnloading, 4, "driver shutting down")                                         \
    X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                          \
    X(cudaErrorInsufficientDriver, 35, "CUDA driver version is insufficient")                      \
    X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")                                \
    X(cudaErrorInvalidDevice, 101, "invalid device ordinal")                                       \
    X(cudaErrorPeerAccessUnsupported, 217, "peer access is not supported between two devices")     \
    X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                              \
    X(cudaErrorNotReady, 600, "device not ready")                                                  \
    X(cudaErrorIllegalAddress, 700, "an illegal memory access was encountered")                    \
    X(cudaErrorPeerAccessAlreadyEnabled, 704, "peer access is already enabled")                    \
    X(cudaErrorPeerAccessNotEnabled, 705, "peer access has not been enabled")                      \
    X(cudaErrorTooManyPeers, 711, "no more peers can be added")                                    \
    X(cudaErrorHostMemoryAlreadyRegistered, 712, "memory already registered")                      \
    X(cudaErrorHostMemoryNotRegistered, 713, "memory has not been registered")                     \
    X(cudaErrorMisalignedAddress, 716, "misaligned address")                                       \
    X(cudaErrorLaunchFailure, 719, "unspecified launch failure")                                   \
    X(cudaErrorNotSupported, 801, "operation not supported")                                       \
    X(cudaErrorUnknown, 999, "unknown error")

typedef enum cudaError {
#define EMU_ENUM(name, number, text) name = number,
    EMU_ERRORS(EMU_ENUM)
#undef EMU_ENUM
} cudaError_t;

typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;
typedef struct CUmemPoolHandle_st *cudaMemPool_t;

#define cudaStreamLegacy ((cudaStream_t)0x1)
#define cudaStreamPerThread ((cudaStream_t)0x2)

enum {
    cudaStreamDefault = 0,
    cudaStreamNonBlocking = 1,
    cudaEventDefault = 0,
    cudaEventBlockingSync = 1,
    cudaEventDisableTiming = 2,
    cudaHostAllocDefault = 0,
    cudaHostAllocPortable = 1,
    cudaHostAllocMapped = 2,
    cudaHostRegisterDefault = 0,
    cudaHostRegisterPortable = 1,
};

typedef enum cudaMemcpyKind {
    cudaMemcpyHostToHost = 0,
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDeviceToDevice = 3,
    cudaMemcpyDefault = 4,
} cudaMemcpyKind;

typedef enum cudaMemoryType {
    cudaMemoryTypeUnregistered = 0,
    cudaMemoryTypeHost = 1,
    cudaMemoryTypeDevice = 2,
    cudaMemoryTypeManaged = 3,
} cudaMemoryType;

typedef struct cudaPointerAttributes {
    cudaMemoryType type;
    int device;
    void *devicePointer, *hostPointer;
} cudaPointerAttributes;

typedef struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem;
    int multiProcessorCount, major, minor;
} cudaDeviceProp;

typedef enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMemoryPoolsSupported = 115,
} cudaDeviceAttr;

typedef enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9,
} cudaFuncAttribute;

typedef enum cudaMemPoolAttr {
    cudaMemPoolAttrReleaseThreshold = 4,   /* uint64_t */
    cudaMemPoolAttrReservedMemCurrent = 5, /* uint64_t, read only */
    cudaMemPoolAttrUsedMemCurrent = 7,     /* uint64_t, read only */
} cudaMemPoolAttr;

typedef enum cudaMemLocationType { cudaMemLocationTypeDevice = 1 } cudaMemLocationType;
typedef enum cudaMemAccessFlags {
    cudaMemAccessFlagsProtNone = 0,
    cudaMemAccessFlagsProtReadWrite = 3,
} cudaMemAccessFlags;
typedef struct cudaMemLocation {
    cudaMemLocationType type;
    int id;
} cudaMemLocation;
typedef struct cudaMemAccessDesc {
    cudaMemLocation location;
    cudaMemAccessFlags flags;
} cudaMemAccessDesc;

EMU_API cudaError_t cudaGetDeviceCount(int *count);
EMU_API cudaError_t cudaSetDevice(int device);
EMU_API cudaError_t cudaGetDevice(int *device);
EMU_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp *out, int device);
EMU_API cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
EMU_API cudaError_t cudaMemGetInfo(size_t *free, size_t *total);
EMU_API cudaError_t cudaDriverGetVersion(int *version);
EMU_API cudaError_t cudaRuntimeGetVersion(int *version);
EMU_API cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer);
EMU_API cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags);
EMU_API cudaError_t cudaDeviceSynchronize(void);

EMU_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags);
EMU_API cudaError_t cudaStreamDestroy(cudaStream_t stream);
EMU_API cudaError_t cudaStreamSynchronize(cudaStream_t stream);
EMU_API cudaError_t cudaStreamQuery(cudaStream_t stream);
EMU_API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
EMU_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags);
EMU_API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
EMU_API cudaError_t cudaEventQuery(cudaEvent_t event);
EMU_API cudaError_t cudaEventSynchronize(cudaEvent_t event);
EMU_API cudaError_t cudaEventDestroy(cudaEvent_t event);

EMU_API cudaError_t cudaMalloc(void **out, size_t bytes);
EMU_API cudaError_t cudaFree(void *pointer);
EMU_API cudaError_t cudaMallocAsync(void **out, size_t bytes, cudaStream_t stream);
EMU_API cudaError_t cudaMallocFromPoolAsync(void **out, size_t bytes, cudaMemPool_t pool,
                                            cudaStream_t stream);
EMU_API cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream);
EMU_API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *out, int device);
EMU_API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t keep);
EMU_API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr which, void *value);
EMU_API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, cudaMemPoolAttr which, void *value);
EMU_API cudaError_t cudaMemPoolSetAccess(cudaMemPool_t pool, const cudaMemAccessDesc *list,
                                         size_t count);
EMU_API cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags);
EMU_API cudaError_t cudaFreeHost(void *pointer);
EMU_API cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned flags);
EMU_API cudaError_t cudaHostUnregister(void *pointer);
EMU_API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *out, const void *pointer);

EMU_API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                                    cudaStream_t stream = nullptr);
EMU_API cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device,
                                        size_t bytes, cudaStream_t stream = nullptr);
EMU_API cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes,
                                    cudaStream_t stream = nullptr);

EMU_API cudaError_t cudaGetLastError(void);
EMU_API cudaError_t cudaPeekAtLastError(void);
EMU_API const char *cudaGetErrorName(cudaError_t error);
EMU_API const char *cudaGetErrorString(cudaError_t error);

template <class T> static inline cudaError_t cudaMalloc(T **out, size_t bytes)
{
    return cudaMalloc((void **)out, bytes);
}
template <class T>
static inline cudaError_t cudaMallocAsync(T **out, size_t bytes, cudaStream_t stream)
{
    return cudaMallocAsync((void **)out, bytes, stream);
}
template <class T>
static inline cudaError_t cudaMallocFromPoolAsync(T **out, size_t bytes, cudaMemPool_t pool,
                                                  cudaStream_t stream)
{
    return cudaMallocFromPoolAsync((void **)out, bytes, pool, stream);
}
template <class T> static inline cudaError_t cudaHostAlloc(T **out, size_t bytes, unsigned flags)
{
    return cudaHostAlloc((void **)out, bytes, flags);
}
template <class T> static inline cudaError_t cudaFuncSetAttribute(T *, cudaFuncAttribute, int)
{
    return cudaSuccess;
}

/* --------------------------------------------------------------------------------- launches */

/* `run` is one thread of the kernel; `pointers`: those among its arguments. */
void emu_enqueue(const char *name, dim3 grid, dim3 block, cudaStream_t stream,
                 std::function<void()> run, std::vector<const void *> pointers);

template <class A>
static inline void emu_add_pointer(std::vector<const void *> &list, const A &argument)
{
    if constexpr (std::is_pointer_v<A>)
        list.push_back((const void *)argument);
}

template <class... P, class... A>
static inline void emu_launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block,
                              cudaStream_t stream, A &&...arguments)
{
    std::tuple<std::decay_t<P>...> held(std::forward<A>(arguments)...);
    std::vector<const void *> pointers;
    std::apply([&](const auto &...each) { (emu_add_pointer(pointers, each), ...); }, held);
    emu_enqueue(
        name, grid, block, stream, [kernel, held] { std::apply(kernel, held); },
        std::move(pointers));
}

#define KV_LAUNCH(kernel, grid, block, stream, ...)                                                \
    emu_launch(#kernel, kernel, (grid), (block), (stream), __VA_ARGS__)

#endif
