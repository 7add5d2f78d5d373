/* Rows copied from where they are: out of dense arrays and out of row sets. */
#include "comm/rows.h"
#include "comm/row_grid.h"
#include <string.h>

enum { BATCH = 256 }; /* rows whose places are looked up before they are copied */

typedef struct copy_job {
    kv_row_grid_t grid; /* its elements are bytes */
    size_t row_bytes;
    const kv_rowset_t *set; /* NULL: `ids` are places in `from` */
    const int64_t *ids;
    const char *from;
    char *out;
} copy_job_t;

/* The bytes [begin, end) of `count` rows; those without a place become zeros. */
static void copy_rows(const copy_job_t *job, size_t begin, size_t end, int64_t count,
                      const int64_t *places, char *out)
{
    size_t row_bytes = job->row_bytes, bytes = end - begin;
    const char *from = job->from; /* NULL if there is no row at all */
    out += begin;
    int64_t ahead = kv_rows_ahead(kv_row_lines(bytes));
    for (int64_t i = 0; i < count && i < ahead; i++)
        if (places[i] >= 0)
            kv_row_prefetch(from + (size_t)places[i] * row_bytes + begin, bytes);
    for (int64_t i = 0; i < count; i++, out += row_bytes) {
        if (i + ahead < count && places[i + ahead] >= 0)
            kv_row_prefetch(from + (size_t)places[i + ahead] * row_bytes + begin, bytes);
        if (places[i] >= 0)
            memcpy(out, from + (size_t)places[i] * row_bytes + begin, bytes);
        else
            memset(out, 0, bytes);
    }
}

static void copy_block(void *context, int64_t index)
{
    const copy_job_t *job = context;
    kv_row_block_t block = kv_row_block(&job->grid, index);
    size_t begin = (size_t)block.begin, end = (size_t)block.end;
    for (int64_t i = block.row; i < block.row_end;) {
        int64_t where[BATCH];
        const int64_t *places = job->ids + i;
        int64_t count = block.row_end - i;
        if (job->set != NULL) {
            count = count < BATCH ? count : BATCH;
            kv_rows_locate(job->set, count, places, where);
            places = where;
        }
        copy_rows(job, begin, end, count, places, job->out + (size_t)i * job->row_bytes);
        i += count;
    }
}

static void copy(const kv_host_t *host, int64_t num_ids, copy_job_t *job)
{
    if (num_ids == 0 || job->row_bytes == 0)
        return;
    job->grid = kv_row_grid(host, num_ids, (int64_t)job->row_bytes, 2 * (int64_t)job->row_bytes);
    kv_team_run(host->team, host->num_threads, job->grid.num_blocks, copy_block, job);
}

void kv_rows_gather(const kv_host_t *host, size_t row_bytes, int64_t num_ids, const int64_t *ids,
                    const void *dense, void *out)
{
    copy_job_t job = {.row_bytes = row_bytes, .ids = ids, .from = dense, .out = out};
    copy(host, num_ids, &job);
}

void kv_rows_select(const kv_host_t *host, size_t row_bytes, const kv_rowset_t *set,
                    int64_t num_ids, const int64_t *ids, void *out)
{
    copy_job_t job = {
        .row_bytes = row_bytes, .set = set, .ids = ids, .from = kv_rowset_data(set), .out = out};
    copy(host, num_ids, &job);
}

int64_t kv_rows_locate(const kv_rowset_t *set, int64_t num_ids, const int64_t *ids, int64_t *where)
{
    const int64_t *there = kv_rowset_ids(set);
    int64_t num_rows = set->num_rows, absent = 0;
    if (num_rows > 0 && there[num_rows - 1] - there[0] == num_rows - 1) {
        for (int64_t i = 0; i < num_ids; i++) {
            bool inside = ids[i] >= there[0] && ids[i] <= there[num_rows - 1];
            where[i] = inside ? ids[i] - there[0] : -1;
            absent += !inside;
        }
        return absent;
    }
    int64_t at = 0;
    for (int64_t i = 0; i < num_ids; i++) {
        at = kv_row_seek(there, num_rows, at, ids[i]);
        bool found = at < num_rows && there[at] == ids[i];
        where[i] = found ? at : -1;
        absent += !found;
    }
    return absent;
}

/* --------------------------------------------------------------------- rows that are not zero */

enum { MAX_RANGES = 256, LINE_WORDS = 8 };

typedef struct nonzero_job {
    const char *dense;
    size_t row_bytes;
    uint64_t mask; /* the bits of a word that make an element not zero: all but a float's sign */
    int64_t num_rows, rows; /* of the array, of a range */
    int64_t *ids;
    int64_t found[MAX_RANGES];
} nonzero_job_t;

static bool row_nonzero(const char *row, size_t bytes, uint64_t mask)
{
    uint64_t words[LINE_WORDS];
    for (; bytes >= sizeof words; row += sizeof words, bytes -= sizeof words) {
        uint64_t bits = 0;
        memcpy(words, row, sizeof words);
        for (int i = 0; i < LINE_WORDS; i++)
            bits |= words[i];
        if ((bits & mask) != 0)
            return true;
    }
    uint64_t bits = 0;
    memset(words, 0, sizeof words);
    memcpy(words, row, bytes);
    for (int i = 0; i < LINE_WORDS; i++)
        bits |= words[i];
    return (bits & mask) != 0;
}

static void nonzero_range(void *context, int64_t range)
{
    nonzero_job_t *job = context;
    int64_t begin = range * job->rows;
    int64_t end = job->num_rows - begin < job->rows ? job->num_rows : begin + job->rows;
    int64_t found = 0;
    for (int64_t i = begin; i < end; i++) {
        job->ids[begin + found] = i;
        found += row_nonzero(job->dense + (size_t)i * job->row_bytes, job->row_bytes, job->mask);
    }
    job->found[range] = found;
}

static uint64_t value_bits(kv_dtype_t dtype)
{
    switch (dtype) {
    case KV_FLOAT64:
        return UINT64_C(0x7fffffffffffffff);
    case KV_FLOAT32:
        return UINT64_C(0x7fffffff7fffffff);
    case KV_FLOAT16:
    case KV_BFLOAT16:
        return UINT64_C(0x7fff7fff7fff7fff);
    default:
        return UINT64_MAX;
    }
}

int64_t kv_rows_nonzero(const kv_host_t *host, kv_dtype_t dtype, int64_t num_rows,
                        int64_t row_count, const void *dense, int64_t *ids)
{
    if (num_rows == 0 || row_count == 0)
        return 0;
    nonzero_job_t job = {.dense = dense,
                         .row_bytes = (size_t)row_count * kv_dtype_bytes(dtype),
                         .mask = value_bits(dtype),
                         .num_rows = num_rows,
                         .ids = ids};
    kv_row_grid_t grid = kv_row_grid(host, num_rows, 1, (int64_t)job.row_bytes);
    int64_t most = (num_rows + MAX_RANGES - 1) / MAX_RANGES;
    job.rows = grid.rows > most ? grid.rows : most;
    int64_t num_ranges = (num_rows + job.rows - 1) / job.rows, found = 0;
    kv_team_run(host->team, host->num_threads, num_ranges, nonzero_range, &job);
    for (int64_t i = 0; i < num_ranges; i++) {
        memmove(ids + found, ids + i * job.rows, (size_t)job.found[i] * sizeof *ids);
        found += job.found[i];
    }
    return found;
}
