/* The endpoint as net.c (what others call) and progress.c (the thread, what transports call) share
 * it; queue.c keeps the messages that wait for one peer.
 *
 * Whoever queues something (a message, a connect, the end of a session) notes the peer in the list
 * of peers with work and wakes the thread if that sleeps; the thread takes the list, serves each
 * peer and lets the transport make progress. The thread says that it will sleep under the lock,
 * after a look at that list, so no wake is lost.
 *
 * A peer is greeted when it is connected, and messages wait until its own greeting has come: by
 * then it has connected this node, so no message meets a peer that does not know its sender. A
 * greeting may come before this node has connected that peer, and is remembered.
 *
 * A session ends once: `gone` is set, with the reason, by whoever finds out first (the transport, a
 * handler's refusal, kv_net_drop, kv_net_close). From then on sends fail, arrivals are thrown away,
 * and all that ends, ends with that reason. The thread then buries the peer: the transport drops
 * it, the waiting messages end, the handler is told. What the transport has under way ends when it
 * says so; the thread of a closing endpoint stays until all has.
 */
#ifndef KV_NET_ENDPOINT_H
#define KV_NET_ENDPOINT_H

#include "net/internal.h"

enum { KV_NET_LANES_BYTES = 256 };

/* Messages that wait, a heap by (priority, order of sending). A message knows its place: `state` is
 * its index + 1, and 0 when it does not wait. */
typedef struct kv_net_queue {
    kv_net_post_t **posts;
    size_t count, room;
} kv_net_queue_t;

/* Guarded by the endpoint's lock, but what only the thread changes is read by it without. */
typedef struct kv_net_peer kv_net_peer_t;
struct kv_net_peer {
    char name[KV_NET_PEER_NAME];
    char why[KV_MESSAGE_BYTES]; /* fixed once `gone` is set */
    char lanes[KV_NET_LANES_BYTES];
    void *address; /* until the transport has it */
    size_t address_bytes;
    bool wanted;                                  /* kv_net_connect was called */
    bool connected, greeted, lanes_known, buried; /* changed by the thread only */
    kv_status_t gone;                             /* KV_OK, KV_PEER_LOST, KV_CLOSED */
    kv_net_queue_t queue;
    size_t under_way; /* bytes of posted messages */
    kv_net_post_t greeting;
    bool has_work; /* stands in the list */
    kv_net_peer_t *next_work;
};

struct kv_net {
    const kv_transport_t *transport;
    void *own; /* the transport's */
    kv_net_handlers_t handlers;
    const kv_net_config_t *config; /* during kv_net_open */
    int32_t self, num_peers;
    unsigned char session[KV_NET_SESSION_BYTES];
    unsigned char address[KV_NET_ADDRESS_BYTES];
    size_t address_bytes;
    uint64_t generation;
    kv_thread_t thread;

    kv_mutex_t lock;   /* guards all below but the counters */
    kv_cond_t changed; /* a peer is ready or gone, the thread has opened, was joined */
    kv_net_peer_t *peers;
    kv_net_peer_t *work, **work_tail;
    uint64_t sequence;
    int64_t num_posts, num_accepted; /* what the transport has */
    bool opened, started, sleeping, closing, joined;
    kv_status_t open_status;
    kv_sentence_t open_sentence;

    _Atomic uint64_t messages_sent, bytes_sent, messages_received, bytes_received, sleeps;
};

/* ---------------------------------------------------------------------------------- queue.c */

/* Takes the post; KV_NO_MEMORY leaves the queue as it was. */
KV_MUST_CHECK kv_status_t kv_net_queue_push(kv_net_queue_t *queue, kv_net_post_t *post);
/* Gives the first post, or that of a message if it waits, else NULL. */
kv_net_post_t *kv_net_queue_pop(kv_net_queue_t *queue);
kv_net_post_t *kv_net_queue_remove(kv_net_queue_t *queue, const kv_net_message_t *message);
void kv_net_queue_fini(kv_net_queue_t *queue);

/* ------------------------------------------------------------------------------- progress.c */

/* The body of the thread: opens the transport, works until the endpoint is closed, closes it. */
void *kv_net_run(void *net);

/* The wire header of a message of this node. */
void kv_net_write_header(const kv_net_t *net, kv_net_post_t *post);

void kv_net_wake_locked(kv_net_t *net) KV_REQUIRES(net->lock);
void kv_net_work_locked(kv_net_t *net, kv_net_peer_t *peer) KV_REQUIRES(net->lock);
/* Ends the session if it has not ended. */
void kv_net_gone_locked(kv_net_t *net, kv_net_peer_t *peer, kv_status_t code, const char *why)
    KV_REQUIRES(net->lock);
/* The error of a peer that is gone. */
kv_status_t kv_net_fail_gone(const kv_net_peer_t *peer);
kv_status_t kv_net_fail_closed(void);
bool kv_net_is_ready(const kv_net_peer_t *peer);
/* Whether the first of the waiting messages may be posted now. */
bool kv_net_may_post(const kv_net_peer_t *peer);

static inline bool kv_net_is_peer(const kv_net_t *net, int32_t peer)
{
    return peer >= 0 && peer < net->num_peers && peer != net->self;
}

#endif
