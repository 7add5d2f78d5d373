/* What must not hurt an endpoint: arguments that are wrong, headers that are malformed, memory that
 * is missing. */
#include "net/internal.h"
#include "net_nodes.h"

/* ------------------------------------------------------------------------------- arguments */

static void an_endpoint_needs_a_transport_and_a_number(void)
{
    node_t node = {0};
    setup_t setup = {.transport = "carrier pigeon"};
    CHECK_STATUS(node_open(&node, 0, &setup), KV_INVALID);
    CHECK(strstr(kv_status_message(KV_INVALID), "'carrier pigeon'") != NULL);
    setup.transport = "inproc";
    CHECK_STATUS(node_open(&node, -1, &setup), KV_INVALID);
    CHECK_STATUS(node_open(&node, MAX_NODES, &setup), KV_INVALID);
    CHECK_TEXT(kv_status_message(KV_INVALID), "node 8 is not one of 8 nodes");
    kv_fault_set("thread.start", 1);
    CHECK_STATUS(node_open(&node, 0, &setup), KV_NO_MEMORY);
    kv_fault_set("thread.start", 0);
    kv_net_free(NULL);
}

static void wrong_arguments_are_refused(void)
{
    setup_t setup = {.transport = "inproc"};
    node_t *nodes = nodes_start(2, &setup);
    kv_net_t *net = nodes[0].net;
    unsigned char address[KV_NET_ADDRESS_BYTES + 1] = {1};
    CHECK_STATUS(kv_net_connect(net, -1, "x", address, 8), KV_INVALID);
    CHECK_STATUS(kv_net_connect(net, MAX_NODES, "x", address, 8), KV_INVALID);
    CHECK_STATUS(kv_net_connect(net, 0, "x", address, 8), KV_INVALID); /* itself */
    CHECK_STATUS(kv_net_connect(net, 2, "x", address, 0), KV_INVALID);
    CHECK_STATUS(kv_net_connect(net, 2, "x", address, sizeof address), KV_INVALID);
    CHECK_STATUS(kv_net_connect(net, 1, "x", address, 8), KV_INVALID);
    CHECK_TEXT(kv_status_message(KV_INVALID), "node 1 is connected already");
    CHECK_STATUS(kv_net_connect(net, 2, "x", address, 3), KV_OK); /* told by `lost` */
    WAIT_UNTIL(atomic_load(&nodes[0].num_lost[2]) == 1);
    CHECK_TEXT(nodes[0].why[2], "an address of 3 bytes is none of this process");

    packet_t *packet = packet_new(0, 0, 1, 10, 0);
    CHECK_STATUS(kv_net_send(net, &packet->base), KV_INVALID); /* to itself */
    packet->base.peer = MAX_NODES;
    CHECK_STATUS(kv_net_send(net, &packet->base), KV_INVALID);
    CHECK(!kv_net_cancel(net, &packet->base));
    packet->base.peer = 3;
    CHECK_STATUS(kv_net_send(net, &packet->base), KV_INVALID);
    CHECK_TEXT(kv_status_message(KV_INVALID), "a message to node 3, which was not connected");
    packet->base.peer = 1;
    packet->base.header_bytes = KV_NET_HEADER_BYTES + 1;
    CHECK_STATUS(kv_net_send(net, &packet->base), KV_INVALID);
    packet->base.header_bytes = sizeof(test_header_t);
    packet->base.payload = NULL;
    CHECK_STATUS(kv_net_send(net, &packet->base), KV_INVALID);
    packet->base.payload = packet->data;
    kv_net_drop(net, 99, "nobody");
    CHECK(!kv_net_is_lost(net, 99, NULL, 0));
    send_packet(&nodes[0], packet);
    WAIT_UNTIL(atomic_load(&nodes[1].num_whole) == 1);
    end_packet(packet);
    nodes_end(nodes, 2);
}

/* ------------------------------------------------------------------- headers that are malformed
 *
 * Shown to the endpoint in its own thread, in the handler of a tick. */

enum { GREETING = 1, MESSAGE = 2, VERSION = 1 };

typedef struct wire {
    unsigned char bytes[KV_NET_WIRE_HEADER + 50];
    size_t count;
} wire_t;

static wire_t make_wire(int sender, int kind, int version, size_t own_bytes)
{
    wire_t wire = {.bytes = {0, 1, 2, 3}, .count = KV_NET_PREFIX_BYTES + own_bytes};
    wire.bytes[16] = (unsigned char)sender;
    wire.bytes[20] = (unsigned char)kind;
    wire.bytes[21] = (unsigned char)version;
    wire.bytes[22] = (unsigned char)own_bytes;
    test_header_t header = {.sender = sender, .bytes = 5};
    memcpy(wire.bytes + KV_NET_PREFIX_BYTES, &header, sizeof header);
    return wire;
}

static kv_net_accepted_t *show(node_t *node, wire_t wire, size_t payload_bytes)
{
    /* From the heap, so that a sanitizer sees a read behind the end. */
    unsigned char *copy = malloc(wire.count > 0 ? wire.count : 1);
    memcpy(copy, wire.bytes, wire.count);
    kv_net_accepted_t *accepted = kv_net_arrived(node->net, copy, wire.count, payload_bytes);
    free(copy);
    return accepted;
}

static _Atomic int num_shown;

static void show_strangers(node_t *node)
{
    uint64_t random = 11;
    for (size_t i = 0; i < 20000; i++) {
        wire_t wire = make_wire((int)test_between(&random, 0, 255), MESSAGE, VERSION, 16);
        int64_t changes = test_between(&random, 1, 8);
        for (int64_t j = 0; j < changes; j++)
            wire.bytes[test_between(&random, 0, 23)] = (unsigned char)test_random(&random);
        wire.bytes[test_between(&random, 0, 15)] ^= (unsigned char)test_between(&random, 1, 255);
        wire.count = (size_t)test_between(&random, 0, sizeof wire.bytes);
        CHECK(show(node, wire, (size_t)test_between(&random, 0, 10)) == NULL);
    }
    wire_t foreign = make_wire(MAX_NODES, MESSAGE, VERSION, 16);
    CHECK(show(node, foreign, 5) == NULL);
    foreign.bytes[19] = 0x80; /* a negative number */
    CHECK(show(node, foreign, 5) == NULL);
    CHECK(show(node, make_wire(node->self, MESSAGE, VERSION, 16), 5) == NULL);
    for (size_t i = 0; i < KV_NET_PREFIX_BYTES; i++) {
        wire_t cut = make_wire(1, MESSAGE, VERSION, 16);
        cut.count = i;
        CHECK(show(node, cut, 5) == NULL);
    }
    node->on_tick = NULL;
    atomic_store(&num_shown, 1);
}

static void headers_of_strangers_are_thrown_away(void)
{
    setup_t setup = {.transport = "inproc"};
    node_t node = {.on_tick = show_strangers};
    atomic_store(&num_shown, 0);
    CHECK_STATUS(node_open(&node, 0, &setup), KV_OK);
    WAIT_UNTIL(atomic_load(&num_shown) == 1);
    CHECK_EQ(atomic_load(&node.num_arrived), 0);
    for (int i = 1; i < MAX_NODES; i++)
        CHECK(!kv_net_is_lost(node.net, i, NULL, 0));
    node_end(&node);
}

static void show_broken(node_t *node)
{
    CHECK(show(node, make_wire(1, MESSAGE, VERSION + 1, 16), 5) == NULL);
    CHECK(show(node, make_wire(2, MESSAGE, VERSION, 16), 5) == NULL);
    CHECK(show(node, make_wire(3, 77, VERSION, 16), 5) == NULL);
    wire_t wire = make_wire(4, MESSAGE, VERSION, 16);
    wire.count--;
    CHECK(show(node, wire, 5) == NULL);
    CHECK(show(node, make_wire(5, MESSAGE, VERSION, KV_NET_HEADER_BYTES + 1), 5) == NULL);
    CHECK(show(node, make_wire(6, GREETING, VERSION, 0), 5) == NULL);
    CHECK(show(node, make_wire(6, GREETING, VERSION, 0), 0) == NULL); /* twice */
    node->on_tick = NULL;
    atomic_store(&num_shown, 1);
}

static void members_that_send_nonsense_are_dropped_with_a_reason(void)
{
    setup_t setup = {.transport = "inproc"};
    node_t node = {.on_tick = show_broken};
    atomic_store(&num_shown, 0);
    CHECK_STATUS(node_open(&node, 0, &setup), KV_OK);
    WAIT_UNTIL(atomic_load(&num_shown) == 1);
    for (int i = 1; i < 6; i++)
        WAIT_UNTIL(atomic_load(&node.num_lost[i]) == 1);
    CHECK_TEXT(node.why[1], "it speaks version 2 of the protocol, this node version 1");
    CHECK_TEXT(node.why[2], "it sent a message before its greeting");
    CHECK_TEXT(node.why[3], "it sent a malformed header of 40 bytes");
    CHECK_TEXT(node.why[4], "it sent a malformed header of 39 bytes");
    CHECK_TEXT(node.why[5], "it sent a malformed header of 153 bytes");
    CHECK(!kv_net_is_lost(node.net, 6, NULL, 0));
    CHECK_EQ(atomic_load(&node.num_arrived), 0);
    node_end(&node);
}

/* --------------------------------------------------------------------------- missing memory */

static bool is_end(kv_status_t status)
{
    return status == KV_OK || status == KV_PEER_LOST || status == KV_NO_MEMORY;
}

/* Two nodes that talk a little, whatever fails. */
static void talk(const setup_t *setup)
{
    enum { COUNT = 20 };
    node_t nodes[2] = {0};
    packet_t *packets[2][COUNT] = {0};
    bool opened = true;
    bool connected = true;
    for (int i = 0; i < 2 && opened; i++) {
        kv_status_t status = node_open(&nodes[i], i, setup);
        CHECK(status == KV_OK || status == KV_NO_MEMORY);
        opened = status == KV_OK;
    }
    for (int i = 0; i < 2 && opened; i++) {
        kv_status_t status = node_connect(&nodes[i], &nodes[1 - i], 1 - i);
        CHECK(is_end(status));
        connected = connected && status == KV_OK;
    }
    for (int i = 0; i < 2 && opened && connected; i++) {
        test_caller_t caller = make_caller(SECOND_NS / 2);
        kv_status_t status = kv_net_wait_ready(nodes[i].net, &caller.base);
        CHECK(is_end(status) || status == KV_TIMEOUT); /* of one that was lost before it greeted */
        for (int m = 0; m < COUNT && status == KV_OK; m++) {
            packets[i][m] = packet_new(i, 1 - i, (uint32_t)m, m % 2 == 0 ? 1000 : 0, m % 3);
            kv_status_t sent = kv_net_send(nodes[i].net, &packets[i][m]->base);
            CHECK(is_end(sent));
            if (sent != KV_OK)
                atomic_store(&packets[i][m]->num_ends, 1);
        }
    }
    for (int i = 0; i < 2; i++)
        for (int m = 0; m < COUNT; m++)
            if (packets[i][m] != NULL)
                WAIT_UNTIL(atomic_load(&packets[i][m]->num_ends) == 1);
    for (int i = 0; i < 2; i++)
        node_end(&nodes[i]);
    for (int i = 0; i < 2; i++)
        for (int m = 0; m < COUNT; m++)
            if (packets[i][m] != NULL)
                end_packet(packets[i][m]);
    for (int counter = 0; counter < KV_COUNTER_COUNT; counter++)
        CHECK_EQ(kv_counter_value((kv_counter_t)counter), 0);
}

static void every_allocation_may_fail(void)
{
    static const setup_t setups[] = {{.transport = "inproc"},
                                     {.transport = "faulty", .faults = "delay=1,reorder"}};
    for (int i = 0; i < 2; i++) {
        int64_t nth = 1;
        int64_t passed = 0;
        do {
            kv_fault_set("alloc", nth);
            talk(&setups[i]);
            passed = kv_fault_set("alloc", 0);
        } while (passed >= nth++);
        CHECK(nth > 60);
    }
}

static const test_t tests[] = {
    TEST(an_endpoint_needs_a_transport_and_a_number),
    TEST(wrong_arguments_are_refused),
    TEST(headers_of_strangers_are_thrown_away),
    TEST(members_that_send_nonsense_are_dropped_with_a_reason),
    TEST(every_allocation_may_fail),
};

TEST_MAIN(tests)
