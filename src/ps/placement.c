/* How a value is cut into slices, and which server gets which. */
#include "ps/placement.h"
#include "base/memory.h"
#include "ps/wire.h"
#include <stdbool.h>
#include <stdlib.h>

/* Into slices below SMALLEST a value is not cut: many values are even when each goes whole to the
 * server that has least, and a message costs as much as to copy 100 KiB. */
enum { SMALLEST = 384 << 10, SHARED_ROWS_BYTES = 256 << 10 };

/* The slice that is cut at multiples of `unit` and gives about `pieces`: not fewer than `servers`.
 * Rounded up, since a remainder would be one slice more on one server. */
static size_t fit(size_t bytes, size_t pieces, size_t unit, size_t servers)
{
    size_t wanted = (bytes + pieces - 1) / pieces;
    size_t slice = (wanted + unit - 1) / unit * unit;
    bool fits = slice <= KV_WIRE_SLICE_BYTES && (bytes + slice - 1) / slice >= servers;
    return fits ? slice : wanted / unit * unit;
}

size_t kv_slice_bytes(size_t bytes, size_t row_bytes, size_t item_bytes, int32_t num_servers)
{
    size_t pieces = (bytes + KV_WIRE_SLICE_BYTES - 1) / KV_WIRE_SLICE_BYTES;
    size_t servers = bytes / SMALLEST;
    if (servers <= 1)
        return bytes > 0 ? bytes : item_bytes;
    if (servers > (size_t)num_servers)
        servers = (size_t)num_servers;
    pieces = (pieces + servers - 1) / servers * servers;
    size_t slice = row_bytes > 0 ? fit(bytes, pieces, row_bytes, servers) : 0;
    return slice > 0 ? slice : fit(bytes, pieces, item_bytes, servers);
}

uint32_t kv_slice_count(size_t bytes, size_t slice_bytes)
{
    return bytes == 0 ? 1 : (uint32_t)((bytes - 1) / slice_bytes + 1);
}

/* A slice of rows should not be larger than ROWS_BYTES if all rows are there, but there should not
 * be more than MOST of them either. */
enum { ROWS_BYTES = 32 << 20, MOST = 1024 };

int64_t kv_slice_rows(int64_t num_rows, size_t row_bytes, int32_t num_servers)
{
    int64_t servers = num_servers, fit = (int64_t)(ROWS_BYTES / (row_bytes + sizeof(int64_t)));
    int64_t pieces = num_rows / (fit > 0 ? fit : 1) + 1;
    if (row_bytes > 0 && (size_t)num_rows >= SHARED_ROWS_BYTES / row_bytes)
        pieces = (pieces + servers - 1) / servers * servers;
    if (pieces > MOST)
        pieces = servers < MOST ? MOST / servers * servers : servers;
    int64_t rows = num_rows / pieces + (num_rows % pieces != 0);
    return rows > 0 ? rows : 1;
}

uint32_t kv_slice_count_rows(int64_t num_rows, int64_t slice_rows)
{
    return num_rows == 0 ? 1 : (uint32_t)((num_rows - 1) / slice_rows + 1);
}

typedef struct piece {
    size_t bytes;
    size_t order; /* as they came */
    uint16_t *server;
} piece_t;

static int largest_first(const void *a, const void *b)
{
    const piece_t *x = a;
    const piece_t *y = b;
    if (x->bytes != y->bytes)
        return x->bytes < y->bytes ? 1 : -1;
    return (x->order > y->order) - (x->order < y->order);
}

kv_status_t kv_place(uint64_t *loads, int32_t num_servers, kv_placed_t *values, int64_t num_values)
{
    size_t count = 0;
    for (int64_t i = 0; i < num_values; i++)
        count += values[i].num_slices;
    piece_t *pieces = kv_calloc(count, sizeof *pieces);
    KV_TRY_ALLOC(pieces, "the places of slices");
    size_t at = 0;
    for (int64_t i = 0; i < num_values; i++) {
        size_t left = values[i].bytes;
        for (uint32_t slice = 0; slice < values[i].num_slices; slice++) {
            size_t bytes = left < values[i].slice_bytes ? left : values[i].slice_bytes;
            pieces[at] = (piece_t){bytes, at, &values[i].servers[slice]};
            left -= bytes;
            at++;
        }
    }
    qsort(pieces, count, sizeof *pieces, largest_first);
    for (size_t i = 0; i < count; i++) {
        int32_t best = 0;
        for (int32_t server = 1; server < num_servers; server++)
            if (loads[server] < loads[best])
                best = server;
        *pieces[i].server = (uint16_t)best;
        loads[best] += pieces[i].bytes;
    }
    kv_free(pieces);
    return KV_OK;
}
