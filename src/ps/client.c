/* The client: start and end of calls.
 *
 * A call's messages go to the endpoint at once, or it waits (client_order.c).
 *
 * When the cluster is lost, calls end as soon as no message reads their values and no answer is
 * being written: messages that have not begun are taken back, and sessions that do not let go of
 * memory within LOST_TICKS are dropped.
 */
#include "ps/client_internal.h"
#include <stdio.h>
#include <string.h>

enum {
    LOST_TICKS = 5,                          /* of the endpoint, 0.1 s each */
    CANCEL_NS = 100 * 1000 * 1000,           /* what a transfer under way may still take */
    SENTENCE_BYTES = KV_MESSAGE_BYTES - 128, /* a reason, with room for what is put around it */
};

/* ------------------------------------------------------------------------------ the work's end */

static bool has_ended(const kv_client_work_t *work)
{
    return work->messages_left == 0 && work->receiving == 0 && work->cancelling == 0 &&
           work->come == NULL && (work->failed || work->ops_left == 0);
}

void kv_work_touch_locked(kv_client_work_t *work)
{
    kv_client_t *client = work->client;
    if (work->cancelling > 0)
        kv_cond_broadcast(&client->changed);
    bool sent = !work->told_sent && work->messages_left == 0;
    if (work->due || !(sent || has_ended(work)))
        return;
    work->due = true;
    work->next_due = NULL;
    *client->due_end = work;
    client->due_end = &work->next_due;
}

static void end_message_locked(kv_outgoing_t *message)
{
    message->state = KV_OUT_ENDED;
    message->work->messages_left--;
    kv_buffer_rele(message->buffer);
    message->buffer = NULL;
}

/* Takes a message back that has not begun to go out. */
static void take_back_locked(kv_client_t *client, kv_outgoing_t *message)
{
    if (message->state == KV_OUT_WAITS ||
        (message->state == KV_OUT_QUEUED && kv_net_cancel(client->net, &message->net)))
        end_message_locked(message);
}

void kv_work_fail_locked(kv_client_work_t *work)
{
    work->failed = true;
    kv_work_forget_come_locked(work);
    for (uint32_t i = 0; i < work->num_messages; i++)
        take_back_locked(work->client, &work->messages[i]);
    kv_work_touch_locked(work);
}

static void fail_locked(kv_client_work_t *work)
{
    kv_client_t *client = work->client;
    uint32_t op = 0;
    while (op + 1 < work->num_ops && work->ops[op].state == KV_OP_ANSWERED)
        op++;
    if (work->error.code == KV_OK && work->ops_left > 0) {
        char name[64];
        kv_name_format(&work->remotes[work->ops[op].part]->name, name, sizeof name);
        kv_fail(client->status, "key %s: %s", name, client->why);
        kv_sentence_save(&work->error);
    }
    if (!work->started)
        work->call->unsent = true;
    kv_work_fail_locked(work);
}

static void fail_all_locked(kv_client_t *client, kv_status_t code, const char *why)
    KV_REQUIRES(client->lock)
{
    client->status = code;
    snprintf(client->why, sizeof client->why, "%.*s", (int)SENTENCE_BYTES, why);
    client->held = NULL;
    client->held_end = &client->held;
    for (kv_client_call_t *call = client->calls; call != NULL; call = call->next)
        fail_locked(call->work);
}

void kv_client_lose_locked(kv_client_t *client, kv_status_t code, const char *why)
{
    if (client->status == KV_OK)
        fail_all_locked(client, code, why);
}

void kv_client_peer_lost_locked(kv_client_t *client, int32_t peer, kv_status_t status)
{
    char why[SENTENCE_BYTES];
    char text[KV_MESSAGE_BYTES];
    if (status == KV_CLOSED) {
        kv_client_lose_locked(client, status, kv_status_message(status));
        return;
    }
    /* Does nothing when the endpoint was the first to know. Else the peer is told: it would wait
     * for what could not be sent. */
    kv_net_drop(client->net, peer, kv_status_message(status));
    if (!kv_net_is_lost(client->net, peer, why, sizeof why))
        why[0] = '\0';
    snprintf(text, sizeof text, "server %d is gone: %s", (int)(peer - client->config.num_workers),
             why);
    kv_client_lose_locked(client, KV_PEER_LOST, text);
}

static bool reads_value(const kv_outgoing_t *message)
{
    return message->state != KV_OUT_ENDED && message->buffer == NULL &&
           message->net.payload != NULL;
}

/* Ends the sessions that hold memory of a call. */
static void drop_holders_locked(const kv_client_work_t *work, bool of_caller, const char *why)
{
    kv_net_t *net = work->client->net;
    for (uint32_t i = 0; i < work->num_messages; i++) {
        const kv_outgoing_t *message = &work->messages[i];
        if (message->state == KV_OUT_QUEUED && (!of_caller || reads_value(message)))
            kv_net_drop(net, message->net.peer, why);
    }
    for (uint32_t i = 0; i < work->num_ops; i++)
        if (work->ops[i].state == KV_OP_RECEIVING)
            kv_net_drop(
                net, kv_node_of_server(work->client->config.num_workers, work->ops[i].server), why);
}

void kv_client_message_done(kv_net_message_t *net_message, kv_status_t status)
{
    kv_outgoing_t *message = (kv_outgoing_t *)net_message;
    kv_client_work_t *work = message->work;
    kv_client_t *client = work->client;
    kv_mutex_lock(&client->lock);
    int32_t peer = message->net.peer;
    end_message_locked(message);
    if (status != KV_OK)
        kv_client_peer_lost_locked(client, peer, status);
    kv_work_touch_locked(work);
    kv_client_unlock(client);
}

/* -------------------------------------------------------------------------------- start and end */

kv_client_work_t *kv_client_find_locked(kv_client_t *client, uint64_t id)
{
    kv_client_work_t *work = client->buckets[id % KV_CLIENT_BUCKETS];
    while (work != NULL && work->id != id)
        work = work->next_in_bucket;
    return work;
}

static void enter_locked(kv_client_t *client, kv_client_work_t *work) KV_REQUIRES(client->lock)
{
    kv_client_call_t *call = work->call;
    work->id = client->next_id++;
    kv_client_work_t **bucket = &client->buckets[work->id % KV_CLIENT_BUCKETS];
    work->next_in_bucket = *bucket;
    *bucket = work;
    call->work = work;
    call->unsent = false;
    call->prev = NULL;
    call->next = client->calls;
    if (call->next != NULL)
        call->next->prev = call;
    client->calls = call;
    kv_client_queue_locked(client, work);
    kv_work_touch_locked(work);
}

static kv_status_t check_locked(const kv_client_t *client)
{
    if (client->status != KV_OK)
        return kv_fail(client->status, "%s", client->why);
    if (client->net == NULL)
        return kv_fail(KV_CLOSED, "the store is not connected");
    return KV_OK;
}

kv_status_t kv_client_start(kv_client_t *client, kv_client_call_t *call)
{
    KV_TRY(kv_client_check(client));
    kv_client_work_t *work;
    KV_TRY(kv_work_new(client, call, &work));
    kv_mutex_lock(&client->lock);
    kv_status_t status = check_locked(client);
    if (status == KV_OK)
        enter_locked(client, work);
    kv_mutex_unlock(&client->lock);
    if (status != KV_OK)
        kv_work_free(work);
    return status;
}

/* Takes the call out of all lists. */
static void leave_locked(kv_client_t *client, kv_client_work_t *work) KV_REQUIRES(client->lock)
{
    kv_client_call_t *call = work->call;
    kv_client_work_t **link = &client->buckets[work->id % KV_CLIENT_BUCKETS];
    while (*link != work)
        link = &(*link)->next_in_bucket;
    *link = work->next_in_bucket;
    if (call->prev != NULL)
        call->prev->next = call->next;
    else
        client->calls = call->next;
    if (call->next != NULL)
        call->next->prev = call->prev;
    call->work = NULL;
    bool good = work->error.code == KV_OK;
    if (call->verb == KV_CLIENT_DECLARE && good) {
        for (int64_t i = 0; i < work->num_remotes; i++)
            call->keys[i].remote = work->remotes[i];
        work->num_remotes = 0;
    } else if (call->verb == KV_CLIENT_DELETE && good && client->config.rank == 0) {
        for (int64_t i = 0; i < work->num_remotes; i++)
            kv_client_unload_locked(client, work->remotes[i]);
    }
    kv_client_unqueue_locked(client, work);
}

static void finish(kv_client_work_t *work)
{
    kv_client_call_t *call = work->call;
    kv_sentence_t error = {.code = work->error.code};
    if (error.code != KV_OK)
        error = work->error;
    kv_work_free(work);
    if (error.code != KV_OK)
        kv_sentence_restore(&error);
    call->done(call, error.code);
}

void kv_client_unlock(kv_client_t *client)
{
    kv_client_work_t *work;
    client->running++;
    bool ran = client->due != NULL;
    while ((work = client->due) != NULL) {
        client->due = work->next_due;
        if (client->due == NULL)
            client->due_end = &client->due;
        /* `due` stays set, so that nobody else takes the work meanwhile. */
        if (!work->told_sent && work->messages_left == 0) {
            work->told_sent = true;
            if (work->call->sent != NULL) {
                kv_mutex_unlock(&client->lock);
                work->call->sent(work->call);
                kv_mutex_lock(&client->lock);
            }
        }
        work->due = false;
        if (!has_ended(work))
            continue;
        leave_locked(client, work);
        kv_mutex_unlock(&client->lock);
        finish(work);
        kv_mutex_lock(&client->lock);
    }
    client->running--;
    if (ran)
        kv_cond_broadcast(&client->changed);
    kv_mutex_unlock(&client->lock);
}

/* --------------------------------------------------------------------------------------- cancel */

/* Lets a message that has not gone out live on without the caller's memory. It goes behind younger
 * ones; servers tell rounds by their numbers. Where there is no memory for it its round would never
 * be complete. */
static void detach_value_locked(kv_client_t *client, kv_outgoing_t *message)
    KV_REQUIRES(client->lock)
{
    bool queued = message->state == KV_OUT_QUEUED;
    if (!reads_value(message) || (queued && !kv_net_cancel(client->net, &message->net)))
        return;
    kv_buffer_t *buffer;
    kv_status_t status = kv_pool_get(client->pool, message->net.payload_bytes, &buffer);
    if (status != KV_OK) {
        end_message_locked(message);
        kv_client_peer_lost_locked(client, message->net.peer, status);
        return;
    }
    memcpy(buffer->data, message->net.payload, message->net.payload_bytes);
    message->net.payload = buffer->data;
    message->buffer = buffer;
    if (queued)
        kv_client_send_locked(client, message);
}

static bool uses_caller(const kv_client_work_t *work)
{
    bool uses = work->receiving > 0;
    for (uint32_t i = 0; i < work->num_messages; i++)
        uses = uses || reads_value(&work->messages[i]);
    return uses;
}

static void list_missing(const kv_client_work_t *work, char *text, size_t bytes)
{
    size_t used = 0;
    int32_t before = -1;
    for (int32_t server = 0; server < work->client->config.num_servers; server++) {
        bool missing = false;
        for (uint32_t i = 0; i < work->num_ops; i++)
            missing =
                missing || (work->ops[i].server == server && work->ops[i].state != KV_OP_ANSWERED);
        if (!missing || used >= bytes)
            continue;
        int length =
            snprintf(text + used, bytes - used, "%sserver %d", before < 0 ? "" : ", ", (int)server);
        used += length > 0 ? (size_t)length : 0;
        before = server;
    }
}

void kv_client_cancel(kv_client_t *client, kv_client_call_t *call, char *missing,
                      size_t missing_bytes)
{
    if (missing_bytes > 0)
        missing[0] = '\0';
    kv_mutex_lock(&client->lock);
    kv_client_work_t *work = call->work;
    if (work != NULL) {
        list_missing(work, missing, missing_bytes);
        work->given_up = true;
        kv_work_forget_come_locked(work);
        work->cancelling++;
        for (uint32_t i = 0; i < work->num_messages; i++)
            detach_value_locked(client, &work->messages[i]);
        int64_t until = kv_clock_ns() + CANCEL_NS;
        bool dropped = false;
        while (uses_caller(work)) {
            if (!dropped && kv_clock_ns() >= until) {
                dropped = true;
                drop_holders_locked(work, true, "a call was given up in the middle of a transfer");
            }
            if (dropped)
                kv_cond_wait(&client->changed, &client->lock);
            else
                kv_cond_wait_until(&client->changed, &client->lock, until);
        }
        work->cancelling--;
        kv_work_touch_locked(work);
    }
    kv_client_unlock(client);
}

/* ------------------------------------------------------------------------------------ the client
 */

kv_status_t kv_client_new(const kv_client_config_t *config, kv_client_t **out)
{
    size_t loads = (size_t)config->num_servers * sizeof(uint64_t);
    kv_client_t *client = kv_calloc(1, sizeof *client + loads);
    KV_TRY_ALLOC(client, "a client");
    client->config = *config;
    client->held_end = &client->held;
    client->due_end = &client->due;
    kv_status_t status = kv_pool_new(&client->pool);
    if (status != KV_OK) {
        kv_free(client);
        return status;
    }
    kv_mutex_init(&client->lock, KV_RANK_PS);
    kv_cond_init(&client->changed);
    *out = client;
    return KV_OK;
}

static void lost(void *context, int32_t peer, const char *why)
{
    (void)why;
    kv_client_t *client = context;
    kv_mutex_lock(&client->lock);
    kv_client_peer_lost_locked(client, peer, KV_PEER_LOST);
    kv_client_unlock(client);
}

static void tick(void *context)
{
    kv_client_t *client = context;
    kv_mutex_lock(&client->lock);
    if (client->status != KV_OK && client->lost_ticks++ >= LOST_TICKS)
        for (kv_client_call_t *call = client->calls; call != NULL; call = call->next)
            drop_holders_locked(call->work, false, client->why);
    kv_client_unlock(client);
}

kv_net_handlers_t kv_client_handlers(kv_client_t *client)
{
    return (kv_net_handlers_t){
        .context = client, .arrive = kv_client_arrive, .lost = lost, .tick = tick};
}

void kv_client_attach(kv_client_t *client, kv_net_t *net)
{
    kv_mutex_lock(&client->lock);
    client->net = net;
    kv_mutex_unlock(&client->lock);
}

void kv_client_lose(kv_client_t *client, const char *why)
{
    kv_mutex_lock(&client->lock);
    kv_client_lose_locked(client, KV_PEER_LOST, why);
    kv_client_unlock(client);
}

void kv_client_abandon(kv_client_t *client, const char *why)
{
    kv_mutex_lock(&client->lock);
    kv_client_lose_locked(client, KV_PEER_LOST, why);
    for (int32_t server = 0; server < client->config.num_servers && client->net != NULL; server++)
        kv_net_drop(client->net, kv_node_of_server(client->config.num_workers, server), why);
    kv_client_unlock(client);
}

void kv_client_close(kv_client_t *client)
{
    kv_mutex_lock(&client->lock);
    if (client->status != KV_CLOSED)
        fail_all_locked(client, KV_CLOSED, "the store was closed");
    kv_client_unlock(client);
    kv_mutex_lock(&client->lock);
    while (client->calls != NULL || client->running > 0)
        kv_cond_wait(&client->changed, &client->lock);
    kv_mutex_unlock(&client->lock);
}

void kv_client_expect(kv_client_t *client, int32_t sign)
{
    kv_mutex_lock(&client->lock);
    client->expected += sign;
    if (client->expected == 0)
        kv_cond_broadcast(&client->changed);
    kv_mutex_unlock(&client->lock);
}

kv_status_t kv_client_wait_locked(kv_client_t *client, bool (*over_locked)(const void *context),
                                  const void *context, kv_caller_t *caller)
{
    int64_t deadline = kv_caller_deadline(caller), poll_at = kv_clock_ns() + KV_POLL_NS;
    if (over_locked(context))
        return KV_OK;
    kv_mutex_unlock(&client->lock);
    kv_caller_detach(caller);
    kv_mutex_lock(&client->lock);
    while (!over_locked(context)) {
        kv_cond_wait_until(&client->changed, &client->lock,
                           poll_at < deadline ? poll_at : deadline);
        int64_t now = kv_clock_ns();
        if (over_locked(context))
            break;
        if (now >= deadline)
            return KV_TIMEOUT;
        if (now < poll_at)
            continue;
        kv_mutex_unlock(&client->lock);
        kv_status_t status = caller->poll(caller);
        kv_mutex_lock(&client->lock);
        KV_TRY(status);
        poll_at = kv_clock_ns() + KV_POLL_NS;
    }
    return KV_OK;
}

static bool is_drained_locked(const void *context)
{
    const kv_client_t *client = context;
    return client->calls == NULL && client->expected == 0;
}

kv_status_t kv_client_drain(kv_client_t *client, kv_caller_t *caller)
{
    kv_caller_detach(caller);
    kv_mutex_lock(&client->lock);
    kv_status_t status = kv_client_wait_locked(client, is_drained_locked, client, caller);
    if (status == KV_TIMEOUT) {
        char missing[128] = "this worker has not begun";
        if (client->calls != NULL) {
            list_missing(client->calls->work, missing, sizeof missing - 32);
            strcat(missing, " has not answered");
        }
        kv_fail(KV_TIMEOUT, "%s all calls within %.3g s", missing,
                (double)caller->timeout_ns * 1e-9);
    }
    if (status == KV_OK && client->net != NULL)
        status = check_locked(client);
    kv_mutex_unlock(&client->lock);
    return status;
}

void kv_client_free(kv_client_t *client)
{
    kv_pool_free(client->pool);
    kv_cond_fini(&client->changed);
    kv_mutex_fini(&client->lock);
    kv_free(client);
}

kv_status_t kv_client_check(kv_client_t *client)
{
    kv_mutex_lock(&client->lock);
    kv_status_t status = check_locked(client);
    kv_mutex_unlock(&client->lock);
    return status;
}

kv_pool_t *kv_client_pool(kv_client_t *client)
{
    return client->pool;
}

int32_t kv_client_rank(const kv_client_t *client)
{
    return client->config.rank;
}

int32_t kv_client_num_workers(const kv_client_t *client)
{
    return client->config.num_workers;
}
