/* The server's life, messages that come in, deadlines.
 *
 * A message is handled when its payload is there, so those of one worker are handled in another
 * order than they were sent. Rounds are numbered for that reason, and whatever comes before what it
 * builds on waits.
 */
#include "ps/server_internal.h"
#include <inttypes.h>
#include <string.h>

enum { MESSAGE_BYTES = 1 << 30 }; /* of names and records, at most */

/* A request is answered so long before its worker gives up: a fifth of its time, but enough for a
 * tick of the endpoint and the way back, unless that is half of its time. */
#define LEAST_EARLY_NS (150 * INT64_C(1000000))
#define MOST_EARLY_NS (500 * INT64_C(1000000))

/* The session with another server has ended: who is lost is for the control plane to say. When it
 * has said nothing for so long, they have lost each other. */
#define PARTED_NS (2000 * INT64_C(1000000))

/* ------------------------------------------------------------------------------------ tables */

static kv_index_node_t **chain_of(const kv_index_t *index, uint64_t number, uint32_t part)
{
    uint64_t hash = (number ^ (uint64_t)part << 40) * UINT64_C(0x9E3779B97F4A7C15);
    if (index->num_chains == 0)
        return (kv_index_node_t **)&index->single;
    return &index->chains[(hash ^ hash >> 32) & (index->num_chains - 1)];
}

kv_index_node_t *kv_index_find(const kv_index_t *index, uint64_t number, uint32_t part)
{
    kv_index_node_t *node = *chain_of(index, number, part);
    while (node != NULL && (node->number != number || node->part != part))
        node = node->next;
    return node;
}

static void grow(kv_index_t *index)
{
    uint64_t num_chains = index->num_chains > 0 ? 2 * index->num_chains : 64;
    kv_index_node_t **chains = kv_calloc(num_chains, sizeof *chains);
    if (chains == NULL)
        return;
    kv_index_t old = *index;
    index->chains = chains;
    index->num_chains = num_chains;
    index->single = NULL;
    for (uint64_t i = 0; i < (old.num_chains > 0 ? old.num_chains : 1); i++) {
        kv_index_node_t *node = old.num_chains > 0 ? old.chains[i] : old.single, *next;
        for (; node != NULL; node = next) {
            next = node->next;
            kv_index_node_t **chain = chain_of(index, node->number, node->part);
            node->next = *chain;
            *chain = node;
        }
    }
    kv_free(old.chains);
}

void kv_index_add(kv_index_t *index, kv_index_node_t *node)
{
    if ((uint64_t)index->num_nodes >= index->num_chains)
        grow(index);
    kv_index_node_t **chain = chain_of(index, node->number, node->part);
    node->next = *chain;
    *chain = node;
    index->num_nodes++;
}

void kv_index_remove(kv_index_t *index, kv_index_node_t *node)
{
    kv_index_node_t **link = chain_of(index, node->number, node->part);
    while (*link != node)
        link = &(*link)->next;
    *link = node->next;
    index->num_nodes--;
}

kv_index_node_t *kv_index_any(const kv_index_t *index)
{
    kv_index_node_t *node = index->single;
    for (uint64_t i = 0; i < index->num_chains && node == NULL; i++)
        node = index->chains[i];
    return node;
}

void kv_index_fini(kv_index_t *index)
{
    kv_free(index->chains);
    *index = (kv_index_t){.num_nodes = 0};
}

/* ------------------------------------------------------------------------------ giving up */

/* Answers a request that waits with an error. */
static void give_up_locked(kv_server_t *server, kv_request_t *request, kv_error_t *error)
    KV_REQUIRES(server->mutex)
{
    if (request->declare != NULL) {
        kv_declare_end_locked(server, request, error);
        return;
    }
    if (request->header.record.action == KV_WIRE_GET || kv_request_is_state(request))
        kv_slice_unlist_locked(server, request);
    else if (request->key != NULL)
        kv_drop_withdraw_locked(server, request);
    kv_answer_error_locked(server, request, error);
}

static void give_up_all_locked(kv_server_t *server, kv_error_t *error) KV_REQUIRES(server->mutex)
{
    while (server->waiting != NULL)
        give_up_locked(server, server->waiting, error);
}

void kv_server_lose_locked(kv_server_t *server, const char *why)
{
    if (server->lost == NULL)
        server->lost = kv_error_capture(kv_fail(KV_PEER_LOST, "%s", why));
    give_up_all_locked(server, server->lost);
}

static kv_status_t missing_locked(kv_server_t *server, const kv_request_t *request)
    KV_REQUIRES(server->mutex)
{
    if (request->declare != NULL)
        return kv_fail(KV_TIMEOUT, "worker 0 has not initialised the key");
    return request->key != NULL ? kv_drop_missing_locked(server, request)
                                : kv_slice_missing_locked(server, request->slice);
}

static bool is_push(const kv_request_t *request)
{
    uint8_t action = request->header.record.action;
    return action == KV_WIRE_PUSH || action == KV_WIRE_PUSHPULL;
}

/* Answers the requests that wait for what nobody will send any more. */
static void give_up_on_absent_locked(kv_server_t *server) KV_REQUIRES(server->mutex)
{
    kv_request_t *next;
    for (kv_request_t *request = server->waiting; request != NULL; request = next) {
        next = request->wait_next;
        kv_status_t status = request->declare != NULL ? kv_declare_check_left_locked(server)
                             : request->key != NULL
                                 ? kv_drop_check_left_locked(server)
                                 : kv_slice_check_left_locked(server, request->slice, request);
        if (status == KV_OK)
            continue;
        kv_error_t *error = kv_error_capture(status);
        if (request->slice != NULL && is_push(request)) {
            kv_slice_spoil_locked(server, request, error); /* its data is of no use any more */
        } else {
            give_up_locked(server, request, error);
            kv_error_rele(error);
        }
    }
}

static void tick(void *context)
{
    kv_server_t *server = context;
    int64_t now = kv_clock_ns();
    kv_mutex_lock(&server->mutex);
    if (server->parted != NULL && now >= server->parted_ns && server->lost == NULL) {
        kv_server_lose_locked(server, server->parted->message);
        kv_flush_locked(server);
    }
    if (now >= server->next_deadline_ns) {
        server->next_deadline_ns = INT64_MAX;
        kv_request_t *next;
        for (kv_request_t *request = server->waiting; request != NULL; request = next) {
            next = request->wait_next;
            if (now >= request->deadline_ns) {
                kv_error_t *error = kv_error_capture(missing_locked(server, request));
                give_up_locked(server, request, error);
                kv_error_rele(error);
            } else if (request->deadline_ns < server->next_deadline_ns) {
                server->next_deadline_ns = request->deadline_ns;
            }
        }
        kv_flush_locked(server);
    }
    kv_mutex_unlock(&server->mutex);
}

static int64_t deadline(uint32_t timeout_ms)
{
    int64_t timeout = (int64_t)timeout_ms * 1000000;
    if (timeout == 0)
        return INT64_MAX;
    int64_t early = timeout / 5;
    if (early > MOST_EARLY_NS)
        early = MOST_EARLY_NS;
    if (early < LEAST_EARLY_NS)
        early = timeout / 2 < LEAST_EARLY_NS ? timeout / 2 : LEAST_EARLY_NS;
    return kv_clock_ns() + timeout - early;
}

/* ---------------------------------------------------------------------------- messages in */

/* One record, as it came in a message of this kind. An error ends the session; the request is used
 * up in any case. */
static kv_status_t handle_locked(kv_server_t *server, kv_request_t *request)
    KV_REQUIRES(server->mutex)
{
    uint8_t kind = request->header.kind, action = request->header.record.action;
    kv_status_t status = KV_OK;
    bool pushes = is_push(request);
    bool expected = kind == KV_WIRE_PULL ? action == KV_WIRE_GET || action == KV_WIRE_GET_STATE
                    : kind == KV_WIRE_DELETE
                        ? action == KV_WIRE_DROP
                        : pushes || action == KV_WIRE_INIT || action == KV_WIRE_SET_STATE;
    if (!expected)
        status = kv_fail(KV_INVALID, "a message of kind %d asks for action %d", kind, action);
    else if (server->lost != NULL)
        kv_answer_error_locked(server, request, server->lost);
    else if (pushes)
        status = kv_slice_push_locked(server, request);
    else if (action == KV_WIRE_INIT)
        kv_slice_init_locked(server, request);
    else if (action == KV_WIRE_GET || kv_request_is_state(request))
        kv_slice_pull_locked(server, request);
    else
        kv_drop_locked(server, request);
    if (status != KV_OK)
        kv_request_rele_locked(server, request);
    return status;
}

/* A message with records in its payload, which is there. */
static kv_status_t handle_records_locked(kv_server_t *server, const kv_request_t *message)
    KV_REQUIRES(server->mutex)
{
    kv_wire_cursor_t cursor;
    const kv_buffer_t *payload = message->buffer;
    KV_TRY(kv_wire_cursor_init(&cursor, payload->data, payload->bytes, message->header.count));
    while (cursor.left > 0) {
        kv_wire_record_t record;
        const void *data;
        KV_TRY(kv_wire_next(&cursor, &record, &data));
        kv_request_t *request = kv_request_new_locked(server);
        KV_TRY_ALLOC(request, "a request");
        request->header = message->header;
        request->header.record = record;
        request->worker = message->worker;
        request->deadline_ns = message->deadline_ns;
        if (message->header.kind == KV_WIRE_BATCH || record.bytes > 0) {
            request->buffer = kv_buffer_hold(message->buffer);
            request->data = data;
        }
        KV_TRY(handle_locked(server, request));
    }
    return KV_OK;
}

/* What another server tells; the error is taken. One that makes no sense cannot be worked with. */
static kv_status_t handle_norms_locked(kv_server_t *server, int32_t peer,
                                       const kv_wire_header_t *header, kv_error_t *error)
    KV_REQUIRES(server->mutex)
{
    kv_status_t status = kv_norms_told_locked(server, peer - server->num_workers, header, error);
    if (status != KV_OK)
        kv_server_lose_locked(server, kv_status_message(status));
    else
        kv_slices_go_on_locked(server);
    return status;
}

static kv_error_t *error_of(const kv_request_t *message)
{
    const kv_wire_record_t *record = &message->header.record;
    return kv_error_capture(kv_fail((kv_status_t)record->status, "%.*s", (int)record->bytes,
                                    (const char *)message->data));
}

static kv_status_t handle_message_locked(kv_server_t *server, kv_request_t *message)
    KV_REQUIRES(server->mutex)
{
    if (message->header.kind == KV_WIRE_PUSH_ONE)
        return handle_locked(server, message);
    kv_status_t status;
    if (message->header.kind == KV_WIRE_DECLARE) {
        status = kv_declare_locked(server, message);
        if (status == KV_OK)
            return KV_OK;
    } else if (message->header.kind == KV_WIRE_NORMS) {
        status = handle_norms_locked(server, message->worker, &message->header, error_of(message));
    } else {
        status = handle_records_locked(server, message);
    }
    kv_request_rele_locked(server, message);
    return status;
}

static void received(void *context, kv_status_t status)
{
    kv_request_t *message = context;
    kv_server_t *server = message->server;
    int32_t worker = message->worker;
    kv_mutex_lock(&server->mutex);
    if (status != KV_OK) {
        kv_request_rele_locked(server, message); /* its worker is gone */
    } else {
        status = handle_message_locked(server, message);
        if (status != KV_OK)
            kv_net_drop(server->net, worker, kv_status_message(status));
        kv_flush_locked(server);
    }
    kv_mutex_unlock(&server->mutex);
}

static kv_status_t check_norms(const kv_server_t *server, const kv_net_arrival_t *arrival,
                               const kv_wire_record_t *record)
{
    int32_t from = arrival->peer - server->num_workers;
    if (from < 0 || from >= server->num_servers || from == server->index)
        return kv_fail(KV_INVALID, "node %" PRId32 " is not another server", arrival->peer);
    if (record->action != KV_WIRE_SQUARES || record->bytes != arrival->payload_bytes ||
        record->bytes >= KV_MESSAGE_BYTES || (record->status == KV_OK) != (record->bytes == 0))
        return kv_fail(KV_INVALID,
                       "server %" PRId32 " has told of norms in a form that there is none of",
                       from);
    return KV_OK;
}

static kv_status_t check_message(const kv_server_t *server, const kv_net_arrival_t *arrival,
                                 const kv_wire_header_t *header)
{
    size_t bytes = arrival->payload_bytes;
    if (header->kind == KV_WIRE_NORMS)
        return check_norms(server, arrival, &header->record);
    if (arrival->peer < 0 || arrival->peer >= server->num_workers)
        return kv_fail(KV_INVALID, "node %" PRId32 " is not a worker", arrival->peer);
    if (header->kind == 0 || header->kind > KV_WIRE_DELETE)
        return kv_fail(KV_INVALID, "worker %" PRId32 " has sent a message of kind %u to a server",
                       arrival->peer, (unsigned)header->kind);
    if (header->kind == KV_WIRE_PUSH_ONE && header->record.bytes != bytes)
        return kv_fail(KV_INVALID,
                       "worker %" PRId32 " has announced %" PRIu64 " bytes and sent %zu",
                       arrival->peer, header->record.bytes, bytes);
    bool values = header->kind == KV_WIRE_PUSH_ONE || header->kind == KV_WIRE_BATCH;
    bool large =
        header->kind == KV_WIRE_PUSH_ONE && (header->record.flags & (KV_WIRE_ROWS | KV_WIRE_WHOLE));
    bool state = header->kind == KV_WIRE_PUSH_ONE && header->record.action == KV_WIRE_SET_STATE;
    size_t limit = large    ? (size_t)KV_WIRE_ROWS_BYTES + KV_WIRE_KEY_BYTES
                   : state  ? (size_t)KV_WIRE_STATE_BYTES
                   : values ? (size_t)KV_WIRE_SLICE_BYTES
                            : (size_t)MESSAGE_BYTES;
    if (bytes > limit)
        return kv_fail(KV_INVALID,
                       "worker %" PRId32 " has sent a message of %zu bytes, %zu are "
                       "allowed",
                       arrival->peer, bytes, limit);
    return KV_OK;
}

/* Sums have no payload, so they need no memory. */
static kv_status_t arrive_norms(kv_server_t *server, kv_net_arrival_t *arrival,
                                const kv_wire_header_t *header)
{
    arrival->target = NULL;
    arrival->done = NULL;
    kv_mutex_lock(&server->mutex);
    kv_status_t status = handle_norms_locked(server, arrival->peer, header, NULL);
    kv_flush_locked(server);
    kv_mutex_unlock(&server->mutex);
    return status;
}

/* A payload for which there is no memory is thrown away. What was wanted of the slice is known from
 * its header, so the slice can go on; of other messages nothing is known. */
static kv_status_t throw_away_locked(kv_server_t *server, kv_request_t *message, kv_status_t status)
    KV_REQUIRES(server->mutex)
{
    if (message->header.kind == KV_WIRE_NORMS)
        status = handle_norms_locked(server, message->worker, &message->header,
                                     kv_error_capture(status));
    if (message->header.kind != KV_WIRE_PUSH_ONE) {
        kv_request_rele_locked(server, message);
        return status;
    }
    message->failure = kv_error_capture(status);
    status = handle_locked(server, message);
    kv_flush_locked(server);
    return status;
}

static kv_status_t arrive(void *context, kv_net_arrival_t *arrival)
{
    kv_server_t *server = context;
    kv_wire_header_t header;
    KV_TRY(kv_wire_get_header(arrival->header, arrival->header_bytes, &header));
    KV_TRY(check_message(server, arrival, &header));
    if (header.kind == KV_WIRE_NORMS && header.record.status == KV_OK)
        return arrive_norms(server, arrival, &header);
    kv_mutex_lock(&server->mutex);
    kv_request_t *message = kv_request_new_locked(server);
    kv_status_t status = KV_OK;
    if (message == NULL) {
        status = kv_fail(KV_NO_MEMORY, "no memory for a request");
    } else {
        message->header = header;
        message->worker = arrival->peer;
        message->deadline_ns = deadline(header.timeout_ms);
        status = kv_pool_get(server->pool, arrival->payload_bytes, &message->buffer);
        if (status != KV_OK) {
            status = throw_away_locked(server, message, status);
            arrival->target = NULL;
            arrival->done = NULL;
        } else {
            message->whole = true;
            message->data = message->buffer->data;
            arrival->target = message->buffer->data;
            arrival->done = received;
            arrival->context = message;
        }
    }
    kv_mutex_unlock(&server->mutex);
    return status;
}

static void lost(void *context, int32_t peer, const char *why)
{
    kv_server_t *server = context;
    bool worker = peer < server->num_workers;
    kv_error_t *error = kv_error_capture(kv_fail(KV_PEER_LOST, "%s %" PRId32 " is gone: %s",
                                                 worker ? "worker" : "server",
                                                 worker ? peer : peer - server->num_workers, why));
    kv_mutex_lock(&server->mutex);
    if (!worker && server->parted == NULL) {
        server->parted = kv_error_hold(error);
        server->parted_ns = kv_clock_ns() + PARTED_NS;
    }
    kv_request_t *next;
    for (kv_request_t *request = server->waiting; request != NULL; request = next) {
        next = request->wait_next;
        if (request->worker == peer)
            give_up_locked(server, request, error);
    }
    kv_error_rele(error);
    if (worker)
        server->presence[peer] = server->presence[peer] == KV_PRESENT ? KV_ENDED : KV_ABSENT;
    give_up_on_absent_locked(server);
    kv_flush_locked(server);
    kv_mutex_unlock(&server->mutex);
}

void kv_server_left(kv_server_t *server, int32_t worker, bool finished)
{
    kv_mutex_lock(&server->mutex);
    bool ended = server->presence[worker] == KV_ENDED;
    server->presence[worker] = finished || ended ? KV_ABSENT : KV_LEAVING;
    give_up_on_absent_locked(server);
    kv_flush_locked(server);
    kv_mutex_unlock(&server->mutex);
}

/* --------------------------------------------------------------------------------------- life */

kv_status_t kv_server_new(const kv_server_config_t *config, kv_server_t **out)
{
    kv_pool_t *pool;
    KV_TRY(kv_pool_new(&pool));
    size_t workers = (size_t)config->num_workers;
    kv_server_t *server =
        kv_calloc(1, sizeof *server + workers * (sizeof(kv_outbox_t) + sizeof(kv_presence_t)));
    if (server == NULL) {
        kv_pool_free(pool);
        return kv_fail(KV_NO_MEMORY, "no memory for a server");
    }
    kv_mutex_init(&server->mutex, KV_RANK_PS);
    kv_cond_init(&server->ended);
    kv_cond_init(&server->wake);
    server->engine = config->engine;
    server->host = config->host;
    server->index = config->index;
    server->num_workers = config->num_workers;
    server->num_servers = config->num_servers;
    server->async = config->async;
    /* The others would run a sum in the submitting thread, under the lock, or only when somebody
     * waits for it. */
    server->has_threads = strcmp(kv_engine_name(config->engine), "threaded") == 0;
    server->presence = (kv_presence_t *)&server->out[workers];
    server->pool = pool;
    server->next_deadline_ns = INT64_MAX;
    *out = server;
    return KV_OK;
}

kv_net_handlers_t kv_server_handlers(kv_server_t *server)
{
    return (kv_net_handlers_t){.context = server, .arrive = arrive, .lost = lost, .tick = tick};
}

void kv_server_attach(kv_server_t *server, kv_net_t *net)
{
    kv_mutex_lock(&server->mutex);
    server->net = net;
    kv_mutex_unlock(&server->mutex);
}

void kv_server_lose(kv_server_t *server, const char *why)
{
    kv_mutex_lock(&server->mutex);
    kv_server_lose_locked(server, why);
    kv_flush_locked(server);
    kv_mutex_unlock(&server->mutex);
}

void kv_server_stop(kv_server_t *server)
{
    kv_mutex_lock(&server->mutex);
    while (server->num_running > 0)
        kv_cond_wait(&server->ended, &server->mutex);
    server->stopped = true;
    server->updates = server->updating = NULL; /* who has the latter goes on with its memory */
    kv_cond_broadcast(&server->wake);
    kv_error_t *error = kv_error_capture(kv_fail(KV_CLOSED, "the server has stopped"));
    give_up_all_locked(server, error);
    kv_index_node_t *node;
    while ((node = kv_index_any(&server->keys)) != NULL)
        kv_server_key_free_locked(server, (kv_server_key_t *)node, error);
    kv_error_rele(error);
    kv_flush_locked(server);
    kv_mutex_unlock(&server->mutex);
}

void kv_server_free(kv_server_t *server)
{
    if (server == NULL)
        return;
    for (kv_request_t *request = server->free_requests, *next; request != NULL; request = next) {
        next = request->next;
        kv_free(request);
    }
    for (kv_known_optimizer_t *known = server->optimizers, *next; known != NULL; known = next) {
        next = known->next;
        kv_free(known);
    }
    kv_error_rele(server->lost);
    kv_error_rele(server->parted);
    kv_index_fini(&server->slices);
    kv_index_fini(&server->keys);
    kv_index_fini(&server->names);
    kv_pool_free(server->pool);
    kv_cond_fini(&server->wake);
    kv_cond_fini(&server->ended);
    kv_mutex_fini(&server->mutex);
    kv_free(server);
}

void kv_server_counters(kv_server_t *server, kv_server_counters_t *out)
{
    kv_mutex_lock(&server->mutex);
    *out = server->counters;
    kv_mutex_unlock(&server->mutex);
}
