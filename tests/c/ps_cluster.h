/* Clients and servers of one process, and values whose sums are known. */
#ifndef KV_TESTS_C_PS_CLUSTER_H
#define KV_TESTS_C_PS_CLUSTER_H

#include "ps/server.h"
#include "ps_calls.h"

enum { MAX_WORKERS = 7, MAX_SERVERS = 3, NUM_KEYS = 6 };

/* Elements of the values: none, one, a page, a slice and a bit, several and an odd rest. */
static const int64_t lengths[NUM_KEYS] = {0, 1, 1024, (256 << 10) + 17, (5 << 18) + 12345, 3};

typedef struct worker {
    kv_client_t *client;
    kv_net_t *net;
    kv_remote_t *remotes[NUM_KEYS];
    float *values[NUM_KEYS], *outs[NUM_KEYS];
    int64_t lengths[NUM_KEYS];
} worker_t;

typedef struct cluster {
    int32_t num_workers, num_servers;
    kv_engine_t *engine;
    kv_team_t *team;
    worker_t workers[MAX_WORKERS];
    kv_server_t *servers[MAX_SERVERS];
    kv_net_t *nets[MAX_SERVERS];
} cluster_t;

/* ---------------------------------------------------------------------------------- values */

/* What a worker pushes in a round; worker -1: the first values. Sums of them are exact. */
static inline float part_of(int32_t worker, int64_t key, int64_t round, int64_t i)
{
    return (float)((i + key) % 251 + 3 * round + 100 * (worker + 1));
}

static inline void fill(worker_t *me, int32_t worker, int64_t key, int64_t round)
{
    for (int64_t i = 0; i < me->lengths[key]; i++)
        me->values[key][i] = part_of(worker, key, round, i);
}

/* The value of a key after this round, -1: the first one. Gives the first element that is not, -1
 * when all are. */
static inline int64_t find_wrong(const float *out, int64_t length, int32_t num_workers, int64_t key,
                                 int64_t round)
{
    for (int64_t i = 0; i < length; i++) {
        float due = 0;
        for (int32_t worker = 0; round >= 0 && worker < num_workers; worker++)
            due += part_of(worker, key, round, i);
        if (round < 0)
            due = part_of(-1, key, 0, i);
        if (out[i] != due)
            return i;
    }
    return -1;
}

static inline bool is_sum(const float *out, int64_t length, int32_t num_workers, int64_t key,
                          int64_t round)
{
    int64_t wrong = find_wrong(out, length, num_workers, key, round);
    if (wrong >= 0)
        printf("    key %d, element %d of %d after round %d: %g\n", (int)key, (int)wrong,
               (int)length, (int)round, (double)out[wrong]);
    return wrong < 0;
}

static inline void clear(worker_t *me, int64_t key)
{
    memset(me->outs[key], 0xff, (size_t)me->lengths[key] * sizeof(float));
}

/* --------------------------------------------------------------------------------- cluster */

static inline kv_net_t *open_net(const cluster_t *cluster, int32_t self,
                                 const kv_net_handlers_t *handlers, const char *faults,
                                 uint64_t seed)
{
    kv_net_config_t config = {.transport = faults != NULL ? "faulty" : "inproc",
                              .self = self,
                              .num_peers = cluster->num_workers + cluster->num_servers,
                              .session = {9},
                              .seed = seed * 100 + (uint64_t)self,
                              .faults = faults};
    kv_net_t *net = NULL;
    CHECK_STATUS(kv_net_open(&config, handlers, &net), KV_OK);
    return net;
}

static inline void connect_net(kv_net_t *net, int32_t peer, const char *role, int32_t index,
                               const kv_net_t *other)
{
    unsigned char address[KV_NET_ADDRESS_BYTES];
    char name[KV_NET_PEER_NAME];
    size_t bytes = 0;
    kv_net_address(other, address, &bytes);
    snprintf(name, sizeof name, "%s %d", role, (int)index);
    CHECK_STATUS(kv_net_connect(net, peer, name, address, bytes), KV_OK);
}

static inline void worker_lengths(worker_t *me, const int64_t *some)
{
    for (int64_t key = 0; key < NUM_KEYS; key++) {
        free(me->values[key]);
        free(me->outs[key]);
        me->lengths[key] = some[key];
        me->values[key] = malloc((size_t)some[key] * sizeof(float) + 1);
        me->outs[key] = malloc((size_t)some[key] * sizeof(float) + 1);
    }
}

/* `faults` of each worker's endpoint and of each server's; NULL: none. */
static inline cluster_t *cluster_new(int32_t num_workers, int32_t num_servers,
                                     const char *worker_faults, const char *server_faults,
                                     uint64_t seed)
{
    cluster_t *cluster = calloc(1, sizeof *cluster);
    cluster->num_workers = num_workers;
    cluster->num_servers = num_servers;
    CHECK_STATUS(kv_engine_new("threaded", 1, 2, &cluster->engine), KV_OK);
    CHECK_STATUS(kv_team_new(1, &cluster->team), KV_OK);
    bool faulty = worker_faults != NULL || server_faults != NULL;
    for (int32_t i = 0; i < num_servers; i++) {
        kv_server_config_t config = {.engine = cluster->engine,
                                     .host = {kv_kernels_at(0), cluster->team, 1},
                                     .index = i,
                                     .num_workers = num_workers,
                                     .num_servers = num_servers};
        CHECK_STATUS(kv_server_new(&config, &cluster->servers[i]), KV_OK);
        kv_net_handlers_t handlers = kv_server_handlers(cluster->servers[i]);
        const char *faults = faulty && server_faults == NULL ? "" : server_faults;
        cluster->nets[i] = open_net(cluster, num_workers + i, &handlers, faults, seed);
        kv_server_attach(cluster->servers[i], cluster->nets[i]);
    }
    for (int32_t i = 0; i < num_workers; i++) {
        worker_t *me = &cluster->workers[i];
        kv_client_config_t config = {i, num_workers, num_servers};
        CHECK_STATUS(kv_client_new(&config, &me->client), KV_OK);
        kv_net_handlers_t handlers = kv_client_handlers(me->client);
        const char *faults = faulty && worker_faults == NULL ? "" : worker_faults;
        me->net = open_net(cluster, i, &handlers, faults, seed);
        kv_client_attach(me->client, me->net);
        worker_lengths(me, lengths);
        for (int32_t s = 0; s < num_servers; s++) {
            connect_net(me->net, num_workers + s, "server", s, cluster->nets[s]);
            connect_net(cluster->nets[s], i, "worker", i, me->net);
        }
    }
    kv_caller_t caller = patient();
    for (int32_t i = 0; i < num_workers; i++)
        CHECK_STATUS(kv_net_wait_ready(cluster->workers[i].net, &caller), KV_OK);
    return cluster;
}

static inline void worker_close(worker_t *me)
{
    kv_net_close(me->net);
    kv_client_close(me->client);
}

static inline void cluster_free(cluster_t *cluster)
{
    for (int32_t i = 0; i < cluster->num_workers; i++) {
        worker_t *me = &cluster->workers[i];
        worker_close(me);
        kv_net_free(me->net);
        for (int key = 0; key < NUM_KEYS; key++) {
            kv_remote_free(me->remotes[key]);
            free(me->values[key]);
            free(me->outs[key]);
        }
        kv_client_free(me->client);
    }
    for (int32_t i = 0; i < cluster->num_servers; i++) {
        kv_net_close(cluster->nets[i]);
        kv_server_stop(cluster->servers[i]);
        kv_server_free(cluster->servers[i]);
        kv_net_free(cluster->nets[i]);
    }
    kv_engine_close(cluster->engine);
    kv_engine_stop(cluster->engine, NULL);
    kv_engine_free(cluster->engine);
    kv_team_stop(cluster->team);
    kv_team_free(cluster->team);
    free(cluster);
}

/* ----------------------------------------------------------------------------------- calls */

typedef enum verb { PUSH = 1, PULL = 2, PUSHPULL = 3 } verb_t;

/* A call on the keys [first, end); values are those of `round`. */
static inline void move_init(cluster_t *cluster, int32_t rank, test_call_t *call, verb_t verb,
                             int64_t first, int64_t end, int64_t round)
{
    worker_t *me = &cluster->workers[rank];
    call_init(call, KV_CLIENT_MOVE);
    for (int64_t key = first; key < end; key++) {
        if (verb & PUSH)
            fill(me, rank, key, round);
        if (verb & PULL)
            clear(me, key);
        call_add(call, me->remotes[key], verb & PUSH ? me->values[key] : NULL,
                 verb & PULL ? me->outs[key] : NULL);
    }
}

static inline void move_start(cluster_t *cluster, int32_t rank, test_call_t *call, verb_t verb,
                              int64_t first, int64_t end, int64_t round)
{
    move_init(cluster, rank, call, verb, first, end, round);
    call_start(cluster->workers[rank].client, call);
}

static inline void declare_init(cluster_t *cluster, int32_t rank, test_call_t *call)
{
    worker_t *me = &cluster->workers[rank];
    call_init(call, KV_CLIENT_DECLARE);
    for (int64_t key = 0; key < NUM_KEYS; key++) {
        fill(me, -1, key, 0);
        call_add_key(call, key, me->lengths[key], me->values[key]);
    }
}

static inline void take_remotes(worker_t *me, const test_call_t *call)
{
    for (int64_t key = 0; key < NUM_KEYS; key++)
        me->remotes[key] = call->keys[key].remote;
}

/* Every worker declares all keys. */
static inline void cluster_declare(cluster_t *cluster)
{
    test_call_t calls[MAX_WORKERS];
    for (int32_t rank = cluster->num_workers - 1; rank >= 0; rank--) {
        declare_init(cluster, rank, &calls[rank]);
        call_start(cluster->workers[rank].client, &calls[rank]);
    }
    for (int32_t rank = 0; rank < cluster->num_workers; rank++) {
        if (!CHECK_STATUS(call_wait(&calls[rank]), KV_OK))
            printf("    %s\n", calls[rank].message);
        take_remotes(&cluster->workers[rank], &calls[rank]);
    }
}

static inline void check_outs(cluster_t *cluster, int32_t rank, int64_t first, int64_t end,
                              int64_t round)
{
    const worker_t *me = &cluster->workers[rank];
    for (int64_t key = first; key < end; key++)
        CHECK(is_sum(me->outs[key], me->lengths[key], cluster->num_workers, key, round));
}

static inline void wait_good(test_call_t *call)
{
    if (!CHECK_STATUS(call_wait(call), KV_OK))
        printf("    %s\n", call->message);
}

#endif
