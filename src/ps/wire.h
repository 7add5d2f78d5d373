/* What workers and servers say to each other.
 *
 * Every message has the same header: a few fields and one record. A record names one slice of one
 * key and what is wanted of it, or what became of it. A message about one slice has its record in
 * the header and the bare elements as payload, so that they go from the sender's memory into the
 * receiver's; a message about many small ones has `count` records at the start of its payload and
 * their data behind, in order, each at a multiple of KV_WIRE_ALIGN.
 *
 *   worker → server   PUSH     one slice: KV_WIRE_INIT, _PUSH or _PUSHPULL with its elements
 *                     BATCH    many of them. In both also KV_WIRE_SET_STATE
 *                     PULL     records only; each is answered when its round is complete. Also
 *                              KV_WIRE_GET_STATE
 *                     DECLARE  server 0 only: `count` keys by name (kv_wire_put_key). From rank 0
 *                              with their numbers and places; the others ask for these
 *                     DELETE   records only (slice 0 stands for the key): counted, done when every
 *                              worker has said so
 *   server → server   NORMS    one slice, in a round whose step takes norms of the whole value: its
 *                              sums of squares (kv_wire_put_sums), or `status` and the sentence why
 *                              the round has failed there
 *   server → worker   VALUE    one slice (or its state), in answer to _PUSHPULL or PULL
 *                     REPLIES  many answers: values, acknowledgements (no data), errors (`status`,
 *                              data: the sentence)
 *                     DECLARED the keys of a DECLARE with numbers and places
 *
 * Rounds. The n-th push of a worker on a key (from 0) is of round n. A synchronous server adds it
 * to the sum of round n and to no other, and completes round n when all workers' pushes of it have
 * come whole; the value then has version n + 1. A PULL has in `round` how often its worker had
 * pushed the key before, and is answered by a version of at least that. A server that applies each
 * push on its own (dist_async) answers a PULL when as many pushes of that worker were applied.
 *
 * Steps. A push whose worker has an optimizer names it by its number (kv_server_add_optimizer) and
 * carries what else the step takes: rates, count, … A synchronous server takes the step of worker
 * 0's push; without one the sum of the round becomes the value. An asynchronous one takes each
 * push's own. `round` of KV_WIRE_INIT is how many elements a row has, `t` how many slices the
 * value. Where that is one, its data ends with the key as it is declared (kv_wire_put_key), in
 * `own` bytes: an optimizer in Python is told name and shape.
 *
 * Rows. A record with KV_WIRE_ROWS has as data no elements but rows of its slice (kv_wire_rows_t):
 * first values and pushes, and the answers with all rows of a row-sparse slice. In a PULL the data
 * are the ids of the rows that are wanted, and the answer is these rows' bare elements. A push of
 * rows goes to every slice of its key, also without any: rounds count all workers.
 *
 * States. What an optimizer keeps with a slice is read and replaced one buffer at a time, between
 * two rounds, and after as many of the worker's pushes as `round` says: `slot` is its place among
 * the slots of the class of `optimizer`, or KV_SLOT_MASTER, or KV_SLOT_NONE for no buffer. Data is
 * in the wide type of `dtype`. An answer to _GET_STATE has no data where there is no such buffer,
 * and in `t` the newest step of the slice, 0: none. _SET_STATE carries the step that becomes the
 * newest; of a row-sparse slice both have all rows, stored or not, and _SET_STATE has KV_WIRE_ROWS;
 * without data the buffer goes, without an optimizer (KV_SLOT_NONE) the whole state. What an
 * optimizer in Python keeps travels whole, as KV_SLOT_OBJECT, in a form that the core does not know
 * and of a length that the worker does not: such an answer has KV_WIRE_WHOLE.
 *
 * An answer repeats `request` and `tag` of what it answers: the worker's own, opaque to the server.
 * `timeout_ms` is how long the worker will wait, 0: for ever; a server answers shortly before, with
 * KV_TIMEOUT and whom it waits for.
 */
#ifndef KV_PS_WIRE_H
#define KV_PS_WIRE_H

#include "array/array.h"
#include "base/name.h"
#include "base/status.h"
#include "comm/update.h"
#include "compress/codec.h"
#include "optim/optim.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    KV_WIRE_VERSION = 1,
    KV_WIRE_ALIGN = 64,
    KV_WIRE_SMALL_BYTES = 64 << 10, /* up to this values go together, larger ones as they lie: a
                                       message of its own costs more than the copy */
    KV_WIRE_SLICE_BYTES = 1 << 20,  /* of a slice, and of a batch with its records, at most */
    KV_WIRE_STATE_BYTES = 2 * KV_WIRE_SLICE_BYTES, /* of a slice in its wide type, at most */
    KV_WIRE_ROWS_BYTES = 1 << 30, /* of the rows in one record, or of a whole value, at most */
    KV_WIRE_KEY_BYTES = 64 << 10, /* of a key behind a first value: a larger one is left out */
};

typedef enum kv_wire_kind {
    KV_WIRE_PUSH_ONE = 1,
    KV_WIRE_BATCH,
    KV_WIRE_PULL,
    KV_WIRE_DECLARE,
    KV_WIRE_DELETE,
    KV_WIRE_VALUE,
    KV_WIRE_REPLIES,
    KV_WIRE_DECLARED,
    KV_WIRE_NORMS,
    KV_WIRE_KINDS
} kv_wire_kind_t;

typedef enum kv_wire_action {
    KV_WIRE_INIT = 1, /* the first value of the slice */
    KV_WIRE_PUSH,
    KV_WIRE_PUSHPULL, /* the answer is the value after this round */
    KV_WIRE_GET,      /* of PULL */
    KV_WIRE_DROP,     /* of DELETE */
    KV_WIRE_GET_STATE,
    KV_WIRE_SET_STATE,
    KV_WIRE_SQUARES, /* of NORMS */
    KV_WIRE_ACTIONS
} kv_wire_action_t;

/* X(bits, name), little-endian, in this order, without gaps. */
#define KV_WIRE_RECORD_FIELDS(X)                                                                   \
    X(64, request)                                                                                 \
    X(64, key)                                                                                     \
    X(64, round)                                                                                   \
    X(64, bytes) /* of data */                                                                     \
    X(32, tag)                                                                                     \
    X(32, slice)                                                                                   \
    X(8, action)                                                                                   \
    X(8, dtype)                                                                                    \
    X(8, status) /* kv_status_t, of answers */                                                     \
    X(8, codec)  /* kv_codec_type_t of the data; 0: bare elements */                               \
    X(64, optimizer)                                                                               \
    X(64, lr)                                                                                      \
    X(64, wd)                                                                                      \
    X(64, t)                                                                                       \
    X(64, own)                                                                                     \
    X(16, flags) /* KV_WIRE_… */                                                                 \
    X(16, slot)  /* of states */

#define KV_WIRE_HEADER_FIELDS(X)                                                                   \
    X(16, version)                                                                                 \
    X(8, kind)                                                                                     \
    X(8, unused)                                                                                   \
    X(32, priority) /* int32_t; of the answers too */                                              \
    X(32, timeout_ms)                                                                              \
    X(32, count) /* of records or keys in the payload */

#define KV_WIRE_DECLARE_FIELD(bits, name) uint##bits##_t name;
typedef struct kv_wire_record {
    KV_WIRE_RECORD_FIELDS(KV_WIRE_DECLARE_FIELD)
} kv_wire_record_t;
typedef struct kv_wire_header {
    KV_WIRE_HEADER_FIELDS(KV_WIRE_DECLARE_FIELD)
    kv_wire_record_t record;
} kv_wire_header_t;

enum { KV_WIRE_RECORD_BYTES = 88, KV_WIRE_HEADER_BYTES = 16 + KV_WIRE_RECORD_BYTES };

enum {
    KV_WIRE_PLAIN_RATE = 1,   /* kv_step_t.plain_rate */
    KV_WIRE_SHARES_NORMS = 2, /* the step takes norms over several slices */
    KV_WIRE_ROWS = 4,         /* the data is rows, or ids of rows */
    KV_WIRE_WHOLE = 8,        /* the slice is the whole value, and the data may be larger */
    KV_WIRE_FLAGS = 16
};

/* Fills in what a push says of the step that it is to be applied with, and reads it: all but the
 * optimizer's own numbers, which the server has by the optimizer's number. */
void kv_wire_put_step(kv_wire_record_t *record, uint64_t optimizer, const kv_step_t *step);
void kv_wire_get_step(const kv_wire_record_t *record, const kv_optim_class_t *optim,
                      const kv_optim_numbers_t *numbers, kv_step_t *out);

void kv_wire_put_sums(kv_wire_record_t *record, const kv_norm_sums_t *sums);
void kv_wire_get_sums(const kv_wire_record_t *record, kv_norm_sums_t *out);

/* A value that has passed through a codec: the codec's threshold as a float64, then the codes. */
enum { KV_WIRE_THRESHOLD_BYTES = 8 };
size_t kv_wire_coded_bytes(kv_codec_type_t codec, kv_dtype_t dtype, size_t bytes);
void kv_wire_put_threshold(double threshold, unsigned char *out);
double kv_wire_get_threshold(const unsigned char *data);

/* Rows of one slice: `count` of its `num_rows`, each of `row_bytes`. A row is one of the value, or
 * a part of it where slices end within rows. On the wire: these three numbers, the ids, the rows.
 */
typedef struct kv_wire_rows {
    int64_t count, num_rows;
    size_t row_bytes;
    const int64_t *ids; /* strictly increasing, the first row of the slice being 0 */
    const char *data;   /* NULL: ids only */
} kv_wire_rows_t;

enum { KV_WIRE_ROWS_HEAD = 24 };
static inline size_t kv_wire_ids_bytes(int64_t count)
{
    return KV_WIRE_ROWS_HEAD + (size_t)count * sizeof(int64_t);
}
static inline size_t kv_wire_rows_bytes(int64_t count, size_t row_bytes)
{
    return kv_wire_ids_bytes(count) + (size_t)count * row_bytes;
}

/* Writes the three numbers; returns where the ids begin. */
int64_t *kv_wire_put_rows(const kv_wire_rows_t *rows, void *out);
/* Describes the rows, or ids, in these bytes, which lie as values of messages do. KV_INVALID unless
 * they fill them exactly and the ids increase within num_rows. */
KV_MUST_CHECK kv_status_t kv_wire_get_rows(const void *data, size_t bytes, bool ids_only,
                                           kv_wire_rows_t *out);

void kv_wire_put_record(const kv_wire_record_t *record, unsigned char *out);
void kv_wire_put_header(const kv_wire_header_t *header, unsigned char *out);

/* KV_INVALID for a length, version, kind, action, element type or codec that there is none of. What
 * keys and slices mean is the caller's to check. */
KV_MUST_CHECK kv_status_t kv_wire_get_header(const void *data, size_t bytes, kv_wire_header_t *out);

/* Reads a payload of records and their data from front to end; nothing outside of it is ever
 * touched. */
typedef struct kv_wire_cursor {
    const unsigned char *data;
    size_t bytes;
    size_t record, value; /* where the next ones begin */
    uint32_t left;
} kv_wire_cursor_t;

/* KV_INVALID when `count` records do not fit. */
KV_MUST_CHECK kv_status_t kv_wire_cursor_init(kv_wire_cursor_t *cursor, const void *payload,
                                              size_t bytes, uint32_t count);
/* The next record; *value is its data inside the payload. KV_INVALID when it does not fit or a
 * field is none. Not called when cursor->left is 0. */
KV_MUST_CHECK kv_status_t kv_wire_next(kv_wire_cursor_t *cursor, kv_wire_record_t *record,
                                       const void **value);

/* Where the data of `count` records begin, and how much room one value takes. */
size_t kv_wire_table_bytes(uint32_t count);
size_t kv_wire_value_bytes(size_t bytes);

/* A key as it is declared. */
typedef struct kv_wire_key {
    kv_name_t name; /* decoded: the text lies in the payload */
    uint8_t dtype;
    uint8_t sparse;
    int32_t ndim;
    int64_t shape[KV_MAX_DIMS];
    uint8_t placed; /* number and places are there */
    uint64_t number;
    uint64_t slice_bytes; /* of a row-sparse key: rows */
    uint32_t num_slices;
    const unsigned char *servers; /* uint16 each, little-endian: kv_wire_server_of */
    uint8_t status;               /* DECLARED: what became of it, and … */
    const char *sentence;         /* … why, of an error; lies in the payload */
    uint32_t sentence_bytes;
} kv_wire_key_t;

size_t kv_wire_key_bytes(const kv_wire_key_t *key);
/* Writes one key; `servers` are copied as they are. Returns past the end. */
unsigned char *kv_wire_put_key(const kv_wire_key_t *key, unsigned char *out);
/* Reads one key at *offset and moves it. KV_INVALID for what does not fit or is none. */
KV_MUST_CHECK kv_status_t kv_wire_get_key(const void *payload, size_t bytes, size_t *offset,
                                          kv_wire_key_t *out);
int32_t kv_wire_server_of(const kv_wire_key_t *key, uint32_t slice);
void kv_wire_put_server(unsigned char *servers, uint32_t slice, int32_t server);

#endif
