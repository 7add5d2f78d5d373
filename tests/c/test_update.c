/* Steps on memory: every optimizer against its formula, written here for one element in double;
 * sums, copies, 16-bit weights; and that neither the instruction set nor the number of threads
 * changes a bit. */
#include "update.h"

enum { COUNT = 777, LARGE = 300000 };

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

/* ---------------------------------------------------------------------- the formulas */

typedef struct formula {
    trial_t *trial;
    double lr, wd, t, product;
} formula_t;

static double clip(const formula_t *f, double x)
{
    double c = f->trial->numbers.clip_gradient;
    return isnan(c) ? x : fmin(fmax(x, -c), c);
}

static double param(const formula_t *f, const char *name)
{
    return *trial_param(f->trial, name);
}

static double sign(double x)
{
    return x > 0 ? 1 : x < 0 ? -1 : 0;
}

/* One element by its class's formula; s is its state. False for the classes with norms. */
static bool apply(const formula_t *f, double grad, double *w, double *s)
{
    const char *name = f->trial->optim->name;
    double g = f->trial->numbers.rescale_grad * grad, x = clip(f, g), xd = clip(f, g + f->wd * *w);
    double lr = f->lr, wd = f->wd, momentum = param(f, "momentum");
    double b1 = param(f, "beta1"), b2 = param(f, "beta2"), eps = param(f, "epsilon");
    double c1 = 1 - pow(b1, f->t), c2 = 1 - pow(b2, f->t);
    if (strcmp(name, "test") == 0) {
        s[0] = *w += g;
    } else if (strcmp(name, "sgd") == 0 || strcmp(name, "lbsgd") == 0) {
        s[0] = momentum * s[0] - lr * (wd * *w + x);
        *w += s[0];
    } else if (strcmp(name, "nag") == 0) {
        double p = momentum * s[0];
        *w += -p + (1 + momentum) * (p - lr * (x + wd * *w));
        s[0] = p - lr * (x + wd * *w);
    } else if (strcmp(name, "signum") == 0 && momentum == 0) {
        *w = (1 - lr * wd) * *w - lr * sign(grad);
    } else if (strcmp(name, "signum") == 0) {
        s[0] = momentum * s[0] - (1 - momentum) * (wd * *w + x);
        *w = (1 - lr * param(f, "wd_lh")) * *w + lr * sign(s[0]);
    } else if (strcmp(name, "adam") == 0) {
        s[0] = b1 * s[0] + (1 - b1) * xd;
        s[1] = b2 * s[1] + (1 - b2) * xd * xd;
        *w -= lr * sqrt(c2) / c1 * s[0] / (sqrt(s[1]) + eps);
    } else if (strcmp(name, "adamw") == 0) {
        s[0] = b1 * s[0] + (1 - b1) * x;
        s[1] = b2 * s[1] + (1 - b2) * x * x;
        double rate = param(f, "correct_bias") != 0 ? lr * sqrt(c2) / c1 : lr;
        *w -= param(f, "eta") * (rate * s[0] / (sqrt(s[1]) + eps) + wd * *w);
    } else if (strcmp(name, "adagrad") == 0) {
        s[0] += x * x;
        *w -= lr * (x / sqrt(s[0] + param(f, "eps")) + wd * *w);
    } else if (strcmp(name, "rmsprop") == 0) {
        double g1 = param(f, "gamma1"), limit = param(f, "clip_weights");
        s[0] = g1 * s[0] + (1 - g1) * xd * xd;
        if (param(f, "centered") != 0) {
            s[1] = g1 * s[1] + (1 - g1) * xd;
            s[2] = param(f, "gamma2") * s[2] - lr * xd / sqrt(s[0] - s[1] * s[1] + eps);
            *w += s[2];
        } else {
            *w -= lr * xd / sqrt(s[0] + eps);
        }
        if (!isnan(limit))
            *w = fmin(fmax(*w, -limit), limit);
    } else if (strcmp(name, "adadelta") == 0) {
        double rho = param(f, "rho");
        s[0] = rho * s[0] + (1 - rho) * x * x;
        double d = sqrt(s[1] + eps) / sqrt(s[0] + eps) * x;
        s[1] = rho * s[1] + (1 - rho) * d * d;
        *w -= d + wd * *w;
    } else if (strcmp(name, "ftrl") == 0) {
        double l1 = param(f, "lamda1");
        s[0] += x - (sqrt(s[1] + x * x) - sqrt(s[1])) * *w / lr;
        s[1] += x * x;
        *w = fabs(s[0]) > l1
                 ? (sign(s[0]) * l1 - s[0]) / ((param(f, "beta") + sqrt(s[1])) / lr + wd)
                 : 0;
    } else if (strcmp(name, "adamax") == 0) {
        s[0] = b1 * s[0] + (1 - b1) * xd;
        s[1] = fmax(b2 * s[1], fabs(xd));
        *w -= s[1] == 0 ? 0 : lr / c1 * s[0] / s[1];
    } else if (strcmp(name, "nadam") == 0) {
        double decay = param(f, "schedule_decay");
        double now = b1 * (1 - 0.5 * pow(0.96, f->t * decay));
        double next = b1 * (1 - 0.5 * pow(0.96, (f->t + 1) * decay));
        s[0] = b1 * s[0] + (1 - b1) * xd;
        s[1] = b2 * s[1] + (1 - b2) * xd * xd;
        double move = (1 - now) * xd / (1 - f->product) + next * s[0] / (1 - f->product * next);
        *w -= lr * move / (sqrt(s[1] / c2) + eps);
    } else if (strcmp(name, "ftml") == 0) {
        s[1] = b2 * s[1] + (1 - b2) * xd * xd;
        double e = c1 / lr * (sqrt(s[1] / c2) + eps);
        s[2] = b1 * s[2] + (1 - b1) * xd - (e - b1 * s[0]) * *w;
        s[0] = e;
        *w = -s[2] / e;
    } else if (strcmp(name, "dcasgd") == 0) {
        double d = -lr * (x + wd * *w + param(f, "lamda") * x * x * (*w - s[0]));
        s[0] = *w;
        s[1] = momentum * s[1] + d;
        *w += s[1];
    } else {
        return false;
    }
    return true;
}

/* Six pushes of COUNT elements, against the formula. `bound`: the difference that rounding makes,
 * as a share of 1. */
static bool follows_its_formula(trial_t *trial, kv_dtype_t dtype, double bound)
{
    static double values[COUNT], gradient[COUNT], due[COUNT], states[COUNT][KV_MAX_SLOTS];
    static char cast[COUNT * 8];
    uint64_t random = 11;
    trial_t before = *trial;
    memset(states, 0, sizeof states);
    trial_fill(KV_FLOAT64, COUNT, &random, values);
    for (int i = 0; i < COUNT; i++) {
        due[i] = values[i] = (float)values[i];
        if (strcmp(trial->optim->name, "dcasgd") == 0)
            states[i][0] = due[i];
        if (dtype == KV_FLOAT32)
            ((float *)cast)[i] = (float)values[i];
    }
    bool right = CHECK(
        trial_make(trial, dtype, COUNT, COUNT, dtype == KV_FLOAT32 ? cast : (void *)values, false));
    double worst = 0;
    for (int push = 0; right && push < 6; push++) {
        kv_step_t step;
        trial_fill(KV_FLOAT64, COUNT, &random, gradient);
        for (int i = 0; i < COUNT; i++) {
            gradient[i] = i % 50 == 0 ? 0 : (float)gradient[i];
            if (dtype == KV_FLOAT32)
                ((float *)cast)[i] = (float)gradient[i];
        }
        trial_step(trial, &step);
        const void *src = dtype == KV_FLOAT32 ? cast : (void *)gradient;
        kv_gradients_t gradients = {.num_src = 1, .src = &src};
        kv_host_update(&host, &step, &trial->weight, &gradients, 0, NULL);
        formula_t formula = {trial, trial->numbers.learning_rate * trial->lr_mult,
                             trial->numbers.wd * trial->wd_mult, (double)trial->pushes,
                             step.product};
        for (int i = 0; i < COUNT; i++) {
            right = apply(&formula, gradient[i], &due[i], states[i]) && right;
            double got = dtype == KV_FLOAT32 ? (double)((float *)trial->weight.data)[i]
                                             : ((double *)trial->weight.data)[i];
            worst = fmax(worst, fabs(got - due[i])); /* a NaN is caught below */
            right = right && isfinite(got);
        }
    }
    right = right && worst < bound;
    if (!right)
        printf("    %s of %s: off by %g\n", trial->optim->title, kv_dtype_name(dtype), worst);
    trial_end(trial);
    *trial = before;
    return right;
}

static void every_optimizer_follows_its_formula(void)
{
    static const struct {
        const char *optim, *param;
        double value;
    } cases[] = {{"test", "", 0},
                 {"sgd", "", 0},
                 {"sgd", "momentum", 0.9},
                 {"lbsgd", "", 0},
                 {"lbsgd", "momentum", 0.9},
                 {"nag", "", 0},
                 {"nag", "momentum", 0.9},
                 {"signum", "momentum", 0},
                 {"signum", "wd_lh", 0.01},
                 {"adam", "", 0},
                 {"adamw", "", 0},
                 {"adamw", "correct_bias", 0},
                 {"adagrad", "", 0},
                 {"rmsprop", "", 0},
                 {"rmsprop", "centered", 1},
                 {"rmsprop", "clip_weights", 0.4},
                 {"adadelta", "", 0},
                 {"ftrl", "", 0},
                 {"adamax", "", 0},
                 {"nadam", "", 0},
                 {"ftml", "", 0},
                 {"dcasgd", "", 0},
                 {"dcasgd", "momentum", 0.5}};
    if (!host_open(1))
        return;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (int clipped = 0; clipped < 2; clipped++) {
            trial_t trial;
            trial_begin(&trial, cases[i].optim);
            *trial_param(&trial, cases[i].param) = cases[i].value;
            trial.numbers.wd = 0.02;
            trial.numbers.rescale_grad = 0.5;
            trial.numbers.clip_gradient = clipped ? 0.3 : NAN;
            trial.lr_mult = 2;
            trial.wd_mult = 0.5;
            CHECK(follows_its_formula(&trial, KV_FLOAT64, 1e-9));
            /* 1 - beta2 of a rounded beta2 is what tells float32 apart. */
            CHECK(follows_its_formula(&trial, KV_FLOAT32, 2e-5));
        }
    host_close();
}

/* --------------------------------------------------------------------- the same bits */

static const char *const all_names[] = {"sgd",   "nag",     "signum",       "ftml",    "lars",
                                        "lbsgd", "lamb",    "dcasgd",       "sgld",    "adam",
                                        "adamw", "adagrad", "groupadagrad", "rmsprop", "adadelta",
                                        "ftrl",  "adamax",  "nadam",        "test"};

/* An optimizer in one of its forms: bit 0 momentum or centered, bit 1 a clip. */
static void trial_form(trial_t *trial, const char *name, int form)
{
    trial_begin(trial, name);
    if ((form & 1) != 0) {
        *trial_param(trial, "momentum") = 0.9;
        *trial_param(trial, "centered") = 1;
        *trial_param(trial, "batch_scale") = 2;
        *trial_param(trial, "clip_weights") = 0.7;
    } else {
        *trial_param(trial, "momentum") = 0;
        *trial_param(trial, "warmup_strategy") = 3;
    }
    trial->numbers.wd = strcmp(name, "groupadagrad") == 0 ? 0 : 0.01;
    trial->numbers.clip_gradient = (form & 2) != 0 ? 0.4 : NAN;
}

/* Three pushes of two gradients with these numbers of threads and kernels, into `trial`. */
static bool run_trial(trial_t *trial, const char *name, int form, kv_dtype_t dtype, int64_t count,
                      int64_t row, bool master, const kv_host_t *on)
{
    size_t bytes = (size_t)count * kv_dtype_bytes(dtype);
    uint64_t random = 3;
    char *memory = malloc(3 * bytes);
    trial_form(trial, name, form);
    bool made = memory != NULL;
    if (made) {
        trial_fill(dtype, 3 * count, &random, memory);
        made = trial_make(trial, dtype, count, row, memory, master);
    }
    const void *src[] = {memory + bytes, memory + 2 * bytes};
    kv_gradients_t gradients = {.num_src = 2, .src = src};
    for (int push = 0; made && push < 3; push++)
        trial_push(trial, on, &gradients, 0, NULL);
    free(memory);
    return made;
}

static void all_instruction_sets_step_to_the_same_bits(void)
{
    static const int64_t counts[] = {1, 3, 15, 17, 40, 333, 1500};
    if (!host_open(1))
        return;
    for (size_t n = 0; n < sizeof all_names / sizeof all_names[0]; n++)
        for (int form = 0; form < 4; form++)
            for (int dtype = KV_FLOAT64; dtype <= KV_BFLOAT16; dtype++)
                for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++) {
                    trial_t first, other;
                    kv_host_t on = host;
                    int64_t row = counts[c] % 3 == 0 ? counts[c] / 3 : 1;
                    on.kernels = kv_kernels_at(0);
                    bool master = dtype >= KV_FLOAT16 && c % 2 == 0;
                    bool same = run_trial(&first, all_names[n], form, (kv_dtype_t)dtype, counts[c],
                                          row, master, &on);
                    for (int k = 1; (on.kernels = kv_kernels_at(k)) != NULL; k++) {
                        same = run_trial(&other, all_names[n], form, (kv_dtype_t)dtype, counts[c],
                                         row, master, &on) &&
                               trial_same(&first, &other) && same;
                        trial_end(&other);
                    }
                    if (!CHECK(same))
                        printf("    %s, form %d, %s, %d elements\n", all_names[n], form,
                               kv_dtype_name((kv_dtype_t)dtype), (int)counts[c]);
                    trial_end(&first);
                }
    host_close();
}

static void number_of_threads_changes_no_bit(void)
{
    for (size_t n = 0; n < sizeof all_names / sizeof all_names[0]; n++)
        for (int form = 0; form < 2; form++) {
            kv_dtype_t dtype = n % 3 == 0 ? KV_FLOAT64 : n % 3 == 1 ? KV_FLOAT32 : KV_FLOAT16;
            /* Rows that are shorter, and longer, than a block. */
            int64_t row = form == 0 ? 30 : LARGE / 10;
            trial_t alone, shared;
            if (!host_open(1))
                return;
            bool same = run_trial(&alone, all_names[n], form, dtype, LARGE, row,
                                  form == 1 && n % 3 == 2, &host);
            host_close();
            for (int threads = 2; threads <= 3; threads++) {
                if (!host_open(threads))
                    return;
                same = run_trial(&shared, all_names[n], form, dtype, LARGE, row,
                                 form == 1 && n % 3 == 2, &host) &&
                       trial_same(&alone, &shared) && same;
                host_close();
                trial_end(&shared);
            }
            if (!CHECK(same))
                printf("    %s, form %d\n", all_names[n], form);
            trial_end(&alone);
        }
}

/* ---------------------------------------------------------------- sums, copies, 16 bits */

static void several_gradients_are_summed_left_to_right_and_unrounded(void)
{
    enum { SRC = 5 };
    static float src[SRC][COUNT], sum[COUNT], values[COUNT];
    static uint16_t narrow[SRC][COUNT], narrow_values[COUNT];
    uint64_t random = 21;
    if (!host_open(1))
        return;
    trial_fill(KV_FLOAT32, COUNT, &random, values);
    trial_fill(KV_FLOAT16, COUNT, &random, narrow_values);
    for (int k = 0; k < SRC; k++) {
        trial_fill(KV_FLOAT32, COUNT, &random, src[k]);
        host.kernels->float32_to[KV_FLOAT16](COUNT, src[k], narrow[k]);
    }
    for (int dtype = KV_FLOAT32; dtype <= KV_FLOAT16; dtype++) {
        const void *pointers[SRC];
        for (int k = 0; k < SRC; k++) {
            pointers[k] = dtype == KV_FLOAT32 ? (void *)src[k] : (void *)narrow[k];
            if (dtype == KV_FLOAT16)
                host.kernels->float32_from[KV_FLOAT16](COUNT, narrow[k], src[k]);
            for (int i = 0; i < COUNT; i++)
                sum[i] = k == 0 ? src[k][i] : sum[i] + src[k][i];
        }
        /* The float16 weight has a master; the same step on float32 is what it must follow. */
        trial_t many, one;
        trial_begin(&many, "adam");
        trial_begin(&one, "adam");
        void *start = dtype == KV_FLOAT32 ? (void *)values : (void *)narrow_values;
        bool made = trial_make(&many, (kv_dtype_t)dtype, COUNT, COUNT, start, dtype == KV_FLOAT16);
        if (dtype == KV_FLOAT16)
            host.kernels->float32_from[KV_FLOAT16](COUNT, narrow_values, values);
        made = trial_make(&one, KV_FLOAT32, COUNT, COUNT, values, false) && made;
        if (CHECK(made)) {
            kv_gradients_t gradients = {.num_src = SRC, .src = pointers};
            for (int push = 0; push < 2; push++) {
                trial_push(&many, &host, &gradients, 0, NULL);
                trial_push_one(&one, &host, sum);
            }
            float *got = dtype == KV_FLOAT32 ? many.weight.data : many.weight.master;
            CHECK(memcmp(got, one.weight.data, sizeof sum) == 0);
            if (dtype == KV_FLOAT16) {
                static uint16_t rounded[COUNT];
                host.kernels->float32_to[KV_FLOAT16](COUNT, one.weight.data, rounded);
                CHECK(memcmp(many.weight.data, rounded, sizeof rounded) == 0);
            }
        }
        trial_end(&many);
        trial_end(&one);
    }
    host_close();
}

static void destinations_are_the_weight_also_where_they_are_sources(void)
{
    static float values[LARGE], gradient[LARGE], other[LARGE];
    static char unaligned[LARGE * 4 + 1];
    if (!host_open(2))
        return;
    for (int count = 1; count <= LARGE; count = count * 7 + 1)
        for (int num_src = 1; num_src <= 2; num_src++) {
            trial_t trial;
            uint64_t random = 9;
            trial_fill(KV_FLOAT32, count, &random, values);
            trial_fill(KV_FLOAT32, count, &random, gradient);
            trial_begin(&trial, "sgd");
            trial.numbers.learning_rate = 0.5;
            if (!CHECK(trial_make(&trial, KV_FLOAT32, count, count, values, false)))
                break;
            const void *src[] = {gradient, values};
            void *dst[] = {gradient, unaligned + 1, other};
            for (int i = 0; i < count; i++)
                other[i] = num_src == 1 ? gradient[i] : gradient[i] + values[i];
            static float due[LARGE];
            for (int i = 0; i < count; i++)
                due[i] = values[i] - 0.5f * other[i];
            kv_gradients_t gradients = {.num_src = num_src, .src = src};
            trial_push(&trial, &host, &gradients, 3, dst);
            size_t bytes = (size_t)count * sizeof(float);
            CHECK(memcmp(trial.weight.data, due, bytes) == 0);
            for (int j = 0; j < 3; j++)
                CHECK(memcmp(dst[j], due, bytes) == 0);
            trial_end(&trial);
        }
    host_close();
}

static void unaligned_gradient_is_read_as_any_other(void)
{
    static float values[COUNT], gradient[COUNT];
    static char memory[COUNT * 4 + 3];
    uint64_t random = 6;
    trial_t plain, odd;
    if (!host_open(1))
        return;
    trial_fill(KV_FLOAT32, COUNT, &random, values);
    trial_fill(KV_FLOAT32, COUNT, &random, gradient);
    memcpy(memory + 3, gradient, sizeof gradient);
    trial_begin(&plain, "rmsprop");
    trial_begin(&odd, "rmsprop");
    bool made = trial_make(&plain, KV_FLOAT32, COUNT, 1, values, false);
    if (CHECK(trial_make(&odd, KV_FLOAT32, COUNT, 1, values, false) && made)) {
        trial_push_one(&plain, &host, gradient);
        trial_push_one(&odd, &host, memory + 3);
        CHECK(trial_same(&plain, &odd));
    }
    trial_end(&plain);
    trial_end(&odd);
    host_close();
}

static void wide_sums_are_not_rounded_in_any_instruction_set(void)
{
    enum { SRC = 3 };
    static char memory[SRC][COUNT * 8 + 64];
    static char block[COUNT * 8 + 8], due[COUNT * 8 + 8];
    const kv_kernels_t *kernels;
    uint64_t random = 4;
    for (int k = 0; (kernels = kv_kernels_at(k)) != NULL; k++)
        for (int dtype = KV_FLOAT64; dtype <= KV_BFLOAT16; dtype++)
            for (int round = 0; round < 60; round++) {
                size_t wide = dtype == KV_FLOAT64 ? 8 : 4;
                int64_t begin = test_between(&random, 0, 40);
                int64_t end = test_between(&random, begin, begin + (round < 30 ? 70 : 700));
                int num_src = (int)test_between(&random, 1, SRC);
                const void *src[SRC];
                for (int s = 0; s < num_src; s++) {
                    static double filled[COUNT];
                    int shift = (int)test_between(&random, 0, 63);
                    trial_fill((kv_dtype_t)dtype, end, &random, filled);
                    src[s] = memcpy(memory[s] + shift, filled,
                                    (size_t)end * kv_dtype_bytes((kv_dtype_t)dtype));
                }
                memset(block, 0x5a, sizeof block);
                memset(due, 0x5a, sizeof due);
                for (int64_t i = begin; i < end; i++)
                    for (int s = 0; s < num_src; s++) {
                        const char *from =
                            (const char *)src[s] + (size_t)i * kv_dtype_bytes((kv_dtype_t)dtype);
                        if (dtype == KV_FLOAT64) {
                            double x, *to = (double *)due + (i - begin);
                            memcpy(&x, from, sizeof x);
                            *to = s == 0 ? x : *to + x;
                        } else {
                            float x, *to = (float *)due + (i - begin);
                            if (dtype == KV_FLOAT32)
                                memcpy(&x, from, sizeof x);
                            else
                                kernels->float32_from[dtype](1, from, &x);
                            *to = s == 0 ? x : *to + x;
                        }
                    }
                kernels->sum_wide[dtype](begin, end, num_src, src, block);
                CHECK(memcmp(block, due, (size_t)(end - begin) * wide + 8) == 0);
            }
}

static void widen_is_exact_at_every_size(void)
{
    static uint16_t narrow[LARGE * 2];
    static float wide[LARGE * 2], due[LARGE * 2];
    if (!host_open(2))
        return;
    for (int i = 0; i < LARGE * 2; i++)
        narrow[i] = (uint16_t)(i % 0x7c00);
    for (int64_t count = 1; count <= LARGE * 2; count = count * 9 + 5) {
        memset(wide, 0x5a, sizeof wide);
        memset(due, 0x5a, sizeof due);
        kv_kernels_at(0)->float32_from[KV_FLOAT16](count, narrow, due);
        kv_host_widen(&host, KV_FLOAT16, count, narrow, wide);
        CHECK(memcmp(wide, due, sizeof wide) == 0);
    }
    host_close();
}

static const test_t tests[] = {
    TEST(every_optimizer_follows_its_formula),
    TEST(all_instruction_sets_step_to_the_same_bits),
    TEST(number_of_threads_changes_no_bit),
    TEST(several_gradients_are_summed_left_to_right_and_unrounded),
    TEST(destinations_are_the_weight_also_where_they_are_sources),
    TEST(unaligned_gradient_is_read_as_any_other),
    TEST(wide_sums_are_not_rounded_in_any_instruction_set),
    TEST(widen_is_exact_at_every_size),
};
TEST_MAIN(tests)
