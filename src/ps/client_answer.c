/* What servers send: values go where the caller wants them, many small answers are taken apart.
 *
 * Nothing a server says is believed: request, tag, server, key, slice and length must fit an
 * operation that waits for an answer, before any memory is touched. A server that says something
 * else is dropped.
 */
#include "ps/client_internal.h"
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* Many answers in one message, on their way into a buffer. */
typedef struct gathered {
    kv_client_t *client;
    kv_buffer_t *buffer;
    kv_wire_header_t header;
    size_t bytes;
    int32_t peer;
} gathered_t;

static int32_t server_of(const kv_client_t *client, int32_t peer)
{
    return peer - client->config.num_workers;
}

/* The operation that waits for this answer. *out is NULL when nobody waits for anything any more.
 */
static kv_status_t find_op_locked(kv_client_t *client, int32_t peer, const kv_wire_record_t *record,
                                  kv_slice_op_t **out) KV_REQUIRES(client->lock)
{
    *out = NULL;
    if (client->status != KV_OK)
        return KV_OK;
    kv_client_work_t *work = kv_client_find_locked(client, record->request);
    kv_slice_op_t *op =
        work != NULL && record->tag < work->num_ops ? &work->ops[record->tag] : NULL;
    if (op == NULL || op->state != KV_OP_ASKED || op->server != server_of(client, peer))
        return kv_fail(KV_INVALID,
                       "it answers request %" PRIu64 ", part %" PRIu32 ", which does not wait",
                       record->request, record->tag);
    *out = op;
    return KV_OK;
}

/* Where the value of an operation is to go, NULL when it asks for none. */
static char *out_of(const kv_slice_op_t *op)
{
    if (op->action != KV_WIRE_GET && op->action != KV_WIRE_PUSHPULL &&
        op->action != KV_WIRE_GET_STATE)
        return NULL;
    char *out = op->work->call->parts[op->part].out;
    return out != NULL ? out + op->offset : NULL;
}

/* `came`: its value is where it is to go. */
static void answered_locked(kv_slice_op_t *op, bool came)
{
    op->state = KV_OP_ANSWERED;
    op->work->ops_left--;
    if (came)
        kv_work_note_come_locked(op);
    kv_work_touch_locked(op->work);
}

/* The first error of a call is the call's. */
static void set_error(kv_slice_op_t *op, const kv_remote_t *remote, kv_status_t code,
                      const char *words, size_t bytes)
{
    kv_client_work_t *work = op->work;
    char name[64];
    if (work->error.code != KV_OK)
        return;
    kv_name_format(&remote->name, name, sizeof name);
    bool pushes = op->action == KV_WIRE_PUSH || op->action == KV_WIRE_PUSHPULL;
    kv_fail(code, "key %s: %.*s (server %d)%s", name, (int)(bytes < 320 ? bytes : 320), words,
            (int)op->server,
            pushes && code == KV_TIMEOUT ? "; the push counts as soon as all have pushed" : "");
    kv_sentence_save(&work->error);
}

static kv_status_t check_value(const kv_slice_op_t *op, const kv_wire_record_t *record)
{
    const kv_remote_t *remote = op->work->remotes[op->part];
    uint64_t bytes = out_of(op) != NULL ? op->bytes : 0;
    uint16_t flag = op->action == KV_WIRE_GET_STATE ? KV_WIRE_WHOLE : KV_WIRE_ROWS;
    bool finds = kv_op_finds(op) && (record->flags & flag);
    if (finds)
        bytes = record->bytes; /* looked at when they are there */
    if (op->action == KV_WIRE_GET_STATE && record->bytes == 0)
        bytes = 0; /* there is no such buffer */
    if (finds != kv_op_finds(op) || op->action == 0 || record->key != remote->number ||
        record->slice != op->slice || record->bytes != bytes || record->codec != 0 ||
        record->dtype != remote->dtype)
        return kv_fail(KV_INVALID,
                       "it answers with %" PRIu64 " bytes of key %" PRIu64 ", slice %" PRIu32
                       ", where other ones are due",
                       record->bytes, record->key, record->slice);
    return KV_OK;
}

/* What an answer says besides its data. */
static void note_state(const kv_slice_op_t *op, const kv_wire_record_t *record)
{
    if (op->action != KV_WIRE_GET_STATE)
        return;
    kv_client_state_t *state = &op->work->call->states[op->part];
    int64_t t = record->t <= INT64_MAX ? (int64_t)record->t : 0;
    state->t = t > state->t ? t : state->t;
    if (op->bytes > 0)
        (*(record->bytes > 0 ? &state->num_there : &state->num_missing))++;
}

/* ------------------------------------------------------------------------------- single values */

static void value_done(void *context, kv_status_t status)
{
    kv_slice_op_t *op = context;
    kv_client_work_t *work = op->work;
    kv_client_t *client = work->client;
    kv_mutex_lock(&client->lock);
    work->receiving--;
    if (status != KV_OK)
        kv_client_peer_lost_locked(
            client, kv_node_of_server(client->config.num_workers, op->server), status);
    answered_locked(op, status == KV_OK);
    kv_client_unlock(client);
}

static kv_status_t take_value_locked(kv_client_t *client, kv_net_arrival_t *arrival,
                                     const kv_wire_record_t *record) KV_REQUIRES(client->lock)
{
    kv_slice_op_t *op;
    KV_TRY(find_op_locked(client, arrival->peer, record, &op));
    if (op == NULL)
        return KV_OK;
    KV_TRY(check_value(op, record));
    char *out = out_of(op);
    if (out == NULL || record->status != KV_OK || arrival->payload_bytes != op->bytes)
        return kv_fail(KV_INVALID, "it sends a value of %zu bytes where none of that length is due",
                       arrival->payload_bytes);
    note_state(op, record);
    if (op->work->given_up || op->bytes == 0) {
        answered_locked(op, false);
        return KV_OK;
    }
    arrival->target = out;
    arrival->done = value_done;
    arrival->context = op;
    op->state = KV_OP_RECEIVING;
    op->work->receiving++;
    return KV_OK;
}

/* All rows of a slice, or an object, have come, in a buffer with nothing else in it, or among other
 * answers. */
static kv_status_t keep_found(kv_slice_op_t *op, kv_buffer_t *whole, const void *data, size_t bytes)
{
    kv_buffer_t *rows = whole;
    if (op->action != KV_WIRE_GET_STATE)
        KV_TRY(kv_op_check_rows(op, data, bytes));
    if (op->work->given_up || bytes == 0)
        return KV_OK;
    if (whole != NULL) {
        kv_buffer_hold(whole);
    } else if (kv_pool_get(op->work->client->pool, bytes, &rows) == KV_OK) {
        memcpy(rows->data, data, bytes);
    } else {
        static const char words[] = "no memory for the answer of";
        set_error(op, op->work->remotes[op->part], KV_NO_MEMORY, words, sizeof words - 1);
        return KV_OK;
    }
    op->work->call->parts[op->part].found[op->slice] = rows;
    return KV_OK;
}

static kv_status_t take_rows_locked(kv_client_t *client, const gathered_t *gathered)
    KV_REQUIRES(client->lock)
{
    const kv_wire_record_t *record = &gathered->header.record;
    kv_slice_op_t *op;
    KV_TRY(find_op_locked(client, gathered->peer, record, &op));
    if (op == NULL)
        return KV_OK;
    KV_TRY(check_value(op, record));
    if (!kv_op_finds(op) || record->status != KV_OK)
        return kv_fail(KV_INVALID, "it sends rows where none are due");
    note_state(op, record);
    KV_TRY(keep_found(op, gathered->buffer, gathered->buffer->data, gathered->bytes));
    answered_locked(op, false);
    return KV_OK;
}

/* ------------------------------------------------------------------------------- many answers */

/* A server may have heard of a loss before this node has: what it says of one call holds for all.
 */
static void take_loss_locked(kv_client_t *client, uint8_t status, const char *words, size_t bytes)
    KV_REQUIRES(client->lock)
{
    char why[KV_MESSAGE_BYTES];
    if (status != KV_PEER_LOST)
        return;
    snprintf(why, sizeof why, "%.*s", bytes < sizeof why ? (int)bytes : (int)sizeof why - 1, words);
    kv_client_lose_locked(client, KV_PEER_LOST, why);
}

static kv_status_t take_reply_locked(kv_client_t *client, int32_t peer,
                                     const kv_wire_record_t *record, const void *data)
    KV_REQUIRES(client->lock)
{
    kv_slice_op_t *op;
    KV_TRY(find_op_locked(client, peer, record, &op));
    if (op == NULL)
        return KV_OK;
    const kv_remote_t *remote = op->work->remotes[op->part];
    if (record->status == KV_INTERRUPTED || record->status == KV_CALLBACK)
        return kv_fail(KV_INVALID, "it answers with status %d, which is not a server's",
                       (int)record->status);
    if (record->status != KV_OK) {
        set_error(op, remote, (kv_status_t)record->status, data, (size_t)record->bytes);
        take_loss_locked(client, record->status, data, (size_t)record->bytes);
        answered_locked(op, false);
        return KV_OK;
    }
    KV_TRY(check_value(op, record));
    char *out = out_of(op);
    note_state(op, record);
    bool comes = !kv_op_finds(op) && out != NULL && record->bytes > 0 && !op->work->given_up;
    if (kv_op_finds(op))
        KV_TRY(keep_found(op, NULL, data, (size_t)record->bytes));
    else if (comes)
        memcpy(out, data, (size_t)record->bytes);
    answered_locked(op, comes);
    return KV_OK;
}

static kv_status_t take_replies_locked(kv_client_t *client, const gathered_t *gathered)
    KV_REQUIRES(client->lock)
{
    kv_wire_cursor_t cursor;
    KV_TRY(kv_wire_cursor_init(&cursor, gathered->buffer->data, gathered->bytes,
                               gathered->header.count));
    while (cursor.left > 0) {
        kv_wire_record_t record;
        const void *data;
        KV_TRY(kv_wire_next(&cursor, &record, &data));
        KV_TRY(take_reply_locked(client, gathered->peer, &record, data));
    }
    return KV_OK;
}

/* -------------------------------------------------------------------------------------- keys */

static bool is_same_key(const kv_declared_t *declared, const kv_wire_key_t *key)
{
    bool same = kv_name_equal(&declared->name, &key->name) && declared->dtype == key->dtype &&
                declared->sparse == (key->sparse != 0) && declared->ndim == key->ndim;
    for (int i = 0; same && i < declared->ndim; i++)
        same = declared->shape[i] == key->shape[i];
    return same;
}

/* Whether slices and servers are what a value like this one can have. */
static bool is_possible(const kv_client_t *client, const kv_remote_t *remote,
                        const kv_wire_key_t *key)
{
    if (!key->placed || key->slice_bytes == 0)
        return false;
    bool whole = key->num_slices == 1 && key->slice_bytes == remote->bytes &&
                 remote->bytes <= KV_WIRE_ROWS_BYTES;
    if (!remote->sparse && ((key->slice_bytes > KV_WIRE_SLICE_BYTES && !whole) ||
                            key->slice_bytes % kv_dtype_bytes(remote->dtype) != 0))
        return false;
    uint64_t all = remote->sparse ? (uint64_t)remote->num_rows : remote->bytes;
    bool possible = key->num_slices == (all == 0 ? 0 : (all - 1) / key->slice_bytes) + 1;
    for (uint32_t slice = 0; possible && slice < key->num_slices; slice++)
        possible = kv_wire_server_of(key, slice) < client->config.num_servers;
    return possible;
}

static kv_status_t take_key_locked(kv_client_t *client, kv_slice_op_t *op, int64_t i,
                                   const kv_wire_key_t *key) KV_REQUIRES(client->lock)
{
    const kv_client_call_t *call = op->work->call;
    kv_remote_t *remote = op->work->remotes[i];
    if (!kv_name_equal(&call->keys[i].name, &key->name) || key->status == KV_INTERRUPTED ||
        key->status == KV_CALLBACK)
        return kv_fail(KV_INVALID, "it answers the declaration of another key");
    if (key->status != KV_OK) {
        set_error(op, remote, (kv_status_t)key->status, key->sentence, key->sentence_bytes);
        take_loss_locked(client, key->status, key->sentence, key->sentence_bytes);
        return KV_OK;
    }
    if (!is_same_key(&call->keys[i], key) || !is_possible(client, remote, key))
        return kv_fail(KV_INVALID, "it places a key where that cannot be");
    if (op->work->placed)
        return KV_OK;
    remote->servers = kv_calloc(key->num_slices, sizeof *remote->servers);
    if (remote->servers == NULL) {
        static const char words[] = "no memory for the places of its slices, as told by";
        set_error(op, remote, KV_NO_MEMORY, words, sizeof words - 1);
        return KV_OK;
    }
    remote->number = key->number;
    remote->slice_bytes = (size_t)key->slice_bytes;
    if (remote->sparse) {
        remote->slice_rows = key->slice_bytes < INT64_MAX ? (int64_t)key->slice_bytes : INT64_MAX;
        remote->slice_bytes = 0; /* only rank 0 looks at it */
    }
    kv_remote_count_rows(remote);
    remote->num_slices = key->num_slices;
    for (uint32_t slice = 0; slice < key->num_slices; slice++)
        remote->servers[slice] = (uint16_t)kv_wire_server_of(key, slice);
    return KV_OK;
}

static kv_status_t take_declared_locked(kv_client_t *client, const gathered_t *gathered)
    KV_REQUIRES(client->lock)
{
    kv_slice_op_t *op;
    KV_TRY(find_op_locked(client, gathered->peer, &gathered->header.record, &op));
    if (op == NULL)
        return KV_OK;
    if (op->action != 0 || gathered->header.count != op->work->num_remotes)
        return kv_fail(KV_INVALID, "it answers a declaration that was not made");
    size_t at = 0;
    for (int64_t i = 0; i < op->work->num_remotes; i++) {
        kv_wire_key_t key;
        KV_TRY(kv_wire_get_key(gathered->buffer->data, gathered->bytes, &at, &key));
        KV_TRY(take_key_locked(client, op, i, &key));
    }
    answered_locked(op, false);
    return KV_OK;
}

/* ---------------------------------------------------------------------------------- arrivals */

static void gathered_done(void *context, kv_status_t status)
{
    gathered_t *gathered = context;
    kv_client_t *client = gathered->client;
    kv_mutex_lock(&client->lock);
    if (status != KV_OK) {
        kv_client_peer_lost_locked(client, gathered->peer, status);
    } else {
        status = gathered->header.kind == KV_WIRE_REPLIES ? take_replies_locked(client, gathered)
                 : gathered->header.kind == KV_WIRE_DECLARED
                     ? take_declared_locked(client, gathered)
                     : take_rows_locked(client, gathered);
        if (status != KV_OK)
            kv_net_drop(client->net, gathered->peer, kv_status_message(status));
    }
    kv_client_unlock(client);
    kv_buffer_rele(gathered->buffer);
    kv_free(gathered);
}

static kv_status_t take_gathered(kv_client_t *client, kv_net_arrival_t *arrival,
                                 const kv_wire_header_t *header)
{
    if (arrival->payload_bytes == 0)
        return kv_fail(KV_INVALID, "it sends answers without content");
    gathered_t *gathered = kv_alloc(sizeof *gathered);
    KV_TRY_ALLOC(gathered, "a server's answers");
    *gathered = (gathered_t){.client = client,
                             .header = *header,
                             .bytes = arrival->payload_bytes,
                             .peer = arrival->peer};
    kv_status_t status = kv_pool_get(client->pool, gathered->bytes, &gathered->buffer);
    if (status != KV_OK) {
        kv_free(gathered);
        return status;
    }
    arrival->target = gathered->buffer->data;
    arrival->done = gathered_done;
    arrival->context = gathered;
    return KV_OK;
}

kv_status_t kv_client_arrive(void *context, kv_net_arrival_t *arrival)
{
    kv_client_t *client = context;
    kv_wire_header_t header;
    KV_TRY(kv_wire_get_header(arrival->header, arrival->header_bytes, &header));
    arrival->target = NULL;
    arrival->done = NULL;
    bool rows =
        header.kind == KV_WIRE_VALUE && (header.record.flags & (KV_WIRE_ROWS | KV_WIRE_WHOLE));
    if (rows && arrival->payload_bytes > KV_WIRE_ROWS_BYTES)
        return kv_fail(KV_INVALID, "it sends %zu bytes of rows", arrival->payload_bytes);
    if (rows || header.kind == KV_WIRE_REPLIES || header.kind == KV_WIRE_DECLARED)
        return take_gathered(client, arrival, &header);
    if (header.kind != KV_WIRE_VALUE)
        return kv_fail(KV_INVALID, "it sends a message of kind %d, which is not a server's",
                       (int)header.kind);
    kv_mutex_lock(&client->lock);
    kv_status_t status = take_value_locked(client, arrival, &header.record);
    kv_sentence_t sentence;
    kv_sentence_save(&sentence);
    kv_client_unlock(client);
    kv_sentence_restore(&sentence); /* callbacks may have failed in their own ways */
    return status;
}
