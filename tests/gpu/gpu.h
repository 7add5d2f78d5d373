/* What the tests of a plug-in for devices share: the plug-in that KVSTORE_CUDA_PLUGIN names, arrays
 * on a device with the same array beside them on the host, and the end of the work on a stream.
 *
 * The same programs run on the emulation (emu/) and on real devices. On the emulation every test
 * runs once for each seed below KVSTORE_CUDA_SEEDS, on new devices each time; nothing may be left
 * on them and no mistake may have been told.
 */
#ifndef KV_TESTS_GPU_GPU_H
#define KV_TESTS_GPU_GPU_H

#include "../c/test.h"

#include "emu/emu_control.h"
#include "kernels/device.h"
#include "kernels/kernels.h"
#include <dlfcn.h>
#include <math.h>
#include <stdlib.h>
#include <time.h>

enum {
    GPU_DEVICES = 2,
    GPU_BYTES = 64 << 20,
    GPU_SEEDS = 4,
    GPU_ARRAYS = 1 << 14,
    GPU_WAIT_S = 60
};

static kv_device_api_t api;
static char sentence[KV_DEVICE_SENTENCE];
static uint64_t gpu_random;
static void *gpu_stream, *gpu_event;  /* of device 0 */
static int gpu_devices = GPU_DEVICES; /* of the emulation */

/* The emulation's, all NULL on a real device. */
static struct {
    void (*reset)(uint64_t seed, int devices, size_t bytes_per_device, int peer);
    void (*fail_alloc)(int64_t n, int64_t times);
    void (*kill_device)(int device, int64_t n);
    void (*fail_call)(const char *name, int64_t n, int error);
    void (*run_all)(void);
    int64_t (*counter)(const char *name);
    const char *(*report)(void);
} emu;

static struct {
    void *library;
    kv_device_open_t *open;
    void *blocks[GPU_ARRAYS], *host[GPU_ARRAYS]; /* to be freed */
    int num_blocks, num_host;
} gpu;

/* The call succeeded; a sentence says why not. */
static inline bool gpu_ok(kv_device_code_t code, const char *text, const char *file, int line)
{
    if (!test_check(code == KV_DEVICE_OK, text, file, line))
        printf("    %d: %s\n", (int)code, sentence);
    return code == KV_DEVICE_OK;
}
#define OK(call) gpu_ok((call), "OK(" #call ")", __FILE__, __LINE__)

static inline void *gpu_symbol(const char *name)
{
    return dlsym(gpu.library, name);
}

static inline bool gpu_load(void)
{
    const char *path = getenv("KVSTORE_CUDA_PLUGIN");
    if (gpu.library != NULL)
        return true;
    gpu.library = path == NULL ? NULL : dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!CHECK(gpu.library != NULL)) {
        printf("    KVSTORE_CUDA_PLUGIN: %s\n", path == NULL ? "not set" : dlerror());
        return false;
    }
    gpu.open = (kv_device_open_t *)gpu_symbol(KV_DEVICE_ENTRY);
    emu.reset = (void (*)(uint64_t, int, size_t, int))gpu_symbol("emu_reset");
    emu.fail_alloc = (void (*)(int64_t, int64_t))gpu_symbol("emu_fail_alloc");
    emu.kill_device = (void (*)(int, int64_t))gpu_symbol("emu_kill_device");
    emu.fail_call = (void (*)(const char *, int64_t, int))gpu_symbol("emu_fail_call");
    emu.run_all = (void (*)(void))gpu_symbol("emu_run_all");
    emu.counter = (int64_t(*)(const char *))gpu_symbol("emu_counter");
    emu.report = (const char *(*)(void))gpu_symbol("emu_report");
    return CHECK(gpu.open != NULL);
}

static inline bool gpu_begin(uint64_t seed, int peer)
{
    gpu_random = seed;
    gpu.num_blocks = gpu.num_host = 0;
    if (!gpu_load())
        return false;
    if (emu.reset != NULL)
        emu.reset(seed, gpu_devices, GPU_BYTES, peer);
    return OK(gpu.open(KV_DEVICE_ABI, sizeof api, &api, sentence)) &&
           OK(api.stream_new(0, &gpu_stream, sentence)) &&
           OK(api.event_new(0, &gpu_event, sentence));
}

/* ------------------------------------------------------------------------------- the end of work
 */

/* Asks until the event has passed. */
static inline bool gpu_wait_event(int device, void *event)
{
    struct timespec now, start;
    bool done = false;
    clock_gettime(CLOCK_MONOTONIC, &start);
    while (OK(api.event_done(device, event, &done, sentence)) && !done) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (!CHECK(now.tv_sec - start.tv_sec < GPU_WAIT_S))
            return false;
    }
    return done;
}

/* Until all that was put on gpu_stream has run. */
static inline bool gpu_wait(void)
{
    return OK(api.event_record(0, gpu_event, gpu_stream, sentence)) && gpu_wait_event(0, gpu_event);
}

/* Waits, and frees all arrays. */
static inline void gpu_free_arrays(void)
{
    gpu_wait();
    for (int i = 0; i < gpu.num_blocks; i++)
        OK(api.free(0, gpu_stream, gpu.blocks[i], sentence));
    for (int i = 0; i < gpu.num_host; i++)
        free(gpu.host[i]);
    gpu.num_blocks = gpu.num_host = 0;
}

static inline void gpu_end(void)
{
    gpu_free_arrays();
    OK(api.event_free(0, gpu_event, sentence));
    OK(api.stream_free(0, gpu_stream, sentence));
    if (emu.reset == NULL)
        return;
    emu.run_all();
    CHECK_TEXT(emu.report(), "");
    CHECK_EQ(emu.counter("mistakes"), 0);
    CHECK_EQ(emu.counter("live_allocations"), 0);
    CHECK_EQ(emu.counter("live_pinned"), 0);
    CHECK_EQ(emu.counter("live_streams"), 0);
    CHECK_EQ(emu.counter("live_events"), 0);
}

/* Runs a test for all seeds, until one fails. */
static inline void gpu_each_seed(int peer, void (*body)(void))
{
    const char *text = getenv("KVSTORE_CUDA_SEEDS");
    int seeds = text != NULL ? atoi(text) : GPU_SEEDS;
    for (int seed = 0; seed < seeds && atomic_load(&test_failures) == 0; seed++) {
        if (!gpu_begin((uint64_t)seed, peer))
            return;
        body();
        if (atomic_load(&test_failures) == 0)
            gpu_end();
        if (atomic_load(&test_failures) != 0)
            printf("    with seed %d\n", seed);
        if (emu.reset == NULL)
            return;
    }
}

/* -------------------------------------------------------------------------------------- arrays */

/* An array on device 0; `host` began with the same content, and is what the array must be in the
 * end. Its memory on the host is aligned, that on the device where it was asked to be. */
typedef struct array {
    kv_dtype_t dtype;
    int64_t count;
    void *host, *device, *back;
    bool exact; /* the payloads of NaNs count as well */
} array_t;

/* Zeros, freed with the arrays. */
static inline void *host_new(int64_t bytes)
{
    void *memory = calloc(1, (size_t)bytes + 64);
    if (memory == NULL || gpu.num_host == GPU_ARRAYS)
        exit(2);
    return gpu.host[gpu.num_host++] = memory;
}

/* Memory of device 0, `shift` bytes behind an aligned address. */
static inline void *device_new(int64_t bytes, int64_t shift)
{
    void *memory = NULL;
    if (gpu.num_blocks == GPU_ARRAYS)
        exit(2);
    if (!OK(api.alloc(0, gpu_stream, bytes + shift + (bytes + shift == 0), &memory, sentence)))
        exit(2);
    gpu.blocks[gpu.num_blocks++] = memory;
    return (char *)memory + shift;
}

static inline int64_t array_bytes(const array_t *array)
{
    return array->count * (int64_t)kv_dtype_bytes(array->dtype);
}

/* Puts the host's content onto the device, as it is now. */
static inline void array_put(array_t *array)
{
    int64_t bytes = array_bytes(array);
    void *staging = memcpy(host_new(bytes), array->host, (size_t)bytes);
    OK(api.copy(0, gpu_stream, KV_DEVICE_TO_DEVICE, bytes, staging, array->device, sentence));
}

/* `values`: what it begins with, or NULL: zeros. */
static inline array_t array_of(kv_dtype_t dtype, int64_t count, const void *values, int64_t shift)
{
    array_t array = {.dtype = dtype, .count = count};
    int64_t bytes = array_bytes(&array);
    array.host = host_new(bytes);
    array.back = host_new(bytes);
    if (values != NULL)
        memcpy(array.host, values, (size_t)bytes);
    array.device = device_new(bytes, shift);
    array_put(&array);
    return array;
}

/* Gets the device's content, there after gpu_wait. */
static inline void array_fetch(array_t *array)
{
    OK(api.copy(0, gpu_stream, KV_DEVICE_TO_HOST, array_bytes(array), array->device, array->back,
                sentence));
}

static inline bool is_nan_at(kv_dtype_t dtype, const void *values, int64_t i)
{
    const uint16_t *halves = values;
    switch (dtype) {
    case KV_FLOAT64:
        return isnan(((const double *)values)[i]);
    case KV_FLOAT32:
        return isnan(((const float *)values)[i]);
    case KV_FLOAT16:
        return (halves[i] & 0x7fff) > 0x7c00;
    case KV_BFLOAT16:
        return (halves[i] & 0x7fff) > 0x7f80;
    default:
        return false;
    }
}

/* What was fetched is what is due, bit for bit; says which element is not. */
static inline bool array_same(const array_t *array, const char *what)
{
    int64_t bytes = (int64_t)kv_dtype_bytes(array->dtype);
    const char *due = array->host, *got = array->back;
    for (int64_t i = 0; i < array->count; i++) {
        if (memcmp(due + i * bytes, got + i * bytes, (size_t)bytes) == 0 ||
            (!array->exact && is_nan_at(array->dtype, due, i) && is_nan_at(array->dtype, got, i)))
            continue;
        uint64_t bits[2] = {0, 0};
        memcpy(&bits[0], got + i * bytes, (size_t)bytes);
        memcpy(&bits[1], due + i * bytes, (size_t)bytes);
        CHECK(!"the bits of the CPU");
        printf("    %s, element %" PRId64 " of %" PRId64 " of %s: %#" PRIx64 ", not %#" PRIx64 "\n",
               what, i, array->count, kv_dtype_name(array->dtype), bits[0], bits[1]);
        return false;
    }
    return true;
}

/* -------------------------------------------------------------------------------------- numbers */

static inline const kv_kernels_t *cpu(void)
{
    return kv_kernels_at(0);
}

static inline int64_t between(int64_t low, int64_t high)
{
    return test_between(&gpu_random, low, high);
}

/* From -1 to 1. */
static inline double number(void)
{
    return (double)(int64_t)(test_random(&gpu_random) >> 40) * 0x1p-23 - 1;
}

/* The bits of a number at the ends of the type: zeros, subnormal, the largest, infinite, NaN. */
static inline uint64_t odd_bits(kv_dtype_t dtype)
{
    int fraction = dtype == KV_FLOAT64   ? 52
                   : dtype == KV_FLOAT32 ? 23
                   : dtype == KV_FLOAT16 ? 10
                                         : 7;
    int exponent = dtype == KV_FLOAT64 ? 11 : dtype == KV_FLOAT16 ? 5 : 8;
    uint64_t all = (UINT64_C(1) << exponent) - 1, ones = (UINT64_C(1) << fraction) - 1;
    const uint64_t exponents[] = {0, 1, all - 1, all, test_random(&gpu_random) & all};
    const uint64_t fractions[] = {0, 1, ones, test_random(&gpu_random) & ones};
    return (uint64_t)between(0, 1) << (fraction + exponent) | exponents[between(0, 4)] << fraction |
           fractions[between(0, 3)];
}

/* `odd`: one of so many floating numbers is an odd one; 0: none. Of integers all are any. */
static inline void fill(kv_dtype_t dtype, int64_t count, int odd, void *to)
{
    size_t bytes = kv_dtype_bytes(dtype);
    for (int64_t i = 0; i < count; i++) {
        uint64_t bits = test_random(&gpu_random);
        double x = number();
        float single = (float)x;
        uint16_t half;
        if (kv_dtype_is_narrow(dtype))
            cpu()->float32_to[dtype](1, &single, &half);
        const void *from = !kv_dtype_is_floating(dtype) ? (void *)&bits
                           : dtype == KV_FLOAT64        ? (void *)&x
                           : dtype == KV_FLOAT32        ? (void *)&single
                                                        : (void *)&half;
        if (kv_dtype_is_floating(dtype) && odd != 0 && between(1, odd) == 1) {
            bits = odd_bits(dtype);
            from = &bits;
        }
        memcpy((char *)to + i * (int64_t)bytes, from, bytes);
    }
}

/* Bytes behind an aligned address: none, some elements, or any. */
static inline int64_t any_shift(kv_dtype_t dtype)
{
    int64_t bytes = (int64_t)kv_dtype_bytes(dtype), kind = between(0, 2);
    return kind == 0 ? 0 : kind == 1 ? between(1, 5) * bytes : between(1, 17);
}

static inline array_t array_random(kv_dtype_t dtype, int64_t count, int odd, int64_t shift)
{
    void *values = host_new(count * (int64_t)kv_dtype_bytes(dtype));
    fill(dtype, count, odd, values);
    return array_of(dtype, count, values, shift);
}

/* --------------------------------------------------------------------------------------- lanes */

enum { LANE_COUNT = 5000 };

/* Two devices or (a machine with one GPU) the same one twice. */
static inline int other_device(void)
{
    return api.num_devices > 1 ? 1 : 0;
}

/* A stream with two arrays on its device, the first of zeros. */
typedef struct lane {
    int device;
    void *stream, *event;
    float *memory, *summand;
} lane_t;

static inline bool lane_open(lane_t *lane, int device)
{
    void *memory = NULL, *summand = NULL;
    lane->device = device;
    bool open = OK(api.stream_new(device, &lane->stream, sentence)) &&
                OK(api.event_new(device, &lane->event, sentence)) &&
                OK(api.alloc(device, lane->stream, LANE_COUNT * 4, &memory, sentence)) &&
                OK(api.alloc(device, lane->stream, LANE_COUNT * 4, &summand, sentence)) &&
                OK(api.zero(device, lane->stream, LANE_COUNT * 4, memory, sentence));
    lane->memory = memory;
    lane->summand = summand;
    return open;
}

static inline void lane_close(lane_t *lane)
{
    OK(api.free(lane->device, lane->stream, lane->memory, sentence));
    OK(api.free(lane->device, lane->stream, lane->summand, sentence));
    OK(api.event_record(lane->device, lane->event, lane->stream, sentence));
    gpu_wait_event(lane->device, lane->event);
    OK(api.event_free(lane->device, lane->event, sentence));
    OK(api.stream_free(lane->device, lane->stream, sentence));
}

/* Sums on a device until one call fails, at most so many; its code. */
static inline kv_device_code_t sums_until(lane_t *lane, int most)
{
    kv_device_code_t code = KV_DEVICE_OK;
    const void *src[] = {lane->memory};
    void *dst[] = {lane->summand};
    kv_device_sum_t job = {LANE_COUNT, 1, 1, src, dst};
    for (int i = 0; i < most && code == KV_DEVICE_OK; i++) {
        bool done = false;
        code = api.sum(lane->device, lane->stream, KV_FLOAT32, KV_FLOAT32, 1, &job, sentence);
        if (code == KV_DEVICE_OK)
            code = api.event_record(lane->device, lane->event, lane->stream, sentence);
        while (code == KV_DEVICE_OK && !done)
            code = api.event_done(lane->device, lane->event, &done, sentence);
    }
    return code;
}

#endif
