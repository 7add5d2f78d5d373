/* The client alone: rows that it sends, and rows that servers answer with. */
#include "ps_fakes.h"

enum { ROWS = 8 }; /* of one float each, in one slice */

static kv_host_t make_host(void)
{
    kv_host_t host = {.num_threads = 1};
    CHECK_STATUS(kv_kernels_get(&host.kernels), KV_OK);
    CHECK_STATUS(kv_team_new(1, &host.team), KV_OK);
    return host;
}

static void free_host(kv_host_t *host)
{
    kv_team_stop(host->team);
    kv_team_free(host->team);
}

/* A key of the servers; row-sparse, or dense. */
static kv_remote_t *declare(bench_t *bench, bool sparse)
{
    test_call_t call;
    call_init(&call, KV_CLIENT_DECLARE);
    call_add_key(&call, 1, ROWS, NULL);
    call.keys[0].sparse = sparse;
    int before = atomic_load(&bench->fakes[0]->num_letters);
    call_start(bench->client, &call);
    answer_declare(bench, get_letter(bench->fakes[0], before), (size_t)ROWS * 4, KV_OK);
    CHECK_STATUS(call_wait(&call), KV_OK);
    return call.keys[0].remote;
}

static size_t rows_into(void *out, int64_t num_rows, size_t row_bytes, int64_t count,
                        const int64_t *ids)
{
    kv_wire_rows_t rows = {count, num_rows, row_bytes, NULL, NULL};
    int64_t *at = kv_wire_put_rows(&rows, out);
    memcpy(at, ids, (size_t)count * sizeof *ids);
    memset(at + count, 0, (size_t)count * row_bytes);
    for (int64_t i = 0; i < count && row_bytes >= 4; i++)
        memcpy((char *)(at + count) + (size_t)i * row_bytes, &(float){(float)ids[i] + 100}, 4);
    return kv_wire_rows_bytes(count, row_bytes);
}

typedef enum nonsense {
    NONE,
    NO_ORDER,
    OUTSIDE,
    OTHER_SLICE,
    OTHER_ROWS,
    OTHER_COUNT,
    NO_ROWS,
    AN_ERROR,
    NUM_NONSENSE
} nonsense_t;

/* Answers with the rows 1 and 5. */
static void say(fake_t *fake, const letter_t *letter, nonsense_t nonsense, bool alone)
{
    static const int64_t good[] = {1, 5}, unordered[] = {5, 1}, outside[] = {1, ROWS};
    _Alignas(8) unsigned char payload[1024] = {0};
    const void *data;
    size_t table = alone ? 0 : kv_wire_table_bytes(1);
    kv_wire_record_t record = get_record(letter, 0, &data);
    record.flags = nonsense == NO_ROWS ? 0 : KV_WIRE_ROWS;
    record.status = nonsense == AN_ERROR ? KV_INTERRUPTED : KV_OK;
    record.bytes = rows_into(payload + table, nonsense == OTHER_SLICE ? ROWS + 1 : ROWS,
                             nonsense == OTHER_ROWS ? 8 : 4, 2,
                             nonsense == NO_ORDER  ? unordered
                             : nonsense == OUTSIDE ? outside
                                                   : good);
    payload[table] += nonsense == OTHER_COUNT;
    kv_wire_header_t header = {.version = KV_WIRE_VERSION,
                               .kind = alone ? KV_WIRE_VALUE : KV_WIRE_REPLIES,
                               .count = 1,
                               .record = record};
    if (!alone)
        kv_wire_put_record(&record, payload);
    fake_send(fake, &header, payload, table + (size_t)record.bytes);
}

static void check_answer(nonsense_t nonsense, bool alone)
{
    bench_t *bench = bench_new(1, NULL);
    kv_remote_t *remote = declare(bench, true);
    kv_buffer_t *found[1] = {NULL};
    CHECK_EQ(kv_remote_num_slices(remote), 1);
    test_call_t call;
    call_init(&call, KV_CLIENT_MOVE);
    call_add(&call, remote, NULL, NULL);
    call.parts[0].found = found;
    call_start(bench->client, &call);
    say(bench->fakes[0], get_letter(bench->fakes[0], 1), nonsense, alone);
    bool good = CHECK_STATUS(call_wait(&call), nonsense == NONE ? KV_OK : KV_PEER_LOST);
    if (nonsense == NONE && good) {
        kv_rowset_t rows = {0};
        CHECK_STATUS(kv_remote_gather(remote, found, &rows), KV_OK);
        CHECK_EQ(rows.num_rows, 2);
        CHECK_EQ(kv_rowset_ids(&rows)[0], 1);
        CHECK_EQ(kv_rowset_ids(&rows)[1], 5);
        CHECK(((const float *)(const void *)kv_rowset_data(&rows))[1] == 105);
        kv_rowset_fini(&rows);
    } else {
        good = good && CHECK(found[0] == NULL);
    }
    if (!good)
        printf("    nonsense %d, %s\n", (int)nonsense, alone ? "alone" : "among others");
    kv_buffer_rele(found[0]);
    kv_remote_free(remote);
    bench_free(bench);
}

static void rows_that_are_none_end_the_session(void)
{
    for (int nonsense = 0; nonsense < NUM_NONSENSE; nonsense++) {
        check_answer((nonsense_t)nonsense, true);
        check_answer((nonsense_t)nonsense, false);
    }
}

/* Rows where elements are due. */
static void rows_of_a_dense_key_end_the_session(void)
{
    for (int alone = 0; alone < 2; alone++) {
        bench_t *bench = bench_new(1, NULL);
        kv_remote_t *remote = declare(bench, false);
        float out[ROWS] = {7};
        test_call_t call;
        call_init(&call, KV_CLIENT_MOVE);
        call_add(&call, remote, NULL, out);
        call_start(bench->client, &call);
        say(bench->fakes[0], get_letter(bench->fakes[0], 1), NONE, alone);
        CHECK_STATUS(call_wait(&call), KV_PEER_LOST);
        CHECK(out[0] == 7);
        kv_remote_free(remote);
        bench_free(bench);
    }
}

static void rows_that_are_pushed_are_summed_and_cut(void)
{
    static int64_t first_ids[] = {0, 3}, second_ids[] = {3, 7};
    static float first_data[] = {1, 2}, second_data[] = {10, 20};
    kv_buffer_t buffers[] = {
        {.data = first_ids}, {.data = first_data}, {.data = second_ids}, {.data = second_data}};
    kv_rowset_t sets[] = {{2, &buffers[0], &buffers[1]}, {2, &buffers[2], &buffers[3]}};
    const kv_rowset_t *pointers[] = {&sets[0], &sets[1]};
    kv_row_sum_t sum;
    kv_host_t host = make_host();
    for (int sparse = 0; sparse < 2; sparse++) {
        bench_t *bench = bench_new(1, NULL);
        kv_remote_t *remote = declare(bench, sparse);
        CHECK_STATUS(kv_row_sum_init(&host, KV_FLOAT32, 1, 2, pointers, &sum), KV_OK);
        test_call_t call;
        call_init(&call, KV_CLIENT_MOVE);
        call_add(&call, remote, NULL, NULL);
        call.parts[0].rows = &sum;
        call.base.host = &host;
        call_start(bench->client, &call);
        kv_row_sum_fini(&sum);
        letter_t *letter = get_letter(bench->fakes[0], 1);
        const void *data;
        kv_wire_rows_t rows;
        kv_wire_record_t record = get_record(letter, 0, &data);
        CHECK_EQ(record.action, KV_WIRE_PUSH);
        CHECK_EQ(record.flags, KV_WIRE_ROWS);
        if (CHECK_STATUS(kv_wire_get_rows(data, (size_t)record.bytes, false, &rows), KV_OK) &&
            CHECK_EQ(rows.count, 3)) {
            static const float due[] = {1, 12, 20};
            CHECK_EQ(rows.num_rows, ROWS);
            CHECK_EQ(rows.ids[1], 3);
            CHECK(memcmp(rows.data, due, sizeof due) == 0);
        }
        answer(letter, 0);
        CHECK_STATUS(call_wait(&call), KV_OK);
        kv_remote_free(remote);
        bench_free(bench);
    }
    free_host(&host);
}

static void more_rows_than_a_message_has_are_refused(void)
{
    enum { LENGTH = 600 << 20 };
    bench_t *bench = bench_new(1, NULL);
    test_call_t call;
    int64_t ids[] = {0, 1};
    kv_host_t host = make_host();
    kv_row_sum_t sum = {.dtype = KV_UINT8,
                        .row_count = LENGTH,
                        .row_bytes = LENGTH,
                        .num_rows = 2,
                        .ids = ids,
                        .data = (const char *)ids}; /* not looked at */
    call_init(&call, KV_CLIENT_DECLARE);
    call_add_key(&call, 1, 2, NULL);
    call.keys[0].sparse = true;
    call.keys[0].row_bytes = LENGTH;
    call.keys[0].bytes = 2 * (size_t)LENGTH;
    call_start(bench->client, &call);
    answer_declare(bench, get_letter(bench->fakes[0], 0), 8, KV_OK);
    CHECK_STATUS(call_wait(&call), KV_OK);
    kv_remote_t *remote = call.keys[0].remote;
    call_init(&call, KV_CLIENT_MOVE);
    call_add(&call, remote, NULL, NULL);
    call.parts[0].rows = &sum;
    call.base.host = &host;
    CHECK_STATUS(kv_client_start(bench->client, &call.base), KV_INVALID);
    CHECK_TEXT(kv_status_message(KV_INVALID),
               "key 1: 2 rows for one part of it are 1258291240 bytes, but a message has "
               "1073741824 at most; take fewer rows at once");
    kv_remote_free(remote);
    bench_free(bench);
    free_host(&host);
}

static const test_t tests[] = {
    TEST(rows_that_are_none_end_the_session),
    TEST(rows_of_a_dense_key_end_the_session),
    TEST(rows_that_are_pushed_are_summed_and_cut),
    TEST(more_rows_than_a_message_has_are_refused),
};
TEST_MAIN(tests)
