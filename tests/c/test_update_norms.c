/* Steps that look at more than one element: norms of the whole value, means of rows and of pushes;
 * and steps with a codec, with random numbers, or that must not move. */
#include "update.h"

#include "comm/update_internal.h"

enum { COUNT = 3000, LARGE = 200000 };

static kv_host_t host;

static bool host_open(int num_threads)
{
    host = (kv_host_t){.num_threads = num_threads};
    return CHECK_STATUS(kv_kernels_get(&host.kernels), KV_OK) &&
           CHECK_STATUS(kv_team_new(num_threads, &host.team), KV_OK);
}

static void host_close(void)
{
    kv_team_stop(host.team);
    kv_team_free(host.team);
}

static double squares(int64_t count, const double *x)
{
    double sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum += x[i] * x[i];
    return sum;
}

static bool near(double a, double b, double bound)
{
    bool held = fabs(a - b) <= bound * (1 + fabs(b));
    if (!held)
        printf("    %.17g is not %.17g\n", a, b);
    return held;
}

/* The tree over leaves [first, first + count), from its definition: the left side is the largest
 * power of two that leaves something over. */
static double tree(const double *leaves, int64_t count)
{
    if (count == 1)
        return leaves[0];
    int64_t left = 1;
    while (left * 2 < count)
        left *= 2;
    return tree(leaves, left) + tree(leaves + left, count - left);
}

static void squares_are_added_in_blocks_and_the_blocks_in_a_tree(void)
{
    static float x[LARGE];
    static double leaves[LARGE / KV_SQUARES_BLOCK + 1];
    uint64_t random = 2;
    trial_fill(KV_FLOAT32, LARGE, &random, x);
    for (int64_t count = 1; count < LARGE; count = count * 2 + random % 50) {
        test_random(&random);
        int64_t num_leaves = 0;
        for (int64_t at = 0; at < count; at += KV_SQUARES_BLOCK) {
            volatile float sum = 0;
            for (int64_t i = at; i < count && i < at + KV_SQUARES_BLOCK; i++) {
                volatile float square = x[i] * x[i];
                sum = sum + square;
            }
            leaves[num_leaves++] = (double)sum;
        }
        kv_squares_t whole, parts;
        kv_squares_start(&whole);
        kv_squares_add(&whole, kv_kernels_at(0), false, KV_FLOAT32, count, x);
        CHECK(kv_squares_sum(&whole) == tree(leaves, num_leaves));
        /* In parts of a power of two of blocks, each summed apart. */
        for (int64_t part = KV_SQUARES_BLOCK; part <= 16 * KV_SQUARES_BLOCK; part *= 4) {
            kv_squares_start(&parts);
            for (int64_t at = 0; at < count; at += part) {
                kv_squares_t one;
                kv_squares_start(&one);
                kv_squares_add(&one, kv_kernels_at(0), false, KV_FLOAT32,
                               count - at < part ? count - at : part, x + at);
                kv_squares_leaf(&parts, kv_squares_sum(&one));
            }
            CHECK(kv_squares_sum(&parts) == kv_squares_sum(&whole));
        }
    }
}

static double values[LARGE], gradient[LARGE], due[LARGE], moments[2][LARGE];

static bool begin_large(trial_t *trial, const char *name)
{
    uint64_t random = 8;
    trial_fill(KV_FLOAT64, LARGE, &random, values);
    trial_fill(KV_FLOAT64, LARGE, &random, gradient);
    memcpy(due, values, sizeof due);
    memset(moments, 0, sizeof moments);
    trial_begin(trial, name);
    trial->numbers.wd = 0.02;
    trial->numbers.rescale_grad = 0.5;
    trial->numbers.learning_rate = 0.1;
    return host_open(2);
}

static bool agrees(const trial_t *trial)
{
    const double *got = trial->weight.data;
    for (int64_t i = 0; i < trial->weight.count; i++)
        if (!near(got[i], due[i], 1e-9))
            return false;
    return true;
}

static void lars_takes_the_norms_of_the_whole_value(void)
{
    trial_t trial;
    if (!begin_large(&trial, "lars"))
        return;
    *trial_param(&trial, "momentum") = 0.5;
    *trial_param(&trial, "eps") = 0.25;
    if (CHECK(trial_make(&trial, KV_FLOAT64, LARGE, LARGE, values, false))) {
        for (int push = 0; push < 2; push++) {
            double w = sqrt(squares(LARGE, due)), g = sqrt(squares(LARGE, gradient));
            double rate = 0.1 * 0.001 * w / (g * 0.5 + 0.02 * w + 0.25);
            for (int i = 0; i < LARGE; i++) {
                moments[0][i] = 0.5 * moments[0][i] - rate * (0.02 * due[i] + 0.5 * gradient[i]);
                due[i] += moments[0][i];
            }
            trial_push_one(&trial, &host, gradient);
        }
        CHECK(agrees(&trial));
    }
    trial_end(&trial);
    host_close();
}

static void lars_takes_its_rate_where_there_is_no_norm(void)
{
    trial_t trial;
    if (!begin_large(&trial, "lars"))
        return;
    trial.numbers.wd = 0;
    memset(values, 0, sizeof values);
    if (CHECK(trial_make(&trial, KV_FLOAT64, COUNT, COUNT, values, false))) {
        trial_push_one(&trial, &host, gradient);
        for (int i = 0; i < COUNT; i++)
            due[i] = -0.1 * 0.5 * gradient[i];
        CHECK(agrees(&trial));
    }
    trial_end(&trial);
    host_close();
}

static void lars_of_half_floats_stays_finite_where_squares_do_not_fit(void)
{
    static uint16_t narrow[COUNT], narrow_gradient[COUNT];
    static float large[COUNT];
    trial_t trial;
    if (!host_open(1))
        return;
    for (int i = 0; i < COUNT; i++)
        large[i] = 1000.0f; /* its square is no float16 */
    host.kernels->float32_to[KV_FLOAT16](COUNT, large, narrow_gradient);
    for (int i = 0; i < COUNT; i++)
        narrow[i] = 0x3c00; /* 1 */
    trial_begin(&trial, "lars");
    if (CHECK(trial_make(&trial, KV_FLOAT16, COUNT, COUNT, narrow, true))) {
        trial_push_one(&trial, &host, narrow_gradient);
        double rate = 0.01 * 0.001 * 1 / 1000.0;
        CHECK(fabs(1 - (double)trial.weight.master[5] - rate * 1000) < 0x1p-24);
    }
    trial_end(&trial);
    host_close();
}

static void lamb_takes_the_norms_of_weight_and_direction(void)
{
    for (int bounded = 0; bounded < 2; bounded++) {
        trial_t trial;
        if (!begin_large(&trial, "lamb"))
            return;
        if (bounded) {
            *trial_param(&trial, "upper_bound") = 3;
            *trial_param(&trial, "bias_correction") = 0;
        }
        static double u[LARGE];
        bool made = CHECK(trial_make(&trial, KV_FLOAT64, LARGE, LARGE, values, false));
        for (int t = 1; made && t <= 3; t++) {
            for (int i = 0; i < LARGE; i++) {
                double x = 0.5 * gradient[i];
                moments[0][i] = 0.9 * moments[0][i] + (1 - 0.9) * x;
                moments[1][i] = 0.999 * moments[1][i] + (1 - 0.999) * x * x;
                double m = moments[0][i] / (bounded ? 1 : 1 - pow(0.9, t));
                double v = moments[1][i] / (bounded ? 1 : 1 - pow(0.999, t));
                u[i] = m / (sqrt(v) + 1e-6) + 0.02 * due[i];
            }
            double r1 = sqrt(squares(LARGE, due));
            double ratio = (bounded ? 3 : r1) / sqrt(squares(LARGE, u));
            for (int i = 0; i < LARGE; i++)
                due[i] -= 0.1 * ratio * u[i];
            trial_push_one(&trial, &host, gradient);
        }
        CHECK(agrees(&trial));
        trial_end(&trial);
        host_close();
    }
}

static void group_adagrad_has_one_history_for_each_row(void)
{
    static const int64_t rows[] = {1, 7, 3000, 40000};
    for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++) {
        trial_t trial;
        int64_t length = rows[r], count = LARGE / length * length;
        if (!begin_large(&trial, "groupadagrad"))
            return;
        trial.numbers.wd = 0;
        trial.numbers.clip_gradient = 0.3;
        bool made = CHECK(trial_make(&trial, KV_FLOAT64, count, length, values, false));
        for (int push = 0; made && push < 2; push++) {
            for (int64_t row = 0; row < count / length; row++) {
                double sum = 0;
                for (int64_t i = row * length; i < (row + 1) * length; i++)
                    sum += pow(fmin(fmax(0.5 * gradient[i], -0.3), 0.3), 2);
                moments[0][row] += sum / (double)length;
                for (int64_t i = row * length; i < (row + 1) * length; i++)
                    due[i] -= 0.1 * fmin(fmax(0.5 * gradient[i], -0.3), 0.3) /
                              sqrt(moments[0][row] + 1e-5);
            }
            trial_push_one(&trial, &host, gradient);
        }
        CHECK(agrees(&trial));
        trial_end(&trial);
        host_close();
    }
}

static void lbsgd_steps_with_the_mean_of_its_pushes(void)
{
    static const char *const strategies[] = {"linear", "power2", "sqrt", "lars"};
    for (int strategy = 0; strategy < 4; strategy++) {
        trial_t trial;
        static double sum[LARGE];
        if (!begin_large(&trial, "lbsgd"))
            return;
        *trial_param(&trial, "momentum") = 0.5;
        *trial_param(&trial, "batch_scale") = 3;
        *trial_param(&trial, "warmup_epochs") = 2;
        *trial_param(&trial, "updates_per_epoch") = 5;
        *trial_param(&trial, "warmup_strategy") = strategy;
        memset(sum, 0, sizeof sum);
        bool made = CHECK(trial_make(&trial, KV_FLOAT64, LARGE, LARGE, values, false));
        for (int n = 1; made && n <= 12; n++) {
            gradient[n] += 1;
            for (int i = 0; i < LARGE; i++)
                sum[i] += gradient[i];
            if (n % 3 == 0) {
                for (int i = 0; i < LARGE; i++)
                    sum[i] /= 3;
                double x = n / 10.0, mult = 3;
                if (strategy == 3) {
                    double w2 = squares(LARGE, due), g2 = squares(LARGE, sum);
                    mult = sqrt(w2 / (g2 + 0.02 * w2));
                } else if (n < 10) {
                    mult = 1 + 2 * (strategy == 0 ? x : strategy == 1 ? x * x : sqrt(x));
                }
                for (int i = 0; i < LARGE; i++) {
                    moments[0][i] =
                        0.5 * moments[0][i] - 0.1 * mult * (0.02 * due[i] + 0.5 * sum[i]);
                    due[i] += moments[0][i];
                    sum[i] = 0;
                }
            }
            trial_push_one(&trial, &host, gradient);
            if (!CHECK(agrees(&trial)))
                printf("    %s, push %d\n", strategies[strategy], n);
        }
        trial_end(&trial);
        host_close();
    }
}

static void lbsgd_counts_from_where_its_keys_began(void)
{
    trial_t trial;
    if (!begin_large(&trial, "lbsgd"))
        return;
    *trial_param(&trial, "batch_scale") = 2;
    trial.pushes = trial.numbers.begin_num_update = 7;
    if (CHECK(trial_make(&trial, KV_FLOAT64, COUNT, COUNT, values, false))) {
        trial_push_one(&trial, &host, gradient);
        CHECK(memcmp(trial.weight.data, values, COUNT * sizeof(double)) == 0);
        trial_push_one(&trial, &host, gradient);
        CHECK(memcmp(trial.weight.data, values, COUNT * sizeof(double)) != 0);
    }
    trial_end(&trial);
    host_close();
}

/* ----------------------------------------------------------------------------- codecs */

static void codec_lies_between_gradients_and_step(void)
{
    static const char *const names[] = {"sgd", "lars", "lamb", "groupadagrad", "adam"};
    static float g[2][LARGE], start[LARGE], residual[2][2][LARGE], decoded[LARGE];
    static float out[LARGE];
    uint64_t random = 12;
    trial_fill(KV_FLOAT32, LARGE, &random, start);
    trial_fill(KV_FLOAT32, LARGE, &random, g[0]);
    trial_fill(KV_FLOAT32, LARGE, &random, g[1]);
    if (!host_open(2))
        return;
    for (size_t n = 0; n < sizeof names / sizeof names[0]; n++) {
        trial_t compressed, plain;
        memset(residual, 0, sizeof residual);
        trial_begin(&compressed, names[n]);
        trial_begin(&plain, names[n]);
        bool made = trial_make(&compressed, KV_FLOAT32, LARGE, 2000, start, false);
        made = trial_make(&plain, KV_FLOAT32, LARGE, 2000, start, false) && made;
        const void *src[] = {g[0], g[1]};
        void *ours[] = {residual[0][0], residual[0][1]},
             *theirs[] = {residual[1][0], residual[1][1]};
        kv_gradients_t gradients = {.num_src = 2,
                                    .src = src,
                                    .codec = {.type = KV_CODEC_2BIT, .threshold = 0.5},
                                    .residuals = ours};
        kv_gradients_t apart = gradients;
        apart.residuals = theirs;
        for (int push = 0; CHECK(made) && push < 3; push++) {
            void *dst[] = {decoded, out};
            CHECK_EQ(trial_push(&compressed, &host, &gradients, 0, NULL), 0);
            CHECK_EQ(kv_host_sum_gradients(&host, KV_FLOAT32, LARGE, &apart, 2, dst), 0);
            CHECK(memcmp(decoded, out, sizeof out) == 0);
            trial_push_one(&plain, &host, decoded);
            CHECK(memcmp(residual[0], residual[1], sizeof residual[0]) == 0);
            if (!CHECK(trial_same(&compressed, &plain)))
                printf("    %s, push %d\n", names[n], push);
        }
        trial_end(&compressed);
        trial_end(&plain);
    }
    host_close();
}

static void compressed_sum_is_that_of_the_codes_rounded_once(void)
{
    static uint16_t g[3][LARGE], out[LARGE];
    static float residual[3][LARGE];
    uint64_t random = 13;
    if (!host_open(2))
        return;
    for (int k = 0; k < 3; k++)
        trial_fill(KV_FLOAT16, LARGE, &random, g[k]);
    const void *src[] = {g[0], g[1], g[2]};
    void *residuals[] = {residual[0], residual[1], residual[2]};
    kv_gradients_t gradients = {.num_src = 3,
                                .src = src,
                                .codec = {.type = KV_CODEC_2BIT, .threshold = 0.3},
                                .residuals = residuals};
    g[1][77] = 0x7c00; /* infinite: its residual stays so */
    for (int push = 0; push < 2; push++) {
        static float before[3][LARGE];
        memcpy(before, residual, sizeof before);
        void *dst[] = {out};
        CHECK_EQ(kv_host_sum_gradients(&host, KV_FLOAT16, LARGE, &gradients, 1, dst), 1);
        bool right = true;
        for (int i = 0; i < LARGE; i++) {
            float sum = 0;
            for (int k = 0; k < 3; k++) {
                float x;
                host.kernels->float32_from[KV_FLOAT16](1, &g[k][i], &x);
                x += before[k][i];
                sum += x >= 0.3f ? 0.3f : x <= -0.3f ? -0.3f : 0;
            }
            uint16_t rounded;
            host.kernels->float32_to[KV_FLOAT16](1, &sum, &rounded);
            right = right && (rounded == out[i] || (sum == 0 && (out[i] & 0x7fff) == 0));
        }
        CHECK(right);
    }
    host_close();
}

/* ------------------------------------------------------------- chance, and not moving */

static void philox_gives_the_published_words(void)
{
    uint32_t words[4];
    kv_philox(0, 0, 0, words);
    CHECK(words[0] == 0x6627e8d5 && words[1] == 0xe169c58d && words[2] == 0xbc57ac4c &&
          words[3] == 0x9b00dbd8);
    kv_philox(UINT64_MAX, UINT64_MAX, UINT64_MAX, words);
    CHECK(words[0] == 0x408f276d && words[1] == 0x41c83b0e && words[2] == 0xa20bc7c6 &&
          words[3] == 0x6d5451fd);
}

static void sgld_adds_noise_of_the_root_of_its_rate(void)
{
    trial_t trial;
    if (!begin_large(&trial, "sgld"))
        return;
    trial.numbers.learning_rate = 0.04;
    for (int i = 0; i < LARGE; i++) {
        values[i] = 0.3;
        gradient[i] = 0.2;
    }
    if (CHECK(trial_make(&trial, KV_FLOAT64, LARGE, LARGE, values, false))) {
        const double *w = trial.weight.data;
        double sum = 0, square = 0, beside = 0, drift = -0.02 * (0.5 * 0.2 + 0.02 * 0.3);
        trial_push_one(&trial, &host, gradient);
        for (int i = 0; i < LARGE; i++) {
            double noise = w[i] - 0.3 - drift;
            sum += noise;
            square += noise * noise;
            if (i > 0)
                beside += noise * (w[i - 1] - 0.3 - drift);
        }
        double deviation = sqrt(square / LARGE);
        CHECK(fabs(sum / LARGE) < 4 * 0.2 / sqrt(LARGE));
        CHECK(fabs(deviation - 0.2) < 0.002);
        CHECK(fabs(beside / LARGE) < 4 * 0.04 / sqrt(LARGE));
        double first = w[0] - 0.3;
        trial_push_one(&trial, &host, gradient); /* another draw */
        CHECK(fabs(w[0] - 0.3 - 2 * first) > 1e-6);
    }
    trial_end(&trial);
    host_close();
}

static void adamax_leaves_alone_what_never_had_a_gradient(void)
{
    trial_t trial;
    if (!begin_large(&trial, "adamax"))
        return;
    trial.numbers.wd = 0;
    for (int i = 0; i < COUNT; i += 2)
        gradient[i] = 0;
    if (CHECK(trial_make(&trial, KV_FLOAT64, COUNT, COUNT, values, false))) {
        trial_push_one(&trial, &host, gradient);
        const double *w = trial.weight.data;
        bool right = true;
        for (int i = 0; i < COUNT; i++)
            right = right && (i % 2 == 0 ? w[i] == values[i] : isfinite(w[i]) && w[i] != values[i]);
        CHECK(right);
    }
    trial_end(&trial);
    host_close();
}

static void rate_of_zero_moves_nothing(void)
{
    const kv_optim_class_t *optim;
    for (int c = 0; (optim = kv_optim_class_at(c)) != NULL; c++) {
        trial_t trial;
        /* These move without a rate. */
        if (strcmp(optim->name, "test") == 0 || strcmp(optim->name, "adadelta") == 0)
            continue;
        if (!begin_large(&trial, optim->name))
            return;
        trial.numbers.wd = 0;
        trial.lr_mult = 0;
        if (CHECK(trial_make(&trial, KV_FLOAT64, COUNT, COUNT, values, false))) {
            static double copy[COUNT];
            void *dst[] = {copy};
            const void *src[] = {gradient};
            kv_gradients_t gradients = {.num_src = 1, .src = src};
            for (int push = 0; push < 2; push++)
                trial_push(&trial, &host, &gradients, 1, dst);
            bool held = memcmp(trial.weight.data, values, sizeof copy) == 0 &&
                        memcmp(copy, values, sizeof copy) == 0;
            if (!CHECK(held))
                printf("    %s\n", optim->title);
        }
        trial_end(&trial);
        host_close();
    }
}

static const test_t tests[] = {
    TEST(squares_are_added_in_blocks_and_the_blocks_in_a_tree),
    TEST(lars_takes_the_norms_of_the_whole_value),
    TEST(lars_takes_its_rate_where_there_is_no_norm),
    TEST(lars_of_half_floats_stays_finite_where_squares_do_not_fit),
    TEST(lamb_takes_the_norms_of_weight_and_direction),
    TEST(group_adagrad_has_one_history_for_each_row),
    TEST(lbsgd_steps_with_the_mean_of_its_pushes),
    TEST(lbsgd_counts_from_where_its_keys_began),
    TEST(codec_lies_between_gradients_and_step),
    TEST(compressed_sum_is_that_of_the_codes_rounded_once),
    TEST(philox_gives_the_published_words),
    TEST(sgld_adds_noise_of_the_root_of_its_rate),
    TEST(adamax_leaves_alone_what_never_had_a_gradient),
    TEST(rate_of_zero_moves_nothing),
};
TEST_MAIN(tests)
