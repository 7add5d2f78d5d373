/* What a server does about workers that leave while others go on. */
#include "ps_peers.h"

#define PUSHED(n, round)                                                                           \
    "worker 1 has left the cluster after " #n " pushes, and round " #round                         \
    " takes one of every worker"

static cluster_t *start(int64_t count)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 3});
    init(cluster, 1, 0, count, 1);
    check_done(cluster, 0, 1);
    return cluster;
}

static void end_session(cluster_t *cluster, int32_t worker)
{
    peer_end(&cluster->peers[worker]);
}

static void whatever_needs_a_worker_that_has_left_ends_at_once(int64_t count)
{
    cluster_t *cluster = start(count);
    for (int32_t i = 0; i < 3; i++)
        push(cluster, i, floats(KV_WIRE_PUSHPULL, 10, 0, 0, count), 10);
    check_floats(await(cluster, 1, 10), count, 30);
    push(cluster, 0, floats(KV_WIRE_PUSHPULL, 11, 0, 1, count), 1);
    push(cluster, 0, floats(KV_WIRE_PUSH, 12, 0, 2, count), 1); /* a round ahead */
    pull(cluster, 0, 13, 0, 2);
    push(cluster, 2, floats(KV_WIRE_PUSH, 11, 0, 1, count), 1);
    drop(cluster, 2, 14, 2);
    settle(cluster, 0);
    settle(cluster, 2);
    CHECK_EQ(counters_of(cluster).waiting, 5);
    kv_server_left(cluster->server, 1, true);
    check_failed(cluster, 0, 11, KV_LEFT, PUSHED(1, 1));
    check_failed(cluster, 0, 12, KV_LEFT, PUSHED(1, 1));
    check_failed(cluster, 0, 13, KV_LEFT, PUSHED(1, 1));
    check_failed(cluster, 2, 11, KV_LEFT, PUSHED(1, 1));
    check_failed(cluster, 2, 14, KV_LEFT,
                 "worker 1 has left the cluster, and a delete takes all workers");
    /* Those to come too, but for the value that is there. */
    push(cluster, 2, floats(KV_WIRE_PUSHPULL, 15, 0, 2, count), 1);
    check_failed(cluster, 2, 15, KV_LEFT, PUSHED(1, 1));
    pull(cluster, 2, 16, 0, 2);
    check_failed(cluster, 2, 16, KV_LEFT, PUSHED(1, 1));
    drop(cluster, 0, 17, 2);
    check_failed(cluster, 0, 17, KV_LEFT,
                 "worker 1 has left the cluster, and a delete takes all workers");
    pull(cluster, 2, 18, 0, 1);
    check_floats(await(cluster, 2, 18), count, 30);
    end_session(cluster, 1);
    pull(cluster, 0, 19, 0, 1);
    check_floats(await(cluster, 0, 19), count, 30);
    CHECK_EQ(counters_of(cluster).waiting, 0);
    CHECK_EQ(counters_of(cluster).keys, 1);
    cluster_end(cluster);
}

static void what_needs_a_worker_that_has_left_ends_at_once(void)
{
    whatever_needs_a_worker_that_has_left_ends_at_once(4);
    whatever_needs_a_worker_that_has_left_ends_at_once(LARGE);
}

static void what_it_had_pushed_counts(void)
{
    for (int finished = 0; finished < 2; finished++) {
        cluster_t *cluster = start(LARGE);
        for (uint64_t round = 0; round < 2; round++)
            push(cluster, 1, floats(KV_WIRE_PUSH, 20 + round, 0, round, LARGE), 100);
        push(cluster, 0, floats(KV_WIRE_PUSHPULL, 10, 0, 0, LARGE), 1); /* this one waits */
        settle(cluster, 1);
        settle(cluster, 0);
        kv_server_left(cluster->server, 1, finished);
        end_session(cluster, 1);
        push(cluster, 0, floats(KV_WIRE_PUSHPULL, 11, 0, 1, LARGE), 2);
        for (uint64_t round = 0; round < 2; round++) {
            push(cluster, 2, floats(KV_WIRE_PUSHPULL, 10 + round, 0, round, LARGE), 10);
            float due = round == 0 ? 111 : 112;
            check_floats(await(cluster, 0, 10 + round), LARGE, due);
            check_floats(await(cluster, 2, 10 + round), LARGE, due);
        }
        push(cluster, 2, floats(KV_WIRE_PUSH, 30, 0, 2, LARGE), 10);
        check_failed(cluster, 2, 30, KV_LEFT, PUSHED(2, 2));
        cluster_end(cluster);
    }
}

static void nothing_is_decided_while_its_pushes_may_be_on_their_way(void)
{
    cluster_t *cluster = start(4);
    push(cluster, 0, floats(KV_WIRE_PUSHPULL, 10, 0, 0, 4), 1);
    push(cluster, 2, floats(KV_WIRE_PUSHPULL, 10, 0, 0, 4), 10);
    push(cluster, 0, floats(KV_WIRE_PUSHPULL, 11, 0, 1, 4), 1);
    settle(cluster, 0);
    settle(cluster, 2);
    kv_server_left(cluster->server, 1, false);
    CHECK_EQ(counters_of(cluster).waiting, 3);
    push(cluster, 1, floats(KV_WIRE_PUSH, 10, 0, 0, 4), 100);
    check_floats(await(cluster, 0, 10), 4, 111);
    check_floats(await(cluster, 2, 10), 4, 111);
    CHECK_EQ(counters_of(cluster).waiting, 1);
    end_session(cluster, 1);
    check_failed(cluster, 0, 11, KV_LEFT, PUSHED(1, 1));
    cluster_end(cluster);
}

/* The end of a session alone may be a death, of which the control plane tells in another way. */
static void a_session_that_ends_says_nothing_about_leaving(void)
{
    cluster_t *cluster = start(4);
    push(cluster, 0, floats(KV_WIRE_PUSHPULL, 10, 0, 0, 4), 1);
    push(cluster, 1, floats(KV_WIRE_PUSHPULL, 11, 0, 1, 4), 1); /* waits until its session ends */
    settle(cluster, 0);
    settle(cluster, 1);
    CHECK_EQ(counters_of(cluster).waiting, 2);
    end_session(cluster, 1);
    WAIT_UNTIL(counters_of(cluster).waiting < 2);
    CHECK_EQ(counters_of(cluster).waiting, 1);
    kv_server_left(cluster->server, 1, false);
    check_failed(cluster, 0, 10, KV_LEFT, PUSHED(0, 0));
    cluster_end(cluster);
}

static void keys_that_worker_0_has_not_initialised_will_never_be(void)
{
    static const char words[] = "worker 0 has left the cluster without initialising it";
    cluster_t *cluster = start(4);
    kv_wire_key_t key = {.name = {.text = "w", .bytes = 1}};
    send_keys(cluster, 1, 20, 1, &key);
    pull(cluster, 1, 21, 5, 0);
    push(cluster, 2, floats(KV_WIRE_PUSH, 22, 5, 0, 4), 1);
    settle(cluster, 1);
    settle(cluster, 2);
    kv_server_left(cluster->server, 0, true);
    send_keys(cluster, 2, 20, 1, &key);
    for (int32_t i = 1; i < 3; i++) {
        const answer_t *answer = await(cluster, i, 20);
        kv_wire_key_t got;
        size_t offset = 0;
        if (!CHECK_STATUS(kv_wire_get_key(answer->data, answer->bytes, &offset, &got), KV_OK))
            continue;
        CHECK_EQ(got.status, KV_LEFT);
        CHECK_EQ(got.sentence_bytes, sizeof words - 1);
        CHECK(memcmp(got.sentence, words, sizeof words - 1) == 0);
    }
    check_failed(cluster, 1, 21, KV_LEFT, words);
    check_failed(cluster, 2, 22, KV_LEFT, words);
    pull(cluster, 1, 23, 6, 0);
    check_failed(cluster, 1, 23, KV_LEFT, words);
    cluster_end(cluster);
}

static void an_async_server_needs_nobody_for_pulls(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2, .async = true});
    init(cluster, 1, 0, 4, 5);
    check_done(cluster, 0, 1);
    pull(cluster, 1, 2, 0, 1);
    settle(cluster, 1);
    kv_server_left(cluster->server, 0, true);
    CHECK_EQ(counters_of(cluster).waiting, 1);
    push(cluster, 1, floats(KV_WIRE_PUSH, 3, 0, 0, 4), 1); /* it fails, and is one all the same */
    check_floats(await(cluster, 1, 2), 4, 5);
    cluster_end(cluster);
}

/* Worker 1 leaves after some pushes, which the end of its session may overtake: the rounds of the
 * others are right up to one and fail from there on. */
static void workers_leave_at_any_time(void)
{
    enum { ROUNDS = 8 };
    for (uint64_t seed = 1; seed <= 30; seed++) {
        cluster_t *cluster = cluster_start((plan_t){
            .num_workers = 2, .transport = "faulty", .faults = "delay=1,reorder", .seed = seed});
        init(cluster, 1, 0, LARGE, 1);
        check_done(cluster, 0, 1);
        uint64_t pushes = seed % ROUNDS, good = 0;
        bool waits = seed % 3 == 0;
        for (uint64_t round = 0; round < ROUNDS / 2; round++)
            push(cluster, 0, floats(KV_WIRE_PUSHPULL, 10 + round, 0, round, LARGE), 1);
        for (uint64_t round = 0; round < pushes; round++)
            push(cluster, 1, floats(KV_WIRE_PUSH, 10 + round, 0, round, LARGE), 2);
        if (waits)
            settle(cluster, 1);
        if (seed % 2)
            kv_server_left(cluster->server, 1, false);
        end_session(cluster, 1);
        if (seed % 2 == 0)
            kv_server_left(cluster->server, 1, false);
        for (uint64_t round = ROUNDS / 2; round < ROUNDS; round++)
            push(cluster, 0, floats(KV_WIRE_PUSHPULL, 10 + round, 0, round, LARGE), 1);
        for (uint64_t round = 0; round < ROUNDS; round++) {
            const answer_t *answer = await(cluster, 0, 10 + round);
            if (answer->record.status == KV_OK) {
                CHECK_EQ(good, round);
                good = round + 1;
                check_floats(answer, LARGE, 3);
            } else {
                CHECK_EQ(answer->record.status, KV_LEFT);
            }
        }
        CHECK(good <= pushes);
        cluster_end(cluster);
    }
}

static const test_t tests[] = {
    TEST(what_needs_a_worker_that_has_left_ends_at_once),
    TEST(what_it_had_pushed_counts),
    TEST(nothing_is_decided_while_its_pushes_may_be_on_their_way),
    TEST(a_session_that_ends_says_nothing_about_leaving),
    TEST(keys_that_worker_0_has_not_initialised_will_never_be),
    TEST(an_async_server_needs_nobody_for_pulls),
    TEST(workers_leave_at_any_time),
};
TEST_MAIN(tests)
