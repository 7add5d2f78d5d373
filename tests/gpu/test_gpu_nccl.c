/* Sums and broadcasts between devices by NCCL, in the order of their lanes. */
#include "gpu_nccl.h"

#include <sys/wait.h>
#include <unistd.h>

/* ---------------------------------------------------------------------------------------- sums */

static void sum_all(void)
{
    if (!nccl_begin() || !group_new())
        return;
    values_open();
    caller_t caller = patient();
    int64_t before = emu_nccl.reset != NULL ? emu_nccl.counter("groups") : 0;
    CHECK_STATUS(kv_nccl_sum(group, lanes, JOBS, jobs, &caller.base), KV_OK);
    values_check(-1);
    if (emu_nccl.reset != NULL)
        CHECK_EQ(emu_nccl.counter("groups") - before, 1);
    CHECK_STATUS(kv_nccl_check(group), KV_OK);
    kv_nccl_job_t none = {KV_FLOAT32, 0, NULL, NULL};
    CHECK_STATUS(kv_nccl_sum(group, lanes, 1, &none, NULL), KV_OK);
    CHECK_STATUS(kv_nccl_sum(group, lanes, 0, NULL, NULL), KV_OK);
    group_free();
    nccl_end();
}

static void lists_of_all_types_are_summed_in_one_group(void)
{
    each_seed(sum_all);
}

static void broadcast_all(void)
{
    if (!nccl_begin() || !group_new())
        return;
    for (int root = 0; root < num_devices; root++) {
        values_open();
        caller_t caller = patient();
        CHECK_STATUS(kv_nccl_broadcast(group, lanes, root, JOBS, jobs, &caller.base), KV_OK);
        values_check(root);
    }
    CHECK_STATUS(kv_nccl_broadcast(group, lanes, num_devices, JOBS, jobs, NULL), KV_INVALID);
    CHECK_STATUS(kv_nccl_check(group), KV_OK);
    group_free();
    nccl_end();
}

static void one_device_gives_its_values_to_all(void)
{
    each_seed(broadcast_all);
}

static void *sum_in_thread(void *argument)
{
    value_t *value = argument;
    caller_t caller = patient();
    kv_status_t status = KV_OK;
    for (int i = 0; i < 20 && status == KV_OK; i++)
        status = kv_nccl_sum(group, lanes, 1, &value->job, &caller.base);
    return status == KV_OK ? argument : NULL;
}

static void sums_at_once(void)
{
    enum { THREADS = 4 };
    pthread_t threads[THREADS];
    if (!nccl_begin() || !group_new())
        return;
    for (int i = 0; i < THREADS; i++)
        value_open(&values[i], KV_FLOAT32, 500 + i, false);
    for (int i = 0; i < THREADS; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, sum_in_thread, &values[i]), 0);
    for (int i = 0; i < THREADS; i++) {
        void *right = NULL;
        CHECK_EQ(pthread_join(threads[i], &right), 0);
        CHECK(right == &values[i]);
    }
    for (int i = 0; i < THREADS; i++)
        value_fetch(&values[i]);
    lanes_wait();
    for (int i = 0; i < THREADS && value_right(&values[i], -1); i++)
        continue;
    group_free();
    nccl_end();
}

static void threads_enter_one_after_the_other(void)
{
    each_seed(sums_at_once);
}

/* As two processes: each has a device, a thread, and a group of its own. */

static void *work_as_rank(void *argument)
{
    int rank = (int)((const lane_t *)argument - lanes_);
    kv_nccl_t *own = NULL;
    caller_t caller = patient();
    bool right = kv_nccl_join(&shared_id, num_devices, rank, 1, &all_devices[rank], &caller.base,
                              &own) == KV_OK;
    for (int i = 0; i < 2 && right; i++) {
        value_t *value = &values[i];
        kv_nccl_job_t job = {value->job.dtype, value->job.count, &value->src[rank],
                             &value->dst[rank]};
        right = (i == 0 ? kv_nccl_sum(own, &lanes[rank], 1, &job, &caller.base)
                        : kv_nccl_broadcast(own, &lanes[rank], 1, 1, &job, &caller.base)) == KV_OK;
    }
    right = kv_nccl_free(own, &caller.base) == KV_OK && right;
    return right ? argument : NULL;
}

static void joined(void)
{
    pthread_t threads[MOST];
    if (!nccl_begin() || num_devices < 2)
        return;
    for (int i = 0; i < 2; i++)
        value_open(&values[i], KV_FLOAT64, 300, false);
    CHECK_STATUS(kv_nccl_id(&shared_id), KV_OK);
    for (int i = 0; i < num_devices; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, work_as_rank, &lanes_[i]), 0);
    for (int i = 0; i < num_devices; i++) {
        void *right = NULL;
        CHECK_EQ(pthread_join(threads[i], &right), 0);
        CHECK(right == &lanes_[i]);
    }
    for (int i = 0; i < 2; i++)
        value_fetch(&values[i]);
    lanes_wait();
    value_right(&values[0], -1);
    value_right(&values[1], 1);
    nccl_end();
}

static void ranks_join_by_an_id(void)
{
    each_seed(joined);
}

/* --------------------------------------------------------------------------------------- forks */

static void forked(void)
{
    if (!nccl_begin() || !group_new())
        return;
    pid_t child = fork();
    if (child == 0) {
        bool refused = kv_nccl_check(group) == KV_DEVICE &&
                       strstr(kv_status_message(KV_DEVICE), "spawn") != NULL &&
                       kv_nccl_sum(group, lanes, 0, NULL, NULL) == KV_DEVICE;
        kv_nccl_abort(group, "not mine");
        _exit(refused && kv_nccl_free(group, NULL) == KV_OK ? 0 : 1);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK_EQ(status, 0);
    CHECK_STATUS(kv_nccl_check(group), KV_OK);
    group_free();
    nccl_end();
}

static void a_forked_child_leaves_the_group_alone(void)
{
    each_seed(forked);
}

static const test_t tests[] = {
    TEST(lists_of_all_types_are_summed_in_one_group), TEST(one_device_gives_its_values_to_all),
    TEST(threads_enter_one_after_the_other),          TEST(ranks_join_by_an_id),
    TEST(a_forked_child_leaves_the_group_alone),
};
TEST_MAIN(tests)
