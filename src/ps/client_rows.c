/* Rows on their way out and in.
 *
 * Of a call's rows those of one slice are a range: their ids increase. What goes out is summed
 * right into the messages. Rows that are asked for by their ids arrive where they belong; where all
 * rows of a slice are asked for nobody knows how many there are, so these come into buffers of
 * their own and are put together at the end.
 */
#include "ps/client_internal.h"
#include "ps/placement.h"
#include <inttypes.h>
#include <string.h>

static size_t common_divisor(size_t a, size_t b)
{
    while (b > 0) {
        size_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

void kv_remote_count_rows(kv_remote_t *remote)
{
    if (remote->sparse) {
        remote->unit_bytes = remote->row_bytes;
        return;
    }
    remote->unit_bytes = common_divisor(remote->slice_bytes, remote->row_bytes);
    bool empty = remote->bytes == 0;
    remote->num_rows = empty ? 0 : (int64_t)(remote->bytes / remote->unit_bytes);
    remote->slice_rows = empty ? 0 : (int64_t)(remote->slice_bytes / remote->unit_bytes);
}

size_t kv_remote_row_bytes(const kv_remote_t *remote)
{
    return remote->unit_bytes;
}

uint32_t kv_remote_num_slices(const kv_remote_t *remote)
{
    return remote->num_slices;
}

/* The rows of one slice, counted through the value. */
static int64_t first_row(const kv_remote_t *remote, uint32_t slice)
{
    return (int64_t)slice * remote->slice_rows;
}

static int64_t rows_of_slice(const kv_remote_t *remote, uint32_t slice)
{
    int64_t left = remote->num_rows - first_row(remote, slice);
    return left < remote->slice_rows ? left : remote->slice_rows;
}

int64_t kv_remote_slice_rows(const kv_remote_t *remote, uint32_t slice, int64_t *before)
{
    *before = first_row(remote, slice);
    return rows_of_slice(remote, slice);
}

/* ---------------------------------------------------------------------------------- going out */

static const kv_row_sum_t *sum_of(const kv_slice_op_t *op)
{
    const kv_client_call_t *call = op->work->call;
    if (call->verb == KV_CLIENT_DECLARE)
        return call->keys[op->part].rows;
    return call->verb == KV_CLIENT_MOVE ? call->parts[op->part].rows : NULL;
}

/* How many of the ids, which increase, are lower. */
static int64_t count_below(int64_t num_ids, const int64_t *ids, int64_t limit)
{
    int64_t low = 0, high = num_ids;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (ids[middle] < limit)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

kv_status_t kv_op_add_rows(kv_slice_op_t *op, bool *needed)
{
    const kv_client_call_t *call = op->work->call;
    const kv_remote_t *remote = op->work->remotes[op->part];
    const kv_row_sum_t *sum = sum_of(op);
    bool chooses = sum == NULL && call->verb == KV_CLIENT_MOVE && call->parts[op->part].ids != NULL;
    *needed = true;
    if (sum == NULL && !chooses)
        return KV_OK;
    const int64_t *ids = sum != NULL ? sum->ids : call->parts[op->part].ids;
    int64_t num_ids = sum != NULL ? sum->num_rows : call->parts[op->part].num_ids;
    int64_t begin = first_row(remote, op->slice), end = begin + rows_of_slice(remote, op->slice);
    op->first = count_below(num_ids, ids, begin);
    op->rows = count_below(num_ids - op->first, ids + op->first, end);
    op->has_rows = true;
    *needed = sum != NULL || op->rows > 0;
    size_t bytes = kv_wire_rows_bytes(op->rows, remote->unit_bytes);
    if (bytes > KV_WIRE_ROWS_BYTES) {
        char name[64];
        return kv_fail(KV_INVALID,
                       "key %s: %" PRId64
                       " rows for one part of it are %zu bytes, but a message has %d at most; take "
                       "fewer rows at once",
                       kv_name_format(&remote->name, name, sizeof name), op->rows, bytes,
                       (int)KV_WIRE_ROWS_BYTES);
    }
    op->sent_bytes = (uint32_t)(chooses ? kv_wire_ids_bytes(op->rows) : bytes);
    if (chooses) {
        op->bytes = (uint32_t)((size_t)op->rows * remote->unit_bytes);
        op->offset = (size_t)op->first * remote->unit_bytes;
    }
    return KV_OK;
}

void kv_op_put_rows(const kv_slice_op_t *op, void *out)
{
    const kv_client_call_t *call = op->work->call;
    const kv_remote_t *remote = op->work->remotes[op->part];
    const kv_row_sum_t *sum = sum_of(op);
    const int64_t *from = (sum != NULL ? sum->ids : call->parts[op->part].ids) + op->first;
    int64_t begin = first_row(remote, op->slice);
    kv_wire_rows_t head = {.count = op->rows,
                           .num_rows = rows_of_slice(remote, op->slice),
                           .row_bytes = remote->unit_bytes};
    int64_t *ids = kv_wire_put_rows(&head, out);
    for (int64_t i = 0; i < op->rows; i++)
        ids[i] = from[i] - begin;
    if (sum == NULL || op->rows == 0)
        return;
    kv_row_sum_t part = *sum;
    part.num_rows = op->rows;
    part.ids = from;
    if (sum->data != NULL)
        part.data = sum->data + (size_t)op->first * sum->row_bytes;
    else
        part.starts = sum->starts + op->first;
    kv_rows_write(call->host, &part, NULL, ids + op->rows);
}

/* --------------------------------------------------------------------------------- coming in */

kv_status_t kv_op_check_rows(const kv_slice_op_t *op, const void *data, size_t bytes)
{
    const kv_remote_t *remote = op->work->remotes[op->part];
    kv_wire_rows_t rows;
    KV_TRY(kv_wire_get_rows(data, bytes, false, &rows));
    if (rows.row_bytes != remote->unit_bytes || rows.num_rows != rows_of_slice(remote, op->slice))
        return kv_fail(KV_INVALID, "it answers with rows of another value");
    return KV_OK;
}

kv_status_t kv_remote_gather(const kv_remote_t *remote, kv_buffer_t *const *found, kv_rowset_t *out)
{
    int64_t count = 0;
    for (int pass = 0; pass < 2; pass++) {
        int64_t at = 0;
        for (uint32_t slice = 0; slice < remote->num_slices; slice++) {
            kv_wire_rows_t rows;
            KV_TRY(kv_wire_get_rows(found[slice]->data, found[slice]->bytes, false, &rows));
            int64_t begin = first_row(remote, slice);
            for (int64_t i = 0; pass == 1 && i < rows.count; i++)
                ((int64_t *)out->indices->data)[at + i] = begin + rows.ids[i];
            if (pass == 1 && rows.count > 0 && rows.row_bytes > 0)
                memcpy((char *)out->data->data + (size_t)at * rows.row_bytes, rows.data,
                       (size_t)rows.count * rows.row_bytes);
            at += rows.count;
        }
        if (pass == 1)
            break;
        count = at;
        KV_TRY(kv_rowset_make(out, count, remote->unit_bytes));
    }
    return KV_OK;
}
