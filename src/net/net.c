/* What others call: open, connect, wait, send, take back, drop, close. */
#include "net/endpoint.h"
#include <stdio.h>
#include <string.h>

enum { MAX_NAMED = 8 }; /* peers in one message */

/* --------------------------------------------------------------------------- open, close, free */

static const kv_transport_t *const transports[] = {&kv_transport_ucx, &kv_transport_inproc,
                                                   &kv_transport_faulty};

static kv_status_t find_transport(const char *name, const kv_transport_t **out)
{
    for (size_t i = 0; i < sizeof transports / sizeof transports[0]; i++) {
        if (strcmp(transports[i]->name, name) == 0) {
            *out = transports[i];
            return KV_OK;
        }
    }
    return kv_fail(KV_INVALID,
                   "there is no transport '%s': it is ucx, or for tests inproc or faulty", name);
}

static void free_all(kv_net_t *net)
{
    for (int32_t i = 0; i < net->num_peers; i++) {
        kv_net_queue_fini(&net->peers[i].queue);
        kv_free(net->peers[i].address);
    }
    kv_cond_fini(&net->changed);
    kv_mutex_fini(&net->lock);
    kv_free(net->peers);
    kv_free(net);
}

/* The transport is opened by the thread, which alone may use it; its error is passed on here. The
 * thread goes on once the caller has its endpoint, which handlers may use. */
static kv_status_t start(kv_net_t *net, const kv_net_config_t *config, kv_net_t **out)
{
    net->config = config;
    KV_TRY(kv_thread_start(&net->thread, "kv-net", kv_net_run, net));
    kv_mutex_lock(&net->lock);
    while (!net->opened)
        kv_cond_wait(&net->changed, &net->lock);
    net->config = NULL;
    kv_status_t status = net->open_status;
    if (status == KV_OK) {
        *out = net;
        net->started = true;
        kv_cond_broadcast(&net->changed);
    }
    kv_mutex_unlock(&net->lock);
    if (status != KV_OK) {
        kv_thread_join(net->thread);
        kv_sentence_restore(&net->open_sentence);
    }
    return status;
}

kv_status_t kv_net_open(const kv_net_config_t *config, const kv_net_handlers_t *handlers,
                        kv_net_t **out)
{
    const kv_transport_t *transport = NULL;
    KV_TRY(find_transport(config->transport, &transport));
    if (config->num_peers <= 0 || config->self < 0 || config->self >= config->num_peers)
        return kv_fail(KV_INVALID, "node %d is not one of %d nodes", (int)config->self,
                       (int)config->num_peers);
    kv_net_t *net = kv_calloc(1, sizeof *net);
    KV_TRY_ALLOC(net, "an endpoint");
    net->peers = kv_calloc((size_t)config->num_peers, sizeof *net->peers);
    if (net->peers == NULL) {
        kv_free(net);
        return kv_fail(KV_NO_MEMORY, "no memory for the peers of an endpoint");
    }
    net->transport = transport;
    net->handlers = *handlers;
    net->self = config->self;
    net->num_peers = config->num_peers;
    memcpy(net->session, config->session, KV_NET_SESSION_BYTES);
    net->generation = kv_fork_generation();
    net->work_tail = &net->work;
    kv_mutex_init(&net->lock, KV_RANK_NET);
    kv_cond_init(&net->changed);
    kv_status_t status = start(net, config, out);
    if (status != KV_OK)
        free_all(net);
    return status;
}

/* In a forked child the thread is not there, and the lock may be held for ever. */
static bool is_foreign(const kv_net_t *net)
{
    return net->generation != kv_fork_generation();
}

void kv_net_close(kv_net_t *net)
{
    if (is_foreign(net))
        return;
    kv_mutex_lock(&net->lock);
    bool first = !net->closing;
    net->closing = true;
    if (first) {
        for (int32_t i = 0; i < net->num_peers; i++)
            kv_net_gone_locked(net, &net->peers[i], KV_CLOSED, "this node has closed");
        kv_net_wake_locked(net);
        kv_mutex_unlock(&net->lock);
        kv_thread_join(net->thread);
        kv_mutex_lock(&net->lock);
        net->joined = true;
        kv_cond_broadcast(&net->changed);
    }
    while (!net->joined)
        kv_cond_wait(&net->changed, &net->lock);
    kv_mutex_unlock(&net->lock);
}

void kv_net_free(kv_net_t *net)
{
    if (net != NULL && !is_foreign(net))
        free_all(net);
}

/* -------------------------------------------------------------------------- from any thread */

void kv_net_address(const kv_net_t *net, void *address, size_t *bytes)
{
    memcpy(address, net->address, net->address_bytes);
    *bytes = net->address_bytes;
}

static kv_status_t want_locked(kv_net_t *net, kv_net_peer_t *peer, const char *name, void *address,
                               size_t bytes) KV_REQUIRES(net->lock)
{
    if (net->closing)
        return kv_net_fail_closed();
    if (peer->wanted)
        return kv_fail(KV_INVALID, "%s is connected already", peer->name);
    snprintf(peer->name, sizeof peer->name, "%s", name);
    if (peer->gone != KV_OK)
        return kv_net_fail_gone(peer);
    peer->wanted = true;
    peer->address = address;
    peer->address_bytes = bytes;
    kv_net_work_locked(net, peer);
    return KV_OK;
}

kv_status_t kv_net_connect(kv_net_t *net, int32_t peer, const char *name, const void *address,
                           size_t bytes)
{
    if (!kv_net_is_peer(net, peer))
        return kv_fail(KV_INVALID, "node %d cannot connect to %s with number %d: there are %d",
                       (int)net->self, name, (int)peer, (int)net->num_peers);
    if (bytes == 0 || bytes > KV_NET_ADDRESS_BYTES)
        return kv_fail(KV_INVALID, "the address of %s has %zu bytes, not 1 to %d", name, bytes,
                       KV_NET_ADDRESS_BYTES);
    void *copy = kv_alloc(bytes);
    KV_TRY_ALLOC(copy, "the address of a node");
    memcpy(copy, address, bytes);
    kv_mutex_lock(&net->lock);
    kv_status_t status = want_locked(net, &net->peers[peer], name, copy, bytes);
    kv_mutex_unlock(&net->lock);
    if (status != KV_OK)
        kv_free(copy);
    return status;
}

/* The code of the wait's end, KV_OK to go on; fills `missing` with names. */
static kv_status_t look_locked(kv_net_t *net, int *num_missing, char *missing, size_t bytes)
    KV_REQUIRES(net->lock)
{
    if (net->closing)
        return kv_net_fail_closed();
    *num_missing = 0;
    size_t used = 0;
    missing[0] = '\0';
    for (int32_t i = 0; i < net->num_peers; i++) {
        const kv_net_peer_t *peer = &net->peers[i];
        if (!peer->wanted)
            continue;
        if (peer->gone != KV_OK)
            return kv_net_fail_gone(peer);
        if (kv_net_is_ready(peer))
            continue;
        if (++*num_missing <= MAX_NAMED && used < bytes)
            used += (size_t)snprintf(missing + used, bytes - used, "%s%s", used > 0 ? ", " : "",
                                     peer->name);
    }
    return KV_OK;
}

/* Waits for a change of the endpoint, until the deadline, and polls the caller in time. */
static kv_status_t await_change_locked(kv_net_t *net, kv_caller_t *caller, int64_t deadline,
                                       int64_t *poll_at) KV_REQUIRES(net->lock)
{
    if (kv_clock_ns() < *poll_at) {
        kv_cond_wait_until(&net->changed, &net->lock, deadline < *poll_at ? deadline : *poll_at);
        return KV_OK;
    }
    kv_mutex_unlock(&net->lock);
    kv_status_t status = caller->poll(caller);
    kv_mutex_lock(&net->lock);
    *poll_at = kv_clock_ns() + KV_POLL_NS;
    return status;
}

static kv_status_t wait_ready_locked(kv_net_t *net, kv_caller_t *caller) KV_REQUIRES(net->lock)
{
    int64_t deadline = kv_caller_deadline(caller);
    int64_t poll_at = kv_clock_ns() + KV_POLL_NS;
    for (;;) {
        int num_missing = 0;
        char missing[MAX_NAMED * (KV_NET_PEER_NAME + 2)];
        KV_TRY(look_locked(net, &num_missing, missing, sizeof missing));
        if (num_missing == 0)
            return KV_OK;
        if (kv_clock_ns() >= deadline) {
            char more[32] = "";
            if (num_missing > MAX_NAMED)
                snprintf(more, sizeof more, " and %d more", num_missing - MAX_NAMED);
            return kv_fail(KV_TIMEOUT, "no connection within %.1f s with %s%s",
                           (double)caller->timeout_ns / 1e9, missing, more);
        }
        KV_TRY(await_change_locked(net, caller, deadline, &poll_at));
    }
}

kv_status_t kv_net_wait_ready(kv_net_t *net, kv_caller_t *caller)
{
    kv_caller_detach(caller);
    kv_mutex_lock(&net->lock);
    kv_status_t status = wait_ready_locked(net, caller);
    kv_mutex_unlock(&net->lock);
    kv_caller_attach(caller);
    return status;
}

static bool is_alone_locked(const kv_net_t *net, int32_t below) KV_REQUIRES(net->lock)
{
    bool alone = true;
    for (int32_t i = 0; i < net->num_peers && i < below && !net->closing; i++)
        alone = alone && (!kv_net_is_ready(&net->peers[i]) || net->peers[i].gone != KV_OK);
    return alone;
}

kv_status_t kv_net_wait_alone(kv_net_t *net, int32_t below, kv_caller_t *caller)
{
    kv_caller_detach(caller);
    kv_mutex_lock(&net->lock);
    int64_t deadline = kv_caller_deadline(caller);
    int64_t poll_at = kv_clock_ns() + KV_POLL_NS;
    kv_status_t status = KV_OK;
    while (status == KV_OK && !is_alone_locked(net, below) && kv_clock_ns() < deadline)
        status = await_change_locked(net, caller, deadline, &poll_at);
    kv_mutex_unlock(&net->lock);
    kv_caller_attach(caller);
    return status;
}

static kv_status_t queue_locked(kv_net_t *net, kv_net_peer_t *peer, kv_net_post_t *post)
    KV_REQUIRES(net->lock)
{
    if (net->closing)
        return kv_net_fail_closed();
    if (peer->gone != KV_OK)
        return kv_net_fail_gone(peer);
    if (!peer->wanted)
        return kv_fail(KV_INVALID, "a message to node %d, which was not connected",
                       (int)post->peer);
    post->message->sequence = net->sequence++;
    KV_TRY(kv_net_queue_push(&peer->queue, post));
    kv_count(KV_COUNT_NET_MESSAGES, 1);
    if (kv_net_may_post(peer))
        kv_net_work_locked(net, peer);
    return KV_OK;
}

kv_status_t kv_net_send(kv_net_t *net, kv_net_message_t *message)
{
    if (!kv_net_is_peer(net, message->peer))
        return kv_fail(KV_INVALID, "a message to node %d, of %d nodes", (int)message->peer,
                       (int)net->num_peers);
    if (message->header_bytes > KV_NET_HEADER_BYTES)
        return kv_fail(KV_INVALID, "a message's header of %u bytes, more than %d",
                       (unsigned)message->header_bytes, KV_NET_HEADER_BYTES);
    if (message->payload == NULL && message->payload_bytes > 0)
        return kv_fail(KV_INVALID, "a message of %zu bytes without a payload",
                       message->payload_bytes);
    message->state = 0;
    kv_net_post_t *post = kv_alloc(sizeof *post);
    KV_TRY_ALLOC(post, "a message");
    post->message = message;
    post->peer = message->peer;
    post->payload = message->payload;
    post->payload_bytes = message->payload_bytes;
    post->own = NULL;
    post->next = NULL;
    kv_net_write_header(net, post);
    kv_mutex_lock(&net->lock);
    kv_status_t status = queue_locked(net, &net->peers[message->peer], post);
    kv_mutex_unlock(&net->lock);
    if (status != KV_OK)
        kv_free(post);
    return status;
}

bool kv_net_cancel(kv_net_t *net, kv_net_message_t *message)
{
    if (!kv_net_is_peer(net, message->peer))
        return false;
    kv_mutex_lock(&net->lock);
    kv_net_post_t *post = kv_net_queue_remove(&net->peers[message->peer].queue, message);
    kv_mutex_unlock(&net->lock);
    kv_free(post);
    if (post != NULL)
        kv_count(KV_COUNT_NET_MESSAGES, -1);
    return post != NULL;
}

void kv_net_drop(kv_net_t *net, int32_t peer, const char *why)
{
    if (!kv_net_is_peer(net, peer))
        return;
    kv_mutex_lock(&net->lock);
    kv_net_gone_locked(net, &net->peers[peer], KV_PEER_LOST, why);
    kv_mutex_unlock(&net->lock);
}

bool kv_net_is_lost(kv_net_t *net, int32_t peer, char *why, size_t bytes)
{
    if (!kv_net_is_peer(net, peer))
        return false;
    kv_mutex_lock(&net->lock);
    bool lost = net->peers[peer].gone == KV_PEER_LOST;
    if (lost && bytes > 0)
        snprintf(why, bytes, "%s", net->peers[peer].why);
    kv_mutex_unlock(&net->lock);
    return lost;
}

void kv_net_counters(const kv_net_t *net, kv_net_counters_t *out)
{
    *out = (kv_net_counters_t){.messages_sent = atomic_load(&net->messages_sent),
                               .bytes_sent = atomic_load(&net->bytes_sent),
                               .messages_received = atomic_load(&net->messages_received),
                               .bytes_received = atomic_load(&net->bytes_received),
                               .sleeps = atomic_load(&net->sleeps)};
}

void kv_net_lanes(kv_net_t *net, int32_t peer, char *text, size_t bytes)
{
    if (bytes == 0)
        return;
    text[0] = '\0';
    if (!kv_net_is_peer(net, peer))
        return;
    kv_mutex_lock(&net->lock);
    snprintf(text, bytes, "%s", net->peers[peer].lanes);
    kv_mutex_unlock(&net->lock);
}
