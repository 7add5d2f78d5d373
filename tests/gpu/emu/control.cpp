/* The frame of every call: the lock, the last error, failures asked for; devices and their numbers;
 * emu_control.h. */
#include "emu.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <pthread.h>
#include <unistd.h>

namespace emu
{

State &state = *new State{}; /* never destroyed: threads may outlive the module's end */

static std::mutex &lock = *new std::mutex;
static pid_t owner; /* the process that began; a forked child has no devices */
static uintptr_t last_handle = 0x100;

/* Not thread_local: the module's thread-local memory is that of kernels' shared arrays. */
static pthread_key_t thread_key()
{
    static pthread_key_t key = [] {
        pthread_key_t made;
        pthread_key_create(&made, [](void *thread) { delete (Thread *)thread; });
        return made;
    }();
    return key;
}

Thread &this_thread()
{
    Thread *thread = (Thread *)pthread_getspecific(thread_key());
    if (thread == nullptr) {
        thread = new Thread{};
        pthread_setspecific(thread_key(), thread);
    }
    if (thread->generation != state.generation)
        *thread = Thread{state.generation, 0, cudaSuccess, {}};
    return *thread;
}

uint64_t random64()
{
    uint64_t z = state.random += 0x9e3779b97f4a7c15u; /* SplitMix64 */
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

uint64_t random_below(uint64_t n)
{
    return random64() % n;
}

uintptr_t new_handle()
{
    return last_handle += 0x10;
}

cudaError_t mistake(cudaError_t error, const char *format, ...)
{
    char text[1024];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    state.mistakes++;
    state.report = text;
    fprintf(stderr, "emulated CUDA: %s\n", text);
    return error;
}

void kill_device(int device, cudaError_t error)
{
    if (state.devices[device].dead != cudaSuccess)
        return;
    state.devices[device].dead = error;
    spoil_device(device);
}

bool allocation_fails()
{
    int64_t n = ++state.allocations - state.fail_alloc_at;
    return state.fail_alloc_at > 0 && n >= 0 && n < state.fail_alloc_times;
}

static void reset(uint64_t seed, int devices, size_t bytes, bool peer)
{
    uint64_t generation = state.generation + 1;
    memory_reset(0, 0);
    state = State{};
    state.generation = generation;
    state.random = seed;
    state.peer = peer;
    state.bytes = bytes;
    state.copies_at_most = INT64_MAX;
    owner = getpid();
    memory_reset(std::clamp(devices, 0, (int)MAX_DEVICES), bytes);
    streams_reset((int)state.devices.size());
}

static uint64_t setting(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text != nullptr ? strtoull(text, nullptr, 0) : otherwise;
}

static void begin_locked()
{
    if (state.generation == 0)
        reset(setting("EMU_SEED", 0), (int)setting("EMU_DEVICES", 2),
              setting("EMU_BYTES", 64 << 20), setting("EMU_PEER", 1) != 0);
}

static cudaError_t call_locked(const char *name, Scope scope,
                               const std::function<cudaError_t()> &body)
{
    int64_t number = ++state.calls[name];
    auto failure = state.failures.find(name);
    if (failure != state.failures.end() && failure->second.at == number)
        return failure->second.error;
    if (scope == ON_CURRENT) {
        if (state.devices.empty())
            return cudaErrorNoDevice;
        cudaError_t dead = state.devices[this_thread().device].dead;
        if (dead != cudaSuccess)
            return dead;
    }
    return body();
}

cudaError_t call(const char *name, Scope scope, const std::function<cudaError_t()> &body)
{
    if (owner != 0 && owner != getpid())
        return cudaErrorInitializationError;
    std::lock_guard<std::mutex> guard(lock);
    begin_locked();
    cudaError_t error = call_locked(name, scope, body);
    close_all();
    if (error != cudaSuccess)
        this_thread().last = error;
    return error;
}

static cudaError_t check_device(int device)
{
    if (state.devices.empty())
        return cudaErrorNoDevice;
    return device >= 0 && device < (int)state.devices.size() ? cudaSuccess : cudaErrorInvalidDevice;
}

} // namespace emu

using namespace emu;

/* ------------------------------------------------------------------------------------- devices */

cudaError_t cudaGetDeviceCount(int *count)
{
    return call(__func__, ANYWHERE, [&] {
        *count = (int)state.devices.size();
        return *count > 0 ? cudaSuccess : cudaErrorNoDevice;
    });
}

cudaError_t cudaSetDevice(int device)
{
    return call(__func__, ANYWHERE, [&] {
        cudaError_t error = check_device(device);
        if (error == cudaSuccess)
            this_thread().device = device;
        return error;
    });
}

cudaError_t cudaGetDevice(int *device)
{
    return call(__func__, ANYWHERE, [&] {
        *device = this_thread().device;
        return state.devices.empty() ? cudaErrorNoDevice : cudaSuccess;
    });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *out, int device)
{
    return call(__func__, ANYWHERE, [&] {
        cudaError_t error = check_device(device);
        if (error != cudaSuccess)
            return error;
        memset(out, 0, sizeof *out);
        snprintf(out->name, sizeof out->name, "Emulated device %d", device);
        out->totalGlobalMem = state.bytes;
        out->multiProcessorCount = 2; /* few, so that kernels go round their loops */
        out->major = 9;
        return cudaSuccess;
    });
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device)
{
    return call(__func__, ANYWHERE, [&] {
        cudaError_t error = check_device(device);
        if (error != cudaSuccess)
            return error;
        switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock:
            *value = 1024;
            return cudaSuccess;
        case cudaDevAttrMultiProcessorCount:
            *value = 2;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor:
            *value = 9;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor:
            *value = 0;
            return cudaSuccess;
        case cudaDevAttrMemoryPoolsSupported:
            *value = 1;
            return cudaSuccess;
        }
        return cudaErrorInvalidValue;
    });
}

cudaError_t cudaDriverGetVersion(int *version)
{
    return call(__func__, ANYWHERE, [&] {
        *version = 13000;
        return cudaSuccess;
    });
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    return call(__func__, ANYWHERE, [&] {
        *version = 13000;
        return cudaSuccess;
    });
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer)
{
    return call(__func__, ANYWHERE, [&] {
        if (check_device(device) != cudaSuccess || check_device(peer) != cudaSuccess)
            return cudaErrorInvalidDevice;
        *can = state.peer && device != peer;
        return cudaSuccess;
    });
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags)
{
    return call(__func__, ON_CURRENT, [&] {
        int device = this_thread().device;
        if (check_device(peer) != cudaSuccess || peer == device)
            return cudaErrorInvalidDevice;
        if (flags != 0)
            return cudaErrorInvalidValue;
        if (!state.peer)
            return cudaErrorPeerAccessUnsupported;
        uint32_t &seen_by = state.devices[peer].arenas[PLAIN].seen_by;
        if (seen_by >> device & 1)
            return cudaErrorPeerAccessAlreadyEnabled;
        seen_by |= 1u << device;
        return cudaSuccess;
    });
}

/* -------------------------------------------------------------------------------------- errors */

static cudaError_t last_error(bool clear)
{
    if (owner != 0 && owner != getpid())
        return cudaErrorInitializationError;
    std::lock_guard<std::mutex> guard(lock);
    begin_locked();
    Thread &thread = this_thread();
    cudaError_t last = thread.last;
    if (!state.devices.empty() && state.devices[thread.device].dead != cudaSuccess)
        last = state.devices[thread.device].dead;
    if (clear)
        thread.last = cudaSuccess;
    return last;
}

cudaError_t cudaGetLastError(void)
{
    return last_error(true);
}

cudaError_t cudaPeekAtLastError(void)
{
    return last_error(false);
}

static const struct {
    cudaError_t error;
    const char *name, *text;
} errors[] = {
#define EMU_ROW(name, number, text) {name, #name, text},
    EMU_ERRORS(EMU_ROW)
#undef EMU_ROW
};

const char *cudaGetErrorName(cudaError_t error)
{
    for (const auto &row : errors)
        if (row.error == error)
            return row.name;
    return "unrecognized error code";
}

const char *cudaGetErrorString(cudaError_t error)
{
    for (const auto &row : errors)
        if (row.error == error)
            return row.text;
    return "unrecognized error code";
}

/* ------------------------------------------------------------------------------------- control */

void emu_reset(uint64_t seed, int devices, size_t bytes_per_device, int peer)
{
    std::lock_guard<std::mutex> guard(lock);
    reset(seed, devices, bytes_per_device, peer != 0);
}

void emu_seed(uint64_t seed)
{
    std::lock_guard<std::mutex> guard(lock);
    begin_locked();
    state.random = seed;
}

void emu_fail_alloc(int64_t n, int64_t times)
{
    std::lock_guard<std::mutex> guard(lock);
    begin_locked();
    state.fail_alloc_at = n > 0 ? state.allocations + n : 0;
    state.fail_alloc_times = times;
}

void emu_kill_device(int device, int64_t n)
{
    std::lock_guard<std::mutex> guard(lock);
    begin_locked();
    if (check_device(device) != cudaSuccess)
        return;
    if (n == 0)
        kill_device(device, cudaErrorIllegalAddress);
    else
        state.devices[device].kill_at = state.devices[device].launches + n;
    close_all();
}

void emu_fail_call(const char *name, int64_t n, int error)
{
    std::lock_guard<std::mutex> guard(lock);
    begin_locked();
    state.failures[name] = {state.calls[name] + n, (cudaError_t)error};
}

void emu_let_copies(int64_t n)
{
    std::lock_guard<std::mutex> guard(lock);
    begin_locked();
    state.copies_at_most = n < 0 ? INT64_MAX : state.copies + n;
}

void emu_run_all(void)
{
    std::lock_guard<std::mutex> guard(lock);
    begin_locked();
    while (step())
        ;
    close_all();
}

void emu_run_some(void)
{
    std::lock_guard<std::mutex> guard(lock);
    begin_locked();
    step_a_little();
    close_all();
}

static int64_t counter_locked(const std::string &name)
{
    int64_t count = 0;
    if (name == "mistakes")
        return state.mistakes;
    if (name == "copies")
        return state.copies;
    if (name == "live_events")
        return (int64_t)state.events.size();
    if (name == "live_streams")
        return (int64_t)state.handles.size();
    if (name == "live_pinned")
        return pinned_blocks();
    if (name == "launches") {
        for (const Device &device : state.devices)
            count += device.launches;
    } else if (name == "queued") {
        for (const Stream &stream : state.streams)
            count += (int64_t)stream.queue.size();
    } else if (name == "live_allocations" || name == "live_bytes") {
        for (const Device &device : state.devices)
            for (const Arena &arena : device.arenas)
                for (const auto &[address, block] : arena.blocks)
                    if (device.dead == cudaSuccess && !block.freed)
                        count += name == "live_bytes" ? (int64_t)block.bytes : 1;
    } else {
        auto found = state.calls.find(name);
        count = found != state.calls.end() ? found->second : 0;
    }
    return count;
}

int64_t emu_counter(const char *name)
{
    std::lock_guard<std::mutex> guard(lock);
    begin_locked();
    return counter_locked(name);
}

int emu_current_device(void)
{
    int device = 0;
    cudaGetDevice(&device);
    return device;
}

void emu_tell(const char *sentence)
{
    std::lock_guard<std::mutex> guard(lock);
    mistake(cudaErrorUnknown, "%s", sentence);
}

const char *emu_report(void)
{
    std::lock_guard<std::mutex> guard(lock);
    return state.report.c_str();
}
