/* Training states on a server: read, replaced, waited for, refused. */
#include "comm/slots.h"
#include "ps_peers.h"

enum { SGD = 5, ADAM = 6, ROWS = 7, HALF = 8 };

static void add(cluster_t *cluster, uint64_t number, const char *name, bool multi_precision)
{
    const kv_optim_class_t *optim = kv_optim_class_find(name);
    kv_optim_numbers_t numbers = {.learning_rate = 1,
                                  .rescale_grad = 1,
                                  .clip_gradient = NAN,
                                  .multi_precision = multi_precision};
    for (int i = 0; i < optim->num_params; i++)
        numbers.params[i] = optim->params[i].fallback;
    if (number == SGD || number == HALF)
        numbers.params[0] = 0.5; /* momentum */
    CHECK_STATUS(kv_server_add_optimizer(cluster->server, number, 1, optim, &numbers), KV_OK);
}

static cluster_t *start(int32_t num_workers)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = num_workers});
    add(cluster, SGD, "sgd", false);
    add(cluster, HALF, "sgd", true);
    add(cluster, ADAM, "adam", false);
    add(cluster, ROWS, "groupadagrad", false);
    return cluster;
}

static kv_wire_record_t with_step(kv_wire_record_t record, uint64_t optimizer, int64_t t)
{
    kv_step_t step = {.optim = kv_optim_class_find("sgd"), .lr = 1, .t = t};
    kv_wire_put_step(&record, optimizer, &step);
    return record;
}

/* One push of `value` by each worker. */
static void step_all(cluster_t *cluster, uint64_t request, uint64_t round, int64_t count,
                     float value)
{
    for (int32_t i = 0; i < cluster->num_workers; i++)
        push(cluster, i,
             with_step(floats(KV_WIRE_PUSH, request, 0, round, count), SGD, (int64_t)round + 1),
             value);
}

static void get_state(cluster_t *cluster, int32_t worker, uint64_t request, uint64_t round,
                      uint64_t optimizer, unsigned slot)
{
    kv_wire_record_t record = floats(KV_WIRE_GET_STATE, request, 0, round, 0);
    record.optimizer = optimizer;
    record.slot = (uint16_t)slot;
    send_many(cluster, worker, KV_WIRE_PULL, 1, &record, NULL);
}

static kv_wire_record_t setting(uint64_t request, uint64_t round, int64_t count, unsigned slot,
                                int64_t t)
{
    kv_wire_record_t record =
        with_step(floats(KV_WIRE_SET_STATE, request, 0, round, count), SGD, t);
    record.slot = (uint16_t)slot;
    return record;
}

static void check_state(cluster_t *cluster, int32_t worker, uint64_t request, int64_t count,
                        float value, uint64_t t)
{
    const answer_t *answer = await(cluster, worker, request);
    if (count > 0)
        check_floats(answer, count, value);
    else
        CHECK_EQ(answer->bytes, 0);
    CHECK_EQ(answer->record.status, KV_OK);
    CHECK_EQ(answer->record.t, t);
}

/* ---------------------------------------------------------------------------- read, replace */

static void a_state_is_what_the_steps_have_left_for(int64_t count)
{
    cluster_t *cluster = start(2);
    init(cluster, 1, 0, count, 0);
    get_state(cluster, 1, 2, 0, SGD, 0);
    check_state(cluster, 1, 2, 0, 0, 0);
    step_all(cluster, 3, 0, count, 1);
    step_all(cluster, 4, 1, count, 1);
    get_state(cluster, 0, 5, 2, SGD, 0);
    check_state(cluster, 0, 5, count, -3, 2); /* m = m / 2 - 2, twice */
    get_state(cluster, 1, 6, 2, SGD, KV_SLOT_NONE);
    check_state(cluster, 1, 6, 0, 0, 2);
    get_state(cluster, 1, 7, 2, ADAM, 0); /* has never had it */
    check_state(cluster, 1, 7, 0, 0, 0);
    cluster_end(cluster);
}

static void a_state_is_what_the_steps_have_left(void)
{
    a_state_is_what_the_steps_have_left_for(3);
    a_state_is_what_the_steps_have_left_for(LARGE);
    a_state_is_what_the_steps_have_left_for(LARGEST);
}

static void a_state_that_is_set_goes_on(void)
{
    cluster_t *cluster = start(1);
    init(cluster, 1, 0, 4, 0);
    push(cluster, 0, setting(2, 0, 4, 0, 7), 8);
    check_done(cluster, 0, 2);
    get_state(cluster, 0, 3, 0, SGD, 0);
    check_state(cluster, 0, 3, 4, 8, 7);
    push(cluster, 0, with_step(floats(KV_WIRE_PUSHPULL, 4, 0, 0, 4), SGD, 8), 1);
    check_floats(await(cluster, 0, 4), 4, 3); /* m = 8 / 2 - 1 */
    get_state(cluster, 0, 5, 1, SGD, 0);
    check_state(cluster, 0, 5, 4, 3, 8);
    /* Without data the buffer goes. */
    push(cluster, 0, setting(6, 1, 0, 0, 3), 0);
    get_state(cluster, 0, 7, 1, SGD, 0);
    check_state(cluster, 0, 7, 0, 0, 3);
    /* Without an optimizer everything. */
    push(cluster, 0, setting(8, 1, 4, 0, 7), 8);
    kv_wire_record_t nothing = floats(KV_WIRE_SET_STATE, 9, 0, 1, 0);
    nothing.slot = KV_SLOT_NONE;
    push(cluster, 0, nothing, 0);
    get_state(cluster, 0, 10, 1, SGD, 0);
    check_state(cluster, 0, 10, 0, 0, 0);
    push(cluster, 0, with_step(floats(KV_WIRE_PUSHPULL, 11, 0, 1, 4), SGD, 1), 1);
    check_floats(await(cluster, 0, 11), 4, 2); /* m = -1 */
    cluster_end(cluster);
}

static void a_state_of_another_class_takes_its_place(void)
{
    cluster_t *cluster = start(1);
    init(cluster, 1, 0, 4, 0);
    push(cluster, 0, setting(2, 0, 4, 0, 7), 8);
    check_done(cluster, 0, 2);
    kv_wire_record_t second = setting(3, 0, 4, 1, 2);
    second.optimizer = ADAM;
    push(cluster, 0, second, 6);
    check_done(cluster, 0, 3);
    get_state(cluster, 0, 4, 0, SGD, 0);
    check_state(cluster, 0, 4, 0, 0, 0);
    get_state(cluster, 0, 5, 0, ADAM, 0);
    check_state(cluster, 0, 5, 0, 0, 2);
    get_state(cluster, 0, 6, 0, ADAM, 1);
    check_state(cluster, 0, 6, 4, 6, 2);
    cluster_end(cluster);
}

static void a_narrow_value_has_a_wide_state(void)
{
    cluster_t *cluster = start(1);
    enum { COUNT = KV_WIRE_SLICE_BYTES / 2 }; /* the largest slice, whose state is twice as large */
    kv_wire_record_t first = floats(KV_WIRE_INIT, 1, 0, 0, COUNT / 2);
    first.dtype = KV_FLOAT16;
    push(cluster, 0, first, 0);
    check_done(cluster, 0, 1);
    for (unsigned slot = 0; slot <= KV_SLOT_MASTER; slot += KV_SLOT_MASTER) {
        kv_wire_record_t record = setting(2 + slot, 0, COUNT, slot, 1);
        record.dtype = KV_FLOAT16;
        record.optimizer = HALF;
        push(cluster, 0, record, (float)slot + 0.25F);
        check_done(cluster, 0, 2 + slot);
        get_state(cluster, 0, 20 + slot, 0, HALF, slot);
        const answer_t *answer = await(cluster, 0, 20 + slot);
        CHECK_EQ(answer->bytes, COUNT * 4);
        float last;
        memcpy(&last, answer->data + COUNT * 4 - sizeof last, sizeof last);
        CHECK(last == (float)slot + 0.25F);
    }
    cluster_end(cluster);
}

/* ------------------------------------------------------------------------------------ waits */

static void a_state_waits_for_value_and_rounds(void)
{
    cluster_t *cluster = start(2);
    push(cluster, 1, setting(1, 0, 4, 0, 7), 8);
    get_state(cluster, 0, 2, 1, SGD, 0);
    settle(cluster, 0);
    settle(cluster, 1);
    CHECK(answer_to(&cluster->peers[1], 1) == NULL);
    init(cluster, 3, 0, 4, 0);
    check_done(cluster, 1, 1);
    CHECK(answer_to(&cluster->peers[0], 2) == NULL);
    step_all(cluster, 4, 0, 4, 1);
    check_state(cluster, 0, 2, 4, 2, 1); /* m = 8 / 2 - 2 */
    cluster_end(cluster);
}

/* Whatever is under way, a state is that of one step: its numbers are all alike. */
static void a_state_is_read_between_rounds(void)
{
    enum { ROUNDS = 30 };
    cluster_t *cluster = start(1);
    float due[ROUNDS + 1] = {0};
    init(cluster, 1, 0, LARGEST, 0);
    check_done(cluster, 0, 1);
    for (uint64_t round = 0; round < ROUNDS; round++) {
        due[round + 1] = due[round] / 2 - 1;
        step_all(cluster, 100 + round, round, LARGEST, 1);
        get_state(cluster, 0, 200 + round, round, SGD, 0);
        if (round % 3 == 2)
            get_state(cluster, 0, 300 + round, round + 1, SGD, 0);
    }
    for (uint64_t round = 1; round < ROUNDS; round++) {
        const answer_t *answer = await(cluster, 0, 200 + round);
        uint64_t t = answer->record.t;
        if (CHECK(t >= round && t <= ROUNDS))
            check_floats(answer, LARGEST, due[t]);
        if (round % 3 == 2)
            CHECK(await(cluster, 0, 300 + round)->record.t > round);
    }
    cluster_end(cluster);
}

static void who_waits_too_long_is_told_for_whom(void)
{
    cluster_t *cluster = start(2);
    init(cluster, 1, 0, 4, 0);
    check_done(cluster, 0, 1);
    cluster->timeout_ms = 300;
    get_state(cluster, 1, 2, 1, SGD, 0);
    push(cluster, 1, setting(3, 1, 4, 0, 7), 8);
    check_failed(cluster, 1, 2, KV_TIMEOUT, "worker 0 has not pushed round 0");
    check_failed(cluster, 1, 3, KV_TIMEOUT, "worker 0 has not pushed round 0");
    get_state(cluster, 0, 4, 0, SGD, 0);
    check_state(cluster, 0, 4, 0, 0, 0);
    cluster_end(cluster);
}

static void a_delete_and_a_loss_end_the_wait(void)
{
    cluster_t *cluster = start(2);
    init(cluster, 1, 0, 4, 0);
    check_done(cluster, 0, 1);
    get_state(cluster, 1, 2, 5, SGD, 0);
    push(cluster, 1, setting(3, 5, 4, 0, 7), 8);
    settle(cluster, 1);
    drop(cluster, 0, 4, 0);
    drop(cluster, 1, 4, 0);
    check_failed(cluster, 1, 2, KV_NO_KEY, "the key was deleted");
    check_failed(cluster, 1, 3, KV_NO_KEY, "the key was deleted");
    init(cluster, 5, 0, 4, 0);
    get_state(cluster, 1, 6, 5, SGD, 0);
    settle(cluster, 1);
    kv_server_lose(cluster->server, "worker 7 is gone");
    check_failed(cluster, 1, 6, KV_PEER_LOST, "worker 7 is gone");
    push(cluster, 1, setting(7, 0, 4, 0, 7), 8);
    check_failed(cluster, 1, 7, KV_PEER_LOST, "worker 7 is gone");
    cluster_end(cluster);
}

/* ---------------------------------------------------------------------------------- refused */

static void check_refused(cluster_t *cluster, kv_wire_record_t record, kv_status_t status,
                          const char *sentence)
{
    static uint64_t request = 1000;
    record.request = ++request;
    push(cluster, 0, record, 1);
    check_failed(cluster, 0, request, status, sentence);
    /* The state is as it was. */
    get_state(cluster, 0, ++request, 0, SGD, 0);
    check_state(cluster, 0, request, 4, 8, 7);
}

static void what_makes_no_state_is_refused(void)
{
    cluster_t *cluster = start(1);
    kv_wire_record_t first = floats(KV_WIRE_INIT, 1, 0, 3, 4); /* rows of three, cut */
    push(cluster, 0, first, 0);
    push(cluster, 0, setting(2, 0, 4, 0, 7), 8);
    check_done(cluster, 0, 2);
    kv_wire_record_t record = setting(0, 0, 4, 0, 1);
    record.optimizer = 99;
    check_refused(cluster, record, KV_INVALID,
                  "worker 0 asks for the state of an optimizer that server 0 has not got");
    record = setting(0, 0, 4, 0, 1);
    record.optimizer = 0;
    check_refused(cluster, record, KV_INVALID,
                  "worker 0 asks for the state of an optimizer that server 0 has not got");
    check_refused(cluster, setting(0, 0, 4, 1, 1), KV_INVALID,
                  "the optimizer SGD keeps no state of number 1 with float32");
    check_refused(cluster, setting(0, 0, 4, KV_SLOT_MASTER, 1), KV_INVALID,
                  "the optimizer SGD keeps no state of number 3 with float32");
    check_refused(cluster, setting(0, 0, 4, UINT16_MAX, 1), KV_INVALID,
                  "the optimizer SGD keeps no state of number 65535 with float32");
    check_refused(cluster, setting(0, 0, 5, 0, 1), KV_INVALID,
                  "a state of slice 0 has 16 bytes, worker 0 sets 20");
    check_refused(cluster, setting(0, 0, 4, KV_SLOT_NONE, 1), KV_INVALID,
                  "a state of slice 0 has 0 bytes, worker 0 sets 16");
    check_refused(cluster, setting(0, 0, 4, 0, -1), KV_INVALID,
                  "worker 0 sets the state of push 18446744073709551615");
    record = setting(0, 0, 4, 0, 1);
    record.dtype = KV_FLOAT64;
    check_refused(cluster, record, KV_BAD_TYPE,
                  "the value is float32, worker 0 sets the state of float64");
    record = setting(0, 0, 4, 0, 1);
    record.codec = KV_CODEC_2BIT;
    check_refused(cluster, record, KV_BAD_TYPE,
                  "the value is float32, worker 0 sets the state of float32");
    record = setting(0, 0, 4, 0, 1);
    record.optimizer = ROWS;
    check_refused(cluster, record, KV_NOT_BUILT,
                  "the optimizer GroupAdaGrad keeps a number for each row, and rows of this value "
                  "are cut into slices: not in servers of this version");
    /* Questions, too. */
    get_state(cluster, 0, 3, 0, 99, 0);
    check_failed(cluster, 0, 3, KV_INVALID,
                 "worker 0 asks for the state of an optimizer that server 0 has not got");
    get_state(cluster, 0, 4, 0, SGD, 2);
    check_failed(cluster, 0, 4, KV_INVALID,
                 "the optimizer SGD keeps no state of number 2 with float32");
    cluster_end(cluster);
}

static void integers_have_no_state(void)
{
    cluster_t *cluster = start(1);
    kv_wire_record_t record = floats(KV_WIRE_INIT, 1, 0, 0, 4);
    record.dtype = KV_INT32;
    push(cluster, 0, record, 0);
    record = setting(2, 0, 4, 0, 1);
    record.dtype = KV_INT32;
    push(cluster, 0, record, 0);
    check_failed(cluster, 0, 2, KV_BAD_TYPE,
                 "the value is int32: the optimizer SGD updates floating types only");
    cluster_end(cluster);
}

/* Messages that nobody sends end their session. */
static void messages_of_the_wrong_kind_end_the_session(void)
{
    for (int i = 0; i < 4; i++) {
        cluster_t *cluster = start(2);
        kv_wire_record_t get = floats(KV_WIRE_GET_STATE, 2, 0, 0, 0), set = setting(2, 0, 0, 0, 1);
        const void *none = NULL;
        init(cluster, 1, 0, 4, 0);
        check_done(cluster, 0, 1);
        if (i == 0)
            send_many(cluster, 1, KV_WIRE_BATCH, 1, &get, &none);
        else if (i == 1)
            send_many(cluster, 1, KV_WIRE_PULL, 1, &set, NULL);
        else if (i == 2)
            send_many(cluster, 1, KV_WIRE_DELETE, 1, &get, NULL);
        else
            push(cluster, 1, setting(2, 0, KV_WIRE_STATE_BYTES / 4 + 1, 0, 1), 0);
        WAIT_UNTIL(atomic_load(&cluster->peers[1].is_lost));
        get_state(cluster, 0, 3, 0, SGD, 0);
        check_state(cluster, 0, 3, 0, 0, 0);
        cluster_end(cluster);
    }
}

static const test_t tests[] = {
    TEST(a_state_is_what_the_steps_have_left),
    TEST(a_state_that_is_set_goes_on),
    TEST(a_state_of_another_class_takes_its_place),
    TEST(a_narrow_value_has_a_wide_state),
    TEST(a_state_waits_for_value_and_rounds),
    TEST(a_state_is_read_between_rounds),
    TEST(who_waits_too_long_is_told_for_whom),
    TEST(a_delete_and_a_loss_end_the_wait),
    TEST(what_makes_no_state_is_refused),
    TEST(integers_have_no_state),
    TEST(messages_of_the_wrong_kind_end_the_session),
};

TEST_MAIN(tests)
