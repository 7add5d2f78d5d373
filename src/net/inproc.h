/* What inproc.c and faulty.c share: one transport, and somebody who decides about its faults. All
 * is called by the thread of one endpoint. */
#ifndef KV_NET_INPROC_H
#define KV_NET_INPROC_H

#include "net/internal.h"

typedef struct kv_faults kv_faults_t;

typedef enum kv_send_fate {
    KV_SEND_PASSES,
    KV_SEND_FAILS, /* ends with an error and is not delivered */
    KV_SEND_KILLS, /* is the last before the session breaks on both sides */
} kv_send_fate_t;

typedef struct kv_arrival_fate {
    int64_t header_ns, payload_ns; /* how long they are held back */
    bool stalls;                   /* is held back for ever, and all that follow */
    bool is_short;                 /* half of the payload comes, then the session breaks */
} kv_arrival_fate_t;

/* Of the next message to or from a peer; a greeting is no message and only delayed. */
kv_send_fate_t kv_faults_of_send(kv_faults_t *faults, int32_t peer);
void kv_faults_of_arrival(kv_faults_t *faults, int32_t peer, bool greeting, kv_arrival_fate_t *out);
/* Whether a broken session is told before the ends of its sends. */
bool kv_faults_news_first(kv_faults_t *faults);
void kv_faults_free(kv_faults_t *faults);

/* Takes the faults, also when it fails; NULL: none. */
KV_MUST_CHECK kv_status_t kv_inproc_open(kv_net_t *net, kv_faults_t *faults);
kv_status_t kv_inproc_connect(kv_net_t *net, int32_t peer, const void *address, size_t bytes);
void kv_inproc_post(kv_net_t *net, kv_net_post_t *post);
void kv_inproc_drop(kv_net_t *net, int32_t peer);
void kv_inproc_progress(kv_net_t *net);
void kv_inproc_wake(kv_net_t *net);
void kv_inproc_lanes(kv_net_t *net, int32_t peer, char *text, size_t bytes);
void kv_inproc_close(kv_net_t *net);

#endif
