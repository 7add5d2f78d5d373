/* A step on one value: sums, steps and copies in blocks that stay in the first-level cache, split
 * over the team in chunks when the value is large. Whatever does not depend on the element, the
 * norms included, is ready before the pass, so that the order of the chunks does not matter.
 */
#include "comm/update_internal.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

/* As for sums (host.c): traffic from which destinations are written past the caches, and chunks. */
#define STREAM_BYTES (INT64_C(32) << 20)
#define CHUNK_BYTES_MAX (INT64_C(4) << 20)
#define CHUNKS_PER_THREAD 4

#define ALIGN 64

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* ------------------------------------------------------------------------ dense gradients */

typedef struct dense_source {
    kv_source_t base;
    const kv_host_t *host;
    kv_dtype_t dtype;
    int64_t element; /* bytes of a gradient's element */
    const kv_gradients_t *gradients;
} dense_source_t;

/* One gradient of the wide type is its own sum. */
static const void *read_plain(const kv_source_t *source, int64_t begin, int64_t end, bool last,
                              void *block, int64_t *unfinite)
{
    (void)end, (void)last, (void)block, (void)unfinite;
    const dense_source_t *dense = (const dense_source_t *)source;
    return (const char *)dense->gradients->src[0] + begin * dense->element;
}

static const void *read_sum(const kv_source_t *source, int64_t begin, int64_t end, bool last,
                            void *block, int64_t *unfinite)
{
    (void)last, (void)unfinite;
    const dense_source_t *dense = (const dense_source_t *)source;
    const kv_gradients_t *gradients = dense->gradients;
    dense->host->kernels->sum_wide[dense->dtype](begin, end, gradients->num_src, gradients->src,
                                                 block);
    return block;
}

/* Before the last time the codec works on copies of the residuals. */
static const void *read_compressed(const kv_source_t *source, int64_t begin, int64_t end, bool last,
                                   void *block, int64_t *unfinite)
{
    const dense_source_t *dense = (const dense_source_t *)source;
    const kv_gradients_t *gradients = dense->gradients;
    int64_t wide = kv_wide_bytes(dense->dtype == KV_FLOAT64);
    _Alignas(ALIGN) char copy[KV_UPDATE_BLOCK * 8];
    for (int i = 0; i < gradients->num_src; i++) {
        char *residual = kv_at_element(gradients->residuals[i], begin, wide);
        if (!last)
            residual = memcpy(copy, residual, (size_t)((end - begin) * wide));
        int64_t bad = kv_codec_apply(
            dense->host->kernels, &gradients->codec, dense->dtype, 0, end - begin,
            (const char *)gradients->src[i] + begin * dense->element, residual, i == 0, block);
        if (last)
            *unfinite += bad;
    }
    return block;
}

static void add_wide(bool is_double, int64_t count, const void *from, void *to)
{
    for (int64_t i = 0; i < count; i++)
        if (is_double)
            ((double *)to)[i] += ((const double *)from)[i];
        else
            ((float *)to)[i] += ((const float *)from)[i];
}

/* Codes can be taken apart at multiples of KV_CODEC_UNIT only. Chunks and blocks begin there, but
 * rows need not: then it begins earlier, in a room of its own. */
static const void *read_coded(const kv_source_t *source, int64_t begin, int64_t end, bool last,
                              void *block, int64_t *unfinite)
{
    (void)last, (void)unfinite;
    const dense_source_t *dense = (const dense_source_t *)source;
    const kv_gradients_t *gradients = dense->gradients;
    const kv_kernels_t *kernels = dense->host->kernels;
    bool is_double = dense->dtype == KV_FLOAT64;
    int64_t wide = kv_wide_bytes(is_double), skip = begin % KV_CODEC_UNIT;
    _Alignas(ALIGN) char room[(KV_CODEC_UNIT + KV_UPDATE_BLOCK) * 8];
    char *from = kv_at_element(room, skip, wide);
    for (int i = 0; i < gradients->num_src; i++) {
        const kv_codec_t *codec = &gradients->coded[i];
        const void *src = gradients->src[i];
        if (codec->type != KV_CODEC_NONE && skip == 0) {
            kv_codec_decode(kernels, codec, dense->dtype, begin, end, src, i == 0, block);
            continue;
        }
        if (codec->type == KV_CODEC_NONE)
            kernels->sum_wide[dense->dtype](begin, end, 1, &src, from);
        else
            kv_codec_decode(kernels, codec, dense->dtype, begin - skip, end, src, true, room);
        if (i == 0)
            memcpy(block, from, (size_t)((end - begin) * wide));
        else
            add_wide(is_double, end - begin, from, block);
    }
    return block;
}

static void dense_init(dense_source_t *dense, const kv_host_t *host, kv_dtype_t dtype,
                       const kv_gradients_t *gradients)
{
    int64_t bytes = (int64_t)kv_dtype_bytes(dtype);
    bool is_wide = dtype == KV_FLOAT64 || dtype == KV_FLOAT32;
    dense->host = host;
    dense->dtype = dtype;
    dense->element = bytes;
    dense->gradients = gradients;
    int num_coded = 0;
    for (int i = 0; gradients->coded != NULL && i < gradients->num_src; i++)
        num_coded += gradients->coded[i].type != KV_CODEC_NONE;
    /* A code is less than a byte, but takes the time of one. */
    dense->base.bytes = (gradients->num_src - num_coded) * bytes + num_coded;
    if (num_coded > 0) {
        dense->base.read = read_coded;
    } else if (gradients->codec.type != KV_CODEC_NONE) {
        dense->base.read = read_compressed;
        dense->base.bytes += 2 * gradients->num_src * kv_wide_bytes(dtype == KV_FLOAT64);
    } else if (gradients->num_src == 1 && is_wide &&
               (uintptr_t)gradients->src[0] % (uintptr_t)bytes == 0) {
        dense->base.read = read_plain;
    } else {
        dense->base.read = read_sum;
    }
}

/* ----------------------------------------------------------------------------- one span */

static int64_t weight_bytes(const kv_update_t *update)
{
    return update->is_double ? 8 : kv_dtype_is_narrow(update->weight->dtype) ? 2 : 4;
}

/* The changed weight back into the array of 16 bits, and into every destination. */
static void write_weight(const kv_update_t *update, int64_t begin, int64_t end, const void *wide)
{
    const kv_weight_t *weight = update->weight;
    const kv_kernels_t *kernels = update->host->kernels;
    if (kv_dtype_is_narrow(weight->dtype))
        kernels->float32_to[weight->dtype](end - begin, wide,
                                           kv_at_element(weight->data, begin, 2));
    if (update->num_dst > 0) {
        const void *from = weight->data;
        kernels->sum[weight->dtype](begin, end, 1, &from, update->num_dst, update->dst,
                                    update->stream);
    }
}

/* One row of GroupAdaGrad, any length. */
#define GROUP_ROW(name, real, root)                                                                \
    static void group_row_##name(const kv_update_t *update, int64_t row, int64_t *unfinite)        \
    {                                                                                              \
        _Alignas(ALIGN) real block[KV_UPDATE_BLOCK], room[KV_UPDATE_BLOCK];                        \
        const kv_weight_t *weight = update->weight;                                                \
        kv_factors_t_##name factors = *(const kv_factors_t_##name *)update->factors;               \
        int64_t begin = row * weight->row_count, end = begin + weight->row_count;                  \
        kv_squares_t squares;                                                                      \
        kv_squares_start(&squares);                                                                \
        for (int64_t at = begin; at < end; at += KV_UPDATE_BLOCK) {                                \
            int64_t count = smaller(end - at, KV_UPDATE_BLOCK);                                    \
            const real *g =                                                                        \
                update->source->read(update->source, at, at + count, false, block, unfinite);      \
            for (int64_t i = 0; i < count; i++)                                                    \
                room[i] = kv_scaled_##name(&factors, factors.clip, g[i]);                          \
            kv_squares_add(&squares, update->host->kernels, update->is_double, KV_FLOAT32, count,  \
                           room);                                                                  \
        }                                                                                          \
        real *history = (real *)weight->slots[0] + row;                                            \
        *history += (real)(kv_squares_sum(&squares) / (double)weight->row_count);                  \
        factors.p = root(*history + factors.eps);                                                  \
        for (int64_t at = begin; at < end; at += KV_UPDATE_BLOCK) {                                \
            int64_t to = at + smaller(end - at, KV_UPDATE_BLOCK);                                  \
            const void *g = update->source->read(update->source, at, to, true, block, unfinite);   \
            void *w = kv_update_read_weight(update, at, to, room);                                 \
            update->kernel(at, to - at, &factors, g, w, NULL);                                     \
            write_weight(update, at, to, w);                                                       \
        }                                                                                          \
    }

GROUP_ROW(float, float, sqrtf)
GROUP_ROW(double, double, sqrt)

void kv_update_part(const kv_update_t *update, int64_t begin, int64_t end, int64_t *unfinite)
{
    const kv_weight_t *weight = update->weight;
    if (update->pass.kind == KV_STEP_group_adagrad) {
        for (int64_t row = begin / weight->row_count; row < end / weight->row_count; row++)
            if (update->is_double)
                group_row_double(update, row, unfinite);
            else
                group_row_float(update, row, unfinite);
        return;
    }
    _Alignas(ALIGN) char gradient[KV_UPDATE_BLOCK * 8], direction[KV_UPDATE_BLOCK * 8];
    _Alignas(ALIGN) float wide[KV_UPDATE_BLOCK];
    /* LAMB has used up its gradient in the first pass, if it has had one. */
    bool reads = update->pass.norms != KV_NORMS_DIRECTION || update->before != NULL;
    /* Nothing comes by way of the cache: the loop over memory runs through. */
    bool whole =
        update->source->read == read_plain && update->num_dst == 0 && update->before == NULL;
    int64_t most = whole ? end - begin : KV_UPDATE_BLOCK;
    while (begin < end) {
        int64_t to = begin + smaller(end - begin, most);
        void *slots[KV_MAX_SLOTS];
        kv_update_slots_at(update, begin, slots);
        void *w = kv_update_read_weight(update, begin, to, wide);
        const void *g =
            reads ? update->source->read(update->source, begin, to, true, gradient, unfinite) : w;
        if (update->before != NULL) {
            slots[2] = direction;
            update->before(begin, to - begin, update->factors, g, w, slots);
        }
        update->kernel(begin, to - begin, update->factors, g, w, slots);
        write_weight(update, begin, to, w);
        begin = to;
    }
}

/* ------------------------------------------------------------------------- the whole value */

static kv_step_kernel_t *kernel_of(const kv_update_t *update)
{
    const kv_kernels_t *kernels = update->host->kernels;
    return update->is_double ? kernels->step_double[update->pass.kind]
                             : kernels->step_float[update->pass.kind];
}

static int64_t traffic_of(const kv_update_t *update)
{
    const kv_weight_t *weight = update->weight;
    int64_t wide = kv_wide_bytes(update->is_double);
    int64_t traffic = update->source->bytes + 2 * weight_bytes(update);
    if (weight->master != NULL)
        traffic += 2 * wide;
    for (int i = 0; i < KV_MAX_SLOTS; i++)
        if (weight->slots[i] != NULL)
            traffic += 2 * wide;
    return traffic;
}

void kv_update_prepare(kv_update_t *update, const kv_host_t *host, const kv_step_t *step,
                       const kv_weight_t *weight, const kv_source_t *source, unsigned how)
{
    update->host = host;
    update->step = step;
    update->weight = weight;
    update->source = source;
    update->is_double = weight->dtype == KV_FLOAT64;
    update->num_dst = 0;
    update->dst = NULL;
    update->stream = false;
    update->before = NULL;
    update->factors = &update->pass.factors;
    update->traffic = traffic_of(update);
    kv_pass_init(&update->pass, step, update->is_double, how);
    /* The kernel of some is chosen by the norms. */
    update->kernel = update->pass.norms != KV_NORMS_GRADIENT ? kernel_of(update) : NULL;
}

bool kv_update_begin(kv_update_t *update, const kv_host_t *host, const kv_step_t *step,
                     const kv_weight_t *weight, const kv_source_t *source, unsigned how,
                     const kv_norm_sums_t *sums, int64_t *unfinite)
{
    *unfinite = 0;
    kv_update_prepare(update, host, step, weight, source, how);
    if (update->pass.norms != KV_NORMS_NONE) {
        kv_norm_sums_t own;
        if (sums == NULL)
            kv_update_measure(update, false, &own, unfinite);
        else if (update->pass.norms == KV_NORMS_DIRECTION)
            update->before = update->kernel;
        kv_update_set_sums(update, sums != NULL ? sums : &own);
        update->kernel = kernel_of(update);
    }
    return !update->pass.idle;
}

int64_t kv_update_traffic(const kv_update_t *update)
{
    return update->traffic + update->num_dst * weight_bytes(update);
}

typedef struct update_job {
    const kv_update_t *update;
    int64_t chunk;
    atomic_llong unfinite;
} update_job_t;

static void update_chunk(void *context, int64_t chunk)
{
    update_job_t *job = context;
    int64_t unfinite = 0;
    kv_update_part(job->update, chunk * job->chunk,
                   smaller(job->update->weight->count, (chunk + 1) * job->chunk), &unfinite);
    if (unfinite != 0)
        atomic_fetch_add(&job->unfinite, unfinite);
}

static int64_t chunk_of(const kv_host_t *host, int64_t count, int64_t traffic)
{
    int64_t bytes = count * traffic / ((int64_t)host->num_threads * CHUNKS_PER_THREAD);
    bytes = bytes < KV_UPDATE_CHUNK_BYTES_MIN ? KV_UPDATE_CHUNK_BYTES_MIN
                                              : smaller(bytes, CHUNK_BYTES_MAX);
    return (bytes / traffic / KV_UPDATE_CHUNK_UNIT + 1) * KV_UPDATE_CHUNK_UNIT;
}

void kv_update_all(const kv_update_t *update, int64_t *unfinite)
{
    const kv_weight_t *weight = update->weight;
    int64_t traffic = kv_update_traffic(update);
    if (weight->count * traffic < KV_UPDATE_ALONE_BYTES) {
        kv_update_part(update, 0, weight->count, unfinite);
        return;
    }
    update_job_t job = {.update = update, .chunk = chunk_of(update->host, weight->count, traffic)};
    if (update->pass.kind == KV_STEP_group_adagrad)
        job.chunk = (job.chunk + weight->row_count - 1) / weight->row_count * weight->row_count;
    kv_team_run(update->host->team, update->host->num_threads,
                (weight->count + job.chunk - 1) / job.chunk, update_chunk, &job);
    *unfinite += atomic_load(&job.unfinite);
}

bool kv_update_is_due(const kv_update_t *update, int64_t begin, int64_t end)
{
    if (update->pass.kind != KV_STEP_large_batch &&
        update->pass.kind != KV_STEP_large_batch_momentum)
        return false;
    const void *waiting = update->weight->slots[0];
    for (int64_t i = begin; i < end; i++)
        if (update->is_double ? ((const double *)waiting)[i] != 0
                              : ((const float *)waiting)[i] != 0)
            return true;
    return false;
}

static int64_t update_dense(const kv_host_t *host, const kv_step_t *step, const kv_weight_t *weight,
                            const kv_gradients_t *gradients, const kv_norm_sums_t *sums,
                            int num_dst, void *const *dst)
{
    if (weight->count == 0)
        return 0;
    dense_source_t source;
    dense_init(&source, host, weight->dtype, gradients);
    kv_update_t update;
    int64_t unfinite;
    if (!kv_update_begin(&update, host, step, weight, &source.base, 0, sums, &unfinite)) {
        const void *from = weight->data;
        if (num_dst > 0)
            kv_host_sum(host, weight->dtype, weight->count, 1, &from, num_dst, dst);
        return unfinite;
    }
    update.num_dst = num_dst;
    update.dst = dst;
    update.stream = num_dst > 0 && weight->count * update.traffic >= STREAM_BYTES;
    kv_update_all(&update, &unfinite);
    return unfinite;
}

int64_t kv_host_update(const kv_host_t *host, const kv_step_t *step, const kv_weight_t *weight,
                       const kv_gradients_t *gradients, int num_dst, void *const *dst)
{
    return update_dense(host, step, weight, gradients, NULL, num_dst, dst);
}

int64_t kv_host_update_part(const kv_host_t *host, const kv_step_t *step, const kv_weight_t *weight,
                            const kv_gradients_t *gradients, const kv_norm_sums_t *sums)
{
    return update_dense(host, step, weight, gradients, sums, 0, NULL);
}

void kv_host_measure(const kv_host_t *host, const kv_step_t *step, const kv_weight_t *weight,
                     const kv_gradients_t *gradients, kv_norm_sums_t *out)
{
    dense_source_t source;
    kv_update_t update;
    dense_init(&source, host, weight->dtype, gradients);
    kv_update_prepare(&update, host, step, weight, &source.base, 0);
    kv_update_measure_apart(&update, out);
}

/* --------------------------------------------------------------------- without an optimizer */

typedef struct plain_job {
    const dense_source_t *source;
    int64_t count, chunk;
    int num_dst;
    void *const *dst;
    atomic_llong unfinite;
} plain_job_t;

static void plain_chunk(void *context, int64_t chunk)
{
    plain_job_t *job = context;
    kv_dtype_t dtype = job->source->dtype;
    const kv_kernels_t *kernels = job->source->host->kernels;
    int64_t bytes = (int64_t)kv_dtype_bytes(dtype);
    _Alignas(ALIGN) char block[KV_UPDATE_BLOCK * 8], narrow[KV_UPDATE_BLOCK * 2];
    int64_t unfinite = 0;
    int64_t end = smaller(job->count, (chunk + 1) * job->chunk);
    for (int64_t at = chunk * job->chunk; at < end; at += KV_UPDATE_BLOCK) {
        int64_t count = smaller(end - at, KV_UPDATE_BLOCK);
        const void *from =
            job->source->base.read(&job->source->base, at, at + count, true, block, &unfinite);
        if (kv_dtype_is_narrow(dtype)) {
            kernels->float32_to[dtype](count, from, narrow);
            from = narrow;
        }
        for (int i = 0; i < job->num_dst; i++)
            memmove(kv_at_element(job->dst[i], at, bytes), from, (size_t)(count * bytes));
    }
    if (unfinite != 0)
        atomic_fetch_add(&job->unfinite, unfinite);
}

int64_t kv_host_sum_gradients(const kv_host_t *host, kv_dtype_t dtype, int64_t count,
                              const kv_gradients_t *gradients, int num_dst, void *const *dst)
{
    dense_source_t source;
    dense_init(&source, host, dtype, gradients);
    int64_t traffic = source.base.bytes + num_dst * (int64_t)kv_dtype_bytes(dtype);
    plain_job_t job = {
        .source = &source, .count = count, .chunk = count, .num_dst = num_dst, .dst = dst};
    if (count * traffic < KV_UPDATE_ALONE_BYTES) {
        plain_chunk(&job, 0);
        return atomic_load(&job.unfinite);
    }
    job.chunk = chunk_of(host, count, traffic);
    kv_team_run(host->team, host->num_threads, (count + job.chunk - 1) / job.chunk, plain_chunk,
                &job);
    return atomic_load(&job.unfinite);
}

typedef struct widen_job {
    const kv_host_t *host;
    kv_dtype_t dtype;
    int64_t count, chunk;
    const char *from;
    float *to;
} widen_job_t;

static void widen_chunk(void *context, int64_t chunk)
{
    const widen_job_t *job = context;
    int64_t begin = chunk * job->chunk;
    int64_t end = smaller(job->count, begin + job->chunk);
    job->host->kernels->float32_from[job->dtype](end - begin, job->from + 2 * begin,
                                                 job->to + begin);
}

void kv_host_widen(const kv_host_t *host, kv_dtype_t dtype, int64_t count, const void *from,
                   float *to)
{
    const int64_t traffic = 2 + 4;
    widen_job_t job = {
        .host = host, .dtype = dtype, .count = count, .chunk = count, .from = from, .to = to};
    if (count * traffic < KV_UPDATE_ALONE_BYTES) {
        widen_chunk(&job, 0);
        return;
    }
    job.chunk = chunk_of(host, count, traffic);
    kv_team_run(host->team, host->num_threads, (count + job.chunk - 1) / job.chunk, widen_chunk,
                &job);
}
