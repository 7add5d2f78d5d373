/* One key of a call of a dist store: what goes out of its values, and where its answer goes.
 *
 * Values that come from devices are not there yet when the call begins. So all memory is taken
 * first, which may fail, and the numbers are made later, which cannot.
 */
#include "base/memory.h"
#include "store/dist.h"

enum { NAME_BYTES = 96 };

void kv_target_fini(kv_target_t *target)
{
    kv_free(target->merging);
    kv_buffer_rele(target->sent);
    kv_buffer_rele(target->arrived);
    kv_dist_rows_fini(&target->rows, target->entry, target->num_outs);
    kv_var_unpin(&target->entry->var);
}

bool kv_target_is_plain(const kv_target_t *target)
{
    return target->sent == NULL;
}

static kv_group_t group_of(const kv_target_t *target)
{
    return (kv_group_t){.entry = target->entry,
                        .num_values = target->num_values,
                        .num_outs = target->num_outs,
                        .values = target->values,
                        .outs = target->outs};
}

/* Room for the sum of the values of a key, or its only one without strides. */
static kv_status_t prepare_merge(kv_target_t *target)
{
    kv_entry_t *entry = target->entry;
    const kv_group_t group = group_of(target);
    /* What an earlier push has sent from may still be on its way. */
    if (entry->merged != NULL && atomic_load(&entry->merged->refs) > 1) {
        kv_buffer_rele(entry->merged);
        entry->merged = NULL;
    }
    if (entry->merged == NULL)
        KV_TRY(kv_buffer_new(entry->bytes, &entry->merged));
    target->merging = kv_alloc_elements(kv_work_staging(&group) +
                                        (size_t)kv_work_pointers(&group) * sizeof(void *));
    KV_TRY_ALLOC(target->merging, "merging the values of a key");
    target->sent = kv_buffer_hold(entry->merged);
    target->plain = target->sent->data;
    return KV_OK;
}

static void merge(const kv_request_t *request, kv_target_t *target)
{
    const kv_group_t group = group_of(target);
    kv_work_t work = {.host = &request->host,
                      .group = group,
                      .pointers = (const void **)(target->merging + kv_work_staging(&group)),
                      .staging = target->merging};
    kv_work_add_up(&work, target->entry->merged->data);
    kv_free(target->merging);
    target->merging = NULL;
}

/* What is to go out will become its codes. */
static kv_status_t prepare_codes(const kv_request_t *request, kv_target_t *target)
{
    kv_entry_t *entry = target->entry;
    kv_work_t work = {.group = {.entry = entry, .num_values = 1},
                      .codec_epoch = request->codec_epoch};
    kv_buffer_t *codes;
    KV_TRY(kv_work_residuals(&work, &target->residual));
    KV_TRY(kv_pool_get(kv_client_pool(request->client),
                       kv_remote_coded_bytes(entry->remote, request->codec.type), &codes));
    kv_buffer_rele(target->sent); /* their sum is the key's, which is held */
    target->sent = codes;
    return KV_OK;
}

/* Also of no elements, whose array may have no memory: NULL would mean no array. */
static void *place_of(const kv_view_t *view)
{
    static char nothing;
    return view->data != NULL ? view->data : &nothing;
}

static kv_status_t prepare_values(kv_request_t *request, kv_target_t *target,
                                  kv_client_part_t *part)
{
    const kv_group_t group = group_of(target);
    if (target->num_values == 0)
        return KV_OK;
    if (target->values[0].sparse != NULL)
        return kv_dist_rows_send(&target->rows, &request->host, &group, part);
    if (target->num_values == 1 && target->values[0].strides == NULL)
        target->plain = place_of(&target->values[0]);
    else
        KV_TRY(prepare_merge(target));
    part->value = target->plain;
    if (request->codec.type == KV_CODEC_NONE || !kv_dtype_is_floating(target->entry->dtype))
        return KV_OK;
    KV_TRY(prepare_codes(request, target));
    part->value = target->sent->data;
    part->codec = request->codec.type;
    return KV_OK;
}

kv_status_t kv_target_prepare(kv_request_t *request, int64_t i)
{
    kv_target_t *target = &request->targets[i];
    kv_client_part_t *part = &request->parts[i];
    if (target->entry->deleted) {
        char name[NAME_BYTES];
        return kv_fail(KV_NO_KEY, "key %s was deleted before this call came to its turn",
                       kv_name_format(&target->entry->name, name, sizeof name));
    }
    *part = (kv_client_part_t){.remote = target->entry->remote,
                               .step = request->steps != NULL ? &request->steps[i] : NULL};
    KV_TRY(prepare_values(request, target, part));
    const kv_group_t group = group_of(target);
    if (target->num_outs > 0 && (target->entry->sparse || target->rows.row_ids != NULL)) {
        KV_TRY(kv_dist_rows_ask(&target->rows, &request->host, &group, part));
    } else if (target->num_outs > 0 && target->outs[0].strides == NULL &&
               target->outs[0].sparse == NULL) {
        part->out = place_of(&target->outs[0]);
    } else if (target->num_outs > 0) {
        KV_TRY(
            kv_pool_get(kv_client_pool(request->client), target->entry->bytes, &target->arrived));
        part->out = target->arrived->data;
    }
    return KV_OK;
}

void kv_target_fill(kv_request_t *request, int64_t i)
{
    kv_target_t *target = &request->targets[i];
    if (target->merging != NULL)
        merge(request, target);
    if (target->residual == NULL)
        return;
    kv_entry_note_not_finite(target->entry, kv_remote_encode(target->entry->remote, &request->host,
                                                             &request->codec, target->plain,
                                                             target->residual, target->sent->data));
    target->residual = NULL;
}
