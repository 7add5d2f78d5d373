/* The contract of net.h on each transport: sessions that end, and with them what is under way. */
#include "net_nodes.h"
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

/* ------------------------------------------------------------------- traffic without an end */

enum { SENDERS = 3, MAX_SENT = 400 };

/* A thread that sends until the peer is gone, and takes some messages back. */
typedef struct stream {
    node_t *node;
    int32_t peer;
    int index;
    pthread_t thread;
    packet_t *packets[MAX_SENT];
    bool taken_back[MAX_SENT];
    int num_sent;
    kv_status_t status;
} stream_t;

static void *run_stream(void *context)
{
    stream_t *stream = context;
    uint64_t random = (uint64_t)stream->index;
    while (stream->num_sent < MAX_SENT && stream->status == KV_OK) {
        size_t bytes = (size_t)test_between(&random, 0, 5000);
        if (stream->num_sent % 100 == 50)
            bytes = 600000;
        int i = stream->num_sent;
        packet_t *packet = packet_new(stream->node->self, stream->peer, (uint32_t)i, bytes,
                                      (int32_t)test_between(&random, 0, 2));
        stream->status = kv_net_send(stream->node->net, &packet->base);
        if (stream->status != KV_OK) {
            CHECK_EQ(atomic_load(&packet->num_ends), 0);
            packet_free(packet);
            break;
        }
        stream->packets[stream->num_sent++] = packet;
        int64_t other = test_between(&random, 0, 20);
        if (other <= i && !stream->taken_back[i - other])
            stream->taken_back[i - other] =
                kv_net_cancel(stream->node->net, &stream->packets[i - other]->base);
        while (i > 100 && !stream->taken_back[i - 100] &&
               atomic_load(&stream->packets[i - 100]->num_ends) == 0)
            sched_yield();
    }
    return NULL;
}

static stream_t *streams_start(node_t *node, int32_t peer)
{
    stream_t *streams = calloc(SENDERS, sizeof *streams);
    for (int i = 0; i < SENDERS; i++) {
        streams[i] = (stream_t){.node = node, .peer = peer, .index = i};
        pthread_create(&streams[i].thread, NULL, run_stream, &streams[i]);
    }
    return streams;
}

/* Each message has ended once, or was taken back and has not. */
static void streams_end(stream_t *streams, kv_status_t due)
{
    for (int i = 0; i < SENDERS; i++) {
        stream_t *stream = &streams[i];
        pthread_join(stream->thread, NULL);
        if (stream->num_sent < MAX_SENT)
            CHECK_STATUS(stream->status, due);
        for (int j = 0; j < stream->num_sent; j++) {
            packet_t *packet = stream->packets[j];
            if (!stream->taken_back[j])
                WAIT_UNTIL(atomic_load(&packet->num_ends) > 0);
            CHECK_EQ(atomic_load(&packet->num_ends), stream->taken_back[j] ? 0 : 1);
            packet_free(packet);
        }
    }
    free(streams);
}

typedef struct dropper {
    node_t *node;
    int32_t peer;
    pthread_t thread;
} dropper_t;

static void *run_drop(void *context)
{
    dropper_t *dropper = context;
    kv_net_drop(dropper->node->net, dropper->peer, "it was dropped");
    return NULL;
}

ON_EACH_TRANSPORT(a_drop_ends_all_that_is_under_way_once)
{
    for (int round = 0; round < 3; round++) {
        node_t *nodes = nodes_start(3, setup);
        stream_t *streams[4] = {streams_start(&nodes[0], 1), streams_start(&nodes[1], 0),
                                streams_start(&nodes[2], 1), streams_start(&nodes[0], 2)};
        WAIT_UNTIL(atomic_load(&nodes[0].num_whole) > 20 + 40 * round);
        dropper_t droppers[3];
        for (int i = 0; i < 3; i++) {
            droppers[i] = (dropper_t){.node = &nodes[0], .peer = 1};
            pthread_create(&droppers[i].thread, NULL, run_drop, &droppers[i]);
        }
        for (int i = 0; i < 3; i++)
            pthread_join(droppers[i].thread, NULL);
        streams_end(streams[0], KV_PEER_LOST);
        streams_end(streams[1], KV_PEER_LOST);
        WAIT_UNTIL(atomic_load(&nodes[0].num_lost[1]) && atomic_load(&nodes[1].num_lost[0]));
        CHECK_TEXT(nodes[0].why[1], "it was dropped");
        CHECK(nodes[1].why[0][0] != '\0');

        packet_t *packet = packet_new(0, 1, 1, 0, 0);
        CHECK_STATUS(kv_net_send(nodes[0].net, &packet->base), KV_PEER_LOST);
        CHECK_TEXT(kv_status_message(KV_PEER_LOST), "node 1 is gone: it was dropped");
        CHECK(!kv_net_cancel(nodes[0].net, &packet->base));
        packet_free(packet);

        streams_end(streams[2], KV_PEER_LOST); /* to their ends: those sessions live */
        streams_end(streams[3], KV_PEER_LOST);
        CHECK(!kv_net_is_lost(nodes[0].net, 2, NULL, 0));
        CHECK_EQ(atomic_load(&nodes[2].num_lost[0]) + atomic_load(&nodes[2].num_lost[1]), 0);
        for (int i = 0; i < 2; i++)
            CHECK_EQ(atomic_load(&nodes[i].num_lost[1 - i]), 1);
        nodes_end(nodes, 3);
        CHECK_EQ(kv_counter_value(KV_COUNT_NET_MESSAGES), 0);
        CHECK_EQ(kv_counter_value(KV_COUNT_NET_ARRIVALS), 0);
    }
}

static kv_status_t drop_sender(node_t *node, const test_header_t *header)
{
    kv_net_drop(node->net, header->sender, "it was dropped");
    return KV_OK;
}

ON_EACH_TRANSPORT(a_payload_that_comes_after_a_drop_is_lost)
{
    static const size_t sizes[] = {100, 3000000};
    for (int i = 0; i < 2; i++) {
        node_t *nodes = nodes_start(2, setup);
        nodes[1].on_arrive = drop_sender;
        packet_t *packet = packet_new(0, 1, 1, sizes[i], 0);
        send_packet(&nodes[0], packet);
        WAIT_UNTIL(atomic_load(&nodes[1].num_cut) == 1);
        WAIT_UNTIL(atomic_load(&nodes[0].num_lost[1]) == 1);
        CHECK_EQ(atomic_load(&nodes[1].num_whole), 0);
        end_packet(packet);
        nodes_end(nodes, 2);
    }
}

static void *run_close(void *context)
{
    kv_net_close(((node_t *)context)->net);
    return NULL;
}

ON_EACH_TRANSPORT(a_close_from_several_threads_ends_all_once)
{
    for (int round = 0; round < 3; round++) {
        node_t *nodes = nodes_start(2, setup);
        stream_t *streams[2] = {streams_start(&nodes[0], 1), streams_start(&nodes[1], 0)};
        WAIT_UNTIL(atomic_load(&nodes[0].num_whole) > 40 * round);
        pthread_t threads[3];
        int64_t start_ns = kv_clock_ns();
        for (int i = 0; i < 3; i++)
            pthread_create(&threads[i], NULL, run_close, &nodes[0]);
        for (int i = 0; i < 3; i++)
            pthread_join(threads[i], NULL);
        CHECK(kv_clock_ns() - start_ns < 10 * SECOND_NS);
        streams_end(streams[0], KV_CLOSED);
        streams_end(streams[1], KV_PEER_LOST);
        WAIT_UNTIL(atomic_load(&nodes[1].num_lost[0]) == 1);
        CHECK_EQ(atomic_load(&nodes[0].num_lost[1]), 0);
        packet_t *packet = packet_new(0, 1, 1, 0, 0);
        CHECK_STATUS(kv_net_send(nodes[0].net, &packet->base), KV_CLOSED);
        packet_free(packet);
        unsigned char address = 1;
        CHECK_STATUS(kv_net_connect(nodes[0].net, 3, "node 3", &address, 1), KV_CLOSED);
        CHECK_STATUS(node_wait(&nodes[0]), KV_CLOSED);
        nodes_end(nodes, 2);
    }
}

ON_EACH_TRANSPORT(both_ends_may_close_at_the_same_time)
{
    for (int round = 0; round < 10; round++) {
        node_t *nodes = nodes_start(2, setup);
        stream_t *streams[2] = {streams_start(&nodes[0], 1), streams_start(&nodes[1], 0)};
        pthread_t threads[2];
        for (int i = 0; i < 2; i++)
            pthread_create(&threads[i], NULL, run_close, &nodes[i]);
        for (int i = 0; i < 2; i++)
            pthread_join(threads[i], NULL);
        for (int i = 0; i < 2; i++) {
            stream_t *all = streams[i];
            for (int j = 0; j < SENDERS; j++) {
                pthread_join(all[j].thread, NULL);
                if (all[j].num_sent < MAX_SENT) /* else it was through before the closes */
                    CHECK(all[j].status == KV_CLOSED || all[j].status == KV_PEER_LOST);
                for (int k = 0; k < all[j].num_sent; k++) {
                    CHECK_EQ(atomic_load(&all[j].packets[k]->num_ends),
                             all[j].taken_back[k] ? 0 : 1);
                    packet_free(all[j].packets[k]);
                }
            }
            free(all);
        }
        nodes_end(nodes, 2);
    }
}

/* ------------------------------------------------------------------------------- taking back */

ON_EACH_TRANSPORT(a_message_that_waits_can_be_taken_back)
{
    enum { COUNT = 200 };
    packet_t *packets[COUNT];
    bool taken[COUNT] = {false};
    uint64_t random = 3;
    node_t nodes[2] = {0};
    for (int i = 0; i < 2; i++)
        CHECK_STATUS(node_open(&nodes[i], i, setup), KV_OK);
    CHECK_STATUS(node_connect(&nodes[0], &nodes[1], 1), KV_OK);
    for (int i = 0; i < COUNT; i++) {
        packets[i] = packet_new(0, 1, (uint32_t)i, 10, (int32_t)test_between(&random, 0, 9));
        send_packet(&nodes[0], packets[i]);
    }
    for (int i = 0; i < COUNT / 2; i++) {
        int64_t index = test_between(&random, 0, COUNT - 1);
        CHECK(kv_net_cancel(nodes[0].net, &packets[index]->base) != taken[index]);
        taken[index] = true;
    }
    int left = 0;
    for (int i = 0; i < COUNT; i++)
        left += !taken[i];
    CHECK_STATUS(node_connect(&nodes[1], &nodes[0], 0), KV_OK);
    WAIT_UNTIL(atomic_load(&nodes[1].num_whole) == left);
    for (int i = 1; i < left; i++) {
        int32_t before = packets[nodes[1].arrived[i - 1].id]->base.priority;
        CHECK(before >= packets[nodes[1].arrived[i].id]->base.priority);
    }
    for (int i = 0; i < COUNT; i++) {
        if (!taken[i]) {
            WAIT_UNTIL(atomic_load(&packets[i]->num_ends) > 0);
            CHECK(!kv_net_cancel(nodes[0].net, &packets[i]->base));
        }
        CHECK_EQ(atomic_load(&packets[i]->num_ends), taken[i] ? 0 : 1);
        packet_free(packets[i]);
    }
    for (int i = 0; i < 2; i++)
        node_end(&nodes[i]);
}

/* ---------------------------------------------------------------------------------- waiting */

ON_EACH_TRANSPORT(the_deadline_names_who_has_not_greeted)
{
    node_t nodes[4] = {0};
    for (int i = 0; i < 4; i++)
        CHECK_STATUS(node_open(&nodes[i], i, setup), KV_OK);
    for (int i = 1; i < 4; i++)
        CHECK_STATUS(node_connect(&nodes[0], &nodes[i], i), KV_OK);
    CHECK_STATUS(node_connect(&nodes[2], &nodes[0], 0), KV_OK);
    CHECK_STATUS(node_wait(&nodes[2]), KV_OK);
    test_caller_t caller = make_caller(SECOND_NS / 4);
    CHECK_STATUS(kv_net_wait_ready(nodes[0].net, &caller.base), KV_TIMEOUT);
    CHECK_TEXT(kv_status_message(KV_TIMEOUT), "no connection within 0.2 s with node 1, node 3");
    CHECK(caller.num_polls > 0);
    CHECK(!caller.base.detached);

    caller = make_caller(30 * SECOND_NS);
    caller.poll_status = KV_INTERRUPTED;
    CHECK_STATUS(kv_net_wait_ready(nodes[0].net, &caller.base), KV_INTERRUPTED);
    CHECK_EQ(caller.num_polls, 1);

    kv_net_drop(nodes[0].net, 3, "it has left");
    CHECK_STATUS(node_wait(&nodes[0]), KV_PEER_LOST);
    CHECK_TEXT(kv_status_message(KV_PEER_LOST), "node 3 is gone: it has left");
    for (int i = 0; i < 4; i++)
        node_end(&nodes[i]);
}

ON_EACH_TRANSPORT(who_waits_to_be_alone_waits_for_all_sessions_or_its_time)
{
    node_t *nodes = nodes_start(3, setup);
    kv_net_drop(nodes[0].net, 2, "it has left");
    test_caller_t caller = make_caller(SECOND_NS / 4);
    int64_t begin = kv_clock_ns();
    CHECK_STATUS(kv_net_wait_alone(nodes[0].net, INT32_MAX, &caller.base), KV_OK);
    CHECK(kv_clock_ns() - begin >= SECOND_NS / 4);
    CHECK(caller.num_polls > 0);

    caller = make_caller(30 * SECOND_NS);
    caller.poll_status = KV_INTERRUPTED;
    CHECK_STATUS(kv_net_wait_alone(nodes[0].net, INT32_MAX, &caller.base), KV_INTERRUPTED);

    node_end(&nodes[1]);
    caller = make_caller(30 * SECOND_NS);
    begin = kv_clock_ns();
    CHECK_STATUS(kv_net_wait_alone(nodes[0].net, INT32_MAX, &caller.base), KV_OK);
    CHECK(kv_clock_ns() - begin < 20 * SECOND_NS);
    nodes_end(nodes, 3);
}

ON_EACH_TRANSPORT(a_greeting_before_the_connect_is_remembered)
{
    node_t nodes[2] = {0};
    for (int i = 0; i < 2; i++)
        CHECK_STATUS(node_open(&nodes[i], i, setup), KV_OK);
    CHECK_STATUS(node_connect(&nodes[0], &nodes[1], 1), KV_OK);
    packet_t *packet = packet_new(0, 1, 0, 100000, 0);
    send_packet(&nodes[0], packet);
    int ticks = atomic_load(&nodes[1].num_ticks);
    WAIT_UNTIL(atomic_load(&nodes[1].num_ticks) >= ticks + 2);
    CHECK_EQ(atomic_load(&nodes[1].num_arrived), 0);
    CHECK_STATUS(node_connect(&nodes[1], &nodes[0], 0), KV_OK);
    CHECK_STATUS(node_wait(&nodes[1]), KV_OK);
    CHECK_STATUS(node_wait(&nodes[0]), KV_OK);
    WAIT_UNTIL(atomic_load(&nodes[1].num_whole) == 1);
    end_packet(packet);
    for (int i = 0; i < 2; i++)
        node_end(&nodes[i]);
}

ON_EACH_TRANSPORT(one_who_has_left_before_the_connect_is_lost)
{
    node_t nodes[2] = {0};
    unsigned char address[KV_NET_ADDRESS_BYTES];
    size_t bytes;
    for (int i = 0; i < 2; i++)
        CHECK_STATUS(node_open(&nodes[i], i, setup), KV_OK);
    kv_net_address(nodes[1].net, address, &bytes);
    node_end(&nodes[1]);
    CHECK_STATUS(kv_net_connect(nodes[0].net, 1, "node 1", address, bytes), KV_OK);
    CHECK_STATUS(node_wait(&nodes[0]), KV_PEER_LOST);
    WAIT_UNTIL(atomic_load(&nodes[0].num_lost[1]) == 1);
    node_end(&nodes[0]);
}

ON_EACH_TRANSPORT(a_peer_dropped_before_its_connect_is_never_connected)
{
    node_t nodes[2] = {0};
    for (int i = 0; i < 2; i++)
        CHECK_STATUS(node_open(&nodes[i], i, setup), KV_OK);
    kv_net_drop(nodes[0].net, 1, "it was refused");
    CHECK_STATUS(node_connect(&nodes[0], &nodes[1], 1), KV_PEER_LOST);
    CHECK_TEXT(kv_status_message(KV_PEER_LOST), "node 1 is gone: it was refused");
    WAIT_UNTIL(atomic_load(&nodes[0].num_lost[1]) == 1);
    for (int i = 0; i < 2; i++)
        node_end(&nodes[i]);
}

/* ------------------------------------------------------------------------ those who are wrong */

ON_EACH_TRANSPORT(a_refused_message_costs_its_sender_the_session)
{
    node_t *nodes = nodes_start(3, setup);
    atomic_store(&nodes[1].refuses, true);
    packet_t *packets[4];
    for (int i = 0; i < 4; i++) {
        packets[i] = packet_new(0, 1, (uint32_t)i, i % 2 == 0 ? 400000 : 0, 0);
        kv_status_t status = kv_net_send(nodes[0].net, &packets[i]->base);
        if (status != KV_OK) {
            CHECK_STATUS(status, KV_PEER_LOST);
            atomic_store(&packets[i]->num_ends, 1);
        }
    }
    WAIT_UNTIL(atomic_load(&nodes[1].num_lost[0]) == 1);
    WAIT_UNTIL(atomic_load(&nodes[0].num_lost[1]) == 1);
    CHECK_TEXT(nodes[1].why[0], "not this one");
    end_packets(packets, 4);
    atomic_store(&nodes[1].refuses, false);
    packet_t *packet = packet_new(2, 1, 7, 100, 0);
    send_packet(&nodes[2], packet);
    WAIT_UNTIL(atomic_load(&nodes[1].num_whole) == 1);
    end_packet(packet);
    nodes_end(nodes, 3);
}

ON_EACH_TRANSPORT(strangers_are_not_heard)
{
    node_t *nodes = nodes_start(2, setup);
    setup_t other = *setup;
    other.session++;
    other.num_peers = 100;
    static const int32_t numbers[] = {0, 2, 99};
    node_t strangers[3] = {0};
    for (int i = 0; i < 3; i++) {
        if (i > 0)
            other.session = (unsigned char)(setup->session + (i == 1)); /* 99: a foreign number */
        CHECK_STATUS(node_open(&strangers[i], numbers[i], &other), KV_OK);
        CHECK_STATUS(node_connect(&strangers[i], &nodes[1], 1), KV_OK);
    }
    CHECK_STATUS(node_connect(&nodes[1], &strangers[1], 2), KV_OK);
    test_caller_t caller = make_caller(SECOND_NS / 4);
    CHECK_STATUS(kv_net_wait_ready(nodes[1].net, &caller.base), KV_TIMEOUT);
    caller = make_caller(SECOND_NS / 4);
    CHECK_STATUS(kv_net_wait_ready(strangers[1].net, &caller.base), KV_TIMEOUT);
    packet_t *packet = packet_new(0, 1, 7, 100, 0);
    send_packet(&nodes[0], packet);
    WAIT_UNTIL(atomic_load(&nodes[1].num_whole) == 1);
    CHECK_EQ(atomic_load(&nodes[1].num_arrived), 1);
    end_packet(packet);
    for (int i = 0; i < 3; i++)
        node_end(&strangers[i]);
    CHECK_EQ(atomic_load(&nodes[1].num_lost[0]), 0);
    nodes_end(nodes, 2);
}

static bool free_self(packet_t *packet)
{
    packet_free(packet);
    return true;
}

static void send_after_loss(node_t *node, int32_t peer)
{
    packet_t *packet = packet_new(node->self, peer, 1, 0, 0);
    CHECK_STATUS(kv_net_send(node->net, &packet->base), KV_PEER_LOST);
    packet_free(packet);
    kv_net_drop(node->net, peer, "again");
    packet = packet_new(node->self, 2, 1, 10, 0);
    packet->then = free_self;
    send_packet(node, packet);
}

ON_EACH_TRANSPORT(the_handler_of_a_loss_may_tell_others)
{
    node_t *nodes = nodes_start(3, setup);
    nodes[0].on_lost = send_after_loss;
    node_end(&nodes[1]);
    WAIT_UNTIL(atomic_load(&nodes[2].num_whole) == 1);
    CHECK_EQ(atomic_load(&nodes[0].num_lost[1]), 1);
    WAIT_UNTIL(kv_counter_value(KV_COUNT_NET_MESSAGES) == 0);
    nodes_end(nodes, 3);
}

/* ------------------------------------------------------------------------------------- fork */

static void in_a_forked_child_close_and_free_do_nothing(void)
{
    setup_t setup = {.transport = "inproc"};
    node_t *nodes = nodes_start(2, &setup);
    pid_t child = fork();
    if (child == 0) {
        kv_net_close(nodes[0].net);
        kv_net_free(nodes[0].net);
        _exit(7);
    }
    int ended = 0;
    CHECK_EQ(waitpid(child, &ended, 0), child);
    CHECK(WIFEXITED(ended) && WEXITSTATUS(ended) == 7);
    packet_t *packet = packet_new(0, 1, 7, 100, 0);
    send_packet(&nodes[0], packet);
    WAIT_UNTIL(atomic_load(&nodes[1].num_whole) == 1);
    end_packet(packet);
    nodes_end(nodes, 2);
}

static const test_t tests[] = {
    TEST(a_drop_ends_all_that_is_under_way_once),
    TEST(a_payload_that_comes_after_a_drop_is_lost),
    TEST(a_close_from_several_threads_ends_all_once),
    TEST(both_ends_may_close_at_the_same_time),
    TEST(a_message_that_waits_can_be_taken_back),
    TEST(the_deadline_names_who_has_not_greeted),
    TEST(who_waits_to_be_alone_waits_for_all_sessions_or_its_time),
    TEST(a_greeting_before_the_connect_is_remembered),
    TEST(one_who_has_left_before_the_connect_is_lost),
    TEST(a_peer_dropped_before_its_connect_is_never_connected),
    TEST(a_refused_message_costs_its_sender_the_session),
    TEST(strangers_are_not_heard),
    TEST(the_handler_of_a_loss_may_tell_others),
    TEST(in_a_forked_child_close_and_free_do_nothing),
};

TEST_MAIN(tests)
