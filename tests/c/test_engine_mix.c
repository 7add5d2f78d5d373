/* A mixture of everything that several threads can do to an engine at once; no access may be lost
 * or overlap another, and every variable is freed once. */
#include "engine_jobs.h"

enum { NUM_SLOTS = 4, NUM_MIXERS = 4, NUM_ROUNDS = 1500 };

/* Two numbers that only operations on the variable touch; equal whenever nobody writes. */
typedef struct cell {
    kv_var_t var;
    int64_t first, second;
    struct mix *mix;
} cell_t;

typedef struct mix {
    kv_engine_t *engine;
    kv_mutex_t lock;
    cell_t *slots[NUM_SLOTS];
    _Atomic int64_t written, found, made, freed;
    _Atomic uint64_t seed; /* of the next thread */
} mix_t;

static void cell_free(void *context)
{
    cell_t *cell = context;
    CHECK_EQ(cell->first, cell->second);
    atomic_fetch_add(&cell->mix->found, cell->first);
    atomic_fetch_add(&cell->mix->freed, 1);
    kv_free(cell);
}

static cell_t *cell_new(mix_t *mix)
{
    cell_t *cell = kv_calloc(1, sizeof *cell);
    cell->mix = mix;
    kv_var_init(&cell->var, true, cell_free, cell);
    atomic_fetch_add(&mix->made, 1);
    return cell;
}

static void cell_write(void *context)
{
    cell_t *cell = context;
    cell->first++;
    atomic_fetch_add(&cell->mix->written, 1);
    cell->second++;
}

static void cell_read(void *context)
{
    cell_t *cell = context;
    CHECK_EQ(cell->first, cell->second);
}

/* A pinned cell. Now and then another takes its place. */
static cell_t *cell_take(mix_t *mix, int slot, bool replace)
{
    cell_t *old = NULL;
    kv_mutex_lock(&mix->lock);
    cell_t *cell = mix->slots[slot];
    if (replace) {
        old = cell;
        cell = mix->slots[slot] = cell_new(mix);
    }
    kv_var_pin(&cell->var);
    kv_mutex_unlock(&mix->lock);
    if (old != NULL)
        kv_var_retire(&old->var);
    return cell;
}

static void mix_caller(mix_t *mix, cell_t *a, cell_t *b, kv_access_t access, int64_t timeout_ns)
{
    test_caller_t caller = make_caller(timeout_ns);
    kv_dep_t deps[] = {{.var = &a->var, .access = access}, {.var = &b->var, .access = access}};
    kv_op_t op;
    kv_op_init(&op, deps, 2, 0);
    kv_status_t status = kv_engine_enter(mix->engine, &op, &caller.base);
    if (status != KV_OK) {
        CHECK(status == KV_TIMEOUT);
        return;
    }
    void (*body)(void *context) = access == KV_READ ? cell_read : cell_write;
    body(a);
    if (a != b)
        body(b);
    kv_engine_leave(mix->engine, &op);
}

static void mix_task(mix_t *mix, cell_t *cell, kv_access_t access, bool wait)
{
    kv_handle_t *handle = NULL;
    job_t *job = job_new(0, NULL);
    job->body = access == KV_READ ? cell_read : cell_write;
    job->context = cell;
    if (wait)
        CHECK_STATUS(kv_handle_new(mix->engine, 1, &handle), KV_OK);
    CHECK_STATUS(job_submit(mix->engine, job, &cell->var, access, NULL, KV_READ, 0, handle), KV_OK);
    if (wait) {
        test_caller_t caller = patient();
        CHECK_STATUS(kv_handle_wait(handle, &caller.base), KV_OK);
        kv_handle_rele(handle);
    }
}

static void *mixer(void *context)
{
    mix_t *mix = context;
    uint64_t state = atomic_fetch_add(&mix->seed, 1);
    for (int round = 0; round < NUM_ROUNDS; round++) {
        int64_t choice = test_between(&state, 0, 9);
        kv_access_t access = test_between(&state, 0, 1) ? KV_READ : KV_WRITE;
        cell_t *a = cell_take(mix, (int)test_between(&state, 0, NUM_SLOTS - 1), choice == 0);
        cell_t *b = cell_take(mix, (int)test_between(&state, 0, NUM_SLOTS - 1), false);
        if (choice < 5)
            mix_caller(mix, a, b, access, choice < 3 ? 60 * SECOND_NS : 20 * 1000);
        else
            mix_task(mix, a, access, choice == 9);
        kv_var_unpin(&a->var);
        kv_var_unpin(&b->var);
    }
    return NULL;
}

ON_EACH_ENGINE(in_a_mixture_of_everything_nothing_overlaps_or_is_lost)
{
    mix_t mix = {.engine = engine};
    kv_thread_t threads[NUM_MIXERS];
    kv_mutex_init(&mix.lock, KV_RANK_STORE);
    for (int i = 0; i < NUM_SLOTS; i++)
        mix.slots[i] = cell_new(&mix);
    for (int i = 0; i < NUM_MIXERS; i++)
        CHECK_STATUS(kv_thread_start(&threads[i], "mixer", mixer, &mix), KV_OK);
    for (int i = 0; i < NUM_MIXERS; i++)
        kv_thread_join(threads[i]);
    for (int i = 0; i < NUM_SLOTS; i++)
        kv_var_retire(&mix.slots[i]->var);
    CHECK_STATUS(wait_all(engine), KV_OK);
    CHECK(mix.written > 0);
    CHECK_EQ(mix.found, mix.written);
    CHECK_EQ(mix.freed, mix.made);
    kv_mutex_fini(&mix.lock);
}

static const test_t tests[] = {
    TEST(in_a_mixture_of_everything_nothing_overlaps_or_is_lost),
};
TEST_MAIN(tests)
