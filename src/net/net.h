/* Bytes between processes: messages from peer to peer.
 *
 * An endpoint knows its peers by small numbers that are the same on every node. A message is a
 * short header and a payload. The payload goes from the sender's memory to the memory that the
 * receiver's handler names, without a copy in between where the transport can do that.
 *
 * Promises to whoever sits above (all transports, tests/c/test_net.c):
 *   - Headers arrive in the order in which their messages were sent to that peer, but a message of
 *     higher priority may overtake those that wait in the queue of its sender. A payload may be
 *     complete after that of a younger message.
 *   - Every message that was taken by kv_net_send is ended by exactly one call of its `done`; every
 *     arrival that a handler has accepted by exactly one call of its `done`. That holds also when a
 *     peer dies or the endpoint is closed. Before that call the memory belongs to the transport,
 *     afterwards it is not touched again.
 *   - A peer that is gone is told once, by `lost`. What was under way to or from it ends with
 *     KV_PEER_LOST, before or after that call; nothing is delivered from it afterwards.
 *
 * One thread of the endpoint makes all progress and calls all handlers and `done` functions, with
 * no lock held; they must not block. Everything else may be called from any thread, from handlers
 * too.
 */
#ifndef KV_NET_NET_H
#define KV_NET_NET_H

#include "base/caller.h"
#include "base/status.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    KV_NET_HEADER_BYTES = 128,   /* of a message's own header, at most */
    KV_NET_ADDRESS_BYTES = 4096, /* of an endpoint's address, at most */
    KV_NET_SESSION_BYTES = 16,   /* random, the same for all nodes of one cluster */
    KV_NET_PEER_NAME = 32,       /* "server 1" */
};

typedef struct kv_net kv_net_t;
typedef struct kv_net_message kv_net_message_t;
typedef struct kv_net_arrival kv_net_arrival_t;

/* A message on its way out. Filled in by the sender, who owns it and its payload until `done`. */
struct kv_net_message {
    int32_t peer;
    int32_t priority; /* higher first, among the messages that wait for this peer */
    uint32_t header_bytes;
    unsigned char header[KV_NET_HEADER_BYTES];
    const void *payload; /* NULL when there are no bytes */
    size_t payload_bytes;
    /* KV_OK: the payload may be changed again. It is not known to have been received. */
    void (*done)(kv_net_message_t *message, kv_status_t status);
    /* The endpoint's own: */
    uint64_t sequence;
    int state;
};

/* A message coming in. */
struct kv_net_arrival {
    int32_t peer;
    const void *header; /* valid during the handler's call */
    size_t header_bytes;
    size_t payload_bytes;
    /* To be filled in by the handler that accepts it: where the payload goes (room for
     * payload_bytes; NULL: it is thrown away), and who is told when it is there. `done` may be NULL
     * when `target` is. */
    void *target;
    void (*done)(void *context, kv_status_t status);
    void *context;
};

typedef struct kv_net_handlers {
    void *context;
    /* A message has come. An error refuses it: the peer has sent what it must not, and is dropped
     * with that sentence. */
    kv_status_t (*arrive)(void *context, kv_net_arrival_t *arrival);
    /* The peer is gone, with the reason: it died, it was dropped, it broke the protocol. */
    void (*lost)(void *context, int32_t peer, const char *why);
    /* About every 0.1 s. May be NULL. */
    void (*tick)(void *context);
} kv_net_handlers_t;

typedef struct kv_net_config {
    const char *transport; /* "ucx"; for tests "inproc", and "faulty": inproc with faults */
    int32_t self;          /* this node's number */
    int32_t num_peers;     /* all numbers are below */
    unsigned char session[KV_NET_SESSION_BYTES];
    /* ucx: */
    const char *library;    /* a folder with libucp.so.0, NULL: the system's loader finds it */
    const char *interface;  /* network device ("eth0"); NULL: chosen by UCX */
    const char *port_range; /* "20000-20100", NULL: any */
    bool same_host_copies;  /* cma; all nodes are of one host, pid namespace and user */
    bool inet6;
    /* faulty: */
    uint64_t seed;
    const char *faults; /* see faulty.c */
} kv_net_config_t;

/* Gives an endpoint, its thread running; no handler is called before `out` is written. KV_NOT_BUILT
 * when the transport is not in this build or its library is not on this machine, with what to
 * install; KV_INVALID for a setting. */
KV_MUST_CHECK kv_status_t kv_net_open(const kv_net_config_t *config,
                                      const kv_net_handlers_t *handlers, kv_net_t **out);

/* The address for others, at most KV_NET_ADDRESS_BYTES. */
void kv_net_address(const kv_net_t *net, void *address, size_t *bytes);

/* Begins to connect a peer; `name` is for messages. Both sides do it. Does not block. KV_PEER_LOST
 * for a peer that was dropped before. An address that the transport cannot use is told by `lost`.
 */
KV_MUST_CHECK kv_status_t kv_net_connect(kv_net_t *net, int32_t peer, const char *name,
                                         const void *address, size_t bytes);

/* Waits until every peer that was connected has greeted with the same session. KV_TIMEOUT names
 * those that have not, KV_PEER_LOST one that is gone. Detaches the caller meanwhile. */
KV_MUST_CHECK kv_status_t kv_net_wait_ready(kv_net_t *net, kv_caller_t *caller);

/* Waits until every session with a peer of a number below `below` that was ready has ended, or the
 * caller's time is over: both are KV_OK. Detaches the caller meanwhile. */
KV_MUST_CHECK kv_status_t kv_net_wait_alone(kv_net_t *net, int32_t below, kv_caller_t *caller);

/* Queues a message for its peer. Of those to one peer a bounded number of bytes is under way at a
 * time, so that a later one of higher priority is not far behind. It may be sent before the peer
 * has greeted, and waits till then. KV_PEER_LOST (with the reason), KV_CLOSED, KV_NO_MEMORY,
 * KV_INVALID: the message is still the caller's and `done` is not called. */
KV_MUST_CHECK kv_status_t kv_net_send(kv_net_t *net, kv_net_message_t *message);

/* Takes back a message that has not begun to go out: true, and `done` is not called. False: it is
 * under way or has ended, `done` is called or has been. */
bool kv_net_cancel(kv_net_t *net, kv_net_message_t *message);

/* Ends the session with a peer, as if it had died. Does not block. */
void kv_net_drop(kv_net_t *net, int32_t peer, const char *why);

/* Why a peer is gone: text for messages, copied; false when it is not. */
bool kv_net_is_lost(kv_net_t *net, int32_t peer, char *why, size_t bytes);

/* Ends all sessions, calls every `done` that is due (with KV_CLOSED; `lost` is not called for those
 * sessions), joins the thread. Blocks, for seconds at most; not from handlers. Idempotent.
 * Afterwards only kv_net_free, kv_net_counters and failing sends. In a forked child this and
 * kv_net_free do nothing. */
void kv_net_close(kv_net_t *net);
void kv_net_free(kv_net_t *net); /* after close; NULL is allowed */

/* What has gone over the wire, headers included but greetings not, and how. */
typedef struct kv_net_counters {
    uint64_t messages_sent, bytes_sent;
    uint64_t messages_received, bytes_received;
    uint64_t sleeps; /* how often the thread has slept */
} kv_net_counters_t;
void kv_net_counters(const kv_net_t *net, kv_net_counters_t *out);

/* The transports in use to a peer, as its library calls them ("tcp/lo cma/memory"). */
void kv_net_lanes(kv_net_t *net, int32_t peer, char *text, size_t bytes);

#endif
