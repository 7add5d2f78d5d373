/* A call's values that come later than it, and its answers that are taken one by one.
 *
 * A late call is built, ordered and launched as any other; only its messages stay here, each until
 * the last of its operations has its bytes. Small values are copied into their message then.
 */
#include "ps/client_internal.h"

/* ---------------------------------------------------------------------------------- going out */

/* Whether the values of all parts before `part`, and `bytes` of its own, are enough. */
static bool is_there(const kv_slice_op_t *op, int64_t part, size_t bytes)
{
    return op->part < part || (op->part == part && op->sent_offset + op->sent_bytes <= bytes);
}

void kv_message_supply(kv_outgoing_t *message, int64_t part, size_t bytes)
{
    unsigned char *values = message->buffer != NULL ? message->buffer->data : NULL;
    for (; message->there < message->count; message->there++) {
        const kv_slice_op_t *op = &message->work->ops[message->first + message->there];
        if (op->late && !is_there(op, part, bytes))
            return;
        if (op->late && values != NULL)
            kv_op_put_data(op, values + kv_wire_table_bytes(message->count) + message->filled);
        message->filled += kv_wire_value_bytes(op->sent_bytes);
    }
}

void kv_client_supply(kv_client_t *client, kv_client_call_t *call, int64_t part, size_t bytes)
{
    kv_mutex_lock(&client->lock);
    kv_client_work_t *work = call->work;
    for (uint32_t m = 0; work != NULL && m < work->num_messages; m++) {
        kv_outgoing_t *message = &work->messages[m];
        if (message->there == message->count || message->state != KV_OUT_WAITS)
            continue;
        kv_message_supply(message, part, bytes);
        if (message->there == message->count && work->started)
            kv_client_send_locked(client, message);
    }
    kv_client_unlock(client);
}

/* ----------------------------------------------------------------------------------- coming in */

void kv_work_note_come_locked(kv_slice_op_t *op)
{
    kv_client_work_t *work = op->work;
    if (!work->call->watched || work->failed || work->given_up)
        return;
    op->next_come = NULL;
    *work->come_end = op;
    work->come_end = &op->next_come;
    kv_cond_broadcast(&work->client->changed);
}

void kv_work_forget_come_locked(kv_client_work_t *work)
{
    work->come = NULL;
    work->come_end = &work->come;
    if (work->call->watched)
        kv_cond_broadcast(&work->client->changed);
}

/* Whether there is something to give, or will never be. */
static bool has_news_locked(const void *context)
{
    const kv_client_call_t *call = context;
    const kv_client_work_t *work = call->work;
    return work == NULL || work->come != NULL || work->failed || work->ops_left == 0;
}

kv_status_t kv_client_next(kv_client_t *client, kv_client_call_t *call, kv_caller_t *caller,
                           kv_client_range_t *out)
{
    *out = (kv_client_range_t){0};
    kv_mutex_lock(&client->lock);
    kv_status_t status = kv_client_wait_locked(client, has_news_locked, call, caller);
    if (status != KV_OK) {
        kv_mutex_unlock(&client->lock);
        return status == KV_TIMEOUT ? kv_fail(status, "the servers have not answered in time")
                                    : status;
    }
    kv_client_work_t *work = call->work;
    if (work != NULL && work->come != NULL) {
        const kv_slice_op_t *op = work->come;
        *out = (kv_client_range_t){.part = op->part, .offset = op->offset, .bytes = op->bytes};
        work->come = op->next_come;
        if (work->come == NULL)
            work->come_end = &work->come;
        kv_work_touch_locked(work);
    }
    kv_client_unlock(client);
    return KV_OK;
}
