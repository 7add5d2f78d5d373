/* The client alone: answers that are none, and how calls end. */
#include "ps_fakes.h"

/* ------------------------------------------------------------------------------------- nonsense */

typedef enum nonsense {
    OTHER_REQUEST,
    OTHER_TAG,
    OTHER_KEY,
    OTHER_SLICE,
    OTHER_TYPE,
    A_CODEC,
    TOO_SHORT,
    TOO_LONG,
    TWICE,
    FROM_ANOTHER_SERVER,
    A_CALLBACKS_STATUS,
    AN_ERROR_ALONE,
    NO_RECORDS,
    TOO_MANY_RECORDS,
    A_WORKERS_MESSAGE,
    OTHER_VERSION,
    DECLARED_UNASKED,
    NUM_NONSENSE
} nonsense_t;

static void say(fake_t *fake, kv_wire_header_t header, nonsense_t nonsense, bool alone)
{
    unsigned char payload[256] = {0};
    size_t size = (size_t)header.record.bytes;
    header.kind = alone ? KV_WIRE_VALUE : KV_WIRE_REPLIES;
    header.count = nonsense == NO_RECORDS ? 0 : nonsense == TOO_MANY_RECORDS ? 1000 : 1;
    header.record.request += nonsense == OTHER_REQUEST;
    header.record.tag += nonsense == OTHER_TAG;
    header.record.key += nonsense == OTHER_KEY;
    header.record.slice += nonsense == OTHER_SLICE;
    header.record.dtype = nonsense == OTHER_TYPE ? KV_INT64 : KV_FLOAT32;
    header.record.codec = nonsense == A_CODEC;
    header.record.status = nonsense == A_CALLBACKS_STATUS ? KV_CALLBACK
                           : nonsense == AN_ERROR_ALONE   ? KV_TIMEOUT
                                                          : KV_OK;
    if (nonsense == TOO_SHORT || nonsense == TOO_LONG)
        header.record.bytes = size = nonsense == TOO_SHORT ? size - 4 : size + 4;
    if (nonsense == A_WORKERS_MESSAGE)
        header.kind = KV_WIRE_PULL;
    if (nonsense == OTHER_VERSION)
        header.version++;
    if (nonsense == DECLARED_UNASKED)
        header.kind = KV_WIRE_DECLARED;
    if (alone) {
        fake_send(fake, &header, payload, size);
        return;
    }
    kv_wire_put_record(&header.record, payload);
    memset(payload + kv_wire_table_bytes(1), 7, size);
    fake_send(fake, &header, payload, kv_wire_table_bytes(1) + size);
}

static void check_nonsense(nonsense_t nonsense, bool alone)
{
    bench_t *bench = bench_new(2, NULL);
    kv_remote_t *remote;
    float value[4] = {0}, out[6] = {5, 5, 5, 5, 5, 5};
    bench_declare(bench, 1, 4, 8, &remote);
    test_call_t call;
    call_init(&call, KV_CLIENT_MOVE);
    call_add(&call, remote, value, out);
    call_start(bench->client, &call);
    kv_wire_header_t header = get_letter(bench->fakes[0], 1)->header;
    get_letter(bench->fakes[1], 0);
    int from = nonsense == FROM_ANOTHER_SERVER;
    if (nonsense == TWICE)
        say(bench->fakes[0], header, NUM_NONSENSE, alone);
    say(bench->fakes[from], header, nonsense, alone);
    bool good = CHECK_STATUS(call_wait(&call), KV_PEER_LOST);
    good = good && CHECK(strstr(call.message, "key 0: ") == call.message);
    good = good && CHECK(strstr(call.message, from ? "server 1 is gone" : "server 0 is gone"));
    for (int i = nonsense == TWICE ? 2 : 0; i < 6; i++)
        good = good && CHECK(out[i] == 5);
    good = good && CHECK_STATUS(kv_client_check(bench->client), KV_PEER_LOST);
    if (!good)
        printf("    nonsense %d, %s\n", (int)nonsense, alone ? "alone" : "among others");
    kv_remote_free(remote);
    bench_free(bench);
}

static void an_answer_that_fits_nothing_ends_the_session_and_writes_nothing(void)
{
    for (int nonsense = 0; nonsense < NUM_NONSENSE; nonsense++) {
        bool counts = nonsense == NO_RECORDS || nonsense == TOO_MANY_RECORDS;
        bool error = nonsense == AN_ERROR_ALONE;
        if (!counts)
            check_nonsense((nonsense_t)nonsense, true);
        if (!error && nonsense != NO_RECORDS) /* without records there is nothing wrong to say */
            check_nonsense((nonsense_t)nonsense, false);
    }
}

static void a_placement_that_cannot_be_ends_the_session(void)
{
    static const struct {
        uint64_t slice_bytes;
        uint32_t num_slices;
        int32_t server;
        int64_t count, name;
    } wrong[] = {{16, 4, 2, 16, 1}, {0, 4, 0, 16, 1},       {16, 5, 0, 16, 1},
                 {16, 3, 0, 16, 1}, {6, 11, 0, 16, 1},      {16, 4, 0, 17, 1},
                 {16, 4, 0, 16, 2}, {2 << 20, 1, 0, 16, 1}, {16, 1u << 31, 0, 16, 1}};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        bench_t *bench = bench_new(2, NULL);
        test_call_t call;
        call_init(&call, KV_CLIENT_DECLARE);
        call_add_key(&call, 1, 16, NULL);
        call_start(bench->client, &call);
        kv_wire_header_t header = get_letter(bench->fakes[0], 0)->header;
        unsigned char payload[1024] = {0}, servers[64] = {0};
        uint32_t num_slices = wrong[i].num_slices < 32 ? wrong[i].num_slices : 32;
        kv_wire_key_t key = {.name = {.number = wrong[i].name},
                             .dtype = KV_FLOAT32,
                             .ndim = 1,
                             .shape = {wrong[i].count},
                             .placed = 1,
                             .slice_bytes = wrong[i].slice_bytes,
                             .num_slices = num_slices,
                             .servers = servers};
        kv_wire_put_server(servers, num_slices - 1, wrong[i].server);
        kv_wire_put_key(&key, payload);
        header.kind = KV_WIRE_DECLARED;
        fake_send(bench->fakes[0], &header, payload, kv_wire_key_bytes(&key));
        CHECK_STATUS(call_wait(&call), KV_PEER_LOST);
        CHECK(call.keys[0].remote == NULL);
        bench_free(bench);
    }
}

/* ----------------------------------------------------------------------------------------- ends */

static void a_lost_cluster_ends_all_calls_and_refuses_new_ones(void)
{
    bench_t *bench = bench_new(1, NULL);
    kv_remote_t *remote;
    float value[4] = {0};
    bench_declare(bench, 1, 4, 16, &remote);
    test_call_t calls[4]; /* the last two wait for their turn */
    for (int i = 0; i < 4; i++)
        start_push(bench, &calls[i], remote, value);
    get_letter(bench->fakes[0], 2);
    kv_client_lose(bench->client, "worker 0 was killed");
    kv_client_lose(bench->client, "another reason");
    for (int i = 0; i < 4; i++) {
        CHECK_STATUS(call_wait(&calls[i]), KV_PEER_LOST);
        CHECK_TEXT(calls[i].message, "key 0: worker 0 was killed");
    }
    call_init(&calls[0], KV_CLIENT_MOVE);
    CHECK_STATUS(kv_client_start(bench->client, &calls[0].base), KV_PEER_LOST);
    CHECK_TEXT(kv_status_message(KV_PEER_LOST), "worker 0 was killed");
    CHECK_EQ(atomic_load(&calls[0].num_done), 0);
    kv_remote_free(remote);
    bench_free(bench);
}

static void a_lost_server_is_named(void)
{
    kv_remote_t *remotes[2];
    float value[4] = {0};
    bench_t *bench = bench_half(4, remotes);
    test_call_t call;
    start_push(bench, &call, remotes[1], value);
    get_letter(bench->fakes[0], 1);
    kv_net_close(bench->fakes[0]->net);
    CHECK_STATUS(call_wait(&call), KV_PEER_LOST);
    CHECK(strstr(call.message, "key 1: server 0 is gone: ") == call.message);
    kv_remote_free(remotes[0]);
    kv_remote_free(remotes[1]);
    bench_free(bench);
}

static void closing_ends_what_is_under_way(void)
{
    kv_remote_t *remotes[2];
    static float value[1 << 16];
    bench_t *bench = bench_half(1 << 16, remotes);
    test_call_t calls[3];
    for (int i = 0; i < 3; i++)
        start_push(bench, &calls[i], remotes[0], value);
    kv_net_close(bench->net);
    kv_client_close(bench->client);
    for (int i = 0; i < 3; i++)
        CHECK_STATUS(call_wait(&calls[i]), KV_CLOSED);
    CHECK_STATUS(kv_client_check(bench->client), KV_CLOSED);
    CHECK_STATUS(call_run(bench->client, &calls[0]), KV_CLOSED);
    kv_remote_free(remotes[0]);
    kv_remote_free(remotes[1]);
    bench_free(bench);
}

/* --------------------------------------------------------------------------------------- cancel */

static void a_call_that_is_given_up_sends_what_its_caller_had_then(void)
{
    enum { BYTES = 1 << 18 };
    kv_remote_t *remotes[2];
    unsigned char *values[3], out[BYTES];
    bench_t *bench = bench_half(BYTES / 4, remotes);
    test_call_t calls[3];
    memset(out, 9, sizeof out);
    for (int i = 0; i < 3; i++) { /* the third waits for its turn */
        values[i] = malloc(BYTES);
        memset(values[i], i + 1, BYTES);
        call_init(&calls[i], KV_CLIENT_MOVE);
        call_add(&calls[i], remotes[0], values[i], out);
        call_start(bench->client, &calls[i]);
    }
    get_letter(bench->fakes[0], 2);
    for (int i = 0; i < 3; i++) {
        char missing[64];
        kv_client_cancel(bench->client, &calls[i].base, missing, sizeof missing);
        CHECK_TEXT(missing, "server 0, server 1");
        free(values[i]);
    }
    bench_connect_rest(bench);
    for (int i = 0; i < 3; i++) {
        letter_t *near = get_letter(bench->fakes[0], i + 1), *far = get_letter(bench->fakes[1], i);
        CHECK_EQ(near->header.record.round, i);
        size_t wrong = 0;
        for (size_t b = 0; b < BYTES / 2; b++)
            wrong += (near->payload[b] != i + 1) + (far->payload[b] != i + 1);
        CHECK_EQ(wrong, 0);
        CHECK(near->bytes == BYTES / 2 && far->bytes == BYTES / 2);
        answer(near, BYTES / 2);
        answer(far, BYTES / 2);
        CHECK_STATUS(call_wait(&calls[i]), KV_OK);
    }
    for (size_t b = 0; b < BYTES; b++)
        if (!CHECK_EQ(out[b], 9))
            break;
    char missing[64] = "x";
    kv_client_cancel(bench->client, &calls[0].base, missing, sizeof missing);
    CHECK_TEXT(missing, "");
    kv_remote_free(remotes[0]);
    kv_remote_free(remotes[1]);
    bench_free(bench);
}

/* Whether a message is on its way to server 0, no longer in the queue. */
static bool is_under_way(const bench_t *bench)
{
    kv_mutex_lock(&bench->net->lock);
    bool under_way = bench->net->peers[WORKERS].under_way > 0;
    kv_mutex_unlock(&bench->net->lock);
    return under_way;
}

static void a_transfer_that_does_not_end_is_ended_by_cancel(void)
{
    kv_remote_t *remote;
    float *value = malloc(1 << 18);
    memset(value, 0, 1 << 18);
    bench_t *bench = bench_new(1, "stall=1:2");
    bench_declare(bench, 1, 1 << 16, 1 << 18, &remote);
    test_call_t call;
    char missing[64];
    start_push(bench, &call, remote, value);
    WAIT_UNTIL(is_under_way(bench));
    kv_client_cancel(bench->client, &call.base, missing, sizeof missing);
    free(value);
    CHECK_STATUS(call_wait(&call), KV_PEER_LOST);
    CHECK(strstr(call.message, "given up") != NULL);
    kv_remote_free(remote);
    bench_free(bench);
}

static void a_lost_cluster_does_not_wait_for_a_transfer_that_does_not_end(void)
{
    kv_remote_t *remote;
    static float value[1 << 16];
    bench_t *bench = bench_new(1, "stall=1:2");
    bench_declare(bench, 1, 1 << 16, 1 << 18, &remote);
    test_call_t call;
    start_push(bench, &call, remote, value);
    WAIT_UNTIL(is_under_way(bench));
    kv_client_lose(bench->client, "worker 0 was killed");
    CHECK_STATUS(call_wait(&call), KV_PEER_LOST);
    CHECK_TEXT(call.message, "key 0: worker 0 was killed");
    kv_remote_free(remote);
    bench_free(bench);
}

static const test_t tests[] = {
    TEST(an_answer_that_fits_nothing_ends_the_session_and_writes_nothing),
    TEST(a_placement_that_cannot_be_ends_the_session),
    TEST(a_lost_cluster_ends_all_calls_and_refuses_new_ones),
    TEST(a_lost_server_is_named),
    TEST(closing_ends_what_is_under_way),
    TEST(a_call_that_is_given_up_sends_what_its_caller_had_then),
    TEST(a_transfer_that_does_not_end_is_ended_by_cancel),
    TEST(a_lost_cluster_does_not_wait_for_a_transfer_that_does_not_end),
};

TEST_MAIN(tests)
