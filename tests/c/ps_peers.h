/* What the tests of a server share: a server behind an endpoint, and workers that send it messages
 * made by hand and keep every answer. */
#ifndef KV_TESTS_C_PS_PEERS_H
#define KV_TESTS_C_PS_PEERS_H

#include "compress/codec.h"
#include "net_nodes.h"
#include "ps/server.h"
#include "ps/wire.h"

enum { MAX_WORKERS = 4 };

typedef struct answer {
    struct answer *next;
    uint8_t kind; /* of its message */
    int32_t priority;
    kv_wire_record_t record;
    size_t bytes;
    char data[]; /* a value, a sentence (with a zero behind), the keys of a DECLARED */
} answer_t;

typedef struct peer {
    kv_net_t *net;
    int32_t rank;
    kv_mutex_t mutex;
    answer_t *answers; /* mutex */
    _Atomic int num_answers, num_messages;
    _Atomic bool is_lost;
} peer_t;

typedef struct cluster {
    kv_engine_t *engine;
    kv_host_t host;
    kv_server_t *server;
    kv_net_t *net;
    int32_t num_workers;
    int32_t num_peers;   /* with other servers, which come behind the workers */
    uint32_t timeout_ms; /* of all messages */
    bool tells;          /* the server that a worker is gone, as the control plane does */
    peer_t peers[MAX_WORKERS];
} cluster_t;

/* ----------------------------------------------------------------------------- answers come in */

typedef struct coming {
    peer_t *peer;
    kv_wire_header_t header;
    size_t bytes;
    unsigned char data[];
} coming_t;

static inline void keep_answer(peer_t *peer, const kv_wire_header_t *header,
                               const kv_wire_record_t *record, const void *data, size_t bytes)
{
    answer_t *answer = calloc(1, sizeof *answer + bytes + 1);
    answer->kind = header->kind;
    answer->priority = (int32_t)header->priority;
    answer->record = *record;
    answer->bytes = bytes;
    if (bytes > 0)
        memcpy(answer->data, data, bytes);
    kv_mutex_lock(&peer->mutex);
    answer->next = peer->answers;
    peer->answers = answer;
    kv_mutex_unlock(&peer->mutex);
    atomic_fetch_add(&peer->num_answers, 1);
}

static inline void coming_done(void *context, kv_status_t status)
{
    coming_t *coming = context;
    peer_t *peer = coming->peer;
    const kv_wire_header_t *header = &coming->header;
    if (status != KV_OK) {
        free(coming);
        return;
    }
    atomic_fetch_add(&peer->num_messages, 1);
    if (header->kind == KV_WIRE_REPLIES) {
        kv_wire_cursor_t cursor;
        CHECK(coming->bytes <= KV_WIRE_SLICE_BYTES);
        if (CHECK_STATUS(kv_wire_cursor_init(&cursor, coming->data, coming->bytes, header->count),
                         KV_OK)) {
            kv_wire_record_t record;
            const void *value;
            while (cursor.left > 0 && CHECK_STATUS(kv_wire_next(&cursor, &record, &value), KV_OK))
                keep_answer(peer, header, &record, value, (size_t)record.bytes);
        }
    } else if (CHECK(header->kind == KV_WIRE_VALUE || header->kind == KV_WIRE_DECLARED ||
                     header->kind == KV_WIRE_NORMS)) {
        if (header->kind != KV_WIRE_DECLARED)
            CHECK_EQ(header->record.bytes, coming->bytes);
        keep_answer(peer, header, &header->record, coming->data, coming->bytes);
    }
    free(coming);
}

static inline kv_status_t peer_arrive(void *context, kv_net_arrival_t *arrival)
{
    kv_wire_header_t header;
    KV_TRY(kv_wire_get_header(arrival->header, arrival->header_bytes, &header));
    coming_t *coming = malloc(sizeof *coming + arrival->payload_bytes);
    coming->peer = context;
    coming->header = header;
    coming->bytes = arrival->payload_bytes;
    arrival->target = coming->data;
    arrival->done = coming_done;
    arrival->context = coming;
    return KV_OK;
}

static inline void peer_lost(void *context, int32_t peer, const char *why)
{
    (void)peer;
    (void)why;
    atomic_store(&((peer_t *)context)->is_lost, true);
}

/* The answer to a request, NULL: there is none yet. Stays valid. */
static inline const answer_t *answer_to(peer_t *peer, uint64_t request)
{
    kv_mutex_lock(&peer->mutex);
    const answer_t *answer = peer->answers;
    while (answer != NULL && answer->record.request != request)
        answer = answer->next;
    kv_mutex_unlock(&peer->mutex);
    return answer;
}

/* Always false: for conditions. */
static inline bool tell_losses(cluster_t *cluster)
{
    for (int32_t i = 0; i < cluster->num_workers && cluster->tells; i++) {
        if (atomic_load(&cluster->peers[i].is_lost))
            kv_server_lose(cluster->server, "a worker is gone");
    }
    return false;
}

static inline const answer_t *await(cluster_t *cluster, int32_t worker, uint64_t request)
{
    static const answer_t none = {.record.status = KV_STATUS_COUNT};
    peer_t *peer = &cluster->peers[worker];
    const answer_t *answer = NULL;
    WAIT_UNTIL((answer = answer_to(peer, request)) != NULL || atomic_load(&peer->is_lost) ||
               tell_losses(cluster));
    return answer != NULL ? answer : &none;
}

/* -------------------------------------------------------------------------------- messages out */

typedef struct outgoing {
    kv_net_message_t base; /* first */
    unsigned char data[];
} outgoing_t;

static inline void outgoing_done(kv_net_message_t *message, kv_status_t status)
{
    (void)status;
    free(message);
}

static inline void send_raw(cluster_t *cluster, int32_t worker, const void *header,
                            size_t header_bytes, const void *data, size_t bytes)
{
    outgoing_t *outgoing = calloc(1, sizeof *outgoing + bytes);
    outgoing->base.peer = cluster->num_workers;
    outgoing->base.header_bytes = (uint32_t)header_bytes;
    memcpy(outgoing->base.header, header, header_bytes);
    if (bytes > 0) {
        memcpy(outgoing->data, data, bytes);
        outgoing->base.payload = outgoing->data;
    }
    outgoing->base.payload_bytes = bytes;
    outgoing->base.done = outgoing_done;
    if (kv_net_send(cluster->peers[worker].net, &outgoing->base) != KV_OK) {
        free(outgoing);
        atomic_store(&cluster->peers[worker].is_lost, true); /* no answer can be waited for */
    }
}

static inline void send_message(cluster_t *cluster, int32_t worker, kv_wire_header_t header,
                                const void *data, size_t bytes)
{
    unsigned char out[KV_WIRE_HEADER_BYTES];
    header.version = KV_WIRE_VERSION;
    header.timeout_ms = cluster->timeout_ms;
    kv_wire_put_header(&header, out);
    send_raw(cluster, worker, out, sizeof out, data, bytes);
}

/* One slice in a message of its own. */
static inline void send_one(cluster_t *cluster, int32_t worker, kv_wire_record_t record,
                            const void *data)
{
    kv_wire_header_t header = {.kind = KV_WIRE_PUSH_ONE, .count = 1, .record = record};
    send_message(cluster, worker, header, data, (size_t)record.bytes);
}

/* Records together; of a BATCH with their data. */
static inline void send_many(cluster_t *cluster, int32_t worker, kv_wire_kind_t kind,
                             uint32_t count, const kv_wire_record_t *records,
                             const void *const *data)
{
    size_t bytes = kv_wire_table_bytes(count);
    for (uint32_t i = 0; i < count; i++)
        bytes += kv_wire_value_bytes((size_t)records[i].bytes);
    unsigned char *out = calloc(1, bytes);
    size_t place = kv_wire_table_bytes(count);
    for (uint32_t i = 0; i < count; i++) {
        kv_wire_put_record(&records[i], out + (size_t)i * KV_WIRE_RECORD_BYTES);
        if (records[i].bytes > 0)
            memcpy(out + place, data[i], (size_t)records[i].bytes);
        place += kv_wire_value_bytes((size_t)records[i].bytes);
    }
    kv_wire_header_t header = {.kind = (uint8_t)kind, .count = count};
    send_message(cluster, worker, header, out, bytes);
    free(out);
}

static inline void send_keys(cluster_t *cluster, int32_t worker, uint64_t request, uint32_t count,
                             const kv_wire_key_t *keys)
{
    size_t bytes = 0;
    for (uint32_t i = 0; i < count; i++)
        bytes += kv_wire_key_bytes(&keys[i]);
    unsigned char *data = malloc(bytes), *end = data;
    for (uint32_t i = 0; i < count; i++)
        end = kv_wire_put_key(&keys[i], end);
    kv_wire_header_t header = {
        .kind = KV_WIRE_DECLARE, .count = count, .record = {.request = request}};
    send_message(cluster, worker, header, data, bytes);
    free(data);
}

/* -------------------------------------------------------------------------------- the cluster */

typedef struct plan {
    int32_t num_workers, index; /* of the server */
    int32_t num_others;         /* servers beside it, 1 and so on */
    bool async;
    const char *transport, *faults;
    uint64_t seed;
    const char *engine;
} plan_t;

static inline kv_status_t peers_connect(kv_net_t *a, int32_t number_of_b, kv_net_t *b)
{
    unsigned char address[KV_NET_ADDRESS_BYTES];
    size_t bytes = 0;
    kv_net_address(b, address, &bytes);
    return kv_net_connect(a, number_of_b, "a node", address, bytes);
}

static inline cluster_t *cluster_start(plan_t plan)
{
    cluster_t *cluster = calloc(1, sizeof *cluster);
    cluster->num_workers = plan.num_workers;
    cluster->num_peers = plan.num_workers + plan.num_others;
    kv_net_config_t config = {.transport = plan.transport != NULL ? plan.transport : "inproc",
                              .num_peers = cluster->num_peers + 1,
                              .session = {3, 1, 4},
                              .faults = plan.faults};
    CHECK_STATUS(
        kv_engine_new(plan.engine != NULL ? plan.engine : "threaded", 1, 2, &cluster->engine),
        KV_OK);
    CHECK_STATUS(kv_kernels_get(&cluster->host.kernels), KV_OK);
    CHECK_STATUS(kv_team_new(2, &cluster->host.team), KV_OK);
    cluster->host.num_threads = 2;
    kv_server_config_t server = {.engine = cluster->engine,
                                 .host = cluster->host,
                                 .index = plan.index,
                                 .num_workers = plan.num_workers,
                                 .num_servers = plan.index + 2 + plan.num_others,
                                 .async = plan.async};
    CHECK_STATUS(kv_server_new(&server, &cluster->server), KV_OK);
    kv_net_handlers_t handlers = kv_server_handlers(cluster->server);
    config.self = plan.num_workers;
    config.seed = plan.seed;
    CHECK_STATUS(kv_net_open(&config, &handlers, &cluster->net), KV_OK);
    kv_server_attach(cluster->server, cluster->net);
    for (int32_t i = 0; i < cluster->num_peers; i++) {
        int32_t node = i < plan.num_workers ? i : i + 1;
        peer_t *peer = &cluster->peers[i];
        peer->rank = i;
        kv_mutex_init(&peer->mutex, KV_RANK_LEAF);
        handlers = (kv_net_handlers_t){.context = peer, .arrive = peer_arrive, .lost = peer_lost};
        config.self = node;
        config.seed = plan.seed + 1 + (uint64_t)i;
        CHECK_STATUS(kv_net_open(&config, &handlers, &peer->net), KV_OK);
        CHECK_STATUS(peers_connect(peer->net, plan.num_workers, cluster->net), KV_OK);
        CHECK_STATUS(peers_connect(cluster->net, node, peer->net), KV_OK);
    }
    test_caller_t caller = make_caller(30 * SECOND_NS);
    CHECK_STATUS(kv_net_wait_ready(cluster->net, &caller.base), KV_OK);
    for (int32_t i = 0; i < cluster->num_peers; i++)
        CHECK_STATUS(kv_net_wait_ready(cluster->peers[i].net, &caller.base), KV_OK);
    return cluster;
}

static inline void peer_end(peer_t *peer)
{
    kv_net_close(peer->net);
    kv_net_free(peer->net);
    peer->net = NULL;
    for (answer_t *answer = peer->answers, *next; answer != NULL; answer = next) {
        next = answer->next;
        free(answer);
    }
    peer->answers = NULL;
    kv_mutex_fini(&peer->mutex);
}

static inline void cluster_end(cluster_t *cluster)
{
    kv_net_close(cluster->net);
    kv_server_stop(cluster->server);
    for (int32_t i = 0; i < cluster->num_peers; i++) {
        if (cluster->peers[i].net != NULL)
            peer_end(&cluster->peers[i]);
    }
    kv_server_counters_t counters;
    kv_server_counters(cluster->server, &counters);
    CHECK_EQ(counters.keys, 0);
    CHECK_EQ(counters.slices, 0);
    CHECK_EQ(counters.value_bytes, 0);
    CHECK_EQ(counters.waiting, 0);
    kv_server_free(cluster->server);
    kv_net_free(cluster->net);
    kv_engine_close(cluster->engine);
    kv_engine_stop(cluster->engine, NULL);
    kv_engine_free(cluster->engine);
    kv_team_stop(cluster->host.team);
    kv_team_free(cluster->host.team);
    free(cluster);
}

static inline kv_server_counters_t counters_of(const cluster_t *cluster)
{
    kv_server_counters_t counters;
    kv_server_counters(cluster->server, &counters);
    return counters;
}

/* ------------------------------------------------------------------- one key, and floats */

enum { KEY = 40, LARGE = 50000, LARGEST = KV_WIRE_SLICE_BYTES / 4 };

static inline kv_wire_record_t floats(kv_wire_action_t action, uint64_t request, uint32_t slice,
                                      uint64_t round, int64_t count)
{
    return (kv_wire_record_t){.action = (uint8_t)action,
                              .request = request,
                              .tag = (uint32_t)request + 1000,
                              .key = KEY,
                              .slice = slice,
                              .round = round,
                              .dtype = KV_FLOAT32,
                              .bytes = (uint64_t)count * sizeof(float)};
}

/* Sends `count` elements, all of them `value`. */
static inline void push(cluster_t *cluster, int32_t worker, kv_wire_record_t record, float value)
{
    float *data = malloc((size_t)record.bytes + 1);
    for (uint64_t i = 0; i < record.bytes / sizeof(float); i++)
        data[i] = value;
    send_one(cluster, worker, record, data);
    free(data);
}

static inline void init(cluster_t *cluster, uint64_t request, uint32_t slice, int64_t count,
                        float value)
{
    push(cluster, 0, floats(KV_WIRE_INIT, request, slice, 0, count), value);
}

static inline void pull(cluster_t *cluster, int32_t worker, uint64_t request, uint32_t slice,
                        uint64_t round)
{
    kv_wire_record_t record = floats(KV_WIRE_GET, request, slice, round, 0);
    send_many(cluster, worker, KV_WIRE_PULL, 1, &record, NULL);
}

static inline void drop(cluster_t *cluster, int32_t worker, uint64_t request, uint64_t round)
{
    kv_wire_record_t record = floats(KV_WIRE_DROP, request, 0, round, 0);
    send_many(cluster, worker, KV_WIRE_DELETE, 1, &record, NULL);
}

static inline bool check_floats(const answer_t *answer, int64_t count, float value)
{
    const float *data = (const float *)(const void *)answer->data;
    if (!CHECK_EQ(answer->record.status, KV_OK) ||
        !CHECK_EQ(answer->bytes, count * (int64_t)sizeof(float)))
        return false;
    CHECK_EQ(answer->record.dtype, KV_FLOAT32);
    int64_t wrong = 0;
    for (int64_t i = 0; i < count; i++) {
        float got;
        memcpy(&got, data + i, sizeof got);
        wrong += got != value;
    }
    return CHECK_EQ(wrong, 0);
}

static inline void check_done(cluster_t *cluster, int32_t worker, uint64_t request)
{
    const answer_t *answer = await(cluster, worker, request);
    CHECK_EQ(answer->record.status, KV_OK);
    CHECK_EQ(answer->record.tag, request + 1000);
    CHECK_EQ(answer->bytes, 0);
}

static inline void check_failed(cluster_t *cluster, int32_t worker, uint64_t request,
                                kv_status_t status, const char *sentence)
{
    const answer_t *answer = await(cluster, worker, request);
    CHECK_EQ(answer->record.status, status);
    CHECK_TEXT(answer->data, sentence);
}

/* Everything that a worker has sent so far has been dealt with. */
static inline void settle(cluster_t *cluster, int32_t worker)
{
    static _Atomic uint64_t number = 1000000;
    uint64_t request = atomic_fetch_add(&number, 1);
    kv_wire_record_t record = floats(KV_WIRE_INIT, request, 0, 0, 0);
    record.codec = KV_CODEC_2BIT; /* nobody takes that */
    send_one(cluster, worker, record, "");
    CHECK(await(cluster, worker, request)->record.status != KV_OK);
}

/* The places of the slices of all keys that are declared. */
static unsigned char places[4];

static inline kv_wire_key_t declared(const char *name, uint64_t number, int64_t rows)
{
    return (kv_wire_key_t){.name = {.text = name, .bytes = strlen(name)},
                           .dtype = KV_FLOAT32,
                           .ndim = 2,
                           .shape = {rows, 2},
                           .placed = 1,
                           .number = number,
                           .slice_bytes = 16,
                           .num_slices = rows > 2 ? 2 : 1,
                           .servers = places};
}

static inline kv_wire_key_t asked(const char *name, int64_t rows)
{
    kv_wire_key_t key = declared(name, 0, rows);
    key.placed = 0;
    return key;
}

#endif
