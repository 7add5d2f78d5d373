/* Rounds on a server, with workers that send messages made by hand. */
#include "ps_peers.h"

/* ----------------------------------------------------------------------------------- rounds */

static void rounds_add_up_for(int32_t num_workers, int64_t count, const char *engine)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = num_workers, .engine = engine});
    init(cluster, 1, 7, count, 5);
    check_done(cluster, 0, 1);
    pull(cluster, num_workers - 1, 2, 7, 0);
    check_floats(await(cluster, num_workers - 1, 2), count, 5);
    for (uint64_t round = 0; round < 4; round++) {
        float due = 0;
        for (int32_t i = num_workers - 1; i >= 0; i--) {
            float value = (float)(round * 10 + (uint64_t)i);
            kv_wire_action_t action = (round + (uint64_t)i) % 2 ? KV_WIRE_PUSH : KV_WIRE_PUSHPULL;
            push(cluster, i, floats(action, 10 + round, 7, round, count), value);
            pull(cluster, i, 20 + round, 7, round + 1);
            due += value;
        }
        for (int32_t i = 0; i < num_workers; i++) {
            if ((round + (uint64_t)i) % 2)
                check_done(cluster, i, 10 + round);
            else
                check_floats(await(cluster, i, 10 + round), count, due);
            check_floats(await(cluster, i, 20 + round), count, due);
        }
    }
    kv_server_counters_t counters = counters_of(cluster);
    CHECK_EQ(counters.rounds, 4);
    CHECK_EQ(counters.keys, 1);
    CHECK_EQ(counters.slices, 1);
    CHECK_EQ(counters.value_bytes, count * 4);
    cluster_end(cluster);
}

static void a_round_is_the_sum_of_all_workers(void)
{
    for (int32_t num_workers = 1; num_workers <= 3; num_workers++) {
        rounds_add_up_for(num_workers, 0, NULL);
        rounds_add_up_for(num_workers, 3, NULL);
        rounds_add_up_for(num_workers, LARGE, NULL);
    }
    rounds_add_up_for(3, LARGE, "naive");
    rounds_add_up_for(2, LARGE, "stepping");
    rounds_add_up_for(2, LARGEST, NULL);
}

static void a_round_waits_for_the_last_worker(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 3});
    init(cluster, 1, 0, 4, 1);
    check_done(cluster, 0, 1);
    for (int32_t i = 0; i < 2; i++)
        push(cluster, i, floats(KV_WIRE_PUSHPULL, 2, 0, 0, 4), 10);
    pull(cluster, 1, 3, 0, 1);
    settle(cluster, 0);
    settle(cluster, 1);
    CHECK(answer_to(&cluster->peers[0], 2) == NULL);
    CHECK_EQ(counters_of(cluster).waiting, 3);
    pull(cluster, 2, 4, 0, 0); /* it has not pushed: the value from before */
    check_floats(await(cluster, 2, 4), 4, 1);
    push(cluster, 2, floats(KV_WIRE_PUSH, 5, 0, 0, 4), 100);
    check_done(cluster, 2, 5);
    check_floats(await(cluster, 0, 2), 4, 120);
    check_floats(await(cluster, 1, 2), 4, 120);
    check_floats(await(cluster, 1, 3), 4, 120);
    CHECK_EQ(counters_of(cluster).waiting, 0);
    cluster_end(cluster);
}

static void a_push_ahead_is_kept_for_its_own_round(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    init(cluster, 1, 0, LARGE, 0);
    check_done(cluster, 0, 1);
    /* Worker 0 is two rounds ahead, and the later ones come first. */
    push(cluster, 0, floats(KV_WIRE_PUSHPULL, 13, 0, 2, LARGE), 300);
    push(cluster, 0, floats(KV_WIRE_PUSHPULL, 12, 0, 1, LARGE), 200);
    push(cluster, 0, floats(KV_WIRE_PUSHPULL, 11, 0, 0, LARGE), 100);
    for (uint64_t round = 0; round < 3; round++) {
        push(cluster, 1, floats(KV_WIRE_PUSHPULL, 11 + round, 0, round, LARGE), (float)round);
        float due = 100 * (float)(round + 1) + (float)round;
        check_floats(await(cluster, 1, 11 + round), LARGE, due);
        check_floats(await(cluster, 0, 11 + round), LARGE, due);
    }
    cluster_end(cluster);
}

static void a_round_is_pushed_once(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    init(cluster, 1, 0, 4, 0);
    check_done(cluster, 0, 1);
    push(cluster, 0, floats(KV_WIRE_PUSH, 2, 0, 0, 4), 1);
    push(cluster, 0, floats(KV_WIRE_PUSH, 3, 0, 0, 4), 2);
    check_failed(cluster, 0, 3, KV_INVALID, "worker 0 has pushed round 0 before");
    push(cluster, 1, floats(KV_WIRE_PUSHPULL, 4, 0, 0, 4), 10);
    check_floats(await(cluster, 1, 4), 4, 11);
    push(cluster, 0, floats(KV_WIRE_PUSH, 5, 0, 0, 4), 3);
    check_failed(cluster, 0, 5, KV_INVALID, "worker 0 has pushed round 0 before");
    cluster_end(cluster);
}

static void results_repeat_bit_for_bit(void)
{
    static const float parts[] = {1e8F, 3.14159F, -1e8F};
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 3});
    init(cluster, 1, 0, 4, 0);
    check_done(cluster, 0, 1);
    for (uint64_t round = 0; round < 6; round++) {
        static const int32_t orders[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2},
                                             {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
        for (int i = 0; i < 3; i++) {
            int32_t worker = orders[round][i];
            push(cluster, worker, floats(KV_WIRE_PUSHPULL, 10 + round, 0, round, 4), parts[worker]);
            settle(cluster, worker);
        }
        volatile float due = parts[0] + parts[1];
        due += parts[2];
        check_floats(await(cluster, 1, 10 + round), 4, due);
    }
    cluster_end(cluster);
}

static void many_small_slices_travel_together(void)
{
    enum { COUNT = 300 };
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    static kv_wire_record_t records[COUNT];
    static float values[COUNT][5];
    const void *data[COUNT];
    for (uint32_t i = 0; i < COUNT; i++) {
        records[i] = floats(KV_WIRE_INIT, i, i % 3, 0, 5);
        records[i].key = 100 + i / 3;
        data[i] = values[i];
    }
    send_many(cluster, 0, KV_WIRE_BATCH, COUNT, records, data);
    for (uint32_t i = 0; i < COUNT; i++)
        check_done(cluster, 0, i);
    CHECK_EQ(atomic_load(&cluster->peers[0].num_messages), 1);
    CHECK_EQ(counters_of(cluster).keys, 100);
    for (int32_t worker = 0; worker < 2; worker++) {
        for (uint32_t i = 0; i < COUNT; i++) {
            records[i].action = KV_WIRE_PUSHPULL;
            records[i].request = 1000 + i;
            for (int j = 0; j < 5; j++)
                values[i][j] = (float)i * (float)(worker + 1);
        }
        send_many(cluster, worker, KV_WIRE_BATCH, COUNT, records, data);
    }
    for (int32_t worker = 0; worker < 2; worker++)
        for (uint32_t i = 0; i < COUNT; i++)
            check_floats(await(cluster, worker, 1000 + i), 5, 3 * (float)i);
    CHECK_EQ(counters_of(cluster).slices, COUNT);
    cluster_end(cluster);
}

/* A version that came from a batch does not keep the batch. */
static void one_worker_alone_pushes_in_batches(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 1});
    for (uint64_t round = 0; round < 3; round++) {
        kv_wire_record_t records[2];
        float values[2] = {(float)round, (float)round + 10};
        const void *data[2] = {&values[0], &values[1]};
        for (uint32_t i = 0; i < 2; i++)
            records[i] = floats(round == 0 ? KV_WIRE_INIT : KV_WIRE_PUSHPULL, 10 * round + i, i,
                                round - (round > 0), 1);
        send_many(cluster, 0, KV_WIRE_BATCH, 2, records, data);
        for (uint32_t i = 0; i < 2; i++) {
            const answer_t *answer = await(cluster, 0, 10 * round + i);
            if (round > 0)
                check_floats(answer, 1, values[i]);
        }
    }
    WAIT_UNTIL(kv_counter_value(KV_COUNT_VALUE_BYTES) == 8); /* the answers are out */
    cluster_end(cluster);
}

/* Payloads overtake each other; every round still is its own sum. */
static void payloads_out_of_order_change_nothing(void)
{
    enum { WORKERS = 3, SLICES = 4, ROUNDS = 25 };
    for (uint64_t seed = 1; seed <= 4; seed++) {
        cluster_t *cluster = cluster_start((plan_t){.num_workers = WORKERS,
                                                    .transport = "faulty",
                                                    .faults = "delay=1,reorder",
                                                    .seed = seed});
        static const int64_t counts[SLICES] = {1, 1000, 20000, 30000};
        for (uint32_t slice = 0; slice < SLICES; slice++)
            init(cluster, slice, slice, counts[slice], 0);
        for (uint64_t round = 0; round < ROUNDS; round++) {
            for (int32_t i = 0; i < WORKERS; i++) {
                for (uint32_t slice = 0; slice < SLICES; slice++) {
                    uint64_t request = 100 + round * SLICES + slice;
                    push(cluster, i, floats(KV_WIRE_PUSHPULL, request, slice, round, counts[slice]),
                         (float)(request * (uint64_t)(i + 1)));
                    if (round > 0)
                        await(cluster, i, request - SLICES);
                }
            }
        }
        for (uint64_t round = 0; round < ROUNDS; round++) {
            for (uint32_t slice = 0; slice < SLICES; slice++) {
                uint64_t request = 100 + round * SLICES + slice;
                for (int32_t i = 0; i < WORKERS; i++)
                    check_floats(await(cluster, i, request), counts[slice], (float)(request * 6));
            }
        }
        CHECK_EQ(counters_of(cluster).rounds, SLICES * ROUNDS);
        cluster_end(cluster);
    }
}

/* ------------------------------------------------------------------------- the first value */

static void what_comes_before_the_first_value_waits(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    pull(cluster, 1, 1, 0, 0);
    push(cluster, 1, floats(KV_WIRE_PUSHPULL, 2, 0, 0, 4), 10);
    settle(cluster, 1);
    CHECK_EQ(counters_of(cluster).waiting, 2);
    CHECK_EQ(counters_of(cluster).slices, 0);
    init(cluster, 3, 0, 4, 1);
    check_floats(await(cluster, 1, 1), 4, 1);
    push(cluster, 0, floats(KV_WIRE_PUSHPULL, 4, 0, 0, 4), 20);
    check_floats(await(cluster, 1, 2), 4, 30);
    check_floats(await(cluster, 0, 4), 4, 30);
    cluster_end(cluster);
}

static void a_slice_is_initialised_once_and_by_worker_0(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    push(cluster, 1, floats(KV_WIRE_INIT, 1, 3, 0, 4), 1);
    check_failed(cluster, 1, 1, KV_INVALID, "worker 1 cannot initialise keys, only worker 0 can");
    init(cluster, 1, 3, 4, 1);
    check_done(cluster, 0, 1);
    init(cluster, 2, 3, 4, 2);
    check_failed(cluster, 0, 2, KV_INVALID, "slice 3 is initialised already");
    pull(cluster, 1, 3, 3, 0);
    check_floats(await(cluster, 1, 3), 4, 1);
    kv_wire_record_t uneven = floats(KV_WIRE_INIT, 4, 4, 0, 1);
    uneven.bytes = 3;
    send_one(cluster, 0, uneven, "abc");
    check_failed(cluster, 0, 4, KV_INVALID, "slice 4 has 3 bytes, not whole elements");
    cluster_end(cluster);
}

/* A first value, 4 floats, and behind it a key: of these, `own` bytes, of which `bytes` are sent.
 */
static void send_with_key(cluster_t *cluster, uint64_t request, uint32_t slice, kv_wire_key_t key,
                          int64_t own, int64_t bytes)
{
    unsigned char data[256] = {0};
    for (int i = 0; i < 4; i++)
        memcpy(data + i * sizeof(float), &(float){7}, sizeof(float));
    kv_wire_put_key(&key, data + 4 * sizeof(float));
    kv_wire_record_t record = floats(KV_WIRE_INIT, request, slice, 0, 4);
    record.t = 1;
    record.own = (uint64_t)own;
    record.bytes += (uint64_t)bytes;
    send_one(cluster, 0, record, data);
}

static void a_first_value_may_bring_its_key_and_no_other(void)
{
    static const char other[] = "a first value comes with another key";
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 1});
    kv_wire_key_t key = {
        .name = {.text = "w", .bytes = 1}, .dtype = KV_FLOAT32, .ndim = 2, .shape = {2, 2}};
    kv_wire_key_t longer = key, wider = key, sparse = key;
    longer.shape[1] = 3;
    wider.dtype = KV_FLOAT64;
    sparse.sparse = true;
    int64_t size = (int64_t)kv_wire_key_bytes(&key);
    send_with_key(cluster, 1, 0, longer, size, size);
    check_failed(cluster, 0, 1, KV_INVALID, other);
    send_with_key(cluster, 2, 0, wider, size, size);
    check_failed(cluster, 0, 2, KV_INVALID, other);
    send_with_key(cluster, 3, 0, sparse, size, size);
    check_failed(cluster, 0, 3, KV_INVALID, other);
    send_with_key(cluster, 4, 3, key, size, size);
    check_failed(cluster, 0, 4, KV_INVALID, other);
    send_with_key(cluster, 5, 0, key, 1000, size);
    check_failed(cluster, 0, 5, KV_INVALID, "a first value of 77 bytes has no key of 1000");
    send_with_key(cluster, 6, 0, key, size - 8, size - 8);
    CHECK_EQ(await(cluster, 0, 6)->record.status, KV_INVALID);
    send_with_key(cluster, 7, 0, key, size + 8, size + 8);
    CHECK_EQ(await(cluster, 0, 7)->record.status, KV_INVALID);
    CHECK_EQ(counters_of(cluster).value_bytes, 0);
    send_with_key(cluster, 8, 0, key, size, size);
    check_done(cluster, 0, 8);
    pull(cluster, 0, 9, 0, 0);
    check_floats(await(cluster, 0, 9), 4, 7);
    CHECK_EQ(counters_of(cluster).value_bytes, 16);
    cluster_end(cluster);
}

/* ------------------------------------------------------------------------ pushes that are none */

static void check_round_fails(kv_wire_record_t bad, kv_status_t status, const char *sentence)
{
    for (int early = 0; early < 2; early++) { /* before the first value, and after */
        cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
        char data[64] = {0};
        if (!early) {
            init(cluster, 1, 0, 4, 5);
            check_done(cluster, 0, 1);
        }
        send_one(cluster, 1, bad, data);
        push(cluster, 0, floats(KV_WIRE_PUSHPULL, 3, 0, 0, 4), 1);
        if (early)
            init(cluster, 1, 0, 4, 5);
        check_failed(cluster, 1, bad.request, status, sentence);
        check_failed(cluster, 0, 3, status, sentence);
        pull(cluster, 0, 4, 0, 1);
        check_floats(await(cluster, 0, 4), 4, 5); /* the value is as it was */
        for (int32_t i = 0; i < 2; i++)
            push(cluster, i, floats(KV_WIRE_PUSHPULL, 6, 0, 1, 4), 1);
        check_floats(await(cluster, 1, 6), 4, 2); /* and the next round is a good one */
        cluster_end(cluster);
    }
}

static void a_push_of_another_form_fails_its_round_for_all(void)
{
    kv_wire_record_t bad = floats(KV_WIRE_PUSH, 2, 0, 0, 3);
    check_round_fails(bad, KV_INVALID, "slice 0 has 16 bytes, worker 1 pushed 12");
    bad = floats(KV_WIRE_PUSH, 2, 0, 0, 4);
    bad.dtype = KV_INT32;
    check_round_fails(bad, KV_BAD_TYPE, "the value is float32, worker 1 pushed int32");
    bad = floats(KV_WIRE_PUSHPULL, 2, 0, 0, 1);
    bad.codec = KV_CODEC_2BIT;
    check_round_fails(bad, KV_INVALID, "slice 0 has 12 bytes of codes, worker 1 pushed 4");
    bad = floats(KV_WIRE_PUSH, 2, 0, 0, 4);
    bad.optimizer = 5;
    check_round_fails(bad, KV_INVALID,
                      "worker 1 pushed with an optimizer that server 0 has not got");
}

static void an_async_server_needs_an_optimizer(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2, .async = true});
    init(cluster, 1, 0, 4, 5);
    push(cluster, 1, floats(KV_WIRE_PUSH, 2, 0, 0, 4), 1);
    check_failed(cluster, 1, 2, KV_INVALID,
                 "dist_async needs an optimizer on the servers before the first push; call "
                 "set_optimizer");
    pull(cluster, 1, 3, 0, 1);
    check_floats(await(cluster, 1, 3), 4, 5);
    pull(cluster, 0, 4, 0, 0);
    check_floats(await(cluster, 0, 4), 4, 5);
    cluster_end(cluster);
}

/* What no worker sends ends its session, and only its own. */
static void nonsense_ends_the_session(void)
{
    static const char zeros[2 * KV_WIRE_SLICE_BYTES];
    for (int kind = 0; kind < 8; kind++) {
        cluster_t *cluster = cluster_start((plan_t){.num_workers = 2, .index = kind == 7});
        kv_wire_record_t push_record = floats(KV_WIRE_PUSH, 1, 0, 0, 1);
        kv_wire_record_t get_record = floats(KV_WIRE_GET, 1, 0, 0, 0);
        kv_wire_header_t header = {.kind = KV_WIRE_PUSH_ONE, .count = 1, .record = push_record};
        const void *no_data = "";
        size_t bytes = 4;
        switch (kind) {
        case 0: /* no header at all */
            send_raw(cluster, 1, "hello", 5, NULL, 0);
            break;
        case 1: /* announces one length and has another */
            send_message(cluster, 1, header, zeros, 5);
            break;
        case 2: /* larger than a slice */
            bytes = sizeof zeros;
            header.record.bytes = bytes;
            send_message(cluster, 1, header, zeros, bytes);
            break;
        case 3: /* an answer */
            header.kind = KV_WIRE_VALUE;
            send_message(cluster, 1, header, zeros, bytes);
            break;
        case 4: /* a push without data */
            push_record.bytes = 0;
            send_many(cluster, 1, KV_WIRE_PULL, 1, &push_record, NULL);
            break;
        case 5: /* a pull as a push */
            send_many(cluster, 1, KV_WIRE_BATCH, 1, &get_record, &no_data);
            break;
        case 6: /* more records than there is room for */
            header.kind = KV_WIRE_BATCH;
            header.count = 1000;
            send_message(cluster, 1, header, zeros, KV_WIRE_RECORD_BYTES * 999);
            break;
        case 7: /* keys to a server without a directory */
            send_keys(cluster, 1, 1, 1, &(kv_wire_key_t){.ndim = 1, .shape = {3}});
            break;
        }
        WAIT_UNTIL(atomic_load(&cluster->peers[1].is_lost));
        init(cluster, 2, 0, 4, 1);
        check_done(cluster, 0, 2);
        cluster_end(cluster);
    }
}

/* -------------------------------------------------------------------------------------- memory */

/* Sends everything that there is; stops when the session is gone. */
static void do_everything(cluster_t *cluster)
{
    kv_wire_key_t ours = declared("w", KEY, 3), theirs = asked("w", 3);
    cluster->timeout_ms = 150;
    cluster->tells = true;
    send_keys(cluster, 1, 1, 1, &theirs);
    send_keys(cluster, 0, 1, 1, &ours);
    for (uint32_t slice = 0; slice < 2; slice++)
        init(cluster, 2 + slice, slice, slice == 0 ? LARGE : 4, 0);
    for (uint64_t round = 0; round < 2; round++) {
        for (int32_t i = 0; i < 2; i++) {
            float small[4] = {1, 1, 1, 1};
            const void *data = small;
            kv_wire_record_t record = floats(KV_WIRE_PUSHPULL, 20 + round, 1, round, 4);
            push(cluster, i, floats(KV_WIRE_PUSHPULL, 10 + round, 0, round, LARGE), 1);
            send_many(cluster, i, KV_WIRE_BATCH, 1, &record, &data);
            pull(cluster, i, 30 + round, 0, round + 1);
        }
    }
    for (int32_t i = 0; i < 2; i++) {
        for (uint64_t round = 0; round < 2; round++) {
            const answer_t *answers[] = {await(cluster, i, 10 + round),
                                         await(cluster, i, 20 + round),
                                         await(cluster, i, 30 + round)};
            for (int j = 0; j < 3; j++) {
                uint8_t status = answers[j]->record.status;
                float value = 2;
                if (status == KV_OK)
                    memcpy(&value, answers[j]->data, sizeof value);
                /* A pull may find the version from before a round that has failed. */
                CHECK(value == 2 || (j == 2 && value == 0));
                CHECK(status == KV_OK || status == KV_NO_MEMORY || status == KV_TIMEOUT ||
                      status == KV_PEER_LOST || status == KV_STATUS_COUNT);
            }
        }
        drop(cluster, i, 40, 0);
        await(cluster, i, 1);
    }
    for (int32_t i = 0; i < 2; i++)
        await(cluster, i, 40);
}

static void every_allocation_may_fail(void)
{
    int64_t nth = 0, passed;
    memset(places, 0, sizeof places);
    do {
        cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
        kv_fault_set("alloc", ++nth);
        do_everything(cluster);
        passed = kv_fault_set("alloc", 0);
        cluster_end(cluster);
    } while (passed >= nth);
    CHECK(nth > 50);
}

static void a_push_that_finds_no_memory_fails_its_round(void)
{
    int failed = 0;
    for (int64_t nth = 1; nth <= 8; nth++) { /* one of these is that of the payload */
        cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
        kv_fault_set("alloc", nth); /* the first message: nothing lies in the pool yet */
        push(cluster, 1, floats(KV_WIRE_PUSHPULL, 2, 0, 0, LARGE), 1);
        peer_t *peer = &cluster->peers[1];
        WAIT_UNTIL(answer_to(peer, 2) != NULL || atomic_load(&peer->is_lost) ||
                   counters_of(cluster).waiting == 1);
        kv_fault_set("alloc", 0);
        if (answer_to(peer, 2) != NULL) {
            failed++;
            init(cluster, 1, 0, LARGE, 7);
            push(cluster, 0, floats(KV_WIRE_PUSHPULL, 2, 0, 0, LARGE), 1);
            check_failed(cluster, 1, 2, KV_NO_MEMORY, "no memory for a value of 200000 bytes");
            check_failed(cluster, 0, 2, KV_NO_MEMORY, "no memory for a value of 200000 bytes");
            pull(cluster, 0, 3, 0, 1);
            check_floats(await(cluster, 0, 3), LARGE, 7);
            for (int32_t i = 0; i < 2; i++)
                push(cluster, i, floats(KV_WIRE_PUSHPULL, 4, 0, 1, LARGE), 1);
            check_floats(await(cluster, 1, 4), LARGE, 2);
        }
        cluster_end(cluster);
    }
    CHECK(failed > 0);
}

static void a_sum_that_is_not_run_fails_its_round(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    init(cluster, 1, 0, LARGE, 7);
    check_done(cluster, 0, 1);
    for (uint64_t round = 0; round < 2; round++) {
        kv_fault_set("engine.run", round == 0);
        for (int32_t i = 0; i < 2; i++)
            push(cluster, i, floats(KV_WIRE_PUSHPULL, 2 + round, 0, round, LARGE), 1);
        for (int32_t i = 0; i < 2; i++) {
            if (round == 0)
                check_failed(cluster, i, 2, KV_NO_MEMORY, "the engine could not run a round");
            else
                check_floats(await(cluster, i, 3), LARGE, 2);
        }
    }
    kv_fault_set("engine.run", 0);
    kv_fault_set("thread.start", 0);
    cluster_end(cluster);
}

static const test_t tests[] = {
    TEST(a_round_is_the_sum_of_all_workers),
    TEST(a_round_waits_for_the_last_worker),
    TEST(a_push_ahead_is_kept_for_its_own_round),
    TEST(a_round_is_pushed_once),
    TEST(results_repeat_bit_for_bit),
    TEST(many_small_slices_travel_together),
    TEST(one_worker_alone_pushes_in_batches),
    TEST(payloads_out_of_order_change_nothing),
    TEST(what_comes_before_the_first_value_waits),
    TEST(a_slice_is_initialised_once_and_by_worker_0),
    TEST(a_first_value_may_bring_its_key_and_no_other),
    TEST(a_push_of_another_form_fails_its_round_for_all),
    TEST(an_async_server_needs_an_optimizer),
    TEST(nonsense_ends_the_session),
    TEST(every_allocation_may_fail),
    TEST(a_push_that_finds_no_memory_fails_its_round),
    TEST(a_sum_that_is_not_run_fails_its_round),
};
TEST_MAIN(tests)
