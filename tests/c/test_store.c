/* The store from plain C: what Python's tests cannot see, and that kv.h is enough without Python.
 */
#include "test.h"

#include "kv.h"
#include <stdlib.h>

static void nothing(kv_caller_t *caller)
{
    (void)caller;
}

static kv_status_t never(kv_caller_t *caller)
{
    (void)caller;
    return KV_OK;
}

static kv_caller_t caller_for_ms(int64_t timeout_ms)
{
    return (kv_caller_t){
        .detach = nothing, .attach = nothing, .poll = never, .timeout_ns = timeout_ms * 1000000};
}

typedef struct fixture {
    kv_runtime_t *runtime;
    kv_store_t *store;
    kv_caller_t caller;
} fixture_t;

static bool setup(fixture_t *f, const char *kind)
{
    kv_store_options_t options = {0};
    f->caller = caller_for_ms(10000);
    return CHECK_STATUS(kv_runtime_new(&f->runtime), KV_OK) &&
           CHECK_STATUS(kv_store_new(f->runtime, kind, &options, &f->store), KV_OK);
}

static void teardown(fixture_t *f)
{
    kv_store_free(f->store);
    kv_runtime_stop(f->runtime, NULL);
    kv_runtime_free(f->runtime);
}

static kv_name_t text(const char *name)
{
    return (kv_name_t){.text = name, .bytes = strlen(name)};
}

static kv_view_t view(kv_dtype_t dtype, void *data, const int64_t *extent)
{
    return (kv_view_t){
        .data = data, .shape = extent, .count = *extent, .ndim = 1, .dtype = (uint8_t)dtype};
}

/* A call on one key. */
typedef kv_status_t call_fn(kv_store_t *store, kv_call_t *call, kv_caller_t *caller);

static kv_status_t one(fixture_t *f, call_fn *fn, kv_name_t name, int32_t num_values,
                       const kv_view_t *values, int32_t num_outs, const kv_view_t *outs)
{
    kv_item_t item = {name, num_values, num_outs, values, outs};
    kv_call_t call = {.items = &item,
                      .num_items = 1,
                      .values = values,
                      .outs = outs,
                      .num_values = num_values,
                      .num_outs = num_outs};
    return fn(f->store, &call, &f->caller);
}

static void a_thousand_keys_survive_growth_and_deletion(void)
{
    fixture_t f;
    if (!setup(&f, "local"))
        return;
    int64_t extent = 1;
    uint64_t seed = 7;
    bool there[1000] = {false};
    for (int round = 0; round < 20000; round++) {
        int64_t number = (int64_t)(test_random(&seed) % 1000);
        kv_name_t name = {.number = number};
        if (!there[number]) {
            kv_view_t value = view(KV_INT64, &number, &extent);
            CHECK_STATUS(one(&f, kv_store_init, name, 1, &value, 0, NULL), KV_OK);
        } else {
            kv_item_t item = {.name = name};
            CHECK_STATUS(
                kv_store_delete(f.store, &(kv_call_t){.items = &item, .num_items = 1}, &f.caller),
                KV_OK);
        }
        there[number] = !there[number];
    }
    int64_t num_there = 0, num_names;
    for (int64_t i = 0; i < 1000; i++) {
        kv_name_t name = {.number = i};
        CHECK_EQ(kv_store_contains(f.store, &name), there[i]);
        num_there += there[i];
        if (there[i]) {
            int64_t number = -1;
            kv_view_t out = view(KV_INT64, &number, &extent);
            CHECK_STATUS(one(&f, kv_store_pull, name, 0, NULL, 1, &out), KV_OK);
            CHECK_EQ(number, i);
        }
    }
    kv_name_t *names;
    if (CHECK_STATUS(kv_store_keys(f.store, &names, &num_names), KV_OK)) {
        CHECK_EQ(num_names, num_there);
        kv_free(names);
    }
    teardown(&f);
}

static kv_status_t halve(kv_updater_t *updater, const kv_update_t *update, kv_caller_t *caller)
{
    (void)updater;
    (void)caller;
    float *stored = update->stored->data;
    const float *recv = update->recv->data;
    for (int64_t i = 0; i < update->shape[0]; i++)
        stored[i] = (stored[i] + recv[i]) / 2;
    return KV_OK;
}

static void free_static(kv_updater_t *updater)
{
    atomic_store(&updater->refs, -1);
}

static void an_updater_in_c_runs_and_is_freed_once(void)
{
    fixture_t f;
    if (!setup(&f, "device"))
        return;
    int64_t extent = 3;
    float start[3] = {0, 2, 4}, grad[3] = {2, 2, 2}, out[3];
    kv_view_t value = view(KV_FLOAT32, start, &extent), result = view(KV_FLOAT32, out, &extent);
    CHECK_STATUS(one(&f, kv_store_init, text("w"), 1, &value, 0, NULL), KV_OK);
    kv_updater_t updater = {.refs = 1, .run = halve, .free = free_static};
    CHECK_STATUS(kv_store_set_updater(f.store, &updater), KV_OK);
    value.data = grad;
    CHECK_STATUS(one(&f, kv_store_push, text("w"), 1, &value, 1, &result), KV_OK);
    CHECK(out[0] == 1 && out[1] == 2 && out[2] == 3);
    CHECK(grad[0] == 2);
    CHECK_EQ(atomic_load(&updater.refs), 1);
    CHECK_STATUS(kv_store_set_updater(f.store, NULL), KV_OK);
    CHECK_EQ(atomic_load(&updater.refs), -1);
    teardown(&f);
}

typedef struct counted_hold {
    kv_hold_t base;
    _Atomic int released;
} counted_hold_t;

static void count_release(kv_hold_t *hold)
{
    atomic_fetch_add(&((counted_hold_t *)hold)->released, 1);
}

static void an_asynchronous_call_releases_its_hold_once(void)
{
    enum { N = 1 << 20 };
    fixture_t f;
    if (!setup(&f, "local"))
        return;
    int64_t extent = N;
    float *values = calloc(N, sizeof *values), *outs = calloc(N, sizeof *outs);
    if (!CHECK(values != NULL && outs != NULL))
        return;
    kv_view_t value = view(KV_FLOAT32, values, &extent), out = view(KV_FLOAT32, outs, &extent);
    CHECK_STATUS(one(&f, kv_store_init, text("w"), 1, &value, 0, NULL), KV_OK);
    values[N - 1] = 5;
    counted_hold_t hold = {.base = {.refs = 1, .release = count_release}};
    kv_handle_t *handle = NULL;
    kv_item_t item = {text("w"), 1, 1, &value, &out};
    kv_call_t call = {.items = &item,
                      .num_items = 1,
                      .values = &value,
                      .outs = &out,
                      .num_values = 1,
                      .num_outs = 1,
                      .async = true,
                      .hold = &hold.base,
                      .handle = &handle};
    CHECK_STATUS(kv_store_push(f.store, &call, &f.caller), KV_OK);
    CHECK(call.checked && handle != NULL);
    CHECK_STATUS(kv_handle_wait(handle, &f.caller), KV_OK);
    CHECK(kv_handle_error(handle) == NULL);
    CHECK(outs[N - 1] == 5);
    kv_handle_rele(handle);
    CHECK_STATUS(kv_engine_wait_all(f.runtime->engine, &f.caller), KV_OK);
    CHECK_EQ(atomic_load(&hold.released), 0);
    if (atomic_fetch_sub(&hold.base.refs, 1) == 1)
        hold.base.release(&hold.base);
    CHECK_EQ(atomic_load(&hold.released), 1);
    free(values);
    free(outs);
    teardown(&f);
}

static void the_first_error_in_the_contracts_order_is_reported(void)
{
    fixture_t f;
    if (!setup(&f, "local"))
        return;
    int64_t extent = 2, other = 3;
    double wrong_type[2] = {0};
    float start[2] = {1, 2}, longer[3] = {0};
    kv_view_t value = view(KV_FLOAT32, start, &extent);
    CHECK_STATUS(one(&f, kv_store_init, text("w"), 1, &value, 0, NULL), KV_OK);
    /* The first value has a wrong shape, the second a wrong type: the type counts first. */
    kv_view_t values[2] = {view(KV_FLOAT32, longer, &other), view(KV_FLOAT64, wrong_type, &extent)};
    CHECK_STATUS(one(&f, kv_store_push, text("w"), 2, values, 0, NULL), KV_BAD_TYPE);
    CHECK_STATUS(one(&f, kv_store_push, text("w"), 1, values, 0, NULL), KV_INVALID);
    CHECK_TEXT(kv_status_message(KV_INVALID),
               "the value of key 'w' has shape (3,), but the key has shape (2,)");
    CHECK_STATUS(one(&f, kv_store_push, text("v"), 2, values, 0, NULL), KV_NO_KEY);
    CHECK_STATUS(one(&f, kv_store_push, (kv_name_t){.number = 3}, 2, values, 0, NULL), KV_BAD_TYPE);
    kv_store_close(f.store);
    CHECK_STATUS(one(&f, kv_store_push, (kv_name_t){.number = 3}, 2, values, 0, NULL), KV_CLOSED);
    teardown(&f);
}

static void a_key_that_stands_twice_has_its_values_summed(void)
{
    fixture_t f;
    if (!setup(&f, "local"))
        return;
    int64_t extent = 1;
    int32_t numbers[4] = {1, 10, 100, 0};
    kv_view_t views[4];
    for (int i = 0; i < 4; i++)
        views[i] = view(KV_INT32, &numbers[i], &extent);
    CHECK_STATUS(one(&f, kv_store_init, text("a"), 1, &views[3], 0, NULL), KV_OK);
    CHECK_STATUS(one(&f, kv_store_init, text("b"), 1, &views[3], 0, NULL), KV_OK);
    kv_item_t items[3] = {{text("a"), 1, 0, &views[0], NULL},
                          {text("b"), 1, 0, &views[1], NULL},
                          {text("a"), 1, 0, &views[2], NULL}};
    kv_call_t call = {.items = items, .num_items = 3, .values = views, .num_values = 3};
    CHECK_STATUS(kv_store_push(f.store, &call, &f.caller), KV_OK);
    CHECK_EQ(call.num_done, 2);
    CHECK_STATUS(one(&f, kv_store_pull, text("a"), 0, NULL, 1, &views[3]), KV_OK);
    CHECK_EQ(numbers[3], 101);
    teardown(&f);
}

static void kinds_are_parsed_whole(void)
{
    kv_kind_t kind;
    CHECK_STATUS(kv_kind_parse("Dist_Device_Async", &kind), KV_OK);
    CHECK(kind.family == KV_KIND_DIST && kind.async && kind.device);
    CHECK_STATUS(kv_kind_parse("dist_asink", &kind), KV_INVALID);
    CHECK(strstr(kv_status_message(KV_INVALID), "'dist_async'") != NULL);
    CHECK_STATUS(kv_kind_parse("", &kind), KV_INVALID);
}

static const test_t TESTS[] = {
    TEST(a_thousand_keys_survive_growth_and_deletion),
    TEST(an_updater_in_c_runs_and_is_freed_once),
    TEST(an_asynchronous_call_releases_its_hold_once),
    TEST(the_first_error_in_the_contracts_order_is_reported),
    TEST(a_key_that_stands_twice_has_its_values_summed),
    TEST(kinds_are_parsed_whole),
};

TEST_MAIN(TESTS)
