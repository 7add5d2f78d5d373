/* The sum of several row sets: which rows there are (the union of the ids), then the passes that
 * write the sums down.
 *
 * The union is a merge. With few sets their heads are compared without branches, and each set whose
 * head is the lowest steps on; with many a heap finds the lowest. A large union is cut for the
 * team, at ids of the largest set. A cut knows how many rows of all sets lie before it, but not how
 * many rows of the union: it puts its pointers where they belong, its ids where they would belong
 * if no two sets had an id in common, and at the end the ids of all cuts move together.
 */
#include "base/memory.h"
#include "comm/row_grid.h"
#include "comm/rows.h"
#include <string.h>

enum {
    FEW_SETS = 8,
    MAX_CUTS = 64,
    CUT_ROWS = 8192, /* of all sets together */
    CUTS_FROM = 4 * CUT_ROWS,
};

/* ------------------------------------------------------------------------------- the union */

/* What is left of a set. */
typedef struct cursor {
    const int64_t *at, *end;
    const char *row;
    int set; /* its place among the sets */
} cursor_t;

typedef struct cut {
    int64_t first_part; /* rows of all sets before this cut */
    int64_t num_rows;   /* of the union, in this cut */
} cut_t;

typedef struct merge_job {
    int num_sets, largest;
    const kv_rowset_t *const *sets;
    size_t row_bytes;
    int num_cuts;
    cursor_t *cursors; /* [num_cuts][num_sets] */
    int64_t *ids, *starts;
    const void **parts;
    cut_t cuts[MAX_CUTS];
} merge_job_t;

/* Where a merge writes, and how far it has come. */
typedef struct output {
    int64_t *ids, *starts;
    const void **parts;
    int64_t num_rows, num_parts;
    size_t row_bytes;
} output_t;

/* As many rows of the union as surely leave none of the `num` sets beyond its end. */
static inline __attribute__((always_inline)) void merge_few(int num, cursor_t *cursors,
                                                            output_t *to)
{
    output_t out = *to;
    cursor_t left[FEW_SETS];
    int64_t steps = INT64_MAX;
    for (int k = 0; k < num; k++) {
        left[k] = cursors[k];
        if (left[k].end - left[k].at < steps)
            steps = left[k].end - left[k].at;
    }
    for (; steps > 0; steps--) {
        int64_t lowest = *left[0].at;
        for (int k = 1; k < num; k++)
            lowest = *left[k].at < lowest ? *left[k].at : lowest;
        out.ids[out.num_rows] = lowest;
        out.starts[out.num_rows++] = out.num_parts;
        for (int k = 0; k < num; k++) {
            size_t hit = *left[k].at == lowest;
            out.parts[out.num_parts] = left[k].row;
            out.num_parts += (int64_t)hit;
            left[k].at += hit;
            left[k].row += hit * out.row_bytes;
        }
    }
    memcpy(cursors, left, (size_t)num * sizeof left[0]);
    *to = out;
}

static void merge_last(cursor_t *cursor, output_t *out)
{
    for (; cursor->at < cursor->end; cursor->at++, cursor->row += out->row_bytes) {
        out->ids[out->num_rows] = *cursor->at;
        out->starts[out->num_rows++] = out->num_parts;
        out->parts[out->num_parts++] = cursor->row;
    }
}

static bool before(const cursor_t *a, const cursor_t *b)
{
    return *a->at < *b->at || (*a->at == *b->at && a->set < b->set);
}

static void sift(cursor_t *heap, int num, int at)
{
    cursor_t moved = heap[at];
    for (int child; (child = 2 * at + 1) < num; at = child) {
        child += child + 1 < num && before(&heap[child + 1], &heap[child]);
        if (!before(&heap[child], &moved))
            break;
        heap[at] = heap[child];
    }
    heap[at] = moved;
}

static void merge_many(int num, cursor_t *heap, output_t *out)
{
    for (int i = num / 2; i-- > 0;)
        sift(heap, num, i);
    while (num > 0) {
        if (out->num_rows == 0 || out->ids[out->num_rows - 1] != *heap->at) {
            out->ids[out->num_rows] = *heap->at;
            out->starts[out->num_rows++] = out->num_parts;
        }
        out->parts[out->num_parts++] = heap->row;
        heap->row += out->row_bytes;
        if (++heap->at == heap->end)
            *heap = heap[--num];
        if (num > 0)
            sift(heap, num, 0);
    }
}

static void merge(int num, cursor_t *cursors, output_t *out)
{
    for (;;) {
        int left = 0;
        for (int k = 0; k < num; k++)
            if (cursors[k].at < cursors[k].end)
                cursors[left++] = cursors[k];
        num = left;
        switch (num) {
        case 0:
            return;
        case 1:
            merge_last(cursors, out);
            break;
        case 2:
            merge_few(2, cursors, out);
            break;
        case 3:
            merge_few(3, cursors, out);
            break;
        case 4:
            merge_few(4, cursors, out);
            break;
        default:
            if (num > FEW_SETS) {
                merge_many(num, cursors, out);
                return;
            }
            merge_few(num, cursors, out);
        }
    }
}

static void merge_cut(void *context, int64_t index)
{
    merge_job_t *job = context;
    cut_t *cut = &job->cuts[index];
    cursor_t *cursors = job->cursors + index * job->num_sets;
    const kv_rowset_t *largest = job->sets[job->largest];
    const int64_t *splits = kv_rowset_ids(largest);
    bool first = index == 0, last = index == job->num_cuts - 1;
    int64_t from = first ? 0 : splits[largest->num_rows * index / job->num_cuts];
    int64_t to = last ? 0 : splits[largest->num_rows * (index + 1) / job->num_cuts];
    cut->first_part = 0;
    for (int k = 0; k < job->num_sets; k++) {
        const kv_rowset_t *set = job->sets[k];
        const int64_t *ids = kv_rowset_ids(set);
        int64_t begin = first ? 0 : kv_row_seek(ids, set->num_rows, 0, from);
        int64_t end = last ? set->num_rows : kv_row_seek(ids, set->num_rows, begin, to);
        cursors[k] = (cursor_t){.set = k};
        if (begin < end) {
            cursors[k].at = ids + begin;
            cursors[k].end = ids + end;
            cursors[k].row = kv_rowset_data(set) + (size_t)begin * job->row_bytes;
        }
        cut->first_part += begin;
    }
    output_t out = {.ids = job->ids + cut->first_part,
                    .starts = job->starts + cut->first_part,
                    .parts = job->parts,
                    .num_parts = cut->first_part,
                    .row_bytes = job->row_bytes};
    merge(job->num_sets, cursors, &out);
    cut->num_rows = out.num_rows;
}

/* Without elements a row may have no memory; then any address does. */
static void describe_single(const kv_rowset_t *set, kv_row_sum_t *out)
{
    out->num_rows = set->num_rows;
    out->ids = kv_rowset_ids(set);
    out->data = kv_rowset_data(set);
    if (out->data == NULL)
        out->data = (const char *)out->ids;
}

kv_status_t kv_row_sum_init(const kv_host_t *host, kv_dtype_t dtype, int64_t row_count,
                            int num_sets, const kv_rowset_t *const *sets, kv_row_sum_t *out)
{
    merge_job_t job = {.num_sets = num_sets,
                       .sets = sets,
                       .row_bytes = (size_t)row_count * kv_dtype_bytes(dtype),
                       .num_cuts = 1};
    kv_row_sum_t sum = {.dtype = dtype, .row_count = row_count, .row_bytes = job.row_bytes};
    int64_t total = 0;
    for (int k = 0; k < num_sets; k++) {
        total += sets[k]->num_rows;
        if (sets[k]->num_rows > sets[job.largest]->num_rows)
            job.largest = k;
    }
    if (sets[job.largest]->num_rows == total) {
        describe_single(sets[job.largest], &sum);
        *out = sum;
        return KV_OK;
    }
    if (host->num_threads > 1 && total >= CUTS_FROM) {
        int64_t most = (int64_t)host->num_threads * 4 < MAX_CUTS ? host->num_threads * 4 : MAX_CUTS;
        job.num_cuts = (int)(total / CUT_ROWS < most ? total / CUT_ROWS : most);
    }
    size_t cursor_bytes = (size_t)job.num_cuts * (size_t)num_sets * sizeof *job.cursors,
           part_bytes = (size_t)total * sizeof *job.parts,
           id_bytes = (size_t)total * sizeof *job.ids,
           start_bytes = ((size_t)total + 1) * sizeof *job.starts;
    char *block = kv_alloc(cursor_bytes + part_bytes + id_bytes + start_bytes);
    KV_TRY_ALLOC(block, "the union of row-sparse values");
    job.cursors = (cursor_t *)block;
    job.parts = (const void **)(block + cursor_bytes);
    job.ids = (int64_t *)(block + cursor_bytes + part_bytes);
    job.starts = (int64_t *)(block + cursor_bytes + part_bytes + id_bytes);
    kv_team_run(host->team, host->num_threads, job.num_cuts, merge_cut, &job);
    for (int i = 0; i < job.num_cuts; i++) {
        const cut_t *cut = &job.cuts[i];
        size_t bytes = (size_t)cut->num_rows * sizeof(int64_t);
        memmove(job.ids + sum.num_rows, job.ids + cut->first_part, bytes);
        memmove(job.starts + sum.num_rows, job.starts + cut->first_part, bytes);
        sum.num_rows += cut->num_rows;
    }
    job.starts[sum.num_rows] = total;
    sum.ids = job.ids;
    sum.parts = job.parts;
    sum.starts = job.starts;
    sum.block = block;
    *out = sum;
    return KV_OK;
}

void kv_row_sum_fini(kv_row_sum_t *sum)
{
    kv_free(sum->block);
    *sum = (kv_row_sum_t){0};
}

/* ------------------------------------------------------------------- writing the sums down */

typedef struct write_job {
    const kv_host_t *host;
    const kv_row_sum_t *sum;
    kv_row_grid_t grid;
    int num_dst;
    void *const *dst;
} write_job_t;

/* The block's elements of row i of the sum, to the row at `to`. */
static void sum_row(const write_job_t *job, const kv_row_block_t *block, int64_t i, char *to)
{
    const kv_row_sum_t *sum = job->sum;
    const void *single, *const *parts;
    void *dst = to;
    int num_parts = kv_row_sum_parts(sum, i, &single, &parts);
    job->host->kernels->sum[sum->dtype](block->begin, block->end, num_parts, parts, 1, &dst, false);
}

static void write_block(void *context, int64_t index)
{
    const write_job_t *job = context;
    const kv_row_sum_t *sum = job->sum;
    kv_row_block_t block = kv_row_block(&job->grid, index);
    for (int64_t i = block.row; i < block.row_end; i++)
        sum_row(job, &block, i, (char *)job->dst[0] + (size_t)i * sum->row_bytes);
}

void kv_rows_write(const kv_host_t *host, const kv_row_sum_t *sum, int64_t *ids, void *data)
{
    if (ids != NULL && sum->num_rows > 0)
        memcpy(ids, sum->ids, (size_t)sum->num_rows * sizeof *ids);
    if (sum->num_rows == 0 || sum->row_bytes == 0)
        return;
    if (sum->data != NULL) {
        const void *src = sum->data;
        kv_host_sum(host, sum->dtype, sum->num_rows * sum->row_count, 1, &src, 1, &data);
        return;
    }
    int64_t num_parts = sum->starts[sum->num_rows] / sum->num_rows + 1;
    write_job_t job = {.host = host, .sum = sum, .num_dst = 1, .dst = &data};
    job.grid =
        kv_row_grid(host, sum->num_rows, sum->row_count, (num_parts + 1) * (int64_t)sum->row_bytes);
    kv_team_run(host->team, host->num_threads, job.grid.num_blocks, write_block, &job);
}

static void dense_block(void *context, int64_t index)
{
    const write_job_t *job = context;
    const kv_row_sum_t *sum = job->sum;
    kv_row_block_t block = kv_row_block(&job->grid, index);
    size_t element = kv_dtype_bytes(sum->dtype), row_bytes = sum->row_bytes;
    size_t begin = (size_t)block.begin * element, end = (size_t)block.end * element;
    int64_t i = kv_row_seek(sum->ids, sum->num_rows, 0, block.row);
    for (int64_t row = block.row; row < block.row_end; row++, i++) {
        int64_t next =
            i < sum->num_rows && sum->ids[i] < block.row_end ? sum->ids[i] : block.row_end;
        /* Cut rows come one at a time, so what is between them is theirs as well. */
        if (row < next)
            for (int j = 0; j < job->num_dst; j++)
                memset((char *)job->dst[j] + (size_t)row * row_bytes + begin, 0,
                       (size_t)(next - 1 - row) * row_bytes + end - begin);
        row = next;
        if (row == block.row_end)
            break;
        char *to = (char *)job->dst[0] + (size_t)row * row_bytes;
        sum_row(job, &block, i, to);
        for (int j = 1; j < job->num_dst; j++)
            memcpy((char *)job->dst[j] + (size_t)row * row_bytes + begin, to + begin, end - begin);
    }
}

void kv_rows_to_dense(const kv_host_t *host, const kv_row_sum_t *sum, int64_t num_rows, int num_dst,
                      void *const *dst)
{
    if (sum->row_bytes == 0)
        return;
    write_job_t job = {.host = host, .sum = sum, .num_dst = num_dst, .dst = dst};
    job.grid = kv_row_grid(host, num_rows, sum->row_count, (num_dst + 1) * (int64_t)sum->row_bytes);
    kv_team_run(host->team, host->num_threads, job.grid.num_blocks, dense_block, &job);
}
