/* Clients against servers. */
#include "ps_cluster.h"

static const int32_t sizes[][2] = {{1, 1}, {2, 1}, {2, 2}, {4, 2}, {7, 3}};
enum { NUM_SIZES = sizeof sizes / sizeof sizes[0] };

/* A claim about clusters of several sizes, as one test. */
#define ON_EACH_SIZE(claim)                                                                        \
    static void claim##_on(cluster_t *cluster);                                                    \
    static void claim(void)                                                                        \
    {                                                                                              \
        for (int i = 0; i < NUM_SIZES; i++) {                                                      \
            int failures = atomic_load(&test_failures);                                            \
            cluster_t *cluster = cluster_new(sizes[i][0], sizes[i][1], NULL, NULL, 0);             \
            cluster_declare(cluster);                                                              \
            claim##_on(cluster);                                                                   \
            cluster_free(cluster);                                                                 \
            if (atomic_load(&test_failures) != failures)                                           \
                printf("    %d workers, %d servers\n", (int)sizes[i][0], (int)sizes[i][1]);        \
        }                                                                                          \
    }                                                                                              \
    static void claim##_on(cluster_t *cluster)

/* One call on every worker at once. */
static void all_move(cluster_t *cluster, verb_t verb, int64_t first, int64_t end, int64_t round)
{
    test_call_t calls[MAX_WORKERS];
    for (int32_t rank = 0; rank < cluster->num_workers; rank++)
        move_start(cluster, rank, &calls[rank], verb, first, end, round);
    for (int32_t rank = 0; rank < cluster->num_workers; rank++)
        wait_good(&calls[rank]);
}

ON_EACH_SIZE(lists_of_all_lengths_are_summed_exactly)
{
    all_move(cluster, PULL, 0, NUM_KEYS, 0);
    for (int32_t rank = 0; rank < cluster->num_workers; rank++)
        check_outs(cluster, rank, 0, NUM_KEYS, -1);
    for (int64_t round = 0; round < 3; round++) {
        if (round == 1) {
            all_move(cluster, PUSH, 0, NUM_KEYS, round);
            all_move(cluster, PULL, 0, NUM_KEYS, round);
        } else {
            all_move(cluster, PUSHPULL, 0, NUM_KEYS, round);
        }
        for (int32_t rank = 0; rank < cluster->num_workers; rank++)
            check_outs(cluster, rank, 0, NUM_KEYS, round);
    }
    int64_t slices = 0;
    int64_t bytes = 0;
    for (int32_t i = 0; i < cluster->num_servers; i++) {
        kv_server_counters_t counters;
        kv_server_counters(cluster->servers[i], &counters);
        slices += counters.slices;
        bytes += counters.value_bytes;
        CHECK_EQ(counters.waiting, 0);
        CHECK_EQ(counters.rounds, counters.slices * 3);
    }
    int64_t due = 0;
    for (int64_t key = 0; key < NUM_KEYS; key++)
        due += lengths[key] * 4;
    CHECK_EQ(bytes, due);
    CHECK(slices >= NUM_KEYS);
}

/* The workers come one after the other, each with all of its rounds; only worker 0 pulls, after
 * each of its pushes. */
ON_EACH_SIZE(a_pull_sees_the_pushes_before_it_and_none_after_it)
{
    enum { ROUNDS = 5, KEY = 3 };
    static test_call_t pushes[MAX_WORKERS][ROUNDS], pulls[ROUNDS];
    float *values[MAX_WORKERS][ROUNDS], *outs[ROUNDS];
    size_t bytes = (size_t)lengths[KEY] * sizeof(float);
    for (int32_t rank = 0; rank < cluster->num_workers; rank++) {
        worker_t *me = &cluster->workers[rank];
        for (int64_t round = 0; round < ROUNDS; round++) {
            test_call_t *push = &pushes[rank][round];
            move_init(cluster, rank, push, PUSH, KEY, KEY + 1, round);
            values[rank][round] = malloc(bytes);
            memcpy(values[rank][round], me->values[KEY], bytes);
            push->parts[0].value = values[rank][round];
            push->base.priority = (int32_t)round; /* younger ones are urgent */
            call_start(me->client, push);
            if (rank > 0)
                continue;
            call_init(&pulls[round], KV_CLIENT_MOVE);
            pulls[round].base.priority = 5;
            outs[round] = malloc(bytes);
            call_add(&pulls[round], me->remotes[KEY], NULL, outs[round]);
            call_start(me->client, &pulls[round]);
        }
    }
    for (int64_t round = 0; round < ROUNDS; round++) {
        wait_good(&pulls[round]);
        CHECK(is_sum(outs[round], lengths[KEY], cluster->num_workers, KEY, round));
        free(outs[round]);
        for (int32_t rank = 0; rank < cluster->num_workers; rank++) {
            wait_good(&pushes[rank][round]);
            free(values[rank][round]);
        }
    }
}

ON_EACH_SIZE(a_deleted_key_can_be_declared_with_another_length)
{
    static const int64_t others[NUM_KEYS] = {7, 0, 300000, 1, 1024, 70000};
    test_call_t calls[MAX_WORKERS], pushes[MAX_WORKERS];
    for (int32_t rank = 0; rank < cluster->num_workers; rank++) {
        move_start(cluster, rank, &pushes[rank], PUSH, 0, NUM_KEYS, 0);
        call_init(&calls[rank], KV_CLIENT_DELETE);
        for (int64_t key = 0; key < NUM_KEYS; key++)
            call_add(&calls[rank], cluster->workers[rank].remotes[key], NULL, NULL);
        call_start(cluster->workers[rank].client, &calls[rank]);
    }
    for (int32_t rank = 0; rank < cluster->num_workers; rank++) {
        worker_t *me = &cluster->workers[rank];
        wait_good(&pushes[rank]);
        wait_good(&calls[rank]);
        for (int64_t key = 0; key < NUM_KEYS; key++)
            kv_remote_free(me->remotes[key]);
        worker_lengths(me, others);
    }
    for (int32_t i = 0; i < cluster->num_servers; i++) {
        kv_server_counters_t counters;
        kv_server_counters(cluster->servers[i], &counters);
        CHECK_EQ(counters.keys, 0);
        CHECK_EQ(counters.value_bytes, 0);
    }
    cluster_declare(cluster);
    all_move(cluster, PUSHPULL, 0, NUM_KEYS, 1);
    for (int32_t rank = 0; rank < cluster->num_workers; rank++)
        check_outs(cluster, rank, 0, NUM_KEYS, 1);
}

/* ------------------------------------------------------------------------------------ threads */

typedef struct actor {
    cluster_t *cluster;
    int32_t rank;
    kv_thread_t thread;
} actor_t;

static void *act(void *context)
{
    const actor_t *actor = context;
    for (int64_t round = 0; round < 6; round++) {
        test_call_t calls[NUM_KEYS];
        for (int64_t key = NUM_KEYS - 1; key >= 0; key--) {
            move_init(actor->cluster, actor->rank, &calls[key], PUSHPULL, key, key + 1, round);
            calls[key].base.priority = -(int32_t)key;
            call_start(actor->cluster->workers[actor->rank].client, &calls[key]);
        }
        for (int64_t key = 0; key < NUM_KEYS; key++)
            wait_good(&calls[key]);
        check_outs(actor->cluster, actor->rank, 0, NUM_KEYS, round);
    }
    return NULL;
}

ON_EACH_SIZE(workers_need_not_keep_step_with_each_other)
{
    actor_t actors[MAX_WORKERS];
    for (int32_t rank = 0; rank < cluster->num_workers; rank++) {
        actors[rank] = (actor_t){.cluster = cluster, .rank = rank};
        CHECK_STATUS(kv_thread_start(&actors[rank].thread, "actor", act, &actors[rank]), KV_OK);
    }
    for (int32_t rank = 0; rank < cluster->num_workers; rank++)
        kv_thread_join(actors[rank].thread);
}

typedef struct caller {
    cluster_t *cluster;
    int64_t key;
    kv_thread_t thread;
} caller_t;

/* One thread of worker 0 for each key; it has no other worker to wait for. */
static void *call_often(void *context)
{
    const caller_t *caller = context;
    for (int64_t round = 0; round < 40; round++) {
        test_call_t call;
        move_start(caller->cluster, 0, &call, PUSHPULL, caller->key, caller->key + 1, round);
        wait_good(&call);
        check_outs(caller->cluster, 0, caller->key, caller->key + 1, round);
    }
    return NULL;
}

static void threads_share_a_client(void)
{
    cluster_t *cluster = cluster_new(1, 3, NULL, NULL, 0);
    caller_t callers[4];
    cluster_declare(cluster);
    for (int i = 0; i < 4; i++) {
        callers[i] = (caller_t){.cluster = cluster, .key = i};
        CHECK_STATUS(kv_thread_start(&callers[i].thread, "caller", call_often, &callers[i]), KV_OK);
    }
    for (int i = 0; i < 4; i++)
        kv_thread_join(callers[i].thread);
    cluster_free(cluster);
}

/* ------------------------------------------------------------------------------------- errors */

static void a_deadline_names_the_worker_that_is_missing(void)
{
    cluster_t *cluster = cluster_new(3, 2, NULL, NULL, 0);
    cluster_declare(cluster);
    test_call_t calls[3];
    for (int32_t rank = 0; rank < 3; rank += 2) {
        move_init(cluster, rank, &calls[rank], PUSHPULL, 0, NUM_KEYS, 0);
        calls[rank].base.timeout_ms = rank == 0 ? 200 : 0;
        call_start(cluster->workers[rank].client, &calls[rank]);
    }
    CHECK_STATUS(call_wait(&calls[0]), KV_TIMEOUT);
    CHECK(strstr(calls[0].message, "worker 1") != NULL && strstr(calls[0].message, "key ") != NULL);
    CHECK(strstr(calls[0].message, "(server ") != NULL);
    CHECK_EQ(atomic_load(&calls[2].num_done), 0);
    /* The push stays in its round. */
    move_start(cluster, 1, &calls[1], PUSHPULL, 0, NUM_KEYS, 0);
    wait_good(&calls[1]);
    wait_good(&calls[2]);
    check_outs(cluster, 1, 0, NUM_KEYS, 0);
    check_outs(cluster, 2, 0, NUM_KEYS, 0);
    move_start(cluster, 0, &calls[0], PULL, 0, NUM_KEYS, 0);
    wait_good(&calls[0]);
    check_outs(cluster, 0, 0, NUM_KEYS, 0);
    cluster_free(cluster);
}

static void another_shape_is_refused_and_named(void)
{
    cluster_t *cluster = cluster_new(2, 2, NULL, NULL, 0);
    test_call_t good, bad;
    declare_init(cluster, 0, &good);
    declare_init(cluster, 1, &bad);
    bad.shapes[2] = 1023;
    bad.keys[2].bytes = 1023 * 4;
    call_start(cluster->workers[1].client, &bad);
    call_start(cluster->workers[0].client, &good);
    wait_good(&good);
    take_remotes(&cluster->workers[0], &good);
    CHECK_STATUS(call_wait(&bad), KV_INVALID);
    CHECK_TEXT(bad.message, "key 2: has shape (1024,) on worker 0, (1023,) here (server 0)");
    for (int key = 0; key < NUM_KEYS; key++)
        CHECK(bad.keys[key].remote == NULL);
    /* What was right on both sides can be asked for again. */
    declare_init(cluster, 1, &bad);
    wait_good((call_start(cluster->workers[1].client, &bad), &bad));
    take_remotes(&cluster->workers[1], &bad);
    declare_init(cluster, 0, &good);
    CHECK_STATUS(call_run(cluster->workers[0].client, &good), KV_INVALID);
    CHECK(strstr(good.message, "initialised already") != NULL);
    cluster_free(cluster);
}

static void a_server_that_is_gone_fails_its_workers_calls(void)
{
    cluster_t *cluster = cluster_new(2, 2, NULL, NULL, 0);
    cluster_declare(cluster);
    test_call_t calls[3];
    move_start(cluster, 0, &calls[0], PUSHPULL, 0, NUM_KEYS, 0);
    for (int i = 1; i < 3; i++) { /* the last one waits for its turn */
        call_init(&calls[i], KV_CLIENT_MOVE);
        call_add(&calls[i], cluster->workers[0].remotes[3], cluster->workers[0].values[3], NULL);
        call_start(cluster->workers[0].client, &calls[i]);
    }
    kv_net_close(cluster->nets[1]);
    for (int i = 0; i < 3; i++) {
        CHECK_STATUS(call_wait(&calls[i]), KV_PEER_LOST);
        CHECK(strstr(calls[i].message, "server 1 is gone") != NULL);
    }
    CHECK_STATUS(kv_client_check(cluster->workers[0].client), KV_PEER_LOST);
    cluster_free(cluster);
}

static void a_worker_that_is_gone_fails_the_others_calls(void)
{
    cluster_t *cluster = cluster_new(3, 2, NULL, NULL, 0);
    cluster_declare(cluster);
    test_call_t call, gone;
    move_start(cluster, 0, &call, PUSHPULL, 0, NUM_KEYS, 0);
    move_start(cluster, 2, &gone, PUSHPULL, 0, NUM_KEYS, 0);
    worker_close(&cluster->workers[2]);
    CHECK_STATUS(call_wait(&gone), KV_CLOSED);
    CHECK_EQ(atomic_load(&call.num_done), 0);
    kv_server_lose(cluster->servers[0], "worker 2 was killed");
    kv_server_lose(cluster->servers[1], "worker 2 was killed");
    CHECK_STATUS(call_wait(&call), KV_PEER_LOST);
    CHECK(strstr(call.message, "worker 2 was killed") != NULL);
    cluster_free(cluster);
}

static const test_t tests[] = {
    TEST(lists_of_all_lengths_are_summed_exactly),
    TEST(a_pull_sees_the_pushes_before_it_and_none_after_it),
    TEST(a_deleted_key_can_be_declared_with_another_length),
    TEST(workers_need_not_keep_step_with_each_other),
    TEST(threads_share_a_client),
    TEST(a_deadline_names_the_worker_that_is_missing),
    TEST(another_shape_is_refused_and_named),
    TEST(a_server_that_is_gone_fails_its_workers_calls),
    TEST(a_worker_that_is_gone_fails_the_others_calls),
};

TEST_MAIN(tests)
