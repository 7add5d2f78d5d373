/* The norms of a whole value for layer-wise optimizers, as sums of squares: in one pass before the
 * step, by the team when the value is large. LAMB needs its direction for that, and so its moments;
 * a value whose slices lie apart only looks at what they would be, so that a step which then does
 * not take place has changed nothing.
 */
#include "comm/update_internal.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

/* The most chunks: each leaves its sums on the caller's stack. */
#define NORM_PARTS 256

#define ALIGN 64

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

typedef struct norm_job {
    const kv_update_t *update;
    bool apart;        /* state stays as it is */
    int64_t chunk;     /* elements */
    kv_dtype_t narrow; /* of the weight's squares, and of the gradient's */
    double weight[NORM_PARTS], other[NORM_PARTS];
    atomic_llong unfinite;
} norm_job_t;

/* The mean that LBSGD will step with. */
static void mean_of(const kv_update_t *update, int64_t begin, int64_t count, double batch,
                    const void *gradient, void *mean)
{
    const kv_weight_t *weight = update->weight;
    void *sum = weight->slots[0];
    for (int64_t i = 0; i < count; i++)
        if (update->is_double)
            ((double *)mean)[i] =
                (((double *)sum)[begin + i] + ((const double *)gradient)[i]) / batch;
        else
            ((float *)mean)[i] =
                (((float *)sum)[begin + i] + ((const float *)gradient)[i]) / (float)batch;
}

static void norm_chunk(void *context, int64_t chunk)
{
    norm_job_t *job = context;
    const kv_update_t *update = job->update;
    const kv_weight_t *weight = update->weight;
    const kv_kernels_t *kernels = update->host->kernels;
    bool is_double = update->is_double, is_first = update->pass.norms == KV_NORMS_DIRECTION;
    double batch = kv_pass_batch(update->step);
    _Alignas(ALIGN) char gradient[KV_UPDATE_BLOCK * 8], room[KV_UPDATE_BLOCK * 8];
    _Alignas(ALIGN) char moments[2][KV_UPDATE_BLOCK * 8];
    _Alignas(ALIGN) float wide[KV_UPDATE_BLOCK];
    kv_squares_t of_weight, of_other;
    kv_squares_start(&of_weight);
    kv_squares_start(&of_other);
    int64_t unfinite = 0;
    int64_t end = smaller(weight->count, (chunk + 1) * job->chunk);
    for (int64_t at = chunk * job->chunk; at < end; at += KV_UPDATE_BLOCK) {
        int64_t count = smaller(end - at, KV_UPDATE_BLOCK);
        void *w = kv_update_read_weight(update, at, at + count, wide);
        const void *g = update->source->read(update->source, at, at + count,
                                             is_first && !job->apart, gradient, &unfinite);
        const void *other = g;
        if (is_first) {
            void *slots[KV_MAX_SLOTS];
            kv_update_slots_at(update, at, slots);
            for (int i = 0; i < 2 && job->apart; i++)
                slots[i] = memcpy(moments[i], slots[i], (size_t)(count * kv_wide_bytes(is_double)));
            slots[2] = room;
            update->kernel(at, count, update->factors, g, w, slots);
            other = room;
        } else if (batch > 1) {
            mean_of(update, at, count, batch, g, room);
            other = room;
        }
        kv_squares_add(&of_other, kernels, is_double, is_first ? KV_FLOAT32 : job->narrow, count,
                       other);
        if (weight->master != NULL) {
            kernels->float32_from[weight->dtype](count, kv_at_element(weight->data, at, 2), wide);
            w = wide;
        }
        kv_squares_add(&of_weight, kernels, is_double, job->narrow, count, w);
    }
    job->weight[chunk] = kv_squares_sum(&of_weight);
    job->other[chunk] = kv_squares_sum(&of_other);
    if (unfinite != 0)
        atomic_fetch_add(&job->unfinite, unfinite);
}

/* One pass; its sums. */
static void run_pass(norm_job_t *job, int64_t chunks, kv_dtype_t narrow, double *weight,
                     double *other)
{
    const kv_update_t *update = job->update;
    bool alone = update->weight->count * update->traffic < KV_UPDATE_ALONE_BYTES;
    job->narrow = narrow;
    kv_team_run(update->host->team, alone ? 1 : update->host->num_threads, chunks, norm_chunk, job);
    kv_squares_t of_weight, of_other;
    kv_squares_start(&of_weight);
    kv_squares_start(&of_other);
    for (int64_t i = 0; i < chunks; i++) {
        kv_squares_leaf(&of_weight, job->weight[i]);
        kv_squares_leaf(&of_other, job->other[i]);
    }
    *weight = kv_squares_sum(&of_weight);
    *other = kv_squares_sum(&of_other);
}

static bool is_good(const kv_norm_sums_t *sums)
{
    return isfinite(sums->weight + sums->other);
}

void kv_update_measure(kv_update_t *update, bool apart, kv_norm_sums_t *out, int64_t *unfinite)
{
    const kv_weight_t *weight = update->weight;
    norm_job_t job;
    job.update = update;
    job.apart = apart;
    kv_dtype_t narrow = KV_FLOAT32;
    /* What the reference does with the 16-bit weight itself. */
    if (weight->master != NULL && !update->pass.rows && update->step->optim->id != KV_OPTIM_LBSGD)
        narrow = weight->dtype;
    atomic_init(&job.unfinite, 0);
    job.chunk = KV_UPDATE_CHUNK_UNIT; /* times a power of two: see kv_squares_t */
    while (job.chunk * update->traffic < KV_UPDATE_CHUNK_BYTES_MIN ||
           weight->count > job.chunk * NORM_PARTS)
        job.chunk *= 2;
    int64_t chunks = (weight->count + job.chunk - 1) / job.chunk;
    run_pass(&job, chunks, narrow, &out->weight, &out->other);
    out->exact_weight = out->weight;
    out->exact_other = out->other;
    /* Another slice may need them although this one does not. */
    if (narrow != KV_FLOAT32 && update->pass.norms != KV_NORMS_DIRECTION &&
        (apart || !is_good(out)))
        run_pass(&job, chunks, KV_FLOAT32, &out->exact_weight, &out->exact_other);
    *unfinite += atomic_load(&job.unfinite);
}

void kv_update_measure_apart(kv_update_t *update, kv_norm_sums_t *out)
{
    int64_t unfinite = 0;
    *out = (kv_norm_sums_t){.weight = 0};
    if (update->weight->count > 0 && update->pass.norms != KV_NORMS_NONE)
        kv_update_measure(update, true, out, &unfinite);
}

void kv_update_set_sums(kv_update_t *update, const kv_norm_sums_t *sums)
{
    bool good = is_good(sums);
    kv_pass_set_norms(&update->pass, update->step, update->is_double,
                      good ? sums->weight : sums->exact_weight,
                      good ? sums->other : sums->exact_other);
}

void kv_norm_sums_add(kv_norm_sums_t *to, const kv_norm_sums_t *more)
{
    to->weight += more->weight;
    to->other += more->other;
    to->exact_weight += more->exact_weight;
    to->exact_other += more->exact_other;
}
