/* What the tests of groups by NCCL share: callers, a group over all devices with a lane for each,
 * values for its calls. On the emulation NCCL is emu_nccl.cpp, which KVSTORE_NCCL names. */
#ifndef KV_TESTS_GPU_NCCL_H
#define KV_TESTS_GPU_NCCL_H

#include "gpu.h"

#include "comm/nccl.h"
#include "emu_nccl.h"
#include <pthread.h>

enum { MOST = 3, JOBS = 32, SECOND = 1000000000 };

/* The stand-in's, NULL on a real device. */
static struct {
    void (*reset)(uint64_t seed);
    void (*fault)(const char *what, int64_t n);
    int64_t (*counter)(const char *what);
} emu_nccl;

/* ------------------------------------------------------------------------------------- callers */

typedef struct caller {
    kv_caller_t base;
    kv_status_t answer; /* of its polls */
    void (*act)(void);  /* in a poll, once */
    int polls;
} caller_t;

static inline void nothing(kv_caller_t *caller)
{
    (void)caller;
}

static inline kv_status_t poll_caller(kv_caller_t *base)
{
    caller_t *caller = (caller_t *)base;
    void (*act)(void) = caller->act;
    caller->act = NULL;
    caller->polls++;
    CHECK(base->detached);
    if (act != NULL)
        act();
    return caller->answer;
}

static inline caller_t caller_of(int64_t timeout_ns)
{
    return (caller_t){.base = {nothing, nothing, poll_caller, .timeout_ns = timeout_ns}};
}

static inline caller_t patient(void)
{
    return caller_of(INT64_C(60) * SECOND);
}

/* -------------------------------------------------------------------------------------- groups */

static int num_devices;
static const int all_devices[MOST] = {0, 1, 2};
static lane_t lanes_[MOST];
static kv_lane_t lanes[MOST];
static kv_nccl_t *group;
static kv_nccl_id_t shared_id;

static inline bool nccl_begin(void)
{
    const char *file = NULL;
    int version = 0;
    num_devices = api.num_devices < MOST ? api.num_devices : MOST;
    kv_status_t status = kv_nccl_load(NULL, &file, &version);
    if (status == KV_NOT_BUILT && emu.reset == NULL) {
        printf("    not tested: %s\n", kv_status_message(status));
        return false;
    }
    if (!CHECK_STATUS(status, KV_OK) || !CHECK(version >= 21800 && file[0] == '/'))
        return false;
    if (emu.reset != NULL && emu_nccl.reset == NULL) {
        void *library = dlopen(file, RTLD_NOW | RTLD_NOLOAD);
        emu_nccl.reset = (void (*)(uint64_t))dlsym(library, "emu_nccl_reset");
        emu_nccl.fault = (void (*)(const char *, int64_t))dlsym(library, "emu_nccl_fault");
        emu_nccl.counter = (int64_t(*)(const char *))dlsym(library, "emu_nccl_counter");
        if (!CHECK(emu_nccl.reset != NULL && emu_nccl.fault != NULL && emu_nccl.counter != NULL))
            return false;
    }
    if (emu_nccl.reset != NULL)
        emu_nccl.reset(gpu_random);
    for (int i = 0; i < num_devices; i++) {
        if (!lane_open(&lanes_[i], i))
            return false;
        lanes[i] = (kv_lane_t){.device = i, .stream = lanes_[i].stream};
    }
    return true;
}

static inline void nccl_end(void)
{
    for (int i = 0; i < num_devices; i++)
        lane_close(&lanes_[i]);
    if (emu_nccl.reset != NULL)
        CHECK_EQ(emu_nccl.counter("live"), 0);
}

static inline bool group_new(void)
{
    caller_t caller = patient();
    return CHECK_STATUS(kv_nccl_new(num_devices, all_devices, &caller.base, &group), KV_OK);
}

static inline void group_free(void)
{
    caller_t caller = patient();
    CHECK_STATUS(kv_nccl_free(group, &caller.base), KV_OK);
}

/* With two devices and with three. */
static inline void each_seed(void (*body)(void))
{
    for (gpu_devices = 2; gpu_devices <= MOST; gpu_devices++) {
        gpu_each_seed(1, body);
        if (!gpu_load() || emu.reset == NULL)
            return;
    }
}

/* On the emulation only. */
static inline void each_seed_emulated(void (*body)(void))
{
    if (gpu_load() && emu.reset != NULL)
        each_seed(body);
}

/* ---------------------------------------------------------------------------------------- jobs */

typedef struct value {
    kv_nccl_job_t job;
    double *numbers[MOST]; /* of each device */
    const void *src[MOST];
    void *dst[MOST], *back[MOST];
} value_t;

static inline void encode(kv_dtype_t dtype, double number, void *to)
{
    float single = (float)number;
    int64_t whole = (int64_t)number;
    uint16_t half = 0;
    if (kv_dtype_is_narrow(dtype))
        cpu()->float32_to[dtype](1, &single, &half);
    const void *from = !kv_dtype_is_floating(dtype) ? (void *)&whole
                       : dtype == KV_FLOAT64        ? (void *)&number
                       : dtype == KV_FLOAT32        ? (void *)&single
                                                    : (void *)&half;
    memcpy(to, from, kv_dtype_bytes(dtype));
}

static inline size_t bytes_of(const value_t *value)
{
    return (size_t)value->job.count * kv_dtype_bytes(value->job.dtype);
}

/* Numbers from 0 to 20, or to 5 in quarters: all sums are exact in all types. */
static inline void value_open(value_t *value, kv_dtype_t dtype, int64_t count, bool in_place)
{
    value->job = (kv_nccl_job_t){dtype, count, value->src, value->dst};
    int64_t bytes = (int64_t)bytes_of(value);
    for (int i = 0; i < num_devices; i++) {
        void *src = NULL;
        char *host = host_new(bytes);
        value->back[i] = host_new(bytes);
        value->numbers[i] = host_new(count * (int64_t)sizeof(double));
        for (int64_t k = 0; k < count; k++) {
            value->numbers[i][k] = (double)between(0, 20) / (kv_dtype_is_floating(dtype) ? 4 : 1);
            encode(dtype, value->numbers[i][k], host + k * (int64_t)kv_dtype_bytes(dtype));
        }
        OK(api.alloc(i, lanes[i].stream, bytes + 1, &src, sentence));
        value->src[i] = value->dst[i] = src;
        if (!in_place)
            OK(api.alloc(i, lanes[i].stream, bytes + 1, &value->dst[i], sentence));
        OK(api.copy(i, lanes[i].stream, KV_DEVICE_TO_DEVICE, bytes, host, src, sentence));
    }
}

/* Spoils what it came from, fetches, frees: all behind what was put on the lanes. */
static inline void value_fetch(value_t *value)
{
    int64_t bytes = (int64_t)bytes_of(value);
    for (int i = 0; i < num_devices; i++) {
        void *src = (void *)value->src[i], *stream = lanes[i].stream;
        if (src != value->dst[i]) {
            OK(api.zero(i, stream, bytes, src, sentence));
            OK(api.free(i, stream, src, sentence));
        }
        OK(api.copy(i, stream, KV_DEVICE_TO_HOST, bytes, value->dst[i], value->back[i], sentence));
        OK(api.free(i, stream, value->dst[i], sentence));
    }
}

static inline void lanes_wait(void)
{
    for (int i = 0; i < num_devices; i++) {
        OK(api.event_record(i, lanes_[i].event, lanes[i].stream, sentence));
        gpu_wait_event(i, lanes_[i].event);
    }
}

/* `root` < 0: the sum. */
static inline bool value_right(const value_t *value, int root)
{
    kv_dtype_t dtype = value->job.dtype;
    size_t bytes = kv_dtype_bytes(dtype);
    for (int64_t i = 0; i < value->job.count; i++) {
        char due[8];
        double number = root >= 0 ? value->numbers[root][i] : 0;
        for (int j = 0; j < num_devices && root < 0; j++)
            number += value->numbers[j][i];
        encode(dtype, number, due);
        for (int j = 0; j < num_devices; j++) {
            if (memcmp((const char *)value->back[j] + (size_t)i * bytes, due, bytes) == 0)
                continue;
            CHECK(!"the number that is due");
            printf("    device %d of %d, element %" PRId64 " of %" PRId64 " of %s: not %g\n", j,
                   num_devices, i, value->job.count, kv_dtype_name(dtype), number);
            return false;
        }
    }
    return true;
}

static value_t values[JOBS];
static kv_nccl_job_t jobs[JOBS];

/* All types, several sizes, every other in place. */
static inline void values_open(void)
{
    static const int64_t counts[] = {1, 7, 1000, 4099};
    for (int i = 0; i < JOBS; i++) {
        value_open(&values[i], (kv_dtype_t)(i % KV_DTYPE_COUNT), counts[i / KV_DTYPE_COUNT],
                   i % 2 == 0);
        jobs[i] = values[i].job;
    }
}

static inline void values_check(int root)
{
    for (int i = 0; i < JOBS; i++)
        value_fetch(&values[i]);
    lanes_wait();
    for (int i = 0; i < JOBS && value_right(&values[i], root); i++)
        continue;
}

#endif
