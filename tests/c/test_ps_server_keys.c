/* What a server does about keys, deadlines and nodes that are gone. */
#include "ps_peers.h"

/* --------------------------------------------------------------------------------- deadlines */

static void a_deadline_says_who_is_missing(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 3});
    init(cluster, 1, 0, 4, 1);
    check_done(cluster, 0, 1);
    cluster->timeout_ms = 300;
    int64_t begin = kv_clock_ns();
    push(cluster, 0, floats(KV_WIRE_PUSHPULL, 2, 0, 0, 4), 10);
    push(cluster, 2, floats(KV_WIRE_PUSH, 2, 0, 0, 4), 30);
    pull(cluster, 2, 3, 0, 1);
    pull(cluster, 1, 4, 9, 0);
    drop(cluster, 1, 5, 0);
    kv_wire_key_t key = {.name = {.text = "w", .bytes = 1}};
    send_keys(cluster, 2, 6, 1, &key);
    check_failed(cluster, 0, 2, KV_TIMEOUT, "worker 1 has not pushed round 0");
    CHECK(kv_clock_ns() - begin >= 150 * INT64_C(1000000));
    check_failed(cluster, 2, 2, KV_TIMEOUT, "worker 1 has not pushed round 0");
    check_failed(cluster, 2, 3, KV_TIMEOUT, "worker 1 has not pushed round 0");
    check_failed(cluster, 1, 4, KV_TIMEOUT, "worker 0 has not initialised the key");
    check_failed(cluster, 1, 5, KV_TIMEOUT, "worker 0 has not deleted it");
    const answer_t *answer = await(cluster, 2, 6);
    kv_wire_key_t got;
    size_t offset = 0;
    if (CHECK_STATUS(kv_wire_get_key(answer->data, answer->bytes, &offset, &got), KV_OK)) {
        CHECK_EQ(got.status, KV_TIMEOUT);
        CHECK(memcmp(got.sentence, "worker 0 has not initialised the key", 36) == 0);
        CHECK(kv_name_equal(&got.name, &key.name));
    }
    CHECK_EQ(counters_of(cluster).waiting, 0);
    /* What was pushed stays in its round. */
    push(cluster, 1, floats(KV_WIRE_PUSHPULL, 7, 0, 0, 4), 20);
    check_floats(await(cluster, 1, 7), 4, 60);
    cluster_end(cluster);
}

/* ----------------------------------------------------------------------------------- deletes */

static void a_key_is_deleted_when_all_workers_say_so(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    init(cluster, 1, 0, 4, 1);
    init(cluster, 2, 5, LARGE, 1);
    check_done(cluster, 0, 1);
    check_done(cluster, 0, 2);
    push(cluster, 1, floats(KV_WIRE_PUSH, 3, 0, 0, 4), 1);
    pull(cluster, 1, 4, 5, 1);
    settle(cluster, 1);
    drop(cluster, 0, 5, 0);
    settle(cluster, 0);
    CHECK_EQ(counters_of(cluster).slices, 2);
    drop(cluster, 0, 6, 0);
    check_failed(cluster, 0, 6, KV_INVALID, "worker 0 is deleting it already");
    drop(cluster, 1, 7, 0);
    check_done(cluster, 0, 5);
    check_done(cluster, 1, 7);
    check_failed(cluster, 1, 3, KV_NO_KEY, "the key was deleted");
    check_failed(cluster, 1, 4, KV_NO_KEY, "the key was deleted");
    CHECK_EQ(counters_of(cluster).keys, 0);
    CHECK_EQ(counters_of(cluster).value_bytes, 0);
    init(cluster, 8, 0, 9, 3); /* anew, with another length */
    pull(cluster, 1, 9, 0, 0);
    check_floats(await(cluster, 1, 9), 9, 3);
    cluster_end(cluster);
}

static void rounds_that_all_have_pushed_come_before_a_delete(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    init(cluster, 1, 0, LARGE, 0);
    check_done(cluster, 0, 1);
    push(cluster, 0, floats(KV_WIRE_PUSHPULL, 2, 0, 0, LARGE), 1);
    drop(cluster, 0, 3, 1);
    drop(cluster, 1, 3, 1);
    settle(cluster, 1);
    CHECK_EQ(counters_of(cluster).slices, 1);
    push(cluster, 1, floats(KV_WIRE_PUSHPULL, 2, 0, 0, LARGE), 2); /* it was overtaken */
    check_floats(await(cluster, 0, 2), LARGE, 3);
    check_done(cluster, 0, 3);
    check_done(cluster, 1, 3);
    CHECK_EQ(counters_of(cluster).slices, 0);
    cluster_end(cluster);
}

static void a_delete_can_be_tried_again(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    init(cluster, 1, 0, 4, 1);
    cluster->timeout_ms = 50;
    drop(cluster, 0, 2, 0);
    check_failed(cluster, 0, 2, KV_TIMEOUT, "worker 1 has not deleted it");
    cluster->timeout_ms = 0;
    drop(cluster, 1, 4, 0); /* what has failed does not count */
    settle(cluster, 1);
    CHECK_EQ(counters_of(cluster).slices, 1);
    drop(cluster, 0, 3, 0);
    check_done(cluster, 0, 3);
    check_done(cluster, 1, 4);
    cluster_end(cluster);
}

/* --------------------------------------------------------------------------------- directory */

/* Key number `index` of a DECLARED. */
static kv_wire_key_t key_of(const answer_t *answer, int index)
{
    kv_wire_key_t key = {.status = KV_STATUS_COUNT};
    size_t offset = 0;
    CHECK_EQ(answer->kind, KV_WIRE_DECLARED);
    for (int i = 0; i <= index; i++)
        CHECK_STATUS(kv_wire_get_key(answer->data, answer->bytes, &offset, &key), KV_OK);
    return key;
}

static void check_key_failed(kv_wire_key_t key, kv_status_t status, const char *sentence)
{
    char text[KV_MESSAGE_BYTES];
    CHECK_EQ(key.status, status);
    CHECK_EQ(key.placed, 0);
    snprintf(text, sizeof text, "%.*s", (int)key.sentence_bytes,
             key.sentence != NULL ? key.sentence : "");
    CHECK_TEXT(text, sentence);
}

static void workers_learn_where_a_key_is(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 3});
    kv_wire_put_server(places, 0, 1);
    kv_wire_put_server(places, 1, 0);
    kv_wire_key_t theirs[2] = {asked("b", 4), asked("a", 4)};
    send_keys(cluster, 1, 1, 2, theirs); /* before they are there */
    settle(cluster, 1);
    CHECK_EQ(counters_of(cluster).waiting, 1);
    kv_wire_key_t ours[2] = {declared("a", 7, 4), declared("b", 8, 1)};
    ours[1].shape[0] = 4;
    ours[1].num_slices = 2;
    send_keys(cluster, 0, 1, 2, ours);
    send_keys(cluster, 2, 1, 2, theirs); /* and after */
    for (int32_t i = 0; i < 3; i++) {
        const answer_t *answer = await(cluster, i, 1);
        kv_wire_key_t a = key_of(answer, i == 0 ? 0 : 1), b = key_of(answer, i == 0 ? 1 : 0);
        CHECK(a.status == KV_OK && b.status == KV_OK && a.placed && b.placed);
        CHECK_EQ(a.number, 7);
        CHECK_EQ(b.number, 8);
        CHECK_EQ(a.slice_bytes, 16);
        if (CHECK_EQ(a.num_slices, 2)) {
            CHECK_EQ(kv_wire_server_of(&a, 0), 1);
            CHECK_EQ(kv_wire_server_of(&a, 1), 0);
        }
        CHECK(kv_name_equal(&a.name, &ours[0].name));
    }
    cluster_end(cluster);
}

static void keys_of_other_forms_are_refused_one_by_one(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    memset(places, 0, sizeof places);
    kv_wire_key_t theirs[5] = {asked("shape", 3), asked("type", 3), asked("form", 3),
                               asked("rank", 3), asked("good", 3)};
    theirs[1].dtype = KV_FLOAT64;
    theirs[2].sparse = 1;
    theirs[3].ndim = 1;
    send_keys(cluster, 1, 1, 5, theirs);
    kv_wire_key_t ours[5] = {declared("shape", 1, 4), declared("type", 2, 3),
                             declared("form", 3, 3), declared("rank", 4, 3),
                             declared("good", 5, 3)};
    send_keys(cluster, 0, 1, 5, ours);
    for (int again = 0; again < 2; again++) {
        const answer_t *answer = await(cluster, 1, 1 + (uint64_t)again);
        check_key_failed(key_of(answer, 0), KV_INVALID,
                         "has shape (4, 2) on worker 0, (3, 2) here");
        check_key_failed(key_of(answer, 1), KV_BAD_TYPE, "is float32 on worker 0, float64 here");
        check_key_failed(key_of(answer, 2), KV_BAD_TYPE, "is dense on worker 0, row-sparse here");
        check_key_failed(key_of(answer, 3), KV_INVALID, "has shape (3, 2) on worker 0, (3,) here");
        CHECK_EQ(key_of(answer, 4).status, KV_OK);
        send_keys(cluster, 1, 2, 5, theirs);
    }
    cluster_end(cluster);
}

static void worker_0_declares_what_can_be(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    memset(places, 0, sizeof places);
    kv_wire_key_t keys[8] = {declared("w", 1, 3),      declared("w", 2, 3),  declared("n", 1, 3),
                             declared("sparse", 3, 3), declared("s", 4, 3),  declared("t", 5, 3),
                             declared("far", 6, 3),    declared("neg", 7, 3)};
    keys[3].sparse = 1;
    keys[4].num_slices = 1;
    keys[5].placed = 0;
    unsigned char far[4] = {0, 0, 2, 0};
    keys[6].servers = far;
    keys[7].shape[1] = -1;
    send_keys(cluster, 0, 1, 8, keys);
    const answer_t *answer = await(cluster, 0, 1);
    CHECK_EQ(key_of(answer, 0).status, KV_OK);
    check_key_failed(key_of(answer, 1), KV_INVALID, "is initialised already");
    check_key_failed(key_of(answer, 2), KV_INVALID, "has the number of another key, 1");
    check_key_failed(key_of(answer, 3), KV_INVALID, "3 rows in slices of 16 are not 2 slices");
    check_key_failed(key_of(answer, 4), KV_INVALID, "24 bytes in slices of 16 are not 1 slices");
    check_key_failed(key_of(answer, 5), KV_INVALID, "worker 0 has declared it without a place");
    check_key_failed(key_of(answer, 6), KV_INVALID, "slice 1 has server 2 of 2");
    check_key_failed(key_of(answer, 7), KV_INVALID, "dimension 1 of a shape is negative (-1)");
    cluster_end(cluster);
}

static void a_deleted_key_can_be_declared_anew(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    memset(places, 0, sizeof places);
    for (uint64_t number = KEY; number < KEY + 3; number++) {
        kv_wire_key_t ours = declared("w", number, 2), theirs = asked("w", 2);
        send_keys(cluster, 0, number, 1, &ours);
        send_keys(cluster, 1, number, 1, &theirs);
        CHECK_EQ(key_of(await(cluster, 0, number), 0).status, KV_OK);
        CHECK_EQ(key_of(await(cluster, 1, number), 0).number, number);
        for (int32_t i = 0; i < 2; i++) {
            kv_wire_record_t record = floats(KV_WIRE_DROP, 100 + number, 0, 0, 0);
            record.key = number;
            send_many(cluster, i, KV_WIRE_DELETE, 1, &record, NULL);
        }
        for (int32_t i = 0; i < 2; i++)
            check_done(cluster, i, 100 + number);
    }
    cluster_end(cluster);
}

/* ------------------------------------------------------------------------------ losing nodes */

static void a_lost_node_ends_every_wait(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    init(cluster, 1, 0, 4, 1);
    push(cluster, 1, floats(KV_WIRE_PUSH, 2, 0, 0, 4), 1);
    pull(cluster, 1, 3, 9, 0);
    drop(cluster, 1, 4, 0);
    kv_wire_key_t key = asked("w", 2);
    send_keys(cluster, 1, 5, 1, &key);
    settle(cluster, 1);
    kv_server_lose(cluster->server, "worker 7 is gone");
    kv_server_lose(cluster->server, "another one too");
    for (uint64_t request = 2; request <= 4; request++)
        check_failed(cluster, 1, request, KV_PEER_LOST, "worker 7 is gone");
    check_key_failed(key_of(await(cluster, 1, 5), 0), KV_PEER_LOST, "worker 7 is gone");
    pull(cluster, 0, 6, 0, 0);
    push(cluster, 0, floats(KV_WIRE_PUSH, 7, 0, 0, LARGE), 1);
    drop(cluster, 0, 8, 0);
    for (uint64_t request = 6; request <= 8; request++)
        check_failed(cluster, 0, request, KV_PEER_LOST, "worker 7 is gone");
    send_keys(cluster, 0, 9, 1, &key);
    check_key_failed(key_of(await(cluster, 0, 9), 0), KV_PEER_LOST, "worker 7 is gone");
    CHECK_EQ(counters_of(cluster).waiting, 0);
    cluster_end(cluster);
}

static void a_worker_that_dies_takes_its_requests_along(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    init(cluster, 1, 0, LARGE, 1);
    check_done(cluster, 0, 1);
    push(cluster, 1, floats(KV_WIRE_PUSHPULL, 2, 0, 0, LARGE), 1);
    pull(cluster, 1, 3, 0, 1);
    drop(cluster, 1, 4, 0);
    push(cluster, 0, floats(KV_WIRE_PUSHPULL, 2, 0, 1, LARGE), 1);
    settle(cluster, 0);
    settle(cluster, 1);
    CHECK_EQ(counters_of(cluster).waiting, 4);
    peer_end(&cluster->peers[1]);
    WAIT_UNTIL(counters_of(cluster).waiting == 1);
    pull(cluster, 0, 5, 0, 0);
    check_floats(await(cluster, 0, 5), LARGE, 1);
    kv_server_lose(cluster->server, "worker 1 is gone");
    check_failed(cluster, 0, 2, KV_PEER_LOST, "worker 1 is gone");
    cluster_end(cluster);
}

static void workers_die_at_any_time(void)
{
    for (uint64_t seed = 1; seed <= 12; seed++) {
        char faults[64];
        snprintf(faults, sizeof faults, "delay=1,reorder,kill=0:%d", (int)(2 + 3 * seed));
        cluster_t *cluster = cluster_start(
            (plan_t){.num_workers = 2, .transport = "faulty", .faults = faults, .seed = seed});
        init(cluster, 1, 0, LARGE, 1);
        for (uint64_t round = 0; round < 20; round++) {
            for (int32_t i = 0; i < 2; i++)
                push(cluster, i, floats(KV_WIRE_PUSHPULL, 10 + round, 0, round, LARGE), 1);
            if (round > 2)
                await(cluster, 0, 8 + round);
        }
        if (atomic_load(&cluster->peers[0].is_lost))
            kv_server_lose(cluster->server, "worker 0 is gone");
        cluster_end(cluster);
    }
}

static const test_t tests[] = {
    TEST(a_deadline_says_who_is_missing),
    TEST(a_key_is_deleted_when_all_workers_say_so),
    TEST(rounds_that_all_have_pushed_come_before_a_delete),
    TEST(a_delete_can_be_tried_again),
    TEST(workers_learn_where_a_key_is),
    TEST(keys_of_other_forms_are_refused_one_by_one),
    TEST(worker_0_declares_what_can_be),
    TEST(a_deleted_key_can_be_declared_anew),
    TEST(a_lost_node_ends_every_wait),
    TEST(a_worker_that_dies_takes_its_requests_along),
    TEST(workers_die_at_any_time),
};
TEST_MAIN(tests)
