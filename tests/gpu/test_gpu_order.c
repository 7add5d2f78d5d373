/* Streams, events, devices and threads of a plug-in: what waits for what, and what is told. */
#include "gpu.h"

#include <pthread.h>

enum { COUNT = LANE_COUNT, ROUNDS = 6, TOO_MANY_PEERS = 711 };

/* ------------------------------------------------------------------------------------- streams */

/* memory += summand, which comes from the host. A scratch array is freed as soon as it is used. */
static void lane_add(lane_t *lane, const float *values)
{
    void *scratch = NULL;
    const void *src[] = {lane->memory, lane->summand}, *sum;
    void *dst = lane->memory;
    OK(api.alloc(lane->device, lane->stream, COUNT * 4, &scratch, sentence));
    sum = scratch;
    kv_device_sum_t add = {COUNT, 2, 1, src, &scratch}, back = {COUNT, 1, 1, &sum, &dst};
    OK(api.copy(lane->device, lane->stream, KV_DEVICE_TO_DEVICE, COUNT * 4, values, lane->summand,
                sentence));
    OK(api.sum(lane->device, lane->stream, KV_FLOAT32, KV_FLOAT32, 1, &add, sentence));
    OK(api.sum(lane->device, lane->stream, KV_FLOAT32, KV_FLOAT32, 1, &back, sentence));
    OK(api.free(lane->device, lane->stream, scratch, sentence));
}

/* What one lane has goes to the other, which waits for it by an event, and back. */
static void handed_over(void)
{
    lane_t lanes[2];
    float *due = host_new(COUNT * 4), *got = host_new(COUNT * 4);
    bool direct = false;
    int other = other_device();
    if (!lane_open(&lanes[0], 0) || !lane_open(&lanes[1], other))
        return;
    OK(api.peer(0, other, &direct, sentence));
    OK(api.peer(other, 0, &direct, sentence));
    for (int round = 0; round < ROUNDS; round++) {
        lane_t *from = &lanes[round % 2], *to = &lanes[1 - round % 2];
        float *values = host_new(COUNT * 4);
        fill(KV_FLOAT32, COUNT, 0, values);
        lane_add(from, values);
        for (int i = 0; i < COUNT; i++)
            due[i] += values[i];
        OK(api.event_record(from->device, from->event, from->stream, sentence));
        OK(api.stream_wait(to->device, to->stream, from->event, sentence));
        if (from->device == to->device)
            OK(api.copy(to->device, to->stream, KV_DEVICE_WITHIN, COUNT * 4, from->memory,
                        to->memory, sentence));
        else
            OK(api.copy_peer(to->device, to->stream, COUNT * 4, from->device, from->memory,
                             to->device, to->memory, sentence));
        /* The next round writes there. */
        OK(api.event_record(to->device, to->event, to->stream, sentence));
        OK(api.stream_wait(from->device, from->stream, to->event, sentence));
    }
    lane_t *last = &lanes[ROUNDS % 2];
    OK(api.copy(last->device, last->stream, KV_DEVICE_TO_HOST, COUNT * 4, last->memory, got,
                sentence));
    OK(api.event_record(last->device, last->event, last->stream, sentence));
    gpu_wait_event(last->device, last->event);
    CHECK(memcmp(due, got, COUNT * 4) == 0);
    lane_close(&lanes[0]);
    lane_close(&lanes[1]);
}

static void streams_wait_for_events_of_other_devices(void)
{
    gpu_each_seed(1, handed_over);
    if (emu.reset != NULL)
        gpu_each_seed(0, handed_over);
}

/* A sum on one device of what lies in the pool of another. */
static void seen_from_another_device(void)
{
    bool direct = false;
    lane_t lane;
    float *values = host_new(COUNT * 4), *got = host_new(COUNT * 4);
    fill(KV_FLOAT32, COUNT, 0, values);
    if (other_device() == 0 || !lane_open(&lane, 1))
        return;
    array_t mine = array_of(KV_FLOAT32, COUNT, values, 0);
    const void *src[] = {mine.device};
    void *dst[] = {lane.memory};
    kv_device_sum_t job = {COUNT, 1, 1, src, dst};
    OK(api.peer(1, 0, &direct, sentence));
    OK(api.event_record(0, gpu_event, gpu_stream, sentence));
    OK(api.stream_wait(1, lane.stream, gpu_event, sentence));
    if (direct) {
        OK(api.sum(1, lane.stream, KV_FLOAT32, KV_FLOAT32, 1, &job, sentence));
        OK(api.copy(1, lane.stream, KV_DEVICE_TO_HOST, COUNT * 4, lane.memory, got, sentence));
    }
    OK(api.event_record(1, lane.event, lane.stream, sentence));
    gpu_wait_event(1, lane.event);
    CHECK(!direct || memcmp(values, got, COUNT * 4) == 0);
    CHECK(direct || emu.reset == NULL);
    if (emu.reset != NULL) { /* a way that is full is none, but no error */
        emu.fail_call("cudaDeviceEnablePeerAccess", 1, TOO_MANY_PEERS);
        OK(api.peer(0, 1, &direct, sentence));
        CHECK(!direct);
    }
    OK(api.peer(0, 0, &direct, sentence));
    CHECK(direct);
    lane_close(&lane);
}

static void a_peer_sees_the_memory_of_the_pool(void)
{
    gpu_each_seed(1, seen_from_another_device);
}

static void not_seen(void)
{
    bool direct = true;
    OK(api.peer(0, 1, &direct, sentence));
    CHECK(!direct);
}

static void without_peer_access_there_is_no_direct_way(void)
{
    if (gpu_load() && emu.reset != NULL)
        gpu_each_seed(0, not_seen);
}

/* ------------------------------------------------------------------------------------- devices */

static void told(void)
{
    kv_device_info_t info;
    int64_t before, after, total;
    int device = 7, on_stack = 0;
    void *pinned = NULL;
    array_t array = array_of(KV_FLOAT32, COUNT, NULL, 0);
    OK(api.info(0, &info, sentence));
    CHECK(info.name[0] != '\0' && info.bytes > 0 && info.processors > 0 && info.runtime > 0);
    OK(api.owner(array.device, &device, sentence));
    CHECK_EQ(device, 0);
    OK(api.owner(&on_stack, &device, sentence));
    CHECK_EQ(device, -1);
    OK(api.host_alloc(0, 64, &pinned, sentence));
    OK(api.owner(pinned, &device, sentence));
    CHECK_EQ(device, -1);
    OK(api.host_free(0, pinned, sentence));
    /* What is freed stays in the pool until that is trimmed. */
    gpu_free_arrays();
    gpu_wait();
    OK(api.memory(0, &before, &total, sentence));
    OK(api.trim(0, sentence));
    OK(api.memory(0, &after, &total, sentence));
    CHECK(after > before && after <= total);
}

static void devices_and_pointers_are_told(void)
{
    gpu_each_seed(1, told);
}

static void small_jobs(void)
{
    enum { JOBS = 1000, ELEMENTS = 3, LAUNCHES = JOBS / 60 + 1 };
    static array_t arrays[JOBS];
    static const void *src[JOBS];
    static void *dst[JOBS];
    static kv_device_sum_t jobs[JOBS];
    for (int i = 0; i < JOBS; i++) {
        arrays[i] = array_random(KV_FLOAT32, ELEMENTS, 0, 0);
        src[i] = dst[i] = arrays[i].device;
        jobs[i] = (kv_device_sum_t){i % 10 == 9 ? 0 : ELEMENTS, 1, 1, &src[i], &dst[i]};
    }
    int64_t before = emu.reset != NULL ? emu.counter("cudaLaunchKernel") : 0;
    OK(api.sum(0, gpu_stream, KV_FLOAT32, KV_FLOAT32, JOBS, jobs, sentence));
    if (emu.reset != NULL) {
        int64_t launches = emu.counter("cudaLaunchKernel") - before;
        CHECK(launches > 0 && launches <= LAUNCHES);
    }
    for (int i = 0; i < JOBS; i++)
        array_fetch(&arrays[i]);
    gpu_wait();
    for (int i = 0; i < JOBS; i++)
        array_same(&arrays[i], "a small sum");
}

static void many_small_arrays_share_launches(void)
{
    gpu_each_seed(1, small_jobs);
}

/* ------------------------------------------------------------------------------------- threads */

static void *sums_in_thread(void *lane)
{
    return sums_until(lane, 30) == KV_DEVICE_OK ? lane : NULL;
}

static void at_once(void)
{
    lane_t lanes[3];
    pthread_t threads[3];
    for (int i = 0; i < 3; i++)
        if (!lane_open(&lanes[i], i == 0 ? 0 : other_device()))
            return;
    for (int i = 0; i < 3; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, sums_in_thread, &lanes[i]), 0);
    for (int i = 0; i < 3; i++) {
        void *right = NULL;
        CHECK_EQ(pthread_join(threads[i], &right), 0);
        CHECK(right == &lanes[i]);
        lane_close(&lanes[i]);
    }
}

static void threads_may_call_at_once(void)
{
    gpu_each_seed(1, at_once);
}

static const test_t tests[] = {
    TEST(streams_wait_for_events_of_other_devices),   TEST(a_peer_sees_the_memory_of_the_pool),
    TEST(without_peer_access_there_is_no_direct_way), TEST(devices_and_pointers_are_told),
    TEST(many_small_arrays_share_launches),           TEST(threads_may_call_at_once),
};
TEST_MAIN(tests)
