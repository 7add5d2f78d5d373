/* What the tests of the engine share: an engine for the length of a test, callers, jobs (tasks that
 * write a log or stop at a gate), and waiting for a state of the queues without a clock. */
#ifndef KV_TESTS_C_ENGINE_JOBS_H
#define KV_TESTS_C_ENGINE_JOBS_H

#include "test.h"
#include "engine/internal.h"
#include <sched.h>
#include <string.h>

#define SECOND_NS (1000 * INT64_C(1000000))

enum { MAX_JOB_DEPS = 4, MAX_LOG = 4096 };

/* -------------------------------------------------------------------------------- callers */

typedef struct test_caller {
    kv_caller_t base;
    int num_detached, num_polls;
    kv_status_t poll_status;
    void (*on_poll)(void *context); /* once */
    void *context;
} test_caller_t;

static inline void caller_detach(kv_caller_t *caller)
{
    ((test_caller_t *)caller)->num_detached++;
}

static inline void caller_attach(kv_caller_t *caller)
{
    (void)caller;
}

static inline kv_status_t caller_poll(kv_caller_t *base)
{
    test_caller_t *caller = (test_caller_t *)base;
    CHECK(base->detached);
    caller->num_polls++;
    void (*on_poll)(void *context) = caller->on_poll;
    caller->on_poll = NULL;
    if (on_poll != NULL)
        on_poll(caller->context);
    return caller->poll_status;
}

static inline test_caller_t make_caller(int64_t timeout_ns)
{
    return (test_caller_t){
        .base = {caller_detach, caller_attach, caller_poll, .timeout_ns = timeout_ns}};
}

/* A caller that would rather fail the test than wait for ever. */
static inline test_caller_t patient(void)
{
    return make_caller(60 * SECOND_NS);
}

/* --------------------------------------------------------------------------------- engines */

static inline kv_engine_t *engine_start(const char *name, int num_threads)
{
    kv_engine_t *engine = NULL;
    CHECK_STATUS(kv_engine_new(name, 1, num_threads, &engine), KV_OK);
    return engine;
}

static inline void engine_end(kv_engine_t *engine)
{
    kv_engine_close(engine);
    kv_engine_stop(engine, NULL);
    kv_engine_free(engine);
}

/* A claim about all engines, as one test. */
static const char *const engine_names[] = {"threaded", "naive", "stepping"};
enum { NUM_ENGINES = 3 };

#define ON_EACH_ENGINE(claim)                                                                      \
    static void claim##_on(kv_engine_t *engine);                                                   \
    static void claim(void)                                                                        \
    {                                                                                              \
        for (int i = 0; i < NUM_ENGINES; i++) {                                                    \
            int failures = atomic_load(&test_failures);                                            \
            kv_engine_t *engine = engine_start(engine_names[i], 2);                                \
            if (engine == NULL)                                                                    \
                continue;                                                                          \
            claim##_on(engine);                                                                    \
            engine_end(engine);                                                                    \
            if (atomic_load(&test_failures) != failures)                                           \
                printf("    on the %s engine\n", engine_names[i]);                                 \
        }                                                                                          \
    }                                                                                              \
    static void claim##_on(kv_engine_t *engine)

static inline kv_status_t wait_all(kv_engine_t *engine)
{
    test_caller_t caller = patient();
    return kv_engine_wait_all(engine, &caller.base);
}

/* Enters with one variable and leaves again. */
static inline kv_status_t touch(kv_engine_t *engine, kv_var_t *var, kv_access_t access)
{
    test_caller_t caller = patient();
    kv_dep_t dep = {.var = var, .access = access};
    kv_op_t op;
    kv_op_init(&op, &dep, 1, 0);
    kv_status_t status = kv_engine_enter(engine, &op, &caller.base);
    if (status == KV_OK)
        kv_engine_leave(engine, &op);
    CHECK(!caller.base.detached);
    return status;
}

static inline bool has_deadline_passed(int64_t start)
{
    sched_yield();
    return !CHECK(kv_clock_ns() - start < 60 * SECOND_NS);
}

/* Lets the other threads go on until the expression holds. */
#define WAIT_UNTIL(expression)                                                                     \
    for (int64_t wait_start = kv_clock_ns(); !(expression) && !has_deadline_passed(wait_start);)

static inline int num_queued(kv_engine_t *engine, const kv_var_t *var)
{
    int count = 0;
    kv_mutex_lock(&engine->lock);
    for (const kv_dep_t *dep = var->head; dep != NULL; dep = dep->next)
        count++;
    kv_engine_unlock(engine);
    return count;
}

/* ----------------------------------------------------------------------------------- gates */

/* Who passes says that it is there, and stays until the gate is opened. */
typedef struct gate {
    _Atomic int arrived;
    _Atomic bool open;
} gate_t;

static inline void gate_pass(gate_t *gate)
{
    atomic_fetch_add(&gate->arrived, 1);
    WAIT_UNTIL(atomic_load(&gate->open));
}

/* ------------------------------------------------------------------------------------ jobs */

typedef struct job_log {
    _Atomic int count;
    int ids[MAX_LOG];
} job_log_t;

typedef struct job {
    kv_op_t op; /* first */
    kv_dep_t deps[MAX_JOB_DEPS];
    int id;
    job_log_t *log;      /* may be NULL, as all that follow */
    gate_t *gate;        /* passed before anything else */
    const char *failure; /* KV_DEVICE with this sentence */
    void (*body)(void *context);
    void *context;
} job_t;

static inline void log_add(job_log_t *log, int id)
{
    int place = atomic_fetch_add(&log->count, 1);
    if (CHECK(place < MAX_LOG))
        log->ids[place] = id;
}

static inline kv_status_t job_run(kv_op_t *op)
{
    job_t *job = (job_t *)op;
    if (job->gate != NULL)
        gate_pass(job->gate);
    if (job->failure != NULL)
        return kv_fail(KV_DEVICE, "%s", job->failure);
    if (job->log != NULL)
        log_add(job->log, job->id);
    if (job->body != NULL)
        job->body(job->context);
    return KV_OK;
}

static inline void job_finish(kv_op_t *op)
{
    kv_handle_rele(op->handle);
    kv_free(op);
}

/* NULL when there is no memory. */
static inline job_t *job_new(int id, job_log_t *log)
{
    job_t *job = kv_calloc(1, sizeof *job);
    if (job != NULL) {
        job->id = id;
        job->log = log;
    }
    return job;
}

/* Submits a job on up to two variables (`b` may be NULL). */
static inline kv_status_t job_submit(kv_engine_t *engine, job_t *job, kv_var_t *a,
                                     kv_access_t access_a, kv_var_t *b, kv_access_t access_b,
                                     int32_t priority, kv_handle_t *handle)
{
    job->deps[0] = (kv_dep_t){.var = a, .access = access_a};
    job->deps[1] = (kv_dep_t){.var = b, .access = access_b};
    kv_op_init(&job->op, job->deps, b != NULL ? 2 : 1, priority);
    job->op.run = job_run;
    job->op.finish = job_finish;
    job->op.handle = handle != NULL ? kv_handle_hold(handle) : NULL;
    kv_status_t status = kv_engine_submit(engine, &job->op);
    if (status != KV_OK)
        job_finish(&job->op);
    return status;
}

/* A job that writes its number to the log. */
static inline void submit_log(kv_engine_t *engine, int id, job_log_t *log, kv_var_t *var,
                              kv_access_t access, kv_handle_t *handle)
{
    CHECK_STATUS(job_submit(engine, job_new(id, log), var, access, NULL, KV_READ, 0, handle),
                 KV_OK);
}

static inline void submit_failing(kv_engine_t *engine, const char *sentence, kv_var_t *var,
                                  kv_handle_t *handle)
{
    job_t *job = job_new(0, NULL);
    job->failure = sentence;
    CHECK_STATUS(job_submit(engine, job, var, KV_WRITE, NULL, KV_READ, 0, handle), KV_OK);
}

static inline void check_log(job_log_t *log, int count)
{
    CHECK_EQ(atomic_load(&log->count), count);
    for (int i = 0; i < count; i++)
        CHECK_EQ(log->ids[i], i);
}

/* Waits for a handle and gives its error, NULL if it has none. */
static inline const char *handle_error(kv_handle_t *handle)
{
    test_caller_t caller = patient();
    CHECK_STATUS(kv_handle_wait(handle, &caller.base), KV_OK);
    kv_error_t *error = kv_handle_error(handle);
    return error != NULL ? error->message : "none";
}

static inline kv_handle_t *handle_new(kv_engine_t *engine, int64_t num_tasks)
{
    kv_handle_t *handle = NULL;
    CHECK_STATUS(kv_handle_new(engine, num_tasks, &handle), KV_OK);
    return handle;
}

/* A variable held by this thread without the lock. */
typedef struct held {
    kv_engine_t *engine;
    kv_op_t op;
    kv_dep_t dep;
    int64_t until_ns; /* for who leaves later */
} held_t;

static inline void hold(held_t *held, kv_engine_t *engine, kv_var_t *var)
{
    *held = (held_t){.engine = engine, .dep = {.var = var, .access = KV_WRITE}};
    kv_op_init(&held->op, &held->dep, 1, 0);
    CHECK(kv_engine_try_enter(engine, &held->op));
}

static inline void count_free(void *context)
{
    atomic_fetch_add((_Atomic int *)context, 1);
}

/* --------------------------------------------------------------------------------- threads */

/* A caller-run operation on one variable in a thread of its own. */
typedef struct helper {
    kv_engine_t *engine;
    kv_var_t *var;
    kv_access_t access;
    test_caller_t caller;
    gate_t *inside; /* passed while the variable is held; may be NULL */
    kv_status_t status;
    char message[KV_MESSAGE_BYTES];
    kv_thread_t thread;
} helper_t;

static inline void *helper_body(void *context)
{
    helper_t *helper = context;
    kv_dep_t dep = {.var = helper->var, .access = helper->access};
    kv_op_t op;
    kv_op_init(&op, &dep, 1, 0);
    helper->status = kv_engine_enter(helper->engine, &op, &helper->caller.base);
    if (helper->status == KV_OK) {
        if (helper->inside != NULL)
            gate_pass(helper->inside);
        kv_engine_leave(helper->engine, &op);
    } else {
        snprintf(helper->message, sizeof helper->message, "%s", kv_status_message(helper->status));
    }
    return NULL;
}

static inline void helper_start(helper_t *helper, kv_engine_t *engine, kv_var_t *var,
                                kv_access_t access, test_caller_t caller)
{
    *helper = (helper_t){
        .engine = engine, .var = var, .access = access, .caller = caller, .inside = helper->inside};
    CHECK_STATUS(kv_thread_start(&helper->thread, "helper", helper_body, helper), KV_OK);
}

#endif
