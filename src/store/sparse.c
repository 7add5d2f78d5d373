/* What has to do with row-sparse values while the key and the arrays are held: pushes of row sets,
 * and pulls into them or out of them.
 */
#include "base/memory.h"
#include "store/internal.h"

#include <string.h>

enum { LOCAL_SETS = 16 };

/* --------------------------------------------------------------------------------- pushes */

kv_status_t kv_work_sum_rows(const kv_work_t *work, kv_row_sum_t *sum)
{
    const kv_rowset_t *local[LOCAL_SETS] = {NULL}, **sets = local;
    const kv_entry_t *entry = work->group.entry;
    int32_t num_values = work->group.num_values;
    if (num_values > LOCAL_SETS) {
        sets = kv_alloc((size_t)num_values * sizeof(kv_rowset_t *));
        KV_TRY_ALLOC(sets, "the values of a push");
    }
    for (int32_t i = 0; i < num_values; i++)
        sets[i] = &work->group.values[i].sparse->rows;
    kv_status_t status =
        kv_row_sum_init(work->host, entry->dtype, entry->row_count, num_values, sets, sum);
    if (sets != local)
        kv_free(sets);
    return status;
}

static kv_status_t update_dense(const kv_work_t *work, const kv_row_sum_t *sum)
{
    const kv_step_t *step = work->group.step;
    kv_weight_t weight;
    KV_TRY(kv_work_weight(work, &weight));
    kv_host_update_rows(work->host, step, &weight, sum, NULL,
                        kv_optim_is_lazy(step->optim, &step->numbers, false));
    return KV_OK;
}

kv_status_t kv_work_push_rows(const kv_work_t *work)
{
    kv_entry_t *entry = work->group.entry;
    kv_row_sum_t sum;
    KV_TRY(kv_work_sum_rows(work, &sum));
    kv_status_t status = KV_OK;
    if (work->group.step != NULL) {
        status = entry->sparse ? kv_rows_step(work->host, work->group.step, work->group.slots, &sum,
                                              &entry->rows)
                               : update_dense(work, &sum);
    } else if (entry->sparse) {
        status = kv_rowset_make(&entry->rows, sum.num_rows, entry->row_bytes);
        if (status == KV_OK && sum.num_rows > 0)
            kv_rows_write(work->host, &sum, entry->rows.indices->data, entry->rows.data->data);
    } else {
        void *stored = entry->stored->data;
        kv_rows_to_dense(work->host, &sum, kv_entry_num_rows(entry), 1, &stored);
    }
    kv_row_sum_fini(&sum);
    return status;
}

kv_status_t kv_work_merge_rows(const kv_work_t *work)
{
    kv_entry_t *entry = work->group.entry;
    kv_row_sum_t sum;
    KV_TRY(kv_work_sum_rows(work, &sum));
    kv_status_t status = kv_rowset_make(&entry->merged_rows, sum.num_rows, entry->row_bytes);
    if (status == KV_OK && sum.num_rows > 0)
        kv_rows_write(work->host, &sum, entry->merged_rows.indices->data,
                      entry->merged_rows.data->data);
    kv_row_sum_fini(&sum);
    return status;
}

/* ---------------------------------------------------------------------------------- pulls */

/* The rows `ids` of the stored value, zeros where it has none. */
static kv_status_t pull_ids(const kv_work_t *work, const kv_row_ids_t *ids, kv_rowset_t *out)
{
    const kv_entry_t *entry = work->group.entry;
    KV_TRY(kv_rowset_make(out, ids->count, entry->row_bytes));
    if (ids->count == 0)
        return KV_OK;
    memcpy(out->indices->data, ids->ids->data, (size_t)ids->count * sizeof(int64_t));
    if (work->stored == NULL)
        kv_rows_select(work->host, entry->row_bytes, work->rows, ids->count, ids->ids->data,
                       out->data->data);
    else
        kv_rows_gather(work->host, entry->row_bytes, ids->count, ids->ids->data, work->stored,
                       out->data->data);
    return KV_OK;
}

/* The rows of a dense value with an element that is not zero. */
static kv_status_t pull_nonzero(const kv_work_t *work, kv_rowset_t *out)
{
    const kv_entry_t *entry = work->group.entry;
    int64_t num_rows = entry->shape[0];
    kv_row_ids_t found = {0};
    KV_TRY(kv_buffer_new((size_t)num_rows * sizeof(int64_t), &found.ids));
    found.count = kv_rows_nonzero(work->host, entry->dtype, num_rows, entry->row_count,
                                  work->stored, found.ids->data);
    kv_status_t status = pull_ids(work, &found, out);
    kv_buffer_rele(found.ids);
    return status;
}

/* All stored rows of a row-sparse value. */
static kv_status_t pull_all(const kv_work_t *work, kv_rowset_t *out)
{
    kv_row_ids_t all = {work->rows->indices, work->rows->num_rows};
    return pull_ids(work, &all, out);
}

/* The dense outs of a row-sparse value. */
static kv_status_t pull_dense(const kv_work_t *work)
{
    const kv_entry_t *entry = work->group.entry;
    const kv_rowset_t *set = work->rows;
    void **destinations = (void **)work->pointers;
    int32_t count = 0, strided = 0;
    for (int32_t i = 0; i < work->group.num_outs; i++) {
        const kv_view_t *out = &work->group.outs[i];
        if (out->sparse == NULL && out->strides == NULL)
            destinations[count++] = out->data;
        strided += out->strides != NULL;
    }
    kv_buffer_t *dense = NULL;
    if (strided > 0) {
        KV_TRY(kv_buffer_new(entry->bytes, &dense));
        destinations[count++] = dense->data;
    }
    if (count > 0 && entry->bytes > 0) {
        kv_row_sum_t sum;
        kv_status_t status =
            kv_row_sum_init(work->host, entry->dtype, entry->row_count, 1, &set, &sum);
        if (status != KV_OK) {
            kv_buffer_rele(dense);
            return status;
        }
        kv_rows_to_dense(work->host, &sum, entry->shape[0], count, destinations);
        kv_row_sum_fini(&sum);
    }
    for (int32_t i = 0; strided > 0 && i < work->group.num_outs; i++)
        if (work->group.outs[i].strides != NULL)
            kv_view_scatter(&work->group.outs[i], dense->data);
    kv_buffer_rele(dense);
    return KV_OK;
}

kv_status_t kv_work_pull_rows(const kv_work_t *work)
{
    const kv_entry_t *entry = work->group.entry;
    for (int32_t i = 0; i < work->group.num_outs; i++) {
        kv_sparse_t *out = work->group.outs[i].sparse;
        if (out == NULL)
            continue;
        if (work->group.row_ids != NULL)
            KV_TRY(pull_ids(work, &work->group.row_ids[i], &out->rows));
        else if (entry->sparse)
            KV_TRY(pull_all(work, &out->rows));
        else
            KV_TRY(pull_nonzero(work, &out->rows));
    }
    return entry->sparse ? pull_dense(work) : KV_OK;
}
