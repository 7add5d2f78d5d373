/* The client alone: what it sends, and in which order. */
#include "ps_fakes.h"

/* ------------------------------------------------------------------------------------- messages */

static void a_small_pushpull_is_one_message_each_way(void)
{
    bench_t *bench = bench_new(1, NULL);
    kv_remote_t *remote;
    float value[16] = {1, 2, 3};
    unsigned char out[64] = {0};
    bench_declare(bench, 1, 16, 64, &remote);
    test_call_t call;
    call_init(&call, KV_CLIENT_MOVE);
    call.base.timeout_ms = 1234;
    call.base.priority = -5;
    call_add(&call, remote, value, out);
    call_start(bench->client, &call);
    letter_t *letter = get_letter(bench->fakes[0], 1);
    CHECK_EQ(letter->header.kind, KV_WIRE_PUSH_ONE);
    CHECK_EQ((int32_t)letter->header.priority, -5);
    CHECK_EQ(letter->header.timeout_ms, 1234);
    CHECK_EQ(letter->header.record.action, KV_WIRE_PUSHPULL);
    CHECK_EQ(letter->header.record.round, 0);
    CHECK_EQ(letter->header.record.key, 100);
    CHECK(letter->bytes == 64 && memcmp(letter->payload, value, 64) == 0);
    answer(letter, 64);
    CHECK_STATUS(call_wait(&call), KV_OK);
    has_bytes(out, 64, 100, 0);
    CHECK_EQ(atomic_load(&bench->fakes[0]->num_letters), 2);
    kv_remote_free(remote);
    bench_free(bench);
}

static void small_values_go_together_and_large_ones_alone(void)
{
    enum { SMALL = 300, LARGE = 2 * KV_WIRE_SMALL_BYTES + 8 };
    bench_t *bench = bench_new(2, NULL);
    kv_remote_t *small[3], *large;
    static unsigned char values[4][LARGE];
    bench_declare(bench, 3, SMALL / 4, SMALL, small);
    bench_declare(bench, 1, LARGE / 4, LARGE / 2, &large);
    for (int i = 0; i < 4; i++)
        memset(values[i], i + 1, LARGE);
    test_call_t call;
    call_init(&call, KV_CLIENT_MOVE);
    call_add(&call, small[0], values[0], NULL);
    call_add(&call, large, values[3], NULL);
    call_add(&call, small[1], values[1], NULL);
    call_add(&call, small[2], NULL, values[2]);
    call_start(bench->client, &call);
    letter_t *pull = get_letter(bench->fakes[0], 2), *batch = get_letter(bench->fakes[0], 3);
    letter_t *half = get_letter(bench->fakes[0], 4), *other = get_letter(bench->fakes[1], 0);
    WAIT_UNTIL(atomic_load(&call.num_sent) == 1);
    CHECK_EQ(pull->header.kind, KV_WIRE_PULL);
    CHECK_EQ(batch->header.kind, KV_WIRE_BATCH);
    CHECK_EQ(batch->header.count, 2);
    for (uint32_t i = 0; i < 2; i++) {
        const void *value = NULL;
        kv_wire_record_t record = get_record(batch, i, &value);
        CHECK_EQ(record.action, KV_WIRE_PUSH);
        CHECK_EQ(record.bytes, SMALL);
        CHECK(memcmp(value, values[i], SMALL) == 0);
    }
    CHECK_EQ(half->header.kind, KV_WIRE_PUSH_ONE);
    CHECK_EQ(half->header.record.slice, 0);
    CHECK_EQ(other->header.record.slice, 1);
    CHECK(other->bytes == LARGE / 2 && memcmp(other->payload, values[3], LARGE / 2) == 0);
    answer(other, 0);
    answer(half, 0);
    answer(pull, SMALL);
    CHECK_EQ(atomic_load(&call.num_done), 0);
    answer(batch, 0);
    CHECK_STATUS(call_wait(&call), KV_OK);
    has_bytes(values[2], SMALL, 102, 0);
    for (int i = 0; i < 3; i++)
        kv_remote_free(small[i]);
    kv_remote_free(large);
    bench_free(bench);
}

static void many_small_values_are_split_into_messages_of_a_slice(void)
{
    enum { BYTES = 16 << 10, SLICES = 100 };
    bench_t *bench = bench_new(1, NULL);
    kv_remote_t *remote;
    unsigned char *value = malloc((size_t)BYTES * SLICES);
    for (size_t i = 0; i < (size_t)BYTES * SLICES; i++)
        value[i] = (unsigned char)(i / BYTES);
    bench_declare(bench, 1, (int64_t)BYTES * SLICES / 4, BYTES, &remote);
    test_call_t call;
    call_init(&call, KV_CLIENT_MOVE);
    call_add(&call, remote, value, NULL);
    call_start(bench->client, &call);
    uint32_t seen = 0;
    for (int l = 1; l <= 2; l++) {
        letter_t *letter = get_letter(bench->fakes[0], l);
        CHECK(letter->bytes <= KV_WIRE_SLICE_BYTES);
        for (uint32_t i = 0; i < letter->header.count; i++) {
            const void *data = NULL;
            kv_wire_record_t record = get_record(letter, i, &data);
            CHECK_EQ(record.slice, seen);
            CHECK_EQ(*(const unsigned char *)data, seen);
            seen++;
        }
        answer(letter, 0);
    }
    CHECK_EQ(seen, SLICES);
    CHECK_STATUS(call_wait(&call), KV_OK);
    kv_remote_free(remote);
    free(value);
    bench_free(bench);
}

static void rank_0_places_keys_and_sends_their_values(void)
{
    bench_t *bench = bench_new(2, NULL);
    kv_client_config_t config = {0, WORKERS, 2};
    kv_client_t *client;
    CHECK_STATUS(kv_client_new(&config, &client), KV_OK);
    kv_client_attach(client, bench->net); /* only to send: the answers would go to the other */
    static float values[2][512 << 10];
    test_call_t call;
    call_init(&call, KV_CLIENT_DECLARE);
    call_add_key(&call, 5, 512 << 10, values[0]);
    call_add_key(&call, 6, 8, values[1]);
    call_start(client, &call);
    letter_t *declare = get_letter(bench->fakes[0], 0);
    CHECK_EQ(declare->header.kind, KV_WIRE_DECLARE);
    size_t offset = 0;
    kv_wire_key_t keys[2];
    for (int i = 0; i < 2; i++)
        CHECK_STATUS(kv_wire_get_key(declare->payload, declare->bytes, &offset, &keys[i]), KV_OK);
    CHECK_EQ(keys[0].num_slices, 2);
    CHECK(kv_wire_server_of(&keys[0], 0) != kv_wire_server_of(&keys[0], 1));
    CHECK_EQ(keys[1].num_slices, 1);
    CHECK(keys[0].placed && keys[1].placed && keys[0].number != keys[1].number);
    CHECK_EQ(get_letter(bench->fakes[0], 1)->header.record.action, KV_WIRE_INIT);
    CHECK_EQ(get_letter(bench->fakes[1], 0)->header.record.action, KV_WIRE_INIT);
    WAIT_UNTIL(atomic_load(&bench->fakes[0]->num_letters) +
                   atomic_load(&bench->fakes[1]->num_letters) ==
               4);
    kv_client_lose(client, "the test is over");
    WAIT_UNTIL(atomic_load(&call.num_sent) == 1 || (kv_client_lose(client, ""), false));
    CHECK_STATUS(call_wait(&call), KV_PEER_LOST);
    CHECK_TEXT(call.message, "key 5: the test is over");
    CHECK(call.keys[0].remote == NULL);
    bench_free(bench);
    kv_client_close(client);
    kv_client_free(client);
}

static void an_error_of_a_key_is_the_calls(void)
{
    bench_t *bench = bench_new(1, NULL);
    test_call_t call;
    call_init(&call, KV_CLIENT_DECLARE);
    call_add_key(&call, 3, 4, NULL);
    call_add_key(&call, 4, 4, NULL);
    call_start(bench->client, &call);
    answer_declare(bench, get_letter(bench->fakes[0], 0), 16, KV_INVALID);
    CHECK_STATUS(call_wait(&call), KV_INVALID);
    CHECK_TEXT(call.message, "key 3: it has another shape (server 0)");
    CHECK(call.keys[0].remote == NULL && call.keys[1].remote == NULL);
    bench_free(bench);
}

/* --------------------------------------------------------------------------------------- order */

static void a_third_round_waits_and_so_does_all_behind_it(void)
{
    bench_t *bench = bench_new(1, NULL);
    kv_remote_t *remotes[2];
    float value[4] = {0}, out[2][4];
    fake_t *fake = bench->fakes[0];
    bench_declare(bench, 2, 4, 16, remotes);
    test_call_t pushes[3], pull, both, other;
    for (int i = 0; i < 3; i++)
        start_push(bench, &pushes[i], remotes[0], value);
    call_init(&pull, KV_CLIENT_MOVE); /* behind the third push */
    call_add(&pull, remotes[0], NULL, out[0]);
    call_start(bench->client, &pull);
    call_init(&both, KV_CLIENT_MOVE);
    call_add(&both, remotes[1], value, out[1]);
    call_add(&both, remotes[0], NULL, out[0]);
    call_start(bench->client, &both);
    start_push(bench, &other, remotes[1], value); /* behind that one */
    letter_t *first = get_letter(fake, 1), *second = get_letter(fake, 2);
    CHECK_EQ(first->header.record.round, 0);
    CHECK_EQ(second->header.record.round, 1);
    answer(first, 0);
    CHECK_STATUS(call_wait(&pushes[0]), KV_OK);
    letter_t *third = get_letter(fake, 3), *pulled = get_letter(fake, 4);
    CHECK_EQ(third->header.record.round, 2);
    const void *data;
    kv_wire_record_t record = get_record(pulled, 0, &data);
    CHECK_EQ(record.action, KV_WIRE_GET);
    CHECK_EQ(record.round, 3);
    for (int l = 2; l < 8; l++)
        answer(get_letter(fake, l), 16);
    for (int i = 1; i < 3; i++)
        CHECK_STATUS(call_wait(&pushes[i]), KV_OK);
    CHECK_STATUS(call_wait(&pull), KV_OK);
    CHECK_STATUS(call_wait(&both), KV_OK);
    CHECK_STATUS(call_wait(&other), KV_OK);
    CHECK_EQ(get_letter(fake, 7)->header.record.round, 1);
    kv_remote_free(remotes[0]);
    kv_remote_free(remotes[1]);
    bench_free(bench);
}

static void the_urgent_go_first_and_a_push_waits_for_pulls(void)
{
    kv_remote_t *remotes[2];
    float value[4] = {0};
    bench_t *bench = bench_half(4, remotes);
    static const struct {
        int remote;
        int32_t priority;
        bool pulls;
    } starts[] = {{0, -10, true}, {0, 10, false}, {1, 0, false}, {1, 20, true}};
    test_call_t calls[4];
    for (int i = 0; i < 4; i++) {
        call_init(&calls[i], KV_CLIENT_MOVE);
        call_add(&calls[i], remotes[starts[i].remote], starts[i].pulls ? NULL : value,
                 starts[i].pulls ? value : NULL);
        calls[i].base.priority = starts[i].priority;
        call_start(bench->client, &calls[i]);
    }
    bench_connect_rest(bench);
    static const int due[] = {3, 2, 0, 1};
    static const uint64_t rounds[] = {1, 0, 0, 0};
    for (int i = 0; i < 4; i++) {
        const void *data;
        letter_t *letter = get_letter(bench->fakes[1], i);
        kv_wire_record_t record = get_record(letter, 0, &data);
        CHECK_EQ(record.key, 100 + starts[due[i]].remote);
        CHECK_EQ(record.round, rounds[i]);
        CHECK_EQ((int32_t)letter->header.priority, starts[due[i]].priority);
        if (i == 2) /* nothing more goes out before it is answered */
            CHECK_EQ(atomic_load(&bench->fakes[1]->num_letters), 3);
        answer(letter, 8);
        answer(get_letter(bench->fakes[0], 1 + i), 8);
    }
    for (int i = 0; i < 4; i++)
        CHECK_STATUS(call_wait(&calls[i]), KV_OK);
    kv_remote_free(remotes[0]);
    kv_remote_free(remotes[1]);
    bench_free(bench);
}

static void a_delete_waits_for_the_calls_before_it(void)
{
    bench_t *bench = bench_new(2, NULL);
    kv_remote_t *remote;
    float value[4] = {0};
    bench_declare(bench, 1, 4, 16, &remote);
    test_call_t push, drop;
    start_push(bench, &push, remote, value);
    call_init(&drop, KV_CLIENT_DELETE);
    call_add(&drop, remote, NULL, NULL);
    call_start(bench->client, &drop);
    letter_t *pushed = get_letter(bench->fakes[0], 1);
    WAIT_UNTIL(atomic_load(&push.num_sent) == 1);
    CHECK_EQ(atomic_load(&bench->fakes[0]->num_letters), 2);
    answer(pushed, 0);
    letter_t *dropped = get_letter(bench->fakes[0], 2);
    CHECK_EQ(dropped->header.kind, KV_WIRE_DELETE);
    const void *data;
    kv_wire_record_t record = get_record(dropped, 0, &data);
    CHECK_EQ(record.action, KV_WIRE_DROP);
    answer(dropped, 0);
    CHECK_STATUS(call_wait(&drop), KV_OK);
    CHECK_EQ(atomic_load(&bench->fakes[1]->num_letters), 0); /* it had nothing of the key */
    CHECK_STATUS(call_wait(&push), KV_OK);
    kv_remote_free(remote);
    bench_free(bench);
}

static const test_t tests[] = {
    TEST(a_small_pushpull_is_one_message_each_way),
    TEST(small_values_go_together_and_large_ones_alone),
    TEST(many_small_values_are_split_into_messages_of_a_slice),
    TEST(rank_0_places_keys_and_sends_their_values),
    TEST(an_error_of_a_key_is_the_calls),
    TEST(a_third_round_waits_and_so_does_all_behind_it),
    TEST(the_urgent_go_first_and_a_push_waits_for_pulls),
    TEST(a_delete_waits_for_the_calls_before_it),
};

TEST_MAIN(tests)
