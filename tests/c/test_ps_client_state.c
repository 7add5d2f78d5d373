/* A client's calls on training states, with servers that answer by hand. */
#include "comm/slots.h"
#include "ps_fakes.h"

enum { OPTIMIZER = 77, SLICE = 16 /* bytes: four floats */ };

typedef struct call {
    test_call_t base; /* first */
    kv_client_state_t states[MAX_PARTS];
    kv_client_step_t step;
} call_t;

static void begin(call_t *call, kv_client_verb_t verb)
{
    call_init(&call->base, verb);
    memset(call->states, 0, sizeof call->states);
    call->base.base.states = call->states;
    call->step = (kv_client_step_t){.optimizer = OPTIMIZER,
                                    .step = {.optim = kv_optim_class_find("sgd"), .t = 9}};
}

static void add(call_t *call, kv_remote_t *remote, int slot, const void *value, void *out)
{
    int64_t i = call->base.base.num_parts;
    call_add(&call->base, remote, value, out);
    call->base.parts[i].step = &call->step;
    call->states[i].slot = slot;
}

/* Answers all records of a question: those of a buffer with so many bytes, with step t. */
static void answer_state(letter_t *letter, size_t bytes, uint64_t t, unsigned char byte)
{
    uint32_t count = count_records(letter);
    size_t at = kv_wire_table_bytes(count);
    unsigned char *payload = calloc(1, at + count * kv_wire_value_bytes(bytes));
    for (uint32_t i = 0; i < count; i++) {
        const void *value;
        kv_wire_record_t record = get_record(letter, i, &value);
        CHECK_EQ(record.action, KV_WIRE_GET_STATE);
        CHECK_EQ(record.optimizer, OPTIMIZER);
        record.bytes = record.slot == KV_SLOT_NONE ? 0 : bytes;
        record.t = t;
        memset(payload + at, byte, (size_t)record.bytes);
        at += kv_wire_value_bytes((size_t)record.bytes);
        kv_wire_put_record(&record, payload + (size_t)i * KV_WIRE_RECORD_BYTES);
    }
    kv_wire_header_t header = {.version = KV_WIRE_VERSION, .kind = KV_WIRE_REPLIES, .count = count};
    letter->answered = true;
    fake_send(letter->fake, &header, payload, at);
    free(payload);
}

static void a_state_comes_from_all_slices(void)
{
    bench_t *bench = bench_new(2, NULL);
    kv_remote_t *remote;
    unsigned char out[2 * SLICE] = {0};
    call_t call;
    bench_declare(bench, 1, 8, SLICE, &remote);
    begin(&call, KV_CLIENT_GET_STATE);
    add(&call, remote, 1, NULL, out);
    add(&call, remote, KV_SLOT_NONE, NULL, NULL);
    call_start(bench->client, &call.base);
    letter_t *letter = get_letter(bench->fakes[0], 1);
    CHECK_EQ(letter->header.kind, KV_WIRE_PULL);
    CHECK_EQ(count_records(letter), 2);
    answer_state(letter, SLICE, 3, 7);
    answer_state(get_letter(bench->fakes[1], 0), SLICE, 5, 8);
    CHECK_STATUS(call_wait(&call.base), KV_OK);
    for (int i = 0; i < 2 * SLICE; i++)
        CHECK_EQ(out[i], i < SLICE ? 7 : 8);
    CHECK_EQ(call.states[0].num_there, 2);
    CHECK_EQ(call.states[0].num_missing, 0);
    CHECK_EQ(call.states[0].t, 5);
    CHECK_EQ(call.states[1].t, 5);
    CHECK_EQ(call.states[1].num_there + call.states[1].num_missing, 0);
    kv_remote_free(remote);
    bench_free(bench);
}

static void slices_without_it_are_counted(void)
{
    bench_t *bench = bench_new(2, NULL);
    kv_remote_t *remote;
    unsigned char out[2 * SLICE] = {0};
    call_t call;
    bench_declare(bench, 1, 8, SLICE, &remote);
    begin(&call, KV_CLIENT_GET_STATE);
    add(&call, remote, 0, NULL, out);
    call_start(bench->client, &call.base);
    answer_state(get_letter(bench->fakes[0], 1), 0, 0, 0);
    answer_state(get_letter(bench->fakes[1], 0), SLICE, UINT64_MAX, 8);
    CHECK_STATUS(call_wait(&call.base), KV_OK);
    CHECK_EQ(out[0], 0);
    CHECK_EQ(out[SLICE], 8);
    CHECK_EQ(call.states[0].num_there, 1);
    CHECK_EQ(call.states[0].num_missing, 1);
    CHECK_EQ(call.states[0].t, 0); /* no count */
    kv_remote_free(remote);
    bench_free(bench);
}

/* Neither the bytes of the slice nor none. */
static void an_answer_of_another_length_ends_the_session(void)
{
    for (size_t bytes = SLICE - 4; bytes <= SLICE + 4; bytes += 8) {
        bench_t *bench = bench_new(1, NULL);
        kv_remote_t *remote;
        unsigned char out[SLICE];
        call_t call;
        bench_declare(bench, 1, 4, SLICE, &remote);
        begin(&call, KV_CLIENT_GET_STATE);
        add(&call, remote, 0, NULL, out);
        call_start(bench->client, &call.base);
        answer_state(get_letter(bench->fakes[0], 1), bytes, 1, 7);
        CHECK_STATUS(call_wait(&call.base), KV_PEER_LOST);
        kv_remote_free(remote);
        bench_free(bench);
    }
}

static void a_state_goes_to_all_slices(void)
{
    bench_t *bench = bench_new(2, NULL);
    kv_remote_t *remote;
    float value[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    call_t call;
    bench_declare(bench, 1, 8, SLICE, &remote);
    begin(&call, KV_CLIENT_SET_STATE);
    add(&call, remote, 0, value, NULL);
    add(&call, remote, 1, NULL, NULL);
    call_start(bench->client, &call.base);
    for (int i = 0; i < 2; i++) {
        letter_t *letter = get_letter(bench->fakes[i], i == 0 ? 1 : 0);
        CHECK_EQ(letter->header.kind, KV_WIRE_BATCH);
        if (CHECK_EQ(count_records(letter), 2)) {
            for (uint32_t r = 0; r < 2; r++) {
                const void *data;
                kv_wire_record_t record = get_record(letter, r, &data);
                CHECK_EQ(record.action, KV_WIRE_SET_STATE);
                CHECK_EQ(record.slice, i);
                CHECK_EQ(record.optimizer, OPTIMIZER);
                CHECK_EQ(record.t, 9);
                CHECK_EQ(record.bytes, record.slot == 0 ? SLICE : 0);
                CHECK(record.slot == 1 || memcmp(data, value + i * 4, SLICE) == 0);
            }
        }
        answer(letter, 0);
    }
    CHECK_STATUS(call_wait(&call.base), KV_OK);
    kv_remote_free(remote);
    bench_free(bench);
}

/* What an optimizer in Python keeps has the length that it has, and comes alone or among others. */
static void an_object_has_any_length(void)
{
    enum { LONGEST = 3 << 20 };
    static const size_t lengths[] = {0, 5, LONGEST, 5, LONGEST};
    unsigned char *data = calloc(1, LONGEST);
    memset(data, 6, LONGEST);
    for (int i = 0; i < 5; i++) {
        bench_t *bench = bench_new(1, NULL);
        kv_remote_t *remote;
        kv_buffer_t *found = NULL;
        call_t call;
        bool marked = i < 3; /* or it is refused */
        bench_declare(bench, 1, 4, SLICE, &remote);
        begin(&call, KV_CLIENT_GET_STATE);
        add(&call, remote, KV_SLOT_OBJECT, NULL, NULL);
        call.base.parts[0].found = &found;
        call_start(bench->client, &call.base);
        letter_t *letter = get_letter(bench->fakes[0], 1);
        const void *none;
        kv_wire_record_t record = get_record(letter, 0, &none);
        CHECK_EQ(record.slot, KV_SLOT_OBJECT);
        record.bytes = lengths[i];
        record.t = 4;
        record.flags = marked ? KV_WIRE_WHOLE : 0;
        kv_wire_header_t header = {.version = KV_WIRE_VERSION, .kind = KV_WIRE_VALUE, .count = 1};
        letter->answered = true;
        if (lengths[i] == LONGEST) {
            header.record = record;
            fake_send(letter->fake, &header, data, LONGEST);
        } else {
            unsigned char payload[512] = {0};
            header.kind = KV_WIRE_REPLIES;
            kv_wire_put_record(&record, payload);
            memset(payload + kv_wire_table_bytes(1), 6, lengths[i]);
            fake_send(letter->fake, &header, payload,
                      kv_wire_table_bytes(1) + kv_wire_value_bytes(lengths[i]));
        }
        CHECK_STATUS(call_wait(&call.base), marked ? KV_OK : KV_PEER_LOST);
        CHECK_EQ(call.states[0].t, marked ? 4 : 0);
        CHECK_EQ(found != NULL, marked && lengths[i] > 0);
        if (found != NULL) {
            CHECK_EQ(found->bytes, lengths[i]);
            CHECK(memcmp(found->data, data, lengths[i]) == 0);
        }
        kv_buffer_rele(found);
        kv_remote_free(remote);
        bench_free(bench);
    }
    free(data);
}

static void an_object_goes_as_it_is(void)
{
    enum { LONGER = 2 << 20 };
    bench_t *bench = bench_new(1, NULL);
    kv_remote_t *remote;
    unsigned char *data = calloc(1, LONGER);
    call_t call;
    bench_declare(bench, 1, 4, SLICE, &remote);
    for (int i = 0; i < 2; i++) {
        size_t bytes = i == 0 ? 7 : LONGER;
        begin(&call, KV_CLIENT_SET_STATE);
        add(&call, remote, KV_SLOT_OBJECT, data, NULL);
        call.states[0].bytes = bytes;
        call_start(bench->client, &call.base);
        letter_t *letter = get_letter(bench->fakes[0], i + 1);
        const void *value;
        kv_wire_record_t record = get_record(letter, 0, &value);
        CHECK_EQ(record.slot, KV_SLOT_OBJECT);
        CHECK_EQ(record.t, 9);
        CHECK_EQ(record.bytes, bytes);
        CHECK_EQ((record.flags & KV_WIRE_WHOLE) != 0, i == 1);
        answer(letter, 0);
        CHECK_STATUS(call_wait(&call.base), KV_OK);
    }
    begin(&call, KV_CLIENT_SET_STATE);
    add(&call, remote, KV_SLOT_OBJECT, data, NULL);
    call.states[0].bytes = (size_t)KV_WIRE_ROWS_BYTES + 1;
    CHECK_STATUS(kv_client_start(bench->client, &call.base.base), KV_INVALID);
    free(data);
    kv_remote_free(remote);
    bench_free(bench);
}

/* A push waits until the state before it is through; what the servers say is the call's error. */
static void pushes_come_behind(void)
{
    bench_t *bench = bench_new(1, NULL);
    kv_remote_t *remote;
    float value[4] = {1, 2, 3, 4};
    unsigned char out[SLICE];
    call_t call;
    test_call_t later;
    bench_declare(bench, 1, 4, SLICE, &remote);
    begin(&call, KV_CLIENT_GET_STATE);
    add(&call, remote, 0, NULL, out);
    call_start(bench->client, &call.base);
    letter_t *letter = get_letter(bench->fakes[0], 1);
    start_push(bench, &later, remote, value);
    CHECK_EQ(atomic_load(&bench->fakes[0]->num_letters), 2);
    answer_state(letter, SLICE, 1, 7);
    CHECK_STATUS(call_wait(&call.base), KV_OK);
    answer(get_letter(bench->fakes[0], 2), 0);
    CHECK_STATUS(call_wait(&later), KV_OK);
    kv_remote_free(remote);
    bench_free(bench);
}

static const test_t tests[] = {
    TEST(a_state_comes_from_all_slices),
    TEST(slices_without_it_are_counted),
    TEST(an_answer_of_another_length_ends_the_session),
    TEST(a_state_goes_to_all_slices),
    TEST(an_object_has_any_length),
    TEST(an_object_goes_as_it_is),
    TEST(pushes_come_behind),
};

TEST_MAIN(tests)
