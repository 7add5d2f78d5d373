/* What the files of the server share.
 *
 *   server.c         its life; messages in; deadlines
 *   server_answer.c  requests, and answers on their way out
 *   server_slice.c   slices of values: rounds, versions, those who wait
 *   server_missing.c whom those wait for
 *   server_round.c   how the pushes of a round become the next version: sums, optimizers
 *   server_rows.c    the same with rows; row-sparse slices
 *   server_state.c   what optimizers keep with slices, for files
 *   server_update.c  rounds of optimizers in Python
 *   server_norms.c   steps that take norms of all slices of a value, also of other servers' ones
 *   server_keys.c    the directory of declared keys; deletes
 *
 * One lock guards everything. It is dropped for sums; whoever works on a slice meanwhile has marked
 * it as busy, and what happens to it then waits in its lists.
 *
 * Every wish of a worker is a kv_request_t from the arrival of its record to the end of its answer.
 * It is in use for its answer, and apart from that while its data is part of a round: a push whose
 * deadline has passed is answered and stays there.
 */
#ifndef KV_PS_SERVER_INTERNAL_H
#define KV_PS_SERVER_INTERNAL_H

#include "comm/slots.h"
#include "ps/pool.h"
#include "ps/server.h"
#include "ps/wire.h"

typedef struct kv_request kv_request_t;
typedef struct kv_slice kv_slice_t;
typedef struct kv_server_key kv_server_key_t;
typedef struct kv_declared_key kv_declared_key_t;
typedef struct kv_declare kv_declare_t;
typedef struct kv_key_norms kv_key_norms_t;
typedef struct kv_row_round kv_row_round_t;

/* A table of objects by two numbers; a node stands first in its object. Never fails: a table that
 * cannot grow gets slower. */
typedef struct kv_index_node {
    uint64_t number;
    uint32_t part;
    struct kv_index_node *next; /* in the same chain */
} kv_index_node_t;

typedef struct kv_index {
    kv_index_node_t **chains;
    uint64_t num_chains; /* a power of two; 0: `single` is all there is */
    int64_t num_nodes;
    kv_index_node_t *single;
} kv_index_t;

/* The first node with these numbers; others may follow in its chain. */
kv_index_node_t *kv_index_find(const kv_index_t *index, uint64_t number, uint32_t part);
void kv_index_add(kv_index_t *index, kv_index_node_t *node);
void kv_index_remove(kv_index_t *index, kv_index_node_t *node);
kv_index_node_t *kv_index_any(const kv_index_t *index); /* NULL: it is empty */
void kv_index_fini(kv_index_t *index);

struct kv_request {
    kv_net_message_t message; /* first; its answer, or one that was gathered from many */
    kv_server_t *server;
    kv_wire_header_t header; /* of its message, with its own record */
    int32_t worker;
    int uses;
    int64_t deadline_ns; /* when it is answered with KV_TIMEOUT */
    bool waiting;        /* in the server's list of those not yet answered */
    bool whole;          /* `buffer` has nothing else in it */
    kv_buffer_t *buffer; /* a message's payload, a push's data */
    const void *data;
    kv_error_t *failure; /* a push that is none: its round will fail */
    kv_slice_t *slice;
    kv_server_key_t *key;
    kv_declare_t *declare;
    kv_request_t *wait_prev, *wait_next;
    kv_request_t *next; /* in a list of its slice or key; in the list of free requests */
    kv_request_t *out_next;
    /* The answer: */
    kv_error_t *error; /* NULL: it is good */
    kv_buffer_t *value;
    size_t value_bytes;
};

typedef struct kv_slice_worker {
    kv_request_t *pushes;  /* by round, those of the future too */
    kv_request_t *summing; /* its push of the round that is being completed; async: one has */
    uint64_t applied;      /* async: how many of its pushes */
} kv_slice_worker_t;

/* What a slice that is busy is about. */
typedef enum kv_phase {
    KV_PHASE_WHOLE,    /* the round */
    KV_PHASE_MEASURES, /* the sums for the norms of the whole value; then it waits for the others'
                        */
    KV_PHASE_ENDS,     /* the step with these */
    KV_PHASE_SUMS,     /* the sum for an optimizer in Python; then it waits for that */
} kv_phase_t;

struct kv_slice {
    kv_index_node_t node; /* first; key number, slice number */
    kv_server_t *server;
    kv_server_key_t *key;
    kv_slice_t *sibling; /* of the same key */
    kv_dtype_t dtype;
    size_t bytes;
    int64_t row_count;   /* elements of a row of the value */
    kv_buffer_t *stored; /* this version; NULL: the first value is still on its way, or … */
    bool sparse;         /* … it is row-sparse; then `bytes` is what is stored … */
    kv_rowset_t rows;    /* … and nobody else has a share of it */
    int64_t num_rows;    /* row-sparse: stored or not */
    uint64_t version;
    kv_request_t *pulls;    /* that wait for a version, and those on the state */
    int32_t turn;           /* async: the worker whose push is looked for first */
    kv_slots_t *slots;      /* an optimizer's state, NULL: none yet */
    kv_step_t step;         /* the newest one that was taken, if there are slots */
    int64_t training;       /* what the slots are of */
    uint64_t optimizer;     /* the number of the one whose step was taken last */
    kv_server_kept_t *kept; /* of an optimizer in Python, with the slots; or, until a round … */
    kv_buffer_t *loaded;    /* … has taken it, what came from a file */
    bool reading;           /* `kept` is with the thread that serves: no round begins */
    kv_buffer_t *packed;    /* what that has made of it, for those who wait */
    kv_buffer_t *encoded;   /* kv_wire_put_key, of a value in one slice; NULL: not told */
    /* A round that is being completed: */
    bool busy;
    bool steps;   /* by `step` */
    bool by_rows; /* its pushes are rows */
    kv_phase_t phase;
    kv_norm_sums_t sums;       /* of its own; KV_PHASE_ENDS: of all slices */
    kv_buffer_t *made;         /* the next version; may be `stored`, which nobody may read then */
    kv_buffer_t *recv;         /* KV_PHASE_SUMS: the sum of the pushes … */
    kv_rowset_t recv_rows;     /* … or of rows */
    kv_slice_t *next_update;   /* see server_update.c */
    kv_rowset_t made_rows;     /* the same of a row-sparse slice; empty: `rows` is changed itself */
    kv_row_round_t *row_round; /* of a round of rows, between its phases */
    bool ran;                  /* the engine has run what it was given */
    kv_error_t *failure;       /* what became of it in the engine, or on another slice */
    const void **sources;      /* [num_workers] */
    kv_codec_t *codecs;        /* [num_workers] */
    kv_op_t op;                /* for the engine */
    kv_slice_t *next_waiting, *next_listed; /* see server_norms.c */
    bool listed;
    kv_slice_worker_t workers[];
};

struct kv_server_key {
    kv_index_node_t node; /* first; key number, 0 */
    kv_slice_t *slices;
    int32_t num_busy, num_initialised; /* of them */
    int32_t num_votes;
    kv_request_t *votes; /* one a worker at most */
    kv_declared_key_t *declared;
    kv_key_norms_t *norms; /* of a value with several slices */
};

typedef struct kv_known_optimizer {
    uint64_t number;
    int64_t training;
    const kv_optim_class_t *optim;
    kv_optim_numbers_t numbers;
    struct kv_known_optimizer *next;
} kv_known_optimizer_t;

typedef enum kv_presence {
    KV_PRESENT,
    KV_LEAVING, /* it has said so; its session has not ended */
    KV_ENDED,   /* its session has ended, and nobody has said that it left */
    KV_ABSENT,  /* it has left, and nothing comes from it any more */
} kv_presence_t;

typedef struct kv_outbox {
    kv_request_t *first, *last;
} kv_outbox_t;

struct kv_server {
    kv_mutex_t mutex; /* guards all below but what never changes */
    kv_cond_t ended;  /* num_running has become 0 */
    kv_engine_t *engine;
    kv_host_t host;
    int32_t index, num_workers, num_servers;
    bool async, has_threads;
    kv_pool_t *pool;
    kv_net_t *net;
    kv_error_t *lost;   /* why no request can be served any more */
    kv_error_t *parted; /* the session with a server has ended, … */
    int64_t parted_ns;  /* … and when that is a loss */
    kv_index_t slices, keys, names;
    kv_known_optimizer_t *optimizers; /* newest first */
    kv_request_t *waiting;            /* not yet answered, youngest first */
    int64_t next_deadline_ns;
    kv_request_t *free_requests;
    int64_t num_running;  /* sums in the engine */
    kv_slice_t *updates;  /* that wait for an optimizer in Python, in order */
    kv_slice_t *updating; /* the one that is with it */
    kv_cond_t wake;       /* whoever runs these has something to do */
    bool woken, stopped;
    kv_slice_t *listed; /* those that may go on (kv_norms_next_locked) */
    kv_server_counters_t counters;
    kv_presence_t *presence; /* [num_workers] */
    kv_outbox_t out[];
};

static inline bool kv_request_is_state(const kv_request_t *request)
{
    uint8_t action = request->header.record.action;
    return action == KV_WIRE_GET_STATE || action == KV_WIRE_SET_STATE;
}

/* --------------------------------------------------------------------------------- server.c */

/* kv_server_lose. */
void kv_server_lose_locked(kv_server_t *server, const char *why) KV_REQUIRES(server->mutex);

/* ---------------------------------------------------------------------------------- server.c */

/* KV_LEFT with a sentence when this push or pull of the slice needs what a worker that has left
 * will not send. */
KV_MUST_CHECK kv_status_t kv_slice_check_left_locked(kv_server_t *server, const kv_slice_t *slice,
                                                     const kv_request_t *request)
    KV_REQUIRES(server->mutex);

/* --------------------------------------------------------------------------- server_answer.c */

/* Gives a request in use for its answer; NULL without memory. */
kv_request_t *kv_request_new_locked(kv_server_t *server) KV_REQUIRES(server->mutex);
void kv_request_use_locked(kv_server_t *server, kv_request_t *request) KV_REQUIRES(server->mutex);
void kv_request_rele_locked(kv_server_t *server, kv_request_t *request) KV_REQUIRES(server->mutex);
/* It is to be answered later. */
void kv_request_wait_locked(kv_server_t *server, kv_request_t *request) KV_REQUIRES(server->mutex);
/* The answer: a value (NULL: none) of `bytes`, shared; or an error, shared. The use for the answer
 * goes with it. */
void kv_answer_locked(kv_server_t *server, kv_request_t *request, kv_buffer_t *value, size_t bytes)
    KV_REQUIRES(server->mutex);
void kv_answer_error_locked(kv_server_t *server, kv_request_t *request, kv_error_t *error)
    KV_REQUIRES(server->mutex);
/* The same with this thread's sentence. */
void kv_answer_status_locked(kv_server_t *server, kv_request_t *request, kv_status_t status)
    KV_REQUIRES(server->mutex);
/* Sends what has been answered since the last time. */
void kv_flush_locked(kv_server_t *server) KV_REQUIRES(server->mutex);

/* ---------------------------------------------------------------------------- server_slice.c */

/* The requests on slices. An error means that the worker cannot be served any more. */
KV_MUST_CHECK kv_status_t kv_slice_push_locked(kv_server_t *server, kv_request_t *request)
    KV_REQUIRES(server->mutex);
void kv_slice_init_locked(kv_server_t *server, kv_request_t *request) KV_REQUIRES(server->mutex);
void kv_slice_pull_locked(kv_server_t *server, kv_request_t *request) KV_REQUIRES(server->mutex);
/* The last three for what is wanted of a state, too. Takes a pull out of the list in which it
 * waits. */
void kv_slice_unlist_locked(kv_server_t *server, kv_request_t *pull) KV_REQUIRES(server->mutex);
/* The push takes its place in its round and makes it fail. Takes the error. */
void kv_slice_spoil_locked(kv_server_t *server, kv_request_t *push, kv_error_t *error)
    KV_REQUIRES(server->mutex);
/* Goes on with the slices that are listed. */
void kv_slices_go_on_locked(kv_server_t *server) KV_REQUIRES(server->mutex);
/* The round with which an optimizer in Python was busy has ended; the error is taken. */
void kv_slice_updated_locked(kv_server_t *server, kv_slice_t *slice, kv_error_t *error)
    KV_REQUIRES(server->mutex);
/* Answers the pulls that can be answered. */
void kv_slice_answer_locked(kv_server_t *server, kv_slice_t *slice) KV_REQUIRES(server->mutex);
/* Begins the rounds that can begin. The slice may be gone afterwards, and the lock may have been
 * dropped meanwhile. */
void kv_slice_advance_locked(kv_server_t *server, kv_slice_t *slice) KV_REQUIRES(server->mutex);
/* Answers whatever waits for it with the error. Nobody works on it. */
void kv_slice_free_locked(kv_server_t *server, kv_slice_t *slice, kv_error_t *error)
    KV_REQUIRES(server->mutex);

/* -------------------------------------------------------------------------- server_missing.c */

/* KV_LEFT with a sentence when this push or pull of the slice needs what a worker that has left
 * will not send. */
KV_MUST_CHECK kv_status_t kv_slice_check_left_locked(kv_server_t *server, const kv_slice_t *slice,
                                                     const kv_request_t *request)
    KV_REQUIRES(server->mutex);
/* For whom pushes and pulls of it wait, as a sentence of this thread; returns KV_TIMEOUT. */
kv_status_t kv_slice_missing_locked(kv_server_t *server, const kv_slice_t *slice)
    KV_REQUIRES(server->mutex);

/* ---------------------------------------------------------------------------- server_round.c */

/* NULL: it is not known. */
const kv_known_optimizer_t *kv_known_optimizer_locked(const kv_server_t *server, uint64_t number)
    KV_REQUIRES(server->mutex);
/* Whether what the slice keeps is of this optimizer's class and training. Of an asynchronous
 * server's workers one may still be in an earlier training. */
bool kv_slice_goes_on(const kv_slice_t *slice, const kv_known_optimizer_t *known);
/* Slots for the optimizer: those of another class or training go, and it begins anew. */
KV_MUST_CHECK kv_status_t kv_slice_take_slots(kv_slice_t *slice, const kv_known_optimizer_t *known);
/* The push that decides how the round is applied: of the lowest rank. */
const kv_request_t *kv_round_first(const kv_slice_t *slice);
/* For a slice that is busy and has the round's pushes: what will be done, and memory for it in
 * `made`. Or why the round fails. */
kv_error_t *kv_round_prepare_locked(kv_server_t *server, kv_slice_t *slice)
    KV_REQUIRES(server->mutex);
/* Fills `made`, or in the first phase `sums`; no lock held. On an error the value is as it was; the
 * last of two phases cannot fail. */
KV_MUST_CHECK kv_status_t kv_round_run(kv_slice_t *slice);

/* ----------------------------------------------------------------------------- server_rows.c */

static inline bool kv_slice_has_value(const kv_slice_t *slice)
{
    return slice->stored != NULL || slice->sparse;
}

/* KV_INVALID unless the data of a record is rows, or ids, of this slice, which has a value. */
KV_MUST_CHECK kv_status_t kv_slice_check_rows(const kv_slice_t *slice,
                                              const kv_wire_record_t *record, const void *data,
                                              bool ids_only, kv_wire_rows_t *out);
/* The first value of a row-sparse slice, whose type and extents are set here. */
KV_MUST_CHECK kv_status_t kv_slice_init_rows(kv_slice_t *slice, const kv_request_t *request);
/* Answers with the rows that are asked for, or all of a row-sparse slice. */
void kv_slice_answer_rows_locked(kv_server_t *server, kv_slice_t *slice, kv_request_t *request)
    KV_REQUIRES(server->mutex);
/* Whether all pushes of the round are rows, or none: else KV_BAD_TYPE. */
KV_MUST_CHECK kv_status_t kv_round_check_rows(const kv_slice_t *slice);
void kv_row_round_free(kv_row_round_t *round); /* NULL is allowed */
/* kv_round_run of a round of rows. */
KV_MUST_CHECK kv_status_t kv_round_run_rows(kv_slice_t *slice, const kv_host_t *host);
/* What a round moves, about. */
size_t kv_round_bytes(const kv_slice_t *slice);
/* --------------------------------------------------------------------------- server_state.c */

/* Carries out and answers a request on the state of a slice that is not busy. False: it has to wait
 * for what the thread that serves was asked for now. */
bool kv_slice_state_locked(kv_server_t *server, kv_slice_t *slice, kv_request_t *request)
    KV_REQUIRES(server->mutex);

/* --------------------------------------------------------------------------- server_update.c */

/* Notes the key that has come with the first value, which is there. KV_INVALID if it is another. */
KV_MUST_CHECK kv_status_t kv_slice_name(kv_slice_t *slice, const void *data, size_t bytes);
/* KV_INVALID unless an optimizer in Python can have the value. */
KV_MUST_CHECK kv_status_t kv_update_check(const kv_slice_t *slice);
/* Memory for the sum; and what is stored, copied to where it may be changed. No lock held. */
KV_MUST_CHECK kv_status_t kv_update_room(kv_slice_t *slice);
void kv_update_forget(kv_slice_t *slice); /* the sum */
/* Takes what an optimizer in Python keeps, or what a file had of it; what was kept goes. */
void kv_slice_keep(kv_slice_t *slice, kv_server_kept_t *kept, kv_buffer_t *loaded);
/* The slice has its sum, or what is kept with it is to be packed. */
void kv_update_enlist_locked(kv_server_t *server, kv_slice_t *slice) KV_REQUIRES(server->mutex);

/* ---------------------------------------------------------------------------- server_norms.c */

uint32_t kv_norms_num_slices(const kv_key_norms_t *norms);

/* A slice of a value of so many has come. */
KV_MUST_CHECK kv_status_t kv_norms_init_locked(kv_server_t *server, kv_server_key_t *key,
                                               uint64_t num_slices, uint32_t slice)
    KV_REQUIRES(server->mutex);
void kv_norms_free(kv_key_norms_t *norms); /* NULL is allowed */
/* The slice has its sums, or has failed (taken): tells all others. It waits then, or is listed. */
void kv_norms_tell_locked(kv_server_t *server, kv_slice_t *slice, kv_error_t *error)
    KV_REQUIRES(server->mutex);
/* Another server has told; the error is taken. A failure means that it makes no sense, or that
 * there is no memory. */
KV_MUST_CHECK kv_status_t kv_norms_told_locked(kv_server_t *server, int32_t from,
                                               const kv_wire_header_t *header, kv_error_t *error)
    KV_REQUIRES(server->mutex);
/* Takes a slice off the list of those that have something to do: KV_PHASE_ENDS has come, or it may
 * begin a round. NULL: the list is empty. */
kv_slice_t *kv_norms_next_locked(kv_server_t *server) KV_REQUIRES(server->mutex);
void kv_norms_unlist_locked(kv_server_t *server, kv_slice_t *slice) KV_REQUIRES(server->mutex);
/* Asynchronous: whether it is this push's turn; and the count that slice 0 has given its step. */
bool kv_norms_may_begin(const kv_slice_t *slice, const kv_request_t *push);
void kv_norms_take_turn(const kv_slice_t *slice, kv_step_t *step);
/* Whom the round waits for, as a sentence of this thread; returns KV_TIMEOUT. */
kv_status_t kv_norms_missing_locked(kv_server_t *server, const kv_slice_t *slice)
    KV_REQUIRES(server->mutex);

/* ----------------------------------------------------------------------------- server_keys.c */

/* Gives the key of this number, made if need be; NULL without memory. */
kv_server_key_t *kv_server_key_locked(kv_server_t *server, uint64_t number)
    KV_REQUIRES(server->mutex);
/* Frees the key if there is nothing of it. */
void kv_server_key_tidy_locked(kv_server_t *server, kv_server_key_t *key)
    KV_REQUIRES(server->mutex);
/* The key and all that belongs to it go; whatever waits for it gets the error. */
void kv_server_key_free_locked(kv_server_t *server, kv_server_key_t *key, kv_error_t *error)
    KV_REQUIRES(server->mutex);

void kv_drop_locked(kv_server_t *server, kv_request_t *request) KV_REQUIRES(server->mutex);
/* Takes a delete that waits out of its key, which may be gone then. */
void kv_drop_withdraw_locked(kv_server_t *server, kv_request_t *vote) KV_REQUIRES(server->mutex);
/* Deletes the key if all workers have said so and nothing of it is under way: true, it is gone. */
bool kv_drop_if_due_locked(kv_server_t *server, kv_server_key_t *key) KV_REQUIRES(server->mutex);
KV_MUST_CHECK kv_status_t kv_drop_check_left_locked(kv_server_t *server) KV_REQUIRES(server->mutex);
kv_status_t kv_drop_missing_locked(kv_server_t *server, const kv_request_t *request)
    KV_REQUIRES(server->mutex);

/* Takes a DECLARE whose payload is there. On an error, which ends the session, the request is still
 * the caller's. */
KV_MUST_CHECK kv_status_t kv_declare_locked(kv_server_t *server, kv_request_t *request)
    KV_REQUIRES(server->mutex);
/* KV_LEFT when rank 0, which declares keys, has left. */
KV_MUST_CHECK kv_status_t kv_declare_check_left_locked(kv_server_t *server)
    KV_REQUIRES(server->mutex);
/* Answers a DECLARE that waits; the keys that are not there get the error. */
void kv_declare_end_locked(kv_server_t *server, kv_request_t *request, kv_error_t *error)
    KV_REQUIRES(server->mutex);

#endif
