/* Endpoints of one process, for tests of what stands above.
 *
 * An endpoint is a port in a list of the process; its address is a number that is never used again.
 * A post travels as a parcel: its sender puts it into the inbox of the other port, the receiver's
 * thread copies the payload out of the sender's memory and sends the parcel back, and when it is
 * back the sender's post has ended. A parcel always comes back to the port it came from, which
 * therefore lives as long as one of its parcels is out; every other pointer to a port is cut, under
 * the lock, before that port is freed.
 *
 * Who ends a session returns what it holds of the other's and leaves news for the other, which then
 * does the same. (One that has not connected this side gets no news: it reads what it has got, and
 * returns it.)
 *
 * One lock guards the list and what ports do to each other. With faults (faulty.c) a parcel may be
 * held by its receiver before its header is shown, and once more before its payload is copied.
 */
#include "net/inproc.h"
#include <stdio.h>
#include <string.h>

enum { ADDRESS_BYTES = 8, BATCH = 32 /* parcels opened in one round */ };

#define SLEEP_NS (100 * INT64_C(1000000))

typedef struct port port_t;

typedef struct parcel parcel_t;
struct parcel {
    kv_net_post_t *post;
    port_t *from;
    int64_t due_ns;
    kv_arrival_fate_t fate;
    kv_net_accepted_t *accepted; /* once its header was shown */
    bool lost;                   /* on its way back: it was not received */
    parcel_t *next;
};

typedef struct parcels {
    parcel_t *head, *tail;
} parcels_t;

typedef struct session {
    uint64_t number; /* of the other port */
    port_t *remote;  /* NULL before it is connected and after it has ended */
    bool news;       /* the other side has ended it, and this side has not been told */
    int64_t due_ns;  /* of the last header */
} session_t;

struct port {
    kv_net_t *net;
    kv_faults_t *faults; /* NULL: none */
    uint64_t number;
    kv_cond_t wake;

    /* Under the lock: */
    port_t *next;
    bool woken, has_news;
    session_t *sessions; /* by peer */
    parcels_t inbox;     /* of others */
    parcels_t back;      /* own ones */

    /* The thread's: parcels of others, with their header and then their payload outstanding. */
    parcels_t taken, filling;
};

static kv_mutex_t lock = KV_MUTEX_INIT(KV_RANK_LEAF);
static port_t *ports;
static uint64_t last_number;

/* --------------------------------------------------------------------------------- parcels */

static void append(parcels_t *list, parcel_t *parcel)
{
    parcel->next = NULL;
    if (list->head == NULL)
        list->head = parcel;
    else
        list->tail->next = parcel;
    list->tail = parcel;
}

static void append_all(parcels_t *list, parcels_t more)
{
    if (list->head == NULL)
        *list = more;
    else if (more.head != NULL) {
        list->tail->next = more.head;
        list->tail = more.tail;
    }
}

static parcel_t *pop(parcels_t *list)
{
    parcel_t *parcel = list->head;
    if (parcel != NULL)
        list->head = parcel->next;
    return parcel;
}

static parcels_t take_all(parcels_t *list)
{
    parcels_t all = *list;
    *list = (parcels_t){0};
    return all;
}

/* Those that came from a port. */
static parcels_t take_from(parcels_t *list, uint64_t number)
{
    parcels_t all = take_all(list);
    parcels_t found = {0};
    for (parcel_t *parcel; (parcel = pop(&all)) != NULL;)
        append(parcel->from->number == number ? &found : list, parcel);
    return found;
}

static void wake_locked(port_t *port) KV_REQUIRES(lock)
{
    port->woken = true;
    kv_cond_signal(&port->wake);
}

static void return_locked(parcel_t *parcel, bool lost) KV_REQUIRES(lock)
{
    parcel->lost = lost;
    append(&parcel->from->back, parcel);
    wake_locked(parcel->from);
}

static void return_all_locked(parcels_t list) KV_REQUIRES(lock)
{
    for (parcel_t *parcel; (parcel = pop(&list)) != NULL;)
        return_locked(parcel, true);
}

static void give_back(parcel_t *parcel, bool lost)
{
    kv_mutex_lock(&lock);
    return_locked(parcel, lost);
    kv_mutex_unlock(&lock);
}

/* ------------------------------------------------------------------------- ports, sessions */

kv_status_t kv_inproc_open(kv_net_t *net, kv_faults_t *faults)
{
    port_t *port = kv_calloc(1, sizeof *port);
    session_t *sessions = kv_calloc((size_t)kv_net_num_peers(net), sizeof *sessions);
    if (port == NULL || sessions == NULL) {
        kv_free(port);
        kv_free(sessions);
        kv_faults_free(faults);
        return kv_fail(KV_NO_MEMORY, "no memory for an endpoint of this process");
    }
    port->net = net;
    port->faults = faults;
    port->sessions = sessions;
    kv_cond_init(&port->wake);
    kv_mutex_lock(&lock);
    port->number = ++last_number;
    port->next = ports;
    ports = port;
    kv_mutex_unlock(&lock);

    unsigned char address[ADDRESS_BYTES];
    memcpy(address, &port->number, sizeof address);
    kv_net_set_own(net, port);
    return kv_net_set_address(net, address, sizeof address);
}

static kv_status_t open_plain(kv_net_t *net, const kv_net_config_t *config)
{
    (void)config;
    return kv_inproc_open(net, NULL);
}

kv_status_t kv_inproc_connect(kv_net_t *net, int32_t peer, const void *address, size_t bytes)
{
    port_t *port = kv_net_own(net);
    uint64_t number = 0;
    if (bytes != sizeof number)
        return kv_fail(KV_INVALID, "an address of %zu bytes is none of this process", bytes);
    memcpy(&number, address, sizeof number);

    kv_mutex_lock(&lock);
    port_t *remote = ports;
    while (remote != NULL && remote->number != number)
        remote = remote->next;
    if (remote != NULL) {
        port->sessions[peer].number = number;
        port->sessions[peer].remote = remote;
    }
    kv_mutex_unlock(&lock);
    return remote != NULL ? KV_OK : kv_fail(KV_PEER_LOST, "nobody is at its address");
}

/* Ends the sessions of a port with another, which has left. */
static void cut_locked(port_t *port, const port_t *other) KV_REQUIRES(lock)
{
    for (int32_t i = 0; i < kv_net_num_peers(port->net); i++) {
        session_t *session = &port->sessions[i];
        if (session->remote == other) {
            session->remote = NULL;
            session->news = port->has_news = true;
            wake_locked(port);
        }
    }
}

void kv_inproc_drop(kv_net_t *net, int32_t peer)
{
    port_t *port = kv_net_own(net);
    session_t *session = &port->sessions[peer];
    parcels_t filling = take_from(&port->filling, session->number);
    for (parcel_t *parcel = filling.head; parcel != NULL; parcel = parcel->next)
        kv_net_received(net, parcel->accepted, kv_fail(KV_PEER_LOST, "its connection ended"));

    kv_mutex_lock(&lock);
    return_all_locked(filling);
    return_all_locked(take_from(&port->taken, session->number));
    return_all_locked(take_from(&port->inbox, session->number));
    if (session->remote != NULL) {
        cut_locked(session->remote, port);
        session->remote = NULL;
    }
    session->news = false;
    kv_mutex_unlock(&lock);
}

void kv_inproc_close(kv_net_t *net)
{
    port_t *port = kv_net_own(net);
    kv_mutex_lock(&lock);
    port_t **at = &ports;
    while (*at != port)
        at = &(*at)->next;
    *at = port->next;
    for (port_t *other = ports; other != NULL; other = other->next)
        cut_locked(other, port);
    return_all_locked(port->inbox);
    return_all_locked(port->taken);
    kv_mutex_unlock(&lock);

    kv_faults_free(port->faults);
    kv_cond_fini(&port->wake);
    kv_free(port->sessions);
    kv_free(port);
}

/* --------------------------------------------------------------------------------- sending */

void kv_inproc_post(kv_net_t *net, kv_net_post_t *post)
{
    port_t *port = kv_net_own(net);
    session_t *session = &port->sessions[post->peer];
    kv_send_fate_t fate = KV_SEND_PASSES;
    if (port->faults != NULL && post->message != NULL)
        fate = kv_faults_of_send(port->faults, post->peer);
    if (fate == KV_SEND_FAILS) {
        kv_net_sent(net, post, kv_fail(KV_PEER_LOST, "a send failed"));
        return;
    }
    parcel_t *parcel = kv_calloc(1, sizeof *parcel);
    if (parcel == NULL) {
        kv_net_sent(net, post, kv_fail(KV_NO_MEMORY, "there was no memory to send to it"));
        return;
    }
    parcel->post = post;
    parcel->from = port;
    kv_mutex_lock(&lock);
    port_t *remote = session->remote;
    if (remote == NULL) {
        return_locked(parcel, true);
    } else {
        append(&remote->inbox, parcel);
        wake_locked(remote);
        if (fate == KV_SEND_KILLS) {
            cut_locked(remote, port);
            cut_locked(port, remote);
        }
    }
    kv_mutex_unlock(&lock);
}

static bool end_posts(port_t *port, parcels_t back)
{
    bool any = back.head != NULL;
    for (parcel_t *parcel; (parcel = pop(&back)) != NULL;) {
        kv_net_post_t *post = parcel->post;
        bool lost = parcel->lost;
        kv_free(parcel);
        kv_net_sent(port->net, post, lost ? kv_fail(KV_PEER_LOST, "its connection ended") : KV_OK);
    }
    return any;
}

/* ------------------------------------------------------------------------------- receiving */

static void fill(port_t *port, parcel_t *parcel)
{
    const kv_net_post_t *post = parcel->post;
    kv_net_accepted_t *accepted = parcel->accepted;
    size_t bytes = parcel->fate.is_short ? post->payload_bytes / 2 : post->payload_bytes;
    memcpy(accepted->target, post->payload, bytes);
    kv_status_t status = KV_OK;
    if (parcel->fate.is_short)
        status = kv_fail(KV_PEER_LOST, "only %zu of %zu bytes came", bytes, post->payload_bytes);
    give_back(parcel, false);
    kv_net_received(port->net, accepted, status);
}

static void show(port_t *port, parcel_t *parcel, int64_t now_ns)
{
    const kv_net_post_t *post = parcel->post;
    parcel->accepted =
        kv_net_arrived(port->net, post->header, post->header_bytes, post->payload_bytes);
    if (parcel->accepted == NULL) {
        give_back(parcel, false);
    } else if (parcel->fate.payload_ns > 0) {
        parcel->due_ns = now_ns + parcel->fate.payload_ns;
        append(&port->filling, parcel);
    } else {
        fill(port, parcel);
    }
}

/* A header is due after those of its sender that came before it. */
static void take_in(port_t *port, parcels_t inbox, int64_t now_ns)
{
    for (parcel_t *parcel; (parcel = pop(&inbox)) != NULL;) {
        int32_t peer = kv_net_self(parcel->from->net);
        if (port->faults != NULL && peer < kv_net_num_peers(port->net)) {
            kv_faults_of_arrival(port->faults, peer, parcel->post->message == NULL, &parcel->fate);
            int64_t *due_ns = &port->sessions[peer].due_ns;
            int64_t own_ns = parcel->fate.stalls ? INT64_MAX : now_ns + parcel->fate.header_ns;
            *due_ns = parcel->due_ns = own_ns > *due_ns ? own_ns : *due_ns;
        }
        append(&port->taken, parcel);
    }
}

static bool open_parcels(port_t *port, int64_t now_ns)
{
    int opened = 0;
    parcels_t filling = take_all(&port->filling);
    for (parcel_t *parcel; (parcel = pop(&filling)) != NULL;) {
        if (parcel->due_ns > now_ns) {
            append(&port->filling, parcel);
        } else {
            fill(port, parcel);
            opened++;
        }
    }
    parcels_t taken = take_all(&port->taken);
    for (parcel_t *parcel; opened < BATCH && (parcel = pop(&taken)) != NULL;) {
        if (parcel->due_ns > now_ns) {
            append(&port->taken, parcel);
        } else {
            show(port, parcel, now_ns);
            opened++;
        }
    }
    append_all(&port->taken, taken);
    return opened > 0;
}

/* ------------------------------------------------------------------------------- progress */

/* The first session with news, -1 if there is none. */
static int32_t take_news(port_t *port)
{
    int32_t found = -1;
    kv_mutex_lock(&lock);
    int32_t count = port->has_news ? kv_net_num_peers(port->net) : 0;
    port->has_news = false;
    for (int32_t i = 0; i < count && !port->has_news; i++) {
        if (port->sessions[i].news) {
            port->sessions[i].news = false;
            port->has_news = true; /* there may be more */
            found = i;
        }
    }
    kv_mutex_unlock(&lock);
    return found;
}

static bool tell_news(port_t *port)
{
    bool any = false;
    for (int32_t peer; (peer = take_news(port)) >= 0; any = true)
        kv_net_broken(port->net, peer, "its connection ended");
    return any;
}

static int64_t next_due(const port_t *port, int64_t until_ns)
{
    for (const parcel_t *parcel = port->taken.head; parcel != NULL; parcel = parcel->next)
        until_ns = parcel->due_ns < until_ns ? parcel->due_ns : until_ns;
    for (const parcel_t *parcel = port->filling.head; parcel != NULL; parcel = parcel->next)
        until_ns = parcel->due_ns < until_ns ? parcel->due_ns : until_ns;
    return until_ns;
}

static void sleep_until(port_t *port, int64_t until_ns)
{
    kv_mutex_lock(&lock);
    while (!port->woken && kv_clock_ns() < until_ns)
        kv_cond_wait_until(&port->wake, &lock, until_ns);
    kv_mutex_unlock(&lock);
}

void kv_inproc_progress(kv_net_t *net)
{
    port_t *port = kv_net_own(net);
    kv_mutex_lock(&lock);
    parcels_t inbox = take_all(&port->inbox);
    parcels_t back = take_all(&port->back);
    port->woken = false;
    kv_mutex_unlock(&lock);

    int64_t now_ns = kv_clock_ns();
    take_in(port, inbox, now_ns);
    bool moved = port->faults != NULL && kv_faults_news_first(port->faults) && tell_news(port);
    moved = end_posts(port, back) || moved;
    moved = open_parcels(port, now_ns) || moved;
    moved = tell_news(port) || moved;
    if (moved || !kv_net_may_sleep(net))
        return;
    sleep_until(port, next_due(port, now_ns + SLEEP_NS));
    kv_net_awake(net);
}

void kv_inproc_wake(kv_net_t *net)
{
    kv_mutex_lock(&lock);
    wake_locked(kv_net_own(net));
    kv_mutex_unlock(&lock);
}

void kv_inproc_lanes(kv_net_t *net, int32_t peer, char *text, size_t bytes)
{
    (void)net;
    (void)peer;
    snprintf(text, bytes, "inproc");
}

const kv_transport_t kv_transport_inproc = {
    .name = "inproc",
    .open = open_plain,
    .connect = kv_inproc_connect,
    .post = kv_inproc_post,
    .drop = kv_inproc_drop,
    .progress = kv_inproc_progress,
    .wake = kv_inproc_wake,
    .lanes = kv_inproc_lanes,
    .close = kv_inproc_close,
};
