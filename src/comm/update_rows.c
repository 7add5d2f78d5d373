/* A step with a row-sparse sum of gradients, by the passes of update_internal.h. A lazy step takes
 * the rows of the sum one by one: they lie here and there in weight and state, so those that come
 * some rows later are asked for ahead. Any other step reads the sum by position, zeros where it has
 * no row. A gradient that needs no sum is read where it lies.
 */
#include "comm/row_grid.h"
#include "comm/update_internal.h"
#include <string.h>

typedef struct rows_source {
    kv_source_t base;
    const kv_host_t *host;
    const kv_row_sum_t *sum;
    const int64_t *places; /* of the sum's rows in the weight */
    size_t element, wide;  /* bytes */
    /* Of a lazy step: the row of the sum that is read, and its first element in the weight. */
    int64_t row, first;
} rows_source_t;

/* The elements [begin, end) of row i of the sum. */
static const void *read_part(const rows_source_t *rows, int64_t i, int64_t begin, int64_t end,
                             void *block)
{
    const void *single, *const *parts;
    int num_parts = kv_row_sum_parts(rows->sum, i, &single, &parts);
    if (num_parts == 1 && rows->element == rows->wide && (uintptr_t)parts[0] % rows->wide == 0)
        return (const char *)parts[0] + (size_t)begin * rows->wide;
    rows->host->kernels->sum_wide[rows->sum->dtype](begin, end, num_parts, parts, block);
    return block;
}

static const void *read_row(const kv_source_t *source, int64_t begin, int64_t end, bool last,
                            void *block, int64_t *unfinite)
{
    (void)last, (void)unfinite;
    const rows_source_t *rows = (const rows_source_t *)source;
    return read_part(rows, rows->row, begin - rows->first, end - rows->first, block);
}

static const void *read_anywhere(const kv_source_t *source, int64_t begin, int64_t end, bool last,
                                 void *block, int64_t *unfinite)
{
    (void)last, (void)unfinite;
    const rows_source_t *rows = (const rows_source_t *)source;
    const kv_row_sum_t *sum = rows->sum;
    int64_t i = kv_row_seek(rows->places, sum->num_rows, 0, begin / sum->row_count);
    memset(block, 0, (size_t)(end - begin) * rows->wide);
    for (; i < sum->num_rows && rows->places[i] * sum->row_count < end; i++) {
        int64_t first = rows->places[i] * sum->row_count;
        int64_t from = begin > first ? begin : first;
        int64_t to = end - first < sum->row_count ? end : first + sum->row_count;
        void *here = (char *)block + (size_t)(from - begin) * rows->wide;
        const void *read = read_part(rows, i, from - first, to - first, here);
        if (read != here)
            memcpy(here, read, (size_t)(to - from) * rows->wide);
    }
    return block;
}

/* An array that the step changes, by rows. */
typedef struct stream {
    char *rows;
    size_t row_bytes;
} stream_t;

typedef struct lazy_job {
    const kv_update_t *update;
    const rows_source_t *source;
    kv_row_grid_t grid;
    int64_t ahead;   /* rows asked for before their turn */
    int num_streams; /* the weight and, without a master, its slots */
    stream_t streams[2 + KV_MAX_SLOTS];
} lazy_job_t;

static void add_stream(lazy_job_t *job, void *rows, size_t row_bytes)
{
    job->streams[job->num_streams++] = (stream_t){.rows = rows, .row_bytes = row_bytes};
}

static void find_streams(lazy_job_t *job)
{
    const kv_weight_t *weight = job->update->weight;
    size_t row_count = (size_t)weight->row_count, wide = job->source->wide;
    bool per_row = job->update->pass.kind == KV_STEP_group_adagrad;
    job->num_streams = 0;
    add_stream(job, weight->data, row_count * job->source->element);
    if (weight->master != NULL)
        add_stream(job, weight->master, row_count * wide);
    for (int k = 0; k < KV_MAX_SLOTS && weight->slots[k] != NULL; k++)
        add_stream(job, weight->slots[k], per_row ? wide : row_count * wide);
    int64_t lines = 0;
    for (int k = 0; k < job->num_streams; k++)
        lines += kv_row_lines(job->streams[k].row_bytes);
    job->ahead = kv_rows_ahead(lines);
}

/* Gradients need no asking: they are read in the order of memory. */
static void ask_for(const lazy_job_t *job, int64_t i)
{
    size_t place = (size_t)job->source->places[i];
    for (int k = 0; k < job->num_streams; k++)
        kv_row_prefetch(job->streams[k].rows + place * job->streams[k].row_bytes,
                        job->streams[k].row_bytes);
}

/* kv_update_part for what most rows are: short, and of the wide type. What each row costs beside
 * its arithmetic shows here, so whatever is the same for all is found before. */
static void short_rows(const lazy_job_t *job, int64_t begin, int64_t end)
{
    const kv_update_t *update = job->update;
    const rows_source_t *source = job->source;
    const kv_row_sum_t *sum = source->sum;
    int64_t row_count = update->weight->row_count;
    bool in_place = sum->data != NULL && (uintptr_t)sum->data % source->wide == 0;
    _Alignas(64) char block[KV_UPDATE_BLOCK * sizeof(double)];
    void *at[1 + KV_MAX_SLOTS] = {NULL};
    for (int64_t i = begin; i < end; i++) {
        if (i + job->ahead < end)
            ask_for(job, i + job->ahead);
        int64_t place = source->places[i];
        for (int k = 0; k < job->num_streams; k++)
            at[k] = job->streams[k].rows + (size_t)place * job->streams[k].row_bytes;
        const void *gradient = in_place ? sum->data + (size_t)i * sum->row_bytes
                                        : read_part(source, i, 0, row_count, block);
        update->kernel(place * row_count, row_count, update->factors, gradient, at[0], at + 1);
    }
}

static void other_rows(const lazy_job_t *job, const kv_row_block_t *block)
{
    rows_source_t source = *job->source;
    kv_update_t update = *job->update;
    update.source = &source.base;
    int64_t unfinite = 0;
    for (int64_t i = block->row; i < block->row_end; i++) {
        if (i + job->ahead < block->row_end)
            ask_for(job, i + job->ahead);
        source.row = i;
        source.first = source.places[i] * update.weight->row_count;
        kv_update_part(&update, source.first + block->begin, source.first + block->end, &unfinite);
    }
}

static void lazy_block(void *context, int64_t index)
{
    const lazy_job_t *job = context;
    const kv_update_t *update = job->update;
    kv_row_block_t block = kv_row_block(&job->grid, index);
    for (int64_t i = block.row; i < block.row_end && i < block.row + job->ahead; i++)
        ask_for(job, i);
    if (job->source->element == job->source->wide && update->weight->row_count <= KV_UPDATE_BLOCK &&
        update->pass.kind != KV_STEP_group_adagrad)
        short_rows(job, block.row, block.row_end);
    else
        other_rows(job, &block);
}

/* Rows whose sum of earlier gradients waits. Those of this push have had their step already, which
 * leaves no sum. */
static void due_block(void *context, int64_t index)
{
    const lazy_job_t *job = context;
    kv_row_block_t block = kv_row_block(&job->grid, index);
    int64_t row_count = job->grid.row_count, unfinite = 0;
    for (int64_t row = block.row; row < block.row_end; row++)
        if (kv_update_is_due(job->update, row * row_count, (row + 1) * row_count))
            kv_update_part(job->update, row * row_count, (row + 1) * row_count, &unfinite);
}

/* Blocks of whole rows. */
static kv_row_grid_t whole_rows(const kv_host_t *host, int64_t num_rows, int64_t row_count,
                                int64_t traffic)
{
    kv_row_grid_t grid = kv_row_grid(host, num_rows, 1, row_count * traffic);
    grid.row_count = grid.count = row_count;
    return grid;
}

/* The sum of the gradients by position. Gives KV_PASS_…. */
static unsigned rows_init(rows_source_t *rows, const kv_host_t *host, const kv_weight_t *weight,
                          const kv_row_sum_t *sum, const int64_t *where, bool lazy)
{
    bool several = sum->parts != NULL && sum->num_rows > 0;
    int64_t num_parts = several ? sum->starts[sum->num_rows] / sum->num_rows + 1 : 1;
    *rows = (rows_source_t){
        .base = {.read = read_anywhere},
        .host = host,
        .sum = sum,
        .places = where != NULL ? where : sum->ids,
        .element = kv_dtype_bytes(weight->dtype),
        .wide = kv_dtype_bytes(kv_dtype_wide(weight->dtype)),
    };
    rows->base.bytes = num_parts * (int64_t)rows->element;
    return KV_PASS_ROWS | (lazy ? KV_PASS_LAZY : 0u) | (where != NULL ? KV_PASS_SPARSE_WEIGHT : 0u);
}

static void update_rows(const kv_host_t *host, const kv_step_t *step, const kv_weight_t *weight,
                        const kv_row_sum_t *sum, const int64_t *where, bool lazy,
                        const kv_norm_sums_t *sums)
{
    if (weight->count == 0)
        return;
    rows_source_t anywhere;
    unsigned how = rows_init(&anywhere, host, weight, sum, where, lazy);
    kv_update_t update;
    int64_t unfinite;
    if (!kv_update_begin(&update, host, step, weight, &anywhere.base, how, sums, &unfinite))
        return;
    if (!lazy) {
        kv_update_all(&update, &unfinite);
        return;
    }
    rows_source_t one = anywhere;
    one.base.read = read_row;
    lazy_job_t job = {.update = &update, .source = &one};
    int64_t row_count = weight->row_count, traffic = kv_update_traffic(&update);
    job.grid = update.pass.kind == KV_STEP_group_adagrad
                   ? whole_rows(host, sum->num_rows, row_count, traffic)
                   : kv_row_grid(host, sum->num_rows, row_count, row_count * traffic);
    find_streams(&job);
    kv_team_run(host->team, host->num_threads, job.grid.num_blocks, lazy_block, &job);
    if (update.pass.kind == KV_STEP_large_batch ||
        update.pass.kind == KV_STEP_large_batch_momentum) {
        job.grid = whole_rows(host, weight->count / row_count, row_count, traffic);
        kv_team_run(host->team, host->num_threads, job.grid.num_blocks, due_block, &job);
    }
}

void kv_host_update_rows(const kv_host_t *host, const kv_step_t *step, const kv_weight_t *weight,
                         const kv_row_sum_t *sum, const int64_t *where, bool lazy)
{
    update_rows(host, step, weight, sum, where, lazy, NULL);
}

void kv_host_update_rows_part(const kv_host_t *host, const kv_step_t *step,
                              const kv_weight_t *weight, const kv_row_sum_t *sum,
                              const int64_t *where, bool lazy, const kv_norm_sums_t *sums)
{
    update_rows(host, step, weight, sum, where, lazy, sums);
}

void kv_host_measure_rows(const kv_host_t *host, const kv_step_t *step, const kv_weight_t *weight,
                          const kv_row_sum_t *sum, const int64_t *where, bool lazy,
                          kv_norm_sums_t *out)
{
    rows_source_t anywhere;
    kv_update_t update;
    unsigned how = rows_init(&anywhere, host, weight, sum, where, lazy);
    kv_update_prepare(&update, host, step, weight, &anywhere.base, how);
    kv_update_measure_apart(&update, out);
}
