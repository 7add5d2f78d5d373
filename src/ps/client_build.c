/* A call taken apart into operations on slices, and these put into messages.
 *
 * The operations of a call are sorted by server and then by how they travel: records alone (pulls,
 * deletes), small values in one message, large ones each in its own. So each message carries a run
 * of operations. Nothing here is sent; when there is no memory the call has not begun.
 */
#include "ps/client_internal.h"
#include "ps/placement.h"
#include <string.h>

enum { TRAVELS_BARE, TRAVELS_TOGETHER, TRAVELS_ALONE, WAYS };

typedef struct builder {
    kv_client_t *client;
    kv_client_work_t *work;
    uint32_t *at;    /* [servers * WAYS]: first how many operations, then where the next one goes */
    uint32_t *stamp; /* [servers]: the last part, plus one, of which a server was seen */
    kv_status_t status;
} builder_t;

static const void *value_of(const kv_client_work_t *work, uint32_t part)
{
    const kv_client_call_t *call = work->call;
    return call->verb == KV_CLIENT_DECLARE ? call->keys[part].value : call->parts[part].value;
}

static kv_codec_type_t codec_of(const kv_client_work_t *work, int64_t part)
{
    const kv_client_call_t *call = work->call;
    return call->verb == KV_CLIENT_MOVE && call->parts[part].value != NULL ? call->parts[part].codec
                                                                           : KV_CODEC_NONE;
}

/* ------------------------------------------------------------------------------- operations */

static int way_of(const kv_slice_op_t *op)
{
    if (op->action == KV_WIRE_GET || op->action == KV_WIRE_DROP || op->action == KV_WIRE_GET_STATE)
        return TRAVELS_BARE;
    return op->sent_bytes <= KV_WIRE_SMALL_BYTES ? TRAVELS_TOGETHER : TRAVELS_ALONE;
}

/* A slice of a state: in the wide type, of each element or of each row, also of those that a
 * row-sparse key has not stored. */
static kv_status_t lay_out_state(const kv_client_work_t *work, kv_slice_op_t *op)
{
    const kv_client_call_t *call = work->call;
    const kv_remote_t *remote = work->remotes[op->part];
    const kv_client_state_t *state = &call->states[op->part];
    size_t wide = kv_dtype_bytes(kv_dtype_wide(remote->dtype));
    size_t unit =
        state->per_row && remote->row_bytes > 0 ? remote->row_bytes : kv_dtype_bytes(remote->dtype);
    size_t bytes = op->bytes;
    if (remote->sparse) {
        int64_t before, rows = kv_remote_slice_rows(remote, op->slice, &before);
        op->offset = (size_t)before * remote->row_bytes;
        bytes = (size_t)rows * remote->row_bytes;
    }
    op->offset = op->sent_offset = op->offset / unit * wide;
    bytes = state->slot == KV_SLOT_NONE     ? 0
            : state->slot == KV_SLOT_OBJECT ? state->bytes
                                            : bytes / unit * wide;
    if (bytes > KV_WIRE_ROWS_BYTES)
        return kv_fail(KV_INVALID, "a state of %zu bytes does not fit into a message of %d", bytes,
                       (int)KV_WIRE_ROWS_BYTES);
    op->bytes = (uint32_t)bytes;
    op->sent_bytes = call->parts[op->part].value != NULL ? op->bytes : 0;
    return KV_OK;
}

static kv_wire_key_t key_of(const kv_declared_t *declared)
{
    kv_wire_key_t key = {.name = declared->name,
                         .dtype = (uint8_t)declared->dtype,
                         .sparse = declared->sparse,
                         .ndim = declared->ndim};
    for (int d = 0; d < declared->ndim; d++)
        key.shape[d] = declared->shape[d];
    return key;
}

/* The first value of a key that lies whole on its server brings the key along. */
static void add_key(kv_slice_op_t *op)
{
    const kv_client_work_t *work = op->work;
    if (op->action != KV_WIRE_INIT || work->remotes[op->part]->num_slices > 1)
        return;
    kv_wire_key_t key = key_of(&work->call->keys[op->part]);
    size_t bytes = kv_wire_key_bytes(&key);
    op->key_bytes = bytes <= KV_WIRE_KEY_BYTES ? (uint32_t)bytes : 0;
    op->sent_bytes += op->key_bytes;
}

static void add_op(builder_t *builder, int64_t part, uint32_t slice, uint16_t server,
                   kv_wire_action_t action)
{
    kv_client_work_t *work = builder->work;
    const kv_remote_t *remote = work->remotes[part];
    size_t offset = slice * remote->slice_bytes;
    size_t bytes = remote->bytes - offset;
    if (action == KV_WIRE_DROP || remote->sparse)
        bytes = 0;
    else if (bytes > remote->slice_bytes)
        bytes = remote->slice_bytes;
    kv_codec_type_t codec = codec_of(work, part);
    bool coded = codec != KV_CODEC_NONE;
    kv_slice_op_t op = {
        .work = work,
        .offset = offset,
        .bytes = (uint32_t)bytes,
        .sent_bytes = (uint32_t)(coded ? kv_wire_coded_bytes(codec, remote->dtype, bytes)
                                 : action != KV_WIRE_GET ? bytes
                                                         : 0),
        .sent_offset = coded ? slice * kv_remote_coded_stride(remote, codec) : offset,
        .part = (uint32_t)part,
        .slice = slice,
        .server = server,
        .action = (uint8_t)action,
    };
    if (kv_call_on_state(work->call) && builder->status == KV_OK)
        builder->status = lay_out_state(work, &op);
    bool needed = true;
    if (builder->status == KV_OK)
        builder->status = kv_op_add_rows(&op, &needed);
    op.late = work->call->late && op.sent_bytes > 0 && !op.has_rows;
    add_key(&op);
    if (!needed)
        return;
    uint32_t *at = &builder->at[(size_t)server * WAYS + (size_t)way_of(&op)];
    if (work->ops != NULL)
        work->ops[*at] = op;
    ++*at;
}

/* Server 0 knows the names, the others their slices. */
static void add_drops(builder_t *builder, int64_t part)
{
    const kv_remote_t *remote = builder->work->remotes[part];
    uint32_t stamp = (uint32_t)part + 1;
    builder->stamp[0] = stamp;
    add_op(builder, part, 0, 0, KV_WIRE_DROP);
    for (uint32_t slice = 0; slice < remote->num_slices; slice++) {
        uint16_t server = remote->servers[slice];
        if (builder->stamp[server] != stamp)
            add_op(builder, part, 0, server, KV_WIRE_DROP);
        builder->stamp[server] = stamp;
    }
}

static void add_part(builder_t *builder, int64_t part)
{
    const kv_client_call_t *call = builder->work->call;
    const kv_remote_t *remote = builder->work->remotes[part];
    kv_wire_action_t action = KV_WIRE_INIT;
    if (call->verb == KV_CLIENT_DELETE) {
        add_drops(builder, part);
        return;
    }
    if (call->verb == KV_CLIENT_MOVE) {
        const kv_client_part_t *given = &call->parts[part];
        bool pushes = kv_part_pushes(call, part),
             pulls = given->out != NULL || given->found != NULL;
        if (!pushes && !pulls)
            return;
        action = !pushes ? KV_WIRE_GET : pulls ? KV_WIRE_PUSHPULL : KV_WIRE_PUSH;
    }
    if (kv_call_on_state(call))
        action = call->verb == KV_CLIENT_GET_STATE ? KV_WIRE_GET_STATE : KV_WIRE_SET_STATE;
    for (uint32_t slice = 0; slice < remote->num_slices; slice++)
        add_op(builder, part, slice, remote->servers[slice], action);
}

/* The declaration itself is operation 0. */
static kv_status_t add_ops(builder_t *builder)
{
    kv_client_work_t *work = builder->work;
    const kv_client_config_t *config = &builder->client->config;
    size_t groups = (size_t)config->num_servers * WAYS;
    bool declares = work->call->verb == KV_CLIENT_DECLARE && work->num_remotes > 0;
    int64_t num_parts = declares && config->rank != 0 ? 0 : work->num_remotes;
    for (int64_t part = 0; part < num_parts; part++)
        add_part(builder, part);
    KV_TRY(builder->status);
    uint32_t count = declares;
    for (size_t i = 0; i < groups; i++) {
        uint32_t here = builder->at[i];
        builder->at[i] = count;
        count += here;
    }
    work->ops = kv_calloc(count, sizeof *work->ops);
    KV_TRY_ALLOC(work->ops, "the slices of a call");
    work->num_ops = work->ops_left = count;
    if (declares)
        work->ops[0].work = work;
    for (int32_t server = 0; server < config->num_servers; server++)
        builder->stamp[server] = 0;
    for (int64_t part = 0; part < num_parts; part++)
        add_part(builder, part);
    return KV_OK;
}

/* --------------------------------------------------------------------------------- messages */

/* How many operations from `first` on go in one message. */
static uint32_t count_run(const kv_client_work_t *work, uint32_t first)
{
    const kv_slice_op_t *ops = work->ops;
    int way = way_of(&ops[first]);
    if (ops[first].action == 0 || way == TRAVELS_ALONE)
        return 1;
    uint32_t count = 0;
    size_t values = 0;
    for (uint32_t i = first; i < work->num_ops; i++) {
        if (ops[i].server != ops[first].server || way_of(&ops[i]) != way)
            break;
        values += kv_wire_value_bytes(ops[i].sent_bytes);
        if (count > 0 && kv_wire_table_bytes(count + 1) + values > KV_WIRE_SLICE_BYTES)
            break;
        count++;
    }
    return count;
}

static kv_status_t write_keys(kv_client_work_t *work, kv_outgoing_t *message)
{
    const kv_client_call_t *call = work->call;
    size_t bytes = 0;
    uint32_t most = 0;
    for (int64_t i = 0; i < work->num_remotes; i++)
        if (work->remotes[i]->num_slices > most)
            most = work->remotes[i]->num_slices;
    unsigned char *servers = kv_alloc(2 * (size_t)most);
    KV_TRY_ALLOC(servers, "the declaration of keys");
    unsigned char *end = NULL;
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t i = 0; i < work->num_remotes; i++) {
            const kv_declared_t *declared = &call->keys[i];
            const kv_remote_t *remote = work->remotes[i];
            kv_wire_key_t key = key_of(declared);
            key.placed = work->placed;
            key.number = remote->number;
            key.slice_bytes = declared->sparse ? (uint64_t)remote->slice_rows : remote->slice_bytes;
            key.num_slices = remote->num_slices;
            key.servers = servers;
            for (uint32_t slice = 0; end != NULL && slice < remote->num_slices; slice++)
                kv_wire_put_server(servers, slice, remote->servers[slice]);
            bytes += kv_wire_key_bytes(&key);
            if (end != NULL)
                end = kv_wire_put_key(&key, end);
        }
        if (pass > 0)
            break;
        kv_status_t status = kv_pool_get(work->client->pool, bytes, &message->buffer);
        if (status != KV_OK) {
            kv_free(servers);
            return status;
        }
        end = message->buffer->data;
        message->net.payload_bytes = bytes;
    }
    kv_free(servers);
    message->kind = KV_WIRE_DECLARE;
    return KV_OK;
}

void kv_op_put_data(const kv_slice_op_t *op, unsigned char *out)
{
    const kv_client_work_t *work = op->work;
    size_t bytes = op->sent_bytes - op->key_bytes;
    if (op->has_rows)
        kv_op_put_rows(op, out);
    else if (bytes > 0)
        memcpy(out, (const char *)value_of(work, op->part) + op->sent_offset, bytes);
    if (op->key_bytes == 0)
        return;
    kv_wire_key_t key = key_of(&work->call->keys[op->part]);
    kv_wire_put_key(&key, out + bytes);
}

/* Records are written when the call is entered, values now if they are there. */
static kv_status_t gather(kv_client_work_t *work, kv_outgoing_t *message)
{
    const kv_slice_op_t *op = &work->ops[message->first];
    message->kind = op->action == KV_WIRE_DROP   ? KV_WIRE_DELETE
                    : way_of(op) == TRAVELS_BARE ? KV_WIRE_PULL
                                                 : KV_WIRE_BATCH;
    size_t at = kv_wire_table_bytes(message->count);
    size_t bytes = at;
    for (uint32_t i = 0; i < message->count; i++)
        bytes += kv_wire_value_bytes(op[i].sent_bytes);
    KV_TRY(kv_pool_get(work->client->pool, bytes, &message->buffer));
    unsigned char *payload = message->buffer->data;
    message->net.payload_bytes = bytes;
    size_t table = (size_t)message->count * KV_WIRE_RECORD_BYTES;
    memset(payload + table, 0, at - table);
    for (uint32_t i = 0; i < message->count; i++) {
        size_t bytes_here = op[i].sent_bytes, room = kv_wire_value_bytes(bytes_here);
        if (!op[i].late)
            kv_op_put_data(&op[i], payload + at);
        memset(payload + at + bytes_here, 0, room - bytes_here);
        at += room;
    }
    return KV_OK;
}

static kv_status_t gather_one(kv_client_work_t *work, kv_outgoing_t *message)
{
    const kv_slice_op_t *op = &work->ops[message->first];
    message->kind = KV_WIRE_PUSH_ONE;
    KV_TRY(kv_pool_get(work->client->pool, op->sent_bytes, &message->buffer));
    message->net.payload_bytes = op->sent_bytes;
    kv_op_put_data(op, message->buffer->data);
    return KV_OK;
}

static kv_status_t make_message(kv_client_work_t *work, kv_outgoing_t *message)
{
    const kv_slice_op_t *op = &work->ops[message->first];
    message->work = work;
    message->net.peer = kv_node_of_server(work->client->config.num_workers, op->server);
    message->net.header_bytes = KV_WIRE_HEADER_BYTES;
    message->net.done = kv_client_message_done;
    kv_message_supply(message, 0, 0);
    if (op->action == 0)
        KV_TRY(write_keys(work, message));
    else if (message->count > 1 || way_of(op) == TRAVELS_BARE)
        KV_TRY(gather(work, message));
    else if (op->has_rows || op->key_bytes > 0)
        KV_TRY(gather_one(work, message));
    else
        message->kind = KV_WIRE_PUSH_ONE;
    if (message->buffer != NULL) {
        message->net.payload = message->buffer->data;
    } else if (op->sent_bytes > 0) {
        message->net.payload = (const char *)value_of(work, op->part) + op->sent_offset;
        message->net.payload_bytes = op->sent_bytes;
    }
    return KV_OK;
}

static kv_status_t add_messages(kv_client_work_t *work)
{
    uint32_t count = 0;
    for (uint32_t first = 0; first < work->num_ops; first += count_run(work, first))
        count++;
    work->messages = kv_calloc(count, sizeof *work->messages);
    KV_TRY_ALLOC(work->messages, "the messages of a call");
    work->num_messages = work->messages_left = count;
    uint32_t first = 0;
    for (uint32_t i = 0; i < count; i++) {
        kv_outgoing_t *message = &work->messages[i];
        message->first = first;
        message->count = count_run(work, first);
        first += message->count;
        KV_TRY(make_message(work, message));
    }
    return KV_OK;
}

static void describe(const kv_client_work_t *work, const kv_slice_op_t *op,
                     kv_wire_record_t *record)
{
    const kv_remote_t *remote = work->remotes[op->part];
    bool inits = op->action == KV_WIRE_INIT;
    record->key = remote->number;
    record->round = inits ? remote->row_bytes / kv_dtype_bytes(remote->dtype) : remote->pushes;
    record->bytes = op->sent_bytes;
    record->slice = op->slice;
    record->action = op->action;
    record->dtype = (uint8_t)remote->dtype;
    record->flags = op->has_rows ? KV_WIRE_ROWS : 0;
    record->t = inits ? remote->num_slices : 0;
    record->own = op->key_bytes;
    if (op->sent_bytes > KV_WIRE_SLICE_BYTES && remote->num_slices == 1)
        record->flags |= KV_WIRE_WHOLE;
    bool pushes = op->action == KV_WIRE_PUSH || op->action == KV_WIRE_PUSHPULL;
    bool on_state = kv_call_on_state(work->call);
    if (!pushes && !on_state)
        return;
    const kv_client_part_t *part = &work->call->parts[op->part];
    if (on_state)
        record->slot = (uint16_t)work->call->states[op->part].slot;
    if (op->action == KV_WIRE_SET_STATE && remote->sparse)
        record->flags |= KV_WIRE_ROWS;
    if (op->action == KV_WIRE_GET_STATE) {
        record->optimizer = part->step->optimizer;
        return;
    }
    record->codec = (uint8_t)part->codec;
    if (part->step == NULL)
        return;
    kv_wire_put_step(record, part->step->optimizer, &part->step->step);
    if (remote->num_slices > 1 && kv_step_needs_norms(&part->step->step))
        record->flags |= KV_WIRE_SHARES_NORMS;
}

void kv_work_write_locked(kv_client_work_t *work)
{
    const kv_client_call_t *call = work->call;
    int64_t timeout = call->timeout_ms < UINT32_MAX ? call->timeout_ms : UINT32_MAX;
    for (uint32_t m = 0; m < work->num_messages; m++) {
        kv_outgoing_t *message = &work->messages[m];
        bool declares = message->kind == KV_WIRE_DECLARE;
        bool alone = declares || message->kind == KV_WIRE_PUSH_ONE;
        kv_wire_header_t header = {
            .version = KV_WIRE_VERSION,
            .kind = message->kind,
            .priority = (uint32_t)call->priority,
            .timeout_ms = timeout > 0 ? (uint32_t)timeout : 0,
            .count = declares ? (uint32_t)work->num_remotes : message->count,
        };
        for (uint32_t i = 0; i < message->count; i++) {
            const kv_slice_op_t *op = &work->ops[message->first + i];
            kv_wire_record_t record = {.request = work->id, .tag = message->first + i};
            if (!declares)
                describe(work, op, &record);
            if (alone)
                header.record = record;
            else
                kv_wire_put_record(&record, (unsigned char *)message->buffer->data +
                                                (size_t)i * KV_WIRE_RECORD_BYTES);
        }
        message->net.priority = call->priority;
        kv_wire_put_header(&header, message->net.header);
    }
}

/* ----------------------------------------------------------------------------------- remotes */

static kv_status_t remote_new(kv_client_t *client, const kv_declared_t *key, kv_remote_t **out)
{
    size_t text = key->name.text != NULL ? key->name.bytes : 0;
    kv_remote_t *remote = kv_alloc(sizeof *remote + text);
    KV_TRY_ALLOC(remote, "a key");
    *remote = (kv_remote_t){.client = client,
                            .dtype = key->dtype,
                            .bytes = key->bytes,
                            .row_bytes = key->row_bytes,
                            .sparse = key->sparse,
                            .num_rows = key->ndim > 0 ? key->shape[0] : 1,
                            .name = key->name};
    if (text > 0)
        memcpy(remote->text, key->name.text, text);
    if (key->name.text != NULL)
        remote->name.text = remote->text;
    kv_count(KV_COUNT_KEYS, 1);
    *out = remote;
    return KV_OK;
}

void kv_remote_free(kv_remote_t *remote)
{
    if (remote == NULL)
        return;
    kv_free(remote->servers);
    kv_free(remote);
    kv_count(KV_COUNT_KEYS, -1);
}

void kv_client_unload_locked(kv_client_t *client, const kv_remote_t *remote)
{
    for (uint32_t slice = 0; slice < remote->num_slices; slice++) {
        size_t rest = remote->bytes - slice * remote->slice_bytes;
        client->loads[remote->servers[slice]] -=
            rest < remote->slice_bytes ? rest : remote->slice_bytes;
    }
}

static void cut(kv_remote_t *remote, int32_t num_servers, bool whole)
{
    if (whole && remote->bytes <= KV_WIRE_ROWS_BYTES) {
        remote->slice_rows = remote->num_rows > 0 ? remote->num_rows : 1;
        remote->slice_bytes = remote->bytes > 0 ? remote->bytes : kv_dtype_bytes(remote->dtype);
        remote->num_slices = 1;
    } else if (remote->sparse) {
        remote->slice_rows = kv_slice_rows(remote->num_rows, remote->row_bytes, num_servers);
        remote->num_slices = kv_slice_count_rows(remote->num_rows, remote->slice_rows);
        remote->slice_bytes = (size_t)remote->slice_rows * remote->row_bytes;
    } else {
        remote->slice_bytes = kv_slice_bytes(remote->bytes, remote->row_bytes,
                                             kv_dtype_bytes(remote->dtype), num_servers);
        remote->num_slices = kv_slice_count(remote->bytes, remote->slice_bytes);
    }
    kv_remote_count_rows(remote);
}

/* Rank 0 chooses slices, servers and numbers. */
static kv_status_t place(kv_client_t *client, kv_client_work_t *work)
{
    kv_placed_t *placed = kv_calloc((size_t)work->num_remotes, sizeof *placed);
    KV_TRY_ALLOC(placed, "the places of keys");
    kv_status_t status = KV_OK;
    for (int64_t i = 0; i < work->num_remotes && status == KV_OK; i++) {
        kv_remote_t *remote = work->remotes[i];
        cut(remote, client->config.num_servers, work->call->keys[i].whole);
        remote->servers = kv_calloc(remote->num_slices, sizeof *remote->servers);
        placed[i] =
            (kv_placed_t){remote->bytes, remote->slice_bytes, remote->num_slices, remote->servers};
        if (remote->servers == NULL)
            status = kv_fail(KV_NO_MEMORY, "no memory for the places of a key");
    }
    if (status == KV_OK) {
        kv_mutex_lock(&client->lock);
        status = kv_place(client->loads, client->config.num_servers, placed, work->num_remotes);
        work->placed = status == KV_OK;
        for (int64_t i = 0; i < work->num_remotes; i++)
            work->remotes[i]->number = client->next_number++;
        kv_mutex_unlock(&client->lock);
    }
    kv_free(placed);
    return status;
}

static kv_status_t add_remotes(kv_client_t *client, kv_client_work_t *work)
{
    const kv_client_call_t *call = work->call;
    bool declares = call->verb == KV_CLIENT_DECLARE;
    int64_t count = declares ? call->num_keys : call->num_parts;
    work->remotes = kv_calloc((size_t)count, sizeof *work->remotes);
    KV_TRY_ALLOC(work->remotes, "the keys of a call");
    work->num_remotes = count;
    for (int64_t i = 0; i < count; i++) {
        if (declares)
            KV_TRY(remote_new(client, &call->keys[i], &work->remotes[i]));
        else
            work->remotes[i] = call->parts[i].remote;
    }
    return declares && client->config.rank == 0 ? place(client, work) : KV_OK;
}

/* --------------------------------------------------------------------------------------- work */

static kv_status_t fill(kv_client_t *client, kv_client_work_t *work)
{
    size_t servers = (size_t)client->config.num_servers;
    KV_TRY(add_remotes(client, work));
    builder_t builder = {.client = client, .work = work};
    builder.at = kv_calloc(servers * (WAYS + 1), sizeof *builder.at);
    KV_TRY_ALLOC(builder.at, "the slices of a call");
    builder.stamp = builder.at + servers * WAYS;
    kv_status_t status = add_ops(&builder);
    kv_free(builder.at);
    KV_TRY(status);
    return add_messages(work);
}

kv_status_t kv_work_new(kv_client_t *client, kv_client_call_t *call, kv_client_work_t **out)
{
    kv_client_work_t *work = kv_alloc(sizeof *work);
    KV_TRY_ALLOC(work, "a call");
    memset(work, 0, offsetof(kv_client_work_t, error.message));
    kv_count(KV_COUNT_REQUESTS, 1);
    work->client = client;
    work->call = call;
    work->come_end = &work->come;
    kv_status_t status = fill(client, work);
    if (status != KV_OK) {
        kv_work_free(work);
        return status;
    }
    *out = work;
    return KV_OK;
}

void kv_work_free(kv_client_work_t *work)
{
    kv_client_t *client = work->client;
    for (uint32_t i = 0; i < work->num_messages; i++)
        kv_buffer_rele(work->messages[i].buffer);
    if (work->call->verb == KV_CLIENT_DECLARE) {
        if (work->placed) {
            kv_mutex_lock(&client->lock);
            for (int64_t i = 0; i < work->num_remotes; i++)
                if (work->remotes[i] != NULL)
                    kv_client_unload_locked(client, work->remotes[i]);
            kv_mutex_unlock(&client->lock);
        }
        for (int64_t i = 0; i < work->num_remotes; i++)
            kv_remote_free(work->remotes[i]);
    }
    kv_free(work->messages);
    kv_free(work->ops);
    kv_free(work->remotes);
    kv_free(work);
    kv_count(KV_COUNT_REQUESTS, -1);
}
