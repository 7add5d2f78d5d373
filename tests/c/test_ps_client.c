/* The client alone: endpoints that record what it sends and say what a test wants them to. */
#include "net/endpoint.h"
#include "ps_calls.h"
#include "ps/wire.h"

enum { MAX_LETTERS = 512, MAX_FAKES = 3, WORKERS = 2, RANK = 1, MIB = 1 << 20 };

typedef struct fake fake_t;

/* What has come, in its order. */
typedef struct letter {
    fake_t *fake;
    kv_wire_header_t header;
    unsigned char *payload;
    size_t bytes;
    bool answered;
    _Atomic bool whole;
} letter_t;

struct fake {
    kv_net_t *net;
    int32_t index;
    letter_t letters[MAX_LETTERS];
    _Atomic int num_letters, num_lost;
};

typedef struct bench {
    kv_client_t *client;
    kv_net_t *net;
    fake_t *fakes[MAX_FAKES];
    int32_t rank, num_fakes;
    uint64_t next_number; /* of keys that the fakes give out */
} bench_t;

/* ---------------------------------------------------------------------------------------- fakes */

static void letter_done(void *context, kv_status_t status)
{
    letter_t *letter = context;
    if (status == KV_OK)
        atomic_store(&letter->whole, true);
}

static kv_status_t fake_arrive(void *context, kv_net_arrival_t *arrival)
{
    fake_t *fake = context;
    int index = atomic_load(&fake->num_letters);
    if (!CHECK(index < MAX_LETTERS))
        return kv_fail(KV_INVALID, "too many letters");
    letter_t *letter = &fake->letters[index];
    letter->fake = fake;
    CHECK_STATUS(kv_wire_get_header(arrival->header, arrival->header_bytes, &letter->header),
                 KV_OK);
    letter->bytes = arrival->payload_bytes;
    letter->payload = malloc(letter->bytes + 1);
    arrival->target = letter->payload;
    arrival->done = letter_done;
    arrival->context = letter;
    atomic_store(&fake->num_letters, index + 1);
    return KV_OK;
}

static void fake_lost(void *context, int32_t peer, const char *why)
{
    (void)peer;
    (void)why;
    atomic_fetch_add(&((fake_t *)context)->num_lost, 1);
}

static void free_message(kv_net_message_t *message, kv_status_t status)
{
    (void)status;
    free((void *)(uintptr_t)message->payload);
    free(message);
}

static void fake_send(fake_t *fake, const kv_wire_header_t *header, const void *payload,
                      size_t bytes)
{
    kv_net_message_t *message = calloc(1, sizeof *message);
    message->peer = RANK;
    message->header_bytes = KV_WIRE_HEADER_BYTES;
    kv_wire_put_header(header, message->header);
    message->payload_bytes = bytes;
    message->done = free_message;
    void *copy = bytes > 0 ? malloc(bytes) : NULL;
    if (bytes > 0)
        memcpy(copy, payload, bytes);
    message->payload = copy;
    if (kv_net_send(fake->net, message) != KV_OK)
        free_message(message, KV_PEER_LOST);
}

static void fake_open(fake_t *fake, int32_t index, const char *faults)
{
    kv_net_config_t config = {.transport = faults != NULL ? "faulty" : "inproc",
                              .self = kv_node_of_server(WORKERS, index),
                              .num_peers = WORKERS + MAX_FAKES,
                              .session = {7},
                              .faults = faults};
    kv_net_handlers_t handlers = {.context = fake, .arrive = fake_arrive, .lost = fake_lost};
    fake->index = index;
    CHECK_STATUS(kv_net_open(&config, &handlers, &fake->net), KV_OK);
}

static void connect(kv_net_t *net, int32_t peer, const char *name, const kv_net_t *other)
{
    unsigned char address[KV_NET_ADDRESS_BYTES];
    size_t bytes = 0;
    kv_net_address(other, address, &bytes);
    CHECK_STATUS(kv_net_connect(net, peer, name, address, bytes), KV_OK);
}

/* The i-th letter, once it is there. */
static letter_t *get_letter(fake_t *fake, int index)
{
    letter_t *letter = &fake->letters[index];
    WAIT_UNTIL(atomic_load(&fake->num_letters) > index && atomic_load(&letter->whole));
    return letter;
}

static kv_wire_record_t get_record(const letter_t *letter, uint32_t index, const void **value)
{
    if (letter->header.kind == KV_WIRE_PUSH_ONE) {
        *value = letter->payload;
        return letter->header.record;
    }
    kv_wire_cursor_t cursor;
    kv_wire_record_t record = {0};
    CHECK_STATUS(kv_wire_cursor_init(&cursor, letter->payload, letter->bytes, letter->header.count),
                 KV_OK);
    for (uint32_t i = 0; i <= index && cursor.left > 0; i++)
        CHECK_STATUS(kv_wire_next(&cursor, &record, value), KV_OK);
    return record;
}

static uint32_t count_records(const letter_t *letter)
{
    return letter->header.kind == KV_WIRE_PUSH_ONE ? 1 : letter->header.count;
}

/* Byte i of the value that fakes answer with. */
static unsigned char byte_of(uint64_t key, uint32_t slice, size_t i)
{
    return (unsigned char)(key * 3 + slice * 7 + i);
}

/* One record in answer to another; gives its bytes. `size` is that of the slice that is asked for.
 */
static size_t make_answer(kv_wire_record_t *record, size_t size, unsigned char *data)
{
    bool asks = record->action == KV_WIRE_GET || record->action == KV_WIRE_PUSHPULL;
    record->bytes = asks ? size : 0;
    for (size_t i = 0; i < record->bytes; i++)
        data[i] = byte_of(record->key, record->slice, i);
    return (size_t)record->bytes;
}

/* Answers every record of a letter in one message; `size` is that of all slices that are pulled. */
static void answer(letter_t *letter, size_t size)
{
    uint32_t count = count_records(letter);
    size_t room = kv_wire_table_bytes(count) + count * kv_wire_value_bytes(size);
    unsigned char *payload = calloc(1, room + 64);
    size_t at = kv_wire_table_bytes(count);
    for (uint32_t i = 0; i < count; i++) {
        const void *value;
        kv_wire_record_t record = get_record(letter, i, &value);
        at += kv_wire_value_bytes(make_answer(&record, size, payload + at));
        kv_wire_put_record(&record, payload + (size_t)i * KV_WIRE_RECORD_BYTES);
    }
    kv_wire_header_t header = {.version = KV_WIRE_VERSION, .kind = KV_WIRE_REPLIES, .count = count};
    letter->answered = true;
    fake_send(letter->fake, &header, payload, at);
    free(payload);
}

/* Says of each key of a declaration what `status` says, and places its slices of `slice_bytes` on
 * one server after the other. */
static void answer_declare(bench_t *bench, letter_t *letter, size_t slice_bytes, kv_status_t status)
{
    size_t offset = 0;
    unsigned char *payload = malloc(1 << 16), *end = payload;
    for (uint32_t i = 0; i < letter->header.count; i++) {
        kv_wire_key_t key;
        CHECK_STATUS(kv_wire_get_key(letter->payload, letter->bytes, &offset, &key), KV_OK);
        size_t bytes = (size_t)key.shape[0] * 4;
        unsigned char servers[1024];
        key.placed = status == KV_OK;
        key.number = bench->next_number++;
        key.slice_bytes = slice_bytes;
        key.num_slices = bytes == 0 ? 1 : (uint32_t)((bytes - 1) / slice_bytes + 1);
        key.servers = servers;
        for (uint32_t slice = 0; slice < key.num_slices; slice++)
            kv_wire_put_server(servers, slice, (int32_t)slice % bench->num_fakes);
        key.status = (uint8_t)status;
        key.sentence = "it has another shape";
        key.sentence_bytes = status != KV_OK ? (uint32_t)strlen(key.sentence) : 0;
        end = kv_wire_put_key(&key, end);
    }
    kv_wire_header_t header = letter->header;
    header.kind = KV_WIRE_DECLARED;
    letter->answered = true;
    fake_send(letter->fake, &header, payload, (size_t)(end - payload));
    free(payload);
}

/* ---------------------------------------------------------------------------------------- bench */

static void bench_connect(bench_t *bench, int32_t i)
{
    char name[KV_NET_PEER_NAME];
    snprintf(name, sizeof name, "server %d", (int)i);
    connect(bench->net, kv_node_of_server(WORKERS, i), name, bench->fakes[i]->net);
    connect(bench->fakes[i]->net, RANK, "worker 1", bench->net);
}

static void bench_wait_ready(bench_t *bench)
{
    kv_caller_t caller = patient();
    CHECK_STATUS(kv_net_wait_ready(bench->net, &caller), KV_OK);
    for (int32_t i = 0; i < bench->num_fakes; i++)
        CHECK_STATUS(kv_net_wait_ready(bench->fakes[i]->net, &caller), KV_OK);
}

/* A client of rank 1 and its servers, whose endpoints have these faults; not connected. */
static bench_t *bench_open(int32_t num_fakes, const char *faults)
{
    bench_t *bench = calloc(1, sizeof *bench);
    kv_client_config_t config = {RANK, WORKERS, num_fakes};
    bench->num_fakes = num_fakes;
    bench->next_number = 100;
    CHECK_STATUS(kv_client_new(&config, &bench->client), KV_OK);
    kv_net_config_t net_config = {.transport = faults != NULL ? "faulty" : "inproc",
                                  .self = RANK,
                                  .num_peers = WORKERS + MAX_FAKES,
                                  .session = {7}};
    kv_net_handlers_t handlers = kv_client_handlers(bench->client);
    CHECK_STATUS(kv_net_open(&net_config, &handlers, &bench->net), KV_OK);
    kv_client_attach(bench->client, bench->net);
    for (int32_t i = 0; i < num_fakes; i++) {
        bench->fakes[i] = calloc(1, sizeof *bench->fakes[i]);
        fake_open(bench->fakes[i], i, faults);
    }
    return bench;
}

static bench_t *bench_new(int32_t num_fakes, const char *faults)
{
    bench_t *bench = bench_open(num_fakes, faults);
    for (int32_t i = 0; i < num_fakes; i++)
        bench_connect(bench, i);
    bench_wait_ready(bench);
    return bench;
}

static void bench_free(bench_t *bench)
{
    kv_net_close(bench->net);
    kv_client_close(bench->client);
    for (int32_t i = 0; i < bench->num_fakes; i++) {
        fake_t *fake = bench->fakes[i];
        kv_net_close(fake->net);
        kv_net_free(fake->net);
        for (int l = 0; l < atomic_load(&fake->num_letters); l++)
            free(fake->letters[l].payload);
        free(fake);
    }
    kv_net_free(bench->net);
    kv_client_free(bench->client);
    free(bench);
}

/* Declares `count` keys of these elements, cut into slices of `slice_bytes`. */
static void bench_declare(bench_t *bench, int count, int64_t elements, size_t slice_bytes,
                          kv_remote_t **remotes)
{
    test_call_t call;
    call_init(&call, KV_CLIENT_DECLARE);
    for (int i = 0; i < count; i++)
        call_add_key(&call, i, elements, NULL);
    int before = atomic_load(&bench->fakes[0]->num_letters);
    call_start(bench->client, &call);
    answer_declare(bench, get_letter(bench->fakes[0], before), slice_bytes, KV_OK);
    CHECK_STATUS(call_wait(&call), KV_OK);
    for (int i = 0; i < count; i++)
        remotes[i] = call.keys[i].remote;
}

static bool has_bytes(const void *memory, size_t bytes, uint64_t key, uint32_t slice)
{
    size_t wrong = 0;
    for (size_t i = 0; i < bytes; i++)
        wrong += ((const unsigned char *)memory)[i] != byte_of(key, slice, i);
    return CHECK_EQ(wrong, 0);
}

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
    enum { SMALL = 300, LARGE = 40000 };
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

static void start_push(bench_t *bench, test_call_t *call, kv_remote_t *remote, const void *value)
{
    call_init(call, KV_CLIENT_MOVE);
    call_add(call, remote, value, NULL);
    call_start(bench->client, call);
}

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

/* Server 1 has not connected this client: what goes there waits in the endpoint. */
static bench_t *bench_half(size_t elements, kv_remote_t **remotes)
{
    bench_t *bench = bench_open(2, NULL);
    unsigned char address[KV_NET_ADDRESS_BYTES];
    size_t bytes = 0;
    bench_connect(bench, 0);
    kv_net_address(bench->fakes[1]->net, address, &bytes);
    CHECK_STATUS(kv_net_connect(bench->net, WORKERS + 1, "server 1", address, bytes), KV_OK);
    bench_declare(bench, 2, (int64_t)elements, elements * 2, remotes);
    return bench;
}

static void bench_connect_rest(bench_t *bench)
{
    connect(bench->fakes[1]->net, RANK, "worker 1", bench->net);
    bench_wait_ready(bench);
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
    TEST(a_small_pushpull_is_one_message_each_way),
    TEST(small_values_go_together_and_large_ones_alone),
    TEST(many_small_values_are_split_into_messages_of_a_slice),
    TEST(rank_0_places_keys_and_sends_their_values),
    TEST(an_error_of_a_key_is_the_calls),
    TEST(a_third_round_waits_and_so_does_all_behind_it),
    TEST(the_urgent_go_first_and_a_push_waits_for_pulls),
    TEST(a_delete_waits_for_the_calls_before_it),
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
