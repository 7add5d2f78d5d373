/* How a pass over rows is cut for the team, and the small things that all such passes share. For
 * comm/ alone.
 *
 * A block is a range of whole rows or, where one row is large, a piece of one row. Rows that lie
 * here and there cost the memory's latency, so a block asks for a row some rows ahead.
 */
#ifndef KV_COMM_ROW_GRID_H
#define KV_COMM_ROW_GRID_H

#include "comm/host.h"
#include <stddef.h>
#include <stdint.h>

typedef struct kv_row_grid {
    int64_t num_rows, row_count;
    int64_t rows;   /* of a block; 1 where rows are cut */
    int64_t count;  /* elements of a row in a block */
    int64_t pieces; /* of a row */
    int64_t num_blocks;
} kv_row_grid_t;

/* Rows [row, row_end), of each the elements [begin, end). */
typedef struct kv_row_block {
    int64_t row, row_end, begin, end;
} kv_row_block_t;

enum {
    KV_LINE = 64,
    KV_ROW_LINES = 8,    /* lines of a row asked for; the processor goes on by itself */
    KV_LINES_AHEAD = 64, /* lines asked for before their turn; with more, some come too late */
    KV_ROW_COST = 192,   /* what it costs to come to a row, in bytes of traffic */
};

/* `traffic`: bytes read and written for one row, its ids not counted. num_rows >= 0,
 * row_count >= 1. One block when helpers do not pay. */
static inline kv_row_grid_t kv_row_grid(const kv_host_t *host, int64_t num_rows, int64_t row_count,
                                        int64_t traffic)
{
    const int64_t alone = INT64_C(1) << 20, smallest = INT64_C(128) << 10,
                  largest = INT64_C(4) << 20, unit = 4096;
    kv_row_grid_t grid = {.num_rows = num_rows,
                          .row_count = row_count,
                          .rows = num_rows,
                          .count = row_count,
                          .pieces = 1,
                          .num_blocks = num_rows > 0};
    traffic += KV_ROW_COST;
    int64_t total = num_rows * traffic;
    if (total < alone || host->num_threads == 1)
        return grid;
    /* Many: at the end all but one thread wait for the last block. */
    int64_t bytes = total / ((int64_t)host->num_threads * 16);
    bytes = bytes < smallest ? smallest : bytes > largest ? largest : bytes;
    grid.rows = bytes / traffic;
    if (grid.rows == 0) {
        grid.rows = 1;
        grid.count = (bytes / (traffic / row_count + 1) / unit + 1) * unit;
        grid.pieces = (row_count + grid.count - 1) / grid.count;
    }
    grid.num_blocks = (num_rows + grid.rows - 1) / grid.rows * grid.pieces;
    return grid;
}

static inline kv_row_block_t kv_row_block(const kv_row_grid_t *grid, int64_t i)
{
    kv_row_block_t block = {.row = i / grid->pieces * grid->rows,
                            .begin = i % grid->pieces * grid->count};
    block.row_end =
        grid->num_rows - block.row < grid->rows ? grid->num_rows : block.row + grid->rows;
    block.end =
        grid->row_count - block.begin < grid->count ? grid->row_count : block.begin + grid->count;
    return block;
}

/* With a bound that the compiler knows, which takes the loop apart: a loop here costs each row a
 * branch that is not foreseen. */
static inline void kv_row_prefetch(const void *row, size_t bytes)
{
    /* gcc takes a function that only prefetches for one without effect and drops its calls. */
    __asm__ volatile("");
    const char *from = row, *end = from + bytes;
    from -= (uintptr_t)from % KV_LINE;
    for (int i = 0; i < KV_ROW_LINES && from < end; i++, from += KV_LINE)
        __builtin_prefetch(from);
}

/* Lines that kv_row_prefetch asks for. */
static inline int64_t kv_row_lines(size_t bytes)
{
    return bytes < KV_ROW_LINES * KV_LINE ? (int64_t)(bytes + KV_LINE - 1) / KV_LINE : KV_ROW_LINES;
}

/* How many rows ahead to ask for one that is so many lines in all arrays together. */
static inline int64_t kv_rows_ahead(int64_t lines)
{
    return lines < KV_LINES_AHEAD ? KV_LINES_AHEAD / (lines + (lines == 0)) : 1;
}

/* The first place at or after `at` where the increasing ids are not below `id`: near places by
 * steps, far ones by doubling them, so that two lists merge in the time of the shorter one's length
 * times the logarithm of the other's share. */
static inline int64_t kv_row_seek(const int64_t *ids, int64_t num_ids, int64_t at, int64_t id)
{
    const int64_t near = 8;
    int64_t step = near;
    for (; num_ids - at > step && ids[at + step] < id; step *= 2)
        at += step;
    for (; step > near; step /= 2)
        if (num_ids - at > step / 2 && ids[at + step / 2] < id)
            at += step / 2;
    while (at < num_ids && ids[at] < id)
        at++;
    return at;
}

#endif
