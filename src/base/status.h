/* Status codes and the words that go with them.
 *
 * The function that first decides what went wrong calls kv_fail() once: it stores a sentence for
 * this thread and returns the code. Everybody above only passes the code on (KV_TRY). A code
 * without a sentence gets the default one of the table below. Out-parameters change only on KV_OK.
 */
#ifndef KV_BASE_STATUS_H
#define KV_BASE_STATUS_H

/* X(code, default sentence, Python exception). The Python side makes its classes from this table;
 * an empty class name means that the caller's own exception is already set. */
#define KV_STATUS_LIST(X)                                                                          \
    X(NO_KEY, "the key was not initialised", "KeyNotFoundError")                                   \
    X(INVALID, "an argument is not valid", "InvalidArgumentError")                                 \
    X(BAD_TYPE, "a value has the wrong type", "ArrayTypeError")                                    \
    X(TIMEOUT, "the deadline has passed", "TimeoutError")                                          \
    X(PEER_LOST, "a node of the cluster is gone", "PeerLostError")                                 \
    X(LEFT, "a worker has left the cluster", "PeerLostError")                                      \
    X(NOT_BUILT, "this build cannot do that", "NotBuiltError")                                     \
    X(DEVICE, "a device failed", "DeviceError")                                                    \
    X(CLOSED, "the store is closed", "ClosedError")                                                \
    X(NO_MEMORY, "out of memory", "MemoryError")                                                   \
    X(INTERRUPTED, "the wait was interrupted", "")                                                 \
    X(CALLBACK, "a callback failed", "")

typedef enum kv_status {
    KV_OK = 0,
#define KV_STATUS_ENUM(code, sentence, python) KV_##code,
    KV_STATUS_LIST(KV_STATUS_ENUM)
#undef KV_STATUS_ENUM
        KV_STATUS_COUNT
} kv_status_t;

/* gcc cannot put warn_unused_result on an enum, so fallible prototypes return this. */
#define KV_MUST_CHECK __attribute__((warn_unused_result))
#define KV_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#define KV_LIKELY(x) __builtin_expect(!!(x), 1)
#define KV_UNLIKELY(x) __builtin_expect(!!(x), 0)

enum { KV_MESSAGE_BYTES = 512 };

/* Stores the sentence for this thread (cut at KV_MESSAGE_BYTES, never in the middle of a UTF-8
 * character) and returns `code`. The arguments may point into the sentence stored before. */
KV_PRINTF(2, 3) kv_status_t kv_fail(kv_status_t code, const char *format, ...);

/* The sentence of the last kv_fail of this thread if it was for `code`, else the default one.
 * Valid until this thread's next kv_fail. */
const char *kv_status_message(kv_status_t code);

/* The stored sentence, kept aside by somebody who lets other work run in this thread between a
 * failure and its report. */
typedef struct kv_sentence {
    kv_status_t code;
    char message[KV_MESSAGE_BYTES];
} kv_sentence_t;

void kv_sentence_save(kv_sentence_t *out);
void kv_sentence_restore(const kv_sentence_t *sentence);

/* The Python exception class of a code, "" if the exception is already set. */
const char *kv_status_class(kv_status_t code);

#define KV_TRY(expression)                                                                         \
    do {                                                                                           \
        kv_status_t kv_try_status = (expression);                                                  \
        if (KV_UNLIKELY(kv_try_status != KV_OK))                                                   \
            return kv_try_status;                                                                  \
    } while (0)

#endif
