/* What the files of the client share.
 *
 *   client.c         the client, the start and the end of calls, their order
 *   client_build.c   a call taken apart into operations on slices, and these put into messages
 *   client_rows.c    rows on their way out and in
 *   client_codes.c   compressed values
 *   client_late.c    values that come later than their call, answers that are taken one by one
 *   client_answer.c  what servers send
 *
 * A call's work is built before the lock is taken: all of its memory is there before the first
 * message goes out. Then everything is guarded by the client's lock, and messages are given to the
 * endpoint under it, so that they enter its queues in the order of the calls.
 *
 * A work that may have ended or may read no value any more is put on the list `due`. Whoever let
 * that happen empties the list when it drops the lock (kv_client_unlock): the only place where
 * callbacks are called. One work is handled by one thread at a time.
 */
#ifndef KV_PS_CLIENT_INTERNAL_H
#define KV_PS_CLIENT_INTERNAL_H

#include "base/memory.h"
#include "base/thread.h"
#include "comm/slots.h"
#include "ps/client.h"
#include "ps/wire.h"

typedef struct kv_client_work kv_client_work_t;

enum {
    KV_CLIENT_BUCKETS = 1024,
    /* Rounds of a key that this worker has begun and not seen the end of, at most. */
    KV_CLIENT_ROUNDS = 2,
};

struct kv_remote {
    kv_client_t *client;
    kv_dtype_t dtype;
    bool sparse;
    size_t bytes, slice_bytes, row_bytes;
    uint32_t num_slices;
    /* In rows as kv_remote_row_bytes says: */
    int64_t num_rows, slice_rows;
    size_t unit_bytes;
    uint16_t *servers; /* [num_slices] */
    uint64_t number;
    /* Guarded by the client's lock: */
    uint64_t pushes;          /* rounds begun */
    int32_t pushing, pulling; /* calls under way; a delete counts as a pull */
    int32_t held;             /* calls that wait */
    uint64_t mark;            /* see client_order.c */
    kv_name_t name;
    char text[];
};

typedef enum kv_op_state { KV_OP_ASKED, KV_OP_RECEIVING, KV_OP_ANSWERED } kv_op_state_t;

/* What is asked about one slice. Its place in the work is the tag of its messages. */
typedef struct kv_slice_op {
    kv_client_work_t *work;
    size_t offset; /* in the value, or in the buffer of a state */
    uint32_t bytes;
    uint32_t sent_bytes; /* of data that goes out … */
    size_t sent_offset;  /* … and where it lies in what the call pushes … */
    int64_t first, rows; /* … or which of the rows, or ids, go out */
    uint32_t key_bytes;  /* of those that go out: the key, at the end */
    bool has_rows;
    bool late; /* what goes out is not there yet */
    uint32_t part, slice;
    uint16_t server;
    uint8_t action; /* kv_wire_action_t; 0: the declaration of all keys */
    uint8_t state;
    struct kv_slice_op *next_come; /* of a watched call */
} kv_slice_op_t;

typedef enum kv_outgoing_state { KV_OUT_WAITS, KV_OUT_QUEUED, KV_OUT_ENDED } kv_outgoing_state_t;

/* A message of a work. */
typedef struct kv_outgoing {
    kv_net_message_t net; /* first */
    kv_client_work_t *work;
    kv_buffer_t *buffer;   /* with the payload; NULL: it lies in the caller's memory */
    uint32_t first, count; /* of its operations … */
    uint32_t there; /* … and how many of them have what goes out: if not all, it waits … */
    size_t filled;  /* … and the bytes of these */
    uint8_t kind;   /* kv_wire_kind_t */
    uint8_t state;
} kv_outgoing_t;

struct kv_client_work {
    kv_client_t *client;
    kv_client_call_t *call;
    uint64_t id;
    kv_client_work_t *next_in_bucket, *next_held, *next_due;
    kv_remote_t **remotes; /* one a part or key; of a DECLARE they belong to the work */
    int64_t num_remotes;
    kv_slice_op_t *ops;
    kv_outgoing_t *messages;
    uint32_t num_ops, num_messages;
    kv_slice_op_t *come, **come_end; /* answers that kv_client_next has not given yet */
    /* What has not ended yet: */
    uint32_t ops_left, messages_left, receiving;
    bool placed;        /* the servers' loads count its slices */
    bool started;       /* it has its rounds; its messages have gone to the endpoint */
    bool failed;        /* no answers are waited for */
    bool given_up;      /* answers are thrown away */
    int32_t cancelling; /* threads in cancel: they look at the work */
    bool due, told_sent;
    kv_sentence_t error; /* what became of it; only set when `code` is */
};

struct kv_client {
    kv_client_config_t config;
    kv_net_t *net;
    kv_pool_t *pool;
    kv_mutex_t lock;
    kv_cond_t changed; /* memory of a call that is given up is free; callbacks have returned */
    /* All guarded by the lock: */
    kv_status_t status; /* why no call can work any more */
    char why[KV_MESSAGE_BYTES];
    int32_t lost_ticks;
    uint64_t next_id, next_number, walk;
    kv_client_work_t *buckets[KV_CLIENT_BUCKETS]; /* by id */
    kv_client_call_t *calls;
    kv_client_work_t *held, **held_end;
    kv_client_work_t *due, **due_end;
    int32_t running;  /* threads that call callbacks */
    int32_t expected; /* calls that somebody is about to start */
    uint64_t loads[]; /* bytes a server; on rank 0 */
};

/* client_build.c */
KV_MUST_CHECK kv_status_t kv_work_new(kv_client_t *client, kv_client_call_t *call,
                                      kv_client_work_t **out);
void kv_work_free(kv_client_work_t *work);
/* Writes the headers and the tables of records, with the rounds as they are now. */
void kv_work_write_locked(kv_client_work_t *work);
/* Takes the slices of a declared key off the servers' loads. */
void kv_client_unload_locked(kv_client_t *client, const kv_remote_t *remote)
    KV_REQUIRES(client->lock);

static inline bool kv_call_on_state(const kv_client_call_t *call)
{
    return call->verb == KV_CLIENT_GET_STATE || call->verb == KV_CLIENT_SET_STATE;
}

static inline bool kv_part_pushes(const kv_client_call_t *call, int64_t part)
{
    return call->verb == KV_CLIENT_MOVE &&
           (call->parts[part].value != NULL || call->parts[part].rows != NULL);
}

/* Writes what goes out of an operation, its key behind it. */
void kv_op_put_data(const kv_slice_op_t *op, unsigned char *out);

/* client_rows.c */
/* What follows from the slices of a remote. */
void kv_remote_count_rows(kv_remote_t *remote);
/* Adds to an operation what it has to do with rows. *needed: something is asked of its slice.
 * KV_INVALID when there are too many rows for a message. */
KV_MUST_CHECK kv_status_t kv_op_add_rows(kv_slice_op_t *op, bool *needed);
/* Rows of the value that a slice of a row-sparse key has, stored or not, and those before them. */
int64_t kv_remote_slice_rows(const kv_remote_t *remote, uint32_t slice, int64_t *before);
/* Writes the data of an operation that has rows. */
void kv_op_put_rows(const kv_slice_op_t *op, void *out);
/* Checks what is said to be all rows of the operation's slice. */
KV_MUST_CHECK kv_status_t kv_op_check_rows(const kv_slice_op_t *op, const void *data, size_t bytes);
/* Whether the answer has a length that is not known: all rows of the slice, or an object. */
static inline bool kv_op_finds(const kv_slice_op_t *op)
{
    const kv_client_call_t *call = op->work->call;
    bool may = call->verb == KV_CLIENT_MOVE || call->verb == KV_CLIENT_GET_STATE;
    return may && op->action != 0 && call->parts[op->part].found != NULL;
}

/* client_codes.c: from one slice's codes to the next one's. */
size_t kv_remote_coded_stride(const kv_remote_t *remote, kv_codec_type_t codec);

/* client_late.c */
/* Goes on to the operations that have what goes out when kv_client_supply has told so much. They
 * come into the message in this order. */
void kv_message_supply(kv_outgoing_t *message, int64_t part, size_t bytes);
/* A value has come to its `out`. */
void kv_work_note_come_locked(kv_slice_op_t *op);
/* Nobody takes what has come any more. */
void kv_work_forget_come_locked(kv_client_work_t *work);

/* client.c */
/* Sleeps until over(context), or the caller's deadline (KV_TIMEOUT, without a sentence) or poll
 * ends it. Detaches the caller. */
KV_MUST_CHECK kv_status_t kv_client_wait_locked(kv_client_t *client,
                                                bool (*over_locked)(const void *context),
                                                const void *context, kv_caller_t *caller)
    KV_REQUIRES(client->lock);
void kv_client_message_done(kv_net_message_t *message, kv_status_t status);
/* No answers are waited for any more; messages that have not begun to go out stay here. */
void kv_work_fail_locked(kv_client_work_t *work);
/* Looks whether there is something to tell the caller. */
void kv_work_touch_locked(kv_client_work_t *work);
/* Drops the lock and calls all callbacks that are due. */
void kv_client_unlock(kv_client_t *client) KV_RELEASES(client->lock);
/* The first reason stays. */
void kv_client_lose_locked(kv_client_t *client, kv_status_t code, const char *why)
    KV_REQUIRES(client->lock);
/* The same for a peer that is gone or cannot be served; the reason is this thread's sentence for
 * `status`, or what the endpoint knows. */
void kv_client_peer_lost_locked(kv_client_t *client, int32_t peer, kv_status_t status)
    KV_REQUIRES(client->lock);
/* NULL when there is none. */
kv_client_work_t *kv_client_find_locked(kv_client_t *client, uint64_t id) KV_REQUIRES(client->lock);

/* client_order.c */
/* Sends the messages of a new call, or lets it wait for its turn. */
void kv_client_queue_locked(kv_client_t *client, kv_client_work_t *work) KV_REQUIRES(client->lock);
/* A call has ended: others may go. */
void kv_client_unqueue_locked(kv_client_t *client, kv_client_work_t *work)
    KV_REQUIRES(client->lock);
/* Gives one message to the endpoint; when that fails the client is lost. */
void kv_client_send_locked(kv_client_t *client, kv_outgoing_t *message) KV_REQUIRES(client->lock);

/* client_answer.c */
kv_status_t kv_client_arrive(void *context, kv_net_arrival_t *arrival);

#endif
