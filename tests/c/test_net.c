/* The contract of net.h on each transport: what is delivered, in which order, to whom. */
#include "net_nodes.h"
#include <pthread.h>
#include <time.h>

ON_EACH_TRANSPORT(every_size_arrives_whole_and_headers_in_order)
{
    static const size_t sizes[] = {0,       1,       3,       4095,    4096,   4097,
                                   65535,   65536,   262143,  262144,  262145, 1048577,
                                   5000000, 8388607, 8388608, 8388609, 0,      17};
    enum { COUNT = sizeof sizes / sizeof sizes[0] };
    packet_t *packets[2][COUNT];
    node_t *nodes = nodes_start(2, setup);
    for (int i = 0; i < COUNT; i++) {
        for (int from = 0; from < 2; from++) {
            packets[from][i] = packet_new(from, 1 - from, (uint32_t)i, sizes[i], 0);
            send_packet(&nodes[from], packets[from][i]);
        }
    }
    for (int to = 0; to < 2; to++) {
        WAIT_UNTIL(atomic_load(&nodes[to].num_whole) == COUNT);
        end_packets(packets[1 - to], COUNT);
        for (uint32_t i = 0; i < COUNT; i++)
            CHECK_EQ(nodes[to].arrived[i].id, i);
    }
    nodes_end(nodes, 2);
}

ON_EACH_TRANSPORT(a_payload_without_a_target_is_thrown_away)
{
    static const size_t sizes[] = {5000000, 0, 1, 300000, 2000};
    enum { COUNT = sizeof sizes / sizeof sizes[0] };
    packet_t *packets[COUNT];
    node_t *nodes = nodes_start(2, setup);
    nodes[1].discards = true;
    for (int i = 0; i < COUNT; i++) {
        packets[i] = packet_new(0, 1, (uint32_t)i, sizes[i], 0);
        send_packet(&nodes[0], packets[i]);
    }
    end_packets(packets, COUNT);
    WAIT_UNTIL(atomic_load(&nodes[1].num_whole) == COUNT);
    nodes_end(nodes, 2);
}

/* Messages wait until the peer's greeting has come, so here all of them meet in the queue. */
ON_EACH_TRANSPORT(of_those_that_wait_higher_priority_goes_first)
{
    enum { COUNT = 500 };
    packet_t *packets[COUNT];
    node_t nodes[2] = {0};
    uint64_t random = 5;
    for (int i = 0; i < 2; i++)
        CHECK_STATUS(node_open(&nodes[i], i, setup), KV_OK);
    CHECK_STATUS(node_connect(&nodes[0], &nodes[1], 1), KV_OK);
    for (int i = 0; i < COUNT; i++) {
        int32_t priority = (int32_t)test_between(&random, -3, 3);
        packets[i] = packet_new(0, 1, (uint32_t)i, i % 3 == 0 ? 100 : 0, priority);
        send_packet(&nodes[0], packets[i]);
    }
    CHECK_EQ(kv_counter_value(KV_COUNT_NET_MESSAGES), COUNT);
    CHECK_STATUS(node_connect(&nodes[1], &nodes[0], 0), KV_OK);
    WAIT_UNTIL(atomic_load(&nodes[1].num_whole) == COUNT);
    for (int i = 1; i < COUNT; i++) {
        uint32_t a = nodes[1].arrived[i - 1].id;
        uint32_t b = nodes[1].arrived[i].id;
        int32_t of_a = packets[a]->base.priority;
        int32_t of_b = packets[b]->base.priority;
        CHECK(of_a > of_b || (of_a == of_b && a < b));
    }
    end_packets(packets, COUNT);
    for (int i = 0; i < 2; i++)
        node_end(&nodes[i]);
}

static packet_t *urgent;

static bool send_urgent(packet_t *packet)
{
    send_packet(packet->context, urgent);
    return false;
}

ON_EACH_TRANSPORT(an_urgent_message_waits_for_few_bytes_only)
{
    enum { COUNT = 8, BYTES = 4 << 20 };
    packet_t *packets[COUNT];
    node_t nodes[2] = {0};
    for (int i = 0; i < 2; i++)
        CHECK_STATUS(node_open(&nodes[i], i, setup), KV_OK);
    CHECK_STATUS(node_connect(&nodes[0], &nodes[1], 1), KV_OK);
    for (int i = 0; i < COUNT; i++) {
        packets[i] = packet_new(0, 1, (uint32_t)i, BYTES, 0);
        packets[i]->context = &nodes[0];
        packets[i]->then = i == 0 ? send_urgent : NULL;
        send_packet(&nodes[0], packets[i]);
    }
    urgent = packet_new(0, 1, 99, 10, 1);
    CHECK_STATUS(node_connect(&nodes[1], &nodes[0], 0), KV_OK);
    WAIT_UNTIL(atomic_load(&nodes[1].num_whole) == COUNT + 1);
    int at = 0;
    while (at < COUNT && nodes[1].arrived[at].id != 99)
        at++;
    CHECK(at <= 2); /* 8 MiB are under way, less the first that has ended */
    end_packets(packets, COUNT);
    end_packet(urgent);
    for (int i = 0; i < 2; i++)
        node_end(&nodes[i]);
}

/* -------------------------------------------------------------------------- many at a time */

enum { THREADS = 4, EACH = 300, PEERS = 3 };

typedef struct sender {
    node_t *node;
    int index;
    packet_t *packets[EACH];
} sender_t;

static void *send_many(void *context)
{
    sender_t *sender = context;
    uint64_t random = (uint64_t)(sender->node->self * 10 + sender->index);
    for (int i = 0; i < EACH; i++) {
        int32_t self = sender->node->self;
        int32_t peer = (self + 1 + i % (PEERS - 1)) % PEERS;
        size_t bytes = (size_t)test_between(&random, 0, i % 50 == 0 ? 1000000 : 3000);
        uint32_t id = (uint32_t)(sender->index * EACH + i);
        sender->packets[i] = packet_new(self, peer, id, i % 4 == 0 ? 0 : bytes, 0);
        send_packet(sender->node, sender->packets[i]);
    }
    return NULL;
}

ON_EACH_TRANSPORT(each_of_many_threads_keeps_its_order)
{
    static sender_t senders[PEERS * THREADS];
    pthread_t threads[PEERS * THREADS];
    node_t *nodes = nodes_start(PEERS, setup);
    for (int i = 0; i < PEERS * THREADS; i++) {
        senders[i] = (sender_t){.node = &nodes[i % PEERS], .index = i / PEERS};
        pthread_create(&threads[i], NULL, send_many, &senders[i]);
    }
    for (int i = 0; i < PEERS * THREADS; i++)
        pthread_join(threads[i], NULL);
    for (int to = 0; to < PEERS; to++) {
        WAIT_UNTIL(atomic_load(&nodes[to].num_whole) == THREADS * EACH);
        int next[PEERS][THREADS];
        memset(next, -1, sizeof next);
        for (int i = 0; i < THREADS * EACH; i++) {
            const test_header_t *header = &nodes[to].arrived[i];
            int thread = (int)header->id / EACH;
            CHECK((int)header->id > next[header->sender][thread]);
            next[header->sender][thread] = (int)header->id;
        }
    }
    for (int i = 0; i < PEERS * THREADS; i++)
        end_packets(senders[i].packets, EACH);
    for (int i = 0; i < PEERS; i++) {
        kv_net_counters_t counters;
        kv_net_counters(nodes[i].net, &counters);
        CHECK_EQ(counters.messages_sent, THREADS * EACH);
        CHECK_EQ(counters.messages_received, THREADS * EACH);
        uint64_t least = THREADS * EACH * sizeof(test_header_t);
        for (int j = 0; j < THREADS * EACH; j++)
            least += nodes[i].arrived[j].bytes;
        CHECK(counters.bytes_received > least);
    }
    nodes_end(nodes, PEERS);
}

/* ------------------------------------------------------------------------------ in handlers */

enum { ROUNDS = 1000 };

static bool free_self(packet_t *packet)
{
    packet_free(packet);
    return true;
}

static kv_status_t answer(node_t *node, const test_header_t *header)
{
    if (header->id < ROUNDS) {
        packet_t *packet = packet_new(node->self, header->sender, header->id + 1, 40, 0);
        packet->then = free_self;
        send_packet(node, packet);
    }
    return KV_OK;
}

ON_EACH_TRANSPORT(a_handler_may_answer)
{
    node_t *nodes = nodes_start(2, setup);
    nodes[0].on_arrive = nodes[1].on_arrive = answer;
    packet_t *first = packet_new(0, 1, 1, 0, 0);
    send_packet(&nodes[0], first);
    WAIT_UNTIL(atomic_load(&nodes[0].num_whole) + atomic_load(&nodes[1].num_whole) == ROUNDS);
    end_packet(first);
    WAIT_UNTIL(kv_counter_value(KV_COUNT_NET_MESSAGES) == 0);
    nodes_end(nodes, 2);
}

static bool send_next(packet_t *packet)
{
    node_t *node = packet->context;
    test_header_t header;
    memcpy(&header, packet->base.header, sizeof header);
    if (header.id < ROUNDS && atomic_load(&packet->status) == KV_OK) {
        packet_t *next = packet_new(node->self, packet->base.peer, header.id + 1, 0, 0);
        next->then = send_next;
        next->context = node;
        send_packet(node, next);
    }
    packet_free(packet);
    return true;
}

ON_EACH_TRANSPORT(the_end_of_a_message_may_send_the_next)
{
    node_t *nodes = nodes_start(2, setup);
    packet_t *first = packet_new(0, 1, 1, 0, 0);
    first->then = send_next;
    first->context = &nodes[0];
    send_packet(&nodes[0], first);
    WAIT_UNTIL(atomic_load(&nodes[1].num_whole) == ROUNDS);
    for (uint32_t i = 0; i < ROUNDS; i++)
        CHECK_EQ(nodes[1].arrived[i].id, i + 1);
    nodes_end(nodes, 2);
}

/* ------------------------------------------------------------------------------------ idle */

static int64_t processor_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return time.tv_sec * SECOND_NS + time.tv_nsec;
}

ON_EACH_TRANSPORT(an_idle_endpoint_ticks_and_sleeps)
{
    node_t *nodes = nodes_start(2, setup);
    kv_net_counters_t before, after;
    int ticks = atomic_load(&nodes[0].num_ticks);
    WAIT_UNTIL(atomic_load(&nodes[0].num_ticks) > ticks);
    ticks = atomic_load(&nodes[0].num_ticks);
    int64_t start_ns = kv_clock_ns();
    int64_t start_cpu_ns = processor_ns();
    kv_net_counters(nodes[0].net, &before);
    test_caller_t caller = make_caller(SECOND_NS / 2); /* a peer that never comes */
    unsigned char address[KV_NET_ADDRESS_BYTES];
    size_t bytes;
    kv_net_address(nodes[1].net, address, &bytes);
    node_t other = {0};
    CHECK_STATUS(node_open(&other, 2, setup), KV_OK);
    CHECK_STATUS(node_connect(&nodes[0], &other, 2), KV_OK);
    CHECK_STATUS(kv_net_wait_ready(nodes[0].net, &caller.base), KV_TIMEOUT);
    kv_net_counters(nodes[0].net, &after);
    int64_t passed_ns = kv_clock_ns() - start_ns;
    CHECK(atomic_load(&nodes[0].num_ticks) > ticks);
    CHECK(atomic_load(&nodes[0].num_ticks) - ticks <= passed_ns / (SECOND_NS / 10) + 1);
    CHECK(after.sleeps > before.sleeps);
    CHECK(after.sleeps - before.sleeps < 100);
    CHECK(processor_ns() - start_cpu_ns < passed_ns / 2);
    node_end(&other);
    nodes_end(nodes, 2);
}

ON_EACH_TRANSPORT(the_lanes_to_a_peer_have_a_name)
{
    node_t *nodes = nodes_start(2, setup);
    char text[64] = "";
    WAIT_UNTIL((kv_net_lanes(nodes[0].net, 1, text, sizeof text), text[0] != '\0'));
    CHECK(strstr(text, strcmp(setup->transport, "ucx") == 0 ? "tcp" : "inproc") != NULL);
    kv_net_lanes(nodes[0].net, 5, text, sizeof text);
    CHECK_TEXT(text, "");
    nodes_end(nodes, 2);
}

static const test_t tests[] = {
    TEST(every_size_arrives_whole_and_headers_in_order),
    TEST(a_payload_without_a_target_is_thrown_away),
    TEST(of_those_that_wait_higher_priority_goes_first),
    TEST(an_urgent_message_waits_for_few_bytes_only),
    TEST(each_of_many_threads_keeps_its_order),
    TEST(a_handler_may_answer),
    TEST(the_end_of_a_message_may_send_the_next),
    TEST(an_idle_endpoint_ticks_and_sleeps),
    TEST(the_lanes_to_a_peer_have_a_name),
};

TEST_MAIN(tests)
