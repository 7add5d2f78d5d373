/* How a value is cut into slices, and which server gets which.
 *
 * Values that an optimizer in Python will need are not cut at all (client_build.c). Other slices
 * are at most KV_WIRE_SLICE_BYTES long and end on row boundaries where a row fits, else on element
 * boundaries. A value that is large enough is cut into as many slices as there are servers or more,
 * so that all of them carry a part. Each slice goes to the server that has the fewest bytes so far;
 * the slices of one call are dealt out largest first.
 *
 * Slices of a row-sparse value end on row boundaries. They are larger, for of most rows there is
 * nothing, and not too many, for each of them has a part in every push.
 */
#ifndef KV_PS_PLACEMENT_H
#define KV_PS_PLACEMENT_H

#include "base/status.h"
#include <stddef.h>
#include <stdint.h>

/* Bytes of every slice but the last of a value of `bytes` (a value without elements has one slice
 * of none). */
size_t kv_slice_bytes(size_t bytes, size_t row_bytes, size_t item_bytes, int32_t num_servers);
uint32_t kv_slice_count(size_t bytes, size_t slice_bytes);
/* The same in rows, of a row-sparse value. */
int64_t kv_slice_rows(int64_t num_rows, size_t row_bytes, int32_t num_servers);
uint32_t kv_slice_count_rows(int64_t num_rows, int64_t slice_rows);

typedef struct kv_placed {
    size_t bytes, slice_bytes;
    uint32_t num_slices;
    uint16_t *servers; /* out: [num_slices] */
} kv_placed_t;

/* Chooses servers for the values of one call; `loads` [num_servers], in bytes, is brought up to
 * date. On failure (KV_NO_MEMORY) loads are as they were. */
KV_MUST_CHECK kv_status_t kv_place(uint64_t *loads, int32_t num_servers, kv_placed_t *values,
                                   int64_t num_values);

#endif
