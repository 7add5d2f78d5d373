/* The promises of net.h under faults, and that the faults of faulty.c are what its head says. */
#include "net_nodes.h"

static void each_fault_has_a_grammar(void)
{
    static const char *const wrong[] = {
        "delay",    "delay=x",      "delay=70000",      "delay=-1",    "kill=1",    "kill=1:",
        "kill=1:0", "nonsense=1:2", "delay=1,,reorder", "short=1:2:3", "reorder=1", "kill=1:2x"};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        node_t node = {0};
        setup_t setup = {.transport = "faulty", .faults = wrong[i]};
        CHECK_STATUS(node_open(&node, 0, &setup), KV_INVALID);
        CHECK(strncmp(kv_status_message(KV_INVALID), "faults: '", 9) == 0);
    }
    static const char *const right[] = {NULL, "", "delay=0", "delay=3,reorder,kill=1:2,fail=2:3",
                                        "short=0:1,stall=7:99"};
    for (size_t i = 0; i < sizeof right / sizeof right[0]; i++) {
        node_t node = {0};
        setup_t setup = {.transport = "faulty", .faults = right[i]};
        CHECK_STATUS(node_open(&node, 0, &setup), KV_OK);
        node_end(&node);
    }
}

/* ---------------------------------------------------------------------------- fault by fault */

enum { COUNT = 10 };

/* Nodes 0 and 1; the faults are node 0's. */
static node_t *pair_start(const char *faults)
{
    setup_t setup = {.transport = "faulty", .faults = faults};
    setup_t plain = {.transport = "inproc"};
    node_t *nodes = calloc(2, sizeof *nodes);
    CHECK_STATUS(node_open(&nodes[0], 0, &setup), KV_OK);
    CHECK_STATUS(node_open(&nodes[1], 1, &plain), KV_OK);
    for (int i = 0; i < 2; i++)
        CHECK_STATUS(node_connect(&nodes[i], &nodes[1 - i], 1 - i), KV_OK);
    for (int i = 0; i < 2; i++)
        CHECK_STATUS(node_wait(&nodes[i]), KV_OK);
    return nodes;
}

static int send_some(node_t *from, packet_t **packets)
{
    int sent = 0;
    while (sent < COUNT) {
        packets[sent] = packet_new(from->self, 1 - from->self, (uint32_t)sent, 100, 0);
        kv_status_t status = kv_net_send(from->net, &packets[sent]->base);
        if (status != KV_OK) {
            CHECK_STATUS(status, KV_PEER_LOST);
            packet_free(packets[sent]);
            break;
        }
        sent++;
    }
    return sent;
}

static void wait_both_lost(node_t *nodes)
{
    for (int i = 0; i < 2; i++) {
        WAIT_UNTIL(atomic_load(&nodes[i].num_lost[1 - i]) > 0);
        CHECK_EQ(atomic_load(&nodes[i].num_lost[1 - i]), 1);
    }
}

static void kill_breaks_the_session_on_both_sides(void)
{
    packet_t *packets[COUNT];
    node_t *nodes = pair_start("kill=1:4");
    int sent = send_some(&nodes[0], packets);
    wait_both_lost(nodes);
    CHECK(sent >= 4);
    CHECK(atomic_load(&nodes[1].num_arrived) <= 4);
    end_packets(packets, sent);
    nodes_end(nodes, 2);
}

static void fail_ends_one_send_with_an_error(void)
{
    packet_t *packets[COUNT];
    node_t *nodes = pair_start("fail=1:4");
    int sent = send_some(&nodes[0], packets);
    wait_both_lost(nodes);
    CHECK(sent >= 4);
    CHECK_EQ(atomic_load(&packets[3]->status), KV_PEER_LOST);
    CHECK_TEXT(nodes[0].why[1], "a send failed");
    CHECK(atomic_load(&nodes[1].num_arrived) <= 3);
    end_packets(packets, sent);
    nodes_end(nodes, 2);
}

static void short_breaks_the_session_of_a_payload(void)
{
    packet_t *packets[COUNT];
    node_t *nodes = pair_start("short=1:4");
    int sent = send_some(&nodes[1], packets);
    wait_both_lost(nodes);
    CHECK_TEXT(nodes[0].why[1], "only 50 of 100 bytes came");
    CHECK_EQ(atomic_load(&nodes[0].num_whole), 3);
    CHECK_EQ(atomic_load(&nodes[0].num_cut), 1);
    end_packets(packets, sent);
    nodes_end(nodes, 2);
}

static void stall_is_not_told_and_a_close_ends_it(void)
{
    for (int closer = 0; closer < 2; closer++) {
        packet_t *packets[COUNT];
        node_t *nodes = pair_start("stall=1:4");
        CHECK_EQ(send_some(&nodes[1], packets), COUNT);
        WAIT_UNTIL(atomic_load(&nodes[0].num_whole) == 3);
        int ticks = atomic_load(&nodes[0].num_ticks);
        WAIT_UNTIL(atomic_load(&nodes[0].num_ticks) >= ticks + 2);
        CHECK_EQ(atomic_load(&nodes[0].num_arrived), 3);
        CHECK_EQ(atomic_load(&packets[COUNT - 1]->num_ends), 0);
        CHECK_EQ(atomic_load(&nodes[1].num_lost[0]), 0);
        int64_t start_ns = kv_clock_ns();
        kv_net_close(nodes[closer].net);
        CHECK(kv_clock_ns() - start_ns < 5 * SECOND_NS);
        end_packets(packets, COUNT);
        nodes_end(nodes, 2);
    }
}

static _Atomic int late; /* payloads that were whole after that of a younger message */

typedef struct listener {
    kv_net_t *net;
    uint32_t ids[200];
    unsigned char data[200][8];
    _Atomic int count;
    uint32_t newest;
} listener_t;

static listener_t listener;

static void listener_done(void *context, kv_status_t status)
{
    uint32_t id = *(uint32_t *)context;
    CHECK_STATUS(status, KV_OK);
    if (id < listener.newest)
        atomic_fetch_add(&late, 1);
    else
        listener.newest = id;
    atomic_fetch_add(&listener.count, 1);
}

static kv_status_t listener_arrive(void *context, kv_net_arrival_t *arrival)
{
    static uint32_t next;
    test_header_t header;
    (void)context;
    memcpy(&header, arrival->header, sizeof header);
    CHECK_EQ(header.id, next);
    next++;
    listener.ids[header.id] = header.id;
    arrival->target = listener.data[header.id];
    arrival->context = &listener.ids[header.id];
    arrival->done = listener_done;
    return KV_OK;
}

static void reorder_ends_payloads_out_of_their_order(void)
{
    packet_t *packets[200];
    node_t node = {0};
    setup_t plain = {.transport = "inproc"};
    kv_net_config_t config = {.transport = "faulty",
                              .self = 0,
                              .num_peers = MAX_NODES,
                              .session = {0, 1, 2, 3},
                              .seed = 3,
                              .faults = "reorder"};
    kv_net_handlers_t handlers = {.arrive = listener_arrive, .lost = node_lost};
    CHECK_STATUS(node_open(&node, 1, &plain), KV_OK);
    CHECK_STATUS(kv_net_open(&config, &handlers, &listener.net), KV_OK);
    node_t other = {.net = listener.net};
    CHECK_STATUS(node_connect(&node, &other, 0), KV_OK);
    CHECK_STATUS(node_connect(&other, &node, 1), KV_OK);
    for (uint32_t i = 0; i < 200; i++) {
        packets[i] = packet_new(1, 0, i, 8, 0);
        send_packet(&node, packets[i]);
    }
    WAIT_UNTIL(atomic_load(&listener.count) == 200);
    CHECK(atomic_load(&late) > 10);
    end_packets(packets, 200);
    kv_net_close(listener.net);
    kv_net_free(listener.net);
    node_end(&node);
}

/* ----------------------------------------------------------------------------- random faults */

enum { MOST = 4, MESSAGES = 60 };

typedef struct faults {
    char text[128];
    bool tainted[MOST]; /* sessions that a fault may end or stall */
} faults_t;

static faults_t random_faults(uint64_t *random, int self, int count)
{
    static const char *const lethal[] = {"kill", "fail", "short", "stall"};
    faults_t out = {0};
    int used = snprintf(out.text, sizeof out.text, "delay=%d", (int)test_between(random, 0, 3));
    if (test_between(random, 0, 1) == 0)
        used += snprintf(out.text + used, sizeof out.text - (size_t)used, ",reorder");
    for (int i = 0; i < 4; i++) {
        int64_t peer = test_between(random, 0, count - 1);
        if (peer == self || test_between(random, 0, 5) > 0)
            continue;
        used += snprintf(out.text + used, sizeof out.text - (size_t)used, ",%s=%d:%d", lethal[i],
                         (int)peer, (int)test_between(random, 1, 25));
        out.tainted[peer] = true;
    }
    return out;
}

static void check_order(const node_t *node)
{
    int64_t last[MOST];
    memset(last, -1, sizeof last);
    for (int i = 0; i < atomic_load(&node->num_arrived); i++) {
        const test_header_t *header = &node->arrived[i];
        CHECK((int64_t)header->id > last[header->sender]);
        last[header->sender] = header->id;
    }
}

/* Messages that have come whole in sessions without a fault. */
static int untouched(const node_t *node, const faults_t *faults)
{
    int count = 0;
    for (int i = 0; i < MOST; i++)
        if (!faults[node->self].tainted[i] && !faults[i].tainted[node->self])
            count += atomic_load(&node->num_whole_from[i]);
    return count;
}

static void run_seed(uint64_t seed)
{
    uint64_t random = seed;
    int count = (int)test_between(&random, 2, MOST);
    faults_t faults[MOST] = {0};
    node_t nodes[MOST] = {0};
    packet_t *packets[MOST][MESSAGES] = {0};
    bool taken_back[MOST][MESSAGES] = {0};
    int due[MOST] = {0};
    for (int i = 0; i < count; i++) {
        faults[i] = random_faults(&random, i, count);
        setup_t setup = {.transport = "faulty", .faults = faults[i].text, .seed = seed};
        CHECK_STATUS(node_open(&nodes[i], i, &setup), KV_OK);
    }
    for (int i = 0; i < count; i++)
        for (int j = 0; j < count; j++)
            if (i != j)
                CHECK_STATUS(node_connect(&nodes[i], &nodes[j], j), KV_OK);
    for (int m = 0; m < MESSAGES; m++) {
        for (int i = 0; i < count; i++) {
            int peer = (i + 1 + (int)test_between(&random, 0, count - 2)) % count;
            bool tainted = faults[i].tainted[peer] || faults[peer].tainted[i];
            size_t bytes = (size_t)test_between(&random, 0, m % 10 == 9 ? 100000 : 500);
            packet_t *packet = packet_new(i, peer, (uint32_t)m, m % 3 == 0 ? 0 : bytes, 0);
            kv_status_t status = kv_net_send(nodes[i].net, &packet->base);
            if (status != KV_OK) {
                CHECK_STATUS(status, KV_PEER_LOST);
                CHECK(tainted);
                packet_free(packet);
                continue;
            }
            packets[i][m] = packet;
            taken_back[i][m] =
                test_between(&random, 0, 9) == 0 && kv_net_cancel(nodes[i].net, &packet->base);
            due[peer] += !tainted && !taken_back[i][m];
        }
        if (test_between(&random, 0, 9) == 0)
            sched_yield();
    }
    for (int i = 0; i < count; i++) /* what no fault touches arrives */
        WAIT_UNTIL(untouched(&nodes[i], faults) == due[i]);
    for (int i = 0; i < count; i++) /* and who lost is lost */
        for (int j = 0; j < count; j++)
            if (atomic_load(&nodes[i].num_lost[j]) > 0)
                WAIT_UNTIL(atomic_load(&nodes[j].num_lost[i]) > 0);
    int first = (int)test_between(&random, 0, count - 1);
    for (int i = 0; i < count; i++)
        kv_net_close(nodes[(first + i) % count].net);
    for (int i = 0; i < count; i++) {
        check_order(&nodes[i]);
        CHECK_EQ(atomic_load(&nodes[i].num_whole) + atomic_load(&nodes[i].num_cut),
                 atomic_load(&nodes[i].num_arrived));
        for (int j = 0; j < count; j++)
            CHECK(atomic_load(&nodes[i].num_lost[j]) <= 1);
        for (int m = 0; m < MESSAGES; m++) {
            if (packets[i][m] == NULL)
                continue;
            CHECK_EQ(atomic_load(&packets[i][m]->num_ends), taken_back[i][m] ? 0 : 1);
            packet_free(packets[i][m]);
        }
        node_end(&nodes[i]);
    }
    CHECK_EQ(kv_counter_value(KV_COUNT_NET_MESSAGES), 0);
    CHECK_EQ(kv_counter_value(KV_COUNT_NET_ARRIVALS), 0);
}

static void every_promise_holds_under_random_faults(void)
{
    for (uint64_t seed = 1; seed <= 200; seed++) {
        int before = atomic_load(&test_failures);
        run_seed(seed);
        if (!CHECK_EQ(atomic_load(&test_failures), before)) {
            printf("    seed %" PRIu64 "\n", seed);
            return;
        }
    }
}

static const test_t tests[] = {
    TEST(each_fault_has_a_grammar),
    TEST(kill_breaks_the_session_on_both_sides),
    TEST(fail_ends_one_send_with_an_error),
    TEST(short_breaks_the_session_of_a_payload),
    TEST(stall_is_not_told_and_a_close_ends_it),
    TEST(reorder_ends_payloads_out_of_their_order),
    TEST(every_promise_holds_under_random_faults),
};

TEST_MAIN(tests)
