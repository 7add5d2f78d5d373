/* Slices of values: rounds, versions, and those who wait for them.
 *
 * A slice comes into being with the first request that names it; until its first value has come it
 * only keeps what waits for it. Every worker's pushes lie in a list of their own, by round. When
 * all lists begin with the round that is next, these pushes are taken out, the slice is busy, and
 * they become the next version (server_round.c); then whoever waited is answered, and the same is
 * tried again. An asynchronous server makes a round of each push that is its worker's next one.
 *
 * A push that cannot be added (its payload found no memory, its type is wrong) still takes its
 * place: its round fails for all workers and leaves the value as it was. Without that the round
 * would never end, or end without a part.
 */
#include "ps/server_internal.h"
#include "compress/codec.h"
#include <inttypes.h>
#include <string.h>

/* Above this a sum is an engine's task. */
enum { INLINE_BYTES = 64 << 10 };

/* ----------------------------------------------------------------------------------- slices */

static kv_slice_t *slice_locked(kv_server_t *server, const kv_wire_record_t *record)
    KV_REQUIRES(server->mutex)
{
    kv_slice_t *slice = (kv_slice_t *)kv_index_find(&server->slices, record->key, record->slice);
    if (slice != NULL)
        return slice;
    kv_server_key_t *key = kv_server_key_locked(server, record->key);
    if (key == NULL)
        return NULL;
    size_t workers = (size_t)server->num_workers;
    slice = kv_calloc(1, sizeof *slice +
                             workers * (sizeof slice->workers[0] + sizeof slice->sources[0] +
                                        sizeof slice->codecs[0]));
    if (slice == NULL) {
        kv_server_key_tidy_locked(server, key);
        return NULL;
    }
    slice->node = (kv_index_node_t){.number = record->key, .part = record->slice};
    slice->server = server;
    slice->codecs = (kv_codec_t *)&slice->workers[workers];
    slice->sources = (const void **)(slice->codecs + workers);
    slice->key = key;
    slice->sibling = key->slices;
    key->slices = slice;
    kv_index_add(&server->slices, &slice->node);
    kv_count(KV_COUNT_SLICES, 1);
    return slice;
}

void kv_slice_free_locked(kv_server_t *server, kv_slice_t *slice, kv_error_t *error)
{
    kv_request_t *request;
    kv_norms_unlist_locked(server, slice);
    for (int32_t i = 0; i < server->num_workers; i++) {
        /* A round that waits for norms still has its pushes. */
        if ((request = slice->workers[i].summing) != NULL) {
            request->next = slice->workers[i].pushes;
            slice->workers[i].pushes = request;
        }
        while ((request = slice->workers[i].pushes) != NULL) {
            slice->workers[i].pushes = request->next;
            if (request->waiting)
                kv_answer_error_locked(server, request, error);
            kv_request_rele_locked(server, request);
        }
    }
    while ((request = slice->pulls) != NULL) {
        slice->pulls = request->next;
        kv_answer_error_locked(server, request, error);
    }
    if (kv_slice_has_value(slice)) {
        server->counters.slices--;
        server->counters.value_bytes -= (int64_t)slice->bytes;
        kv_buffer_rele(slice->stored);
        kv_rowset_fini(&slice->rows);
    }
    kv_buffer_rele(slice->made);
    kv_rowset_fini(&slice->made_rows);
    kv_update_forget(slice);
    kv_row_round_free(slice->row_round);
    kv_error_rele(slice->failure);
    kv_slots_rele(slice->slots);
    kv_slice_keep(slice, NULL, NULL);
    kv_buffer_rele(slice->encoded);
    kv_index_remove(&server->slices, &slice->node);
    kv_free(slice);
    kv_count(KV_COUNT_SLICES, -1);
}

static kv_status_t no_memory(const kv_wire_record_t *record)
{
    return kv_fail(KV_NO_MEMORY, "no memory for slice %" PRIu32 " of a key", record->slice);
}

/* A first value as a buffer with nothing else in front of it: its own, or a copy. NULL without
 * memory. */
static kv_buffer_t *own_data_locked(kv_server_t *server, const kv_request_t *request)
    KV_REQUIRES(server->mutex)
{
    if (request->whole)
        return kv_buffer_hold(request->buffer);
    size_t bytes = (size_t)request->header.record.bytes;
    kv_buffer_t *copy;
    if (kv_pool_get(server->pool, bytes, &copy) != KV_OK)
        return NULL;
    memcpy(copy->data, request->data, bytes);
    return copy;
}

static bool reached(const kv_slice_t *slice, const kv_request_t *pull)
{
    uint64_t version = slice->server->async ? slice->workers[pull->worker].applied : slice->version;
    bool in_place = slice->busy && slice->steps;
    bool readable =
        slice->sparse ? !in_place : slice->stored != NULL && slice->stored != slice->made;
    if (kv_request_is_state(pull))
        readable = kv_slice_has_value(slice) && !slice->busy && !slice->reading;
    return readable && version >= pull->header.record.round;
}

static void answer_value_locked(kv_server_t *server, kv_slice_t *slice, kv_request_t *request)
    KV_REQUIRES(server->mutex)
{
    kv_wire_record_t *record = &request->header.record;
    if (slice->sparse || (record->action == KV_WIRE_GET && (record->flags & KV_WIRE_ROWS))) {
        kv_slice_answer_rows_locked(server, slice, request);
        return;
    }
    record->dtype = (uint8_t)slice->dtype;
    record->flags = 0;
    kv_answer_locked(server, request, slice->stored, slice->bytes);
}

/* False: it waits on. */
static bool answer_pull_locked(kv_server_t *server, kv_slice_t *slice, kv_request_t *pull)
    KV_REQUIRES(server->mutex)
{
    if (kv_request_is_state(pull))
        return kv_slice_state_locked(server, slice, pull);
    answer_value_locked(server, slice, pull);
    return true;
}

void kv_slice_answer_locked(kv_server_t *server, kv_slice_t *slice)
{
    kv_request_t **link = &slice->pulls, *pull;
    while ((pull = *link) != NULL) {
        kv_request_t *next = pull->next;
        if (reached(slice, pull) && answer_pull_locked(server, slice, pull))
            *link = next;
        else
            link = &pull->next;
    }
}

/* ----------------------------------------------------------------------------------- pushes */

void kv_slice_spoil_locked(kv_server_t *server, kv_request_t *push, kv_error_t *error)
{
    push->failure = error;
    kv_buffer_rele(push->buffer);
    push->buffer = NULL;
    if (push->waiting)
        kv_answer_error_locked(server, push, error);
}

static kv_status_t check_push_locked(const kv_server_t *server, const kv_slice_t *slice,
                                     const kv_request_t *push) KV_REQUIRES(server->mutex)
{
    const kv_wire_record_t *record = &push->header.record;
    if (server->async && record->optimizer == 0 && server->optimizers == NULL)
        return kv_fail(KV_INVALID, "dist_async needs an optimizer on the servers before the first "
                                   "push; call set_optimizer");
    if (record->optimizer != 0 && kv_known_optimizer_locked(server, record->optimizer) == NULL)
        return kv_fail(KV_INVALID,
                       "worker %" PRId32 " pushed with an optimizer that server %" PRId32
                       " has not got",
                       push->worker, server->index);
    if (!kv_slice_has_value(slice))
        return KV_OK; /* looked at again when there is something to compare with */
    if (record->dtype != slice->dtype)
        return kv_fail(KV_BAD_TYPE, "the value is %s, worker %" PRId32 " pushed %s",
                       kv_dtype_name(slice->dtype), push->worker,
                       kv_dtype_name((kv_dtype_t)record->dtype));
    if (record->flags & KV_WIRE_ROWS) {
        kv_wire_rows_t rows;
        return push->data == NULL ? KV_OK /* there was no memory for it */
                                  : kv_slice_check_rows(slice, record, push->data, false, &rows);
    }
    if (slice->sparse)
        return kv_fail(KV_BAD_TYPE,
                       "the value is row-sparse, worker %" PRId32 " pushed a dense one",
                       push->worker);
    kv_codec_t codec = {.type = (kv_codec_type_t)record->codec};
    bool coded = codec.type != KV_CODEC_NONE;
    if (coded && !kv_dtype_is_floating(slice->dtype))
        return kv_fail(KV_BAD_TYPE, "the value is %s, which does not travel compressed",
                       kv_dtype_name(slice->dtype));
    size_t bytes =
        coded ? kv_wire_coded_bytes(codec.type, slice->dtype, slice->bytes) : slice->bytes;
    if (record->bytes != bytes)
        return kv_fail(KV_INVALID,
                       "slice %" PRIu32 " has %zu bytes%s, worker %" PRId32 " pushed %" PRIu64,
                       record->slice, bytes, coded ? " of codes" : "", push->worker, record->bytes);
    if (!coded || push->data == NULL) /* there was no memory for it */
        return KV_OK;
    codec.threshold = kv_wire_get_threshold(push->data);
    return kv_codec_check(&codec);
}

/* Which round of this worker has not begun. */
static uint64_t next_round(const kv_slice_t *slice, int32_t worker)
{
    if (slice->server->async)
        return slice->workers[worker].applied + (slice->workers[worker].summing != NULL);
    return slice->version + slice->busy;
}

static bool is_next(const kv_slice_t *slice, int32_t worker)
{
    const kv_request_t *push = slice->workers[worker].pushes;
    return push != NULL && push->header.record.round == next_round(slice, worker) &&
           kv_norms_may_begin(slice, push);
}

static void take_push(kv_slice_worker_t *worker)
{
    worker->summing = worker->pushes;
    worker->pushes = worker->summing->next;
}

/* Takes the pushes of the next round out of the lists. False: they are not all there. */
static bool begin_round_locked(kv_server_t *server, kv_slice_t *slice) KV_REQUIRES(server->mutex)
{
    int32_t num_workers = server->num_workers, ready = 0;
    if (slice->busy || slice->reading || !kv_slice_has_value(slice))
        return false;
    if (server->async) {
        while (ready < num_workers && !is_next(slice, (slice->turn + ready) % num_workers))
            ready++;
        if (ready == num_workers)
            return false;
        slice->turn = (slice->turn + ready) % num_workers;
        take_push(&slice->workers[slice->turn]);
        slice->turn = (slice->turn + 1) % num_workers;
    } else {
        while (ready < num_workers && is_next(slice, ready))
            ready++;
        if (ready < num_workers)
            return false;
        for (int32_t i = 0; i < num_workers; i++)
            take_push(&slice->workers[i]);
    }
    slice->busy = true;
    slice->key->num_busy++;
    return true;
}

/* ----------------------------------------------------------------------------------- rounds */

/* The round that the slice was busy with has ended: with a version, or with an error (taken). */
static void publish_locked(kv_server_t *server, kv_slice_t *slice, kv_error_t *error)
    KV_REQUIRES(server->mutex)
{
    if (slice->sparse) {
        bool replaced = !slice->steps || slice->phase == KV_PHASE_SUMS;
        if (error == NULL && (replaced || slice->made_rows.indices != NULL)) {
            kv_rowset_fini(&slice->rows);
            slice->rows = slice->made_rows;
        } else {
            kv_rowset_fini(&slice->made_rows);
        }
        slice->made_rows = (kv_rowset_t){0};
        server->counters.value_bytes -= (int64_t)slice->bytes;
        slice->bytes =
            (size_t)(slice->rows.num_rows * slice->row_count) * kv_dtype_bytes(slice->dtype);
        server->counters.value_bytes += (int64_t)slice->bytes;
    } else if (error == NULL) {
        kv_buffer_rele(slice->stored);
        slice->stored = slice->made;
    } else {
        kv_buffer_rele(slice->made);
    }
    kv_row_round_free(slice->row_round);
    kv_update_forget(slice);
    slice->row_round = NULL;
    slice->made = NULL;
    slice->phase = KV_PHASE_WHOLE;
    slice->version++;
    slice->busy = false;
    slice->key->num_busy--;
    server->counters.rounds++;
    for (int32_t i = 0; i < server->num_workers; i++) {
        kv_request_t *push = slice->workers[i].summing;
        if (push == NULL)
            continue;
        slice->workers[i].summing = NULL;
        slice->workers[i].applied++;
        if (push->waiting && error != NULL)
            kv_answer_error_locked(server, push, error);
        else if (push->waiting && push->header.record.action == KV_WIRE_PUSHPULL)
            answer_value_locked(server, slice, push);
        else if (push->waiting)
            kv_answer_locked(server, push, NULL, 0);
        kv_buffer_rele(push->buffer);
        push->buffer = NULL;
        kv_request_rele_locked(server, push);
    }
    kv_error_rele(error);
    kv_slice_answer_locked(server, slice);
}

static void begin_rounds_locked(kv_server_t *server, kv_slice_t *slice) KV_REQUIRES(server->mutex);

/* What was to be done is done. False: the round goes on when the other slices are as far. */
static bool end_phase_locked(kv_server_t *server, kv_slice_t *slice, kv_error_t *error)
    KV_REQUIRES(server->mutex)
{
    if (slice->phase == KV_PHASE_MEASURES)
        kv_norms_tell_locked(server, slice, error);
    else if (slice->phase == KV_PHASE_SUMS && error == NULL)
        kv_update_enlist_locked(server, slice);
    else
        publish_locked(server, slice, error);
    return !slice->busy;
}

static kv_error_t *run_round(kv_slice_t *slice)
{
    kv_status_t status = kv_round_run(slice);
    return status == KV_OK ? NULL : kv_error_capture(status);
}

static kv_status_t run(kv_op_t *op)
{
    kv_slice_t *slice = (kv_slice_t *)((char *)op - offsetof(kv_slice_t, op));
    kv_error_rele(slice->failure);
    slice->failure = run_round(slice);
    slice->ran = true;
    return KV_OK;
}

static void finish(kv_op_t *op)
{
    kv_slice_t *slice = (kv_slice_t *)((char *)op - offsetof(kv_slice_t, op));
    kv_server_t *server = slice->server;
    if (slice->phase == KV_PHASE_ENDS && !slice->ran)
        (void)run(op); /* other slices have taken their step */
    kv_error_t *error = slice->failure;
    slice->failure = NULL;
    kv_mutex_lock(&server->mutex);
    if (end_phase_locked(server, slice, error))
        begin_rounds_locked(server, slice);
    kv_slices_go_on_locked(server);
    kv_flush_locked(server);
    if (--server->num_running == 0)
        kv_cond_broadcast(&server->ended);
    kv_mutex_unlock(&server->mutex);
}

/* Nothing is to be worked out: the first push of the round is the next version as it is. */
static bool is_made(const kv_slice_t *slice)
{
    return slice->server->num_workers == 1 && !slice->steps && slice->made != NULL &&
           slice->made == kv_round_first(slice)->buffer;
}

/* Hands the round to the engine. False: it does not take it. */
static bool submit_locked(kv_server_t *server, kv_slice_t *slice) KV_REQUIRES(server->mutex)
{
    if (kv_round_bytes(slice) <= INLINE_BYTES || !server->has_threads)
        return false;
    kv_op_init(&slice->op, NULL, 0, (int32_t)kv_round_first(slice)->header.priority);
    slice->op.run = run;
    slice->op.finish = finish;
    slice->ran = false;
    /* What stands if the engine cannot run it. */
    slice->failure = kv_error_capture(kv_fail(KV_NO_MEMORY, "the engine could not run a round"));
    if (kv_engine_submit(server->engine, &slice->op) != KV_OK) {
        kv_error_rele(slice->failure);
        slice->failure = NULL;
        return false;
    }
    server->num_running++;
    return true;
}

/* Does what the round needs, or has it done: false. */
static bool work_locked(kv_server_t *server, kv_slice_t *slice, kv_error_t *error)
    KV_REQUIRES(server->mutex)
{
    if (error == NULL && !is_made(slice)) {
        if (submit_locked(server, slice))
            return false;
        kv_mutex_unlock(&server->mutex);
        error = run_round(slice);
        kv_mutex_lock(&server->mutex);
    }
    return end_phase_locked(server, slice, error);
}

/* Completes the rounds whose pushes are there. The slice may be gone afterwards; the lock may have
 * been dropped meanwhile. */
static void begin_rounds_locked(kv_server_t *server, kv_slice_t *slice)
{
    while (begin_round_locked(server, slice)) {
        kv_error_t *error = kv_round_prepare_locked(server, slice);
        if (!work_locked(server, slice, error))
            return;
    }
    kv_drop_if_due_locked(server, slice->key);
}

void kv_slices_go_on_locked(kv_server_t *server)
{
    kv_slice_t *slice;
    while ((slice = kv_norms_next_locked(server)) != NULL) {
        if (slice->phase == KV_PHASE_ENDS) {
            kv_error_t *error = slice->failure;
            slice->failure = NULL;
            if (!work_locked(server, slice, error))
                continue;
        }
        begin_rounds_locked(server, slice);
    }
}

void kv_slice_updated_locked(kv_server_t *server, kv_slice_t *slice, kv_error_t *error)
{
    publish_locked(server, slice, error);
    begin_rounds_locked(server, slice);
    kv_slices_go_on_locked(server);
}

void kv_slice_advance_locked(kv_server_t *server, kv_slice_t *slice)
{
    begin_rounds_locked(server, slice);
    kv_slices_go_on_locked(server);
}

/* --------------------------------------------------------------------------------- requests */

/* Puts a push in its place among those of its worker. False: there is one of that round. */
static bool enlist_locked(kv_server_t *server, kv_slice_t *slice, kv_request_t *push)
    KV_REQUIRES(server->mutex)
{
    uint64_t round = push->header.record.round;
    kv_request_t **link = &slice->workers[push->worker].pushes;
    while (*link != NULL && (*link)->header.record.round < round)
        link = &(*link)->next;
    if (round < next_round(slice, push->worker) ||
        (*link != NULL && (*link)->header.record.round == round))
        return false;
    push->next = *link;
    *link = push;
    push->slice = slice;
    kv_request_use_locked(server, push);
    return true;
}

kv_status_t kv_slice_push_locked(kv_server_t *server, kv_request_t *push)
{
    const kv_wire_record_t *record = &push->header.record;
    kv_slice_t *slice = slice_locked(server, record);
    if (slice == NULL)
        return no_memory(record);
    kv_status_t status = kv_slice_check_left_locked(server, slice, push);
    if (status != KV_OK) {
        kv_answer_status_locked(server, push, status);
        return KV_OK;
    }
    if (!enlist_locked(server, slice, push)) {
        kv_answer_status_locked(server, push,
                                kv_fail(KV_INVALID,
                                        "worker %" PRId32 " has pushed round %" PRIu64 " before",
                                        push->worker, record->round));
        return KV_OK;
    }
    kv_request_wait_locked(server, push);
    status = check_push_locked(server, slice, push);
    if (push->failure != NULL)
        kv_answer_error_locked(server, push, push->failure);
    else if (status != KV_OK)
        kv_slice_spoil_locked(server, push, kv_error_capture(status));
    kv_slice_advance_locked(server, slice);
    return KV_OK;
}

/* `key_bytes`: of the key, behind the value. */
static kv_status_t init_locked(kv_server_t *server, kv_slice_t *slice, const kv_request_t *request,
                               size_t key_bytes) KV_REQUIRES(server->mutex)
{
    const kv_wire_record_t *record = &request->header.record;
    if (slice == NULL)
        return no_memory(record);
    if (kv_slice_has_value(slice))
        return kv_fail(KV_INVALID, "slice %" PRIu32 " is initialised already", record->slice);
    size_t item = kv_dtype_bytes((kv_dtype_t)record->dtype);
    if ((record->flags & KV_WIRE_ROWS) == 0 && record->bytes % item != 0)
        return kv_fail(KV_INVALID, "slice %" PRIu32 " has %" PRIu64 " bytes, not whole elements",
                       record->slice, record->bytes);
    KV_TRY(kv_norms_init_locked(server, slice->key, record->t, record->slice));
    if (record->flags & KV_WIRE_ROWS) {
        KV_TRY(kv_slice_init_rows(slice, request));
    } else {
        kv_buffer_t *value = own_data_locked(server, request);
        if (value == NULL)
            return no_memory(record);
        slice->stored = value;
        slice->dtype = (kv_dtype_t)record->dtype;
        slice->row_count = record->round < INT64_MAX ? (int64_t)record->round : 0;
        slice->bytes = (size_t)record->bytes;
    }
    kv_status_t status =
        kv_slice_name(slice, (const char *)request->data + record->bytes, key_bytes);
    if (status != KV_OK) {
        kv_buffer_rele(slice->stored);
        slice->stored = NULL;
        kv_rowset_fini(&slice->rows);
        slice->sparse = false;
        return status;
    }
    server->counters.keys += slice->key->num_initialised++ == 0;
    server->counters.slices++;
    server->counters.value_bytes += (int64_t)slice->bytes;
    return KV_OK;
}

void kv_slice_init_locked(kv_server_t *server, kv_request_t *request)
{
    kv_wire_record_t *record = &request->header.record;
    uint64_t key_bytes = record->own;
    if (request->failure != NULL) {
        kv_answer_error_locked(server, request, request->failure);
        return;
    }
    kv_status_t status = KV_OK;
    if (request->worker != 0)
        status = kv_fail(KV_INVALID, "worker %" PRId32 " cannot initialise keys, only worker 0 can",
                         request->worker);
    else if (record->codec != KV_CODEC_NONE)
        status = kv_fail(KV_INVALID, "a first value cannot be compressed");
    else if (key_bytes > record->bytes)
        status = kv_fail(KV_INVALID, "a first value of %" PRIu64 " bytes has no key of %" PRIu64,
                         record->bytes, key_bytes);
    else
        record->bytes -= key_bytes;
    kv_slice_t *slice = status == KV_OK ? slice_locked(server, record) : NULL;
    if (status == KV_OK)
        status = init_locked(server, slice, request, (size_t)key_bytes);
    if (status != KV_OK) {
        kv_answer_status_locked(server, request, status);
        return;
    }
    kv_answer_locked(server, request, NULL, 0);
    for (int32_t i = 0; i < server->num_workers; i++) {
        for (kv_request_t *push = slice->workers[i].pushes; push != NULL; push = push->next) {
            status = push->failure == NULL ? check_push_locked(server, slice, push) : KV_OK;
            if (status != KV_OK)
                kv_slice_spoil_locked(server, push, kv_error_capture(status));
        }
    }
    kv_slice_answer_locked(server, slice);
    kv_slice_advance_locked(server, slice);
}

void kv_slice_pull_locked(kv_server_t *server, kv_request_t *pull)
{
    kv_slice_t *slice = slice_locked(server, &pull->header.record);
    kv_status_t status;
    if (slice == NULL) {
        kv_answer_status_locked(server, pull, no_memory(&pull->header.record));
    } else if (pull->failure != NULL) {
        kv_answer_error_locked(server, pull, pull->failure);
    } else if (reached(slice, pull) && answer_pull_locked(server, slice, pull)) {
        return;
    } else if ((status = kv_slice_check_left_locked(server, slice, pull)) != KV_OK) {
        kv_answer_status_locked(server, pull, status);
    } else {
        pull->slice = slice;
        pull->next = slice->pulls;
        slice->pulls = pull;
        kv_request_wait_locked(server, pull);
    }
}

void kv_slice_unlist_locked(kv_server_t *server, kv_request_t *pull)
{
    (void)server;
    kv_request_t **link = &pull->slice->pulls;
    while (*link != pull)
        link = &(*link)->next;
    *link = pull->next;
}
