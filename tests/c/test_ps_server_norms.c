/* Steps that take norms of all slices of a value: what a server tells the others, what it makes of
 * what they tell, and that a round is taken by all slices or by none. */
#include "ps_peers.h"
#include <math.h>

enum { OPTIMIZER = 7, OTHER = 1, COUNT = 4 }; /* `OTHER`: a server's number among servers */

/* w -= 0.5 * |w| / |g| * g, or LAMB with its defaults. */
static void add_optimizer(cluster_t *cluster, const char *name)
{
    const kv_optim_class_t *optim = kv_optim_class_find(name);
    kv_optim_numbers_t numbers = {
        .learning_rate = 1, .rescale_grad = 1, .clip_gradient = NAN, .lazy_update = true};
    for (int i = 0; i < optim->num_params; i++) {
        numbers.params[i] = optim->params[i].fallback;
        if (strcmp(optim->params[i].name, "eta") == 0)
            numbers.params[i] = 0.5;
    }
    CHECK_STATUS(kv_server_add_optimizer(cluster->server, OPTIMIZER, 1, optim, &numbers), KV_OK);
}

static cluster_t *start(int32_t num_workers, const char *optimizer, bool async)
{
    cluster_t *cluster =
        cluster_start((plan_t){.num_workers = num_workers, .num_others = 1, .async = async});
    add_optimizer(cluster, optimizer);
    return cluster;
}

static void init_part(cluster_t *cluster, uint64_t request, uint32_t slice, uint64_t num_slices,
                      float value)
{
    kv_wire_record_t record = floats(KV_WIRE_INIT, request, slice, 1, COUNT);
    record.t = num_slices;
    push(cluster, 0, record, value);
}

static kv_wire_record_t stepping(kv_wire_action_t action, uint64_t request, uint32_t slice,
                                 uint64_t round, const char *optimizer, int64_t t)
{
    kv_wire_record_t record = floats(action, request, slice, round, COUNT);
    kv_step_t step = {.optim = kv_optim_class_find(optimizer), .lr = 1, .t = t, .ratio = 1};
    kv_wire_put_step(&record, OPTIMIZER, &step);
    record.flags |= KV_WIRE_SHARES_NORMS;
    return record;
}

static void push_lars(cluster_t *cluster, int32_t worker, uint64_t request, uint32_t slice,
                      uint64_t round, float value)
{
    push(cluster, worker,
         stepping(KV_WIRE_PUSHPULL, request, slice, round, "lars", (int64_t)round + 1), value);
}

static kv_wire_header_t sums_of(uint32_t slice, uint32_t num_slices, uint64_t round, double weight,
                                double other)
{
    kv_wire_header_t header = {
        .kind = KV_WIRE_NORMS,
        .count = num_slices,
        .record = {.action = KV_WIRE_SQUARES, .key = KEY, .slice = slice, .round = round}};
    kv_norm_sums_t sums = {weight, other, weight, other};
    kv_wire_put_sums(&header.record, &sums);
    return header;
}

static void tell(cluster_t *cluster, kv_wire_header_t header, const char *sentence)
{
    size_t bytes = strlen(sentence);
    header.record.bytes = bytes;
    send_message(cluster, cluster->num_workers, header, sentence, bytes);
}

/* What the server has told the other one of a slice, NULL: nothing yet. */
static const answer_t *find_told(cluster_t *cluster, uint32_t slice, uint64_t round)
{
    peer_t *peer = &cluster->peers[cluster->num_workers];
    kv_mutex_lock(&peer->mutex);
    const answer_t *answer = peer->answers;
    while (answer != NULL && (answer->kind != KV_WIRE_NORMS || answer->record.slice != slice ||
                              answer->record.round != round))
        answer = answer->next;
    kv_mutex_unlock(&peer->mutex);
    return answer;
}

static const answer_t *await_told(cluster_t *cluster, uint32_t slice, uint64_t round)
{
    static const answer_t none = {.record.status = KV_STATUS_COUNT};
    const answer_t *answer = NULL;
    WAIT_UNTIL((answer = find_told(cluster, slice, round)) != NULL);
    return answer != NULL ? answer : &none;
}

static bool check_near(const answer_t *answer, float value)
{
    float got = NAN;
    if (!CHECK_EQ(answer->record.status, KV_OK) || !CHECK_EQ(answer->bytes, COUNT * sizeof got))
        return false;
    for (int i = 0; i < COUNT; i++) {
        memcpy(&got, answer->data + (size_t)i * sizeof got, sizeof got);
        if (!CHECK(fabsf(got - value) <= 1e-6f * (1 + fabsf(value)))) {
            printf("    %g is not %g\n", (double)got, (double)value);
            return false;
        }
    }
    return true;
}

/* ------------------------------------------------------------------------------------- rounds */

static void a_step_waits_for_the_sums_of_other_servers(void)
{
    cluster_t *cluster = start(2, "lars", false);
    init_part(cluster, 1, 0, 2, 1);
    check_done(cluster, 0, 1);
    push_lars(cluster, 0, 2, 0, 0, 0.5f);
    push_lars(cluster, 1, 2, 0, 0, 1.5f);
    const answer_t *told = await_told(cluster, 0, 0);
    kv_norm_sums_t sums;
    kv_wire_get_sums(&told->record, &sums);
    CHECK_EQ(told->record.key, KEY);
    CHECK_EQ(told->record.status, KV_OK);
    CHECK(sums.weight == 4 && sums.other == 16 && sums.exact_weight == 4 && sums.exact_other == 16);
    settle(cluster, 0);
    CHECK(answer_to(&cluster->peers[0], 2) == NULL);
    tell(cluster, sums_of(1, 2, 0, 12, 84), ""); /* norms 4 and 10 */
    check_near(await(cluster, 0, 2), 1 - 0.5f * 4 / 10 * 2);
    check_near(await(cluster, 1, 2), 1 - 0.5f * 4 / 10 * 2);
    /* The other server is first, and a round ahead. */
    tell(cluster, sums_of(1, 2, 1, 12, 84), "");
    tell(cluster, sums_of(1, 2, 2, 12, 84), "");
    for (uint64_t round = 1; round < 3; round++) {
        push_lars(cluster, 0, 10 + round, 0, round, 0);
        push_lars(cluster, 1, 10 + round, 0, round, 0);
        check_near(await(cluster, 0, 10 + round), 1 - 0.5f * 4 / 10 * 2);
    }
    cluster_end(cluster);
}

static void slices_of_one_server_go_together(void)
{
    for (int order = 0; order < 2; order++) {
        cluster_t *cluster = start(1, "lars", false);
        for (uint32_t slice = 0; slice < 3; slice++) {
            init_part(cluster, 1 + slice, slice, 3, (float)slice);
            check_done(cluster, 0, 1 + slice);
        }
        for (uint64_t round = 0; round < 2; round++)
            for (uint32_t i = 0; i < 3; i++)
                push_lars(cluster, 0, 10 + 3 * round + i, order ? 2 - i : i, round, 2);
        /* |w| is sqrt(20), |g| sqrt(48) */
        float rate = 0.5f * sqrtf(20.0f / 48);
        for (uint32_t i = 0; i < 3; i++)
            check_near(await(cluster, 0, 10 + i), (float)(order ? 2 - i : i) - rate * 2);
        for (uint32_t i = 0; i < 3; i++)
            CHECK_EQ(await(cluster, 0, 13 + i)->record.status, KV_OK);
        cluster_end(cluster);
    }
}

static void a_round_that_fails_elsewhere_fails_here(void)
{
    cluster_t *cluster = start(1, "lars", false);
    init_part(cluster, 1, 0, 2, 1);
    check_done(cluster, 0, 1);
    for (uint64_t round = 0; round < 4; round += 2) {
        kv_wire_header_t failed = sums_of(1, 2, round, 0, 0);
        failed.record.status = KV_NO_MEMORY;
        if (round > 0)
            push_lars(cluster, 0, 2 + round, 0, round, 2);
        tell(cluster, failed, "no memory for slice 1 of a key");
        if (round == 0)
            push_lars(cluster, 0, 2, 0, 0, 2);
        check_failed(cluster, 0, 2 + round, KV_NO_MEMORY, "no memory for slice 1 of a key");
        pull(cluster, 0, 20 + round, 0, round + 1);
        check_near(await(cluster, 0, 20 + round), 1);
        push_lars(cluster, 0, 3 + round, 0, round + 1, 0);
        tell(cluster, sums_of(1, 2, round + 1, 12, 84), "");
        check_near(await(cluster, 0, 3 + round), 1);
    }
    cluster_end(cluster);
}

static void a_round_that_fails_here_fails_elsewhere(void)
{
    cluster_t *cluster = start(1, "lars", false);
    init_part(cluster, 1, 0, 2, 1);
    check_done(cluster, 0, 1);
    kv_wire_record_t bad = stepping(KV_WIRE_PUSH, 2, 0, 0, "lars", 1);
    bad.dtype = KV_INT32;
    push(cluster, 0, bad, 1);
    check_failed(cluster, 0, 2, KV_BAD_TYPE, "the value is float32, worker 0 pushed int32");
    const answer_t *told = await_told(cluster, 0, 0);
    CHECK_EQ(told->record.status, KV_BAD_TYPE);
    CHECK_TEXT(told->data, "the value is float32, worker 0 pushed int32");
    /* An optimizer that this server has not got. */
    bad = stepping(KV_WIRE_PUSH, 3, 0, 1, "lars", 2);
    bad.optimizer = 9;
    push(cluster, 0, bad, 1);
    check_failed(cluster, 0, 3, KV_INVALID,
                 "worker 0 pushed with an optimizer that server 0 has not got");
    CHECK(find_told(cluster, 0, 1) == NULL); /* the round before is not over */
    tell(cluster, sums_of(1, 2, 0, 12, 84), "");
    CHECK_EQ(await_told(cluster, 0, 1)->record.status, KV_INVALID);
    tell(cluster, sums_of(1, 2, 1, 12, 84), "");
    push_lars(cluster, 0, 4, 0, 2, 2);
    tell(cluster, sums_of(1, 2, 2, 12, 84), "");
    check_near(await(cluster, 0, 4), 1 - 0.5f * 4 / 10 * 2);
    cluster_end(cluster);
}

/* The state too is as it was. */
static void a_failed_round_of_lamb_leaves_no_trace(void)
{
    static char due[2][COUNT * sizeof(float)];
    for (int fails = 0; fails < 2; fails++) {
        cluster_t *cluster = start(1, "lamb", false);
        uint64_t round = 0;
        for (uint32_t slice = 0; slice < 2; slice++) {
            init_part(cluster, 1 + slice, slice, 2, (float)slice + 1);
            check_done(cluster, 0, 1 + slice);
        }
        for (int again = 0; again < 2; again++) {
            int64_t t = again + 1;
            if (fails) {
                push(cluster, 0, stepping(KV_WIRE_PUSH, 10 + round, 0, round, "lamb", t), 3);
                kv_wire_record_t bad = stepping(KV_WIRE_PUSH, 30 + round, 1, round, "lamb", t);
                bad.dtype = KV_INT32;
                push(cluster, 0, bad, 5);
                CHECK_EQ(await(cluster, 0, 30 + round)->record.status, KV_BAD_TYPE);
                check_failed(cluster, 0, 10 + round, KV_BAD_TYPE,
                             "the value is float32, worker 0 pushed int32");
                round++;
            }
            for (uint32_t slice = 0; slice < 2; slice++)
                push(cluster, 0,
                     stepping(KV_WIRE_PUSHPULL, 50 + 10 * round + slice, slice, round, "lamb", t),
                     (float)slice + 1);
            for (uint32_t slice = 0; slice < 2; slice++) {
                const answer_t *answer = await(cluster, 0, 50 + 10 * round + slice);
                if (!CHECK_EQ(answer->record.status, KV_OK) || again == 0)
                    continue;
                if (!fails)
                    memcpy(due[slice], answer->data, sizeof due[slice]);
                CHECK(memcmp(answer->data, due[slice], sizeof due[slice]) == 0);
            }
            round++;
        }
        cluster_end(cluster);
    }
}

/* ------------------------------------------------------------------------------------ waiting */

static void a_deadline_says_which_server_is_missing(void)
{
    cluster_t *cluster = start(1, "lars", false);
    init_part(cluster, 1, 0, 3, 1);
    init_part(cluster, 2, 2, 3, 1);
    check_done(cluster, 0, 1);
    check_done(cluster, 0, 2);
    cluster->timeout_ms = 300;
    push_lars(cluster, 0, 3, 0, 0, 2);
    push_lars(cluster, 0, 4, 2, 0, 2);
    check_failed(cluster, 0, 3, KV_TIMEOUT,
                 "server 1 or server 2 has not sent the norms of slice 1 for round 0");
    check_failed(cluster, 0, 4, KV_TIMEOUT,
                 "server 1 or server 2 has not sent the norms of slice 1 for round 0");
    tell(cluster, sums_of(1, 3, 0, 1, 1), ""); /* what was pushed stays in its round */
    pull(cluster, 0, 5, 0, 1);
    CHECK_EQ(await(cluster, 0, 5)->record.status, KV_OK);
    push_lars(cluster, 0, 6, 0, 1, 2);
    check_failed(cluster, 0, 6, KV_TIMEOUT,
                 "server 1 has not sent the norms of slice 1 for round 1");
    tell(cluster, sums_of(1, 3, 1, 1, 1), "");
    pull(cluster, 0, 7, 0, 2);
    check_failed(cluster, 0, 7, KV_TIMEOUT, "worker 0 has not pushed round 1");
    cluster_end(cluster);
}

static void a_lost_cluster_ends_the_wait(void)
{
    for (int lost = 1; lost >= 0; lost--) {
        cluster_t *cluster = start(2, "lamb", false);
        init_part(cluster, 1, 0, 2, 1);
        check_done(cluster, 0, 1);
        for (int32_t worker = 0; worker < 2; worker++)
            push(cluster, worker, stepping(KV_WIRE_PUSH, 2, 0, 0, "lamb", 1), 1);
        CHECK_EQ(await_told(cluster, 0, 0)->record.status, KV_OK);
        peer_end(&cluster->peers[cluster->num_workers]);
        settle(cluster, 0); /* that alone is no news */
        CHECK(answer_to(&cluster->peers[0], 2) == NULL);
        if (lost)
            kv_server_lose(cluster->server, "server 1 is gone");
        /* Without that word too, after a while. */
        for (int32_t worker = 0; worker < 2; worker++) {
            const answer_t *answer = await(cluster, worker, 2);
            CHECK_EQ(answer->record.status, KV_PEER_LOST);
            CHECK(strncmp(answer->data, "server 1 is gone", 16) == 0);
        }
        cluster_end(cluster);
    }
}

static void a_delete_comes_after_the_round(void)
{
    cluster_t *cluster = start(1, "lars", false);
    init_part(cluster, 1, 0, 2, 1);
    check_done(cluster, 0, 1);
    push_lars(cluster, 0, 2, 0, 0, 2);
    drop(cluster, 0, 3, 1);
    CHECK_EQ(await_told(cluster, 0, 0)->record.status, KV_OK);
    CHECK(answer_to(&cluster->peers[0], 3) == NULL);
    tell(cluster, sums_of(1, 2, 0, 12, 84), "");
    check_near(await(cluster, 0, 2), 1 - 0.5f * 4 / 10 * 2);
    check_done(cluster, 0, 3);
    CHECK_EQ(counters_of(cluster).keys, 0);
    init_part(cluster, 4, 0, 2, 1); /* anew, from round 0 */
    check_done(cluster, 0, 4);
    push_lars(cluster, 0, 5, 0, 0, 2);
    tell(cluster, sums_of(1, 2, 0, 12, 84), "");
    check_near(await(cluster, 0, 5), 1 - 0.5f * 4 / 10 * 2);
    cluster_end(cluster);
}

/* ---------------------------------------------------------------------------------- bad input */

static void sums_that_make_no_sense_end_the_work_with_their_server(void)
{
    enum { KINDS = 11 };
    for (int kind = 0; kind < KINDS; kind++) {
        cluster_t *cluster = start(1, "lars", kind >= 10);
        init_part(cluster, 1, 1, 3, 1);
        check_done(cluster, 0, 1);
        kv_wire_header_t header = sums_of(2, 3, 0, 1, 1);
        const char *sentence = "";
        header.record.slice = kind == 0 ? 3 : kind == 1 ? 1 : 2;
        header.count = kind == 2 ? 2 : 3;
        header.record.round = kind == 3 ? 2 : kind == 4 ? UINT64_MAX : 0;
        if (kind == 5)
            header.record.status = KV_NO_MEMORY; /* without a reason */
        if (kind == 6)
            sentence = "a reason without a status";
        if (kind == 7)
            header.record.action = KV_WIRE_PUSH;
        if (kind == 8) {
            header.kind = KV_WIRE_PUSH_ONE;
            header.record.action = KV_WIRE_PUSH;
        }
        if (kind == 9)
            tell(cluster, header, ""); /* twice */
        if (kind == 10) {
            header.record.slice = 0;
            header.record.tag = 1; /* of one worker */
        }
        tell(cluster, header, sentence);
        WAIT_UNTIL(atomic_load(&cluster->peers[1].is_lost));
        pull(cluster, 0, 2, 1, 0);
        const answer_t *answer = await(cluster, 0, 2);
        /* Whoever does not know what a message is loses no more than the session. */
        CHECK_EQ(answer->record.status, kind >= 5 && kind <= 8 ? KV_OK : KV_PEER_LOST);
        cluster_end(cluster);
    }
}

static void workers_tell_no_sums(void)
{
    cluster_t *cluster = start(2, "lars", false);
    kv_wire_header_t header = sums_of(0, 2, 0, 1, 1);
    send_message(cluster, 1, header, NULL, 0);
    WAIT_UNTIL(atomic_load(&cluster->peers[1].is_lost));
    init_part(cluster, 1, 0, 2, 1);
    check_done(cluster, 0, 1);
    cluster_end(cluster);
}

static void sums_of_other_servers_keys_are_dropped(void)
{
    for (int async = 0; async < 2; async++) {
        cluster_t *cluster = start(1, "lars", async);
        for (uint64_t round = 0; round < 3; round++)
            for (uint32_t slice = 0; slice < 2; slice++) {
                kv_wire_header_t header = sums_of(slice, 2, round, 1, 1);
                header.record.key = KEY + 1;
                tell(cluster, header, "");
            }
        kv_wire_header_t odd = sums_of(5, UINT32_MAX, 0, 1, 1);
        odd.record.key = KEY + 2;
        tell(cluster, odd, "");
        init_part(cluster, 1, 0, 2, 1);
        check_done(cluster, 0, 1);
        push_lars(cluster, 0, 2, 0, 0, 2);
        CHECK_EQ(await_told(cluster, 0, 0)->record.status, KV_OK);
        tell(cluster, sums_of(1, 2, 0, 12, 84), "");
        check_near(await(cluster, 0, 2), 1 - 0.5f * 4 / 10 * 2);
        CHECK(!atomic_load(&cluster->peers[1].is_lost));
        cluster_end(cluster);
    }
}

static void slices_that_do_not_fit_together_are_refused(void)
{
    cluster_t *cluster = start(1, "lars", false);
    init_part(cluster, 1, 2, 2, 1);
    check_failed(cluster, 0, 1, KV_INVALID, "slice 2 is not one of 2 slices");
    init_part(cluster, 2, 1, UINT64_MAX, 1);
    check_failed(cluster, 0, 2, KV_INVALID, "slice 1 is not one of 18446744073709551615 slices");
    init_part(cluster, 3, 1, 2, 1);
    check_done(cluster, 0, 3);
    init_part(cluster, 4, 0, 3, 1);
    check_failed(cluster, 0, 4, KV_INVALID, "slice 0 is not one of 3 slices");
    cluster_end(cluster);
}

/* ------------------------------------------------------------------------------- asynchronous */

static kv_wire_header_t turn_of(int32_t worker, uint64_t push, int64_t t, uint64_t round,
                                double weight, double other)
{
    kv_wire_header_t header = sums_of(0, 2, round, weight, other);
    header.record.tag = (uint32_t)worker;
    header.record.request = push;
    header.record.optimizer = (uint64_t)t;
    return header;
}

static void slice_0_gives_the_order_of_asynchronous_pushes(void)
{
    cluster_t *cluster = start(2, "lars", true);
    tell(cluster, turn_of(1, 0, 1, 0, 12, 84), ""); /* before the value is there */
    init_part(cluster, 1, 1, 2, 1);
    check_done(cluster, 0, 1);
    push_lars(cluster, 0, 2, 1, 0, 3);
    settle(cluster, 0);
    CHECK(answer_to(&cluster->peers[0], 2) == NULL && find_told(cluster, 1, 0) == NULL);
    push_lars(cluster, 1, 3, 1, 0, 2);
    check_near(await(cluster, 1, 3), 1 - 0.5f * 4 / 10 * 2); /* 0.6 */
    push_lars(cluster, 1, 4, 1, 1, 1);
    settle(cluster, 1);
    CHECK(find_told(cluster, 1, 1) == NULL);
    cluster->timeout_ms = 300;
    push_lars(cluster, 0, 5, 1, 1, 1);
    check_failed(cluster, 0, 5, KV_TIMEOUT,
                 "server 1 has not sent the norms of slice 0 for round 1");
    cluster->timeout_ms = 0;
    tell(cluster, turn_of(0, 0, 1, 1, 16 - 1.44, 36), ""); /* norms 4 and sqrt(72) */
    float value = 0.6f - 0.5f * 4 / sqrtf(72) * 3;
    check_near(await(cluster, 0, 2), value);
    tell(cluster, turn_of(1, 1, 2, 2, 0, 0), "");
    CHECK_EQ(await(cluster, 1, 4)->record.status, KV_OK);
    cluster_end(cluster);
}

static void slice_0_tells_what_it_has_chosen(void)
{
    cluster_t *cluster = start(2, "lamb", true);
    for (uint32_t slice = 0; slice < 2; slice++) {
        init_part(cluster, 1 + slice, slice, 3, 1);
        check_done(cluster, 0, 1 + slice);
    }
    push(cluster, 1, stepping(KV_WIRE_PUSH, 3, 1, 0, "lamb", 8), 1);
    settle(cluster, 1);
    CHECK(find_told(cluster, 1, 0) == NULL);
    push(cluster, 1, stepping(KV_WIRE_PUSH, 4, 0, 0, "lamb", 9), 1);
    const answer_t *told = await_told(cluster, 0, 0);
    CHECK_EQ(told->record.tag, 1);
    CHECK_EQ(told->record.request, 0);
    CHECK_EQ(told->record.optimizer, 9);
    CHECK_EQ(await_told(cluster, 1, 0)->record.optimizer, 9); /* its count is that of slice 0 */
    tell(cluster, sums_of(2, 3, 0, 1, 1), "");
    CHECK_EQ(await(cluster, 1, 3)->record.status, KV_OK);
    CHECK_EQ(await(cluster, 1, 4)->record.status, KV_OK);
    cluster_end(cluster);
}

static const test_t tests[] = {
    TEST(a_step_waits_for_the_sums_of_other_servers),
    TEST(slices_of_one_server_go_together),
    TEST(a_round_that_fails_elsewhere_fails_here),
    TEST(a_round_that_fails_here_fails_elsewhere),
    TEST(a_failed_round_of_lamb_leaves_no_trace),
    TEST(a_deadline_says_which_server_is_missing),
    TEST(a_lost_cluster_ends_the_wait),
    TEST(a_delete_comes_after_the_round),
    TEST(sums_that_make_no_sense_end_the_work_with_their_server),
    TEST(workers_tell_no_sums),
    TEST(sums_of_other_servers_keys_are_dropped),
    TEST(slices_that_do_not_fit_together_are_refused),
    TEST(slice_0_gives_the_order_of_asynchronous_pushes),
    TEST(slice_0_tells_what_it_has_chosen),
};
TEST_MAIN(tests)
