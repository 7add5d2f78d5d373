/* The emulation's own rules: the mistakes that it is there to show are made here, by kernels of
 * this file, and must be shown. Linked with the emulation alone. Prints what did not hold.
 */
#include "cuda/gpu.h"
#include "emu_control.h"

#include <csignal>
#include <cstdio>
#include <cstring>
#include <sys/wait.h>
#include <unistd.h>

static int failures;

#define CHECK(expression)                                                                          \
    do {                                                                                           \
        if (!(expression)) {                                                                       \
            failures++;                                                                            \
            printf("%s:%d: %s; %s\n", __FILE__, __LINE__, #expression, emu_report());              \
        }                                                                                          \
    } while (0)

enum { SEEDS = 40, COUNT = 100, DEVICE_BYTES = 8 << 20 };

__global__ void write_at(float *to, int i, float x)
{
    to[i] = x;
}

__global__ void twice_and(float *to, float x)
{
    *to = *to * 2 + x;
}

__global__ void torn(float *to)
{
    if (threadIdx.x % 2 == 0)
        __syncthreads();
    to[threadIdx.x] = 1;
}

__global__ void apart(float *to)
{
    if (threadIdx.x % 2 == 0)
        __syncthreads();
    else
        __syncthreads();
    to[threadIdx.x] = 1;
}

__global__ void neighbours(float *to)
{
    __shared__ float shared[COUNT];
    shared[threadIdx.x] = (float)threadIdx.x;
    __syncthreads();
    to[threadIdx.x] = shared[(threadIdx.x + 1) % COUNT];
}

/* Two streams of device 0, and an array there that holds zeros. */
static cudaStream_t first, second;
static float *array;

static void begin(uint64_t seed, int peer = 1)
{
    emu_reset(seed, 2, DEVICE_BYTES, peer);
    CHECK(cudaSetDevice(0) == cudaSuccess);
    CHECK(cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking) == cudaSuccess);
    CHECK(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking) == cudaSuccess);
    CHECK(cudaMalloc(&array, COUNT * sizeof *array) == cudaSuccess);
    CHECK(cudaMemsetAsync(array, 0, COUNT * sizeof *array, first) == cudaSuccess);
    CHECK(cudaStreamSynchronize(first) == cudaSuccess);
}

static float element(int i)
{
    static float values[COUNT];
    CHECK(cudaMemcpyAsync(values, array, sizeof values, cudaMemcpyDeviceToHost, first) ==
          cudaSuccess);
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
    return values[i];
}

static void nothing_runs_before_it_must()
{
    begin(0);
    KV_LAUNCH((write_at), 1, 1, first, array, 3, 5);
    CHECK(cudaGetLastError() == cudaSuccess);
    CHECK(emu_counter("launches") == 0 && emu_counter("queued") == 1);
    CHECK(element(3) == 5);
    CHECK(emu_counter("launches") == 1 && emu_counter("queued") == 0);
}

/* What is ordered by nothing comes in any order, under some seed; by an event, in one. */
static void streams_are_ordered_by_events_alone()
{
    for (int ordered = 0; ordered < 2; ordered++) {
        bool seen[2] = {false, false};
        for (int seed = 0; seed < SEEDS; seed++) {
            cudaEvent_t event;
            begin((uint64_t)seed);
            CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming) == cudaSuccess);
            KV_LAUNCH((twice_and), 1, 1, first, array, 1);
            CHECK(cudaEventRecord(event, first) == cudaSuccess);
            if (ordered != 0)
                CHECK(cudaStreamWaitEvent(second, event) == cudaSuccess);
            KV_LAUNCH((twice_and), 1, 1, second, array, 10);
            CHECK(cudaDeviceSynchronize() == cudaSuccess);
            float value = element(0);
            CHECK(value == 12 || value == 21);
            seen[value == 21] = true;
        }
        CHECK(seen[0] && seen[1] == (ordered == 0));
    }
}

static void threads_come_together_at_barriers()
{
    begin(1);
    KV_LAUNCH((neighbours), 1, COUNT, first, array);
    CHECK(element(7) == 8 && element(COUNT - 1) == 0);
}

static void a_barrier_that_some_do_not_reach_is_an_error()
{
    void (*const kernels[])(float *) = {torn, apart};
    for (auto kernel : kernels) {
        begin(2);
        KV_LAUNCH((*kernel), 1, COUNT, first, array);
        CHECK(cudaStreamSynchronize(first) == cudaErrorLaunchFailure);
        CHECK(strstr(emu_report(), "barrier") != nullptr);
        /* And stays one; the other device lives. */
        CHECK(cudaMemsetAsync(array, 0, 4, first) == cudaErrorLaunchFailure);
        CHECK(cudaSetDevice(1) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess);
    }
}

/* Behind the block, far behind it, memory of the host, memory of another device. */
static void kernels_touch_nothing_but_blocks()
{
    float here = 0, *theirs;
    const int at[] = {COUNT, 1 << 20, 0, 0};
    for (int i = 0; i < 4; i++) {
        begin(3);
        CHECK(cudaSetDevice(1) == cudaSuccess && cudaMalloc(&theirs, 64) == cudaSuccess);
        CHECK(cudaSetDevice(0) == cudaSuccess);
        KV_LAUNCH((write_at), 1, 1, first, i == 2 ? &here : i == 3 ? theirs : array, at[i], 1);
        CHECK(cudaStreamSynchronize(first) == cudaErrorIllegalAddress);
        CHECK(emu_counter("mistakes") == 1);
    }
    begin(3);
    CHECK(cudaSetDevice(1) == cudaSuccess && cudaMalloc(&theirs, 64) == cudaSuccess);
    CHECK(cudaSetDevice(0) == cudaSuccess && cudaDeviceEnablePeerAccess(1, 0) == cudaSuccess);
    KV_LAUNCH((write_at), 1, 1, first, theirs, 0, 1);
    CHECK(cudaStreamSynchronize(first) == cudaSuccess);
    begin(3, 0);
    CHECK(cudaDeviceEnablePeerAccess(1, 0) == cudaErrorPeerAccessUnsupported);
}

static void freed_memory_is_spoilt_in_the_order_of_its_stream()
{
    float *block, value;
    begin(4);
    CHECK(cudaMallocAsync(&block, 4, first) == cudaSuccess);
    KV_LAUNCH((write_at), 1, 1, first, block, 0, 6);
    CHECK(cudaMemcpyAsync(array, block, 4, cudaMemcpyDeviceToDevice, first) == cudaSuccess);
    CHECK(cudaFreeAsync(block, first) == cudaSuccess);
    CHECK(element(0) == 6);
    CHECK(cudaMemcpyAsync(&value, block, 4, cudaMemcpyDeviceToHost, first) ==
          cudaErrorInvalidValue);
    CHECK(cudaFreeAsync(block, first) == cudaErrorInvalidValue);
    CHECK(cudaMallocAsync(&block, 4, first) == cudaSuccess);
    CHECK(cudaMemcpyAsync(&value, block, 4, cudaMemcpyDeviceToHost, first) == cudaSuccess);
    CHECK(cudaStreamSynchronize(first) == cudaSuccess);
    CHECK(value != value); /* nobody has written there */
}

static void streams_and_events_belong_to_devices()
{
    cudaEvent_t event;
    begin(5);
    CHECK(cudaSetDevice(1) == cudaSuccess);
    KV_LAUNCH((write_at), 1, 1, first, array, 0, 1);
    CHECK(cudaGetLastError() == cudaErrorInvalidResourceHandle);
    CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming) == cudaSuccess);
    CHECK(cudaEventRecord(event, first) == cudaErrorInvalidResourceHandle);
    CHECK(cudaEventDestroy(event) == cudaSuccess);
    CHECK(cudaEventQuery(event) == cudaErrorInvalidResourceHandle);
    CHECK(emu_counter("mistakes") == 3);
}

static void the_host_may_not_touch_a_device()
{
    begin(6);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        volatile float value = array[0];
        _exit(value == 0 ? 0 : 1);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
    /* A forked child has no devices. */
    child = fork();
    if (child == 0)
        _exit(cudaStreamSynchronize(first) == cudaErrorInitializationError ? 0 : 1);
    CHECK(waitpid(child, &status, 0) == child && status == 0);
}

static void an_error_stays_until_it_is_asked_for()
{
    begin(7);
    CHECK(cudaSetDevice(99) == cudaErrorInvalidDevice);
    CHECK(cudaPeekAtLastError() == cudaErrorInvalidDevice);
    CHECK(cudaGetLastError() == cudaErrorInvalidDevice && cudaGetLastError() == cudaSuccess);
}

int main()
{
    nothing_runs_before_it_must();
    streams_are_ordered_by_events_alone();
    threads_come_together_at_barriers();
    a_barrier_that_some_do_not_reach_is_an_error();
    kernels_touch_nothing_but_blocks();
    freed_memory_is_spoilt_in_the_order_of_its_stream();
    streams_and_events_belong_to_devices();
    the_host_may_not_touch_a_device();
    an_error_stays_until_it_is_asked_for();
    return failures > 0;
}
