/* Tasks that begin in the engine and end elsewhere, and variables that are given back early. */
#include "engine_jobs.h"

/* A job whose `start` hands it to the test, which ends it. */
static _Atomic(kv_op_t *) started;

static void start(kv_op_t *op)
{
    atomic_store(&started, op);
}

static void end_now(kv_op_t *op)
{
    kv_engine_end(((job_t *)op)->context, op, KV_OK, NULL, 0);
}

static job_t *begun_job(kv_engine_t *engine, void (*fn)(kv_op_t *op), kv_var_t *a, kv_var_t *b,
                        kv_handle_t *handle)
{
    job_t *job = job_new(0, NULL);
    job->context = engine;
    job->deps[0] = (kv_dep_t){.var = a, .access = KV_WRITE};
    job->deps[1] = (kv_dep_t){.var = b, .access = KV_WRITE};
    kv_op_init(&job->op, job->deps, b != NULL ? 2 : a != NULL ? 1 : 0, 0);
    job->op.start = fn;
    job->op.finish = job_finish;
    job->op.handle = handle != NULL ? kv_handle_hold(handle) : NULL;
    return job;
}

/* The stepping engine starts tasks only in a thread that waits: this one waits until there is one.
 */
static void start_pending(kv_engine_t *engine)
{
    test_caller_t caller = make_caller(1);
    while (atomic_load(&started) == NULL) {
        kv_status_t status = kv_engine_wait_all(engine, &caller.base);
        CHECK(status == KV_TIMEOUT);
        caller = make_caller(1);
    }
}

ON_EACH_ENGINE(a_begun_task_holds_its_variables_until_it_ends)
{
    kv_var_t var;
    job_log_t log = {0};
    kv_handle_t *handle;
    kv_var_init(&var, false, NULL, NULL);
    atomic_store(&started, NULL);
    CHECK_STATUS(kv_handle_new(engine, 1, &handle), KV_OK);
    CHECK_STATUS(kv_engine_submit(engine, &begun_job(engine, start, &var, NULL, handle)->op),
                 KV_OK);
    submit_log(engine, 0, &log, &var, KV_WRITE, NULL);
    start_pending(engine);
    CHECK(!kv_handle_done(handle));
    CHECK_EQ(kv_engine_pending(engine), 2);
    CHECK_EQ(atomic_load(&log.count), 0);
    kv_engine_end(engine, atomic_load(&started), KV_OK, NULL, 0);
    CHECK(kv_handle_done(handle));
    CHECK_STATUS(wait_all(engine), KV_OK);
    check_log(&log, 1);
    kv_handle_rele(handle);
}

ON_EACH_ENGINE(a_task_may_end_inside_its_start)
{
    kv_var_t var;
    kv_var_init(&var, false, NULL, NULL);
    for (int i = 0; i < 20; i++)
        CHECK_STATUS(kv_engine_submit(engine, &begun_job(engine, end_now, &var, NULL, NULL)->op),
                     KV_OK);
    CHECK_STATUS(wait_all(engine), KV_OK);
    CHECK_EQ(atomic_load(&var.state), 0);
}

ON_EACH_ENGINE(variables_given_back_early_go_to_the_next)
{
    kv_var_t kept, given;
    job_log_t log = {0};
    kv_var_init(&kept, false, NULL, NULL);
    kv_var_init(&given, false, NULL, NULL);
    atomic_store(&started, NULL);
    CHECK_STATUS(kv_engine_submit(engine, &begun_job(engine, start, &kept, &given, NULL)->op),
                 KV_OK);
    start_pending(engine);
    kv_op_t *op = atomic_load(&started);
    submit_log(engine, 0, &log, &given, KV_WRITE, NULL);
    kv_engine_give_back(engine, op, 1);
    CHECK_STATUS(touch(engine, &given, KV_WRITE), KV_OK);
    check_log(&log, 1);
    kv_dep_t dep = {.var = &kept, .access = KV_READ};
    kv_op_t other;
    kv_op_init(&other, &dep, 1, 0);
    CHECK(!kv_engine_try_enter(engine, &other));
    kv_engine_give_back(engine, op, 1);
    kv_engine_end(engine, op, KV_OK, NULL, 0);
    CHECK_STATUS(touch(engine, &kept, KV_WRITE), KV_OK);
    CHECK_STATUS(wait_all(engine), KV_OK);
}

ON_EACH_ENGINE(a_task_begun_by_its_caller_is_pending_until_it_ends)
{
    kv_var_t var;
    kv_var_init(&var, false, NULL, NULL);
    job_t *job = begun_job(engine, NULL, &var, NULL, NULL);
    CHECK(kv_engine_try_enter(engine, &job->op));
    CHECK_STATUS(kv_engine_begin(engine, &job->op), KV_OK);
    test_caller_t hasty = make_caller(1);
    CHECK_STATUS(kv_engine_wait_all(engine, &hasty.base), KV_TIMEOUT);
    CHECK_EQ(kv_engine_pending(engine), 1);
    kv_engine_end(engine, &job->op, KV_OK, NULL, 0);
    CHECK_STATUS(wait_all(engine), KV_OK);
    CHECK_EQ(atomic_load(&var.state), 0);
}

ON_EACH_ENGINE(an_error_at_the_end_stands_on_handle_variables_and_those_named)
{
    kv_var_t var, also;
    kv_handle_t *handle;
    kv_var_init(&var, true, NULL, NULL);
    kv_var_init(&also, false, NULL, NULL);
    kv_var_t *named[] = {&also};
    CHECK_STATUS(kv_handle_new(engine, 1, &handle), KV_OK);
    job_t *job = begun_job(engine, NULL, &var, NULL, handle);
    CHECK(kv_engine_try_enter(engine, &job->op));
    CHECK_STATUS(kv_engine_begin(engine, &job->op), KV_OK);
    kv_engine_end(engine, &job->op, kv_fail(KV_DEVICE, "it broke"), named, 1);
    CHECK(kv_handle_done(handle));
    CHECK_TEXT(kv_handle_peek(handle)->message, "it broke");
    CHECK_STATUS(touch(engine, &also, KV_WRITE), KV_DEVICE);
    CHECK_STATUS(touch(engine, &also, KV_WRITE), KV_OK);
    CHECK_STATUS(wait_all(engine), KV_OK);
    CHECK_STATUS(touch(engine, &var, KV_OVERWRITE), KV_OK);
    kv_handle_rele(handle);
}

/* ------------------------------------------------------------------------- other threads */

enum { NUM_TASKS = 2000 };

typedef struct mailbox {
    kv_engine_t *engine;
    _Atomic(kv_op_t *) slots[NUM_TASKS];
    _Atomic int posted;
} mailbox_t;

static mailbox_t mailbox;

static void post(kv_op_t *op)
{
    int place = atomic_fetch_add(&mailbox.posted, 1);
    atomic_store(&mailbox.slots[place], op);
}

static void *end_those_posted(void *context)
{
    (void)context;
    for (int i = 0; i < NUM_TASKS; i++) {
        WAIT_UNTIL(atomic_load(&mailbox.slots[i]) != NULL);
        kv_op_t *op = atomic_load(&mailbox.slots[i]);
        if (op == NULL)
            return NULL;
        kv_engine_give_back(mailbox.engine, op, i % 2);
        kv_engine_end(mailbox.engine, op, KV_OK, NULL, 0);
    }
    return NULL;
}

static void ends_in_another_thread_lose_nothing(void)
{
    kv_engine_t *engine = engine_start("threaded", 2);
    kv_var_t vars[3];
    kv_thread_t thread;
    memset(&mailbox, 0, sizeof mailbox);
    mailbox.engine = engine;
    for (int i = 0; i < 3; i++)
        kv_var_init(&vars[i], false, NULL, NULL);
    CHECK_STATUS(kv_thread_start(&thread, "ends", end_those_posted, NULL), KV_OK);
    for (int i = 0; i < NUM_TASKS; i++) {
        job_t *job = begun_job(engine, post, &vars[i % 3], &vars[(i + 1) % 3], NULL);
        CHECK_STATUS(kv_engine_submit(engine, &job->op), KV_OK);
    }
    CHECK_STATUS(wait_all(engine), KV_OK);
    kv_thread_join(thread);
    for (int i = 0; i < 3; i++)
        CHECK_EQ(atomic_load(&vars[i].state), 0);
    engine_end(engine);
}

static const test_t tests[] = {
    TEST(a_begun_task_holds_its_variables_until_it_ends),
    TEST(a_task_may_end_inside_its_start),
    TEST(variables_given_back_early_go_to_the_next),
    TEST(a_task_begun_by_its_caller_is_pending_until_it_ends),
    TEST(an_error_at_the_end_stands_on_handle_variables_and_those_named),
    TEST(ends_in_another_thread_lose_nothing),
};
TEST_MAIN(tests)
