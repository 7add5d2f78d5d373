/* What a call does to one key while it holds the key and the arrays.
 *
 * The sum of dense values goes to the stored value, through the optimizer if there is one, and to
 * the outs in one pass over memory. Strided values are staged first, strided outs are written from
 * the stored value afterwards. What has to do with row-sparse values is in sparse.c.
 */
#include "base/memory.h"
#include "comm/device_work.h"
#include "store/internal.h"

#include <string.h>

enum { ALIGNMENT = 64, LOCAL_RESIDUALS = 16 };

/* ------------------------------------------------------------------------- sizes of work */

static size_t aligned(size_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

size_t kv_work_staging(const kv_group_t *group)
{
    size_t each = aligned(group->entry->bytes), total = 0;
    for (int32_t i = 0; i < group->num_values; i++)
        if (group->values[i].strides != NULL)
            total += each;
    return total;
}

int32_t kv_work_pointers(const kv_group_t *group)
{
    return group->num_values + group->num_outs + 1;
}

kv_work_t kv_work_of(const kv_host_t *host, const kv_plan_t *plan, const kv_group_t *group,
                     bool push, const void **pointers, char *staging)
{
    bool coded = push && plan->codec.type != KV_CODEC_NONE &&
                 kv_dtype_is_floating(group->entry->dtype) && group->values[0].sparse == NULL;
    return (kv_work_t){.host = host,
                       .group = *group,
                       .push = push,
                       .codec = coded ? plan->codec : (kv_codec_t){0},
                       .codec_epoch = plan->codec_epoch,
                       .stored = group->entry->sparse ? NULL : group->entry->stored->data,
                       .rows = &group->entry->rows,
                       .pointers = pointers,
                       .staging = staging};
}

/* ------------------------------------------------------------------------------ the arrays */

/* Puts where the values' elements are, staged where strided, into pointers[0 .. num_values). */
static void gather_values(const kv_work_t *work)
{
    char *staging = work->staging;
    size_t each = aligned(work->group.entry->bytes);
    for (int32_t i = 0; i < work->group.num_values; i++) {
        const kv_view_t *value = &work->group.values[i];
        work->pointers[i] = value->data;
        if (value->strides != NULL) {
            kv_view_gather(value, staging);
            work->pointers[i] = staging;
            staging += each;
        }
    }
}

/* Adds the contiguous dense outs to `destinations`, returns how many. */
static int32_t contiguous_outs(const kv_group_t *group, void **destinations)
{
    int32_t count = 0;
    for (int32_t i = 0; i < group->num_outs; i++)
        if (group->outs[i].strides == NULL && group->outs[i].sparse == NULL)
            destinations[count++] = group->outs[i].data;
    return count;
}

static void scatter_outs(const kv_group_t *group, const void *contents)
{
    for (int32_t i = 0; i < group->num_outs; i++)
        if (group->outs[i].strides != NULL)
            kv_view_scatter(&group->outs[i], contents);
}

static void copy_dense(const kv_work_t *work, const void *contents)
{
    const kv_entry_t *entry = work->group.entry;
    void **destinations = (void **)work->pointers;
    int32_t count = contiguous_outs(&work->group, destinations);
    if (count > 0)
        kv_host_sum(work->host, entry->dtype, entry->count, 1, &contents, count, destinations);
    scatter_outs(&work->group, contents);
}

static bool has_sparse_outs(const kv_group_t *group)
{
    for (int32_t i = 0; i < group->num_outs; i++)
        if (group->outs[i].sparse != NULL)
            return true;
    return false;
}

kv_status_t kv_work_copy_out(const kv_work_t *work)
{
    const kv_entry_t *entry = work->group.entry;
    if (entry->sparse || has_sparse_outs(&work->group))
        KV_TRY(kv_work_pull_rows(work));
    if (!entry->sparse)
        copy_dense(work, work->stored);
    return KV_OK;
}

/* --------------------------------------------------------------------------- compression */

void kv_residuals_fini(kv_residuals_t *residuals)
{
    for (int32_t i = 0; i < residuals->count; i++)
        kv_buffer_rele(residuals->buffers[i]);
    kv_free(residuals->buffers);
    *residuals = (kv_residuals_t){0};
}

kv_status_t kv_residuals_grow(kv_residuals_t *residuals, int32_t count)
{
    if (count <= residuals->count)
        return KV_OK;
    kv_buffer_t **buffers = kv_calloc((size_t)count, sizeof *buffers);
    KV_TRY_ALLOC(buffers, "the residuals of a compressed push");
    if (residuals->count > 0)
        memcpy(buffers, residuals->buffers, (size_t)residuals->count * sizeof *buffers);
    kv_free(residuals->buffers);
    residuals->buffers = buffers;
    residuals->count = count;
    return KV_OK;
}

kv_status_t kv_work_residuals(const kv_work_t *work, void **out)
{
    kv_entry_t *entry = work->group.entry;
    kv_residuals_t *residuals = &entry->residuals;
    size_t wide = kv_dtype_bytes(kv_dtype_wide(entry->dtype));
    if (residuals->epoch != work->codec_epoch)
        kv_residuals_fini(residuals);
    residuals->epoch = work->codec_epoch;
    KV_TRY(kv_residuals_grow(residuals, work->group.num_values));
    for (int32_t i = 0; i < work->group.num_values; i++) {
        if (residuals->buffers[i] == NULL)
            KV_TRY(kv_buffer_new_zero((size_t)entry->count * wide, &residuals->buffers[i]));
        out[i] = residuals->buffers[i]->data;
    }
    return KV_OK;
}

/* ------------------------------------------------------------------------------ the work */

typedef struct inputs {
    kv_gradients_t gradients;
    void *local[LOCAL_RESIDUALS];
    void **residuals;
} inputs_t;

static kv_status_t inputs_init(const kv_work_t *work, inputs_t *inputs)
{
    int32_t num_values = work->group.num_values;
    inputs->residuals = inputs->local;
    inputs->gradients = (kv_gradients_t){.num_src = num_values, .src = work->pointers};
    if (work->codec.type != KV_CODEC_NONE) {
        if (num_values > LOCAL_RESIDUALS) {
            inputs->residuals = kv_alloc((size_t)num_values * sizeof(void *));
            KV_TRY_ALLOC(inputs->residuals, "the residuals of a compressed push");
        }
        kv_status_t status = kv_work_residuals(work, inputs->residuals);
        if (status != KV_OK) {
            if (inputs->residuals != inputs->local)
                kv_free(inputs->residuals);
            return status;
        }
        inputs->gradients.codec = work->codec;
        inputs->gradients.residuals = inputs->residuals;
    }
    gather_values(work);
    return KV_OK;
}

static void inputs_fini(inputs_t *inputs)
{
    if (inputs->residuals != inputs->local)
        kv_free(inputs->residuals);
}

void kv_entry_note_not_finite(kv_entry_t *entry, int64_t count)
{
    int finite = 0;
    if (KV_UNLIKELY(count > 0))
        atomic_compare_exchange_strong(&entry->not_finite, &finite, 1);
}

void kv_work_add_up(const kv_work_t *work, void *sum)
{
    const kv_entry_t *entry = work->group.entry;
    gather_values(work);
    kv_host_sum(work->host, entry->dtype, entry->count, work->group.num_values, work->pointers, 1,
                &sum);
}

/* Dense values into `num_dst` destinations, by way of the codec if there is one. */
static kv_status_t sum_dense(const kv_work_t *work, int num_dst, void *const *dst)
{
    kv_entry_t *entry = work->group.entry;
    inputs_t inputs;
    KV_TRY(inputs_init(work, &inputs));
    if (work->codec.type == KV_CODEC_NONE)
        kv_host_sum(work->host, entry->dtype, entry->count, inputs.gradients.num_src,
                    inputs.gradients.src, num_dst, dst);
    else
        kv_entry_note_not_finite(entry,
                                 kv_host_sum_gradients(work->host, entry->dtype, entry->count,
                                                       &inputs.gradients, num_dst, dst));
    inputs_fini(&inputs);
    return KV_OK;
}

static kv_status_t push_dense(const kv_work_t *work)
{
    kv_entry_t *entry = work->group.entry;
    void **destinations = (void **)work->pointers + work->group.num_values;
    if (work->group.step == NULL) {
        destinations[0] = entry->stored->data;
        int32_t count = 1 + contiguous_outs(&work->group, destinations + 1);
        KV_TRY(sum_dense(work, count, destinations));
    } else {
        inputs_t inputs;
        kv_weight_t weight;
        KV_TRY(kv_work_weight(work, &weight));
        KV_TRY(inputs_init(work, &inputs));
        int32_t count = contiguous_outs(&work->group, destinations);
        kv_entry_note_not_finite(entry, kv_host_update(work->host, work->group.step, &weight,
                                                       &inputs.gradients, count, destinations));
        inputs_fini(&inputs);
    }
    return KV_OK;
}

/* The outs that push_dense has not written. */
static kv_status_t rest_of_outs(const kv_work_t *work)
{
    scatter_outs(&work->group, work->stored);
    return has_sparse_outs(&work->group) ? kv_work_pull_rows(work) : KV_OK;
}

/* What is left on a device of a key that has come home, or of an older state, comes home too. */
static kv_status_t on_host(const kv_work_t *work)
{
    return work->push ? kv_work_bring_home(work) : KV_OK;
}

kv_status_t kv_work_run(kv_work_t *work, bool *delivering)
{
    bool dense = work->push && work->group.values[0].sparse == NULL;
    kv_status_t status = KV_OK;
    *delivering = false;
    if (KV_UNLIKELY(kv_device_used())) {
        if (kv_work_on_device(work))
            return kv_work_run_on_device(work, delivering);
        KV_TRY(on_host(work));
        if (!work->group.entry->sparse)
            work->stored = work->group.entry->stored->data; /* a task was made before */
    }
    if (work->push)
        KV_TRY(dense ? push_dense(work) : kv_work_push_rows(work));
    *delivering = true;
    if (dense)
        status = rest_of_outs(work);
    else if (work->group.num_outs > 0)
        status = kv_work_copy_out(work);
    return status == KV_OK ? KV_OK : kv_work_undelivered(work->push, status);
}

kv_status_t kv_work_undelivered(bool push, kv_status_t status)
{
    if (status == KV_CALLBACK || status == KV_INTERRUPTED)
        return status;
    return kv_fail(status, "%s; %snot all outs were written", kv_status_message(status),
                   push ? "the value was updated, but " : "");
}

kv_status_t kv_work_merge(const kv_work_t *work)
{
    kv_entry_t *entry = work->group.entry;
    if (KV_UNLIKELY(kv_device_used())) {
        kv_entry_drop_twins(entry);
        if (work->group.values[0].flags & KV_VIEW_CUDA)
            return kv_work_merge_on_device(work);
        if (kv_group_brings_cuda(&work->group))
            return kv_work_merge_here(work);
        KV_TRY(kv_work_bring_home(work));
        KV_TRY(kv_buffer_bring_home(&entry->merged, work->caller));
    }
    if (work->group.values[0].sparse != NULL)
        return kv_work_merge_rows(work);
    if (entry->merged == NULL)
        KV_TRY(kv_buffer_new(entry->bytes, &entry->merged));
    void *merged = entry->merged->data;
    return sum_dense(work, 1, &merged);
}

/* ---------------------------------------------------------------------------- the weight */

int64_t kv_entry_num_rows(const kv_entry_t *entry)
{
    if (entry->sparse)
        return entry->rows.num_rows;
    return entry->ndim > 0 ? entry->shape[0] : 1;
}

kv_status_t kv_work_weight(const kv_work_t *work, kv_weight_t *out)
{
    const kv_entry_t *entry = work->group.entry;
    return kv_slots_weight(work->group.slots, work->host, work->group.step, entry->dtype,
                           kv_entry_num_rows(entry), entry->row_count, entry->stored->data, out);
}
