/* What only UCX can get wrong: settings, signals, and peers that are killed or stand still. The
 * promises that all transports share are tested by test_net.c.
 *
 * Peers are processes of this program, started before UCX is loaded, since it does not survive a
 * fork. Each waits at its end of a socket pair for the address of node 0, connects, streams both
 * ways, and ends when the pair is closed. */
#include "net/net.h"
#include "test.h"
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    KILLS = 8,
    SURVIVOR = 1,
    FROZEN = 2,
    LATE = 3,
    FIRST_VICTIM = 4,
    NUM_NODES = FIRST_VICTIM + KILLS,
    CONTROL_FD = 3, /* of a peer */
    SLOTS = 6,
    LARGE_BYTES = 1 << 20, /* goes straight into its target */
    SMALL_BYTES = 4096,    /* goes through UCX's memory */
};
#define SECOND INT64_C(1000000000)
#define LOST_WITHIN (2 * SECOND)
#define PATIENCE (20 * SECOND)

typedef struct child {
    pid_t pid;
    int control;
} child_t;

static child_t children[NUM_NODES];

/* ---------------------------------------------------------------------------------- a node */

typedef struct node node_t;
typedef struct stream stream_t;

typedef struct slot {
    kv_net_message_t message; /* first: a message is found by its address */
    stream_t *stream;
    unsigned char *in; /* for the peer's message of this slot */
    size_t bytes;
} slot_t;

/* What goes to and comes from one peer: each slot sends the same message again when it has gone. */
struct stream {
    node_t *node;
    slot_t slots[SLOTS];
    unsigned char *due; /* what the peer's messages begin with */
    bool stopped;
    int64_t taken, ended, arrived, received, wrong, lost, after_loss;
    int64_t lost_ns;
};

struct node {
    kv_net_t *net;
    int32_t self;
    unsigned char *own; /* what messages begin with */
    kv_mutex_t lock;
    kv_cond_t changed;
    stream_t streams[NUM_NODES]; /* under the lock */
};

static void change(node_t *node, int64_t *number, int64_t by)
{
    kv_mutex_lock(&node->lock);
    *number += by;
    kv_cond_broadcast(&node->changed);
    kv_mutex_unlock(&node->lock);
}

/* Different for each node, and at each place: a torn or misplaced payload is seen. */
static unsigned char *pattern(int32_t node)
{
    unsigned char *bytes = kv_alloc(LARGE_BYTES);
    uint64_t state = (uint64_t)node + 1;
    for (size_t i = 0; i < LARGE_BYTES; i += sizeof(uint64_t)) {
        uint64_t word = test_random(&state);
        memcpy(bytes + i, &word, sizeof(word));
    }
    return bytes;
}

static void send_slot(slot_t *slot)
{
    stream_t *stream = slot->stream;
    kv_mutex_lock(&stream->node->lock);
    bool stopped = stream->stopped;
    stream->taken += !stopped;
    kv_mutex_unlock(&stream->node->lock);
    if (!stopped && kv_net_send(stream->node->net, &slot->message) != KV_OK)
        change(stream->node, &stream->taken, -1);
}

static void slot_sent(kv_net_message_t *message, kv_status_t status)
{
    slot_t *slot = (slot_t *)message;
    change(slot->stream->node, &slot->stream->ended, 1);
    if (status == KV_OK)
        send_slot(slot);
}

static void slot_received(void *context, kv_status_t status)
{
    slot_t *slot = context;
    stream_t *stream = slot->stream;
    if (status == KV_OK && memcmp(slot->in, stream->due, slot->bytes) != 0)
        change(stream->node, &stream->wrong, 1);
    memset(slot->in, 0, slot->bytes);
    change(stream->node, &stream->received, 1);
}

static kv_status_t arrive(void *context, kv_net_arrival_t *arrival)
{
    node_t *node = context;
    stream_t *stream = &node->streams[arrival->peer];
    unsigned char number = *(const unsigned char *)arrival->header;
    if (number >= SLOTS || arrival->payload_bytes != stream->slots[number].bytes)
        return kv_fail(KV_INVALID, "no such slot");
    kv_mutex_lock(&node->lock);
    stream->arrived++;
    stream->after_loss += stream->lost > 0;
    kv_mutex_unlock(&node->lock);
    arrival->target = stream->slots[number].in;
    arrival->done = slot_received;
    arrival->context = &stream->slots[number];
    return KV_OK;
}

static void lost(void *context, int32_t peer, const char *why)
{
    (void)why;
    node_t *node = context;
    node->streams[peer].lost_ns = kv_clock_ns();
    change(node, &node->streams[peer].lost, 1);
}

static kv_net_config_t settings(int32_t self)
{
    return (kv_net_config_t){.transport = "ucx",
                             .self = self,
                             .num_peers = NUM_NODES,
                             .session = "a session of 16",
                             .library = getenv("KVSTORE_TEST_UCX_LIBRARY"),
                             .interface = "lo",
                             .same_host_copies = true};
}

static kv_status_t open_node(node_t *node, int32_t self)
{
    *node = (node_t){.self = self};
    kv_mutex_init(&node->lock, KV_RANK_LEAF);
    kv_cond_init(&node->changed);
    kv_net_config_t config = settings(self);
    kv_net_handlers_t handlers = {.context = node, .arrive = arrive, .lost = lost};
    KV_TRY(kv_net_open(&config, &handlers, &node->net));
    node->own = pattern(self);
    return KV_OK;
}

/* Makes room for what comes, then connects. */
static kv_status_t join(node_t *node, int32_t peer, const void *address, size_t bytes)
{
    stream_t *stream = &node->streams[peer];
    stream->node = node;
    stream->due = pattern(peer);
    for (int i = 0; i < SLOTS; i++) {
        slot_t *slot = &stream->slots[i];
        slot->stream = stream;
        slot->bytes = i == 0 ? SMALL_BYTES : LARGE_BYTES;
        slot->in = kv_calloc(1, slot->bytes);
        slot->message = (kv_net_message_t){.peer = peer,
                                           .header_bytes = 1,
                                           .header = {(unsigned char)i},
                                           .payload = node->own,
                                           .payload_bytes = slot->bytes,
                                           .done = slot_sent};
    }
    char name[KV_NET_PEER_NAME];
    snprintf(name, sizeof(name), "worker %d", (int)peer);
    return kv_net_connect(node->net, peer, name, address, bytes);
}

static void start_stream(node_t *node, int32_t peer)
{
    for (int i = 0; i < SLOTS; i++)
        send_slot(&node->streams[peer].slots[i]);
}

/* Whether the number has become so large in time. */
static bool wait_for(node_t *node, const int64_t *number, int64_t least, int64_t patience_ns)
{
    int64_t until = kv_clock_ns() + patience_ns;
    kv_mutex_lock(&node->lock);
    while (*number < least && kv_clock_ns() < until)
        kv_cond_wait_until(&node->changed, &node->lock, until);
    bool reached = *number >= least;
    kv_mutex_unlock(&node->lock);
    return reached;
}

static int64_t read_number(node_t *node, const int64_t *number)
{
    kv_mutex_lock(&node->lock);
    int64_t value = *number;
    kv_mutex_unlock(&node->lock);
    return value;
}

static void stop_stream(node_t *node, int32_t peer)
{
    kv_mutex_lock(&node->lock);
    node->streams[peer].stopped = true;
    kv_mutex_unlock(&node->lock);
}

static void close_node(node_t *node)
{
    for (int32_t peer = 0; peer < NUM_NODES; peer++)
        stop_stream(node, peer);
    int64_t start = kv_clock_ns();
    kv_net_close(node->net);
    CHECK(kv_clock_ns() - start < 5 * SECOND);
    for (int32_t peer = 0; peer < NUM_NODES; peer++) {
        stream_t *stream = &node->streams[peer];
        CHECK_EQ(stream->ended, stream->taken);
        CHECK_EQ(stream->received, stream->arrived);
        CHECK_EQ(stream->wrong, 0);
        CHECK_EQ(stream->after_loss, 0);
        for (int i = 0; i < SLOTS; i++)
            kv_free(stream->slots[i].in);
        kv_free(stream->due);
    }
    kv_net_free(node->net);
    kv_free(node->own);
    kv_cond_fini(&node->changed);
    kv_mutex_fini(&node->lock);
}

/* --------------------------------------------------------------------------- other processes */

static bool give(int control, const void *data, size_t bytes)
{
    return send(control, data, bytes, MSG_NOSIGNAL) == (ssize_t)bytes;
}

/* What a peer says when it is asked whether node 0 is lost. */
typedef struct report {
    bool told;
    int64_t wrong;
} report_t;

/* A peer's whole life. Nothing is written: what it thinks is seen by node 0. */
static int run_peer(int32_t self)
{
    static node_t node;
    unsigned char address[KV_NET_ADDRESS_BYTES];
    size_t own_bytes = 0;
    ssize_t bytes = recv(CONTROL_FD, address, sizeof(address), 0);
    if (bytes <= 0)
        return 0;
    if (open_node(&node, self) != KV_OK || join(&node, 0, address, (size_t)bytes) != KV_OK)
        return 1;
    kv_net_address(node.net, address, &own_bytes);
    if (!give(CONTROL_FD, address, own_bytes))
        return 1;
    start_stream(&node, 0);
    while (recv(CONTROL_FD, address, sizeof(address), 0) > 0) {
        report_t report = {.told = wait_for(&node, &node.streams[0].lost, 1, PATIENCE)};
        report.wrong = read_number(&node, &node.streams[0].wrong);
        if (!give(CONTROL_FD, &report, sizeof(report)))
            return 1;
    }
    /* Without a goodbye, as when a user ends a script. */
    return 0;
}

static void start_child(int32_t number)
{
    int pair[2];
    char text[16];
    snprintf(text, sizeof(text), "%d", (int)number);
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
        return;
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (pair[1] == CONTROL_FD ? fcntl(CONTROL_FD, F_SETFD, 0) == 0
                                  : dup2(pair[1], CONTROL_FD) >= 0)
            execl("/proc/self/exe", "test_net_ucx", "--peer", text, (char *)NULL);
        _exit(127);
    }
    close(pair[1]);
    children[number] = (child_t){.pid = pid, .control = pair[0]};
}

static void end_child(int32_t number)
{
    child_t *child = &children[number];
    if (child->pid <= 0)
        return;
    kill(child->pid, SIGKILL);
    waitpid(child->pid, NULL, 0);
    close(child->control);
    child->pid = 0;
}

/* Both ways connected with a child, both streams running. */
static bool meet(node_t *node, int32_t number)
{
    unsigned char address[KV_NET_ADDRESS_BYTES];
    size_t own_bytes = 0;
    kv_net_address(node->net, address, &own_bytes);
    if (!CHECK(give(children[number].control, address, own_bytes)))
        return false;
    ssize_t bytes = recv(children[number].control, address, sizeof(address), 0);
    if (!CHECK(bytes > 0) || !CHECK_STATUS(join(node, number, address, (size_t)bytes), KV_OK))
        return false;
    start_stream(node, number);
    return CHECK(wait_for(node, &node->streams[number].ended, 1, PATIENCE)) &&
           CHECK(wait_for(node, &node->streams[number].received, 1, PATIENCE));
}

/* Says why there is nothing to test. */
static bool is_missing(kv_status_t status)
{
    if (status != KV_NOT_BUILT)
        return false;
    printf("    skipped: %s\n", kv_status_message(status));
    return true;
}

/* ------------------------------------------------------------------------------------- tests */

static bool opens_with(const char *ports, const char *interface, const char *part)
{
    kv_net_config_t config = settings(0);
    kv_net_handlers_t handlers = {.arrive = arrive, .lost = lost};
    kv_net_t *net = NULL;
    config.port_range = ports;
    config.interface = interface;
    kv_status_t status = kv_net_open(&config, &handlers, &net);
    if (is_missing(status))
        return false;
    if (part == NULL) {
        if (CHECK_STATUS(status, KV_OK))
            kv_net_close(net);
        kv_net_free(net);
    } else if (CHECK_STATUS(status, KV_INVALID) &&
               !CHECK(strstr(kv_status_message(status), part) != NULL)) {
        printf("    %s\n", kv_status_message(status));
    }
    return true;
}

static void settings_that_are_wrong_are_named(void)
{
    if (!opens_with("20000-20100", "lo", NULL))
        return;
    opens_with("20000", "lo", "\"20000\"");
    opens_with("20100-20000", "lo", "20100-20000");
    opens_with("20000-70000", "lo", "20000-70000");
    opens_with(NULL, "nosuch0", "nosuch0");
    setenv("KVSTORE_UCX_TLS", "all", 1);
    opens_with(NULL, "lo", "KVSTORE_UCX_TLS");
    unsetenv("KVSTORE_UCX_TLS");
}

static void on_signal(int number)
{
    (void)number;
}

/* Runs before any other test that opens UCX when it is named first: loading it takes signals. */
static void signals_stay_with_the_process(void)
{
    static const int numbers[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGHUP, SIGINT, SIGALRM};
    enum { COUNT = sizeof(numbers) / sizeof(numbers[0]) };
    struct sigaction before[COUNT];
    for (int i = 0; i < COUNT; i++) {
        struct sigaction mine = {.sa_handler = i % 2 == 0 ? on_signal : SIG_DFL};
        sigaction(numbers[i], &mine, &before[i]);
    }
    if (opens_with(NULL, "lo", NULL)) {
        for (int i = 0; i < COUNT; i++) {
            struct sigaction now;
            CHECK(sigaction(numbers[i], NULL, &now) == 0);
            CHECK(now.sa_handler == (i % 2 == 0 ? on_signal : SIG_DFL));
        }
    }
    for (int i = 0; i < COUNT; i++)
        sigaction(numbers[i], &before[i], NULL);
}

static void what_is_no_address_is_refused(void)
{
    static node_t node;
    kv_status_t status = open_node(&node, 0);
    if (is_missing(status) || !CHECK_STATUS(status, KV_OK))
        return;
    unsigned char address[KV_NET_ADDRESS_BYTES];
    size_t bytes = 0;
    kv_net_address(node.net, address, &bytes);
    address[bytes / 2] ^= 1;
    CHECK_STATUS(join(&node, 1, address, bytes), KV_OK);
    address[bytes / 2] ^= 1;
    CHECK_STATUS(join(&node, 2, address, bytes - 1), KV_OK);
    CHECK_STATUS(join(&node, 3, address, 5), KV_OK);
    for (int32_t peer = 1; peer <= 3; peer++) {
        char why[KV_MESSAGE_BYTES] = "";
        CHECK(wait_for(&node, &node.streams[peer].lost, 1, PATIENCE));
        CHECK(kv_net_is_lost(node.net, peer, why, sizeof(why)));
        CHECK(strstr(why, "address") != NULL);
    }
    close_node(&node);
}

static void killed_peers_are_told_in_time_and_the_others_go_on(void)
{
    static node_t node;
    kv_status_t status = open_node(&node, 0);
    if (is_missing(status) || !CHECK_STATUS(status, KV_OK))
        return;
    stream_t *survivor = &node.streams[SURVIVOR];
    uint64_t state = 1;
    int64_t longest = 0;
    bool met = meet(&node, SURVIVOR);
    for (int32_t victim = FIRST_VICTIM; met && victim < NUM_NODES; victim++) {
        stream_t *stream = &node.streams[victim];
        if (!meet(&node, victim))
            break;
        CHECK(wait_for(&node, &stream->received, test_between(&state, 1, 60), PATIENCE));
        int64_t killed_ns = kv_clock_ns();
        kill(children[victim].pid, SIGKILL);
        if (!CHECK(wait_for(&node, &stream->lost, 1, LOST_WITHIN)))
            break;
        if (stream->lost_ns - killed_ns > longest)
            longest = stream->lost_ns - killed_ns;
        CHECK(wait_for(&node, &stream->ended, read_number(&node, &stream->taken), PATIENCE));
        CHECK(wait_for(&node, &stream->received, read_number(&node, &stream->arrived), PATIENCE));
        end_child(victim);
        int64_t seen = read_number(&node, &survivor->received);
        int64_t gone = read_number(&node, &survivor->ended);
        CHECK(wait_for(&node, &survivor->received, seen + 2 * SLOTS, PATIENCE));
        CHECK(wait_for(&node, &survivor->ended, gone + 2 * SLOTS, PATIENCE));
    }
    for (int32_t victim = FIRST_VICTIM; met && victim < NUM_NODES; victim++)
        CHECK_EQ(read_number(&node, &node.streams[victim].lost), 1);
    CHECK_EQ(read_number(&node, &survivor->lost), 0);
    close_node(&node);
    end_child(SURVIVOR);
    printf("    at the latest %.0f ms after the kill\n", (double)longest / 1e6);
}

/* It goes on afterwards, with messages of the ended session in its socket, and must neither take
 * their memory's later contents for a value nor harm whoever has dropped it. */
static void a_peer_that_stands_still_can_be_dropped(void)
{
    static node_t node;
    kv_status_t status = open_node(&node, 0);
    if (is_missing(status) || !CHECK_STATUS(status, KV_OK))
        return;
    stream_t *stream = &node.streams[FROZEN];
    if (meet(&node, FROZEN)) {
        char lanes[256];
        kv_net_lanes(node.net, FROZEN, lanes, sizeof(lanes));
        printf("    lanes: %s\n", lanes);
        CHECK(strstr(lanes, "tcp/lo") != NULL);
        CHECK(strstr(lanes, "posix") == NULL && strstr(lanes, "sysv") == NULL);
        kill(children[FROZEN].pid, SIGSTOP);
        int state = 0;
        CHECK(waitpid(children[FROZEN].pid, &state, WUNTRACED) > 0 && WIFSTOPPED(state));
        kv_net_drop(node.net, FROZEN, "it stands still");
        CHECK(wait_for(&node, &stream->lost, 1, LOST_WITHIN));
        CHECK(wait_for(&node, &stream->ended, read_number(&node, &stream->taken), LOST_WITHIN));
        CHECK(
            wait_for(&node, &stream->received, read_number(&node, &stream->arrived), LOST_WITHIN));
        for (size_t i = 0; i < LARGE_BYTES; i++)
            node.own[i] ^= 0xff;
        kill(children[FROZEN].pid, SIGCONT);
        report_t report = {0};
        CHECK(give(children[FROZEN].control, "", 1));
        CHECK(recv(children[FROZEN].control, &report, sizeof(report), 0) == sizeof(report));
        CHECK(report.told);
        CHECK_EQ(report.wrong, 0);
        end_child(FROZEN);
        for (size_t i = 0; i < LARGE_BYTES; i++)
            node.own[i] ^= 0xff;
        meet(&node, LATE);
    }
    close_node(&node);
    end_child(LATE);
}

static const test_t TESTS[] = {
    TEST(signals_stay_with_the_process),
    TEST(settings_that_are_wrong_are_named),
    TEST(what_is_no_address_is_refused),
    TEST(killed_peers_are_told_in_time_and_the_others_go_on),
    TEST(a_peer_that_stands_still_can_be_dropped),
};

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "--peer") == 0)
        return run_peer((int32_t)strtol(argv[2], NULL, 10));
    for (int32_t number = 1; number < NUM_NODES; number++)
        start_child(number);
    int status = test_main(argc, argv, TESTS, sizeof(TESTS) / sizeof(TESTS[0]));
    for (int32_t number = 1; number < NUM_NODES; number++)
        end_child(number);
    return status;
}
