/* Work on the keys of one device: brought there, put in order on one lane, launched, and delivered
 * to outs elsewhere.
 */
#include "base/memory.h"
#include "store/device.h"

#include <string.h>

/* ---------------------------------------------------------------------------------- order */

static kv_status_t add_lane(kv_batch_t *batch, const kv_view_t *view)
{
    kv_lane_t lane = kv_view_lane(view);
    batch->waits = batch->waits || !(view->flags & KV_VIEW_FOLLOWS);
    if (kv_lane_same(lane, batch->on.lane))
        return KV_OK;
    for (int i = 0; i < batch->num_others; i++)
        if (kv_lane_same(lane, batch->others[i]))
            return KV_OK;
    if (batch->num_others == KV_BATCH_LANES)
        return kv_fail(KV_INVALID, "the arrays of a call are on more than %d streams",
                       KV_BATCH_LANES);
    KV_TRY(kv_lane_join(lane, batch->on.lane));
    batch->others[batch->num_others++] = lane;
    return KV_OK;
}

static kv_status_t add_lanes(kv_batch_t *batch)
{
    for (int64_t u = 0; u < batch->num_units; u++) {
        const kv_group_t *group = &batch->units[u].work->group;
        for (int32_t i = 0; i < group->num_values; i++)
            if (kv_view_is_cuda(&group->values[i]))
                KV_TRY(add_lane(batch, &group->values[i]));
        for (int32_t i = 0; i < group->num_outs; i++)
            if (kv_view_is_cuda(&group->outs[i]))
                KV_TRY(add_lane(batch, &group->outs[i]));
    }
    return KV_OK;
}

/* The stream of the first array on the device, else the device's own. */
static kv_status_t choose_lane(const kv_unit_t *units, int64_t num_units, int device,
                               kv_lane_t *out)
{
    for (int64_t u = 0; u < num_units; u++) {
        const kv_group_t *group = &units[u].work->group;
        for (int32_t i = 0; i < group->num_values + group->num_outs; i++) {
            const kv_view_t *view =
                i < group->num_values ? &group->values[i] : &group->outs[i - group->num_values];
            if (kv_view_is_cuda(view) && view->device == device) {
                *out = kv_view_lane(view);
                return KV_OK;
            }
        }
    }
    return kv_lane_own(device, out);
}

/* -------------------------------------------------------------------------------- preparing */

/* Brings the target to the device, or makes it there: what an updater gets has no contents. */
static kv_status_t place_target(kv_batch_t *batch, kv_unit_t *unit)
{
    kv_entry_t *entry = unit->work->group.entry;
    kv_place_t *made = NULL;
    unit->place = entry->stored != NULL ? kv_buffer_place(entry->stored) : NULL;
    if (unit->place == NULL) {
        KV_TRY(kv_place_new(batch->on.lane.device, &made));
        unit->place = made;
    } else {
        kv_place_hold(unit->place);
    }
    KV_TRY(kv_place_begin(unit->place, batch->on.lane, &unit->after));
    unit->begun = true;
    if (entry->stored == NULL) /* its first value */
        KV_TRY(kv_device_buffer_new(unit->place, batch->on.lane, entry->bytes, &entry->stored));
    KV_TRY(kv_device_take(&batch->on, unit->place, &entry->stored));
    if (unit->target == &entry->stored ||
        (*unit->target != NULL && kv_buffer_place(*unit->target) == unit->place))
        return KV_OK;
    kv_buffer_t *fresh;
    KV_TRY(kv_device_buffer_new(unit->place, batch->on.lane, entry->bytes, &fresh));
    kv_buffer_rele(*unit->target);
    *unit->target = fresh;
    return KV_OK;
}

static kv_status_t bring_values(kv_batch_t *batch, kv_unit_t *unit)
{
    const kv_group_t *group = &unit->work->group;
    int device = batch->on.lane.device;
    for (int32_t i = 0; i < group->num_values; i++) {
        const kv_view_t *value = &group->values[i];
        void *here = value->data;
        if (!kv_view_is_cuda(value)) {
            KV_TRY(kv_device_temp(&batch->on, group->entry->bytes, &here));
            KV_TRY(kv_device_upload_view(&batch->on, value, here));
        } else if (value->device != device) {
            /* Not read across: the memory of other libraries need not be open to peers. */
            KV_TRY(kv_device_temp(&batch->on, group->entry->bytes, &here));
            KV_TRY(kv_device_copy(&batch->on, value->device, value->data, device, here,
                                  group->entry->bytes));
        }
        unit->src[i] = here;
    }
    return KV_OK;
}

static kv_status_t bring_residuals(kv_batch_t *batch, kv_unit_t *unit)
{
    const kv_work_t *work = unit->work;
    kv_entry_t *entry = work->group.entry;
    kv_residuals_t *residuals = &entry->residuals;
    size_t bytes = (size_t)entry->count * kv_dtype_bytes(kv_dtype_wide(entry->dtype));
    if (residuals->epoch != work->codec_epoch)
        kv_residuals_fini(residuals);
    residuals->epoch = work->codec_epoch;
    KV_TRY(kv_residuals_grow(residuals, work->group.num_values));
    for (int32_t i = 0; i < work->group.num_values; i++) {
        kv_buffer_t **residual = &residuals->buffers[i];
        if (*residual == NULL) {
            kv_buffer_t *made;
            KV_TRY(kv_device_buffer_new(unit->place, batch->on.lane, bytes, &made));
            kv_status_t status =
                KV_DEVICE_DO(&batch->on, zero, batch->on.lane.stream, (int64_t)bytes, made->data);
            if (status != KV_OK) {
                kv_buffer_rele(made);
                return status;
            }
            *residual = made;
        } else {
            KV_TRY(kv_device_take(&batch->on, unit->place, residual));
        }
        unit->residuals[i] = (*residual)->data;
        KV_TRY(kv_device_temp(&batch->on, (size_t)kv_codec_bytes(work->codec.type, entry->count),
                              &unit->codes[i]));
    }
    return KV_OK;
}

/* Everything that can fail for want of memory. */
static kv_status_t prepare(kv_batch_t *batch, kv_unit_t *unit)
{
    const kv_work_t *work = unit->work;
    kv_entry_t *entry = work->group.entry;
    KV_TRY(place_target(batch, unit));
    if (work->push) {
        KV_TRY(bring_values(batch, unit));
        unit->dst[unit->num_dst++] = (*unit->target)->data;
    }
    for (int32_t i = 0; i < work->group.num_outs && unit->num_dst < KV_DEVICE_OUTPUTS; i++)
        if (kv_view_is_cuda(&work->group.outs[i]) &&
            work->group.outs[i].device == batch->on.lane.device)
            unit->dst[unit->num_dst++] = work->group.outs[i].data;
    if (kv_unit_codes(unit))
        KV_TRY(bring_residuals(batch, unit));
    if (!kv_unit_steps(unit))
        return KV_OK;
    size_t wide = (size_t)entry->count * kv_dtype_bytes(kv_dtype_wide(entry->dtype));
    KV_TRY(kv_device_weight(&batch->on, unit->place, work->group.slots, work->group.step,
                            entry->dtype, kv_entry_num_rows(entry), entry->row_count,
                            entry->stored->data, &unit->weight));
    if (kv_unit_codes(unit))
        KV_TRY(kv_device_temp(&batch->on, wide, &unit->sum));
    kv_pass_init(&unit->pass, work->group.step, entry->dtype == KV_FLOAT64, 0);
    if (unit->pass.norms == KV_NORMS_DIRECTION)
        KV_TRY(kv_device_temp(&batch->on, wide, &unit->direction));
    if (unit->pass.norms == KV_NORMS_NONE)
        return KV_OK;
    KV_TRY(kv_device_temp(&batch->on,
                          KV_BATCH_NORMS * sizeof(double) * (size_t)kv_device_room(entry->count),
                          &unit->rooms));
    return kv_device_pinned(&batch->on, KV_BATCH_NORMS * sizeof(double), &unit->norms);
}

/* ------------------------------------------------------------------------------- delivering */

static int32_t count_host(const kv_group_t *group)
{
    int32_t count = 0;
    for (int32_t i = 0; i < group->num_outs; i++)
        count += !kv_view_is_cuda(&group->outs[i]);
    return count;
}

/* What the launches have not written: outs on other devices, and what outs in host memory get. */
static kv_status_t send_out(kv_batch_t *batch, kv_unit_t *unit)
{
    const kv_group_t *group = &unit->work->group;
    const kv_buffer_t *stored = group->entry->stored;
    int device = batch->on.lane.device, written = unit->num_dst - unit->work->push;
    for (int32_t i = 0; i < group->num_outs; i++) {
        const kv_view_t *out = &group->outs[i];
        if (kv_view_is_cuda(out) && (out->device != device || written-- <= 0))
            KV_TRY(kv_device_copy(&batch->on, device, stored->data, out->device, out->data,
                                  stored->bytes));
    }
    if (count_host(group) == 0 || unit->target != &group->entry->stored)
        return KV_OK;
    if (stored->bytes == 0)
        return kv_buffer_new(0, &unit->arrived);
    kv_buffer_t *arrived;
    KV_TRY(kv_device_download(&batch->on, stored->data, stored->bytes, &arrived));
    unit->arrived = kv_buffer_hold(arrived);
    return KV_OK;
}

kv_status_t kv_deliver_here(kv_work_t work, const void *stored)
{
    kv_view_t *outs = NULL;
    int32_t count = count_host(&work.group), taken = 0;
    if (count == 0)
        return KV_OK;
    if (count < work.group.num_outs) {
        outs = kv_alloc((size_t)count * sizeof *outs);
        KV_TRY_ALLOC(outs, "the outs of a call");
        for (int32_t i = 0; i < work.group.num_outs; i++)
            if (!kv_view_is_cuda(&work.group.outs[i]))
                outs[taken++] = work.group.outs[i];
        work.group.outs = outs;
        work.group.num_outs = count;
    }
    work.stored = stored;
    kv_status_t status = kv_work_copy_out(&work);
    kv_free(outs);
    return status;
}

/* ----------------------------------------------------------------------------------- a batch */

static void drop_hold(void *what)
{
    kv_hold_t *hold = what;
    if (atomic_fetch_sub(&hold->refs, 1) == 1)
        hold->release(hold);
}

void kv_hold_until(kv_hold_t *hold, kv_mark_t *mark)
{
    if (hold == NULL)
        return;
    atomic_fetch_add(&hold->refs, 1);
    kv_mark_keep(mark, drop_hold, hold);
}

/* A residual that is not finite is told of by a later call, once it is known. */
typedef struct note {
    kv_entry_t *entry;
    kv_buffer_t *counts;
    int64_t unit;
} note_t;

static void look_at_note(void *what)
{
    note_t *note = what;
    kv_entry_note_not_finite(note->entry, ((const int64_t *)note->counts->data)[note->unit]);
    kv_buffer_rele(note->counts);
    kv_var_unpin(&note->entry->var);
    kv_free(note);
}

static void take_notes(const kv_batch_t *batch, kv_mark_t *mark)
{
    for (int64_t u = 0; batch->unfinite != NULL && u < batch->num_units; u++) {
        kv_entry_t *entry = batch->units[u].work->group.entry;
        note_t *note = kv_unit_codes(&batch->units[u]) ? kv_alloc(sizeof *note) : NULL;
        if (note == NULL)
            continue;
        *note = (note_t){.entry = entry, .counts = kv_buffer_hold(batch->unfinite), .unit = u};
        kv_var_pin(&entry->var);
        kv_mark_keep(mark, look_at_note, note);
    }
}

/* Everything is on the lane: later work on keys and arrays comes behind it, and the arrays are kept
 * until it is done. */
static kv_status_t close_order(kv_batch_t *batch, kv_mark_t *mark)
{
    kv_status_t status = KV_OK;
    for (int64_t u = 0; u < batch->num_units; u++) {
        kv_unit_t *unit = &batch->units[u];
        kv_status_t ended =
            unit->begun ? kv_place_end(unit->place, batch->on.lane, mark, unit->after) : KV_OK;
        unit->after = NULL;
        status = status == KV_OK ? ended : status;
    }
    for (int i = 0; i < batch->num_others; i++) {
        kv_status_t behind = kv_mark_before(mark, batch->others[i]);
        status = status == KV_OK ? behind : status;
    }
    kv_hold_until(batch->units[0].work->hold, mark);
    take_notes(batch, mark);
    return status;
}

static kv_status_t fill(kv_batch_t *batch, bool *launched)
{
    KV_TRY(add_lanes(batch));
    for (int64_t u = 0; u < batch->num_units; u++)
        KV_TRY(prepare(batch, &batch->units[u]));
    *launched = true;
    KV_TRY(kv_batch_launch(batch));
    for (int64_t u = 0; u < batch->num_units; u++)
        KV_TRY(send_out(batch, &batch->units[u]));
    return KV_OK;
}

/* All units on one device. */
static kv_status_t run(kv_batch_t *batch, kv_lane_t lane, bool *launched)
{
    kv_mark_t *mark = NULL;
    bool waits = false;
    KV_TRY(kv_device_work_begin(&batch->on, lane));
    kv_status_t status = fill(batch, launched);
    kv_status_t ended = kv_device_work_end(&batch->on, &mark);
    if (ended == KV_OK)
        ended = close_order(batch, mark);
    else if (batch->units[0].work->hold != NULL) /* for ever: nobody can tell when they may go */
        atomic_fetch_add(&batch->units[0].work->hold->refs, 1);
    for (int64_t u = 0; u < batch->num_units; u++)
        waits = waits || batch->units[u].arrived != NULL;
    if (status == KV_OK)
        status = ended;
    if (mark != NULL && (batch->waits || waits)) {
        kv_status_t waited = kv_mark_wait(mark, batch->caller);
        status = status == KV_OK ? waited : status;
    }
    for (int64_t u = 0; u < batch->num_units; u++) {
        kv_unit_t *unit = &batch->units[u];
        if (status == KV_OK && unit->arrived != NULL)
            status = kv_deliver_here(*unit->work, unit->arrived->data);
        kv_buffer_rele(unit->arrived);
        kv_mark_rele(unit->after);
        kv_place_rele(unit->place);
    }
    kv_buffer_rele(batch->unfinite);
    kv_mark_rele(mark);
    return status;
}

/* Memory for the lists of all units, in one block. */
static kv_status_t make_units(kv_batch_t *batch, const kv_work_t *const *works, int64_t count,
                              kv_buffer_t **target, void **block)
{
    size_t values = 0, outs = 0;
    for (int64_t u = 0; u < count; u++) {
        values += (size_t)works[u]->group.num_values;
        outs += (size_t)works[u]->group.num_outs + 1;
    }
    size_t jobs = values > (size_t)count ? values : (size_t)count;
    size_t pointers = 3 * values + outs;
    char *next = *block =
        kv_calloc(1, jobs * sizeof(kv_device_job_t) + (size_t)count * sizeof(kv_unit_t) +
                         values * sizeof(kv_device_coded_t) + pointers * sizeof(void *));
    KV_TRY_ALLOC(*block, "work on a device");
    batch->jobs = next;
    batch->units = (kv_unit_t *)(next += jobs * sizeof(kv_device_job_t));
    kv_device_coded_t *coded = (kv_device_coded_t *)(next += (size_t)count * sizeof(kv_unit_t));
    void **list = (void **)(next + values * sizeof(kv_device_coded_t));
    for (int64_t u = 0; u < count; u++) {
        kv_unit_t *unit = &batch->units[u];
        int32_t num_values = works[u]->group.num_values;
        unit->work = works[u];
        unit->target = target != NULL ? target : &works[u]->group.entry->stored;
        unit->src = (const void **)list;
        unit->codes = list + num_values;
        unit->residuals = unit->codes + num_values;
        unit->dst = unit->residuals + num_values;
        list = unit->dst + works[u]->group.num_outs + 1;
        unit->coded = coded;
        coded += num_values;
    }
    batch->num_units = count;
    return KV_OK;
}

kv_status_t kv_batch_run(const kv_work_t *const *works, int64_t count, int device,
                         kv_buffer_t **target, bool *launched)
{
    kv_batch_t batch = {.caller = works[0]->caller};
    kv_lane_t lane;
    void *block = NULL;
    const kv_device_api_t *api;
    KV_TRY(kv_device_enter(&api)); /* once for all that follows */
    kv_status_t status = make_units(&batch, works, count, target, &block);
    if (status == KV_OK)
        status = choose_lane(batch.units, count, device, &lane);
    if (status == KV_OK)
        status = run(&batch, lane, launched);
    kv_free(block);
    kv_device_leave();
    return status;
}
