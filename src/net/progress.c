/* The thread of an endpoint, the ends of what is under way, and what transports call. */
#include "net/endpoint.h"
#include <stdio.h>
#include <string.h>

enum { VERSION = 1, KIND_GREETING = 1, KIND_MESSAGE = 2 };

#define TICK_NS (100 * INT64_C(1000000))

/* -------------------------------------------------------------------------------- the prefix
 *
 * session 0..15, sender 16..19, kind 20, version 21, bytes of the message's own header 22..23;
 * little-endian. Session, sender and version keep their place in every version. */

void kv_net_write_header(const kv_net_t *net, kv_net_post_t *post)
{
    const kv_net_message_t *message = post->message;
    uint32_t own_bytes = message != NULL ? message->header_bytes : 0;
    unsigned char *out = post->header;
    memcpy(out, net->session, KV_NET_SESSION_BYTES);
    for (int i = 0; i < 4; i++)
        out[16 + i] = (unsigned char)((uint32_t)net->self >> (8 * i));
    out[20] = message != NULL ? KIND_MESSAGE : KIND_GREETING;
    out[21] = VERSION;
    out[22] = (unsigned char)own_bytes;
    out[23] = (unsigned char)(own_bytes >> 8);
    if (own_bytes > 0)
        memcpy(out + KV_NET_PREFIX_BYTES, message->header, own_bytes);
    post->header_bytes = KV_NET_PREFIX_BYTES + own_bytes;
}

/* The sender, -1 for a stranger. */
static int32_t read_sender(const kv_net_t *net, const unsigned char *header, size_t bytes)
{
    if (bytes < KV_NET_PREFIX_BYTES || memcmp(header, net->session, KV_NET_SESSION_BYTES) != 0)
        return -1;
    uint32_t sender = 0;
    for (int i = 0; i < 4; i++)
        sender |= (uint32_t)header[16 + i] << (8 * i);
    bool known = sender < (uint32_t)net->num_peers && sender != (uint32_t)net->self;
    return known ? (int32_t)sender : -1;
}

/* --------------------------------------------------------------------- peers, under the lock */

void kv_net_wake_locked(kv_net_t *net)
{
    if (net->sleeping) {
        net->sleeping = false;
        net->transport->wake(net);
    }
}

void kv_net_work_locked(kv_net_t *net, kv_net_peer_t *peer)
{
    if (!peer->has_work) {
        peer->has_work = true;
        peer->next_work = NULL;
        *net->work_tail = peer;
        net->work_tail = &peer->next_work;
    }
    kv_net_wake_locked(net);
}

void kv_net_gone_locked(kv_net_t *net, kv_net_peer_t *peer, kv_status_t code, const char *why)
{
    if (peer->gone != KV_OK)
        return;
    peer->gone = code;
    snprintf(peer->why, sizeof peer->why, "%s", why != NULL ? why : "no reason was given");
    kv_net_work_locked(net, peer);
    kv_cond_broadcast(&net->changed);
}

kv_status_t kv_net_fail_closed(void)
{
    return kv_fail(KV_CLOSED, "this node has closed its connections");
}

kv_status_t kv_net_fail_gone(const kv_net_peer_t *peer)
{
    if (peer->gone == KV_CLOSED)
        return kv_net_fail_closed();
    return kv_fail(KV_PEER_LOST, "%s is gone: %s", peer->name, peer->why);
}

static size_t wire_bytes(const kv_net_post_t *post)
{
    return post->header_bytes + post->payload_bytes;
}

bool kv_net_is_ready(const kv_net_peer_t *peer)
{
    return peer->connected && peer->greeted;
}

bool kv_net_may_post(const kv_net_peer_t *peer)
{
    if (peer->gone != KV_OK || !kv_net_is_ready(peer) || peer->queue.count == 0)
        return false;
    return peer->under_way == 0 ||
           peer->under_way + wire_bytes(peer->queue.posts[0]) <= KV_NET_WINDOW_BYTES;
}

static bool is_over_locked(const kv_net_t *net) KV_REQUIRES(net->lock)
{
    return net->closing && net->work == NULL && net->num_posts == 0 && net->num_accepted == 0;
}

static int32_t number_of(const kv_net_t *net, const kv_net_peer_t *peer)
{
    return (int32_t)(peer - net->peers);
}

/* ------------------------------------------------------------------------------- the thread */

static void end_message(kv_net_post_t *post, kv_status_t status)
{
    kv_net_message_t *message = post->message;
    kv_free(post);
    kv_count(KV_COUNT_NET_MESSAGES, -1);
    message->done(message, status);
}

static void connect_peer(kv_net_t *net, kv_net_peer_t *peer)
{
    kv_status_t status =
        net->transport->connect(net, number_of(net, peer), peer->address, peer->address_bytes);
    kv_mutex_lock(&net->lock);
    kv_free(peer->address);
    peer->address = NULL;
    if (status != KV_OK) {
        kv_net_gone_locked(net, peer, KV_PEER_LOST, kv_status_message(status));
        kv_mutex_unlock(&net->lock);
        return;
    }
    peer->connected = true;
    net->num_posts++;
    kv_cond_broadcast(&net->changed);
    kv_mutex_unlock(&net->lock);

    peer->greeting = (kv_net_post_t){.peer = number_of(net, peer)};
    kv_net_write_header(net, &peer->greeting);
    net->transport->post(net, &peer->greeting);
}

/* As many as waited at the start: a `done` that sends again must not keep the thread here. */
static void post_messages(kv_net_t *net, kv_net_peer_t *peer)
{
    kv_mutex_lock(&net->lock);
    for (size_t left = peer->queue.count; left > 0 && kv_net_may_post(peer); left--) {
        kv_net_post_t *post = kv_net_queue_pop(&peer->queue);
        peer->under_way += wire_bytes(post);
        net->num_posts++;
        kv_mutex_unlock(&net->lock);
        net->transport->post(net, post);
        kv_mutex_lock(&net->lock);
    }
    if (kv_net_may_post(peer))
        kv_net_work_locked(net, peer);
    kv_mutex_unlock(&net->lock);
}

static void bury(kv_net_t *net, kv_net_peer_t *peer)
{
    if (peer->connected)
        net->transport->drop(net, number_of(net, peer));
    for (;;) {
        kv_mutex_lock(&net->lock);
        kv_net_post_t *post = kv_net_queue_pop(&peer->queue);
        kv_mutex_unlock(&net->lock);
        if (post == NULL)
            break;
        end_message(post, kv_net_fail_gone(peer));
    }
    if (peer->gone == KV_PEER_LOST)
        net->handlers.lost(net->handlers.context, number_of(net, peer), peer->why);
}

static bool is_wanted(kv_net_t *net, const kv_net_peer_t *peer)
{
    kv_mutex_lock(&net->lock);
    bool wanted = peer->wanted;
    kv_mutex_unlock(&net->lock);
    return wanted;
}

/* Asked once, by the thread that owns the transport, for those who ask in any other. */
static void note_lanes(kv_net_t *net, kv_net_peer_t *peer)
{
    char lanes[KV_NET_LANES_BYTES] = "";
    net->transport->lanes(net, number_of(net, peer), lanes, sizeof lanes);
    kv_mutex_lock(&net->lock);
    memcpy(peer->lanes, lanes, sizeof lanes);
    peer->lanes_known = true;
    kv_mutex_unlock(&net->lock);
}

static void serve(kv_net_t *net, kv_net_peer_t *peer)
{
    kv_mutex_lock(&net->lock);
    bool gone = peer->gone != KV_OK;
    bool due = gone && !peer->buried;
    peer->buried = gone;
    kv_mutex_unlock(&net->lock);
    if (due)
        bury(net, peer);
    if (gone)
        return;
    if (!peer->connected && is_wanted(net, peer))
        connect_peer(net, peer);
    if (kv_net_is_ready(peer) && !peer->lanes_known)
        note_lanes(net, peer);
    post_messages(net, peer);
}

/* True: the endpoint is closed and nothing is under way. */
static bool serve_all(kv_net_t *net)
{
    kv_mutex_lock(&net->lock);
    bool over = is_over_locked(net);
    kv_net_peer_t *work = net->work;
    net->work = NULL;
    net->work_tail = &net->work;
    while (work != NULL) {
        kv_net_peer_t *peer = work;
        work = peer->next_work;
        peer->has_work = false;
        kv_mutex_unlock(&net->lock);
        serve(net, peer);
        kv_mutex_lock(&net->lock);
    }
    kv_mutex_unlock(&net->lock);
    return over;
}

void *kv_net_run(void *context)
{
    kv_net_t *net = context;
    kv_status_t status = net->transport->open(net, net->config);
    kv_mutex_lock(&net->lock);
    net->opened = true;
    net->open_status = status;
    kv_sentence_save(&net->open_sentence);
    kv_cond_broadcast(&net->changed);
    while (status == KV_OK && !net->started)
        kv_cond_wait(&net->changed, &net->lock);
    kv_mutex_unlock(&net->lock);
    if (status != KV_OK)
        return NULL;

    int64_t tick_at = kv_clock_ns() + TICK_NS;
    while (!serve_all(net)) {
        net->transport->progress(net);
        int64_t now = kv_clock_ns();
        if (now >= tick_at && net->handlers.tick != NULL) {
            net->handlers.tick(net->handlers.context);
            tick_at = now + TICK_NS;
        }
    }
    net->transport->close(net);
    return NULL;
}

/* ------------------------------------------------------------------- called by the transport */

kv_net_accepted_t *kv_net_arrived(kv_net_t *net, const void *header, size_t header_bytes,
                                  size_t payload_bytes)
{
    const unsigned char *bytes = header;
    int32_t sender = read_sender(net, bytes, header_bytes);
    if (sender < 0)
        return NULL;
    kv_net_peer_t *peer = &net->peers[sender];
    int kind = bytes[20];
    size_t own_bytes = bytes[22] | (size_t)bytes[23] << 8;
    char wrong[128] = "";
    if (bytes[21] != VERSION)
        snprintf(wrong, sizeof wrong, "it speaks version %d of the protocol, this node version %d",
                 bytes[21], VERSION);
    else if ((kind != KIND_GREETING && kind != KIND_MESSAGE) || own_bytes > KV_NET_HEADER_BYTES ||
             header_bytes != KV_NET_PREFIX_BYTES + own_bytes)
        snprintf(wrong, sizeof wrong, "it sent a malformed header of %zu bytes", header_bytes);

    kv_mutex_lock(&net->lock);
    if (wrong[0] == '\0' && kind == KIND_MESSAGE && !kv_net_is_ready(peer))
        snprintf(wrong, sizeof wrong, "it sent a message before its greeting");
    bool gone = peer->gone != KV_OK;
    if (wrong[0] != '\0') {
        kv_net_gone_locked(net, peer, KV_PEER_LOST, wrong);
    } else if (kind == KIND_GREETING && !gone && !peer->greeted) {
        peer->greeted = true;
        kv_net_work_locked(net, peer);
        kv_cond_broadcast(&net->changed);
    }
    kv_mutex_unlock(&net->lock);
    if (gone || wrong[0] != '\0' || kind == KIND_GREETING)
        return NULL;

    kv_net_accepted_t *accepted = NULL;
    if (payload_bytes > 0) {
        accepted = kv_alloc(sizeof *accepted);
        if (accepted == NULL) {
            kv_net_broken(net, sender, "there was no memory to receive its message");
            return NULL;
        }
    }
    kv_net_arrival_t arrival = {.peer = sender,
                                .header = bytes + KV_NET_PREFIX_BYTES,
                                .header_bytes = own_bytes,
                                .payload_bytes = payload_bytes};
    kv_status_t status = net->handlers.arrive(net->handlers.context, &arrival);
    if (status != KV_OK) {
        kv_free(accepted);
        kv_net_broken(net, sender, kv_status_message(status));
        return NULL;
    }
    atomic_fetch_add(&net->messages_received, 1);
    atomic_fetch_add(&net->bytes_received, header_bytes + payload_bytes);
    if (payload_bytes == 0 || arrival.target == NULL) {
        kv_free(accepted);
        if (arrival.done != NULL)
            arrival.done(arrival.context, KV_OK);
        return NULL;
    }
    *accepted = (kv_net_accepted_t){.peer = sender,
                                    .target = arrival.target,
                                    .bytes = payload_bytes,
                                    .done = arrival.done,
                                    .context = arrival.context};
    kv_count(KV_COUNT_NET_ARRIVALS, 1);
    kv_mutex_lock(&net->lock);
    net->num_accepted++;
    kv_mutex_unlock(&net->lock);
    return accepted;
}

void kv_net_received(kv_net_t *net, kv_net_accepted_t *accepted, kv_status_t status)
{
    kv_net_peer_t *peer = &net->peers[accepted->peer];
    kv_mutex_lock(&net->lock);
    if (status != KV_OK)
        kv_net_gone_locked(net, peer, KV_PEER_LOST, kv_status_message(status));
    net->num_accepted--;
    bool gone = peer->gone != KV_OK;
    kv_mutex_unlock(&net->lock);
    void (*done)(void *context, kv_status_t status_) = accepted->done;
    void *context = accepted->context;
    kv_free(accepted);
    kv_count(KV_COUNT_NET_ARRIVALS, -1);
    done(context, gone ? kv_net_fail_gone(peer) : KV_OK);
}

void kv_net_sent(kv_net_t *net, kv_net_post_t *post, kv_status_t status)
{
    kv_net_peer_t *peer = &net->peers[post->peer];
    kv_mutex_lock(&net->lock);
    if (status != KV_OK)
        kv_net_gone_locked(net, peer, KV_PEER_LOST, kv_status_message(status));
    net->num_posts--;
    if (post->message != NULL)
        peer->under_way -= wire_bytes(post);
    bool gone = peer->gone != KV_OK;
    if (kv_net_may_post(peer))
        kv_net_work_locked(net, peer);
    kv_mutex_unlock(&net->lock);
    if (post->message == NULL)
        return;
    if (status == KV_OK) {
        atomic_fetch_add(&net->messages_sent, 1);
        atomic_fetch_add(&net->bytes_sent, wire_bytes(post));
    }
    end_message(post, gone ? kv_net_fail_gone(peer) : KV_OK);
}

void kv_net_broken(kv_net_t *net, int32_t peer, const char *why)
{
    kv_net_drop(net, peer, why);
}

bool kv_net_may_sleep(kv_net_t *net)
{
    kv_mutex_lock(&net->lock);
    bool may = net->work == NULL && !is_over_locked(net);
    net->sleeping = may;
    kv_mutex_unlock(&net->lock);
    if (may)
        atomic_fetch_add(&net->sleeps, 1);
    return may;
}

void kv_net_awake(kv_net_t *net)
{
    kv_mutex_lock(&net->lock);
    net->sleeping = false;
    kv_mutex_unlock(&net->lock);
}

void *kv_net_own(const kv_net_t *net)
{
    return net->own;
}

void kv_net_set_own(kv_net_t *net, void *own)
{
    net->own = own;
}

kv_status_t kv_net_set_address(kv_net_t *net, const void *address, size_t bytes)
{
    if (bytes > sizeof net->address)
        return kv_fail(KV_INVALID,
                       "this node's address has %zu bytes, more than %zu: name one "
                       "network device",
                       bytes, sizeof net->address);
    memcpy(net->address, address, bytes);
    net->address_bytes = bytes;
    return KV_OK;
}

int32_t kv_net_self(const kv_net_t *net)
{
    return net->self;
}

int32_t kv_net_num_peers(const kv_net_t *net)
{
    return net->num_peers;
}
