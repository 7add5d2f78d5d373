/* A call of a dist store on its way: what dist.c starts and ends, and dist_target.c prepares. */
#ifndef KV_STORE_DIST_H
#define KV_STORE_DIST_H

#include "ps/client.h"
#include "store/internal.h"

/* One key of a request. Its views are the request's own copies. */
typedef struct kv_target {
    kv_entry_t *entry; /* pinned */
    int32_t num_values, num_outs;
    kv_view_t *values, *outs;
    kv_staged_t *staged;  /* what stands in for its arrays in device memory, or NULL */
    const void *plain;    /* what is to go out, before it is encoded */
    char *merging;        /* memory for the merging of several values */
    void *residual;       /* of what is to be encoded */
    kv_buffer_t *sent;    /* what goes out, when it is not a value itself: their sum, or codes */
    kv_buffer_t *arrived; /* where the answer goes, when it is not an out itself */
    kv_dist_rows_t rows;
} kv_target_t;

typedef struct kv_request {
    kv_client_call_t call;
    kv_op_t op;
    kv_op_t copy; /* writes the outs that the answer did not go to */
    _Atomic int32_t refs;
    _Atomic int state;     /* ISSUED | SENT | DONE */
    _Atomic bool given_up; /* who waited for it has been told why no more */
    kv_engine_t *engine;
    kv_client_t *client;
    kv_host_t host;
    kv_codec_t codec; /* for floating values */
    uint64_t codec_epoch;
    kv_hold_t *hold;
    kv_handle_t *sent;   /* for the thread that waits until the values have gone out; may be NULL */
    bool push, own_outs; /* the outs are written here, not by a waiting caller */
    bool expected;       /* the client knows that there will be a call */
    int32_t first_value, first_key; /* in op.deps */
    kv_status_t status, copied;
    kv_sentence_t sentence;
    int64_t num_targets;
    kv_target_t *targets;
    kv_client_part_t *parts;
    kv_client_step_t *steps; /* of the targets; NULL: none */
    kv_var_t **keys;         /* that an error of a push is stored on */
    kv_dep_t *deps;
    int32_t num_deps;
} kv_request_t;

/* With the key held until kv_target_fill. Fills in the part: what will go out and where the answer
 * goes, with all memory for it. */
KV_MUST_CHECK kv_status_t kv_target_prepare(kv_request_t *request, int64_t i);
/* Its values are there: they are merged and encoded. */
void kv_target_fill(kv_request_t *request, int64_t i);
/* Whether its one value goes out from where it lies. */
bool kv_target_is_plain(const kv_target_t *target);
void kv_target_fini(kv_target_t *target);

#endif
