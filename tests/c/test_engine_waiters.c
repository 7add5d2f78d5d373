/* Threads that wait run the tasks that they wait for (threaded engine). In these tests the engine's
 * only thread is kept busy, so that nobody else could have run what has run.
 */
#include "engine_jobs.h"

/* An engine of one thread that stays in a task until its gate is opened. */
typedef struct occupied {
    kv_engine_t *engine;
    kv_var_t var;
    gate_t gate;
} occupied_t;

static void occupy(occupied_t *occupied)
{
    *occupied = (occupied_t){.engine = engine_start("threaded", 1)};
    kv_var_init(&occupied->var, false, NULL, NULL);
    job_t *job = job_new(0, NULL);
    job->gate = &occupied->gate;
    CHECK_STATUS(
        job_submit(occupied->engine, job, &occupied->var, KV_WRITE, NULL, KV_READ, 0, NULL), KV_OK);
    WAIT_UNTIL(atomic_load(&occupied->gate.arrived) == 1);
}

static void open_gate(void *gate)
{
    atomic_store(&((gate_t *)gate)->open, true);
}

static const int32_t priorities[] = {0, 5, -3, 5, 0, 7, -3, 1};
static const int in_order[] = {5, 1, 3, 7, 0, 4, 2, 6};
enum { NUM_PRIORITIES = sizeof in_order / sizeof in_order[0] };

/* A job of each priority, each on a variable of its own. The last in order opens the gate. */
static void submit_priorities(kv_engine_t *engine, kv_var_t *vars, job_log_t *log, gate_t *gate)
{
    for (int id = 0; id < NUM_PRIORITIES; id++) {
        kv_var_init(&vars[id], false, NULL, NULL);
        job_t *job = job_new(id, log);
        if (id == in_order[NUM_PRIORITIES - 1]) {
            job->body = open_gate;
            job->context = gate;
        }
        CHECK_STATUS(
            job_submit(engine, job, &vars[id], KV_WRITE, NULL, KV_READ, priorities[id], NULL),
            KV_OK);
    }
}

static void who_waits_for_everything_runs_it_in_order(void)
{
    occupied_t occupied;
    kv_var_t vars[NUM_PRIORITIES];
    job_log_t log = {0};
    occupy(&occupied);
    submit_priorities(occupied.engine, vars, &log, &occupied.gate);
    CHECK_STATUS(wait_all(occupied.engine), KV_OK);
    CHECK_EQ(log.count, NUM_PRIORITIES);
    for (int i = 0; i < NUM_PRIORITIES; i++)
        CHECK_EQ(log.ids[i], in_order[i]);
    engine_end(occupied.engine);
}

static void who_waits_for_a_handle_or_a_turn_runs_what_is_before_it(void)
{
    occupied_t occupied;
    kv_var_t var;
    job_log_t log = {0};
    occupy(&occupied);
    kv_var_init(&var, false, NULL, NULL);
    kv_handle_t *handle = handle_new(occupied.engine, 2);
    submit_log(occupied.engine, 0, &log, &var, KV_WRITE, handle);
    submit_log(occupied.engine, 1, &log, &var, KV_READ, handle);
    CHECK_TEXT(handle_error(handle), "none");
    kv_handle_rele(handle);
    submit_log(occupied.engine, 2, &log, &var, KV_READ, NULL);
    submit_log(occupied.engine, 3, &log, &var, KV_WRITE, NULL);
    CHECK_STATUS(touch(occupied.engine, &var, KV_READ), KV_OK);
    check_log(&log, 4);
    open_gate(&occupied.gate);
    engine_end(occupied.engine);
}

/* The failure of a task that the waiting thread ran is the waiter's as any other. */
static void who_waits_gets_the_error_of_what_it_ran_once(void)
{
    occupied_t occupied;
    kv_var_t var;
    occupy(&occupied);
    kv_var_init(&var, false, NULL, NULL);
    kv_handle_t *handle = handle_new(occupied.engine, 1);
    submit_failing(occupied.engine, "broken", &var, handle);
    kv_status_t status = kv_fail(KV_INVALID, "mine");
    CHECK_TEXT(handle_error(handle), "broken");
    CHECK_TEXT(kv_status_message(status), "mine");
    kv_handle_rele(handle);
    open_gate(&occupied.gate);
    CHECK_STATUS(wait_all(occupied.engine), KV_OK);
    kv_var_retire(&var);
    engine_end(occupied.engine);
}

static void who_waits_leaves_alone_what_would_keep_it_beyond_its_deadline(void)
{
    occupied_t occupied;
    kv_var_t mine, theirs;
    job_log_t log = {0};
    occupy(&occupied);
    kv_var_init(&mine, false, NULL, NULL);
    kv_var_init(&theirs, false, NULL, NULL);
    kv_handle_t *handle = handle_new(occupied.engine, 1);
    submit_log(occupied.engine, 0, &log, &mine, KV_WRITE, handle);
    test_caller_t hasty = make_caller(KV_POLL_NS / 2);
    CHECK_STATUS(kv_handle_wait(handle, &hasty.base), KV_TIMEOUT);
    hasty = make_caller(0);
    CHECK_STATUS(kv_engine_wait_all(occupied.engine, &hasty.base), KV_TIMEOUT);

    job_t *endless = job_new(1, &log);
    endless->gate = &occupied.gate;
    CHECK_STATUS(job_submit(occupied.engine, endless, &theirs, KV_WRITE, NULL, KV_READ, 1, NULL),
                 KV_OK);
    test_caller_t caller = make_caller(2 * KV_POLL_NS);
    CHECK_STATUS(kv_handle_wait(handle, &caller.base), KV_TIMEOUT);
    CHECK(caller.num_polls > 0);
    CHECK_EQ(log.count, 0);
    open_gate(&occupied.gate);
    CHECK_STATUS(wait_all(occupied.engine), KV_OK);
    CHECK_EQ(log.count, 2);
    kv_handle_rele(handle);
    engine_end(occupied.engine);
}

static const test_t tests[] = {
    TEST(who_waits_for_everything_runs_it_in_order),
    TEST(who_waits_for_a_handle_or_a_turn_runs_what_is_before_it),
    TEST(who_waits_gets_the_error_of_what_it_ran_once),
    TEST(who_waits_leaves_alone_what_would_keep_it_beyond_its_deadline),
};
TEST_MAIN(tests)
