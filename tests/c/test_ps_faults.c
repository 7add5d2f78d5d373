/* Clients and servers when memory is short, connections break, messages come late or in another
 * order, and callers give up: every call ends, with the right bytes or with an error. */
#include "ps_cluster.h"

enum { ROUNDS = 3, MAX_CALLS = 64, SEEDS = 120, NUM_FAULTS = 8 };

/* Shorter than usual: a test goes through many clusters. */
static const int64_t short_lengths[NUM_KEYS] = {0, 1, 1024, 20000, 90000, 3};

/* ----------------------------------------------------------------------------- calls under way */

/* A call with memory of its own, which goes when the call has ended or was given up. */
typedef struct flight {
    test_call_t call;
    int32_t rank;
    verb_t verb;
    int64_t round; /* whose sum it sees */
    float *values[NUM_KEYS], *outs[NUM_KEYS];
    bool begun, landed;
    bool wrong; /* it saw something else */
} flight_t;

typedef struct fleet {
    cluster_t *cluster;
    flight_t *flights;
    int count;
    bool stopped; /* a call could not begin: the rounds of the workers would not be the same */
} fleet_t;

static void flight_start(fleet_t *fleet, int32_t rank, verb_t verb, int64_t first, int64_t end,
                         int64_t round, int32_t priority)
{
    worker_t *me = &fleet->cluster->workers[rank];
    if (fleet->stopped || !CHECK(fleet->count < MAX_CALLS))
        return;
    flight_t *flight = &fleet->flights[fleet->count++];
    *flight = (flight_t){.rank = rank, .verb = verb, .round = round};
    call_init(&flight->call, KV_CLIENT_MOVE);
    flight->call.base.priority = priority;
    for (int64_t key = first; key < end; key++) {
        size_t bytes = (size_t)me->lengths[key] * sizeof(float);
        if (verb & PUSH) {
            fill(me, rank, key, round);
            flight->values[key] = malloc(bytes + 1);
            memcpy(flight->values[key], me->values[key], bytes);
        }
        if (verb & PULL)
            flight->outs[key] = calloc(1, bytes + 1);
        call_add(&flight->call, me->remotes[key], flight->values[key], flight->outs[key]);
    }
    kv_status_t status = kv_client_start(me->client, &flight->call.base);
    flight->begun = status == KV_OK;
    if (!flight->begun) {
        fleet->stopped = true;
        CHECK(status == KV_PEER_LOST || status == KV_NO_MEMORY);
        flight->call.status = status;
    }
}

static void free_memory(flight_t *flight)
{
    for (int64_t key = 0; key < NUM_KEYS; key++) {
        free(flight->values[key]);
        free(flight->outs[key]);
        flight->values[key] = flight->outs[key] = NULL;
    }
}

/* Looks at a call that has ended. What a pull sees is the sum only if no push before it has failed;
 * that turns out later. */
static void flight_land(const fleet_t *fleet, flight_t *flight)
{
    const worker_t *me = &fleet->cluster->workers[flight->rank];
    flight->landed = true;
    for (int64_t key = 0; key < NUM_KEYS; key++) {
        if (!flight->begun || flight->call.status != KV_OK || flight->outs[key] == NULL)
            continue;
        if (flight->verb == PUSHPULL)
            CHECK(is_sum(flight->outs[key], me->lengths[key], fleet->cluster->num_workers, key,
                         flight->round));
        else if (find_wrong(flight->outs[key], me->lengths[key], fleet->cluster->num_workers, key,
                            flight->round) >= 0)
            flight->wrong = true;
    }
    free_memory(flight);
}

static void give_up(const fleet_t *fleet, flight_t *flight)
{
    char missing[64];
    if (!flight->begun || flight->landed)
        return;
    kv_client_cancel(fleet->cluster->workers[flight->rank].client, &flight->call.base, missing,
                     sizeof missing);
    free_memory(flight);
}

/* What the control plane does when a node is gone. */
static void tell_everybody(const fleet_t *fleet, const char *why)
{
    const cluster_t *cluster = fleet->cluster;
    for (int32_t i = 0; i < cluster->num_servers; i++)
        kv_server_lose(cluster->servers[i], why);
    for (int32_t i = 0; i < cluster->num_workers; i++)
        kv_client_lose(cluster->workers[i].client, why);
}

/* Waits for all calls; tells everybody when one fails or none ends for `patience_ns`. Returns how
 * many have failed. */
static int fleet_land(fleet_t *fleet, int64_t patience_ns)
{
    int left = 0;
    int failed = 0;
    bool told = false;
    int64_t start = kv_clock_ns();
    int64_t news = start;
    do {
        left = 0;
        for (int i = 0; i < fleet->count; i++) {
            flight_t *flight = &fleet->flights[i];
            bool over = !flight->begun || atomic_load(&flight->call.num_done) > 0;
            left += !over;
            if (!over || flight->landed)
                continue;
            failed += flight->call.status != KV_OK;
            flight_land(fleet, flight);
            news = kv_clock_ns();
        }
        if (!told && left > 0 && (failed > 0 || kv_clock_ns() - news > patience_ns)) {
            told = true;
            tell_everybody(fleet, "the test says so");
        }
    } while (left > 0 && has_time_left(start));
    for (int i = 0; i < fleet->count; i++) {
        const flight_t *flight = &fleet->flights[i];
        kv_status_t status = flight->call.status;
        CHECK_EQ(atomic_load(&flight->call.num_done), flight->begun);
        CHECK(status == KV_OK || status == KV_PEER_LOST || status == KV_NO_MEMORY);
        if (status != KV_OK && flight->begun && !CHECK(flight->call.message[0] == 'k'))
            printf("    %s\n", flight->call.message);
        CHECK(failed > 0 || !flight->wrong);
    }
    free(fleet->flights);
    return failed;
}

/* Rounds of pushes, pulls and both, all of them begun before the first has ended. Each worker
 * chooses calls of its own; it pulls only after it has pushed. */
static void launch(fleet_t *fleet, uint64_t *seed)
{
    cluster_t *cluster = fleet->cluster;
    for (int64_t round = 0; round < ROUNDS; round++) {
        for (int32_t rank = 0; rank < cluster->num_workers; rank++) {
            int64_t middle = test_between(seed, 0, NUM_KEYS);
            int64_t bounds[] = {0, middle, NUM_KEYS};
            for (int part = 0; part < 2; part++) {
                int64_t first = bounds[part];
                int64_t end = bounds[part + 1];
                bool both = test_between(seed, 0, 1) > 0;
                int32_t priority = (int32_t)test_between(seed, -2, 2);
                flight_start(fleet, rank, both ? PUSHPULL : PUSH, first, end, round, priority);
                if (!both && test_between(seed, 0, 1) > 0)
                    flight_start(fleet, rank, PULL, first, end, round,
                                 (int32_t)test_between(seed, -2, 2));
            }
        }
    }
}

/* -------------------------------------------------------------------------------------- faults */

/* Declares all keys, where that may fail; false when it did. */
static bool try_declare(cluster_t *cluster)
{
    test_call_t calls[MAX_WORKERS];
    bool begun[MAX_WORKERS];
    bool good = true;
    bool told = false;
    fleet_t fleet = {.cluster = cluster};
    for (int32_t rank = 0; rank < cluster->num_workers; rank++) {
        worker_lengths(&cluster->workers[rank], short_lengths);
        declare_init(cluster, rank, &calls[rank]);
        begun[rank] = kv_client_start(cluster->workers[rank].client, &calls[rank].base) == KV_OK;
        good = good && begun[rank];
    }
    int left = 1;
    int64_t start = kv_clock_ns();
    while (left > 0 && has_time_left(start)) {
        left = 0;
        for (int32_t rank = 0; rank < cluster->num_workers; rank++) {
            bool over = !begun[rank] || atomic_load(&calls[rank].num_done) > 0;
            left += !over;
            good = good && !(over && begun[rank] && calls[rank].status != KV_OK);
        }
        if (!told && (!good || kv_clock_ns() - start > SECOND_NS)) {
            tell_everybody(&fleet, "the test says so");
            told = true;
        }
    }
    for (int32_t rank = 0; rank < cluster->num_workers; rank++)
        take_remotes(&cluster->workers[rank], &calls[rank]);
    for (int32_t rank = 0; rank < cluster->num_workers; rank++)
        good = good && cluster->workers[rank].remotes[0] != NULL;
    return good;
}

static void run_with_faults(uint64_t number, int *failed, int *good)
{
    uint64_t seed = number;
    char faults[64] = "";
    int32_t num_workers = (int32_t)test_between(&seed, 1, 3);
    int32_t num_servers = (int32_t)test_between(&seed, 1, 3);
    bool on_worker = test_between(&seed, 0, 1) > 0;
    int peer = (int)(on_worker ? num_workers + test_between(&seed, 0, num_servers - 1)
                               : test_between(&seed, 0, num_workers - 1));
    static const char *const names[] = {"kill", "fail", "short", "stall"};
    int kind = (int)test_between(&seed, 0, NUM_FAULTS - 1);
    const char *late = test_between(&seed, 0, 1) > 0 ? "delay=1,reorder" : "reorder";
    if (kind < 4)
        snprintf(faults, sizeof faults, "%s,%s=%d:%d", late, names[kind], peer,
                 (int)test_between(&seed, 1, 25));
    else
        snprintf(faults, sizeof faults, "%s", late);
    cluster_t *cluster = cluster_new(num_workers, num_servers, on_worker ? faults : "reorder",
                                     on_worker ? "reorder" : faults, number);
    int before = atomic_load(&test_failures);
    if (try_declare(cluster)) {
        fleet_t fleet = {.cluster = cluster, .flights = calloc(MAX_CALLS, sizeof(flight_t))};
        launch(&fleet, &seed);
        if (kind == 4) /* somebody loses patience */
            for (int i = 0; i < 4; i++)
                give_up(&fleet, &fleet.flights[test_between(&seed, 0, fleet.count - 1)]);
        int bad = fleet_land(&fleet, kind == 3 ? SECOND_NS / 4 : 20 * SECOND_NS);
        *failed += bad > 0;
        *good += bad == 0;
        if (kind > 4)
            CHECK_EQ(bad, 0);
    } else {
        *failed += 1;
        CHECK(kind < 4);
    }
    cluster_free(cluster);
    if (atomic_load(&test_failures) != before)
        printf("    seed %d: %d workers, %d servers, %s on %s\n", (int)number, (int)num_workers,
               (int)num_servers, faults, on_worker ? "workers" : "servers");
}

static void faults_end_every_call_with_the_right_bytes_or_an_error(void)
{
    int failed = 0;
    int good = 0;
    for (uint64_t number = 1; number <= SEEDS; number++)
        run_with_faults(number, &failed, &good);
    CHECK(failed > SEEDS / 8); /* the faults are hit, and not by all */
    CHECK(good > SEEDS / 4);
}

/* -------------------------------------------------------------------------------------- cancel */

static void a_call_may_be_given_up_at_any_time(void)
{
    for (uint64_t number = 1; number <= 60; number++) {
        uint64_t seed = number;
        cluster_t *cluster = cluster_new(2, 2, "reorder", "reorder", number);
        if (CHECK(try_declare(cluster))) {
            fleet_t fleet = {.cluster = cluster, .flights = calloc(MAX_CALLS, sizeof(flight_t))};
            launch(&fleet, &seed);
            for (int i = 0; i < fleet.count; i++) {
                if (test_between(&seed, 0, 2) == 0)
                    give_up(&fleet, &fleet.flights[i]);
                for (int64_t yields = test_between(&seed, 0, 20); yields > 0; yields--)
                    sched_yield();
            }
            /* Transfers are short here, so nobody was dropped, and all rounds come to an end. */
            CHECK_EQ(fleet_land(&fleet, 20 * SECOND_NS), 0);
        }
        cluster_free(cluster);
    }
}

/* -------------------------------------------------------------------------------------- memory */

static void without_memory_a_call_fails_and_nothing_is_left(void)
{
    bool all_good = false;
    int failed = 0;
    for (int64_t nth = 1; !all_good && CHECK(nth < 2000); nth++) {
        uint64_t seed = 5;
        cluster_t *cluster = cluster_new(2, 2, NULL, NULL, 0);
        kv_fault_set("alloc", nth);
        bool good = try_declare(cluster);
        if (good) {
            fleet_t fleet = {.cluster = cluster, .flights = calloc(MAX_CALLS, sizeof(flight_t))};
            launch(&fleet, &seed);
            good = fleet_land(&fleet, 2 * SECOND_NS) == 0;
        }
        bool hit = kv_fault_set("alloc", 0) >= nth;
        failed += !good;
        CHECK(good || hit);
        all_good = !hit;
        cluster_free(cluster);
    }
    CHECK(failed > 10);
}

static const test_t tests[] = {
    TEST(faults_end_every_call_with_the_right_bytes_or_an_error),
    TEST(a_call_may_be_given_up_at_any_time),
    TEST(without_memory_a_call_fails_and_nothing_is_left),
};

TEST_MAIN(tests)
