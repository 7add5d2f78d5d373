/* What becomes of a group of devices that fails, is late, or is ended by somebody else. */
#include "gpu_nccl.h"

static bool told(kv_status_t status, const char *what)
{
    const char *message = kv_status_message(status);
    if (CHECK(strstr(message, what) != NULL))
        return true;
    printf("    \"%s\" has no \"%s\"\n", message, what);
    return false;
}

/* Nothing was put on the lanes, and nothing can be any more; a new group works. */
static void lost(const char *why)
{
    kv_status_t status = kv_nccl_sum(group, lanes, 1, &values[0].job, NULL);
    CHECK_STATUS(status, KV_DEVICE);
    told(status, why);
    told(status, "make a new one");
    status = kv_nccl_broadcast(group, lanes, 0, 1, &values[0].job, NULL);
    CHECK_STATUS(status, KV_DEVICE);
    status = kv_nccl_check(group);
    CHECK_STATUS(status, KV_DEVICE);
    told(status, why);
    kv_nccl_abort(group, "too late");
    CHECK_EQ(emu_nccl.counter("live"), 0);
    CHECK_EQ(emu_nccl.counter("aborted"), num_devices);
    group_free();
    if (!group_new())
        return;
    CHECK_STATUS(kv_nccl_sum(group, lanes, 1, &values[0].job, NULL), KV_OK);
    value_fetch(&values[0]);
    lanes_wait();
    value_right(&values[0], -1);
    group_free();
}

static void wrong_devices(void)
{
    if (!nccl_begin())
        return;
    const int twice[] = {1, 0, 1}, absent[] = {0, 9};
    CHECK_STATUS(kv_nccl_new(3, twice, NULL, &group), KV_INVALID);
    told(KV_INVALID, "device 1 is named twice");
    CHECK_STATUS(kv_nccl_new(2, absent, NULL, &group), KV_DEVICE);
    told(KV_DEVICE, "there is no device 9");
    CHECK_STATUS(kv_nccl_new(0, absent, NULL, &group), KV_INVALID);
    CHECK_STATUS(kv_nccl_id(&shared_id), KV_OK);
    CHECK_STATUS(kv_nccl_join(&shared_id, 2, 1, 2, all_devices, NULL, &group), KV_INVALID);
    CHECK_STATUS(kv_nccl_join(&shared_id, 2, -1, 1, all_devices, NULL, &group), KV_INVALID);
    kv_fault_set("alloc", 1);
    CHECK_STATUS(kv_nccl_new(2, all_devices, NULL, &group), KV_NO_MEMORY);
    kv_fault_set("alloc", 0);
    CHECK_EQ(emu_nccl.counter("inits"), 0);
    nccl_end();
}

static void devices_that_cannot_be_a_group_are_refused(void)
{
    each_seed_emulated(wrong_devices);
}

static void no_beginning(void)
{
    if (!nccl_begin())
        return;
    caller_t caller = caller_of(SECOND / 20);
    emu_nccl.fault("init never", 1);
    CHECK_STATUS(kv_nccl_new(num_devices, all_devices, &caller.base, &group), KV_TIMEOUT);
    told(KV_TIMEOUT, "NCCL could not begin on devices 0");
    CHECK(!caller.base.detached);
    caller = patient();
    caller.answer = KV_INTERRUPTED;
    emu_nccl.fault("init never", 1);
    CHECK_STATUS(kv_nccl_new(num_devices, all_devices, &caller.base, &group), KV_INTERRUPTED);
    CHECK_EQ(caller.polls, 1);
    emu_nccl.fault("init", 2);
    caller = patient();
    CHECK_STATUS(kv_nccl_new(num_devices, all_devices, &caller.base, &group), KV_DEVICE);
    told(KV_DEVICE, "unhandled system error");
    /* A rank of another process that does not come. */
    caller = caller_of(SECOND / 20);
    CHECK_STATUS(kv_nccl_id(&shared_id), KV_OK);
    CHECK_STATUS(kv_nccl_join(&shared_id, 2, 0, 1, all_devices, &caller.base, &group), KV_TIMEOUT);
    told(KV_TIMEOUT, "on device 0 within");
    told(KV_TIMEOUT, "are all ranks there?");
    CHECK_EQ(emu_nccl.counter("live"), 0);
    nccl_end();
}

static void a_group_that_does_not_begin_is_aborted(void)
{
    each_seed_emulated(no_beginning);
}

static void error_after_the_call(void)
{
    if (!nccl_begin() || !group_new())
        return;
    value_open(&values[0], KV_FLOAT32, 100, false);
    emu_nccl.fault("async", 1);
    kv_status_t status = kv_nccl_check(group);
    CHECK_STATUS(status, KV_DEVICE);
    told(status, "NCCL could not go on on devices 0");
    told(status, "the peer is gone");
    lost("the peer is gone");
    nccl_end();
}

static void an_error_that_comes_later_is_found(void)
{
    each_seed_emulated(error_after_the_call);
}

static void error_in_the_call(void)
{
    static const char *const faults[] = {"call", "put"};
    for (int i = 0; i < 2; i++) {
        if (!nccl_begin() || !group_new())
            return;
        value_open(&values[0], KV_INT32, 100, false);
        emu_nccl.fault(faults[i], 1);
        kv_status_t status = kv_nccl_sum(group, lanes, 1, &values[0].job, NULL);
        CHECK_STATUS(status, KV_DEVICE);
        told(status, "asked for");
        lost("asked for");
        nccl_end();
    }
}

static void an_error_in_a_call_ends_the_group(void)
{
    each_seed_emulated(error_in_the_call);
}

static void late(void)
{
    static const kv_status_t answers[] = {KV_TIMEOUT, KV_INTERRUPTED};
    for (int i = 0; i < 2; i++) {
        if (!nccl_begin() || !group_new())
            return;
        value_open(&values[0], KV_BFLOAT16, 100, true);
        caller_t caller = answers[i] == KV_TIMEOUT ? caller_of(SECOND / 20) : patient();
        caller.answer = answers[i] == KV_TIMEOUT ? KV_OK : answers[i];
        emu_nccl.fault("put never", 1);
        CHECK_STATUS(kv_nccl_sum(group, lanes, 1, &values[0].job, &caller.base), answers[i]);
        lost(i == 0 ? "NCCL could not sum on devices 0" : "interrupted");
        nccl_end();
    }
}

static void a_call_that_does_not_end_in_time_ends_the_group(void)
{
    each_seed_emulated(late);
}

static void *abort_inside(void *before)
{
    while (emu_nccl.counter("groups") == *(int64_t *)before)
        sched_yield();
    kv_nccl_abort(group, "worker 3 is lost");
    return NULL;
}

static void aborted_inside(void)
{
    pthread_t thread;
    if (!nccl_begin() || !group_new())
        return;
    value_open(&values[0], KV_FLOAT16, 100, false);
    int64_t before = emu_nccl.counter("groups");
    emu_nccl.fault("put never", 1);
    CHECK_EQ(pthread_create(&thread, NULL, abort_inside, &before), 0);
    caller_t caller = patient();
    kv_status_t status = kv_nccl_sum(group, lanes, 1, &values[0].job, &caller.base);
    CHECK_STATUS(status, KV_DEVICE);
    told(status, "worker 3 is lost");
    CHECK_EQ(pthread_join(thread, NULL), 0);
    lost("worker 3 is lost");
    nccl_end();
}

static void another_thread_ends_a_call(void)
{
    each_seed_emulated(aborted_inside);
}

static void *abort_outside(void *unused)
{
    kv_nccl_abort(group, "the deadline has passed");
    return unused;
}

static void aborted_on_devices(void)
{
    pthread_t thread;
    if (!nccl_begin() || !group_new())
        return;
    value_open(&values[0], KV_FLOAT32, 100, true);
    value_open(&values[1], KV_FLOAT32, 100, true);
    emu_nccl.fault("work never", 1);
    CHECK_STATUS(kv_nccl_sum(group, lanes, 1, &values[1].job, NULL), KV_OK);
    for (int i = 0; i < num_devices; i++)
        OK(api.event_record(i, lanes_[i].event, lanes[i].stream, sentence));
    for (int i = 0; i < 1000; i++) {
        bool done = true;
        OK(api.event_done(i % num_devices, lanes_[i % num_devices].event, &done, sentence));
        CHECK(!done);
    }
    CHECK_STATUS(kv_nccl_check(group), KV_OK);
    CHECK_EQ(pthread_create(&thread, NULL, abort_outside, NULL), 0);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    lost("the deadline has passed");
    for (int i = 0; i < num_devices; i++) {
        gpu_wait_event(i, lanes_[i].event);
        OK(api.free(i, lanes[i].stream, values[1].dst[i], sentence));
    }
    nccl_end();
}

static void an_abort_ends_what_the_devices_do(void)
{
    each_seed_emulated(aborted_on_devices);
}

static void free_that_waits(void)
{
    if (!nccl_begin() || !group_new())
        return;
    values_open();
    CHECK_STATUS(kv_nccl_sum(group, lanes, JOBS, jobs, NULL), KV_OK);
    group_free(); /* the work is done */
    values_check(-1);
    CHECK_EQ(emu_nccl.counter("aborted"), 0);
    if (!group_new())
        return;
    emu_nccl.fault("end never", 1);
    caller_t caller = caller_of(SECOND / 20);
    CHECK_STATUS(kv_nccl_free(group, &caller.base), KV_TIMEOUT);
    CHECK_EQ(emu_nccl.counter("aborted"), num_devices);
    CHECK_STATUS(kv_nccl_free(NULL, NULL), KV_OK);
    nccl_end();
}

static void a_group_ends_with_its_work_or_is_aborted(void)
{
    each_seed_emulated(free_that_waits);
}

static void call_again(void)
{
    CHECK_STATUS(kv_nccl_sum(group, lanes, 1, &values[0].job, NULL), KV_INVALID);
    CHECK_STATUS(kv_nccl_check(group), KV_INVALID);
    kv_nccl_abort(group, "the handler wants it");
}

static void called_from_a_poll(void)
{
    if (!nccl_begin() || !group_new())
        return;
    value_open(&values[0], KV_UINT8, 100, false);
    emu_nccl.fault("put never", 1);
    caller_t caller = patient();
    caller.act = call_again;
    CHECK_STATUS(kv_nccl_sum(group, lanes, 1, &values[0].job, &caller.base), KV_DEVICE);
    CHECK_EQ(caller.polls, 1);
    lost("the handler wants it");
    nccl_end();
}

static void a_signal_handler_does_not_wait_for_itself(void)
{
    each_seed_emulated(called_from_a_poll);
}

static const test_t tests[] = {
    TEST(devices_that_cannot_be_a_group_are_refused),
    TEST(a_group_that_does_not_begin_is_aborted),
    TEST(an_error_that_comes_later_is_found),
    TEST(an_error_in_a_call_ends_the_group),
    TEST(a_call_that_does_not_end_in_time_ends_the_group),
    TEST(another_thread_ends_a_call),
    TEST(an_abort_ends_what_the_devices_do),
    TEST(a_group_ends_with_its_work_or_is_aborted),
    TEST(a_signal_handler_does_not_wait_for_itself),
};
TEST_MAIN(tests)
