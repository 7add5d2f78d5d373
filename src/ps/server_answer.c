/* Requests, and answers on their way out.
 *
 * Answers are gathered per worker while one message is dealt with. A large value goes out on its
 * own, from the version that it is; small ones are copied together. The first request of those that
 * go together carries their message, so that an answer needs no memory but its payload.
 */
#include "ps/server_internal.h"
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* --------------------------------------------------------------------------------- requests */

kv_request_t *kv_request_new_locked(kv_server_t *server)
{
    kv_request_t *request = server->free_requests;
    if (request != NULL)
        server->free_requests = request->next;
    else
        request = kv_alloc(sizeof *request);
    if (request == NULL)
        return NULL;
    *request = (kv_request_t){.server = server, .uses = 1, .deadline_ns = INT64_MAX};
    kv_count(KV_COUNT_REQUESTS, 1);
    return request;
}

void kv_request_use_locked(kv_server_t *server, kv_request_t *request)
{
    (void)server;
    request->uses++;
}

void kv_request_rele_locked(kv_server_t *server, kv_request_t *request)
{
    if (--request->uses > 0)
        return;
    kv_buffer_rele(request->buffer);
    kv_buffer_rele(request->value);
    kv_error_rele(request->failure);
    kv_error_rele(request->error);
    request->next = server->free_requests;
    server->free_requests = request;
    kv_count(KV_COUNT_REQUESTS, -1);
}

void kv_request_wait_locked(kv_server_t *server, kv_request_t *request)
{
    request->waiting = true;
    request->wait_prev = NULL;
    request->wait_next = server->waiting;
    if (server->waiting != NULL)
        server->waiting->wait_prev = request;
    server->waiting = request;
    server->counters.waiting++;
    if (request->deadline_ns < server->next_deadline_ns)
        server->next_deadline_ns = request->deadline_ns;
}

static void end_wait_locked(kv_server_t *server, kv_request_t *request) KV_REQUIRES(server->mutex)
{
    if (!request->waiting)
        return;
    request->waiting = false;
    if (request->wait_prev != NULL)
        request->wait_prev->wait_next = request->wait_next;
    else
        server->waiting = request->wait_next;
    if (request->wait_next != NULL)
        request->wait_next->wait_prev = request->wait_prev;
    server->counters.waiting--;
}

static void post_locked(kv_server_t *server, kv_request_t *request) KV_REQUIRES(server->mutex)
{
    end_wait_locked(server, request);
    kv_outbox_t *out = &server->out[request->worker];
    request->out_next = NULL;
    *(out->last != NULL ? &out->last->out_next : &out->first) = request;
    out->last = request;
}

void kv_answer_locked(kv_server_t *server, kv_request_t *request, kv_buffer_t *value, size_t bytes)
{
    request->value = value != NULL ? kv_buffer_hold(value) : NULL;
    request->value_bytes = bytes;
    post_locked(server, request);
}

void kv_answer_error_locked(kv_server_t *server, kv_request_t *request, kv_error_t *error)
{
    request->error = kv_error_hold(error);
    request->value_bytes = strlen(error->message);
    post_locked(server, request);
}

void kv_answer_status_locked(kv_server_t *server, kv_request_t *request, kv_status_t status)
{
    kv_error_t *error = kv_error_capture(status);
    kv_answer_error_locked(server, request, error);
    kv_error_rele(error);
}

/* ------------------------------------------------------------------------------------ sending */

/* The answer is out, or nobody is there any more. */
static void end_answer_locked(kv_server_t *server, kv_request_t *request) KV_REQUIRES(server->mutex)
{
    kv_buffer_rele(request->value);
    request->value = NULL;
    kv_request_rele_locked(server, request);
}

static void sent(kv_net_message_t *message, kv_status_t status)
{
    (void)status; /* a worker that did not get it is lost, and `lost` says so */
    kv_request_t *request = (kv_request_t *)message;
    kv_server_t *server = request->server;
    kv_mutex_lock(&server->mutex);
    end_answer_locked(server, request);
    kv_mutex_unlock(&server->mutex);
}

/* What goes back to the worker about this request. */
static kv_wire_record_t record_of(const kv_request_t *request)
{
    kv_wire_record_t record = request->header.record;
    record.status = request->error != NULL ? (uint8_t)request->error->status : KV_OK;
    record.codec = 0;
    record.bytes = request->value_bytes;
    return record;
}

/* An answer that cannot be sent would be waited for in vain. */
static void drop_without_memory_locked(kv_server_t *server, int32_t worker)
    KV_REQUIRES(server->mutex)
{
    char why[KV_MESSAGE_BYTES];
    snprintf(why, sizeof why, "server %" PRId32 " has no memory for an answer", server->index);
    kv_net_drop(server->net, worker, why);
}

static void send_locked(kv_server_t *server, kv_request_t *carrier, const kv_wire_header_t *header)
    KV_REQUIRES(server->mutex)
{
    kv_net_message_t *message = &carrier->message;
    size_t bytes = carrier->value_bytes;
    *message = (kv_net_message_t){.peer = carrier->worker,
                                  .priority = (int32_t)header->priority,
                                  .header_bytes = KV_WIRE_HEADER_BYTES,
                                  .payload = bytes > 0 ? carrier->value->data : NULL,
                                  .payload_bytes = bytes,
                                  .done = sent};
    kv_wire_put_header(header, message->header);
    kv_status_t status = server->net != NULL ? kv_net_send(server->net, message) : KV_CLOSED;
    if (status == KV_NO_MEMORY)
        drop_without_memory_locked(server, carrier->worker);
    if (status != KV_OK)
        end_answer_locked(server, carrier);
}

/* The head of a message that answers this request, and others of its priority. */
static kv_wire_header_t header_of(const kv_request_t *request, kv_wire_kind_t kind, uint32_t count)
{
    return (kv_wire_header_t){.version = KV_WIRE_VERSION,
                              .kind = (uint8_t)kind,
                              .priority = request->header.priority,
                              .count = count};
}

static bool goes_alone(const kv_request_t *request)
{
    return request->error == NULL &&
           (request->header.kind == KV_WIRE_DECLARE || request->value_bytes > KV_WIRE_SMALL_BYTES);
}

static void send_alone_locked(kv_server_t *server, kv_request_t *request) KV_REQUIRES(server->mutex)
{
    kv_wire_header_t header;
    if (request->header.kind == KV_WIRE_DECLARE) {
        header = header_of(request, KV_WIRE_DECLARED, request->header.count);
        header.record = request->header.record;
    } else {
        header = header_of(request, KV_WIRE_VALUE, 1);
        header.record = record_of(request);
    }
    send_locked(server, request, &header);
}

static const void *data_of(const kv_request_t *request)
{
    return request->error != NULL   ? request->error->message
           : request->value != NULL ? request->value->data
                                    : NULL;
}

/* Sends as many of the list together as have one priority and fit into a message. Gives the rest;
 * on failure (KV_NO_MEMORY) that is all of them. */
static kv_status_t send_some_locked(kv_server_t *server, kv_request_t **list)
    KV_REQUIRES(server->mutex)
{
    kv_request_t *first = *list, *rest = first;
    uint32_t count = 0;
    size_t bytes = 0;
    for (; rest != NULL && rest->header.priority == first->header.priority; rest = rest->out_next) {
        size_t more = kv_wire_value_bytes(rest->value_bytes);
        if (count > 0 && kv_wire_table_bytes(count + 1) + bytes + more > KV_WIRE_SLICE_BYTES)
            break;
        bytes += more;
        count++;
    }
    kv_buffer_t *payload;
    size_t place = kv_wire_table_bytes(count);
    KV_TRY(kv_pool_get(server->pool, place + bytes, &payload));
    unsigned char *out = payload->data, *record_out = out;
    memset(out, 0, place);
    for (kv_request_t *request = first, *next; request != rest; request = next) {
        next = request->out_next;
        kv_wire_record_t record = record_of(request);
        kv_wire_put_record(&record, record_out);
        record_out += KV_WIRE_RECORD_BYTES;
        size_t length = request->value_bytes, room = kv_wire_value_bytes(length);
        if (length > 0)
            memcpy(out + place, data_of(request), length);
        memset(out + place + length, 0, room - length);
        place += room;
        if (request != first)
            end_answer_locked(server, request);
    }
    kv_buffer_rele(first->value);
    first->value = payload;
    first->value_bytes = place;
    kv_wire_header_t header = header_of(first, KV_WIRE_REPLIES, count);
    send_locked(server, first, &header);
    *list = rest;
    return KV_OK;
}

static void flush_worker_locked(kv_server_t *server, int32_t worker) KV_REQUIRES(server->mutex)
{
    kv_outbox_t *out = &server->out[worker];
    kv_request_t *small = NULL, **end = &small, *next;
    for (kv_request_t *request = out->first; request != NULL; request = next) {
        next = request->out_next;
        if (goes_alone(request)) {
            send_alone_locked(server, request);
        } else {
            *end = request;
            end = &request->out_next;
        }
    }
    *end = NULL;
    *out = (kv_outbox_t){.first = NULL};
    while (small != NULL && send_some_locked(server, &small) == KV_OK)
        ;
    if (small == NULL)
        return;
    if (server->net != NULL)
        drop_without_memory_locked(server, worker);
    for (kv_request_t *request = small; request != NULL; request = next) {
        next = request->out_next;
        end_answer_locked(server, request);
    }
}

void kv_flush_locked(kv_server_t *server)
{
    for (int32_t worker = 0; worker < server->num_workers; worker++) {
        if (server->out[worker].first != NULL)
            flush_worker_locked(server, worker);
    }
}
