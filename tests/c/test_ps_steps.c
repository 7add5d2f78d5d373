/* Tests of a server's optimizers: whose step is taken, what it finds and leaves, and compressed
 * pushes. */
#include "compress/codec.h"
#include "ps_peers.h"

enum { OPTIMIZER = 5, OTHER = 6 };

static kv_optim_numbers_t numbers_of(const kv_optim_class_t *optim)
{
    kv_optim_numbers_t numbers = {.learning_rate = 1, .rescale_grad = 1, .clip_gradient = NAN};
    for (int i = 0; i < optim->num_params; i++)
        numbers.params[i] = optim->params[i].fallback;
    return numbers;
}

/* The server gets a class; `first` is its first number of its own. */
static void add_for(cluster_t *cluster, int64_t training, uint64_t number, const char *name,
                    double first)
{
    const kv_optim_class_t *optim = kv_optim_class_find(name);
    kv_optim_numbers_t numbers = numbers_of(optim);
    numbers.params[0] = first;
    CHECK_STATUS(kv_server_add_optimizer(cluster->server, number, training, optim, &numbers),
                 KV_OK);
}

static void add(cluster_t *cluster, uint64_t number, const char *name, double first)
{
    add_for(cluster, 1, number, name, first);
}

static kv_wire_record_t with_step(kv_wire_record_t record, uint64_t optimizer, double lr, int64_t t)
{
    kv_step_t step = {.optim = kv_optim_class_find("sgd"), .lr = lr, .t = t};
    kv_wire_put_step(&record, optimizer, &step);
    return record;
}

static void the_step_is_that_of_worker_0(void)
{
    for (int64_t count = 4; count <= LARGE; count += LARGE - 4) {
        cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
        add(cluster, OPTIMIZER, "sgd", 0);
        init(cluster, 1, 0, count, 10);
        check_done(cluster, 0, 1);
        push(cluster, 1, floats(KV_WIRE_PUSHPULL, 2, 0, 0, count), 2);
        push(cluster, 0, with_step(floats(KV_WIRE_PUSH, 2, 0, 0, count), OPTIMIZER, 0.5, 1), 1);
        check_done(cluster, 0, 2);
        check_floats(await(cluster, 1, 2), count, 8.5F);
        /* Worker 1's has no say, and without one of worker 0 the sum is the value. */
        push(cluster, 1, with_step(floats(KV_WIRE_PUSH, 3, 0, 1, count), OPTIMIZER, 9, 1), 2);
        push(cluster, 0, floats(KV_WIRE_PUSHPULL, 3, 0, 1, count), 1);
        check_floats(await(cluster, 0, 3), count, 3);
        cluster_end(cluster);
    }
}

static void state_stays_with_its_class(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 1});
    add(cluster, OPTIMIZER, "sgd", 0.5);
    init(cluster, 1, 0, 4, 0);
    /* m = m / 2 - 1: the momentum goes on under other numbers, and begins anew after another class.
     */
    push(cluster, 0, with_step(floats(KV_WIRE_PUSHPULL, 2, 0, 0, 4), OPTIMIZER, 1, 1), 1);
    check_floats(await(cluster, 0, 2), 4, -1);
    push(cluster, 0, with_step(floats(KV_WIRE_PUSHPULL, 3, 0, 1, 4), OPTIMIZER, 1, 2), 1);
    check_floats(await(cluster, 0, 3), 4, -2.5F);
    add(cluster, OTHER, "sgd", 0.25);
    push(cluster, 0, with_step(floats(KV_WIRE_PUSHPULL, 4, 0, 2, 4), OTHER, 1, 3), 1);
    check_floats(await(cluster, 0, 4), 4, -2.5F - 1.375F);
    add(cluster, OTHER, "test", 0);
    push(cluster, 0, with_step(floats(KV_WIRE_PUSHPULL, 5, 0, 3, 4), OTHER, 1, 4), 1);
    check_floats(await(cluster, 0, 5), 4, -2.5F - 0.375F);
    push(cluster, 0, with_step(floats(KV_WIRE_PUSHPULL, 6, 0, 4, 4), OPTIMIZER, 1, 5), 1);
    check_floats(await(cluster, 0, 6), 4, -2.5F - 1.375F);
    cluster_end(cluster);
}

static void state_is_of_one_training(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 1});
    add_for(cluster, 1, OPTIMIZER, "sgd", 0.5);
    add_for(cluster, 3, OTHER, "sgd", 0.5);
    init(cluster, 1, 0, LARGE, 0);
    push(cluster, 0, with_step(floats(KV_WIRE_PUSHPULL, 2, 0, 0, LARGE), OPTIMIZER, 1, 1), 1);
    check_floats(await(cluster, 0, 2), LARGE, -1);
    push(cluster, 0, with_step(floats(KV_WIRE_PUSHPULL, 3, 0, 1, LARGE), OTHER, 1, 1), 1);
    check_floats(await(cluster, 0, 3), LARGE, -2);
    /* One of the training before goes on with what there is now. */
    push(cluster, 0, with_step(floats(KV_WIRE_PUSHPULL, 4, 0, 2, LARGE), OPTIMIZER, 1, 2), 1);
    check_floats(await(cluster, 0, 4), LARGE, -3.5F);
    push(cluster, 0, with_step(floats(KV_WIRE_PUSHPULL, 5, 0, 3, LARGE), OTHER, 1, 2), 1);
    check_floats(await(cluster, 0, 5), LARGE, -5.25F);
    cluster_end(cluster);
}

/* A round that cannot take its step fails, and the next one is good. */
static void check_step_fails(kv_wire_record_t record, kv_status_t status, const char *sentence)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2});
    add(cluster, OPTIMIZER, "sgd", 0);
    add(cluster, OTHER, "groupadagrad", 1e-5);
    kv_wire_record_t first = floats(KV_WIRE_INIT, 1, 0, 3, 4); /* rows of three */
    first.dtype = record.dtype;
    push(cluster, 0, first, 0);
    push(cluster, 0, record, 0);
    kv_wire_record_t other = floats(KV_WIRE_PUSH, 2, 0, 0, 4);
    other.dtype = record.dtype;
    push(cluster, 1, other, 0);
    for (int32_t i = 0; i < 2; i++)
        check_failed(cluster, i, 2, status, sentence);
    for (int32_t i = 0; i < 2; i++) {
        kv_wire_record_t good = floats(KV_WIRE_PUSH, 3, 0, 1, 4);
        good.dtype = record.dtype;
        push(cluster, i, good, 0);
    }
    for (int32_t i = 0; i < 2; i++)
        check_done(cluster, i, 3);
    cluster_end(cluster);
}

static void steps_that_cannot_be_taken_fail_their_round(void)
{
    kv_wire_record_t record = with_step(floats(KV_WIRE_PUSH, 2, 0, 0, 4), OPTIMIZER, 1, 0);
    check_step_fails(record, KV_INVALID, "a push says that it is number 0 of its key");
    record = with_step(floats(KV_WIRE_PUSH, 2, 0, 0, 4), OPTIMIZER, 1, 1);
    record.dtype = KV_INT32;
    check_step_fails(record, KV_BAD_TYPE,
                     "the value is int32: the optimizer SGD updates floating types only");
    record = with_step(floats(KV_WIRE_PUSH, 2, 0, 0, 4), OTHER, 1, 1);
    check_step_fails(
        record, KV_NOT_BUILT,
        "the optimizer GroupAdaGrad keeps a number for each row, and rows of this value "
        "are cut into slices: not in servers of this version");
}

static void numbers_that_are_none_of_the_class_are_refused(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 1});
    const kv_optim_class_t *optim = kv_optim_class_find("sgd");
    kv_optim_numbers_t numbers = numbers_of(optim);
    numbers.params[0] = -1;
    CHECK_STATUS(kv_server_add_optimizer(cluster->server, 1, 1, optim, &numbers), KV_INVALID);
    cluster_end(cluster);
}

static void the_oldest_of_too_many_is_forgotten(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 1});
    for (uint64_t number = 1; number <= KV_KNOWN_OPTIMIZERS + 1; number++) {
        add(cluster, number, "sgd", 0);
        add(cluster, 2, "sgd", 0); /* is asked for again and again */
    }
    init(cluster, 1, 0, 4, 0);
    push(cluster, 0, with_step(floats(KV_WIRE_PUSHPULL, 2, 0, 0, 4), 1, 1, 1), 3);
    check_failed(cluster, 0, 2, KV_INVALID,
                 "worker 0 pushed with an optimizer that server 0 has not got");
    for (uint64_t number = 2; number <= KV_KNOWN_OPTIMIZERS + 1; number += 1024) {
        uint64_t round = (number - 2) / 1024 + 1;
        push(cluster, 0,
             with_step(floats(KV_WIRE_PUSHPULL, 2 + round, 0, round, 4), number, 1, (int64_t)round),
             1);
        check_floats(await(cluster, 0, 2 + round), 4, -(float)round);
    }
    cluster_end(cluster);
}

/* ---------------------------------------------------------------------------------- dist_async */

static void an_async_server_applies_each_push_in_its_workers_order(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2, .async = true});
    add(cluster, OPTIMIZER, "sgd", 0);
    init(cluster, 1, 0, LARGE, 0);
    pull(cluster, 0, 2, 0, 2); /* after two pushes of its own */
    push(cluster, 0, with_step(floats(KV_WIRE_PUSHPULL, 4, 0, 1, LARGE), OPTIMIZER, 2, 2), 1);
    settle(cluster, 0);
    CHECK(answer_to(&cluster->peers[0], 4) == NULL);
    push(cluster, 1, with_step(floats(KV_WIRE_PUSHPULL, 3, 0, 0, LARGE), OPTIMIZER, 4, 1), 1);
    check_floats(await(cluster, 1, 3), LARGE, -4);
    push(cluster, 0, with_step(floats(KV_WIRE_PUSHPULL, 3, 0, 0, LARGE), OPTIMIZER, 1, 1), 1);
    check_floats(await(cluster, 0, 4), LARGE, -7);
    check_floats(await(cluster, 0, 2), LARGE, -7);
    /* One that says nothing is applied as the newest was. */
    push(cluster, 1, floats(KV_WIRE_PUSHPULL, 5, 0, 1, LARGE), 1);
    check_floats(await(cluster, 1, 5), LARGE, -9);
    cluster_end(cluster);
}

static void without_any_step_an_optimizer_begins_with_its_own_rate(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 1, .async = true});
    add(cluster, OPTIMIZER, "sgd", 0);
    init(cluster, 1, 0, 4, 0);
    push(cluster, 0, floats(KV_WIRE_PUSHPULL, 2, 0, 0, 4), 3);
    check_floats(await(cluster, 0, 2), 4, -3);
    cluster_end(cluster);
}

static void what_is_being_sent_is_never_written(void)
{
    enum { ROUNDS = 60 };
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2, .async = true});
    add(cluster, OPTIMIZER, "sgd", 0);
    init(cluster, 1, 0, LARGEST, 0);
    check_done(cluster, 0, 1);
    for (uint64_t round = 0; round < ROUNDS; round++) {
        push(cluster, 0,
             with_step(floats(KV_WIRE_PUSH, 10 + round, 0, round, LARGEST), OPTIMIZER, 1,
                       (int64_t)round + 1),
             -1);
        pull(cluster, 1, 10 + round, 0, 0);
    }
    for (uint64_t round = 0; round < ROUNDS; round++) {
        const answer_t *answer = await(cluster, 1, 10 + round);
        float value = -1;
        memcpy(&value, answer->data, sizeof value);
        CHECK(value >= 0 && value <= ROUNDS);
        check_floats(answer, LARGEST, value);
        check_done(cluster, 0, 10 + round);
    }
    cluster_end(cluster);
}

static void a_delete_comes_after_the_pushes_that_were_made(void)
{
    cluster_t *cluster = cluster_start((plan_t){.num_workers = 2, .async = true});
    add(cluster, OPTIMIZER, "sgd", 0);
    init(cluster, 1, 0, 4, 0);
    check_done(cluster, 0, 1);
    drop(cluster, 0, 2, 1);
    drop(cluster, 1, 2, 0);
    settle(cluster, 0);
    settle(cluster, 1);
    CHECK(answer_to(&cluster->peers[0], 2) == NULL);
    push(cluster, 0, floats(KV_WIRE_PUSHPULL, 3, 0, 0, 4), 1);
    check_floats(await(cluster, 0, 3), 4, -1);
    check_done(cluster, 0, 2);
    check_done(cluster, 1, 2);
    cluster_end(cluster);
}

/* --------------------------------------------------------------------------------- compression */

static void push_coded(cluster_t *cluster, int32_t worker, kv_wire_record_t record,
                       kv_codec_t codec, float value)
{
    int64_t count = (int64_t)(record.bytes / sizeof(float));
    float *gradient = malloc((size_t)record.bytes),
          *residual = calloc((size_t)count, sizeof(float));
    for (int64_t i = 0; i < count; i++)
        gradient[i] = value;
    record.codec = (uint8_t)codec.type;
    record.bytes = kv_wire_coded_bytes(codec.type, KV_FLOAT32, (size_t)record.bytes);
    unsigned char *data = malloc((size_t)record.bytes);
    kv_wire_put_threshold(codec.threshold, data);
    CHECK_EQ(kv_codec_encode(cluster->host.kernels, &codec, KV_FLOAT32, 0, count, count, gradient,
                             residual, data + KV_WIRE_THRESHOLD_BYTES),
             0);
    send_one(cluster, worker, record, data);
    free(data);
    free(residual);
    free(gradient);
}

static void compressed_and_plain_pushes_add_up(void)
{
    const kv_codec_t two = {.type = KV_CODEC_2BIT, .threshold = 0.25};
    const kv_codec_t one = {.type = KV_CODEC_1BIT, .threshold = 0.5};
    for (int64_t count = 5; count <= LARGE; count += LARGE - 5) {
        cluster_t *cluster = cluster_start((plan_t){.num_workers = 3});
        add(cluster, OPTIMIZER, "sgd", 0);
        init(cluster, 1, 0, count, 1);
        for (uint64_t round = 0; round < 2; round++) {
            kv_wire_record_t record = floats(KV_WIRE_PUSHPULL, 2 + round, 0, round, count);
            push_coded(cluster, 1, record, one, 2);
            push(cluster, 2, record, 10);
            if (round == 1)
                record = with_step(record, OPTIMIZER, 0.5, 1);
            push_coded(cluster, 0, record, two, 3);
            check_floats(await(cluster, 1, 2 + round), count, round == 0 ? 11.25F : 5.625F);
        }
        cluster_end(cluster);
    }
}

static void a_threshold_that_is_none_fails_its_round(void)
{
    static const double thresholds[] = {0, -1, NAN, INFINITY, 1e300};
    for (size_t i = 0; i < sizeof thresholds / sizeof thresholds[0]; i++) {
        cluster_t *cluster = cluster_start((plan_t){.num_workers = 1});
        init(cluster, 1, 0, 4, 7);
        unsigned char data[12] = {0};
        kv_wire_put_threshold(thresholds[i], data);
        kv_wire_record_t record = floats(KV_WIRE_PUSH, 2, 0, 0, 3);
        record.codec = KV_CODEC_2BIT;
        send_one(cluster, 0, record, data);
        CHECK_EQ(await(cluster, 0, 2)->record.status, KV_INVALID);
        pull(cluster, 0, 3, 0, 1);
        check_floats(await(cluster, 0, 3), 4, 7);
        cluster_end(cluster);
    }
}

/* -------------------------------------------------------------------------------------- memory */

static void every_allocation_may_fail(void)
{
    int64_t nth = 0, passed;
    memset(places, 0, sizeof places);
    do {
        cluster_t *cluster = cluster_start((plan_t){.num_workers = 1});
        kv_optim_numbers_t numbers = numbers_of(kv_optim_class_find("sgd"));
        cluster->timeout_ms = 150;
        cluster->tells = true;
        init(cluster, 1, 0, LARGE, 0);
        check_done(cluster, 0, 1);
        numbers.params[0] = 0.5;
        kv_fault_set("alloc", ++nth);
        kv_status_t added = kv_server_add_optimizer(cluster->server, OPTIMIZER, 1,
                                                    kv_optim_class_find("sgd"), &numbers);
        CHECK(added == KV_OK || added == KV_NO_MEMORY);
        float due = 0, momentum = 0;
        for (uint64_t round = 0; round < 3; round++) {
            push(cluster, 0,
                 with_step(floats(KV_WIRE_PUSHPULL, 2 + round, 0, round, LARGE), OPTIMIZER, 1,
                           (int64_t)round + 1),
                 -2);
            const answer_t *answer = await(cluster, 0, 2 + round);
            if (answer->record.status == KV_STATUS_COUNT)
                break;
            if (answer->record.status == KV_OK) {
                momentum = momentum / 2 + 2;
                due += momentum;
                check_floats(answer, LARGE, due);
            }
        }
        passed = kv_fault_set("alloc", 0);
        cluster_end(cluster);
    } while (passed >= nth);
    CHECK(nth > 10);
}

static const test_t tests[] = {
    TEST(the_step_is_that_of_worker_0),
    TEST(state_stays_with_its_class),
    TEST(state_is_of_one_training),
    TEST(steps_that_cannot_be_taken_fail_their_round),
    TEST(numbers_that_are_none_of_the_class_are_refused),
    TEST(the_oldest_of_too_many_is_forgotten),
    TEST(an_async_server_applies_each_push_in_its_workers_order),
    TEST(without_any_step_an_optimizer_begins_with_its_own_rate),
    TEST(what_is_being_sent_is_never_written),
    TEST(a_delete_comes_after_the_pushes_that_were_made),
    TEST(compressed_and_plain_pushes_add_up),
    TEST(a_threshold_that_is_none_fails_its_round),
    TEST(every_allocation_may_fail),
};

TEST_MAIN(tests)
