/* The launches of a batch: what is alike of all keys goes out together, so that many small keys
 * take few launches.
 */
#include "store/device.h"

#include <math.h>

/* Runs over the units that have elements and the property. */
#define EACH_UNIT(batch, unit, property)                                                           \
    for (kv_unit_t *unit = (batch)->units; unit < (batch)->units + (batch)->num_units; unit++)     \
        if (unit->work->group.entry->count > 0 && (property))

static kv_dtype_t dtype_of(const kv_unit_t *unit)
{
    return unit->work->group.entry->dtype;
}

/* One call of the table for all jobs. */
#define LAUNCH(batch, function, num_jobs, jobs, ...)                                               \
    ((num_jobs) > 0 ? KV_DEVICE_DO(&(batch)->on, function, (batch)->on.lane.stream, __VA_ARGS__,   \
                                   num_jobs, jobs)                                                 \
                    : KV_OK)

/* --------------------------------------------------------------------------------- codecs */

static kv_status_t encode(kv_batch_t *batch, kv_dtype_t dtype, uint64_t *unfinite)
{
    kv_device_encode_t *jobs = batch->jobs;
    int num_jobs = 0, bits = 0;
    EACH_UNIT(batch, unit, kv_unit_codes(unit) && dtype_of(unit) == dtype)
    {
        const kv_work_t *work = unit->work;
        bits = work->codec.type == KV_CODEC_2BIT ? 2 : 1;
        for (int32_t i = 0; i < work->group.num_values; i++) {
            jobs[num_jobs++] = (kv_device_encode_t){.count = work->group.entry->count,
                                                    .threshold = work->codec.threshold,
                                                    .gradient = unit->src[i],
                                                    .residual = unit->residuals[i],
                                                    .codes = unit->codes[i],
                                                    .unfinite = unfinite + (unit - batch->units)};
            unit->coded[i] = (kv_device_coded_t){
                .data = unit->codes[i], .bits = bits, .threshold = work->codec.threshold};
        }
    }
    return LAUNCH(batch, encode, num_jobs, jobs, dtype, bits);
}

static kv_status_t decode(kv_batch_t *batch, kv_dtype_t dtype, bool for_steps)
{
    kv_device_decode_t *jobs = batch->jobs;
    int num_jobs = 0;
    EACH_UNIT(batch, unit,
              kv_unit_codes(unit) && kv_unit_steps(unit) == for_steps && dtype_of(unit) == dtype)
    {
        jobs[num_jobs++] = (kv_device_decode_t){.count = unit->work->group.entry->count,
                                                .num_src = unit->work->group.num_values,
                                                .num_dst = for_steps ? 1 : unit->num_dst,
                                                .src = unit->coded,
                                                .dst = for_steps ? &unit->sum : unit->dst};
    }
    return LAUNCH(batch, decode, num_jobs, jobs, dtype, for_steps ? kv_dtype_wide(dtype) : dtype);
}

static kv_status_t launch_codecs(kv_batch_t *batch)
{
    bool any = false;
    void *unfinite;
    size_t bytes = (size_t)batch->num_units * sizeof(uint64_t);
    EACH_UNIT(batch, unit, kv_unit_codes(unit)) any = true;
    if (!any)
        return KV_OK;
    KV_TRY(kv_device_temp(&batch->on, bytes, &unfinite));
    KV_TRY(KV_DEVICE_DO(&batch->on, zero, batch->on.lane.stream, (int64_t)bytes, unfinite));
    for (int dtype = KV_FLOAT64; dtype <= KV_BFLOAT16; dtype++) {
        KV_TRY(encode(batch, (kv_dtype_t)dtype, unfinite));
        KV_TRY(decode(batch, (kv_dtype_t)dtype, false));
        KV_TRY(decode(batch, (kv_dtype_t)dtype, true));
    }
    KV_TRY(kv_device_download(&batch->on, unfinite, bytes, &batch->unfinite));
    kv_buffer_hold(batch->unfinite);
    return KV_OK;
}

/* ----------------------------------------------------------------------------------- steps */

static void step_job(const kv_unit_t *unit, kv_device_step_t *job)
{
    const kv_weight_t *weight = &unit->weight;
    const kv_group_t *group = &unit->work->group;
    *job = (kv_device_step_t){.count = weight->count,
                              .weight = weight->data,
                              .master = weight->master,
                              .factors = &unit->pass.factors,
                              .num_src = group->num_values,
                              .src = unit->src,
                              .num_dst = unit->num_dst - 1, /* all but the weight itself */
                              .dst = unit->dst + 1,
                              .row_count = weight->row_count};
    for (int i = 0; i < KV_DEVICE_STATES && i < KV_MAX_SLOTS; i++)
        job->states[i] = weight->slots[i];
    if (unit->sum != NULL) {
        job->wide = true;
        job->num_src = 1;
        job->src = (const void *const *)&unit->sum;
    }
}

/* The squares of weight and gradient, or direction; then the same not rounded, for where those are
 * not finite (comm/update_norms.c). */
static kv_status_t launch_squares(kv_batch_t *batch, kv_unit_t *unit)
{
    const kv_work_t *work = unit->work;
    const kv_weight_t *weight = &unit->weight;
    kv_dtype_t dtype = weight->dtype, other_type = dtype;
    const void *of_weight = weight->data;
    bool rounded = weight->master != NULL && work->group.step->optim->id != KV_OPTIM_LBSGD;
    kv_device_squares_t first = {
        .count = weight->count, .num_src = 1, .src = &of_weight, .batch = 1};
    kv_device_squares_t second = first;
    second.batch = kv_pass_batch(work->group.step);
    second.waiting = second.batch > 1 ? weight->slots[0] : NULL;
    if (unit->direction != NULL || unit->sum != NULL) {
        second.src = (const void *const *)(unit->direction != NULL ? &unit->direction : &unit->sum);
        other_type = kv_dtype_wide(dtype);
    } else {
        second.num_src = work->group.num_values;
        second.src = unit->src;
    }
    int64_t room = kv_device_room(weight->count);
    for (int i = 0; i < KV_BATCH_NORMS; i++) {
        kv_device_squares_t job = i % 2 == 0 ? first : second;
        /* The direction is in the wide type, and LAMB has no second way for it. */
        job.rounded = rounded && (i < 2 || (unit->direction != NULL && i == 2));
        job.room = (double *)unit->rooms + i * room;
        job.out = (double *)unit->norms->data + i;
        KV_TRY(LAUNCH(batch, squares, 1, &job, i % 2 == 0 ? dtype : other_type));
    }
    return KV_OK;
}

/* LAMB makes its moments before. */
static kv_status_t launch_moments(kv_batch_t *batch, kv_unit_t *unit)
{
    kv_device_step_t job;
    step_job(unit, &job);
    job.states[2] = unit->direction;
    return LAUNCH(batch, step, 1, &job, unit->weight.dtype, unit->pass.kind);
}

/* Short waits for the device, not ended by Ctrl-C: LAMB is in the middle of its step. */
static kv_status_t wait_for_norms(kv_batch_t *batch)
{
    kv_mark_t *mark;
    KV_TRY(kv_mark_new(batch->on.lane, &mark));
    bool attached = batch->caller != NULL && !batch->caller->detached;
    if (attached)
        kv_caller_detach(batch->caller);
    kv_status_t status = kv_mark_wait(mark, NULL);
    if (attached)
        kv_caller_attach(batch->caller);
    kv_mark_rele(mark);
    return status;
}

static kv_status_t find_norms(kv_batch_t *batch)
{
    bool any = false;
    EACH_UNIT(batch, unit, kv_unit_steps(unit) && unit->pass.norms != KV_NORMS_NONE)
    {
        any = true;
        if (unit->pass.norms == KV_NORMS_DIRECTION)
            KV_TRY(launch_moments(batch, unit));
        KV_TRY(launch_squares(batch, unit));
    }
    if (!any)
        return KV_OK;
    KV_TRY(wait_for_norms(batch));
    EACH_UNIT(batch, unit, kv_unit_steps(unit) && unit->pass.norms != KV_NORMS_NONE)
    {
        const double *norms = unit->norms->data;
        bool good = isfinite(norms[0] + norms[1]);
        kv_pass_set_norms(&unit->pass, unit->work->group.step, dtype_of(unit) == KV_FLOAT64,
                          good ? norms[0] : norms[2], good ? norms[1] : norms[3]);
    }
    return KV_OK;
}

/* All steps that are alike are one call. */
static kv_status_t launch_alike(kv_batch_t *batch, const kv_unit_t *model)
{
    kv_device_step_t *jobs = batch->jobs;
    int num_jobs = 0;
    kv_dtype_t dtype = dtype_of(model);
    kv_step_kind_t kind = model->pass.kind;
    EACH_UNIT(batch, unit,
              kv_unit_steps(unit) && !unit->pass.idle && !unit->stepped &&
                  dtype_of(unit) == dtype && unit->pass.kind == kind)
    {
        unit->stepped = true;
        step_job(unit, &jobs[num_jobs]);
        if (unit->direction != NULL)
            jobs[num_jobs].num_src = 0; /* it is in the moments */
        num_jobs++;
    }
    return LAUNCH(batch, step, num_jobs, jobs, dtype, kind);
}

static kv_status_t launch_steps(kv_batch_t *batch)
{
    KV_TRY(find_norms(batch));
    EACH_UNIT(batch, unit, kv_unit_steps(unit) && !unit->pass.idle && !unit->stepped)
    KV_TRY(launch_alike(batch, unit));
    return KV_OK;
}

/* ------------------------------------------------------------------------------------ sums */

/* The value itself is copied: by a pull, and by a step that changes nothing. */
static bool copies(const kv_unit_t *unit)
{
    return !unit->work->push || (kv_unit_steps(unit) && unit->pass.idle);
}

static kv_status_t launch_sums(kv_batch_t *batch)
{
    for (int dtype = 0; dtype < KV_DTYPE_COUNT; dtype++) {
        kv_device_sum_t *jobs = batch->jobs;
        int num_jobs = 0;
        EACH_UNIT(batch, unit, (int)dtype_of(unit) == dtype)
        {
            const kv_work_t *work = unit->work;
            kv_device_sum_t *job = &jobs[num_jobs];
            job->count = work->group.entry->count;
            if (copies(unit)) {
                int first = work->push; /* a push has the value itself there */
                job->num_src = 1;
                job->src = (const void *const *)&work->group.entry->stored->data;
                job->num_dst = unit->num_dst - first;
                job->dst = unit->dst + first;
            } else if (!kv_unit_steps(unit) && !kv_unit_codes(unit)) {
                job->num_src = work->group.num_values;
                job->src = unit->src;
                job->num_dst = unit->num_dst;
                job->dst = unit->dst;
            } else {
                continue;
            }
            num_jobs += job->num_dst > 0;
        }
        KV_TRY(LAUNCH(batch, sum, num_jobs, jobs, (kv_dtype_t)dtype, (kv_dtype_t)dtype));
    }
    return KV_OK;
}

kv_status_t kv_batch_launch(kv_batch_t *batch)
{
    KV_TRY(launch_codecs(batch));
    KV_TRY(launch_steps(batch));
    return launch_sums(batch);
}
