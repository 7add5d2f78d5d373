/* Merging inside one process, in host memory: n values are summed and the sum is written to the
 * stored value and to the outs, in one pass over memory, by the calling thread alone when it is
 * small and with the team when it is large.
 */
#ifndef KV_COMM_HOST_H
#define KV_COMM_HOST_H

#include "array/dtype.h"
#include "kernels/kernels.h"
#include "kernels/team.h"
#include <stdint.h>

typedef struct kv_host {
    const kv_kernels_t *kernels;
    kv_team_t *team;
    int num_threads;
} kv_host_t;

/* dst[j][i] = src[0][i] + src[1][i] + … for all j. Same rules for memory as kv_kernels_t.sum;
 * num_src, num_dst >= 1. A single source that is also a destination is left alone. */
void kv_host_sum(const kv_host_t *host, kv_dtype_t dtype, int64_t count, int num_src,
                 const void *const *src, int num_dst, void *const *dst);

#endif
