/* What optimizers in Python keep on a server, as files have it: set, taken by a round, packed for
 * those who ask, refused. The thread that serves is the test's own. */
#include "comm/slots.h"
#include "ps_peers.h"

enum { SGD = 5, OWN = 6, LONG_BYTES = 3 << 20 };

typedef struct fake_kept {
    kv_server_kept_t base; /* first */
    _Atomic int drops;
} fake_kept_t;

static void drop_kept(kv_server_kept_t *kept)
{
    atomic_fetch_add(&((fake_kept_t *)kept)->drops, 1);
}

static cluster_t *start(int32_t num_workers)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = num_workers});
    kv_optim_numbers_t numbers = {.learning_rate = 1, .rescale_grad = 1, .clip_gradient = NAN};
    CHECK_STATUS(
        kv_server_add_optimizer(cluster->server, SGD, 1, kv_optim_class_find("sgd"), &numbers),
        KV_OK);
    numbers.python = 77;
    CHECK_STATUS(kv_server_add_optimizer(cluster->server, OWN, 1, kv_optim_python(), &numbers),
                 KV_OK);
    return cluster;
}

/* A first value of four zeros that brings its key along. */
static void init_named(cluster_t *cluster, uint64_t request)
{
    kv_wire_key_t key = {.name = {.text = "w", .bytes = 1}, .dtype = KV_FLOAT32, .ndim = 1};
    unsigned char data[256] = {0};
    size_t bytes = 4 * sizeof(float), own = kv_wire_key_bytes(&key);
    key.shape[0] = 4;
    own = kv_wire_key_bytes(&key);
    kv_wire_put_key(&key, data + bytes);
    kv_wire_record_t record = floats(KV_WIRE_INIT, request, 0, 4, 4);
    record.t = 1;
    record.own = own;
    record.bytes = bytes + own;
    send_one(cluster, 0, record, data);
    check_done(cluster, 0, request);
}

static kv_wire_record_t with_step(kv_wire_record_t record, uint64_t optimizer, int64_t t)
{
    kv_step_t step = {.optim = kv_optim_python(), .lr = 1, .t = t};
    kv_wire_put_step(&record, optimizer, &step);
    return record;
}

static void ask(cluster_t *cluster, int32_t worker, uint64_t request, uint64_t round,
                uint64_t optimizer, unsigned slot)
{
    kv_wire_record_t record = floats(KV_WIRE_GET_STATE, request, 0, round, 0);
    record.optimizer = optimizer;
    record.slot = (uint16_t)slot;
    send_many(cluster, worker, KV_WIRE_PULL, 1, &record, NULL);
}

/* Sets so many bytes, all of them `fill`, as of count `t`. */
static void set(cluster_t *cluster, uint64_t request, uint64_t optimizer, int64_t t, size_t bytes,
                int fill)
{
    kv_wire_record_t record = with_step(floats(KV_WIRE_SET_STATE, request, 0, 0, 0), optimizer, t);
    char *data = malloc(bytes);
    memset(data, fill, bytes);
    record.slot = KV_SLOT_OBJECT;
    record.bytes = bytes;
    record.flags |= bytes > KV_WIRE_SLICE_BYTES ? KV_WIRE_WHOLE : 0;
    send_one(cluster, 0, record, data);
    free(data);
}

static void check_object(cluster_t *cluster, int32_t worker, uint64_t request, uint64_t t,
                         size_t bytes, int fill)
{
    const answer_t *answer = await(cluster, worker, request);
    CHECK_EQ(answer->record.status, KV_OK);
    CHECK_EQ(answer->record.flags, KV_WIRE_WHOLE);
    CHECK_EQ(answer->record.t, t);
    if (CHECK_EQ(answer->bytes, bytes) && bytes > 0)
        CHECK(answer->data[0] == fill && answer->data[bytes - 1] == fill);
}

static void push_own(cluster_t *cluster, int32_t worker, uint64_t request, uint64_t round,
                     int64_t t)
{
    push(cluster, worker, with_step(floats(KV_WIRE_PUSH, request, 0, round, 4), OWN, t), 1);
}

static bool next(cluster_t *cluster, kv_server_update_t *update)
{
    test_caller_t caller = make_caller(30 * SECOND_NS);
    bool found = false;
    CHECK_STATUS(kv_server_next_update(cluster->server, &caller.base, update, &found), KV_OK);
    return CHECK(found);
}

/* Ends a round well: what a file had is kept now. */
static void end_round(cluster_t *cluster, kv_server_update_t *update, fake_kept_t *kept)
{
    kv_buffer_rele(update->loaded);
    update->loaded = NULL;
    update->kept = kept != NULL ? &kept->base : NULL;
    kv_server_end_update(cluster->server, update, NULL);
}

static void end_packing(cluster_t *cluster, kv_server_update_t *update, size_t bytes, int fill)
{
    CHECK(update->reads);
    CHECK(update->recv == NULL && update->stored == NULL && update->loaded == NULL);
    if (CHECK_STATUS(kv_buffer_new(bytes, &update->packed), KV_OK))
        memset(update->packed->data, fill, bytes);
    kv_server_end_update(cluster->server, update, NULL);
}

/* One push of each worker, and the round's end. */
static void train(cluster_t *cluster, uint64_t request, uint64_t round, int64_t t,
                  fake_kept_t *kept)
{
    kv_server_update_t update;
    for (int32_t i = 0; i < cluster->num_workers; i++)
        push_own(cluster, i, request, round, t);
    if (!next(cluster, &update))
        return;
    CHECK(!update.reads);
    end_round(cluster, &update, kept);
    for (int32_t i = 0; i < cluster->num_workers; i++)
        check_done(cluster, i, request);
}

/* ----------------------------------------------------------------------------------- what is set
 */

static void what_is_set_is_read_and_taken_by_a_round_for(size_t bytes)
{
    cluster_t *cluster = start(1);
    fake_kept_t kept = {.base.drop = drop_kept};
    kv_server_update_t update;
    init_named(cluster, 1);
    ask(cluster, 0, 2, 0, OWN, KV_SLOT_OBJECT);
    check_object(cluster, 0, 2, 0, 0, 0);
    set(cluster, 3, OWN, 7, bytes, 'a');
    check_done(cluster, 0, 3);
    ask(cluster, 0, 4, 0, OWN, KV_SLOT_OBJECT);
    check_object(cluster, 0, 4, 7, bytes, 'a');
    /* A round that cannot take it leaves it. */
    push_own(cluster, 0, 5, 0, 8);
    if (next(cluster, &update)) {
        CHECK(update.kept == NULL);
        CHECK(update.loaded != NULL && update.loaded->bytes == bytes);
        kv_server_end_update(cluster->server, &update,
                             kv_error_capture(kv_fail(KV_INVALID, "not this time")));
    }
    check_failed(cluster, 0, 5, KV_INVALID, "not this time");
    ask(cluster, 0, 6, 1, OWN, KV_SLOT_OBJECT);
    check_object(cluster, 0, 6, 8, bytes, 'a');
    push_own(cluster, 0, 7, 1, 9);
    if (next(cluster, &update)) {
        CHECK(update.loaded != NULL && ((char *)update.loaded->data)[bytes - 1] == 'a');
        end_round(cluster, &update, &kept);
    }
    check_done(cluster, 0, 7);
    /* From now on it is what the optimizer keeps; the next one replaces that. */
    ask(cluster, 0, 8, 2, OWN, KV_SLOT_OBJECT);
    if (next(cluster, &update)) {
        CHECK(update.kept == &kept.base);
        CHECK_EQ(update.t, 9);
        end_packing(cluster, &update, bytes + 1, 'b');
    }
    check_object(cluster, 0, 8, 9, bytes + 1, 'b');
    CHECK_EQ(atomic_load(&kept.drops), 0);
    set(cluster, 9, OWN, 3, 5, 'c');
    check_done(cluster, 0, 9);
    CHECK_EQ(atomic_load(&kept.drops), 1);
    ask(cluster, 0, 10, 2, OWN, KV_SLOT_OBJECT);
    check_object(cluster, 0, 10, 3, 5, 'c');
    /* Without an optimizer everything goes. */
    kv_wire_record_t none = floats(KV_WIRE_SET_STATE, 11, 0, 2, 0);
    none.slot = KV_SLOT_NONE;
    push(cluster, 0, none, 0);
    check_done(cluster, 0, 11);
    ask(cluster, 0, 12, 2, OWN, KV_SLOT_OBJECT);
    check_object(cluster, 0, 12, 0, 0, 0);
    cluster_end(cluster);
}

static void what_is_set_is_read_and_taken_by_a_round(void)
{
    what_is_set_is_read_and_taken_by_a_round_for(3);
    what_is_set_is_read_and_taken_by_a_round_for(LONG_BYTES);
}

/* ------------------------------------------------------------------------------- what is packed */

static void all_who_ask_get_what_is_packed_once(void)
{
    cluster_t *cluster = start(2);
    fake_kept_t kept = {.base.drop = drop_kept};
    kv_server_update_t update;
    init_named(cluster, 1);
    train(cluster, 2, 0, 1, &kept);
    ask(cluster, 0, 3, 1, OWN, KV_SLOT_OBJECT);
    if (next(cluster, &update)) {
        ask(cluster, 1, 4, 1, OWN, KV_SLOT_OBJECT);
        ask(cluster, 1, 5, 1, SGD, 0);
        ask(cluster, 1, 6, 1, OWN, KV_SLOT_NONE);
        push_own(cluster, 0, 7, 1, 2); /* waits, as the next round does */
        push_own(cluster, 1, 7, 1, 2);
        pull(cluster, 1, 8, 0, 1); /* does not */
        check_floats(await(cluster, 1, 8), 4, 0);
        WAIT_UNTIL(counters_of(cluster).waiting == 6);
        end_packing(cluster, &update, 9, 'x');
    }
    check_object(cluster, 0, 3, 1, 9, 'x');
    check_object(cluster, 1, 4, 1, 9, 'x');
    CHECK_EQ(await(cluster, 1, 5)->record.t, 0);
    CHECK_EQ(await(cluster, 1, 6)->record.t, 1);
    if (next(cluster, &update))
        end_round(cluster, &update, &kept);
    check_done(cluster, 0, 7);
    check_done(cluster, 1, 7);
    cluster_end(cluster);
    CHECK_EQ(atomic_load(&kept.drops), 1);
}

static void what_cannot_be_packed_is_told_and_stays(void)
{
    cluster_t *cluster = start(1);
    fake_kept_t kept = {.base.drop = drop_kept};
    kv_server_update_t update;
    init_named(cluster, 1);
    train(cluster, 2, 0, 1, &kept);
    ask(cluster, 0, 3, 1, OWN, KV_SLOT_OBJECT);
    if (next(cluster, &update))
        kv_server_end_update(cluster->server, &update,
                             kv_error_capture(kv_fail(KV_BAD_TYPE, "a set is no array")));
    check_failed(cluster, 0, 3, KV_BAD_TYPE, "a set is no array");
    ask(cluster, 0, 4, 1, OWN, KV_SLOT_OBJECT);
    if (next(cluster, &update))
        end_packing(cluster, &update, 1, 'y');
    check_object(cluster, 0, 4, 1, 1, 'y');
    cluster_end(cluster);
    CHECK_EQ(atomic_load(&kept.drops), 1);
}

/* Nobody waits for it any more, or there is nothing left of the server. */
static void deletes_deadlines_and_the_end_do_not_mind(void)
{
    for (int i = 0; i < 4; i++) {
        cluster_t *cluster = start(1);
        fake_kept_t kept = {.base.drop = drop_kept};
        kv_server_update_t update;
        init_named(cluster, 1);
        train(cluster, 2, 0, 1, &kept);
        cluster->timeout_ms = i == 0 ? 100 : 0;
        ask(cluster, 0, 3, 1, OWN, KV_SLOT_OBJECT);
        if (!next(cluster, &update)) {
            cluster_end(cluster);
            continue;
        }
        cluster->timeout_ms = 0;
        if (i == 0) {
            check_failed(cluster, 0, 3, KV_TIMEOUT,
                         "what an optimizer in Python keeps with it is not packed yet");
            end_packing(cluster, &update, 1, 'z');
        } else if (i == 1) {
            drop(cluster, 0, 4, 1);
            WAIT_UNTIL(counters_of(cluster).waiting == 2);
            end_packing(cluster, &update, 1, 'z');
            check_object(cluster, 0, 3, 1, 1, 'z');
            check_done(cluster, 0, 4);
            CHECK_EQ(atomic_load(&kept.drops), 1);
        } else if (i == 2) {
            kv_server_lose(cluster->server, "somebody is gone");
            check_failed(cluster, 0, 3, KV_PEER_LOST, "somebody is gone");
            end_packing(cluster, &update, 1, 'z');
        } else {
            kv_server_stop(cluster->server);
            end_packing(cluster, &update, 1, 'z');
        }
        cluster_end(cluster);
        CHECK_EQ(atomic_load(&kept.drops), 1);
    }
}

/* --------------------------------------------------------------------------------- what is wrong
 */

static void what_makes_no_object_is_refused(void)
{
    cluster_t *cluster = start(1);
    init_named(cluster, 1);
    set(cluster, 2, SGD, 1, 3, 'a');
    check_failed(cluster, 0, 2, KV_INVALID, "the state of the optimizer SGD is no object");
    ask(cluster, 0, 3, 0, SGD, KV_SLOT_OBJECT);
    check_failed(cluster, 0, 3, KV_INVALID, "the state of the optimizer SGD is no object");
    kv_wire_record_t record = with_step(floats(KV_WIRE_SET_STATE, 4, 0, 0, 4), OWN, 1);
    push(cluster, 0, record, 1);
    check_failed(cluster, 0, 4, KV_INVALID, "the state of the optimizer in Python is an object");
    set(cluster, 5, 99, 1, 3, 'a');
    check_failed(cluster, 0, 5, KV_INVALID,
                 "worker 0 asks for the state of an optimizer that server 0 has not got");
    cluster_end(cluster);

    cluster = start(1);
    init(cluster, 1, 0, 4, 0); /* without a name */
    set(cluster, 2, OWN, 1, 3, 'a');
    const answer_t *answer = await(cluster, 0, 2);
    CHECK_EQ(answer->record.status, KV_INVALID);
    CHECK(strstr(answer->data, "its name is longer than") != NULL);
    cluster_end(cluster);
}

static const test_t tests[] = {
    TEST(what_is_set_is_read_and_taken_by_a_round), TEST(all_who_ask_get_what_is_packed_once),
    TEST(what_cannot_be_packed_is_told_and_stays),  TEST(deletes_deadlines_and_the_end_do_not_mind),
    TEST(what_makes_no_object_is_refused),
};

TEST_MAIN(tests)
