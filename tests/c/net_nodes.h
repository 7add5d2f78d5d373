/* What the tests of net share: nodes that are connected with each other, messages that count their
 * ends, and a receiver that checks what comes.
 *
 * A header of a test message is (sender, id, size); its payload is made from these three, so that
 * the receiver can check every byte. */
#ifndef KV_TESTS_C_NET_NODES_H
#define KV_TESTS_C_NET_NODES_H

#include "net/net.h"
#include "test.h"
#include <sched.h>
#include <stdlib.h>

#define SECOND_NS (1000 * INT64_C(1000000))

enum { MAX_NODES = 8, MAX_ARRIVED = 1 << 16 };

static _Atomic bool gave_up;

/* A wait that takes so long that something hangs fails, and all later ones then do at once. */
#define WAIT_UNTIL(condition)                                                                      \
    do {                                                                                           \
        int64_t wait_end = kv_clock_ns() + 60 * SECOND_NS;                                         \
        while (!(condition)) {                                                                     \
            if (kv_clock_ns() > wait_end)                                                          \
                atomic_store(&gave_up, true);                                                      \
            if (!CHECK(!atomic_load(&gave_up)))                                                    \
                break;                                                                             \
            sched_yield();                                                                         \
        }                                                                                          \
    } while (0)

/* -------------------------------------------------------------------------------- callers */

typedef struct test_caller {
    kv_caller_t base;
    int num_polls;
    kv_status_t poll_status;
} test_caller_t;

static inline void caller_nothing(kv_caller_t *caller)
{
    (void)caller;
}

static inline kv_status_t caller_poll(kv_caller_t *base)
{
    test_caller_t *caller = (test_caller_t *)base;
    CHECK(base->detached);
    caller->num_polls++;
    return caller->poll_status;
}

static inline test_caller_t make_caller(int64_t timeout_ns)
{
    return (test_caller_t){
        .base = {caller_nothing, caller_nothing, caller_poll, .timeout_ns = timeout_ns}};
}

/* ------------------------------------------------------------------------------- messages */

typedef struct test_header {
    int32_t sender;
    uint32_t id;
    uint64_t bytes;
} test_header_t;

typedef struct packet {
    kv_net_message_t base; /* first */
    unsigned char *data;   /* owned */
    _Atomic int num_ends;
    _Atomic int status;
    bool (*then)(struct packet *packet); /* in `done`; true: it has freed the packet */
    void *context;
} packet_t;

static inline unsigned char byte_of(const test_header_t *header, size_t index)
{
    return (unsigned char)(index * 31 + header->id * 7 + (uint32_t)header->sender);
}

static inline void packet_done(kv_net_message_t *message, kv_status_t status)
{
    packet_t *packet = (packet_t *)message;
    if (status != KV_OK)
        CHECK(status == KV_PEER_LOST || status == KV_CLOSED);
    atomic_store(&packet->status, (int)status);
    if (packet->data != NULL) /* the memory is ours again */
        memset(packet->data, 0xee,
               packet->base.payload_bytes < 64 ? packet->base.payload_bytes : 64);
    if (packet->then == NULL || !packet->then(packet))
        atomic_fetch_add(&packet->num_ends, 1);
}

static inline packet_t *packet_new(int32_t sender, int32_t peer, uint32_t id, size_t bytes,
                                   int32_t priority)
{
    packet_t *packet = calloc(1, sizeof *packet);
    test_header_t header = {.sender = sender, .id = id, .bytes = bytes};
    packet->base = (kv_net_message_t){.peer = peer,
                                      .priority = priority,
                                      .header_bytes = sizeof header,
                                      .payload_bytes = bytes,
                                      .done = packet_done};
    memcpy(packet->base.header, &header, sizeof header);
    if (bytes > 0) {
        packet->data = malloc(bytes);
        for (size_t i = 0; i < bytes; i++)
            packet->data[i] = byte_of(&header, i);
        packet->base.payload = packet->data;
    }
    return packet;
}

static inline void packet_free(packet_t *packet)
{
    free(packet->data);
    free(packet);
}

/* ---------------------------------------------------------------------------------- nodes */

typedef struct node node_t;

typedef struct incoming {
    node_t *node;
    test_header_t header;
    unsigned char data[];
} incoming_t;

struct node {
    kv_net_t *net;
    int32_t self;
    test_header_t *arrived; /* headers in their order */
    _Atomic int num_arrived;
    _Atomic int num_whole, num_cut;        /* payloads that ended well and not */
    _Atomic int num_whole_from[MAX_NODES]; /* with a target */
    _Atomic int num_ticks;
    _Atomic int num_lost[MAX_NODES];
    char why[MAX_NODES][KV_MESSAGE_BYTES];
    _Atomic bool is_told_lost[MAX_NODES];
    bool discards; /* payloads */
    _Atomic bool refuses;
    kv_status_t (*on_arrive)(node_t *node, const test_header_t *header);
    void (*on_lost)(node_t *node, int32_t peer);
    void (*on_tick)(node_t *node);
    void *context;
};

static inline void incoming_done(void *context, kv_status_t status)
{
    incoming_t *incoming = context;
    node_t *node = incoming->node;
    if (status == KV_OK) {
        size_t wrong = 0;
        for (size_t i = 0; i < incoming->header.bytes; i++)
            wrong += incoming->data[i] != byte_of(&incoming->header, i);
        CHECK_EQ(wrong, 0);
        CHECK(!atomic_load(&node->is_told_lost[incoming->header.sender]));
        atomic_fetch_add(&node->num_whole_from[incoming->header.sender], 1);
        atomic_fetch_add(&node->num_whole, 1);
    } else {
        CHECK(status == KV_PEER_LOST || status == KV_CLOSED);
        atomic_fetch_add(&node->num_cut, 1);
    }
    free(incoming);
}

static inline void discarded(void *context, kv_status_t status)
{
    CHECK_STATUS(status, KV_OK);
    atomic_fetch_add(&((node_t *)context)->num_whole, 1);
}

static inline kv_status_t node_arrive(void *context, kv_net_arrival_t *arrival)
{
    node_t *node = context;
    test_header_t header;
    if (atomic_load(&node->refuses))
        return kv_fail(KV_INVALID, "not this one");
    if (!CHECK_EQ(arrival->header_bytes, sizeof header))
        return kv_fail(KV_INVALID, "a header of another test");
    memcpy(&header, arrival->header, sizeof header);
    CHECK_EQ(header.bytes, arrival->payload_bytes);
    CHECK_EQ(header.sender, arrival->peer);
    CHECK(!atomic_load(&node->is_told_lost[arrival->peer]));
    int index = atomic_load(&node->num_arrived);
    if (index < MAX_ARRIVED)
        node->arrived[index] = header;
    atomic_store(&node->num_arrived, index + 1);
    if (node->on_arrive != NULL)
        KV_TRY(node->on_arrive(node, &header));
    if (node->discards) {
        arrival->done = discarded;
        arrival->context = node;
        return KV_OK;
    }
    incoming_t *incoming = malloc(sizeof *incoming + header.bytes);
    incoming->node = node;
    incoming->header = header;
    arrival->target = incoming->data;
    arrival->done = incoming_done;
    arrival->context = incoming;
    return KV_OK;
}

static inline void node_lost(void *context, int32_t peer, const char *why)
{
    node_t *node = context;
    char text[KV_MESSAGE_BYTES];
    CHECK(kv_net_is_lost(node->net, peer, text, sizeof text));
    CHECK_TEXT(text, why);
    snprintf(node->why[peer], sizeof node->why[peer], "%s", why);
    atomic_store(&node->is_told_lost[peer], true);
    atomic_fetch_add(&node->num_lost[peer], 1);
    if (node->on_lost != NULL)
        node->on_lost(node, peer);
}

static inline void node_tick(void *context)
{
    node_t *node = context;
    atomic_fetch_add(&node->num_ticks, 1);
    if (node->on_tick != NULL)
        node->on_tick(node);
}

typedef struct setup {
    const char *transport;
    const char *faults;
    uint64_t seed;
    unsigned char session; /* its first byte */
    int32_t num_peers;     /* 0: MAX_NODES */
} setup_t;

static inline kv_status_t node_open(node_t *node, int32_t self, const setup_t *setup)
{
    kv_net_config_t config = {.transport = setup->transport,
                              .self = self,
                              .num_peers = setup->num_peers > 0 ? setup->num_peers : MAX_NODES,
                              .session = {setup->session, 1, 2, 3},
                              .library = getenv("KVSTORE_TEST_UCX_LIBRARY"),
                              .interface = "lo",
                              .seed = setup->seed * 100 + (uint64_t)self,
                              .faults = setup->faults};
    kv_net_handlers_t handlers = {
        .context = node, .arrive = node_arrive, .lost = node_lost, .tick = node_tick};
    node->self = self;
    node->arrived = calloc(MAX_ARRIVED, sizeof *node->arrived);
    kv_status_t status = kv_net_open(&config, &handlers, &node->net);
    if (status != KV_OK) {
        free(node->arrived);
        node->arrived = NULL;
    }
    return status;
}

static inline kv_status_t node_connect(node_t *node, const node_t *other, int32_t number)
{
    unsigned char address[KV_NET_ADDRESS_BYTES];
    size_t bytes = 0;
    char name[KV_NET_PEER_NAME];
    kv_net_address(other->net, address, &bytes);
    snprintf(name, sizeof name, "node %d", (int)number);
    return kv_net_connect(node->net, number, name, address, bytes);
}

static inline kv_status_t node_wait(node_t *node)
{
    test_caller_t caller = make_caller(30 * SECOND_NS);
    return kv_net_wait_ready(node->net, &caller.base);
}

static inline void node_end(node_t *node)
{
    if (node->net == NULL)
        return;
    kv_net_close(node->net);
    kv_net_free(node->net);
    node->net = NULL;
    free(node->arrived);
    node->arrived = NULL;
}

/* Nodes 0..count-1, each connected with each. */
static inline node_t *nodes_start(int count, const setup_t *setup)
{
    node_t *nodes = calloc((size_t)count, sizeof *nodes);
    for (int i = 0; i < count; i++)
        CHECK_STATUS(node_open(&nodes[i], i, setup), KV_OK);
    for (int i = 0; i < count; i++)
        for (int j = 0; j < count; j++)
            if (i != j)
                CHECK_STATUS(node_connect(&nodes[i], &nodes[j], j), KV_OK);
    for (int i = 0; i < count; i++)
        CHECK_STATUS(node_wait(&nodes[i]), KV_OK);
    return nodes;
}

static inline void nodes_end(node_t *nodes, int count)
{
    for (int i = 0; i < count; i++)
        node_end(&nodes[i]);
    free(nodes);
}

/* ----------------------------------------------------------------------- on each transport */

static const char *const transport_names[] = {"inproc", "faulty", "ucx"};
enum { NUM_TRANSPORTS = sizeof transport_names / sizeof transport_names[0] };

/* UCX is not in every build; what it says then is shown once. */
static inline bool is_available(const setup_t *setup)
{
    static bool shown;
    node_t node = {0};
    kv_status_t status = node_open(&node, 0, setup);
    if (status == KV_NOT_BUILT && !shown) {
        printf("# not on %s: %s\n", setup->transport, kv_status_message(status));
        shown = true;
    } else if (status != KV_NOT_BUILT) {
        CHECK_STATUS(status, KV_OK);
    }
    node_end(&node);
    return status == KV_OK;
}

/* A claim about all transports, as one test. */
#define ON_EACH_TRANSPORT(claim)                                                                   \
    static void claim##_on(const setup_t *setup);                                                  \
    static void claim(void)                                                                        \
    {                                                                                              \
        for (int i = 0; i < NUM_TRANSPORTS; i++) {                                                 \
            setup_t setup = {.transport = transport_names[i],                                      \
                             .faults = "delay=2,reorder",                                          \
                             .seed = 7,                                                            \
                             .session = 9};                                                        \
            if (is_available(&setup))                                                              \
                claim##_on(&setup);                                                                \
        }                                                                                          \
    }                                                                                              \
    static void claim##_on(const setup_t *setup)

static inline void send_packet(node_t *from, packet_t *packet)
{
    CHECK_STATUS(kv_net_send(from->net, &packet->base), KV_OK);
}

static inline void end_packet(packet_t *packet)
{
    WAIT_UNTIL(atomic_load(&packet->num_ends) > 0);
    CHECK_EQ(atomic_load(&packet->num_ends), 1);
    packet_free(packet);
}

static inline void end_packets(packet_t **packets, int count)
{
    for (int i = 0; i < count; i++)
        end_packet(packets[i]);
}

#endif
