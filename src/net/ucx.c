/* UCX active messages: one context and one worker an endpoint, one UCX endpoint a peer.
 *
 * Its rules, each with a crash or a hang behind it:
 *   - Only tcp, and cma (one process reads the other's memory) beside it. UCX's shared memory is
 *     refused: a process killed at the wrong moment stops everybody who shares its queue.
 *   - No listener: bytes of a stranger can crash it. Both sides make their endpoint from the worker
 *     address of the other, and an address is taken from the control plane only.
 *   - The error callback only marks. Sessions end at the beginning of `progress`, outside UCX's
 *     callbacks and once each, by a forced close: whoever is gone answers no other. The connection
 *     with a peer that may live is cut first (ucx_sockets.h).
 *   - UCX uses an endpoint's memory again for the next one, so nothing is found by its pointer. The
 *     prefix of a message tells its peer.
 *   - A message that fails breaks its session, since the next one would seem to follow the one
 *     before. The callback of a dead peer may come before the failures of its messages, after them,
 *     or never.
 *   - Memory is free again when UCX has ended the request that uses it, and not before, whatever
 *     became of the peer.
 */
#include "net/internal.h"

#ifdef KV_WITH_UCX

#include "net/ucx_load.h"
#include "net/ucx_sockets.h"
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MESSAGE_ID = 0, /* of our active messages */
    SOCKETS_ID = 1, /* the connections of the sender */
    SLEEP_MS = 100, /* UCX has missed events before: never for long */
    SPIN_NS = 50 * 1000,
    IDLE_WAKES = 8, /* in a row, before naps */
    NAP_MS = 10,
};
#define CUT_NS (INT64_C(200) * 1000 * 1000) /* a cut is seen within microseconds */
#define CLOSE_NS (INT64_C(2) * 1000 * 1000 * 1000)

typedef struct session {
    struct endpoint *endpoint;
    ucp_ep_h ep;          /* NULL: not connected, or closed */
    ucs_status_t failure; /* UCS_OK: none yet */
    bool told;            /* the failure, to net.c */
    bool dropped;
    bool introduced;  /* the peer was told our connections */
    bool cut;         /* its connections */
    int64_t close_ns; /* of a dropped one: when to close it at the latest */
    uint64_t links[KV_UCX_MAX_LINKS];
    size_t num_links;
    int fds[KV_UCX_MAX_LINKS]; /* of these connections */
    size_t num_fds;
} session_t;

typedef struct endpoint {
    kv_net_t *net;
    const kv_ucx_t *ucx;
    ucp_context_h context;
    ucp_worker_h worker;
    int event_fd;
    bool news; /* a session has failed or was dropped */
    bool posted;
    int64_t under_way; /* requests of UCX that will call back */
    int64_t active_ns; /* when something has moved last */
    int64_t spin_ns;   /* how long to look on before sleeping */
    int64_t max_spin_ns;
    bool same_host; /* the peers use the same processors */
    int idle_wakes; /* since something has moved */
    int32_t num_sessions;
    session_t sessions[];
} endpoint_t;

/* -------------------------------------------------------------------------------- messages */

static void fail_session(session_t *session, ucs_status_t why)
{
    if (session->failure == UCS_OK)
        session->failure = why;
    session->endpoint->news = true;
}

static void peer_failed(void *context, ucp_ep_h ep, ucs_status_t why)
{
    (void)ep;
    fail_session(context, why);
}

/* The end of a request with the peer: what it means for ours. */
static kv_status_t ended(endpoint_t *e, int32_t peer, ucs_status_t how)
{
    if (KV_LIKELY(how == UCS_OK))
        return KV_OK;
    session_t *session = &e->sessions[peer];
    fail_session(session, how);
    return kv_fail(KV_PEER_LOST, "the connection to node %d has ended: %s", (int)peer,
                   session->dropped ? "it was dropped" : e->ucx->ucs_status_string(how));
}

static void sent(void *request, ucs_status_t how, void *context)
{
    kv_net_post_t *post = context;
    endpoint_t *e = post->own;
    e->ucx->ucp_request_free(request);
    e->under_way--;
    kv_net_sent(e->net, post, ended(e, post->peer, how));
}

typedef struct introduction {
    endpoint_t *endpoint;
    uint64_t links[KV_UCX_MAX_SOCKETS];
} introduction_t;

static void introduced(void *request, ucs_status_t how, void *context)
{
    (void)how;
    introduction_t *introduction = context;
    endpoint_t *e = introduction->endpoint;
    if (request != NULL)
        e->ucx->ucp_request_free(request);
    e->under_way--;
    kv_free(introduction);
}

/* Tells the peer our connections, once it is known to be connected. Without memory for that it has
 * only the forced close. */
static void introduce(endpoint_t *e, session_t *session)
{
    session->introduced = true;
    introduction_t *introduction = kv_alloc(sizeof(*introduction));
    if (introduction == NULL)
        return;
    introduction->endpoint = e;
    size_t count = kv_ucx_sockets_list(e->event_fd, introduction->links, KV_UCX_MAX_SOCKETS);
    ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                        UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
        .flags = UCP_AM_SEND_FLAG_REPLY | UCP_AM_SEND_FLAG_EAGER,
        .cb.send = introduced,
        .user_data = introduction,
        .memory_type = UCS_MEMORY_TYPE_HOST,
    };
    e->under_way++;
    void *request = e->ucx->ucp_am_send_nbx(session->ep, SOCKETS_ID, NULL, 0, introduction->links,
                                            count * sizeof(introduction->links[0]), &param);
    if (!UCS_PTR_IS_PTR(request))
        introduced(NULL, UCS_OK, introduction);
}

/* A peer's connections: those that this node has too lead to it. */
static ucs_status_t introduction_came(void *context, const void *header, size_t header_bytes,
                                      void *data, size_t bytes, const ucp_am_recv_param_t *info)
{
    (void)header;
    (void)header_bytes;
    endpoint_t *e = context;
    session_t *session = NULL;
    for (int32_t peer = 0; peer < e->num_sessions; peer++) {
        /* The reply endpoint is one that is open now, so here a pointer is good for a key. */
        if (e->sessions[peer].ep != NULL && e->sessions[peer].ep == info->reply_ep)
            session = &e->sessions[peer];
    }
    uint64_t *own = kv_alloc(KV_UCX_MAX_SOCKETS * sizeof(*own));
    bool known = session != NULL && own != NULL &&
                 (info->recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP) != 0 &&
                 (info->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0;
    size_t count = known ? kv_ucx_sockets_list(e->event_fd, own, KV_UCX_MAX_SOCKETS) : 0;
    for (size_t at = 0; known && at + sizeof(uint64_t) <= bytes; at += sizeof(uint64_t)) {
        uint64_t link;
        memcpy(&link, (const unsigned char *)data + at, sizeof(link));
        for (size_t i = 0; i < count && session->num_links < KV_UCX_MAX_LINKS; i++) {
            if (own[i] == link)
                session->links[session->num_links++] = link;
        }
    }
    kv_free(own);
    if (known)
        session->num_fds = kv_ucx_sockets_find(e->event_fd, session->links, session->num_links,
                                               session->fds, KV_UCX_MAX_LINKS);
    return UCS_OK;
}

static void transport_post(kv_net_t *net, kv_net_post_t *post)
{
    endpoint_t *e = kv_net_own(net);
    session_t *session = &e->sessions[post->peer];
    if (session->ep == NULL || session->dropped) {
        kv_net_sent(net, post, ended(e, post->peer, UCS_ERR_NOT_CONNECTED));
        return;
    }
    if (post->message != NULL && !session->introduced)
        introduce(e, session);
    post->own = e;
    e->posted = true;
    e->under_way++;
    ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                        UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
        /* What comes for an endpoint that was closed meanwhile is thrown away by UCX. */
        .flags = UCP_AM_SEND_FLAG_REPLY,
        .cb.send = sent,
        .user_data = post,
        .memory_type = UCS_MEMORY_TYPE_HOST,
    };
    void *request =
        e->ucx->ucp_am_send_nbx(session->ep, MESSAGE_ID, post->header, post->header_bytes,
                                post->payload, post->payload_bytes, &param);
    if (UCS_PTR_IS_PTR(request))
        return;
    e->under_way--;
    kv_net_sent(net, post, ended(e, post->peer, UCS_PTR_RAW_STATUS(request)));
}

/* A payload that cma has read out of the sender's memory is good only if the sender had not given
 * up by then: a process that stood still and goes on may read what has been put there since. A
 * sender cuts the connection before its memory is free, so one that stands after the read says so.
 */
static void received(void *request, ucs_status_t how, size_t bytes, void *context)
{
    kv_net_accepted_t *accepted = context;
    endpoint_t *e = accepted->own;
    e->ucx->ucp_request_free(request);
    e->under_way--;
    if (how == UCS_OK && bytes != accepted->bytes)
        how = UCS_ERR_MESSAGE_TRUNCATED;
    const session_t *session = &e->sessions[accepted->peer];
    if (how == UCS_OK &&
        (session->failure != UCS_OK || kv_ucx_sockets_ended(session->fds, session->num_fds)))
        how = UCS_ERR_CONNECTION_RESET;
    kv_net_received(e->net, accepted, ended(e, accepted->peer, how));
}

/* Small payloads are in UCX's memory already. Of a large one the sender has told the size only; it
 * comes straight into its target. */
static ucs_status_t came(void *context, const void *header, size_t header_bytes, void *data,
                         size_t bytes, const ucp_am_recv_param_t *info)
{
    endpoint_t *e = context;
    kv_net_accepted_t *accepted = kv_net_arrived(e->net, header, header_bytes, bytes);
    if (accepted == NULL)
        return UCS_OK;
    if ((info->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0 || accepted->target == NULL) {
        if (accepted->target != NULL && bytes > 0)
            memcpy(accepted->target, data, bytes);
        kv_net_received(e->net, accepted, KV_OK);
        return UCS_OK;
    }
    accepted->own = e;
    e->under_way++;
    ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                        UCP_OP_ATTR_FIELD_MEMORY_TYPE | UCP_OP_ATTR_FLAG_NO_IMM_CMPL,
        .cb.recv_am = received,
        .user_data = accepted,
        .memory_type = UCS_MEMORY_TYPE_HOST,
    };
    void *request = e->ucx->ucp_am_recv_data_nbx(e->worker, data, accepted->target, bytes, &param);
    if (UCS_PTR_IS_ERR(request)) {
        e->under_way--;
        kv_net_received(e->net, accepted, ended(e, accepted->peer, UCS_PTR_STATUS(request)));
    }
    return UCS_OK;
}

/* -------------------------------------------------------------------------------- sessions */

static void transport_lanes(kv_net_t *net, int32_t peer, char *out, size_t bytes)
{
    const endpoint_t *e = kv_net_own(net);
    out[0] = '\0';
    if (e->sessions[peer].ep == NULL)
        return;
    char *text = NULL;
    size_t text_bytes = 0;
    FILE *stream = open_memstream(&text, &text_bytes);
    if (stream == NULL)
        return;
    e->ucx->ucp_ep_print_info(e->sessions[peer].ep, stream);
    if (fclose(stream) == 0)
        kv_ucx_names(text, "lane[", ":", out, bytes);
    free(text);
}

static kv_status_t transport_connect(kv_net_t *net, int32_t peer, const void *address, size_t bytes)
{
    endpoint_t *e = kv_net_own(net);
    session_t *session = &e->sessions[peer];
    const ucp_address_t *own = kv_ucx_check_address(address, bytes);
    if (own == NULL)
        return kv_fail(KV_INVALID, "what came as the address of node %d is none", (int)peer);
    ucp_ep_params_t params = {
        .field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLER |
                      UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE,
        .address = own,
        .err_mode = UCP_ERR_HANDLING_MODE_PEER,
        .err_handler = {.cb = peer_failed, .arg = session},
    };
    ucs_status_t made = e->ucx->ucp_ep_create(e->worker, &params, &session->ep);
    if (made != UCS_OK) {
        session->ep = NULL;
        return kv_fail(KV_PEER_LOST, "UCX finds no way to node %d: %s", (int)peer,
                       e->ucx->ucs_status_string(made));
    }
    return KV_OK;
}

static void transport_drop(kv_net_t *net, int32_t peer)
{
    endpoint_t *e = kv_net_own(net);
    e->sessions[peer].dropped = true;
    e->news = true;
}

static void closed(void *request, ucs_status_t how, void *context)
{
    (void)how;
    endpoint_t *e = context;
    e->ucx->ucp_request_free(request);
    e->under_way--;
}

static void close_session(endpoint_t *e, session_t *session)
{
    ucp_request_param_t param = {
        .op_attr_mask =
            UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS,
        .flags = UCP_EP_CLOSE_FLAG_FORCE,
        .cb.send = closed,
        .user_data = e,
    };
    ucp_ep_h ep = session->ep;
    session->ep = NULL;
    e->under_way++;
    if (!UCS_PTR_IS_PTR(e->ucx->ucp_ep_close_nbx(ep, &param)))
        e->under_way--;
}

/* Gives whether the session is closed. */
static bool end_session(endpoint_t *e, session_t *session)
{
    if (session->failure == UCS_OK && !session->cut) {
        session->cut = true;
        size_t found = kv_ucx_sockets_cut(e->event_fd, session->links, session->num_links);
        session->close_ns = kv_clock_ns() + (found > 0 ? CUT_NS : 0);
    }
    if (session->failure == UCS_OK && kv_clock_ns() < session->close_ns)
        return false;
    close_session(e, session);
    return true;
}

/* Tells what has failed, which may drop more, and ends what was dropped. */
static void settle(endpoint_t *e)
{
    bool waits = false;
    while (e->news) {
        e->news = false;
        waits = false;
        for (int32_t peer = 0; peer < e->num_sessions; peer++) {
            session_t *session = &e->sessions[peer];
            if (session->failure != UCS_OK && !session->told && !session->dropped) {
                session->told = true;
                kv_net_broken(e->net, peer, e->ucx->ucs_status_string(session->failure));
            }
            if (session->dropped && session->ep != NULL)
                waits |= !end_session(e, session);
        }
    }
    e->news = waits;
}

/* -------------------------------------------------------------------------------- progress */

/* Looking on for a moment saves the sleep and the waking, two thirds of a short round trip. Other
 * threads that could run come first: the answer may be theirs. It is done while it pays: after a
 * sleep that it would have saved, until it has failed a few times, and not for the end of a large
 * transfer, where the other side needs the same processors for longer. */
static bool look_on(endpoint_t *e, bool active)
{
    int64_t now = kv_clock_ns();
    if (active) {
        if (now - e->active_ns < 2 * SPIN_NS)
            e->spin_ns = e->max_spin_ns;
        e->active_ns = now;
        e->idle_wakes = 0;
        return true;
    }
    bool transfers = e->under_way > 0 && e->same_host;
    if (!transfers && now - e->active_ns < e->spin_ns) {
        (void)sched_yield();
        return true;
    }
    e->spin_ns /= 2;
    return false;
}

/* While a connection waits for the other side's consent UCX is woken all the time for nothing. */
static void sleep_for_event(endpoint_t *e, int limit_ms)
{
    struct pollfd event = {.fd = e->event_fd, .events = POLLIN};
    int nap_ms = e->idle_wakes - IDLE_WAKES;
    if (nap_ms > 0)
        (void)poll(NULL, 0, nap_ms < NAP_MS ? nap_ms : NAP_MS);
    if (poll(&event, 1, limit_ms) > 0)
        e->idle_wakes++;
}

static void transport_progress(kv_net_t *net)
{
    endpoint_t *e = kv_net_own(net);
    settle(e);
    bool active = e->ucx->ucp_worker_progress(e->worker) != 0 || e->posted || e->news;
    e->posted = false;
    if (look_on(e, active))
        return;
    ucs_status_t armed = e->ucx->ucp_worker_arm(e->worker);
    if (armed == UCS_ERR_BUSY || !kv_net_may_sleep(net))
        return;
    sleep_for_event(e, armed == UCS_OK ? SLEEP_MS : 1);
    kv_net_awake(net);
}

static void transport_wake(kv_net_t *net)
{
    const endpoint_t *e = kv_net_own(net);
    (void)e->ucx->ucp_worker_signal(e->worker);
}

/* -------------------------------------------------------------------------- open and close */

static kv_status_t make_worker(endpoint_t *e)
{
    ucp_worker_params_t params = {.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
                                  .thread_mode = UCS_THREAD_MODE_SINGLE};
    ucs_status_t made = e->ucx->ucp_worker_create(e->context, &params, &e->worker);
    if (made != UCS_OK)
        return kv_fail(KV_DEVICE, "UCX does not start: %s", e->ucx->ucs_status_string(made));
    ucp_am_handler_param_t handlers[] = {{.id = MESSAGE_ID, .cb = came},
                                         {.id = SOCKETS_ID, .cb = introduction_came}};
    for (size_t i = 0; i < sizeof(handlers) / sizeof(handlers[0]) && made == UCS_OK; i++) {
        handlers[i].field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB |
                                 UCP_AM_HANDLER_PARAM_FIELD_ARG;
        handlers[i].arg = e;
        made = e->ucx->ucp_worker_set_am_recv_handler(e->worker, &handlers[i]);
    }
    if (made == UCS_OK)
        made = e->ucx->ucp_worker_get_efd(e->worker, &e->event_fd);
    if (made != UCS_OK)
        return kv_fail(KV_DEVICE, "UCX does not start: %s", e->ucx->ucs_status_string(made));
    unsigned char address[KV_NET_ADDRESS_BYTES];
    size_t bytes = 0;
    KV_TRY(kv_ucx_address(e->ucx, e->worker, address, &bytes));
    return kv_net_set_address(e->net, address, bytes);
}

static void free_endpoint(endpoint_t *e)
{
    if (e->worker != NULL)
        e->ucx->ucp_worker_destroy(e->worker);
    if (e->context != NULL)
        e->ucx->ucp_cleanup(e->context);
    kv_free(e);
}

static kv_status_t transport_open(kv_net_t *net, const kv_net_config_t *config)
{
    const kv_ucx_t *ucx = NULL;
    KV_TRY(kv_ucx_load(config->library, &ucx));
    size_t sessions = (size_t)config->num_peers;
    endpoint_t *e = kv_calloc(1, sizeof(*e) + sessions * sizeof(e->sessions[0]));
    KV_TRY_ALLOC(e, "an endpoint");
    e->net = net;
    e->ucx = ucx;
    e->num_sessions = config->num_peers;
    /* Who would answer needs the only processor. */
    e->max_spin_ns = kv_processor_count() > 1 ? SPIN_NS : 0;
    e->spin_ns = e->max_spin_ns;
    e->same_host = config->same_host_copies;
    for (int32_t peer = 0; peer < config->num_peers; peer++)
        e->sessions[peer].endpoint = e;

    kv_ucx_signals_t signals;
    kv_ucx_signals_keep(&signals);
    kv_status_t status = kv_ucx_context(ucx, config, &e->context);
    if (status == KV_OK)
        status = make_worker(e);
    kv_ucx_signals_restore(&signals);
    if (status != KV_OK) {
        free_endpoint(e);
        return status;
    }
    kv_net_set_own(net, e);
    return KV_OK;
}

/* A worker with a request that does not end is left behind: to destroy it may crash. */
static void transport_close(kv_net_t *net)
{
    endpoint_t *e = kv_net_own(net);
    for (int32_t peer = 0; peer < e->num_sessions; peer++)
        transport_drop(net, peer);
    int64_t until = kv_clock_ns() + CLOSE_NS;
    do
        settle(e);
    while ((e->ucx->ucp_worker_progress(e->worker) != 0 || e->news || e->under_way > 0) &&
           kv_clock_ns() < until);
    kv_net_set_own(net, NULL);
    if (e->under_way == 0)
        free_endpoint(e);
}

#else

static kv_status_t transport_open(kv_net_t *net, const kv_net_config_t *config)
{
    (void)net;
    (void)config;
    return kv_fail(KV_NOT_BUILT,
                   "this build has no UCX, which carries values between processes: pip install "
                   "'mlkvstore[dist]', then build mlkvstore again (with KVSTORE_UCX=system where "
                   "the system's UCX is to be used)");
}

#endif

const kv_transport_t kv_transport_ucx = {
    .name = "ucx",
    .open = transport_open,
#ifdef KV_WITH_UCX
    .connect = transport_connect,
    .post = transport_post,
    .drop = transport_drop,
    .progress = transport_progress,
    .wake = transport_wake,
    .lanes = transport_lanes,
    .close = transport_close,
#endif
};
