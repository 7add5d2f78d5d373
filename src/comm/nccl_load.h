/* The functions of NCCL that comm/nccl.c uses, as its documentation describes them; no header of
 * NCCL is there when this is built. */
#ifndef KV_COMM_NCCL_LOAD_H
#define KV_COMM_NCCL_LOAD_H

#include "comm/nccl.h"
#include <limits.h>

enum {
    KV_NCCL_SUCCESS = 0,
    KV_NCCL_IN_PROGRESS = 7,
    KV_NCCL_SUM = 0, /* among the ways to reduce */
    /* 2.18.0, the oldest version that is used: before, a communicator that does not block was new.
     */
    KV_NCCL_OLDEST = 21800,
    KV_NCCL_UNSET = INT_MIN,
};

#define KV_NCCL_MAGIC 0xcafebeefu

typedef struct kv_nccl_comm *kv_nccl_comm_t;

/* ncclConfig_t as of 2.18. It grows at its end only: a newer library reads `bytes` of it, gives
 * what `version` did not have its default, and nothing is set that 2.18 has not. The last member is
 * padding there, a setting in newer ones, and unset for both. */
typedef struct kv_nccl_config {
    size_t bytes;
    unsigned magic, version;
    int blocking;
    int cluster_size, min_blocks, max_blocks;
    const char *network;
    int split_share;
    int unused;
} kv_nccl_config_t;

/* X(name, arguments). Each returns a ncclResult_t. */
#define KV_NCCL_CALLS(X)                                                                           \
    X(ncclGetVersion, (int *version))                                                              \
    X(ncclGetUniqueId, (kv_nccl_id_t * out))                                                       \
    X(ncclCommInitRankConfig,                                                                      \
      (kv_nccl_comm_t * out, int num_ranks, kv_nccl_id_t id, int rank, kv_nccl_config_t *config))  \
    X(ncclCommFinalize, (kv_nccl_comm_t comm))                                                     \
    X(ncclCommDestroy, (kv_nccl_comm_t comm))                                                      \
    X(ncclCommAbort, (kv_nccl_comm_t comm))                                                        \
    X(ncclCommGetAsyncError, (kv_nccl_comm_t comm, int *out))                                      \
    X(ncclGroupStart, (void))                                                                      \
    X(ncclGroupEnd, (void))                                                                        \
    X(ncclAllReduce, (const void *src, void *dst, size_t count, int dtype, int way,                \
                      kv_nccl_comm_t comm, void *stream))                                          \
    X(ncclBroadcast, (const void *src, void *dst, size_t count, int dtype, int root,               \
                      kv_nccl_comm_t comm, void *stream))

typedef struct kv_nccl_library {
#define KV_NCCL_MEMBER(name, arguments) int(*name) arguments;
    KV_NCCL_CALLS(KV_NCCL_MEMBER)
#undef KV_NCCL_MEMBER
    const char *(*ncclGetErrorString)(int result);
    const char *(*ncclGetLastError)(kv_nccl_comm_t comm); /* NULL: of this process */
} kv_nccl_library_t;

/* The library, opened if it was not. As kv_nccl_load. */
KV_MUST_CHECK kv_status_t kv_nccl_library(const kv_nccl_library_t **out);

/* ncclDataType_t of an element type. */
int kv_nccl_dtype(kv_dtype_t dtype);

#endif
