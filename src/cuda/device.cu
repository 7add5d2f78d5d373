/* Devices, streams, events, memory and copies, and the plug-in's table. All that is kept here
 * belongs to the devices: what is wrong with each, and what was asked of it once.
 */
#include "cuda/batch.h"

#include <stdarg.h>
#include <stdio.h>

namespace
{

struct {
    int count;
    int processors[KV_CUDA_DEVICES];
    int error[KV_CUDA_DEVICES];      /* that killed it, else cudaSuccess */
    bool is_pooled[KV_CUDA_DEVICES]; /* its pool keeps what is freed */
} devices;

int load(const int *at)
{
    return __atomic_load_n(at, __ATOMIC_RELAXED);
}

void say(char *sentence, const char *format, va_list arguments)
{
    vsnprintf(sentence, KV_DEVICE_SENTENCE, format, arguments);
}

kv_device_code_t dead(int device, char *sentence)
{
    cudaError_t error = (cudaError_t)load(&devices.error[device]);
    snprintf(sentence, KV_DEVICE_SENTENCE,
             "device %d is lost to this process since an earlier failure on it: %s (%s); start the "
             "process again to use it",
             device, cudaGetErrorString(error), cudaGetErrorName(error));
    return KV_DEVICE_DEAD;
}

} // namespace

kv_device_code_t kv_device_refuse(char *sentence, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    say(sentence, format, arguments);
    va_end(arguments);
    return KV_DEVICE_REFUSED;
}

kv_device_code_t kv_device_failed(int device, cudaError_t error, const char *doing, char *sentence)
{
    (void)cudaGetLastError();
    size_t unused, total;
    /* An error that stays is what every later call on the device answers, whatever it is about. */
    bool stays = error != cudaErrorMemoryAllocation &&
                 (cudaSetDevice(device) == error || cudaMemGetInfo(&unused, &total) == error);
    (void)cudaGetLastError();
    snprintf(sentence, KV_DEVICE_SENTENCE, "device %d could not %s: %s (%s)", device, doing,
             cudaGetErrorString(error), cudaGetErrorName(error));
    if (stays) {
        __atomic_store_n(&devices.error[device], (int)error, __ATOMIC_RELAXED);
        return KV_DEVICE_DEAD;
    }
    return error == cudaErrorMemoryAllocation ? KV_DEVICE_NO_MEMORY : KV_DEVICE_REFUSED;
}

kv_device_code_t kv_device_enter(int device, char *sentence)
{
    if (device < 0 || device >= devices.count)
        return kv_device_refuse(sentence, "there is no device %d: there are %d, from 0 on", device,
                                devices.count);
    if (load(&devices.error[device]) != cudaSuccess)
        return dead(device, sentence);
    KV_CUDA_TRY(device, cudaSetDevice(device), "be used", sentence);
    return KV_DEVICE_OK;
}

int kv_device_processors(int device)
{
    return devices.processors[device];
}

/* --------------------------------------------------------------------------------- devices */

namespace
{

kv_device_code_t info(int device, kv_device_info_t *out, char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    cudaDeviceProp properties;
    int driver, runtime;
    KV_CUDA_TRY(device, cudaGetDeviceProperties(&properties, device), "be looked at", sentence);
    KV_CUDA_TRY(device, cudaDriverGetVersion(&driver), "tell its driver's version", sentence);
    KV_CUDA_TRY(device, cudaRuntimeGetVersion(&runtime), "tell its runtime's version", sentence);
    snprintf(out->name, sizeof out->name, "%.*s", (int)sizeof out->name - 1, properties.name);
    out->bytes = (int64_t)properties.totalGlobalMem;
    out->major = properties.major;
    out->minor = properties.minor;
    out->processors = properties.multiProcessorCount;
    out->driver = driver;
    out->runtime = runtime;
    return KV_DEVICE_OK;
}

/* The pool of a device. It keeps what is freed, or every wait would give it back to the system. */
kv_device_code_t pool_of(int device, cudaMemPool_t *out, char *sentence)
{
    KV_CUDA_TRY(device, cudaDeviceGetDefaultMemPool(out, device), "find its pool of memory",
                sentence);
    if (!__atomic_load_n(&devices.is_pooled[device], __ATOMIC_RELAXED)) {
        uint64_t most = UINT64_MAX;
        KV_CUDA_TRY(device, cudaMemPoolSetAttribute(*out, cudaMemPoolAttrReleaseThreshold, &most),
                    "set up its pool of memory", sentence);
        __atomic_store_n(&devices.is_pooled[device], true, __ATOMIC_RELAXED);
    }
    return KV_DEVICE_OK;
}

/* Lets the device see the other one's pool, which peer access of the devices does not do. */
kv_device_code_t open_pool(int device, int other, char *sentence)
{
    cudaMemPool_t pool;
    KV_DEVICE_TRY(pool_of(other, &pool, sentence));
    cudaMemAccessDesc access = {};
    access.location.type = cudaMemLocationTypeDevice;
    access.location.id = device;
    access.flags = cudaMemAccessFlagsProtReadWrite;
    KV_CUDA_TRY(device, cudaMemPoolSetAccess(pool, &access, 1), "open its way to a peer's pool",
                sentence);
    return KV_DEVICE_OK;
}

kv_device_code_t peer(int device, int other, bool *direct, char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(other, sentence));
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    int can = 0;
    if (device != other)
        KV_CUDA_TRY(device, cudaDeviceCanAccessPeer(&can, device, other), "ask for a peer",
                    sentence);
    if (can != 0) {
        cudaError_t error = cudaDeviceEnablePeerAccess(other, 0);
        can = error != cudaErrorTooManyPeers;
        if (error == cudaErrorPeerAccessAlreadyEnabled || error == cudaErrorTooManyPeers)
            (void)cudaGetLastError();
        else
            KV_CUDA_TRY(device, error, "open its way to a peer", sentence);
    }
    if (can != 0)
        KV_DEVICE_TRY(open_pool(device, other, sentence));
    *direct = can != 0 || device == other;
    return KV_DEVICE_OK;
}

kv_device_code_t owner(const void *pointer, int *device, char *sentence)
{
    cudaPointerAttributes attributes;
    int current = 0;
    KV_CUDA_TRY(current, cudaGetDevice(&current), "be asked for", sentence);
    KV_CUDA_TRY(current, cudaPointerGetAttributes(&attributes, pointer), "look at a pointer",
                sentence);
    *device = attributes.type == cudaMemoryTypeDevice ? attributes.device : -1;
    return KV_DEVICE_OK;
}

kv_device_code_t current(int *device, char *sentence)
{
    KV_CUDA_TRY(0, cudaGetDevice(device), "tell which device is current", sentence);
    return KV_DEVICE_OK;
}

kv_device_code_t make_current(int device, char *sentence)
{
    return kv_device_enter(device, sentence);
}

/* ------------------------------------------------------------------------ streams and events */

kv_device_code_t stream_new(int device, void **out, char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    cudaStream_t stream;
    KV_CUDA_TRY(device, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "make a stream",
                sentence);
    *out = stream;
    return KV_DEVICE_OK;
}

kv_device_code_t stream_free(int device, void *stream, char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    KV_CUDA_TRY(device, cudaStreamDestroy((cudaStream_t)stream), "free a stream", sentence);
    return KV_DEVICE_OK;
}

kv_device_code_t stream_wait(int device, void *stream, void *event, char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    KV_CUDA_TRY(device, cudaStreamWaitEvent((cudaStream_t)stream, (cudaEvent_t)event, 0),
                "let a stream wait for an event", sentence);
    return KV_DEVICE_OK;
}

kv_device_code_t event_new(int device, void **out, char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    cudaEvent_t event;
    KV_CUDA_TRY(device, cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "make an event",
                sentence);
    *out = event;
    return KV_DEVICE_OK;
}

kv_device_code_t event_free(int device, void *event, char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    KV_CUDA_TRY(device, cudaEventDestroy((cudaEvent_t)event), "free an event", sentence);
    return KV_DEVICE_OK;
}

kv_device_code_t event_record(int device, void *event, void *stream, char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    KV_CUDA_TRY(device, cudaEventRecord((cudaEvent_t)event, (cudaStream_t)stream),
                "record an event", sentence);
    return KV_DEVICE_OK;
}

kv_device_code_t event_done(int device, void *event, bool *done, char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    cudaError_t error = cudaEventQuery((cudaEvent_t)event);
    if (error == cudaErrorNotReady)
        (void)cudaGetLastError(); /* it counts as one */
    else
        KV_CUDA_TRY(device, error, "do the work before an event", sentence);
    *done = error == cudaSuccess;
    return KV_DEVICE_OK;
}

/* ----------------------------------------------------------------------------------- memory */

kv_device_code_t alloc(int device, void *stream, int64_t bytes, void **out, char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    if (bytes <= 0)
        return kv_device_refuse(sentence, "%lld bytes cannot be allocated", (long long)bytes);
    cudaMemPool_t pool;
    KV_DEVICE_TRY(pool_of(device, &pool, sentence));
    void *pointer;
    cudaError_t error =
        cudaMallocFromPoolAsync(&pointer, (size_t)bytes, pool, (cudaStream_t)stream);
    if (error == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        KV_CUDA_TRY(device, cudaMemPoolTrimTo(pool, 0), "trim its pool of memory", sentence);
        error = cudaMallocFromPoolAsync(&pointer, (size_t)bytes, pool, (cudaStream_t)stream);
    }
    if (error != cudaSuccess) {
        char doing[64];
        snprintf(doing, sizeof doing, "allocate %lld bytes", (long long)bytes);
        return kv_device_failed(device, error, doing, sentence);
    }
    *out = pointer;
    return KV_DEVICE_OK;
}

kv_device_code_t free_memory(int device, void *stream, void *pointer, char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    KV_CUDA_TRY(device, cudaFreeAsync(pointer, (cudaStream_t)stream), "free memory", sentence);
    return KV_DEVICE_OK;
}

kv_device_code_t trim(int device, char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    cudaMemPool_t pool;
    KV_DEVICE_TRY(pool_of(device, &pool, sentence));
    KV_CUDA_TRY(device, cudaMemPoolTrimTo(pool, 0), "trim its pool of memory", sentence);
    return KV_DEVICE_OK;
}

kv_device_code_t memory(int device, int64_t *unused, int64_t *total, char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    size_t free_bytes, all_bytes;
    KV_CUDA_TRY(device, cudaMemGetInfo(&free_bytes, &all_bytes), "tell its memory", sentence);
    *unused = (int64_t)free_bytes;
    *total = (int64_t)all_bytes;
    return KV_DEVICE_OK;
}

kv_device_code_t host_alloc(int device, int64_t bytes, void **out, char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    if (bytes <= 0)
        return kv_device_refuse(sentence, "%lld bytes cannot be allocated", (long long)bytes);
    void *pointer;
    KV_CUDA_TRY(device, cudaHostAlloc(&pointer, (size_t)bytes, cudaHostAllocPortable),
                "pin memory of the host", sentence);
    *out = pointer;
    return KV_DEVICE_OK;
}

kv_device_code_t host_free(int device, void *pointer, char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    KV_CUDA_TRY(device, cudaFreeHost(pointer), "free pinned memory", sentence);
    return KV_DEVICE_OK;
}

/* ----------------------------------------------------------------------------------- copies */

kv_device_code_t copy(int device, void *stream, kv_device_way_t way, int64_t bytes,
                      const void *from, void *to, char *sentence)
{
    static const cudaMemcpyKind kinds[] = {cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost,
                                           cudaMemcpyDeviceToDevice};
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    if (bytes < 0)
        return kv_device_refuse(sentence, "%lld bytes cannot be copied", (long long)bytes);
    if (bytes > 0)
        KV_CUDA_TRY(device,
                    cudaMemcpyAsync(to, from, (size_t)bytes, kinds[way], (cudaStream_t)stream),
                    "copy", sentence);
    return KV_DEVICE_OK;
}

kv_device_code_t copy_peer(int device, void *stream, int64_t bytes, int from_device,
                           const void *from, int to_device, void *to, char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(from_device, sentence));
    KV_DEVICE_TRY(kv_device_enter(to_device, sentence));
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    if (bytes < 0)
        return kv_device_refuse(sentence, "%lld bytes cannot be copied", (long long)bytes);
    if (bytes > 0)
        KV_CUDA_TRY(device,
                    cudaMemcpyPeerAsync(to, to_device, from, from_device, (size_t)bytes,
                                        (cudaStream_t)stream),
                    "copy from or to a peer", sentence);
    return KV_DEVICE_OK;
}

kv_device_code_t zero(int device, void *stream, int64_t bytes, void *to, char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    if (bytes < 0)
        return kv_device_refuse(sentence, "%lld bytes cannot be zeroed", (long long)bytes);
    if (bytes > 0)
        KV_CUDA_TRY(device, cudaMemsetAsync(to, 0, (size_t)bytes, (cudaStream_t)stream),
                    "write zeros", sentence);
    return KV_DEVICE_OK;
}

} // namespace

/* ------------------------------------------------------------------------------------- entry */

extern "C" __attribute__((visibility("default"))) kv_device_open_t kv_device_open;

kv_device_code_t kv_device_open(uint32_t abi, size_t bytes, kv_device_api_t *api, char *sentence)
{
    if (abi != KV_DEVICE_ABI || bytes != sizeof *api)
        return kv_device_refuse(
            sentence,
            "this plug-in is of another version of the package: it has interface %d of %zu bytes, "
            "and %u of %zu is asked for; build it again",
            (int)KV_DEVICE_ABI, sizeof *api, (unsigned)abi, bytes);
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count <= 0) {
        (void)cudaGetLastError();
        snprintf(sentence, KV_DEVICE_SENTENCE, "there is no CUDA device here: %s (%s)",
                 cudaGetErrorString(error != cudaSuccess ? error : cudaErrorNoDevice),
                 cudaGetErrorName(error != cudaSuccess ? error : cudaErrorNoDevice));
        return KV_DEVICE_NONE;
    }
    memset(&devices, 0, sizeof devices);
    devices.count = count < KV_CUDA_DEVICES ? count : (int)KV_CUDA_DEVICES;
    for (int i = 0; i < devices.count; i++)
        KV_CUDA_TRY(
            i, cudaDeviceGetAttribute(&devices.processors[i], cudaDevAttrMultiProcessorCount, i),
            "be looked at", sentence);
    kv_device_api_t table = {};
    table.abi = KV_DEVICE_ABI;
    table.bytes = sizeof table;
    table.num_devices = devices.count;
    table.name = "cuda";
    table.info = info;
    table.peer = peer;
    table.owner = owner;
    table.current = current;
    table.make_current = make_current;
    table.stream_new = stream_new;
    table.stream_free = stream_free;
    table.stream_wait = stream_wait;
    table.event_new = event_new;
    table.event_free = event_free;
    table.event_record = event_record;
    table.event_done = event_done;
    table.alloc = alloc;
    table.free = free_memory;
    table.trim = trim;
    table.memory = memory;
    table.host_alloc = host_alloc;
    table.host_free = host_free;
    table.copy = copy;
    table.copy_peer = copy_peer;
    table.zero = zero;
    table.sum = kv_cuda_sum;
    table.step = kv_cuda_step;
    table.squares = kv_cuda_squares;
    table.encode = kv_cuda_encode;
    table.decode = kv_cuda_decode;
    *api = table;
    return KV_DEVICE_OK;
}
