/* A server of the cluster: slices of values, sums of rounds, answers.
 *
 * The endpoint's thread takes messages apart and never waits. A pushed slice is received into a
 * pooled buffer and kept until every worker's of that round has come whole; then all are summed in
 * one pass in the order of ranks (so results repeat bit for bit, and 16-bit floats are rounded
 * once), by an engine's thread when the slice is large, and the sum becomes the new version of the
 * slice. What is being sent out is never written: a version is a buffer of its own. With one worker
 * the received buffer becomes the version.
 *
 * Servers talk to each other only for steps that take norms of a whole value (server_norms.c).
 *
 * Answers to one worker that come from one message are sent together, in the priority of their
 * requests.
 */
#ifndef KV_PS_SERVER_H
#define KV_PS_SERVER_H

#include "array/sparse.h"
#include "base/caller.h"
#include "base/name.h"
#include "comm/host.h"
#include "engine/engine.h"
#include "net/net.h"
#include "optim/optim.h"

typedef struct kv_server kv_server_t;

enum { KV_KNOWN_OPTIMIZERS = 4096 };

typedef struct kv_server_config {
    kv_engine_t *engine; /* borrowed */
    kv_host_t host;
    int32_t index, num_workers, num_servers;
    bool async; /* dist_async: a push is applied at once; without an optimizer that is an error */
} kv_server_config_t;

KV_MUST_CHECK kv_status_t kv_server_new(const kv_server_config_t *config, kv_server_t **out);
kv_net_handlers_t kv_server_handlers(kv_server_t *server);
void kv_server_attach(kv_server_t *server, kv_net_t *net); /* borrowed */

/* Makes an optimizer known by the number that pushes name it with: the same on all servers, never
 * 0. The newest is what pushes get that name none but must have one (dist_async). A number that is
 * known becomes the newest; of more than KV_KNOWN_OPTIMIZERS the oldest is forgotten. What a slice
 * has kept for an earlier `training`, or another class, begins anew with the first push that names
 * this one. KV_INVALID for numbers that are none of the class.
 */
KV_MUST_CHECK kv_status_t kv_server_add_optimizer(kv_server_t *server, uint64_t number,
                                                  int64_t training, const kv_optim_class_t *optim,
                                                  const kv_optim_numbers_t *numbers);

/* What an optimizer in Python keeps with a key: opaque here, dropped with the key or when another
 * optimizer begins, by any thread, with locks held. */
typedef struct kv_server_kept kv_server_kept_t;
struct kv_server_kept {
    void (*drop)(kv_server_kept_t *kept);
};

/* A round that an optimizer in Python is to end; or `reads`: what is kept with a key is to be
 * packed, for a file. All shares are the caller's until kv_server_end_update; buffers may be kept
 * by holding them. */
typedef struct kv_server_update {
    bool reads;         /* then only name, key, t and `kept` are there */
    uint64_t optimizer; /* its number */
    kv_name_t name;     /* its text lies in `key` */
    kv_buffer_t *key;
    kv_dtype_t dtype;
    int ndim;
    int64_t shape[KV_MAX_DIMS];
    bool rows, sparse;                  /* what was pushed, or the value, is row-sparse: then … */
    kv_buffer_t *recv, *stored;         /* what was pushed, summed; the value, to be changed … */
    kv_rowset_t recv_rows, stored_rows; /* … these, of which the second may be replaced */
    double rate;                        /* before multipliers */
    int64_t t, num_update;  /* pushes of the key, this one counted, and the most of any key */
    kv_server_kept_t *kept; /* NULL: the key begins, … */
    kv_buffer_t *loaded;    /* … with what a file had, packed, unless this is NULL. It is offered
                               until it is gone from here when a round ends */
    kv_buffer_t *packed;    /* out, of one that reads; NULL: it has failed */
} kv_server_update_t;

/* Waits for the next such round and gives it: *found. Not found: the caller's time is over, the
 * server has stopped, or somebody has called kv_server_wake since the last time. KV_INVALID while
 * one is under way, and as any wait. Returns attached. */
KV_MUST_CHECK kv_status_t kv_server_next_update(kv_server_t *server, kv_caller_t *caller,
                                                kv_server_update_t *out, bool *found);
/* The round has ended, or has failed for this reason (taken; NULL: it has not). Takes the update,
 * with what is to be kept and, of a row-sparse value, stored. */
void kv_server_end_update(kv_server_t *server, kv_server_update_t *update, kv_error_t *error);
void kv_server_wake(kv_server_t *server); /* any thread */

/* A node of the cluster is gone: every request under way and to come is answered with KV_PEER_LOST
 * and this sentence. The first reason stays. */
void kv_server_lose(kv_server_t *server, const char *why);

/* A worker leaves the cluster and asks for nothing more. What it has pushed counts. Whatever needs
 * more of it, waiting now or still to come, is answered with KV_LEFT: that call cannot end well any
 * more, but the cluster is not lost, and rounds whose pushes are all there are completed. (So it is
 * not KV_PEER_LOST, with which a client takes everything for lost, and not KV_TIMEOUT, after which
 * the push might still count.) `finished`: all that it ever asked for has been answered. If not,
 * some may still be on its way, and the worker is taken to have left when its session has ended
 * too. */
void kv_server_left(kv_server_t *server, int32_t worker, bool finished);

/* The endpoint is closed already: waits for the engine's share of the work, drops all values. */
void kv_server_stop(kv_server_t *server);
void kv_server_free(kv_server_t *server); /* after stop */

typedef struct kv_server_counters {
    int64_t keys, slices, value_bytes; /* stored */
    int64_t rounds;                    /* of slices, completed */
    int64_t waiting;                   /* requests not yet answered */
} kv_server_counters_t;
void kv_server_counters(kv_server_t *server, kv_server_counters_t *out);

#endif
