/* The contract of net.h, on each transport. */
#include "net_nodes.h"
#include <pthread.h>

static const char *const transport_names[] = {"inproc", "faulty"};
enum { NUM_TRANSPORTS = sizeof transport_names / sizeof transport_names[0] };

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
            claim##_on(&setup);                                                                    \
        }                                                                                          \
    }                                                                                              \
    static void claim##_on(const setup_t *setup)

static void send(node_t *from, packet_t *packet)
{
    CHECK_STATUS(kv_net_send(from->net, &packet->base), KV_OK);
}

static void end_packets(packet_t **packets, int count)
{
    for (int i = 0; i < count; i++) {
        WAIT_UNTIL(atomic_load(&packets[i]->num_ends) > 0);
        CHECK_EQ(atomic_load(&packets[i]->num_ends), 1);
        packet_free(packets[i]);
    }
}

/* ------------------------------------------------------------------------- what is delivered */

ON_EACH_TRANSPORT(every_size_arrives_whole_and_headers_in_order)
{
    static const size_t sizes[] = {0,       1,       3,       4095,    4096,   4097,
                                   65535,   65536,   262143,  262144,  262145, 1048577,
                                   5000000, 8388607, 8388608, 8388609, 0,      17};
    enum { COUNT = sizeof sizes / sizeof sizes[0] };
    packet_t *packets[COUNT];
    node_t *nodes = nodes_start(2, setup);
    for (int i = 0; i < COUNT; i++) {
        packets[i] = packet_new(0, 1, (uint32_t)i, sizes[i], 0);
        send(&nodes[0], packets[i]);
    }
    WAIT_UNTIL(atomic_load(&nodes[1].num_whole) == COUNT);
    end_packets(packets, COUNT);
    for (uint32_t i = 0; i < COUNT; i++)
        CHECK_EQ(nodes[1].arrived[i].id, i);
    nodes_end(nodes, 2);
}

static const test_t tests[] = {
    TEST(every_size_arrives_whole_and_headers_in_order),
};

TEST_MAIN(tests)
