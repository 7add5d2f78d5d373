/* A client of rank 1 with endpoints for servers that record what it sends and say what a test wants
 * them to. */
#ifndef KV_TESTS_C_PS_FAKES_H
#define KV_TESTS_C_PS_FAKES_H

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

static inline void letter_done(void *context, kv_status_t status)
{
    letter_t *letter = context;
    if (status == KV_OK)
        atomic_store(&letter->whole, true);
}

static inline kv_status_t fake_arrive(void *context, kv_net_arrival_t *arrival)
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

static inline void fake_lost(void *context, int32_t peer, const char *why)
{
    (void)peer;
    (void)why;
    atomic_fetch_add(&((fake_t *)context)->num_lost, 1);
}

static inline void free_message(kv_net_message_t *message, kv_status_t status)
{
    (void)status;
    free((void *)(uintptr_t)message->payload);
    free(message);
}

static inline void fake_send(fake_t *fake, const kv_wire_header_t *header, const void *payload,
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

static inline void fake_open(fake_t *fake, int32_t index, const char *faults)
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

static inline void connect(kv_net_t *net, int32_t peer, const char *name, const kv_net_t *other)
{
    unsigned char address[KV_NET_ADDRESS_BYTES];
    size_t bytes = 0;
    kv_net_address(other, address, &bytes);
    CHECK_STATUS(kv_net_connect(net, peer, name, address, bytes), KV_OK);
}

/* The i-th letter, once it is there. */
static inline letter_t *get_letter(fake_t *fake, int index)
{
    letter_t *letter = &fake->letters[index];
    WAIT_UNTIL(atomic_load(&fake->num_letters) > index && atomic_load(&letter->whole));
    return letter;
}

static inline kv_wire_record_t get_record(const letter_t *letter, uint32_t index,
                                          const void **value)
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

static inline uint32_t count_records(const letter_t *letter)
{
    return letter->header.kind == KV_WIRE_PUSH_ONE ? 1 : letter->header.count;
}

/* Byte i of the value that fakes answer with. */
static inline unsigned char byte_of(uint64_t key, uint32_t slice, size_t i)
{
    return (unsigned char)(key * 3 + slice * 7 + i);
}

/* One record in answer to another; gives its bytes. `size` is that of the slice that is asked for.
 */
static inline size_t make_answer(kv_wire_record_t *record, size_t size, unsigned char *data)
{
    bool asks = record->action == KV_WIRE_GET || record->action == KV_WIRE_PUSHPULL;
    record->bytes = asks ? size : 0;
    for (size_t i = 0; i < record->bytes; i++)
        data[i] = byte_of(record->key, record->slice, i);
    return (size_t)record->bytes;
}

/* Answers every record of a letter in one message; `size` is that of all slices that are pulled. */
static inline void answer(letter_t *letter, size_t size)
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
static inline void answer_declare(bench_t *bench, letter_t *letter, size_t slice_bytes,
                                  kv_status_t status)
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

static inline void bench_connect(bench_t *bench, int32_t i)
{
    char name[KV_NET_PEER_NAME];
    snprintf(name, sizeof name, "server %d", (int)i);
    connect(bench->net, kv_node_of_server(WORKERS, i), name, bench->fakes[i]->net);
    connect(bench->fakes[i]->net, RANK, "worker 1", bench->net);
}

static inline void bench_wait_ready(bench_t *bench)
{
    kv_caller_t caller = patient();
    CHECK_STATUS(kv_net_wait_ready(bench->net, &caller), KV_OK);
    for (int32_t i = 0; i < bench->num_fakes; i++)
        CHECK_STATUS(kv_net_wait_ready(bench->fakes[i]->net, &caller), KV_OK);
}

/* A client of rank 1 and its servers, whose endpoints have these faults; not connected. */
static inline bench_t *bench_open(int32_t num_fakes, const char *faults)
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

static inline bench_t *bench_new(int32_t num_fakes, const char *faults)
{
    bench_t *bench = bench_open(num_fakes, faults);
    for (int32_t i = 0; i < num_fakes; i++)
        bench_connect(bench, i);
    bench_wait_ready(bench);
    return bench;
}

static inline void bench_free(bench_t *bench)
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
static inline void bench_declare(bench_t *bench, int count, int64_t elements, size_t slice_bytes,
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

static inline bool has_bytes(const void *memory, size_t bytes, uint64_t key, uint32_t slice)
{
    size_t wrong = 0;
    for (size_t i = 0; i < bytes; i++)
        wrong += ((const unsigned char *)memory)[i] != byte_of(key, slice, i);
    return CHECK_EQ(wrong, 0);
}

/* Server 1 has not connected this client: what goes there waits in the endpoint. */
static inline bench_t *bench_half(size_t elements, kv_remote_t **remotes)
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

static inline void bench_connect_rest(bench_t *bench)
{
    connect(bench->fakes[1]->net, RANK, "worker 1", bench->net);
    bench_wait_ready(bench);
}

static inline void start_push(bench_t *bench, test_call_t *call, kv_remote_t *remote,
                              const void *value)
{
    call_init(call, KV_CLIENT_MOVE);
    call_add(call, remote, value, NULL);
    call_start(bench->client, call);
}

#endif
