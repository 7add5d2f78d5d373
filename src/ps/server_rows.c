/* Rows at a server: row-sparse slices, rounds of rows, answers with rows.
 *
 * The pushes of a round are summed as row sets where they lie, in their messages. Without an
 * optimizer their union becomes the value: of a row-sparse slice exactly these rows, of a dense one
 * zeros elsewhere. With one the step takes the sum, lazily or not, as in a store of one process.
 * Answers with rows are copies, so a row-sparse slice has its memory to itself.
 */
#include "ps/server_internal.h"
#include "base/memory.h"
#include <inttypes.h>
#include <string.h>

/* ----------------------------------------------------------------------------- rows on the wire */

/* What counts as a row of a dense slice: a row of the value, or what the sender says where the
 * slice ends within rows. */
static bool fits_dense(const kv_slice_t *slice, const kv_wire_rows_t *rows)
{
    size_t item = kv_dtype_bytes(slice->dtype);
    if (slice->bytes == 0)
        return rows->count == 0;
    if (rows->row_bytes == 0 || rows->row_bytes % item != 0 ||
        slice->bytes % rows->row_bytes != 0 ||
        (int64_t)(slice->bytes / rows->row_bytes) != rows->num_rows)
        return false;
    int64_t count = (int64_t)(slice->bytes / item);
    bool cut = slice->row_count <= 0 || count % slice->row_count != 0;
    return cut || rows->row_bytes == (size_t)slice->row_count * item;
}

kv_status_t kv_slice_check_rows(const kv_slice_t *slice, const kv_wire_record_t *record,
                                const void *data, bool ids_only, kv_wire_rows_t *out)
{
    if (record->codec != KV_CODEC_NONE)
        return kv_fail(KV_INVALID, "rows do not travel compressed");
    KV_TRY(kv_wire_get_rows(data, (size_t)record->bytes, ids_only, out));
    size_t row_bytes = (size_t)slice->row_count * kv_dtype_bytes(slice->dtype);
    bool fits = slice->sparse ? out->row_bytes == row_bytes && out->num_rows == slice->num_rows
                              : fits_dense(slice, out);
    if (!fits)
        return kv_fail(KV_INVALID,
                       "slice %" PRIu32 " has no %" PRId64 " rows of %zu bytes, as a worker says",
                       record->slice, out->num_rows, out->row_bytes);
    return KV_OK;
}

kv_status_t kv_slice_init_rows(kv_slice_t *slice, const kv_request_t *request)
{
    const kv_wire_record_t *record = &request->header.record;
    kv_wire_rows_t rows;
    KV_TRY(kv_wire_get_rows(request->data, (size_t)record->bytes, false, &rows));
    size_t item = kv_dtype_bytes((kv_dtype_t)record->dtype);
    if (record->round > KV_WIRE_ROWS_BYTES || rows.row_bytes != (size_t)record->round * item)
        return kv_fail(KV_INVALID, "rows of %" PRIu64 " elements are not %zu bytes long",
                       record->round, rows.row_bytes);
    KV_TRY(kv_rowset_make(&slice->rows, rows.count, rows.row_bytes));
    if (rows.count > 0) {
        memcpy(slice->rows.indices->data, rows.ids, (size_t)rows.count * sizeof *rows.ids);
        memcpy(slice->rows.data->data, rows.data, (size_t)rows.count * rows.row_bytes);
    }
    slice->sparse = true;
    slice->num_rows = rows.num_rows;
    slice->dtype = (kv_dtype_t)record->dtype;
    slice->row_count = (int64_t)record->round;
    slice->bytes = (size_t)rows.count * rows.row_bytes;
    return KV_OK;
}

/* ---------------------------------------------------------------------------------- answers */

static kv_host_t alone(const kv_server_t *server)
{
    kv_host_t host = server->host;
    host.num_threads = 1; /* slices are worked on side by side */
    return host;
}

/* The rows whose ids the request has, zeros where there is none. */
static kv_status_t choose_locked(kv_server_t *server, const kv_slice_t *slice,
                                 const kv_request_t *request, kv_buffer_t **out)
    KV_REQUIRES(server->mutex)
{
    kv_wire_rows_t rows;
    kv_host_t host = alone(server);
    KV_TRY(kv_slice_check_rows(slice, &request->header.record, request->data, true, &rows));
    if ((uint64_t)rows.count * rows.row_bytes > KV_WIRE_ROWS_BYTES)
        return kv_fail(KV_INVALID, "%" PRId64 " rows of %zu bytes do not fit into a message",
                       rows.count, rows.row_bytes);
    KV_TRY(kv_pool_get(server->pool, (size_t)rows.count * rows.row_bytes, out));
    if (slice->sparse)
        kv_rows_select(&host, rows.row_bytes, &slice->rows, rows.count, rows.ids, (*out)->data);
    else
        kv_rows_gather(&host, rows.row_bytes, rows.count, rows.ids, slice->stored->data,
                       (*out)->data);
    return KV_OK;
}

static kv_status_t copy_all_locked(kv_server_t *server, const kv_slice_t *slice, kv_buffer_t **out)
    KV_REQUIRES(server->mutex)
{
    kv_wire_rows_t rows = {.count = slice->rows.num_rows,
                           .num_rows = slice->num_rows,
                           .row_bytes = (size_t)slice->row_count * kv_dtype_bytes(slice->dtype)};
    size_t bytes = kv_wire_rows_bytes(rows.count, rows.row_bytes);
    if (bytes > KV_WIRE_ROWS_BYTES)
        return kv_fail(KV_INVALID,
                       "%" PRId64 " stored rows of %zu bytes do not fit into a message; use "
                       "row_sparse_pull",
                       rows.count, rows.row_bytes);
    KV_TRY(kv_pool_get(server->pool, bytes, out));
    int64_t *ids = kv_wire_put_rows(&rows, (*out)->data);
    if (rows.count > 0) {
        memcpy(ids, slice->rows.indices->data, (size_t)rows.count * sizeof *ids);
        memcpy(ids + rows.count, slice->rows.data->data, slice->bytes);
    }
    return KV_OK;
}

void kv_slice_answer_rows_locked(kv_server_t *server, kv_slice_t *slice, kv_request_t *request)
{
    kv_wire_record_t *record = &request->header.record;
    bool chooses = record->action == KV_WIRE_GET && (record->flags & KV_WIRE_ROWS);
    kv_buffer_t *value = NULL;
    kv_status_t status = chooses ? choose_locked(server, slice, request, &value)
                                 : copy_all_locked(server, slice, &value);
    record->flags = chooses ? 0 : KV_WIRE_ROWS;
    record->dtype = (uint8_t)slice->dtype;
    if (status == KV_OK)
        kv_answer_locked(server, request, value, value->bytes);
    else
        kv_answer_status_locked(server, request, status);
    kv_buffer_rele(value);
}

/* ----------------------------------------------------------------------------------- rounds */

static bool has_rows(const kv_request_t *push)
{
    return (push->header.record.flags & KV_WIRE_ROWS) != 0;
}

kv_status_t kv_round_check_rows(const kv_slice_t *slice)
{
    const kv_request_t *first = kv_round_first(slice);
    for (int32_t i = first->worker; i < slice->server->num_workers; i++) {
        const kv_request_t *push = slice->workers[i].summing;
        if (push != NULL && has_rows(push) != has_rows(first))
            return kv_fail(KV_BAD_TYPE,
                           "worker %" PRId32 " pushed a %s value, worker %" PRId32 " a %s one",
                           first->worker, has_rows(first) ? "row-sparse" : "dense", push->worker,
                           has_rows(push) ? "row-sparse" : "dense");
    }
    return KV_OK;
}

size_t kv_round_bytes(const kv_slice_t *slice)
{
    size_t bytes = 0;
    bool lazy = slice->by_rows && slice->steps &&
                kv_optim_is_lazy(slice->step.optim, &slice->step.numbers, slice->sparse);
    for (int32_t i = 0; i < slice->server->num_workers && slice->by_rows; i++)
        if (slice->workers[i].summing != NULL)
            bytes += (size_t)slice->workers[i].summing->header.record.bytes;
    return lazy ? bytes : bytes + slice->bytes;
}

/* A push as a row set, which needs its memory described as buffers. */
typedef struct pushed {
    kv_buffer_t ids, data;
    kv_rowset_t rows;
} pushed_t;

struct kv_row_round {
    kv_row_sum_t sum;
    kv_weight_t weight; /* of a row-sparse slice, between two halves of a round … */
    int64_t *where;     /* … and where the sum's rows are in it */
    pushed_t pushed[];
};

/* A step of a row-sparse slice. In a round of two halves the first does all that can fail, and new
 * rows lie apart until both are over. */
static kv_status_t step_rows(kv_slice_t *slice, const kv_host_t *host, kv_row_round_t *round)
{
    const kv_step_t *step = &slice->step;
    const kv_row_sum_t *sum = &round->sum;
    bool lazy = kv_optim_is_lazy(step->optim, &step->numbers, true);
    if (slice->phase == KV_PHASE_WHOLE)
        return kv_rows_step(host, step, slice->slots, sum, &slice->rows);
    if (slice->phase == KV_PHASE_ENDS) {
        kv_host_update_rows_part(host, step, &round->weight, sum, round->where, lazy, &slice->sums);
        return KV_OK;
    }
    slice->made_rows = slice->rows;
    if (slice->rows.indices != NULL)
        kv_buffer_hold(slice->rows.indices);
    if (slice->rows.data != NULL)
        kv_buffer_hold(slice->rows.data);
    KV_TRY(kv_rows_begin(host, step, slice->slots, sum, &slice->made_rows, &round->weight,
                         &round->where));
    kv_host_measure_rows(host, step, &round->weight, sum, round->where, lazy, &slice->sums);
    return KV_OK;
}

static kv_status_t run_sum(kv_slice_t *slice, const kv_host_t *host, kv_row_round_t *round)
{
    const kv_row_sum_t *sum = &round->sum;
    if (slice->phase == KV_PHASE_SUMS) {
        KV_TRY(kv_rowset_make(&slice->recv_rows, sum->num_rows, sum->row_bytes));
        if (sum->num_rows > 0)
            kv_rows_write(host, sum, slice->recv_rows.indices->data, slice->recv_rows.data->data);
        return KV_OK;
    }
    if (slice->sparse && slice->steps)
        return step_rows(slice, host, round);
    if (slice->sparse) {
        KV_TRY(kv_rowset_make(&slice->made_rows, sum->num_rows, sum->row_bytes));
        if (sum->num_rows > 0)
            kv_rows_write(host, sum, slice->made_rows.indices->data, slice->made_rows.data->data);
        return KV_OK;
    }
    if (slice->bytes == 0)
        return KV_OK;
    void *made = slice->made->data;
    int64_t num_rows = (int64_t)(slice->bytes / sum->row_bytes);
    if (!slice->steps) {
        kv_rows_to_dense(host, sum, num_rows, 1, &made);
        return KV_OK;
    }
    bool lazy = kv_optim_is_lazy(slice->step.optim, &slice->step.numbers, false);
    bool measures = slice->phase == KV_PHASE_MEASURES;
    kv_weight_t weight;
    if (!measures && slice->made != slice->stored)
        memcpy(made, slice->stored->data, slice->bytes);
    KV_TRY(kv_slots_weight(slice->slots, host, &slice->step, slice->dtype, num_rows, sum->row_count,
                           measures ? slice->stored->data : made, &weight));
    if (measures)
        kv_host_measure_rows(host, &slice->step, &weight, sum, NULL, lazy, &slice->sums);
    else if (slice->phase == KV_PHASE_ENDS)
        kv_host_update_rows_part(host, &slice->step, &weight, sum, NULL, lazy, &slice->sums);
    else
        kv_host_update_rows(host, &slice->step, &weight, sum, NULL, lazy);
    return KV_OK;
}

static kv_status_t describe(const kv_slice_t *slice, pushed_t *pushed, int *num_sets,
                            size_t *row_bytes)
{
    const kv_rowset_t **sets = (const kv_rowset_t **)slice->sources;
    for (int32_t i = 0; i < slice->server->num_workers; i++) {
        const kv_request_t *push = slice->workers[i].summing;
        if (push == NULL)
            continue;
        kv_wire_rows_t rows;
        KV_TRY(kv_wire_get_rows(push->data, (size_t)push->header.record.bytes, false, &rows));
        if (*num_sets > 0 && rows.row_bytes != *row_bytes)
            return kv_fail(KV_INVALID, "the workers' rows are of different lengths");
        *row_bytes = rows.row_bytes;
        *pushed = (pushed_t){.ids = {.data = (void *)rows.ids},
                             .data = {.data = (void *)rows.data},
                             .rows = {.num_rows = rows.count}};
        pushed->rows.indices = &pushed->ids;
        pushed->rows.data = &pushed->data;
        sets[(*num_sets)++] = &pushed->rows;
        pushed++;
    }
    return KV_OK;
}

static kv_status_t row_round_new(const kv_slice_t *slice, const kv_host_t *host,
                                 kv_row_round_t **out)
{
    int num_sets = 0;
    size_t row_bytes = 0;
    kv_row_round_t *round =
        kv_calloc(1, sizeof *round + (size_t)slice->server->num_workers * sizeof round->pushed[0]);
    KV_TRY_ALLOC(round, "a round of rows");
    kv_status_t status = describe(slice, round->pushed, &num_sets, &row_bytes);
    if (status == KV_OK)
        status =
            kv_row_sum_init(host, slice->dtype, (int64_t)(row_bytes / kv_dtype_bytes(slice->dtype)),
                            num_sets, (const kv_rowset_t *const *)slice->sources, &round->sum);
    if (status == KV_OK)
        *out = round;
    else
        kv_free(round);
    return status;
}

void kv_row_round_free(kv_row_round_t *round)
{
    if (round == NULL)
        return;
    kv_row_sum_fini(&round->sum);
    kv_free(round->where);
    kv_free(round);
}

kv_status_t kv_round_run_rows(kv_slice_t *slice, const kv_host_t *host)
{
    kv_row_round_t *round = slice->row_round;
    if (round == NULL)
        KV_TRY(row_round_new(slice, host, &round));
    kv_status_t status = run_sum(slice, host, round);
    bool keeps = status == KV_OK && slice->phase == KV_PHASE_MEASURES;
    slice->row_round = keeps ? round : NULL;
    if (!keeps)
        kv_row_round_free(round);
    return status;
}
