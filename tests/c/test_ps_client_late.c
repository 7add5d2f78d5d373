/* The client alone: values that come later than their call, answers that are taken one by one. */
#include "ps_fakes.h"

enum { SLICE = 80000, SMALL = 300, ROUNDS = 2 };

static unsigned char value[4 * SLICE], out[4 * SLICE];

static void start_late(bench_t *bench, test_call_t *call)
{
    call->base.late = true;
    call_start(bench->client, call);
}

static void supply(bench_t *bench, test_call_t *call, int64_t part, size_t bytes)
{
    kv_client_supply(bench->client, &call->base, part, bytes);
}

static bool has(const letter_t *letter, uint32_t index, int number, size_t bytes)
{
    const void *data = NULL;
    kv_wire_record_t record = get_record(letter, index, &data);
    bool same = CHECK_EQ(record.bytes, bytes);
    for (size_t i = 0; i < bytes && same; i++)
        same = CHECK_EQ(((const unsigned char *)data)[i], number);
    return same;
}

static kv_client_range_t next(bench_t *bench, test_call_t *call)
{
    kv_client_range_t range = {.part = -1};
    kv_caller_t caller = patient();
    CHECK_STATUS(kv_client_next(bench->client, &call->base, &caller, &range), KV_OK);
    return range;
}

/* --------------------------------------------------------------------------------- going out */

static void a_slice_goes_out_when_it_is_there(void)
{
    bench_t *bench = bench_new(1, NULL);
    fake_t *fake = bench->fakes[0];
    kv_remote_t *remote;
    bench_declare(bench, 1, SLICE, SLICE, &remote);
    test_call_t call;
    call_init(&call, KV_CLIENT_MOVE);
    call_add(&call, remote, value, NULL);
    memset(value, 1, sizeof value);
    start_late(bench, &call);
    supply(bench, &call, 0, SLICE - 1);
    memset(value, 2, SLICE);
    supply(bench, &call, 0, SLICE); /* the first letter, so none went before */
    CHECK(has(get_letter(fake, 1), 0, 2, SLICE));
    memset(value + SLICE, 3, 3 * SLICE);
    supply(bench, &call, 0, 3 * SLICE + SLICE / 2);
    CHECK(has(get_letter(fake, 2), 0, 3, SLICE));
    CHECK(has(get_letter(fake, 3), 0, 3, SLICE));
    CHECK_EQ(atomic_load(&call.num_sent), 0);
    memset(value + 3 * SLICE, 4, SLICE);
    supply(bench, &call, 1, 0);
    CHECK(has(get_letter(fake, 4), 0, 4, SLICE));
    supply(bench, &call, 1, 0); /* tells nothing new */
    for (int i = 1; i <= 4; i++)
        answer(get_letter(fake, i), 0);
    CHECK_STATUS(call_wait(&call), KV_OK);
    supply(bench, &call, 1, 0); /* nor does it hurt then */
    CHECK_EQ(atomic_load(&fake->num_letters), 5);
    kv_remote_free(remote);
    bench_free(bench);
}

static void small_values_wait_for_the_last_of_them(void)
{
    bench_t *bench = bench_new(1, NULL);
    fake_t *fake = bench->fakes[0];
    kv_remote_t *small[2], *large;
    bench_declare(bench, 2, SMALL / 4, SMALL, small);
    bench_declare(bench, 1, SLICE / 4, SLICE, &large);
    test_call_t call;
    call_init(&call, KV_CLIENT_MOVE);
    call_add(&call, small[0], value, NULL);
    call_add(&call, large, value + SLICE, NULL);
    call_add(&call, small[1], value + 2 * SLICE, NULL);
    memset(value, 1, sizeof value);
    start_late(bench, &call);
    memset(value, 2, SMALL);
    supply(bench, &call, 1, 0);
    memset(value, 9, SMALL); /* it has been read */
    memset(value + SLICE, 3, SLICE);
    supply(bench, &call, 2, 0);
    CHECK(has(get_letter(fake, 2), 0, 3, SLICE));
    CHECK_EQ(atomic_load(&fake->num_letters), 3);
    memset(value + 2 * SLICE, 4, SMALL);
    supply(bench, &call, 3, 0);
    letter_t *batch = get_letter(fake, 3);
    CHECK_EQ(batch->header.count, 2);
    CHECK(has(batch, 0, 2, SMALL) && has(batch, 1, 4, SMALL));
    answer(get_letter(fake, 2), 0);
    answer(batch, 0);
    CHECK_STATUS(call_wait(&call), KV_OK);
    for (int i = 0; i < 2; i++)
        kv_remote_free(small[i]);
    kv_remote_free(large);
    bench_free(bench);
}

static void what_waits_for_its_turn_goes_then_as_far_as_it_is_there(void)
{
    bench_t *bench = bench_new(1, NULL);
    fake_t *fake = bench->fakes[0];
    kv_remote_t *remote;
    bench_declare(bench, 1, SLICE / 2, SLICE, &remote); /* two slices */
    test_call_t before[ROUNDS], call;
    for (int i = 0; i < ROUNDS; i++)
        start_push(bench, &before[i], remote, value);
    call_init(&call, KV_CLIENT_MOVE);
    call_add(&call, remote, value + 2 * SLICE, NULL);
    start_late(bench, &call);
    memset(value + 2 * SLICE, 5, SLICE);
    supply(bench, &call, 0, SLICE);
    for (int i = 1; i <= 4; i++)
        answer(get_letter(fake, i), 0);
    CHECK(has(get_letter(fake, 5), 0, 5, SLICE));
    CHECK_EQ(atomic_load(&fake->num_letters), 6);
    memset(value + 3 * SLICE, 6, SLICE);
    supply(bench, &call, 1, 0);
    CHECK(has(get_letter(fake, 6), 0, 6, SLICE));
    for (int i = 5; i <= 6; i++)
        answer(get_letter(fake, i), 0);
    for (int i = 0; i < ROUNDS; i++)
        CHECK_STATUS(call_wait(&before[i]), KV_OK);
    CHECK_STATUS(call_wait(&call), KV_OK);
    kv_remote_free(remote);
    bench_free(bench);
}

static void a_call_whose_values_stop_leaves_the_servers(void)
{
    bench_t *bench = bench_new(2, NULL);
    kv_remote_t *remote;
    bench_declare(bench, 1, SLICE / 2, SLICE, &remote);
    test_call_t call, later;
    call_init(&call, KV_CLIENT_MOVE);
    call_add(&call, remote, value, out);
    start_late(bench, &call);
    supply(bench, &call, 0, SLICE);
    get_letter(bench->fakes[0], 1);
    kv_client_abandon(bench->client, "the device is gone");
    CHECK_STATUS(call_wait(&call), KV_PEER_LOST);
    CHECK_TEXT(call.message, "key 0: the device is gone");
    supply(bench, &call, 1, 0);
    for (int i = 0; i < 2; i++)
        WAIT_UNTIL(atomic_load(&bench->fakes[i]->num_lost) == 1);
    CHECK_EQ(atomic_load(&bench->fakes[1]->num_letters), 0);
    call_init(&later, KV_CLIENT_MOVE);
    call_add(&later, remote, value, NULL);
    CHECK_STATUS(call_run(bench->client, &later), KV_PEER_LOST);
    kv_remote_free(remote);
    bench_free(bench);
}

static void a_server_that_dies_ends_a_call_that_is_not_all_there(void)
{
    bench_t *bench = bench_new(2, NULL);
    kv_remote_t *remote;
    bench_declare(bench, 1, SLICE / 2, SLICE, &remote);
    test_call_t call;
    call_init(&call, KV_CLIENT_MOVE);
    call_add(&call, remote, value, NULL);
    start_late(bench, &call);
    supply(bench, &call, 0, SLICE);
    get_letter(bench->fakes[0], 1);
    kv_net_close(bench->fakes[1]->net);
    CHECK_STATUS(call_wait(&call), KV_PEER_LOST);
    supply(bench, &call, 1, 0);
    kv_remote_free(remote);
    bench_free(bench);
}

/* --------------------------------------------------------------------------------- coming in */

static void answers_are_given_as_they_come(void)
{
    bench_t *bench = bench_new(2, NULL);
    kv_remote_t *remote;
    bench_declare(bench, 1, 3 * SLICE / 4, SLICE, &remote); /* slices 0 and 2 on server 0 */
    test_call_t call;
    call_init(&call, KV_CLIENT_MOVE);
    call_add(&call, remote, NULL, out);
    call.base.watched = true;
    call_start(bench->client, &call);
    answer(get_letter(bench->fakes[1], 0), SLICE);
    kv_client_range_t range = next(bench, &call);
    CHECK_EQ(range.part, 0);
    CHECK_EQ(range.offset, SLICE);
    CHECK_EQ(range.bytes, SLICE);
    has_bytes(out + SLICE, SLICE, 100, 1);
    answer(get_letter(bench->fakes[0], 1), SLICE);
    CHECK_EQ(next(bench, &call).offset, 0);
    CHECK_EQ(atomic_load(&call.num_done), 0); /* one is not taken yet */
    CHECK_EQ(next(bench, &call).offset, 2 * SLICE);
    CHECK_EQ(next(bench, &call).bytes, 0);
    CHECK_STATUS(call_wait(&call), KV_OK);
    CHECK_EQ(next(bench, &call).bytes, 0);
    has_bytes(out, SLICE, 100, 0);
    has_bytes(out + 2 * SLICE, SLICE, 100, 2);
    kv_remote_free(remote);
    bench_free(bench);
}

static kv_status_t interrupt(kv_caller_t *caller)
{
    (void)caller;
    return KV_INTERRUPTED;
}

static void a_wait_for_answers_ends_early(void)
{
    bench_t *bench = bench_new(1, NULL);
    kv_remote_t *remote;
    bench_declare(bench, 1, SLICE / 4, SLICE, &remote);
    test_call_t call;
    call_init(&call, KV_CLIENT_MOVE);
    call_add(&call, remote, NULL, out);
    call.base.watched = true;
    call_start(bench->client, &call);
    kv_client_range_t range;
    kv_caller_t hasty = patient(), stopped = patient();
    hasty.timeout_ns = 1;
    stopped.poll = interrupt;
    CHECK_STATUS(kv_client_next(bench->client, &call.base, &hasty, &range), KV_TIMEOUT);
    CHECK_STATUS(kv_client_next(bench->client, &call.base, &stopped, &range), KV_INTERRUPTED);
    char missing[64];
    kv_client_cancel(bench->client, &call.base, missing, sizeof missing);
    CHECK_TEXT(missing, "server 0");
    answer(get_letter(bench->fakes[0], 1), SLICE);
    CHECK_STATUS(call_wait(&call), KV_OK); /* though nobody takes what has come */
    kv_remote_free(remote);
    bench_free(bench);
}

static void what_nobody_has_taken_does_not_keep_a_call_that_fails(void)
{
    bench_t *bench = bench_new(2, NULL);
    kv_remote_t *remote;
    bench_declare(bench, 1, 3 * SLICE / 4, SLICE, &remote);
    test_call_t call;
    call_init(&call, KV_CLIENT_MOVE);
    call_add(&call, remote, NULL, out);
    call.base.watched = true;
    call_start(bench->client, &call);
    answer(get_letter(bench->fakes[0], 1), SLICE); /* two at once */
    CHECK_EQ(next(bench, &call).bytes, SLICE);
    kv_client_lose(bench->client, "the test is over");
    CHECK_STATUS(call_wait(&call), KV_PEER_LOST);
    CHECK_EQ(next(bench, &call).bytes, 0);
    kv_remote_free(remote);
    bench_free(bench);
}

static const test_t tests[] = {
    TEST(a_slice_goes_out_when_it_is_there),
    TEST(small_values_wait_for_the_last_of_them),
    TEST(what_waits_for_its_turn_goes_then_as_far_as_it_is_there),
    TEST(a_call_whose_values_stop_leaves_the_servers),
    TEST(a_server_that_dies_ends_a_call_that_is_not_all_there),
    TEST(answers_are_given_as_they_come),
    TEST(a_wait_for_answers_ends_early),
    TEST(what_nobody_has_taken_does_not_keep_a_call_that_fails),
};

TEST_MAIN(tests)
