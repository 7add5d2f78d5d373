/* Sums of squares in the order of comm/update_internal.h: the squares of 64 elements one after the
 * other in the wide type, and the sums of such blocks, the leaves, pairwise in double.
 *
 * The threads of a block add KV_THREADS leaves at a time, a whole subtree since that is a power of
 * two, and put the sums of subtrees together as the bits of a counter.
 */
#ifndef KV_CUDA_TREE_H
#define KV_CUDA_TREE_H

#include "cuda/batch.h"

enum { KV_LEAF = 64, KV_LEVELS = 48 };
static_assert((int)KV_DEVICE_SQUARES == (int)KV_LEAF * KV_THREADS,
              "a block of threads adds up the squares of so many elements");
static_assert((KV_THREADS & (KV_THREADS - 1)) == 0, "subtrees are whole only then");

/* leaf(first) + … + leaf(first + leaves - 1), as a tree; at least one. Called by all threads of a
 * block; thread 0 gets the sum, the others nothing. All have come to a barrier after the last leaf.
 */
template <typename LEAF> __device__ double kv_tree(const LEAF &leaf, int64_t first, int64_t leaves)
{
    __shared__ double sums[KV_THREADS];
    double level[KV_LEVELS]; /* thread 0's */
    int64_t subtrees = 0;
    for (int64_t from = 0; from < leaves; from += KV_THREADS) {
        int64_t left = leaves - from;
        int here = left < KV_THREADS ? (int)left : (int)KV_THREADS, me = (int)threadIdx.x;
        if (me < here)
            sums[me] = leaf(first + from + me);
        for (int apart = 1; apart < here; apart *= 2) {
            __syncthreads();
            if (me % (2 * apart) == 0 && me + apart < here)
                sums[me] += sums[me + apart];
        }
        if (me == 0) {
            double sum = sums[0];
            int at = 0;
            for (int64_t bits = subtrees; (bits & 1) != 0; bits >>= 1)
                sum = level[at++] + sum;
            level[at] = sum;
        }
        subtrees++;
        __syncthreads();
    }
    double sum = 0;
    bool any = false;
    for (int at = 0; threadIdx.x == 0 && subtrees >> at != 0; at++)
        if ((subtrees >> at & 1) != 0) {
            sum = any ? level[at] + sum : level[at];
            any = true;
        }
    return sum;
}

#endif
