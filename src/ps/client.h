/* A worker's side of the cluster: calls on keys become messages to servers.
 *
 * A call concerns many keys. Its slices go to their servers at once: large ones from the caller's
 * memory, small ones of the call together, one message a server. Answers come in any order; the
 * call is done when all have come.
 *
 * Order. Calls on a key take effect in the order of kv_client_start, whatever their priorities: a
 * push says which round it is of and a pull how many came before it. A push that would be two
 * unfinished rounds ahead of its key waits here, also one behind a pull that is not answered yet,
 * and everything behind it on its keys. (A call waits as a whole: workers that make calls on lists
 * of keys in different orders may wait for each other, until their deadlines.) When a push has
 * failed because a worker did not come in time, pushes that wait behind it fail for the same
 * reason and have had no effect. A call that needs more of a worker that has left fails with
 * KV_LEFT: that is a server's answer like others, and later calls work if they need nothing of it.
 *
 * Values may come later than their call: it begins with none of them there, and each message goes
 * out when the last byte of it is. Answers may be taken slice by slice while others are on the
 * wire.
 *
 * Nothing here blocks but next, drain, cancel and close. Callbacks run in the endpoint's thread or
 * inside kv_client_lose, _abandon, _next, _cancel and _close, never inside kv_client_start, with no
 * lock held.
 */
#ifndef KV_PS_CLIENT_H
#define KV_PS_CLIENT_H

#include "array/array.h"
#include "base/name.h"
#include "comm/host.h"
#include "comm/rows.h"
#include "compress/codec.h"
#include "net/net.h"
#include "optim/optim.h"
#include "ps/pool.h"

typedef struct kv_client kv_client_t;

typedef struct kv_client_config {
    int32_t rank, num_workers, num_servers;
} kv_client_config_t;

/* Nodes' numbers for the endpoint: workers first, by rank, then servers. */
static inline int32_t kv_node_of_server(int32_t num_workers, int32_t server)
{
    return num_workers + server;
}

KV_MUST_CHECK kv_status_t kv_client_new(const kv_client_config_t *config, kv_client_t **out);
/* What the endpoint calls; it is opened with these, then attached. */
kv_net_handlers_t kv_client_handlers(kv_client_t *client);
/* The endpoint outlives the client's calls; it is borrowed. */
void kv_client_attach(kv_client_t *client, kv_net_t *net);

/* From now on every call, also those under way, fails with KV_PEER_LOST and this sentence. The
 * first reason stays. */
void kv_client_lose(kv_client_t *client, const char *why);
/* Refuses calls with KV_CLOSED and ends those under way with it, once their memory is free. The
 * endpoint is closed already. */
void kv_client_close(kv_client_t *client);
void kv_client_free(kv_client_t *client); /* after close; all remotes are freed */

/* +1: somebody will start a call soon, -1: has done so or will not. A drain waits for those too. */
void kv_client_expect(kv_client_t *client, int32_t sign);

/* Waits until no call is under way. KV_PEER_LOST if a server is lost by then; KV_TIMEOUT,
 * KV_INTERRUPTED, KV_CALLBACK as any wait; detaches the caller meanwhile. */
KV_MUST_CHECK kv_status_t kv_client_drain(kv_client_t *client, kv_caller_t *caller);

/* KV_OK, or why no call can work: KV_PEER_LOST, KV_CLOSED. */
KV_MUST_CHECK kv_status_t kv_client_check(kv_client_t *client);

kv_pool_t *kv_client_pool(kv_client_t *client);
int32_t kv_client_rank(const kv_client_t *client);
int32_t kv_client_num_workers(const kv_client_t *client);

/* What the client knows of one key. Owned by whoever declared the key; freed when no call on it is
 * under way. */
typedef struct kv_remote kv_remote_t;
void kv_remote_free(kv_remote_t *remote); /* NULL is allowed */

/* A key that is declared. */
typedef struct kv_declared {
    kv_name_t name;
    kv_dtype_t dtype;
    bool sparse;
    bool whole; /* rank 0: in one slice, if it fits into a message */
    int ndim;
    const int64_t *shape;
    size_t bytes, row_bytes;
    const void *value;        /* contiguous; looked at on rank 0 only … */
    const kv_row_sum_t *rows; /* … as this, of a row-sparse key */
    kv_remote_t *remote;      /* out, set before `done` of a call that succeeds: the caller's */
} kv_declared_t;

/* What a push says of the step that servers take with it. */
typedef struct kv_client_step {
    uint64_t optimizer; /* its number, as servers know it */
    kv_step_t step;
} kv_client_step_t;

/* Which buffer of a state a part is about, in the wide type of its key. A key may stand in many
 * parts of such a call, whose order among themselves is open. */
typedef struct kv_client_state {
    int slot;     /* see comm/slots.h; of KV_SLOT_OBJECT the part has `found`, or … */
    size_t bytes; /* … so many of `value` */
    bool per_row; /* one number for each row */
    /* Out, of KV_CLIENT_GET_STATE: the newest step of any slice, 0: none has taken one; and how
     * many slices had such a buffer and how many had not, slices without elements left out. */
    int64_t t;
    uint32_t num_there, num_missing;
} kv_client_state_t;

/* One key of a call on values; each key stands once. */
typedef struct kv_client_part {
    kv_remote_t *remote;
    const void *value; /* contiguous elements to push, NULL: none */
    void *out;         /* contiguous memory for the value, NULL: none. May be `value` */
    /* Rows, as kv_remote_row_bytes says. To push, in place of `value`; read by kv_client_start
     * only, NULL: none. */
    const kv_row_sum_t *rows;
    /* Not NULL: `out` gets these rows alone, one after the other; strictly increasing, at least
     * one. Read by kv_client_start only. */
    const int64_t *ids;
    int64_t num_ids;
    /* For all rows of a row-sparse key, in place of `out`: [kv_remote_num_slices] NULLs. Gets what
     * kv_remote_gather takes; one share of each is the caller's, also after an error. Or for what
     * an optimizer in Python keeps; a NULL remains where it keeps nothing. */
    kv_buffer_t **found;
    /* Not KV_CODEC_NONE: `value` has instead what kv_remote_encode has made. */
    kv_codec_type_t codec;
    /* Of a push; NULL: none. Of a state: the optimizer whose it is, for KV_CLIENT_SET_STATE with
     * the step that becomes the newest; there NULL: the whole state of the key goes. */
    const kv_client_step_t *step;
} kv_client_part_t;

/* Room for a whole value once it has passed through a codec. */
size_t kv_remote_coded_bytes(const kv_remote_t *remote, kv_codec_type_t codec);
/* Encodes a value slice by slice into `out`, and moves its residual, which is in the wide type.
 * Returns how many elements of that are not finite. */
int64_t kv_remote_encode(const kv_remote_t *remote, const kv_host_t *host, const kv_codec_t *codec,
                         const void *value, void *residual, void *out);

/* What is a row to a client: a row of the value, or, where slices of a dense key end within rows, a
 * part of it, all of one size; these are numbered through. */
size_t kv_remote_row_bytes(const kv_remote_t *remote);
uint32_t kv_remote_num_slices(const kv_remote_t *remote);
/* All rows that a pull has found become one set, which is made as kv_rowset_make does. */
KV_MUST_CHECK kv_status_t kv_remote_gather(const kv_remote_t *remote, kv_buffer_t *const *found,
                                           kv_rowset_t *out);

typedef enum kv_client_verb {
    KV_CLIENT_MOVE,      /* parts: push, pull, pushpull */
    KV_CLIENT_DECLARE,   /* keys: rank 0's values become the stored ones */
    KV_CLIENT_DELETE,    /* parts, without memory: every worker does it */
    KV_CLIENT_GET_STATE, /* parts: one buffer each of what an optimizer keeps with a key … */
    KV_CLIENT_SET_STATE, /* … `value` replaces it, NULL: it goes */
} kv_client_verb_t;

/* A call. The caller fills in the first part and keeps everything in place until `done`. */
typedef struct kv_client_call kv_client_call_t;
struct kv_client_call {
    kv_client_verb_t verb;
    int32_t priority;
    int64_t timeout_ms; /* told to the servers; 0: they wait for ever */
    const kv_client_part_t *parts;
    int64_t num_parts;
    kv_client_state_t *states; /* [num_parts], of calls on states */
    kv_declared_t *keys;       /* DECLARE */
    int64_t num_keys;
    const kv_host_t *host; /* where a part or key has rows; read by kv_client_start only */
    /* MOVE: no `value` of a part is read before kv_client_supply says that it is there. */
    bool late;
    /* The call does not end before kv_client_next has given all slices that came to an `out`, or it
     * is cancelled or fails. */
    bool watched;
    /* No value is read any more (also after an error). Once, before `done`. May be NULL. */
    void (*sent)(kv_client_call_t *call);
    /* It has ended: all answers are there, or it failed. Once, the client's last word. A failed
     * call names the key and the node in its sentence (kv_status_message of this thread). Outs of a
     * call that failed may have been written in part. */
    void (*done)(kv_client_call_t *call, kv_status_t status);
    /* Out, before `sent`: it failed before anything of it went out. May be read at any time. */
    _Atomic bool unsent;
    /* The client's own: */
    struct kv_client_work *work;
    kv_client_call_t *next, *prev;
};

/* Begins a call. On an error it has not begun and no callback comes. */
KV_MUST_CHECK kv_status_t kv_client_start(kv_client_t *client, kv_client_call_t *call);

/* Of a `late` call, by the thread that has started it: the values of all parts before `part` are
 * there, and the first `bytes` of that one's, or of its codes. It never says less than before, and
 * in the end `num_parts`. Nothing happens if the call has ended. */
void kv_client_supply(kv_client_t *client, kv_client_call_t *call, int64_t part, size_t bytes);
/* The rest of a `late` call's values will never come. What has gone out cannot be taken back, and
 * the servers would wait for the rest of it for ever: so they are left, and every call fails as
 * after kv_client_lose. */
void kv_client_abandon(kv_client_t *client, const char *why);

/* Bytes of an `out`. */
typedef struct kv_client_range {
    int64_t part;
    size_t offset, bytes;
} kv_client_range_t;
/* Of a `watched` call: waits for a slice that has come, and gives each once, in the order of their
 * coming. No bytes: there will be no more, since all are there, or the call has failed. KV_TIMEOUT,
 * KV_INTERRUPTED, KV_CALLBACK as any wait: the call is to be cancelled. Detaches the caller. */
KV_MUST_CHECK kv_status_t kv_client_next(kv_client_t *client, kv_client_call_t *call,
                                         kv_caller_t *caller, kv_client_range_t *out);

/* The caller gives up waiting: after this has returned nothing reads the values or writes the outs
 * of the call. The call itself goes on: values that have not gone out are copied first (a round
 * that lacks some slices of a key would never end), answers are thrown away. A session whose
 * transfer from or to that memory cannot be stopped is closed. Blocks, for a second or so at most.
 * `sent` and `done` come as always, before or after the return. `missing` gets who has not answered
 * yet ("server 1"). */
void kv_client_cancel(kv_client_t *client, kv_client_call_t *call, char *missing,
                      size_t missing_bytes);

#endif
