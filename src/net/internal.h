/* What the files of net share: the endpoint, its peers, and the table behind a transport.
 *
 *   net.c       the endpoint: what others call; endpoint.h says how it works
 *   progress.c  its thread, sessions, the ends of things
 *   queue.c     the messages that wait for one peer
 *   inproc.c    endpoints of one process
 *   faulty.c    inproc with faults chosen by a seed
 *   ucx.c       UCX active messages; ucx_load.c finds its library and sets it up (only these two
 * see its headers), ucx_sockets.c cuts its connections
 *
 * The thread of an endpoint runs the same loop for every transport:
 *
 *     take connects, drops and what may be posted now from the queues  → transport->connect, drop,
 *                                                                        post
 *     transport->progress(net)                                         → kv_net_arrived,
 *                                                                        kv_net_received,
 *                                                                        kv_net_sent, kv_net_broken
 *     every 0.1 s: handlers.tick
 *
 * A transport has no thread and needs no lock: all its functions but `wake` are called by this
 * thread. A wire header is a fixed prefix and the message's own header; progress.c writes and
 * checks it, and sends and checks the greeting that makes a peer ready.
 */
#ifndef KV_NET_INTERNAL_H
#define KV_NET_INTERNAL_H

#include "base/memory.h"
#include "base/thread.h"
#include "net/net.h"
#include <stdatomic.h>

enum {
    KV_NET_PREFIX_BYTES = 24,
    KV_NET_WIRE_HEADER = KV_NET_PREFIX_BYTES + KV_NET_HEADER_BYTES,
    KV_NET_WINDOW_BYTES = 8 << 20, /* under way to one peer; one message always may be */
};

/* A message that the transport has been given: lives until kv_net_sent. The wire header stays where
 * it is until then. */
typedef struct kv_net_post {
    kv_net_message_t *message; /* NULL: a greeting */
    int32_t peer;
    uint32_t header_bytes;
    unsigned char header[KV_NET_WIRE_HEADER];
    const void *payload;
    size_t payload_bytes;
    void *own; /* the transport's */
    struct kv_net_post *next;
} kv_net_post_t;

typedef struct kv_transport {
    const char *name;
    /* Fills net->own and net->address. On failure nothing is left. */
    kv_status_t (*open)(kv_net_t *net, const kv_net_config_t *config);
    kv_status_t (*connect)(kv_net_t *net, int32_t peer, const void *address, size_t bytes);
    /* Begins to send; kv_net_sent ends it, now or later, exactly once. */
    void (*post)(kv_net_t *net, kv_net_post_t *post);
    /* Ends the session: everything under way to and from the peer ends with KV_PEER_LOST, now or
     * soon. Called once a peer, also for one that the transport has reported as broken. */
    void (*drop)(kv_net_t *net, int32_t peer);
    /* Moves what can be moved. When nothing can, sleeps until there is something or `wake` is
     * called, for 0.1 s at most; but only after kv_net_may_sleep has said yes, and calls
     * kv_net_awake afterwards. */
    void (*progress)(kv_net_t *net);
    /* From any thread: ends a sleep of `progress`, also one that is about to begin. */
    void (*wake)(kv_net_t *net);
    void (*lanes)(kv_net_t *net, int32_t peer, char *text, size_t bytes);
    /* All sessions were dropped and nothing is under way; frees net->own. */
    void (*close)(kv_net_t *net);
} kv_transport_t;

extern const kv_transport_t kv_transport_inproc;
extern const kv_transport_t kv_transport_faulty;
extern const kv_transport_t kv_transport_ucx; /* in a build without UCX its open says so */

/* An arrival that a handler has accepted: lives until kv_net_received. */
typedef struct kv_net_accepted {
    int32_t peer;
    void *target;
    size_t bytes;
    void (*done)(void *context, kv_status_t status);
    void *context;
    void *own; /* the transport's */
    struct kv_net_accepted *next, *prev;
} kv_net_accepted_t;

/* ---------------------------------------- progress.c, called by transports, in the thread */

/* A wire header has come. Checks it and asks the handler. Gives NULL when the message is to be
 * thrown away (a greeting, a stranger, a dead session, a refusal: that peer is dropped), else what
 * to fill with `payload_bytes` bytes; kv_net_received ends it. */
kv_net_accepted_t *kv_net_arrived(kv_net_t *net, const void *header, size_t header_bytes,
                                  size_t payload_bytes);
void kv_net_received(kv_net_t *net, kv_net_accepted_t *accepted, kv_status_t status);
/* The transport is through with a post; an error has a sentence (kv_fail). */
void kv_net_sent(kv_net_t *net, kv_net_post_t *post, kv_status_t status);
/* The transport has found the peer dead. May be called more than once. */
void kv_net_broken(kv_net_t *net, int32_t peer, const char *why);
/* False: there is something to do. True: net.c has noted that the thread sleeps, and whoever queues
 * something calls `wake`. */
bool kv_net_may_sleep(kv_net_t *net);
void kv_net_awake(kv_net_t *net);

/* The transport's part of an endpoint; the rest of kv_net_t stands in net.c. */
void *kv_net_own(const kv_net_t *net);
void kv_net_set_own(kv_net_t *net, void *own);
KV_MUST_CHECK kv_status_t kv_net_set_address(kv_net_t *net, const void *address, size_t bytes);
int32_t kv_net_self(const kv_net_t *net);
int32_t kv_net_num_peers(const kv_net_t *net);

#endif
