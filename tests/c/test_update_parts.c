/* Steps with norms of a value that lies in parts: each is measured, then takes its step with the
 * sums of all. */
#include "update.h"

enum { LENGTH = 100000, MOST_PARTS = 4, PUSHES = 4 };

static kv_host_t host;

static bool host_open(void)
{
    host = (kv_host_t){.num_threads = 2};
    return CHECK_STATUS(kv_kernels_get(&host.kernels), KV_OK) &&
           CHECK_STATUS(kv_team_new(2, &host.team), KV_OK);
}

static void host_close(void)
{
    kv_team_stop(host.team);
    kv_team_free(host.team);
}

static const struct {
    const char *name;
    int batch_scale; /* of LBSGD with norms */
} cases[] = {{"lamb", 0}, {"lars", 0}, {"lbsgd", 1}, {"lbsgd", 2}, {"sgd", 0}};

enum { CASES = sizeof cases / sizeof cases[0] };

static void begin(trial_t *trial, int which)
{
    trial_begin(trial, cases[which].name);
    trial->numbers.wd = 0.02;
    trial->numbers.rescale_grad = 0.5;
    trial->numbers.learning_rate = 0.1;
    if (cases[which].batch_scale > 0) {
        *trial_param(trial, "warmup_strategy") = 3;
        *trial_param(trial, "batch_scale") = cases[which].batch_scale;
    }
    if (strcmp(cases[which].name, "lamb") != 0)
        *trial_param(trial, "momentum") = 0.5;
}

/* One push that takes the parts of `whole` one by one. Measures twice, since that changes
 * nothing. */
static void push_parts(trial_t *whole, int num_parts, const int64_t *starts, const void *gradient)
{
    kv_step_t step;
    trial_step(whole, &step);
    size_t element = kv_dtype_bytes(whole->weight.dtype), wide = trial_wide(whole);
    kv_weight_t parts[MOST_PARTS];
    const void *src[MOST_PARTS];
    kv_gradients_t gradients[MOST_PARTS];
    kv_norm_sums_t total = {.weight = 0};
    for (int p = 0; p < num_parts; p++) {
        size_t at = (size_t)starts[p];
        kv_weight_t *part = &parts[p];
        *part = whole->weight;
        part->count = part->row_count = starts[p + 1] - starts[p];
        part->data = (char *)part->data + at * element;
        part->master = part->master != NULL ? part->master + at : NULL;
        for (int i = 0; i < KV_MAX_SLOTS; i++)
            part->slots[i] = part->slots[i] != NULL ? (char *)part->slots[i] + at * wide : NULL;
        src[p] = (const char *)gradient + at * element;
        gradients[p] = (kv_gradients_t){.num_src = 1, .src = &src[p]};
        kv_norm_sums_t sums, again;
        kv_host_measure(&host, &step, part, &gradients[p], &sums);
        kv_host_measure(&host, &step, part, &gradients[p], &again);
        CHECK(memcmp(&sums, &again, sizeof sums) == 0);
        kv_norm_sums_add(&total, &sums);
    }
    for (int p = 0; p < num_parts; p++)
        CHECK_EQ(kv_host_update_part(&host, &step, &parts[p], &gradients[p], &total), 0);
}

static double wide_at(const trial_t *trial, int64_t i)
{
    const kv_weight_t *weight = &trial->weight;
    return weight->dtype == KV_FLOAT64 ? ((const double *)weight->data)[i]
           : weight->master != NULL    ? (double)weight->master[i]
                                       : (double)((const float *)weight->data)[i];
}

static bool is_near(const trial_t *a, const trial_t *b)
{
    double most = 0, worst = 0;
    for (int64_t i = 0; i < a->weight.count; i++) {
        most = fmax(most, fabs(wide_at(b, i)));
        worst = fmax(worst, fabs(wide_at(a, i) - wide_at(b, i)));
    }
    if (worst > 3e-7 * most)
        printf("    %g of %g\n", worst, most);
    return worst <= 3e-7 * most;
}

static const struct {
    kv_dtype_t dtype;
    bool master;
} types[] = {{KV_FLOAT32, false}, {KV_FLOAT64, false}, {KV_FLOAT16, true}, {KV_BFLOAT16, true}};

enum { TYPES = sizeof types / sizeof types[0] };

static double first[LENGTH], gradient[LENGTH]; /* of any type */

/* The same pushes whole and in these parts; exactly the same for one part. */
static void compare(int which, int type, int num_parts, const int64_t *starts)
{
    trial_t whole, parts;
    kv_dtype_t dtype = types[type].dtype;
    uint64_t random = 3;
    begin(&whole, which);
    begin(&parts, which);
    trial_fill(dtype, LENGTH, &random, first);
    if (CHECK(trial_make(&whole, dtype, LENGTH, LENGTH, first, types[type].master)) &&
        CHECK(trial_make(&parts, dtype, LENGTH, LENGTH, first, types[type].master))) {
        for (int push = 0; push < PUSHES; push++) {
            trial_fill(dtype, LENGTH, &random, gradient);
            trial_push_one(&whole, &host, gradient);
            push_parts(&parts, num_parts, starts, gradient);
        }
        CHECK(num_parts == 1 ? trial_same(&parts, &whole) : is_near(&parts, &whole));
    }
    trial_end(&whole);
    trial_end(&parts);
}

static void one_part_takes_the_same_step_as_the_whole(void)
{
    static const int64_t starts[] = {0, LENGTH};
    if (!host_open())
        return;
    for (int which = 0; which < CASES; which++)
        for (int type = 0; type < TYPES; type++)
            compare(which, type, 1, starts);
    host_close();
}

static void several_parts_take_it_together(void)
{
    static const int64_t starts[] = {0, 4096, 4101, 70000, LENGTH};
    if (!host_open())
        return;
    for (int which = 0; which < CASES; which++)
        for (int type = 0; type < TYPES; type++)
            compare(which, type, 4, starts);
    host_close();
}

/* Squares of one part have no place in 16 bits; those of the other one vanish there, and count if
 * they are not rounded. */
static void a_part_without_a_norm_decides_for_all(void)
{
    static const int64_t starts[] = {0, 1000, 2000};
    static float wide[2000];
    static uint16_t narrow[2000], ones[2000];
    if (!host_open())
        return;
    for (int i = 0; i < 2000; i++)
        ones[i] = 0x3c00;
    for (int large = 0; large < 2; large++) {
        double small = 1e-4, other = large ? 1000 : small;
        for (int i = 0; i < 2000; i++)
            wide[i] = (float)(i < 1000 ? small : other);
        host.kernels->float32_to[KV_FLOAT16](2000, wide, narrow);
        trial_t trial;
        trial_begin(&trial, "lars");
        trial.numbers.learning_rate = 100;
        if (CHECK(trial_make(&trial, KV_FLOAT16, 2000, 2000, ones, true))) {
            push_parts(&trial, 2, starts, narrow);
            /* Without a norm the rate is lr itself. */
            double norm = sqrt(1000 * (small * small + other * other));
            double rate = large ? 100 * 0.001 * sqrt(2000) / norm : 100;
            CHECK(fabs(1 - rate * other - (double)trial.weight.master[1999]) < 1e-5);
        }
        trial_end(&trial);
    }
    host_close();
}

static void residuals_wait_for_the_step(void)
{
    trial_t whole, parts;
    uint64_t random = 5;
    static float residuals[2][LENGTH];
    kv_step_t step;
    kv_norm_sums_t sums;
    if (!host_open())
        return;
    begin(&whole, 0);
    begin(&parts, 0);
    trial_fill(KV_FLOAT32, LENGTH, &random, first);
    if (CHECK(trial_make(&whole, KV_FLOAT32, LENGTH, LENGTH, first, false)) &&
        CHECK(trial_make(&parts, KV_FLOAT32, LENGTH, LENGTH, first, false))) {
        for (int push = 0; push < 2; push++) {
            const void *src = gradient;
            void *residual[] = {residuals[0], residuals[1]};
            trial_fill(KV_FLOAT32, LENGTH, &random, gradient);
            kv_gradients_t gradients = {.num_src = 1,
                                        .src = &src,
                                        .codec = {KV_CODEC_2BIT, 0.3},
                                        .residuals = &residual[0]};
            trial_push(&whole, &host, &gradients, 0, NULL);
            gradients.residuals = &residual[1];
            trial_step(&parts, &step);
            kv_host_measure(&host, &step, &parts.weight, &gradients, &sums);
            (void)kv_host_update_part(&host, &step, &parts.weight, &gradients, &sums);
            CHECK(trial_same(&parts, &whole));
            CHECK(memcmp(residuals[0], residuals[1], sizeof residuals[0]) == 0);
        }
    }
    trial_end(&whole);
    trial_end(&parts);
    host_close();
}

static const test_t tests[] = {
    TEST(one_part_takes_the_same_step_as_the_whole),
    TEST(several_parts_take_it_together),
    TEST(a_part_without_a_norm_decides_for_all),
    TEST(residuals_wait_for_the_step),
};
TEST_MAIN(tests)
