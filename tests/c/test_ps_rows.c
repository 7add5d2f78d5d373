/* Rows on a server, with workers that send messages made by hand; and rows as they are read. */
#include "ps_peers.h"

#include <math.h>

enum { ROWS = 8, ROW_COUNT = 3 }; /* of the slice: rows, elements of one */

typedef struct block {
    size_t bytes;
    _Alignas(8) unsigned char data[1 << 20];
} block_t;

/* Rows with these ids; every element of row i is value + i. */
static const block_t *block_of(int64_t num_rows, int64_t row_count, int64_t count,
                               const int64_t *ids, float value, bool ids_only)
{
    static block_t block;
    kv_wire_rows_t rows = {count, num_rows, (size_t)row_count * sizeof(float), NULL, NULL};
    int64_t *out = kv_wire_put_rows(&rows, block.data);
    if (count > 0)
        memcpy(out, ids, (size_t)count * sizeof *ids);
    float *elements = (float *)(void *)(out + count);
    for (int64_t i = 0; i < count * row_count && !ids_only; i++)
        elements[i] = value + (float)(i / row_count);
    block.bytes = ids_only ? kv_wire_ids_bytes(count) : kv_wire_rows_bytes(count, rows.row_bytes);
    return &block;
}

static kv_wire_record_t rows_record(kv_wire_action_t action, uint64_t request, uint64_t round,
                                    const block_t *block)
{
    kv_wire_record_t record = floats(action, request, 0, round, 0);
    record.flags = KV_WIRE_ROWS;
    record.bytes = block->bytes;
    return record;
}

static void push_rows(cluster_t *cluster, int32_t worker, kv_wire_action_t action, uint64_t request,
                      uint64_t round, int64_t count, const int64_t *ids, float value)
{
    const block_t *block = block_of(ROWS, ROW_COUNT, count, ids, value, false);
    send_one(cluster, worker, rows_record(action, request, round, block), block->data);
}

static void init_rows(cluster_t *cluster, uint64_t request, int64_t count, const int64_t *ids,
                      float value)
{
    push_rows(cluster, 0, KV_WIRE_INIT, request, ROW_COUNT, count, ids, value);
}

static void pull_rows(cluster_t *cluster, int32_t worker, uint64_t request, uint64_t round,
                      int64_t count, const int64_t *ids)
{
    const block_t *block = block_of(ROWS, ROW_COUNT, count, ids, 0, true);
    kv_wire_record_t record = rows_record(KV_WIRE_GET, request, round, block);
    const void *data = block->data;
    send_many(cluster, worker, KV_WIRE_PULL, 1, &record, &data);
}

/* An answer with all rows: these ids, and the first element of each row. */
static void check_rows(const answer_t *answer, int64_t count, const int64_t *ids,
                       const float *values)
{
    kv_wire_rows_t rows;
    block_t *copy = malloc(sizeof *copy);
    CHECK_EQ(answer->record.status, KV_OK);
    CHECK_EQ(answer->record.flags, KV_WIRE_ROWS);
    memcpy(copy->data, answer->data, answer->bytes);
    if (CHECK_STATUS(kv_wire_get_rows(copy->data, answer->bytes, false, &rows), KV_OK) &&
        CHECK_EQ(rows.count, count)) {
        CHECK_EQ(rows.num_rows, ROWS);
        CHECK_EQ(rows.row_bytes, ROW_COUNT * sizeof(float));
        for (int64_t i = 0; i < count; i++) {
            float first;
            memcpy(&first, rows.data + (size_t)i * rows.row_bytes, sizeof first);
            CHECK_EQ(rows.ids[i], ids[i]);
            CHECK(first == values[i]);
        }
    }
    free(copy);
}

/* An answer with bare rows, the first elements of which are these. */
static void check_chosen(const answer_t *answer, int64_t count, const float *values)
{
    CHECK_EQ(answer->record.status, KV_OK);
    CHECK_EQ(answer->record.flags, 0);
    if (!CHECK_EQ(answer->bytes, count * ROW_COUNT * (int64_t)sizeof(float)))
        return;
    for (int64_t i = 0; i < count; i++) {
        float first;
        memcpy(&first, answer->data + (size_t)i * ROW_COUNT * sizeof first, sizeof first);
        CHECK(first == values[i]);
    }
}

#define IDS(...)                                                                                   \
    (const int64_t[])                                                                              \
    {                                                                                              \
        __VA_ARGS__                                                                                \
    }
#define VALUES(...)                                                                                \
    (const float[])                                                                                \
    {                                                                                              \
        __VA_ARGS__                                                                                \
    }

/* ----------------------------------------------------------------------------------- rounds */

static void the_rows_of_a_round_become_the_value(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    init_rows(cluster, 1, 2, IDS(1, 7), 10);
    check_done(cluster, 0, 1);
    pull(cluster, 1, 2, 0, 0);
    check_rows(await(cluster, 1, 2), 2, IDS(1, 7), VALUES(10, 11));
    CHECK_EQ(counters_of(cluster).value_bytes, 2 * ROW_COUNT * 4);
    pull_rows(cluster, 1, 3, 1, 3, IDS(0, 2, 5)); /* waits for the round */
    push_rows(cluster, 0, KV_WIRE_PUSHPULL, 4, 0, 2, IDS(2, 5), 1);
    push_rows(cluster, 1, KV_WIRE_PUSH, 4, 0, 1, IDS(5), 100);
    check_rows(await(cluster, 0, 4), 2, IDS(2, 5), VALUES(1, 102));
    check_done(cluster, 1, 4);
    check_chosen(await(cluster, 1, 3), 3, VALUES(0, 1, 102));
    for (int32_t i = 0; i < 2; i++)
        push_rows(cluster, i, KV_WIRE_PUSHPULL, 5, 1, 0, IDS(0), 0);
    check_rows(await(cluster, 1, 5), 0, IDS(0), VALUES(0));
    CHECK_EQ(counters_of(cluster).value_bytes, 0);
    CHECK_EQ(counters_of(cluster).rounds, 2);
    cluster_end(cluster);
}

static void rows_go_into_a_dense_slice(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    float due[ROWS * ROW_COUNT] = {0};
    kv_wire_record_t first = floats(KV_WIRE_INIT, 1, 0, ROW_COUNT, ROWS * ROW_COUNT);
    push(cluster, 0, first, 5);
    check_done(cluster, 0, 1);
    pull_rows(cluster, 1, 2, 0, 2, IDS(0, 7));
    check_chosen(await(cluster, 1, 2), 2, VALUES(5, 5));
    push_rows(cluster, 0, KV_WIRE_PUSHPULL, 3, 0, 1, IDS(4), 1);
    push_rows(cluster, 1, KV_WIRE_PUSHPULL, 3, 0, 0, IDS(0), 1);
    const answer_t *answer = await(cluster, 1, 3);
    for (int i = 0; i < ROW_COUNT; i++)
        due[4 * ROW_COUNT + i] = 1;
    CHECK_EQ(answer->record.flags, 0);
    CHECK_EQ(answer->bytes, sizeof due);
    CHECK(memcmp(answer->data, due, sizeof due) == 0);
    cluster_end(cluster);
}

static void a_step_takes_the_rows_that_are_there(void)
{
    static const kv_optim_numbers_t numbers = {
        .learning_rate = 1, .rescale_grad = 1, .clip_gradient = NAN};
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2, .async = true});
    kv_optim_numbers_t given = numbers;
    given.lazy_update = true;
    CHECK_STATUS(kv_server_add_optimizer(cluster->server, 1, 1, kv_optim_class_find("SGD"), &given),
                 KV_OK);
    init_rows(cluster, 1, 1, IDS(1), 10);
    check_done(cluster, 0, 1);
    push_rows(cluster, 1, KV_WIRE_PUSHPULL, 2, 0, 2, IDS(1, 3), 1);
    check_rows(await(cluster, 1, 2), 2, IDS(1, 3), VALUES(9, -2));
    push_rows(cluster, 0, KV_WIRE_PUSHPULL, 3, 0, 1, IDS(0), 4);
    check_rows(await(cluster, 0, 3), 3, IDS(0, 1, 3), VALUES(-4, 9, -2));
    cluster_end(cluster);
}

static void what_comes_before_the_first_rows_waits(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    pull_rows(cluster, 1, 1, 0, 2, IDS(1, 2));
    push_rows(cluster, 1, KV_WIRE_PUSHPULL, 2, 0, 1, IDS(3), 7);
    settle(cluster, 1);
    init_rows(cluster, 3, 1, IDS(2), 1);
    check_chosen(await(cluster, 1, 1), 2, VALUES(0, 1));
    push_rows(cluster, 0, KV_WIRE_PUSH, 4, 0, 0, IDS(0), 0);
    check_rows(await(cluster, 1, 2), 1, IDS(3), VALUES(7));
    cluster_end(cluster);
}

/* -------------------------------------------------------------------------------- what is wrong */

/* A bad push fails its round for all; the value stays, and so does the next round. */
static void check_fails(kv_wire_record_t bad, const void *data, kv_status_t status,
                        const char *sentence)
{
    static unsigned char copy[sizeof(block_t)];
    memcpy(copy, data, (size_t)bad.bytes);
    for (int early = 0; early < 2; early++) {
        cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
        if (!early) {
            init_rows(cluster, 1, 1, IDS(2), 1);
            check_done(cluster, 0, 1);
        }
        send_one(cluster, 1, bad, copy);
        push_rows(cluster, 0, KV_WIRE_PUSHPULL, 3, 0, 1, IDS(0), 0);
        if (early)
            init_rows(cluster, 1, 1, IDS(2), 1);
        check_failed(cluster, 1, bad.request, status, sentence);
        check_failed(cluster, 0, 3, status, sentence);
        pull(cluster, 0, 4, 0, 1);
        check_rows(await(cluster, 0, 4), 1, IDS(2), VALUES(1));
        for (int32_t i = 0; i < 2; i++)
            push_rows(cluster, i, KV_WIRE_PUSHPULL, 6, 1, 1, IDS(4), 2);
        check_rows(await(cluster, 1, 6), 1, IDS(4), VALUES(4));
        cluster_end(cluster);
    }
}

static void a_push_of_rows_that_are_none_fails_its_round(void)
{
    const block_t *block = block_of(ROWS, ROW_COUNT, 2, IDS(3, 3), 1, false);
    kv_wire_record_t bad = rows_record(KV_WIRE_PUSH, 2, 0, block);
    const char *order = "row ids do not increase within the 8 of a slice";
    check_fails(bad, block->data, KV_INVALID, order);
    check_fails(bad, block_of(ROWS, ROW_COUNT, 2, IDS(4, 3), 1, false)->data, KV_INVALID, order);
    check_fails(bad, block_of(ROWS, ROW_COUNT, 2, IDS(4, 8), 1, false)->data, KV_INVALID, order);
    check_fails(bad, block_of(ROWS, ROW_COUNT, 2, IDS(-1, 2), 1, false)->data, KV_INVALID, order);
    check_fails(bad, block_of(ROWS, ROW_COUNT, 2, IDS(-1, INT64_MAX), 1, false)->data, KV_INVALID,
                order);
    check_fails(bad, block_of(ROWS + 1, ROW_COUNT, 2, IDS(0, 1), 1, false)->data, KV_INVALID,
                "slice 0 has no 9 rows of 12 bytes, as a worker says");
    check_fails(bad, block_of(ROWS, ROW_COUNT, 3, IDS(0, 1, 2), 1, false)->data, KV_INVALID,
                "3 rows of 12 bytes do not fill 64 bytes");
    check_fails(bad, block_of(ROWS, ROW_COUNT, -1, IDS(0), 1, true)->data, KV_INVALID,
                "18446744073709551615 rows of 12 bytes do not fill 64 bytes");
    check_fails(bad, block_of(-1, ROW_COUNT, 2, IDS(0, 1), 1, false)->data, KV_INVALID,
                "18446744073709551615 rows of 12 bytes are no slice");
    bad.bytes = 23;
    check_fails(bad, block->data, KV_INVALID, "rows of 23 bytes are none");
    block = block_of(ROWS, 1, 2, IDS(3, 4), 1, false);
    check_fails(rows_record(KV_WIRE_PUSH, 2, 0, block), block->data, KV_INVALID,
                "slice 0 has no 8 rows of 4 bytes, as a worker says");
    block = block_of(ROWS, ROW_COUNT, 2, IDS(3, 4), 1, false);
    bad = rows_record(KV_WIRE_PUSH, 2, 0, block);
    bad.codec = KV_CODEC_2BIT;
    check_fails(bad, block->data, KV_INVALID, "rows do not travel compressed");
    bad.codec = 0;
    bad.dtype = KV_INT32;
    check_fails(bad, block->data, KV_BAD_TYPE, "the value is float32, worker 1 pushed int32");
    check_fails(floats(KV_WIRE_PUSH, 2, 0, 0, ROWS * ROW_COUNT), block->data, KV_BAD_TYPE,
                "the value is row-sparse, worker 1 pushed a dense one");
}

static void dense_and_row_sparse_pushes_fail_their_round(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    push(cluster, 0, floats(KV_WIRE_INIT, 1, 0, ROW_COUNT, ROWS * ROW_COUNT), 5);
    push(cluster, 0, floats(KV_WIRE_PUSH, 2, 0, 0, ROWS * ROW_COUNT), 1);
    push_rows(cluster, 1, KV_WIRE_PUSH, 2, 0, 1, IDS(0), 0);
    const char *why = "worker 0 pushed a dense value, worker 1 a row-sparse one";
    for (int32_t i = 0; i < 2; i++)
        check_failed(cluster, i, 2, KV_BAD_TYPE, why);
    pull(cluster, 1, 3, 0, 1);
    check_floats(await(cluster, 1, 3), ROWS * ROW_COUNT, 5);
    cluster_end(cluster);
}

/* Rows of other lengths would write beside the state that the optimizer keeps for each row. */
static void rows_of_a_dense_slice_have_its_length(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 1});
    push(cluster, 0, floats(KV_WIRE_INIT, 1, 0, ROW_COUNT, ROWS * ROW_COUNT), 5);
    const block_t *block = block_of(ROWS * ROW_COUNT, 1, 1, IDS(3), 1, false);
    send_one(cluster, 0, rows_record(KV_WIRE_PUSH, 2, 0, block), block->data);
    check_failed(cluster, 0, 2, KV_INVALID, "slice 0 has no 24 rows of 4 bytes, as a worker says");
    cluster_end(cluster);
}

static void ids_that_are_none_are_answered_with_an_error(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 1});
    init_rows(cluster, 1, 1, IDS(2), 1);
    pull_rows(cluster, 0, 2, 0, 2, IDS(3, 8));
    check_failed(cluster, 0, 2, KV_INVALID, "row ids do not increase within the 8 of a slice");
    kv_wire_record_t record = floats(KV_WIRE_GET, 3, 0, 0, 0);
    record.flags = KV_WIRE_ROWS;
    send_many(cluster, 0, KV_WIRE_PULL, 1, &record, NULL);
    check_failed(cluster, 0, 3, KV_INVALID, "rows of 0 bytes are none");
    pull(cluster, 0, 4, 0, 0);
    check_rows(await(cluster, 0, 4), 1, IDS(2), VALUES(1));
    cluster_end(cluster);
}

static void first_rows_that_are_none_are_refused(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    init_rows(cluster, 1, 2, IDS(2, 2), 1);
    check_failed(cluster, 0, 1, KV_INVALID, "row ids do not increase within the 8 of a slice");
    push_rows(cluster, 0, KV_WIRE_INIT, 2, ROW_COUNT + 1, 1, IDS(2), 1);
    check_failed(cluster, 0, 2, KV_INVALID, "rows of 4 elements are not 12 bytes long");
    push_rows(cluster, 1, KV_WIRE_INIT, 3, ROW_COUNT, 1, IDS(2), 1);
    check_failed(cluster, 1, 3, KV_INVALID, "worker 1 cannot initialise keys, only worker 0 can");
    init_rows(cluster, 4, 1, IDS(2), 1);
    check_done(cluster, 0, 4);
    init_rows(cluster, 5, 1, IDS(2), 1);
    check_failed(cluster, 0, 5, KV_INVALID, "slice 0 is initialised already");
    cluster_end(cluster);
}

/* ----------------------------------------------------------------------------------- memory */

static void every_allocation_may_fail(void)
{
    int64_t nth = 0, passed;
    do {
        cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
        cluster->timeout_ms = 150;
        cluster->tells = true;
        kv_fault_set("alloc", ++nth);
        init_rows(cluster, 1, 1, IDS(2), 1);
        for (int32_t i = 0; i < 2; i++) {
            push_rows(cluster, i, KV_WIRE_PUSHPULL, 2, 0, 1, IDS(4), 2);
            pull_rows(cluster, i, 3, 1, 2, IDS(2, 4));
            pull(cluster, i, 4, 0, 1);
        }
        for (int32_t i = 0; i < 2; i++) {
            for (uint64_t request = 2; request < 5; request++) {
                uint8_t status = await(cluster, i, request)->record.status;
                CHECK(status == KV_OK || status == KV_NO_MEMORY || status == KV_TIMEOUT ||
                      status == KV_PEER_LOST || status == KV_STATUS_COUNT);
            }
        }
        passed = kv_fault_set("alloc", 0);
        cluster_end(cluster);
    } while (passed >= nth);
    CHECK(nth > 20);
}

static const test_t tests[] = {
    TEST(the_rows_of_a_round_become_the_value),
    TEST(rows_go_into_a_dense_slice),
    TEST(a_step_takes_the_rows_that_are_there),
    TEST(what_comes_before_the_first_rows_waits),
    TEST(a_push_of_rows_that_are_none_fails_its_round),
    TEST(dense_and_row_sparse_pushes_fail_their_round),
    TEST(rows_of_a_dense_slice_have_its_length),
    TEST(ids_that_are_none_are_answered_with_an_error),
    TEST(first_rows_that_are_none_are_refused),
    TEST(every_allocation_may_fail),
};
TEST_MAIN(tests)
