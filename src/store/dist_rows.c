/* Rows in the calls of a dist store: what goes out of row-sparse values, and row-sparse outs.
 *
 * The values of a key are merged while they are written into messages. Outs that ask for the same
 * rows get them from one request; where they ask for different ones, the union of these is asked
 * for. The last row-sparse out takes over the memory into which its rows have come.
 */
#include "base/memory.h"
#include "store/internal.h"

#include <string.h>

/* How many of the client's rows make up one of the value; 1 but for a dense key whose slices end
 * within rows. */
static int64_t parts_of_row(const kv_entry_t *entry)
{
    size_t part = kv_remote_row_bytes(entry->remote);
    return part > 0 && part < entry->row_bytes ? (int64_t)(entry->row_bytes / part) : 1;
}

static void number_parts(int64_t parts, int64_t count, const int64_t *ids, int64_t *out)
{
    for (int64_t i = 0; i < count; i++)
        for (int64_t part = 0; part < parts; part++)
            *out++ = ids[i] * parts + part;
}

/* ---------------------------------------------------------------------------------- going out */

static kv_status_t send_parts(kv_dist_rows_t *rows, const kv_host_t *host, const kv_entry_t *entry)
{
    int64_t parts = parts_of_row(entry), row_count = entry->row_count / parts;
    kv_row_sum_t whole = rows->sum;
    const kv_rowset_t *set = &rows->parts;
    KV_TRY(kv_rowset_make(&rows->parts, whole.num_rows * parts, entry->row_bytes / (size_t)parts));
    if (whole.num_rows > 0) {
        number_parts(parts, whole.num_rows, whole.ids, set->indices->data);
        kv_rows_write(host, &whole, NULL, set->data->data);
    }
    KV_TRY(kv_row_sum_init(host, entry->dtype, row_count, 1, &set, &rows->sum));
    kv_row_sum_fini(&whole);
    return KV_OK;
}

kv_status_t kv_dist_rows_send(kv_dist_rows_t *rows, const kv_host_t *host, const kv_group_t *group,
                              kv_client_part_t *part)
{
    const kv_entry_t *entry = group->entry;
    kv_work_t work = {.host = host, .group = *group};
    KV_TRY(kv_work_sum_rows(&work, &rows->sum));
    part->rows = &rows->sum;
    if (entry->bytes == 0 && !entry->sparse)
        rows->sum.num_rows = 0; /* the servers have no rows of it */
    return parts_of_row(entry) > 1 ? send_parts(rows, host, entry) : KV_OK;
}

/* What all outs ask for, taken together. */
static kv_status_t unite(kv_dist_rows_t *rows, const kv_host_t *host, int32_t num_outs)
{
    const kv_row_ids_t *ids = rows->row_ids;
    int64_t count = ids[0].count;
    for (int32_t i = 1; i < num_outs; i++) {
        rows->distinct = rows->distinct || ids[i].ids != ids[0].ids;
        count += ids[i].count;
    }
    if (!rows->distinct) {
        rows->asked = (kv_row_ids_t){kv_buffer_hold(ids[0].ids), ids[0].count};
        return KV_OK;
    }
    kv_buffer_t *scratch;
    KV_TRY(kv_buffer_new((size_t)count * sizeof(int64_t), &rows->asked.ids));
    KV_TRY(kv_buffer_new((size_t)count * sizeof(int64_t), &scratch));
    int64_t *next = rows->asked.ids->data;
    for (int32_t i = 0; i < num_outs; i++) {
        if (ids[i].count > 0)
            memcpy(next, ids[i].ids->data, (size_t)ids[i].count * sizeof *next);
        next += ids[i].count;
    }
    rows->asked.count = kv_row_ids_unique(host, count, rows->asked.ids->data, scratch->data);
    kv_buffer_rele(scratch);
    return KV_OK;
}

kv_status_t kv_dist_rows_ask(kv_dist_rows_t *rows, const kv_host_t *host, const kv_group_t *group,
                             kv_client_part_t *part)
{
    const kv_entry_t *entry = group->entry;
    if (rows->row_ids == NULL) {
        rows->found = kv_calloc(kv_remote_num_slices(entry->remote), sizeof(kv_buffer_t *));
        KV_TRY_ALLOC(rows->found, "the rows of a key");
        part->found = rows->found;
        return KV_OK;
    }
    int64_t parts = parts_of_row(entry);
    KV_TRY(unite(rows, host, group->num_outs));
    KV_TRY(kv_rowset_make(&rows->arrived, rows->asked.count, entry->row_bytes));
    if (rows->asked.count == 0)
        return KV_OK;
    const int64_t *ids = rows->asked.ids->data;
    memcpy(rows->arrived.indices->data, ids, (size_t)rows->asked.count * sizeof *ids);
    if (entry->row_bytes == 0)
        return KV_OK; /* nothing travels */
    part->out = rows->arrived.data->data;
    part->ids = ids;
    part->num_ids = rows->asked.count * parts;
    if (parts == 1)
        return KV_OK;
    KV_TRY(kv_buffer_new((size_t)part->num_ids * sizeof *ids, &rows->asked_parts.ids));
    number_parts(parts, rows->asked.count, ids, rows->asked_parts.ids->data);
    part->ids = rows->asked_parts.ids->data;
    return KV_OK;
}

void kv_dist_rows_issued(kv_dist_rows_t *rows)
{
    kv_row_sum_fini(&rows->sum);
    rows->sum = (kv_row_sum_t){0};
    kv_rowset_fini(&rows->parts);
    kv_buffer_rele(rows->asked.ids);
    kv_buffer_rele(rows->asked_parts.ids);
    rows->asked.ids = rows->asked_parts.ids = NULL;
}

/* --------------------------------------------------------------------------------- coming in */

kv_status_t kv_dist_rows_deliver(kv_dist_rows_t *rows, const kv_host_t *host,
                                 const kv_entry_t *entry, int32_t num_outs, kv_view_t *outs)
{
    int32_t copied = num_outs;
    if (rows->found != NULL)
        KV_TRY(kv_remote_gather(entry->remote, rows->found, &rows->arrived));
    for (int32_t i = num_outs - 1; i >= 0 && copied == num_outs && !rows->distinct; i--) {
        if (outs[i].sparse == NULL)
            continue;
        kv_view_t last = outs[num_outs - 1];
        outs[num_outs - 1] = outs[i];
        outs[i] = last;
        copied--;
    }
    if (copied > 0) {
        const void **pointers = kv_alloc((size_t)(1 + copied) * sizeof *pointers);
        KV_TRY_ALLOC(pointers, "the outs of a call");
        kv_work_t work = {.host = host,
                          .group = {.entry = (kv_entry_t *)entry,
                                    .num_outs = copied,
                                    .outs = outs,
                                    .row_ids = rows->row_ids},
                          .rows = &rows->arrived,
                          .pointers = pointers};
        kv_status_t status = kv_work_pull_rows(&work);
        kv_free(pointers);
        KV_TRY(status);
    }
    if (copied < num_outs) {
        kv_sparse_t *last = outs[num_outs - 1].sparse;
        kv_rowset_fini(&last->rows);
        last->rows = rows->arrived;
        rows->arrived = (kv_rowset_t){0};
    }
    return KV_OK;
}

size_t kv_dist_rows_bytes(const kv_dist_rows_t *rows, const kv_entry_t *entry, int32_t num_outs,
                          const kv_view_t *outs)
{
    size_t bytes = 1, each = (size_t)rows->arrived.num_rows * entry->row_bytes;
    for (uint32_t i = 0; rows->found != NULL && i < kv_remote_num_slices(entry->remote); i++)
        each += rows->found[i] != NULL ? rows->found[i]->bytes : 0;
    bytes += rows->found != NULL ? each : 0;
    for (int32_t i = rows->distinct ? 0 : 1; i < num_outs; i++)
        bytes += outs[i].sparse != NULL ? each : entry->bytes;
    return bytes;
}

void kv_dist_rows_fini(kv_dist_rows_t *rows, const kv_entry_t *entry, int32_t num_outs)
{
    for (uint32_t i = 0; rows->found != NULL && i < kv_remote_num_slices(entry->remote); i++)
        kv_buffer_rele(rows->found[i]);
    kv_free(rows->found);
    kv_dist_rows_issued(rows);
    kv_rowset_fini(&rows->arrived);
    for (int32_t i = 0; rows->row_ids != NULL && i < num_outs; i++)
        kv_buffer_rele(rows->row_ids[i].ids);
}
