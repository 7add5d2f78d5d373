/* The contract of all engines: order, errors, lifetimes, handles, callbacks. Every test here runs
 * on each of them. */
#include "engine_jobs.h"

/* ----------------------------------------------------------------------------------- order */

ON_EACH_ENGINE(writers_of_a_variable_run_in_order)
{
    kv_var_t var;
    job_log_t log = {0};
    kv_var_init(&var, false, NULL, NULL);
    for (int id = 0; id < 50; id++)
        submit_log(engine, id, &log, &var, id % 2 ? KV_WRITE : KV_OVERWRITE, NULL);
    CHECK_STATUS(wait_all(engine), KV_OK);
    check_log(&log, 50);
}

ON_EACH_ENGINE(a_caller_runs_after_the_tasks_before_it)
{
    kv_var_t var;
    kv_var_init(&var, false, NULL, NULL);
    for (int round = 0; round < 20; round++) {
        job_log_t log = {0};
        for (int id = 0; id < 10; id++)
            submit_log(engine, id, &log, &var, KV_WRITE, NULL);
        CHECK_STATUS(touch(engine, &var, round % 2 ? KV_READ : KV_WRITE), KV_OK);
        check_log(&log, 10);
    }
}

ON_EACH_ENGINE(an_idle_variable_is_entered_without_waiting)
{
    kv_var_t var;
    kv_var_init(&var, false, NULL, NULL);
    test_caller_t caller = patient();
    kv_dep_t dep = {.var = &var, .access = KV_WRITE};
    kv_op_t op;
    kv_op_init(&op, &dep, 1, 0);
    CHECK_STATUS(kv_engine_enter(engine, &op, &caller.base), KV_OK);
    CHECK_EQ(caller.num_detached, 0);
    CHECK_EQ(caller.base.deadline_ns, 0);
    CHECK_EQ(atomic_load(&var.state), KV_VAR_WRITER);
    kv_engine_leave(engine, &op);
    CHECK_EQ(atomic_load(&var.state), 0);
}

ON_EACH_ENGINE(all_variables_are_taken_or_none)
{
    kv_var_t a, b;
    kv_var_init(&a, false, NULL, NULL);
    kv_var_init(&b, false, NULL, NULL);
    kv_dep_t held = {.var = &b, .access = KV_READ};
    kv_dep_t deps[] = {{.var = &a, .access = KV_WRITE}, {.var = &b, .access = KV_WRITE}};
    kv_op_t holder, op;
    kv_op_init(&holder, &held, 1, 0);
    CHECK(kv_engine_try_enter(engine, &holder));
    kv_op_init(&op, deps, 2, 0);
    CHECK(!kv_engine_try_enter(engine, &op));
    CHECK_EQ(atomic_load(&a.state), 0);
    kv_engine_leave(engine, &holder);
    CHECK(kv_engine_try_enter(engine, &op));
    kv_engine_leave(engine, &op);
}

ON_EACH_ENGINE(readers_share_and_a_writer_is_alone)
{
    kv_var_t var;
    kv_var_init(&var, false, NULL, NULL);
    kv_dep_t read[2] = {{.var = &var, .access = KV_READ}, {.var = &var, .access = KV_READ}};
    kv_dep_t write = {.var = &var, .access = KV_WRITE};
    kv_op_t first, second, writer;
    kv_op_init(&first, &read[0], 1, 0);
    kv_op_init(&second, &read[1], 1, 0);
    kv_op_init(&writer, &write, 1, 0);
    CHECK(kv_engine_try_enter(engine, &first));
    CHECK(kv_engine_try_enter(engine, &second));
    CHECK(!kv_engine_try_enter(engine, &writer));
    kv_engine_leave(engine, &first);
    CHECK(!kv_engine_try_enter(engine, &writer));
    kv_engine_leave(engine, &second);
    CHECK(kv_engine_try_enter(engine, &writer));
    CHECK(!kv_engine_try_enter(engine, &first));
    kv_engine_leave(engine, &writer);
}

ON_EACH_ENGINE(a_variable_that_stands_twice_is_merged)
{
    static const struct {
        kv_access_t first, second, merged;
    } rows[] = {
        {KV_READ, KV_READ, KV_READ},
        {KV_READ, KV_WRITE, KV_WRITE},
        {KV_OVERWRITE, KV_READ, KV_WRITE},
        {KV_WRITE, KV_OVERWRITE, KV_WRITE},
        {KV_OVERWRITE, KV_OVERWRITE, KV_OVERWRITE},
    };
    kv_var_t a, b;
    kv_var_init(&a, false, NULL, NULL);
    kv_var_init(&b, false, NULL, NULL);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        kv_dep_t deps[] = {{.var = &a, .access = rows[i].first},
                           {.var = &b, .access = KV_READ},
                           {.var = &a, .access = rows[i].second}};
        kv_op_t op;
        kv_op_init(&op, deps, 3, 0);
        CHECK_EQ(op.num_deps, 2);
        CHECK_EQ(deps[0].access, rows[i].merged);
        CHECK(deps[0].var == &a && deps[1].var == &b);
        CHECK(kv_engine_try_enter(engine, &op));
        kv_engine_leave(engine, &op);
        CHECK_EQ(atomic_load(&a.state), 0);
    }
}

ON_EACH_ENGINE(a_task_without_variables_runs)
{
    job_log_t log = {0};
    job_t *job = job_new(0, &log);
    kv_op_init(&job->op, job->deps, 0, 0);
    job->op.run = job_run;
    job->op.finish = job_finish;
    CHECK_STATUS(kv_engine_submit(engine, &job->op), KV_OK);
    CHECK_STATUS(wait_all(engine), KV_OK);
    CHECK_EQ(kv_engine_pending(engine), 0);
    check_log(&log, 1);
}

ON_EACH_ENGINE(a_long_queue_needs_no_deep_stack)
{
    enum { COUNT = 20000 };
    kv_var_t var;
    _Atomic int ran = 0;
    kv_var_init(&var, false, NULL, NULL);
    held_t held;
    hold(&held, engine, &var);
    for (int i = 0; i < COUNT; i++) {
        job_t *job = job_new(0, NULL);
        job->body = count_free;
        job->context = &ran;
        CHECK_STATUS(job_submit(engine, job, &var, KV_WRITE, NULL, KV_READ, 0, NULL), KV_OK);
    }
    CHECK_EQ(kv_engine_pending(engine), COUNT);
    kv_engine_leave(engine, &held.op);
    CHECK_STATUS(wait_all(engine), KV_OK);
    CHECK_EQ(ran, COUNT);
}

/* ------------------------------------------------------------------------- ends of waiting */

/* A thread waits for a variable that this one holds; returns when it stands in the queue. */
static void start_waiting(helper_t *helper, kv_engine_t *engine, kv_var_t *var, kv_access_t access,
                          test_caller_t caller, int place)
{
    helper_start(helper, engine, var, access, caller);
    WAIT_UNTIL(num_queued(engine, var) == place);
}

ON_EACH_ENGINE(a_caller_that_gives_up_is_out_of_the_queue)
{
    kv_var_t var;
    kv_var_init(&var, false, NULL, NULL);
    kv_dep_t dep = {.var = &var, .access = KV_READ};
    kv_op_t holder;
    kv_op_init(&holder, &dep, 1, 0);
    CHECK(kv_engine_try_enter(engine, &holder));

    helper_t late = {0};
    helper_start(&late, engine, &var, KV_WRITE, make_caller(1000 * 1000));
    kv_thread_join(late.thread);
    CHECK_STATUS(late.status, KV_TIMEOUT);
    CHECK(strstr(late.message, "0.001 s") != NULL);
    CHECK_EQ(late.caller.num_detached, 1);
    CHECK(!late.caller.base.detached);
    CHECK_EQ(atomic_load(&var.state), KV_VAR_READER);

    CHECK_STATUS(touch(engine, &var, KV_READ), KV_OK);
    kv_engine_leave(engine, &holder);
    CHECK_EQ(atomic_load(&var.state), 0);
}

ON_EACH_ENGINE(a_signal_ends_the_wait)
{
    kv_var_t var;
    kv_var_init(&var, false, NULL, NULL);
    kv_dep_t dep = {.var = &var, .access = KV_READ};
    kv_op_t holder;
    kv_op_init(&holder, &dep, 1, 0);
    CHECK(kv_engine_try_enter(engine, &holder));

    test_caller_t interrupted = patient();
    interrupted.poll_status = KV_INTERRUPTED;
    helper_t helper = {0};
    start_waiting(&helper, engine, &var, KV_WRITE, interrupted, 1);
    /* A reader behind the writer goes on as soon as that one has given up. */
    CHECK_STATUS(touch(engine, &var, KV_READ), KV_OK);
    kv_thread_join(helper.thread);
    CHECK_STATUS(helper.status, KV_INTERRUPTED);
    CHECK_EQ(helper.caller.num_polls, 1);
    kv_engine_leave(engine, &holder);
    CHECK_EQ(atomic_load(&var.state), 0);
}

static void leave_in_poll(void *context)
{
    held_t *held = context;
    kv_engine_leave(held->engine, &held->op);
}

ON_EACH_ENGINE(a_turn_that_comes_with_the_signal_is_given_back)
{
    kv_var_t var;
    kv_var_init(&var, false, NULL, NULL);
    held_t held;
    hold(&held, engine, &var);
    test_caller_t caller = patient();
    caller.on_poll = leave_in_poll; /* grants the operation that is being interrupted */
    caller.context = &held;
    caller.poll_status = KV_CALLBACK;
    kv_dep_t dep = {.var = &var, .access = KV_WRITE};
    kv_op_t op;
    kv_op_init(&op, &dep, 1, 0);
    CHECK_STATUS(kv_engine_enter(engine, &op, &caller.base), KV_CALLBACK);
    CHECK_EQ(atomic_load(&var.state), 0);
}

static void leave_after_the_deadline(void *context)
{
    held_t *held = context;
    WAIT_UNTIL(kv_clock_ns() > held->until_ns);
    kv_engine_leave(held->engine, &held->op);
}

ON_EACH_ENGINE(a_turn_that_comes_with_the_deadline_is_taken)
{
    kv_var_t var;
    kv_var_init(&var, false, NULL, NULL);
    held_t held;
    hold(&held, engine, &var);
    test_caller_t caller = make_caller(KV_POLL_NS + KV_POLL_NS / 4); /* passes during the poll */
    held.until_ns = kv_caller_deadline(&caller.base);
    caller.on_poll = leave_after_the_deadline;
    caller.context = &held;
    kv_dep_t dep = {.var = &var, .access = KV_WRITE};
    kv_op_t op;
    kv_op_init(&op, &dep, 1, 0);
    CHECK_STATUS(kv_engine_enter(engine, &op, &caller.base), KV_OK);
    kv_engine_leave(engine, &op);
    CHECK_EQ(atomic_load(&var.state), 0);
}

/* -------------------------------------------------------------------------------- lifetimes */

ON_EACH_ENGINE(a_retired_variable_is_freed_once_by_the_last)
{
    _Atomic int freed = 0;
    kv_var_t var;

    kv_var_init(&var, false, count_free, &freed);
    kv_var_retire(&var);
    CHECK_EQ(freed, 1);

    kv_var_init(&var, false, count_free, &freed);
    kv_var_pin(&var);
    kv_var_pin(&var);
    kv_var_retire(&var);
    kv_var_unpin(&var);
    CHECK_EQ(freed, 1);
    kv_var_unpin(&var);
    CHECK_EQ(freed, 2);

    kv_var_init(&var, false, count_free, &freed);
    held_t held;
    hold(&held, engine, &var);
    kv_var_retire(&var);
    CHECK_EQ(freed, 2);
    kv_engine_leave(engine, &held.op);
    CHECK_EQ(freed, 3);
}

ON_EACH_ENGINE(a_variable_outlives_the_operations_on_it)
{
    _Atomic int freed = 0;
    kv_var_t var, other;
    job_log_t log = {0};
    kv_var_init(&var, true, count_free, &freed);
    kv_var_init(&other, true, count_free, &freed);
    held_t held;
    hold(&held, engine, &var);
    for (int id = 0; id < 3; id++)
        CHECK_STATUS(
            job_submit(engine, job_new(id, &log), &var, KV_WRITE, &other, KV_READ, 0, NULL), KV_OK);
    submit_failing(engine, "with an error on it", &var, NULL);
    kv_var_retire(&var);
    kv_var_retire(&other);
    CHECK_EQ(freed, 0);
    kv_engine_leave(engine, &held.op);
    CHECK_STATUS(wait_all(engine), KV_DEVICE);
    CHECK_EQ(freed, 2);
    check_log(&log, 3);
}

ON_EACH_ENGINE(a_closed_engine_refuses_and_stop_runs_the_rest)
{
    kv_var_t var;
    job_log_t log = {0};
    kv_var_init(&var, false, NULL, NULL);
    for (int id = 0; id < 5; id++)
        submit_log(engine, id, &log, &var, KV_WRITE, NULL);
    kv_engine_close(engine);
    CHECK_STATUS(touch(engine, &var, KV_READ), KV_CLOSED);
    CHECK_STATUS(job_submit(engine, job_new(9, &log), &var, KV_WRITE, NULL, KV_READ, 0, NULL),
                 KV_CLOSED);
    kv_engine_stop(engine, NULL);
    check_log(&log, 5);
}

static void an_unknown_engine_is_refused_with_the_list(void)
{
    kv_engine_t *engine = NULL;
    CHECK_STATUS(kv_engine_new("thread", 1, 1, &engine), KV_INVALID);
    CHECK(strstr(kv_status_message(KV_INVALID), "'thread'") != NULL);
    for (int i = 0; i < NUM_ENGINES; i++)
        CHECK(strstr(kv_status_message(KV_INVALID), engine_names[i]) != NULL);
    CHECK(engine == NULL);
    for (int nth = 1; nth <= 2; nth++) {
        kv_fault_set("alloc", nth);
        CHECK_STATUS(kv_engine_new("naive", 1, 1, &engine), KV_NO_MEMORY);
    }
    kv_fault_set("alloc", 0);
    CHECK(engine == NULL);
}

/* ---------------------------------------------------------------------------------- handles */

ON_EACH_ENGINE(a_handle_is_done_when_all_its_tasks_are)
{
    kv_var_t var;
    job_log_t log = {0};
    kv_var_init(&var, false, NULL, NULL);
    held_t held;
    hold(&held, engine, &var);
    kv_handle_t *handle = handle_new(engine, 3);
    submit_log(engine, 0, &log, &var, KV_WRITE, handle);
    submit_log(engine, 1, &log, &var, KV_WRITE, handle);
    kv_handle_end_one(handle, KV_OK);
    CHECK(!kv_handle_done(handle));
    CHECK(kv_handle_error(handle) == NULL);
    test_caller_t hasty = make_caller(1000);
    CHECK_STATUS(kv_handle_wait(handle, &hasty.base), KV_TIMEOUT);
    kv_engine_leave(engine, &held.op);
    CHECK_TEXT(handle_error(handle), "none");
    CHECK(kv_handle_done(handle));
    check_log(&log, 2);
    kv_handle_rele(handle);

    handle = handle_new(engine, 0);
    CHECK_TEXT(handle_error(handle), "none");
    kv_handle_rele(handle);
}

ON_EACH_ENGINE(a_handle_carries_the_error_of_its_first_task_that_failed)
{
    kv_var_t a, b;
    kv_var_init(&a, false, NULL, NULL);
    kv_var_init(&b, false, NULL, NULL);
    held_t held;
    hold(&held, engine, &a);
    kv_handle_t *handle = handle_new(engine, 2);
    submit_failing(engine, "first", &a, handle);
    submit_failing(engine, "second", &b, handle);
    if (strcmp(kv_engine_name(engine), "threaded") == 0)
        WAIT_UNTIL(num_queued(engine, &b) == 0);
    kv_engine_leave(engine, &held.op);
    CHECK_TEXT(handle_error(handle), "first");
    kv_handle_rele(handle);
    CHECK_STATUS(wait_all(engine), KV_DEVICE);
    CHECK_TEXT(kv_status_message(KV_DEVICE), "second");
    kv_var_retire(&a);
    kv_var_retire(&b);
}

ON_EACH_ENGINE(a_notification_comes_once)
{
    kv_var_t var;
    _Atomic int told = 0;
    kv_var_init(&var, false, NULL, NULL);
    held_t held;
    hold(&held, engine, &var);
    kv_handle_t *handle = handle_new(engine, 1);
    submit_log(engine, 0, &(job_log_t){0}, &var, KV_WRITE, handle);
    kv_handle_notify(handle, count_free, &told);
    CHECK_EQ(told, 0);
    kv_engine_leave(engine, &held.op);
    CHECK_STATUS(wait_all(engine), KV_OK);
    CHECK_EQ(told, 1);
    kv_handle_notify(handle, count_free, &told); /* it is done: at once */
    CHECK_EQ(told, 2);
    kv_handle_rele(handle);
}

ON_EACH_ENGINE(a_notification_that_was_taken_back_does_not_come)
{
    kv_var_t var;
    _Atomic int told = 0;
    kv_var_init(&var, false, NULL, NULL);
    held_t held;
    hold(&held, engine, &var);
    kv_handle_t *handle = handle_new(engine, 1);
    submit_log(engine, 0, &(job_log_t){0}, &var, KV_WRITE, handle);
    kv_handle_notify(handle, count_free, &told);
    kv_handle_notify(handle, NULL, NULL);
    kv_engine_leave(engine, &held.op);
    CHECK_STATUS(wait_all(engine), KV_OK);
    CHECK_EQ(told, 0);
    kv_handle_rele(handle);
}

/* -------------------------------------------------------------------------------- callbacks */

static void begin_callback(held_t *held, kv_engine_t *engine, kv_var_t *var)
{
    hold(held, engine, var);
    kv_engine_begin_callback(engine, &held->op);
}

ON_EACH_ENGINE(a_callback_holds_the_first_variable_only)
{
    kv_var_t key, array;
    kv_var_init(&key, false, NULL, NULL);
    kv_var_init(&array, true, NULL, NULL);
    kv_dep_t deps[] = {{.var = &key, .access = KV_WRITE}, {.var = &array, .access = KV_READ}};
    kv_op_t op;
    kv_op_init(&op, deps, 2, 0);
    CHECK(kv_engine_try_enter(engine, &op));
    CHECK(!kv_var_held_here(&key));
    CHECK_EQ(kv_callback_depth(), 0);
    kv_engine_begin_callback(engine, &op);
    CHECK_EQ(kv_callback_depth(), 1);
    CHECK(kv_var_held_here(&key));
    CHECK(!kv_var_held_here(&array));
    CHECK_EQ(atomic_load(&array.state), 0);
    CHECK_STATUS(touch(engine, &array, KV_WRITE), KV_OK);
    kv_engine_leave(engine, &op);
    CHECK_EQ(kv_callback_depth(), 0);
    CHECK(!kv_var_held_here(&key));
    CHECK_EQ(atomic_load(&key.state), 0);
}

ON_EACH_ENGINE(a_callback_cannot_wait_for_itself)
{
    kv_var_t key, other;
    job_log_t log = {0};
    kv_var_init(&key, false, NULL, NULL);
    kv_var_init(&other, false, NULL, NULL);
    held_t held, inner;
    begin_callback(&held, engine, &key);
    CHECK_STATUS(touch(engine, &key, KV_READ), KV_INVALID);
    CHECK(strstr(kv_status_message(KV_INVALID), "updater that it is made from") != NULL);
    CHECK_STATUS(wait_all(engine), KV_INVALID);

    /* Other keys work, also in a callback inside the callback, and the tasks on them. */
    submit_log(engine, 0, &log, &other, KV_WRITE, NULL);
    CHECK_STATUS(touch(engine, &other, KV_READ), KV_OK);
    begin_callback(&inner, engine, &other);
    CHECK_EQ(kv_callback_depth(), 2);
    CHECK_STATUS(touch(engine, &key, KV_READ), KV_INVALID);
    kv_engine_leave(engine, &inner.op);

    /* A task behind the callback, and what stands behind that task. */
    kv_handle_t *handle = handle_new(engine, 1);
    CHECK_STATUS(job_submit(engine, job_new(1, &log), &key, KV_READ, &other, KV_WRITE, 0, handle),
                 KV_OK);
    test_caller_t caller = patient();
    CHECK_STATUS(kv_handle_wait(handle, &caller.base), KV_INVALID);
    CHECK_STATUS(touch(engine, &other, KV_READ), KV_INVALID);
    kv_engine_leave(engine, &held.op);
    CHECK_TEXT(handle_error(handle), "none");
    CHECK_STATUS(touch(engine, &other, KV_READ), KV_OK);
    check_log(&log, 2);
    kv_handle_rele(handle);
    CHECK_EQ(atomic_load(&key.state) | atomic_load(&other.state), 0);
}

ON_EACH_ENGINE(a_refused_wait_does_not_stop_those_behind)
{
    kv_var_t key, other;
    job_log_t log = {0};
    kv_var_init(&key, false, NULL, NULL);
    kv_var_init(&other, false, NULL, NULL);
    held_t held;
    begin_callback(&held, engine, &key);
    kv_dep_t deps[] = {{.var = &other, .access = KV_WRITE}, {.var = &key, .access = KV_WRITE}};
    kv_op_t op;
    kv_op_init(&op, deps, 2, 0);
    test_caller_t caller = patient();
    CHECK_STATUS(kv_engine_enter(engine, &op, &caller.base), KV_INVALID);
    CHECK_EQ(caller.num_detached, 0);
    submit_log(engine, 0, &log, &other, KV_WRITE, NULL);
    CHECK_STATUS(touch(engine, &other, KV_WRITE), KV_OK);
    check_log(&log, 1);
    kv_engine_leave(engine, &held.op);
}

typedef struct handler {
    kv_engine_t *engine;
    kv_var_t *busy, *idle;
    held_t *held;
} handler_t;

static void use_the_store_in_a_signal_handler(void *context)
{
    handler_t *handler = context;
    CHECK_STATUS(touch(handler->engine, handler->busy, KV_READ), KV_INVALID);
    CHECK(strstr(kv_status_message(KV_INVALID), "signal handler") != NULL);
    CHECK_STATUS(wait_all(handler->engine), KV_INVALID);
    CHECK_STATUS(touch(handler->engine, handler->idle, KV_READ), KV_OK);
    job_log_t log = {0};
    submit_log(handler->engine, 0, &log, handler->idle, KV_WRITE, NULL);
    CHECK_STATUS(touch(handler->engine, handler->idle, KV_READ), KV_OK);
    check_log(&log, 1);
    kv_engine_leave(handler->engine, &handler->held->op);
}

ON_EACH_ENGINE(a_signal_handler_cannot_wait_for_the_call_that_it_interrupted)
{
    kv_var_t busy, idle;
    kv_var_init(&busy, false, NULL, NULL);
    kv_var_init(&idle, false, NULL, NULL);
    held_t held;
    hold(&held, engine, &busy);
    handler_t handler = {engine, &busy, &idle, &held};
    test_caller_t caller = patient();
    caller.on_poll = use_the_store_in_a_signal_handler;
    caller.context = &handler;
    kv_dep_t dep = {.var = &busy, .access = KV_WRITE};
    kv_op_t op;
    kv_op_init(&op, &dep, 1, 0);
    CHECK_STATUS(kv_engine_enter(engine, &op, &caller.base), KV_OK);
    kv_engine_leave(engine, &op);
    CHECK_EQ(atomic_load(&busy.state), 0);
}

static const test_t tests[] = {
    TEST(writers_of_a_variable_run_in_order),
    TEST(a_caller_runs_after_the_tasks_before_it),
    TEST(an_idle_variable_is_entered_without_waiting),
    TEST(all_variables_are_taken_or_none),
    TEST(readers_share_and_a_writer_is_alone),
    TEST(a_variable_that_stands_twice_is_merged),
    TEST(a_task_without_variables_runs),
    TEST(a_long_queue_needs_no_deep_stack),
    TEST(a_caller_that_gives_up_is_out_of_the_queue),
    TEST(a_signal_ends_the_wait),
    TEST(a_turn_that_comes_with_the_signal_is_given_back),
    TEST(a_turn_that_comes_with_the_deadline_is_taken),
    TEST(a_retired_variable_is_freed_once_by_the_last),
    TEST(a_variable_outlives_the_operations_on_it),
    TEST(a_closed_engine_refuses_and_stop_runs_the_rest),
    TEST(an_unknown_engine_is_refused_with_the_list),
    TEST(a_handle_is_done_when_all_its_tasks_are),
    TEST(a_handle_carries_the_error_of_its_first_task_that_failed),
    TEST(a_notification_comes_once),
    TEST(a_notification_that_was_taken_back_does_not_come),
    TEST(a_callback_holds_the_first_variable_only),
    TEST(a_callback_cannot_wait_for_itself),
    TEST(a_refused_wait_does_not_stop_those_behind),
    TEST(a_signal_handler_cannot_wait_for_the_call_that_it_interrupted),
};
TEST_MAIN(tests)
