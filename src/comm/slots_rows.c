/* Steps on row-sparse values, and state that has the rows of its value.
 *
 * The rows of a row-sparse value are sorted. A step with a row that the value has not makes room
 * for it in the value and in all of the state, copying what is there; once all rows that matter are
 * there, steps work in place.
 */
#include "base/memory.h"
#include "comm/slots.h"

#include <string.h>

/* Rows of a buffer and where they stand. */
typedef struct placed {
    int64_t num_rows;
    const int64_t *ids;
    char *data;
} placed_t;

/* The rows that both have. */
static void copy_common(const placed_t *from, const placed_t *to, size_t row_bytes)
{
    for (int64_t i = 0, j = 0; i < from->num_rows && j < to->num_rows;) {
        if (from->ids[i] == to->ids[j])
            memcpy(to->data + (size_t)j * row_bytes, from->data + (size_t)i * row_bytes, row_bytes);
        int64_t id = from->ids[i];
        i += id <= to->ids[j];
        j += to->ids[j] <= id;
    }
}

/* The union of the stored ids and `ids`. */
static void merge_ids(const kv_rowset_t *stored, int64_t num_ids, const int64_t *ids, int64_t *all)
{
    const int64_t *old = kv_rowset_ids(stored);
    int64_t i = 0, j = 0, n = 0;
    while (i < stored->num_rows || j < num_ids) {
        bool from_old = j == num_ids || (i < stored->num_rows && old[i] <= ids[j]);
        int64_t id = from_old ? old[i] : ids[j];
        if (j < num_ids && ids[j] == id)
            j++;
        i += from_old;
        all[n++] = id;
    }
}

/* Lays the state out for the rows of `rows`: those that it has keep theirs, the others begin. */
static kv_status_t lay_out(const kv_host_t *host, kv_slots_t *slots, kv_dtype_t dtype,
                           int64_t row_count, const kv_rowset_t *rows)
{
    enum { MASTER = KV_MAX_SLOTS, BUFFERS };
    size_t wide = kv_dtype_bytes(kv_dtype_wide(dtype));
    kv_buffer_t *fresh[BUFFERS] = {NULL};
    kv_status_t status = KV_OK;
    for (int i = 0; i < BUFFERS && status == KV_OK; i++) {
        kv_buffer_t *old = i == MASTER ? slots->master : slots->slot[i];
        kv_slot_t kept = i == MASTER ? (kv_slot_t){.from_weight = true} : slots->kept[i];
        if (old == NULL)
            continue;
        status = kv_slot_make(host, dtype, kv_slot_count(&kept, rows->num_rows, row_count),
                              kept.from_weight ? kv_rowset_data(rows) : NULL, &fresh[i]);
        if (status == KV_OK && slots->num_rows > 0)
            copy_common(&(placed_t){slots->num_rows, slots->indices->data, old->data},
                        &(placed_t){rows->num_rows, kv_rowset_ids(rows), fresh[i]->data},
                        wide * (size_t)kv_slot_count(&kept, 1, row_count));
    }
    for (int i = 0; i < BUFFERS; i++) {
        kv_buffer_t **kept = i == MASTER ? &slots->master : &slots->slot[i], *gone = fresh[i];
        if (status == KV_OK && fresh[i] != NULL) {
            gone = *kept;
            *kept = fresh[i];
        }
        kv_buffer_rele(gone);
    }
    if (status != KV_OK)
        return status;
    kv_buffer_rele(slots->indices);
    slots->indices = rows->indices != NULL ? kv_buffer_hold(rows->indices) : NULL;
    slots->num_rows = rows->num_rows;
    return KV_OK;
}

kv_status_t kv_slots_fit(const kv_host_t *host, kv_slots_t *slots, kv_dtype_t dtype,
                         int64_t row_count, const kv_rowset_t *rows)
{
    /* Nobody writes into indices of which there are two shares. */
    bool fit = slots->indices == rows->indices && slots->num_rows == rows->num_rows;
    return fit ? KV_OK : lay_out(host, slots, dtype, row_count, rows);
}

/* Makes room for the rows of the sum, `missing` of which are not there, in the value and in all
 * state. */
static kv_status_t insert_rows(const kv_host_t *host, kv_slots_t *slots, const kv_row_sum_t *sum,
                               int64_t missing, kv_rowset_t *rows)
{
    kv_rowset_t all = {.num_rows = rows->num_rows + missing};
    size_t count = (size_t)all.num_rows;
    kv_status_t status = kv_buffer_new(count * sizeof(int64_t), &all.indices);
    if (status == KV_OK)
        status = kv_buffer_new_zero(count * sum->row_bytes, &all.data);
    if (status == KV_OK) {
        merge_ids(rows, sum->num_rows, sum->ids, all.indices->data);
        copy_common(&(placed_t){rows->num_rows, kv_rowset_ids(rows), kv_rowset_data(rows)},
                    &(placed_t){all.num_rows, all.indices->data, all.data->data}, sum->row_bytes);
        status = lay_out(host, slots, sum->dtype, sum->row_count, &all);
    }
    if (status != KV_OK) {
        kv_rowset_fini(&all);
        return status;
    }
    kv_rowset_fini(rows);
    *rows = all;
    return KV_OK;
}

kv_status_t kv_rows_begin(const kv_host_t *host, const kv_step_t *step, kv_slots_t *slots,
                          const kv_row_sum_t *sum, kv_rowset_t *rows, kv_weight_t *weight,
                          int64_t **out)
{
    int64_t *where = kv_alloc((size_t)sum->num_rows * sizeof *where);
    KV_TRY_ALLOC(where, "the places of rows");
    kv_status_t status = KV_OK;
    int64_t missing = kv_rows_locate(rows, sum->num_rows, sum->ids, where);
    if (missing > 0) {
        status = insert_rows(host, slots, sum, missing, rows);
        if (status == KV_OK)
            kv_rows_locate(rows, sum->num_rows, sum->ids, where);
    }
    if (status == KV_OK)
        status = kv_slots_fit(host, slots, sum->dtype, sum->row_count, rows);
    if (status == KV_OK)
        status = kv_slots_weight(slots, host, step, sum->dtype, rows->num_rows, sum->row_count,
                                 kv_rowset_data(rows), weight);
    if (status == KV_OK)
        *out = where;
    else
        kv_free(where);
    return status;
}

kv_status_t kv_rows_step(const kv_host_t *host, const kv_step_t *step, kv_slots_t *slots,
                         const kv_row_sum_t *sum, kv_rowset_t *rows)
{
    kv_weight_t weight;
    int64_t *where;
    KV_TRY(kv_rows_begin(host, step, slots, sum, rows, &weight, &where));
    kv_host_update_rows(host, step, &weight, sum, where,
                        kv_optim_is_lazy(step->optim, &step->numbers, true));
    kv_free(where);
    return KV_OK;
}
