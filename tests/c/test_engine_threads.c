/* The engines under several threads: priorities, sharing, who ends first, circles of callbacks. */
#include "engine_jobs.h"

/* ------------------------------------------------------------------------------ the workers */

static void of_the_runnable_higher_priority_runs_first(void)
{
    static const int32_t priorities[] = {0, 5, -3, 5, 0, 7, -3, 1};
    static const int order[] = {5, 1, 3, 7, 0, 4, 2, 6};
    enum { COUNT = sizeof order / sizeof order[0] };
    kv_engine_t *engine = engine_start("threaded", 1);
    kv_var_t vars[COUNT], first;
    job_log_t log = {0};
    gate_t gate = {0};
    kv_var_init(&first, false, NULL, NULL);
    job_t *blocker = job_new(0, NULL);
    blocker->gate = &gate;
    CHECK_STATUS(job_submit(engine, blocker, &first, KV_WRITE, NULL, KV_READ, 0, NULL), KV_OK);
    WAIT_UNTIL(atomic_load(&gate.arrived) == 1);
    for (int id = 0; id < COUNT; id++) {
        kv_var_init(&vars[id], false, NULL, NULL);
        CHECK_STATUS(job_submit(engine, job_new(id, &log), &vars[id], KV_WRITE, NULL, KV_READ,
                                priorities[id], NULL),
                     KV_OK);
    }
    atomic_store(&gate.open, true);
    WAIT_UNTIL(kv_engine_pending(engine) == 0); /* who waits in the engine would run some */
    for (int i = 0; i < COUNT; i++)
        CHECK_EQ(log.ids[i], order[i]);
    engine_end(engine);
}

static void tasks_that_read_run_at_the_same_time(void)
{
    kv_engine_t *engine = engine_start("threaded", 2);
    kv_var_t var;
    gate_t gate = {0};
    kv_var_init(&var, false, NULL, NULL);
    for (int i = 0; i < 2; i++) {
        job_t *job = job_new(i, NULL);
        job->gate = &gate;
        CHECK_STATUS(job_submit(engine, job, &var, KV_READ, NULL, KV_READ, 0, NULL), KV_OK);
    }
    WAIT_UNTIL(atomic_load(&gate.arrived) == 2);
    atomic_store(&gate.open, true);
    engine_end(engine);
}

static void without_a_first_thread_the_task_is_refused(void)
{
    kv_engine_t *engine = engine_start("threaded", 2);
    kv_var_t var;
    job_log_t log = {0};
    kv_var_init(&var, false, NULL, NULL);
    kv_fault_set("thread.start", 1);
    CHECK_STATUS(job_submit(engine, job_new(0, &log), &var, KV_WRITE, NULL, KV_READ, 0, NULL),
                 KV_NO_MEMORY);
    kv_fault_set("thread.start", 0);
    CHECK_EQ(atomic_load(&var.state), 0);
    submit_log(engine, 1, &log, &var, KV_WRITE, NULL);
    CHECK_STATUS(wait_all(engine), KV_OK);
    CHECK_EQ(atomic_load(&log.count), 1);
    engine_end(engine);
}

static void without_more_threads_one_does_the_work(void)
{
    kv_engine_t *engine = engine_start("threaded", 2);
    kv_var_t a, b, c;
    gate_t gate = {0};
    job_log_t log = {0};
    held_t held;
    kv_var_init(&a, false, NULL, NULL);
    kv_var_init(&b, false, NULL, NULL);
    kv_var_init(&c, false, NULL, NULL);
    hold(&held, engine, &c);
    submit_log(engine, 2, &log, &c, KV_WRITE, NULL);
    job_t *job = job_new(0, NULL);
    job->gate = &gate;
    CHECK_STATUS(job_submit(engine, job, &a, KV_WRITE, NULL, KV_READ, 0, NULL), KV_OK);
    WAIT_UNTIL(atomic_load(&gate.arrived) == 1);

    kv_fault_set("thread.start", 1);
    submit_log(engine, 1, &log, &b, KV_WRITE, NULL);
    CHECK_EQ(kv_fault_set("thread.start", 1), 1);
    kv_status_t status = kv_fail(KV_NO_MEMORY, "mine");
    kv_engine_leave(engine, &held.op);
    CHECK_TEXT(kv_status_message(status), "mine");
    CHECK_EQ(kv_fault_set("thread.start", 0), 1);

    atomic_store(&gate.open, true);
    CHECK_STATUS(wait_all(engine), KV_OK);
    CHECK_EQ(atomic_load(&log.count), 2);
    CHECK_EQ(engine->num_threads, 1);
    engine_end(engine);
}

static void a_task_that_leave_made_runnable_finds_a_thread(void)
{
    kv_engine_t *engine = engine_start("threaded", 2);
    kv_var_t a, b;
    gate_t gate = {0};
    job_log_t log = {0};
    held_t held;
    kv_var_init(&a, false, NULL, NULL);
    kv_var_init(&b, false, NULL, NULL);
    hold(&held, engine, &b);
    submit_log(engine, 0, &log, &b, KV_WRITE, NULL);
    job_t *job = job_new(0, NULL);
    job->gate = &gate;
    CHECK_STATUS(job_submit(engine, job, &a, KV_WRITE, NULL, KV_READ, 0, NULL), KV_OK);
    WAIT_UNTIL(atomic_load(&gate.arrived) == 1);
    kv_engine_leave(engine, &held.op);
    WAIT_UNTIL(atomic_load(&log.count) == 1);
    atomic_store(&gate.open, true);
    engine_end(engine);
}

/* --------------------------------------------------------------------------------- waiting */

ON_EACH_ENGINE(callers_that_read_are_inside_together)
{
    kv_var_t var;
    gate_t gate = {0};
    held_t held;
    helper_t readers[3] = {{.inside = &gate}, {.inside = &gate}, {.inside = &gate}};
    kv_var_init(&var, false, NULL, NULL);
    hold(&held, engine, &var);
    for (int i = 0; i < 3; i++)
        helper_start(&readers[i], engine, &var, KV_READ, patient());
    WAIT_UNTIL(num_queued(engine, &var) == 3);
    kv_engine_leave(engine, &held.op);
    WAIT_UNTIL(atomic_load(&gate.arrived) == 3);
    CHECK_EQ(atomic_load(&var.state) & KV_VAR_READERS, 3 * KV_VAR_READER);
    atomic_store(&gate.open, true);
    for (int i = 0; i < 3; i++) {
        kv_thread_join(readers[i].thread);
        CHECK_STATUS(readers[i].status, KV_OK);
    }
    CHECK_EQ(atomic_load(&var.state), 0);
}

static void *stop(void *context)
{
    kv_engine_stop(context, NULL);
    return NULL;
}

ON_EACH_ENGINE(stop_waits_for_what_another_thread_makes_runnable)
{
    kv_var_t var;
    job_log_t log = {0};
    held_t held;
    kv_thread_t thread;
    kv_var_init(&var, false, NULL, NULL);
    hold(&held, engine, &var);
    submit_log(engine, 0, &log, &var, KV_WRITE, NULL);
    CHECK_STATUS(kv_thread_start(&thread, "stopper", stop, engine), KV_OK);
    WAIT_UNTIL(atomic_load(&engine->closed));
    for (int i = 0; i < 100; i++)
        sched_yield(); /* most likely it sleeps by now; right either way */
    kv_engine_leave(engine, &held.op);
    kv_thread_join(thread);
    check_log(&log, 1);
}

ON_EACH_ENGINE(stop_with_a_deadline_gives_up_what_cannot_run)
{
    kv_var_t var;
    job_log_t log = {0};
    held_t held;
    test_caller_t caller = make_caller(1000 * 1000);
    kv_var_init(&var, false, NULL, NULL);
    hold(&held, engine, &var);
    submit_log(engine, 0, &log, &var, KV_WRITE, NULL);
    kv_engine_stop(engine, &caller.base);
    CHECK_EQ(kv_engine_pending(engine), 1);
    CHECK_EQ(log.count, 0);

    /* The holder may still leave; only the naive engine runs the task then. */
    kv_engine_leave(engine, &held.op);
    CHECK_EQ(log.count, engine->kind->drains);
    kv_mutex_lock(&engine->lock);
    kv_op_t *op = kv_runnable_pop_locked(engine);
    kv_engine_unlock(engine);
    if (op != NULL)
        kv_task_run(engine, op);
    check_log(&log, 1);
}

typedef struct taker {
    kv_handle_t *handle;
    _Atomic bool calling, finished_first;
    _Atomic bool finished; /* the notification has returned */
    gate_t gate;
} taker_t;

static void slow_notification(void *context)
{
    taker_t *taker = context;
    gate_pass(&taker->gate);
    atomic_store(&taker->finished, true);
}

static void *take_back(void *context)
{
    taker_t *taker = context;
    atomic_store(&taker->calling, true);
    kv_handle_notify(taker->handle, NULL, NULL);
    atomic_store(&taker->finished_first, atomic_load(&taker->finished));
    return NULL;
}

static void taking_a_notification_back_waits_until_it_has_returned(void)
{
    kv_engine_t *engine = engine_start("threaded", 1);
    kv_var_t var;
    taker_t taker = {0};
    kv_thread_t thread;
    kv_var_init(&var, false, NULL, NULL);
    held_t held;
    hold(&held, engine, &var);
    CHECK_STATUS(kv_handle_new(engine, 1, &taker.handle), KV_OK);
    submit_log(engine, 0, &(job_log_t){0}, &var, KV_WRITE, taker.handle);
    kv_handle_notify(taker.handle, slow_notification, &taker);
    kv_engine_leave(engine, &held.op);
    WAIT_UNTIL(atomic_load(&taker.gate.arrived) == 1);
    CHECK_STATUS(kv_thread_start(&thread, "taker", take_back, &taker), KV_OK);
    WAIT_UNTIL(atomic_load(&taker.calling));
    for (int i = 0; i < 100; i++)
        sched_yield();
    atomic_store(&taker.gate.open, true);
    kv_thread_join(thread);
    CHECK(atomic_load(&taker.finished_first));
    kv_handle_rele(taker.handle);
    engine_end(engine);
}

static void a_seed_gives_the_stepping_engine_its_order(void)
{
    enum { COUNT = 12, SEEDS = 8 };
    static job_log_t logs[SEEDS][2];
    int different = 0;
    for (int seed = 0; seed < SEEDS; seed++) {
        for (int again = 0; again < 2; again++) {
            kv_engine_t *engine = NULL;
            kv_var_t vars[COUNT];
            job_log_t *log = &logs[seed][again];
            memset(log, 0, sizeof *log);
            CHECK_STATUS(kv_engine_new("stepping", (uint64_t)seed, 1, &engine), KV_OK);
            for (int id = 0; id < COUNT; id++) {
                kv_var_init(&vars[id], false, NULL, NULL);
                submit_log(engine, id, log, &vars[id], KV_WRITE, NULL);
            }
            CHECK_STATUS(wait_all(engine), KV_OK);
            engine_end(engine);
        }
        CHECK(memcmp(logs[seed][0].ids, logs[seed][1].ids, COUNT * sizeof(int)) == 0);
        different += memcmp(logs[0][0].ids, logs[seed][0].ids, COUNT * sizeof(int)) != 0;
    }
    CHECK(different > 0);
}

/* --------------------------------------------------------------------------------- circles */

/* A thread that holds `mine` in a callback and, when all are so far, wants `wanted`. */
typedef struct ring {
    kv_engine_t *engine;
    kv_var_t *mine, *wanted;
    _Atomic int *inside;
    int size;
    kv_status_t status;
    char message[KV_MESSAGE_BYTES];
    kv_thread_t thread;
} ring_t;

static void *ring_body(void *context)
{
    ring_t *ring = context;
    test_caller_t caller = patient();
    held_t held = {.dep = {.var = ring->mine, .access = KV_WRITE}};
    kv_op_init(&held.op, &held.dep, 1, 0);
    CHECK_STATUS(kv_engine_enter(ring->engine, &held.op, &caller.base), KV_OK);
    kv_engine_begin_callback(ring->engine, &held.op);
    atomic_fetch_add(ring->inside, 1);
    WAIT_UNTIL(atomic_load(ring->inside) == ring->size);
    ring->status = touch(ring->engine, ring->wanted, KV_WRITE);
    snprintf(ring->message, sizeof ring->message, "%s", kv_status_message(ring->status));
    kv_engine_leave(ring->engine, &held.op);
    return NULL;
}

/* `queued`: their own variables they have got by the queue. */
static void check_ring(kv_engine_t *engine, int size, bool queued)
{
    enum { MAX_RING = 4 };
    kv_var_t vars[MAX_RING];
    ring_t rings[MAX_RING];
    held_t held[MAX_RING];
    _Atomic int inside = 0;
    int refused = 0;
    char words[32];
    snprintf(words, sizeof words, "the updaters of %d threads", size);
    for (int i = 0; i < size; i++) {
        kv_var_init(&vars[i], false, NULL, NULL);
        if (queued)
            hold(&held[i], engine, &vars[i]);
    }
    for (int i = 0; i < size; i++) {
        rings[i] = (ring_t){.engine = engine,
                            .mine = &vars[i],
                            .wanted = &vars[(i + 1) % size],
                            .inside = &inside,
                            .size = size};
        CHECK_STATUS(kv_thread_start(&rings[i].thread, "ring", ring_body, &rings[i]), KV_OK);
    }
    for (int i = 0; queued && i < size; i++) {
        WAIT_UNTIL(num_queued(engine, &vars[i]) == 1);
        kv_engine_leave(engine, &held[i].op);
    }
    for (int i = 0; i < size; i++) {
        kv_thread_join(rings[i].thread);
        if (rings[i].status == KV_OK)
            continue;
        refused++;
        CHECK_STATUS(rings[i].status, KV_INVALID);
        CHECK(strstr(rings[i].message, words) != NULL);
    }
    CHECK_EQ(refused, 1);
    for (int i = 0; i < size; i++)
        CHECK_EQ(atomic_load(&vars[i].state), 0);
}

ON_EACH_ENGINE(of_callbacks_that_wait_in_a_circle_one_is_refused)
{
    for (int size = 2; size <= 4; size++)
        for (int round = 0; round < 20; round++)
            check_ring(engine, size, round % 2);
}

ON_EACH_ENGINE(a_circle_through_an_operation_on_two_variables_is_found)
{
    kv_var_t a, b;
    held_t held;
    kv_var_init(&a, false, NULL, NULL);
    kv_var_init(&b, false, NULL, NULL);
    hold(&held, engine, &a);
    kv_engine_begin_callback(engine, &held.op);
    job_log_t log = {0};
    CHECK_STATUS(job_submit(engine, job_new(0, &log), &a, KV_READ, &b, KV_READ, 0, NULL), KV_OK);
    /* The task has b and waits for a. A reader shares b with it, a writer would wait. */
    CHECK_STATUS(touch(engine, &b, KV_READ), KV_OK);
    CHECK_STATUS(touch(engine, &b, KV_WRITE), KV_INVALID);
    helper_t writer = {0};
    helper_start(&writer, engine, &b, KV_WRITE, patient());
    WAIT_UNTIL(num_queued(engine, &b) == 2);
    CHECK_STATUS(touch(engine, &b, KV_READ), KV_INVALID); /* behind the writer behind the task */
    kv_engine_leave(engine, &held.op);
    kv_thread_join(writer.thread);
    CHECK_STATUS(writer.status, KV_OK);
    CHECK_STATUS(wait_all(engine), KV_OK);
}

static void open_gate(void *context)
{
    atomic_store(&((gate_t *)context)->open, true);
}

ON_EACH_ENGINE(a_reader_behind_a_reader_that_waits_for_it_is_not_refused)
{
    kv_var_t a, b;
    held_t held;
    gate_t gate = {0};
    kv_var_init(&a, false, NULL, NULL);
    kv_var_init(&b, false, NULL, NULL);
    hold(&held, engine, &a);
    kv_engine_begin_callback(engine, &held.op);
    helper_t writer = {.inside = &gate};
    helper_start(&writer, engine, &b, KV_WRITE, patient());
    WAIT_UNTIL(atomic_load(&gate.arrived) == 1);
    job_log_t log = {0};
    CHECK_STATUS(job_submit(engine, job_new(0, &log), &b, KV_READ, &a, KV_READ, 0, NULL), KV_OK);

    /* This one waits for the writer, not for the task. */
    test_caller_t caller = patient();
    caller.on_poll = open_gate;
    caller.context = &gate;
    kv_dep_t dep = {.var = &b, .access = KV_READ};
    kv_op_t op;
    kv_op_init(&op, &dep, 1, 0);
    CHECK_STATUS(kv_engine_enter(engine, &op, &caller.base), KV_OK);
    kv_engine_leave(engine, &op);
    kv_engine_leave(engine, &held.op);
    kv_thread_join(writer.thread);
    CHECK_STATUS(wait_all(engine), KV_OK);
    check_log(&log, 1);
}

ON_EACH_ENGINE(a_writer_waits_for_every_reader_before_it)
{
    kv_var_t a, b, c;
    held_t held, other;
    job_log_t log = {0};
    kv_var_init(&a, false, NULL, NULL);
    kv_var_init(&b, false, NULL, NULL);
    kv_var_init(&c, false, NULL, NULL);
    hold(&other, engine, &c);
    hold(&held, engine, &a);
    kv_engine_begin_callback(engine, &held.op);
    CHECK_STATUS(job_submit(engine, job_new(0, &log), &b, KV_READ, &a, KV_READ, 0, NULL), KV_OK);
    CHECK_STATUS(job_submit(engine, job_new(1, &log), &b, KV_READ, &c, KV_READ, 0, NULL), KV_OK);
    CHECK_STATUS(touch(engine, &b, KV_WRITE), KV_INVALID);
    kv_engine_leave(engine, &held.op);
    kv_engine_leave(engine, &other.op);
    CHECK_STATUS(touch(engine, &b, KV_WRITE), KV_OK);
    CHECK_EQ(log.count, 2);
}

typedef struct handle_waiter {
    kv_engine_t *engine;
    kv_var_t *mine;
    kv_handle_t *handle;
    kv_status_t status;
} handle_waiter_t;

static void *wait_in_callback(void *context)
{
    handle_waiter_t *waiter = context;
    held_t held;
    hold(&held, waiter->engine, waiter->mine);
    kv_engine_begin_callback(waiter->engine, &held.op);
    test_caller_t caller = patient();
    waiter->status = kv_handle_wait(waiter->handle, &caller.base);
    kv_engine_leave(waiter->engine, &held.op);
    return NULL;
}

static bool is_waited_for(kv_engine_t *engine, kv_var_t *var)
{
    kv_mutex_lock(&engine->lock);
    kv_actor_t *actor = atomic_load(&var->actor);
    bool waits = actor != NULL && atomic_load(&actor->engine) == engine;
    kv_engine_unlock(engine);
    return waits;
}

ON_EACH_ENGINE(a_circle_through_a_handle_is_found)
{
    kv_var_t a, b;
    held_t held;
    kv_thread_t thread;
    kv_var_init(&a, false, NULL, NULL);
    kv_var_init(&b, false, NULL, NULL);
    hold(&held, engine, &a);
    kv_engine_begin_callback(engine, &held.op);
    handle_waiter_t waiter = {.engine = engine, .mine = &b};
    CHECK_STATUS(kv_handle_new(engine, 1, &waiter.handle), KV_OK);
    submit_log(engine, 0, &(job_log_t){0}, &a, KV_WRITE, waiter.handle);
    CHECK_STATUS(kv_thread_start(&thread, "waiter", wait_in_callback, &waiter), KV_OK);
    WAIT_UNTIL(is_waited_for(engine, &b));
    CHECK_STATUS(touch(engine, &b, KV_READ), KV_INVALID);
    kv_engine_leave(engine, &held.op);
    kv_thread_join(thread);
    CHECK_STATUS(waiter.status, KV_OK);
    kv_handle_rele(waiter.handle);
}

static const test_t tests[] = {
    TEST(of_the_runnable_higher_priority_runs_first),
    TEST(tasks_that_read_run_at_the_same_time),
    TEST(without_a_first_thread_the_task_is_refused),
    TEST(without_more_threads_one_does_the_work),
    TEST(a_task_that_leave_made_runnable_finds_a_thread),
    TEST(callers_that_read_are_inside_together),
    TEST(stop_waits_for_what_another_thread_makes_runnable),
    TEST(stop_with_a_deadline_gives_up_what_cannot_run),
    TEST(taking_a_notification_back_waits_until_it_has_returned),
    TEST(a_seed_gives_the_stepping_engine_its_order),
    TEST(of_callbacks_that_wait_in_a_circle_one_is_refused),
    TEST(a_circle_through_an_operation_on_two_variables_is_found),
    TEST(a_reader_behind_a_reader_that_waits_for_it_is_not_refused),
    TEST(a_writer_waits_for_every_reader_before_it),
    TEST(a_circle_through_a_handle_is_found),
};
TEST_MAIN(tests)
