/* Optimizer steps and norms of a device against those of the CPU, bit for bit: each element
 * function with any factors, each class of optimizers over several pushes, sums of squares.
 *
 * SGLD draws its noise with log and cos, which a real device may round otherwise: there, and only
 * there, the weights may differ by a few units in the last place.
 */
#include "gpu.h"

#include "../c/update.h"
#include "comm/update_internal.h"

enum { JOBS = 4, SOURCES = 3, OUTPUTS = 2, PUSHES = 3 };

static kv_host_t host;

/* --------------------------------------------------------------------------- element functions */

static const struct {
    const char *name;
    int num_states;
} kinds[] = {
#define KIND(function, states) {#function, states},
    KV_STEP_LIST(KIND)
#undef KIND
};

typedef union factors {
    kv_factors_t_float single;
    kv_factors_t_double twice;
} factors_t;

/* Numbers above 0, of which the element functions make no sense, but the same one everywhere. */
#define FACTORS(type, real)                                                                        \
    static void factors_##real(type *f)                                                            \
    {                                                                                              \
        real *const numbers[] = {&f->lr, &f->wd,  &f->scale, &f->limit, &f->b1, &f->c1, &f->b2,    \
                                 &f->c2, &f->eps, &f->p,     &f->q,     &f->r,  &f->s1, &f->s2};   \
        for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)                            \
            *numbers[i] = (real)(0.05 + 0.9 * fabs(number()));                                     \
        f->clip = (int)between(0, 1);                                                              \
        f->limit_weight = (int)between(0, 1);                                                      \
        f->seed = test_random(&gpu_random);                                                        \
        f->draw = test_random(&gpu_random);                                                        \
    }
FACTORS(kv_factors_t_float, float)
FACTORS(kv_factors_t_double, double)
#undef FACTORS

typedef struct step_case {
    factors_t factors;
    array_t weight, master, states[KV_DEVICE_STATES], src[SOURCES], dst[OUTPUTS];
    const void *from[SOURCES];
    void *to[OUTPUTS];
} step_case_t;

/* What the CPU makes of the arrays on the host. */
static void step_here(kv_step_kind_t kind, kv_dtype_t dtype, const kv_device_step_t *job,
                      step_case_t *c)
{
    bool narrow = kv_dtype_is_narrow(dtype), is_double = dtype == KV_FLOAT64;
    const void *from[SOURCES];
    void *states[KV_DEVICE_STATES] = {NULL}, *gradient = host_new(job->count * 8);
    void *weight = c->weight.host;
    for (int i = 0; i < job->num_src; i++)
        from[i] = c->src[i].host;
    for (int i = 0; i < kinds[kind].num_states; i++)
        states[i] = c->states[i].host;
    if (job->num_src > 0)
        cpu()->sum_wide[c->src[0].dtype](0, job->count, job->num_src, from, gradient);
    if (job->master != NULL) {
        weight = c->master.host;
    } else if (narrow) {
        weight = host_new(job->count * 4);
        cpu()->float32_from[dtype](job->count, c->weight.host, weight);
    }
    (is_double ? cpu()->step_double : cpu()->step_float)[kind](0, job->count, &c->factors, gradient,
                                                               weight, states);
    if (kind == KV_STEP_lamb_moments)
        return;
    if (narrow)
        cpu()->float32_to[dtype](job->count, weight, c->weight.host);
    for (int i = 0; i < job->num_dst; i++)
        memcpy(c->dst[i].host, c->weight.host, (size_t)array_bytes(&c->weight));
}

static kv_device_step_t step_job(kv_step_kind_t kind, kv_dtype_t dtype, bool master, step_case_t *c)
{
    static const int64_t counts[] = {0, 1, 3, 5, 333, 1030};
    kv_dtype_t wide = kv_dtype_wide(dtype);
    kv_device_step_t job = {.count = counts[between(0, 5)],
                            .factors = &c->factors,
                            .wide = between(0, 3) == 0,
                            .num_src = (int)between(0, SOURCES),
                            .src = c->from,
                            .num_dst = (int)between(0, OUTPUTS),
                            .dst = c->to};
    int64_t element = (int64_t)kv_dtype_bytes(dtype), other = (int64_t)kv_dtype_bytes(wide);
    bool aligned = between(0, 1) == 0;
    if (wide == KV_FLOAT64)
        factors_double(&c->factors.twice);
    else
        factors_float(&c->factors.single);
    c->weight = array_random(dtype, job.count, 24, aligned ? 0 : element);
    job.weight = c->weight.device;
    if (master) {
        c->master = array_random(wide, job.count, 24, aligned ? 0 : other);
        job.master = c->master.device;
    }
    for (int i = 0; i < kinds[kind].num_states; i++) {
        c->states[i] = array_random(wide, job.count, 24, aligned ? 0 : other);
        job.states[i] = c->states[i].device;
    }
    for (int i = 0; i < job.num_src; i++) {
        kv_dtype_t of = job.wide ? wide : dtype;
        c->src[i] = array_random(of, job.count, 24, aligned ? 0 : any_shift(of));
        c->from[i] = c->src[i].device;
    }
    for (int i = 0; i < job.num_dst; i++) {
        c->dst[i] = array_random(dtype, job.count, 0, aligned ? 0 : any_shift(dtype));
        if (i == 0 && job.num_src > 0 && c->src[0].dtype == dtype && between(0, 1) == 0)
            c->dst[0] = c->src[0];
        c->to[i] = c->dst[i].device;
    }
    step_here(kind, dtype, &job, c);
    return job;
}

/* A weight of SGLD, on a real device: what is a few units in the last place off will do. */
static void let_noise_pass(array_t *array)
{
    if (emu.reset != NULL)
        return;
    int64_t bytes = (int64_t)kv_dtype_bytes(array->dtype);
    for (int64_t i = 0; i < array->count; i++) {
        uint64_t due = 0, got = 0;
        memcpy(&due, (char *)array->host + i * bytes, (size_t)bytes);
        memcpy(&got, (char *)array->back + i * bytes, (size_t)bytes);
        if (due - got + 4 <= 8)
            memcpy((char *)array->back + i * bytes, &due, (size_t)bytes);
    }
}

static void steps_of(kv_step_kind_t kind, kv_dtype_t dtype, bool master)
{
    static step_case_t cases[JOBS];
    kv_device_step_t jobs[JOBS];
    array_t *all[JOBS * (2 + KV_DEVICE_STATES + OUTPUTS)];
    int num = 0;
    for (int j = 0; j < JOBS; j++) {
        step_case_t *c = &cases[j];
        jobs[j] = step_job(kind, dtype, master, c);
        all[num++] = &c->weight;
        if (master)
            all[num++] = &c->master;
        for (int i = 0; i < kinds[kind].num_states; i++)
            all[num++] = &c->states[i];
        for (int i = 0; i < jobs[j].num_dst; i++)
            all[num++] = &c->dst[i];
    }
    OK(api.step(0, gpu_stream, dtype, kind, JOBS, jobs, sentence));
    for (int i = 0; i < num; i++)
        array_fetch(all[i]);
    gpu_wait();
    for (int i = 0; i < num; i++) {
        if (kind == KV_STEP_sgld)
            let_noise_pass(all[i]);
        array_same(all[i], kinds[kind].name);
    }
    gpu_free_arrays();
}

static void steps(void)
{
    for (int kind = 0; kind < KV_STEP_COUNT; kind++)
        for (int dtype = KV_FLOAT64; dtype <= KV_BFLOAT16 && kind != KV_STEP_group_adagrad; dtype++)
            for (int master = 0; master <= kv_dtype_is_narrow((kv_dtype_t)dtype); master++)
                steps_of((kv_step_kind_t)kind, (kv_dtype_t)dtype, master != 0);
}

static void element_functions_are_those_of_the_cpu(void)
{
    gpu_each_seed(1, steps);
}

/* ----------------------------------------------------------------------------------- squares */

static void square_cases(void)
{
    static const int64_t counts[] = {0,    1,    63,    64,    65,    192,  448,
                                     1000, 4096, 16384, 16385, 40000, 70001};
    enum { NUM = sizeof counts / sizeof counts[0] };
    for (int dtype = KV_FLOAT64; dtype <= KV_BFLOAT16; dtype++) {
        kv_dtype_t type = (kv_dtype_t)dtype;
        bool is_double = type == KV_FLOAT64, rounded = between(0, 1) == 0;
        kv_device_squares_t jobs[NUM];
        array_t out = array_of(KV_FLOAT64, NUM, NULL, 0);
        const void *from[NUM][SOURCES];
        for (int j = 0; j < NUM; j++) {
            int num_src = (int)between(1, SOURCES);
            const void *host_from[SOURCES];
            void *sum = host_new(counts[j] * 8);
            kv_squares_t squares;
            for (int i = 0; i < num_src; i++) {
                array_t src = array_random(type, counts[j], 0, any_shift(type));
                from[j][i] = src.device;
                host_from[i] = src.host;
            }
            cpu()->sum_wide[type](0, counts[j], num_src, host_from, sum);
            kv_squares_start(&squares);
            kv_squares_add(&squares, cpu(), is_double,
                           rounded && kv_dtype_is_narrow(type) ? type : KV_FLOAT32, counts[j], sum);
            ((double *)out.host)[j] = kv_squares_sum(&squares);
            jobs[j] = (kv_device_squares_t){.count = counts[j],
                                            .num_src = num_src,
                                            .src = from[j],
                                            .batch = 1,
                                            .rounded = rounded,
                                            .room = device_new(8 * kv_device_room(counts[j]), 0),
                                            .out = (double *)out.device + j};
        }
        OK(api.squares(0, gpu_stream, type, NUM, jobs, sentence));
        array_fetch(&out);
        gpu_wait();
        array_same(&out, "a sum of squares");
        gpu_free_arrays();
    }
}

static void sums_of_squares_are_those_of_the_cpu(void)
{
    gpu_each_seed(1, square_cases);
}

/* More parts than a device has blocks for, and more than one block adds up at a time. */
static void large_square(void)
{
    enum { COUNT = 300 * KV_DEVICE_SQUARES + 77 };
    array_t src = array_random(KV_BFLOAT16, COUNT, 0, 0), out = array_of(KV_FLOAT64, 1, NULL, 0);
    const void *from = src.device, *host_from = src.host;
    float *wide = host_new((int64_t)COUNT * 4);
    kv_squares_t squares;
    cpu()->sum_wide[KV_BFLOAT16](0, COUNT, 1, &host_from, wide);
    kv_squares_start(&squares);
    kv_squares_add(&squares, cpu(), false, KV_FLOAT32, COUNT, wide);
    *(double *)out.host = kv_squares_sum(&squares);
    kv_device_squares_t job = {.count = COUNT,
                               .num_src = 1,
                               .src = &from,
                               .batch = 1,
                               .room = device_new(8 * kv_device_room(COUNT), 0),
                               .out = out.device};
    OK(api.squares(0, gpu_stream, KV_BFLOAT16, 1, &job, sentence));
    array_fetch(&out);
    gpu_wait();
    array_same(&out, "a large sum of squares");
    gpu_end();
}

static void so_is_a_large_one(void)
{
    if (gpu_begin(0, 1))
        large_square();
}

/* ------------------------------------------------------------------------------ whole classes */

static const char *const optims[] = {"sgd",   "nag",     "signum",       "ftml",    "lars",
                                     "lbsgd", "lamb",    "dcasgd",       "sgld",    "adam",
                                     "adamw", "adagrad", "groupadagrad", "rmsprop", "adadelta",
                                     "ftrl",  "adamax",  "nadam",        "test"};

/* An optimizer in one of its forms: bit 0 momentum or centered, bit 1 a clip. */
static void trial_form(trial_t *trial, const char *name, int form)
{
    trial_begin(trial, name);
    *trial_param(trial, "momentum") = (form & 1) != 0 ? 0.9 : 0;
    if ((form & 1) != 0) {
        *trial_param(trial, "centered") = 1;
        *trial_param(trial, "batch_scale") = 2;
        *trial_param(trial, "clip_weights") = 0.7;
    }
    if (form != 1)
        *trial_param(trial, "warmup_strategy") = KV_WARMUP_LARS;
    trial->numbers.wd = strcmp(name, "groupadagrad") == 0 ? 0 : 0.01;
    trial->numbers.clip_gradient = (form & 2) != 0 ? 0.4 : NAN;
}

typedef struct mirror {
    array_t weight, master, slots[KV_MAX_SLOTS], direction, src[SOURCES], dst;
    const void *from[SOURCES], *host_from[SOURCES];
    int num_src;
} mirror_t;

/* Weight and state of a trial on the device too. */
static void mirror_init(mirror_t *m, const trial_t *trial)
{
    const kv_weight_t *w = &trial->weight;
    kv_dtype_t wide = kv_dtype_wide(w->dtype);
    memset(m, 0, sizeof *m);
    m->weight = array_of(w->dtype, w->count, w->data, 0);
    if (w->master != NULL)
        m->master = array_of(wide, w->count, w->master, 0);
    for (int i = 0; i < KV_MAX_SLOTS; i++)
        if (w->slots[i] != NULL) {
            bool per_row = strcmp(trial->optim->name, "groupadagrad") == 0;
            m->slots[i] =
                array_of(wide, per_row ? w->count / w->row_count : w->count, w->slots[i], 0);
        }
    m->direction = array_of(wide, w->count, NULL, 0);
    m->dst = array_of(w->dtype, w->count, NULL, (int64_t)kv_dtype_bytes(w->dtype));
    m->num_src = (int)between(1, SOURCES);
}

/* Sums of squares of a gradient, rounded or not, in `out`. */
static kv_device_squares_t squares_of(const mirror_t *m, const void *const *from, int num_src,
                                      bool rounded, double *out)
{
    return (kv_device_squares_t){.count = m->weight.count,
                                 .num_src = num_src,
                                 .src = from,
                                 .batch = 1,
                                 .rounded = rounded,
                                 .room = device_new(8 * kv_device_room(m->weight.count), 0),
                                 .out = out};
}

/* The norms' sums on the device, which must be those of the CPU. */
static kv_norm_sums_t measure(const trial_t *trial, const kv_step_t *step, const kv_pass_t *pass,
                              mirror_t *m, const kv_norm_sums_t *due)
{
    kv_dtype_t dtype = trial->weight.dtype;
    bool direction = pass->norms == KV_NORMS_DIRECTION;
    bool rounded = m->master.device != NULL && step->optim->id != KV_OPTIM_LBSGD;
    const void *weight = m->weight.device, *way = m->direction.device;
    array_t out = array_of(KV_FLOAT64, 4, due, 0);
    double *sums = out.device;
    kv_device_squares_t jobs[] = {squares_of(m, &weight, 1, rounded, sums),
                                  squares_of(m, m->from, m->num_src, rounded, sums + 1),
                                  squares_of(m, &weight, 1, rounded && direction, sums + 2),
                                  squares_of(m, m->from, m->num_src, false, sums + 3)};
    for (int i = 1; i < 4; i += 2) {
        jobs[i].batch = kv_pass_batch(step);
        jobs[i].waiting = jobs[i].batch > 1 ? m->slots[0].device : NULL;
        if (direction)
            jobs[i].num_src = 1, jobs[i].src = &way;
    }
    if (direction) {
        OK(api.squares(0, gpu_stream, dtype, 1, jobs, sentence));
        OK(api.squares(0, gpu_stream, dtype, 1, jobs + 2, sentence));
        OK(api.squares(0, gpu_stream, kv_dtype_wide(dtype), 1, jobs + 1, sentence));
        OK(api.squares(0, gpu_stream, kv_dtype_wide(dtype), 1, jobs + 3, sentence));
    } else {
        OK(api.squares(0, gpu_stream, dtype, 4, jobs, sentence));
    }
    array_fetch(&out);
    gpu_wait();
    array_same(&out, "a norm");
    kv_norm_sums_t found;
    memcpy(&found, out.back, sizeof found);
    return found;
}

static void push_on_device(const trial_t *trial, const kv_step_t *step, mirror_t *m,
                           const kv_norm_sums_t *due)
{
    kv_dtype_t dtype = trial->weight.dtype;
    bool is_double = dtype == KV_FLOAT64;
    kv_pass_t pass;
    kv_pass_init(&pass, step, is_double, 0);
    kv_device_step_t job = {.count = m->weight.count,
                            .weight = m->weight.device,
                            .master = m->master.device,
                            .states = {m->slots[0].device, m->slots[1].device, m->slots[2].device},
                            .factors = &pass.factors,
                            .num_src = m->num_src,
                            .src = m->from,
                            .num_dst = 1,
                            .dst = &m->dst.device,
                            .row_count = trial->weight.row_count};
    if (pass.norms == KV_NORMS_DIRECTION) {
        kv_device_step_t moments = job;
        moments.states[2] = m->direction.device;
        OK(api.step(0, gpu_stream, dtype, pass.kind, 1, &moments, sentence));
        job.num_src = 0;
    }
    if (pass.norms != KV_NORMS_NONE) {
        kv_norm_sums_t sums = measure(trial, step, &pass, m, due);
        bool good = isfinite(sums.weight + sums.other);
        kv_pass_set_norms(&pass, step, is_double, good ? sums.weight : sums.exact_weight,
                          good ? sums.other : sums.exact_other);
    }
    OK(api.step(0, gpu_stream, dtype, pass.kind, 1, &job, sentence));
}

/* What the trial has now is what the device must have. */
static void mirror_check(mirror_t *m, const trial_t *trial)
{
    const kv_weight_t *w = &trial->weight;
    array_t *all[] = {&m->weight, &m->dst, &m->master, &m->slots[0], &m->slots[1], &m->slots[2]};
    const void *due[] = {w->data, w->data, w->master, w->slots[0], w->slots[1], w->slots[2]};
    for (int i = 0; i < 6; i++)
        if (all[i]->device != NULL) {
            array_fetch(all[i]);
            memcpy(all[i]->host, due[i], (size_t)array_bytes(all[i]));
        }
    gpu_wait();
    for (int i = 0; i < 6; i++)
        if (all[i]->device != NULL) {
            if (strcmp(trial->optim->name, "sgld") == 0)
                let_noise_pass(all[i]);
            array_same(all[i], trial->optim->title);
        }
}

static void class_of(const char *name, int form, kv_dtype_t dtype, bool master)
{
    static const int64_t counts[] = {1, 3, 64, 333, 1500, 4096};
    int64_t count = counts[between(0, 5)];
    int64_t row = count % 3 == 0 && between(0, 1) == 0 ? count / 3 : between(0, 1) == 0 ? 1 : count;
    void *values = host_new(count * 8);
    trial_t trial;
    mirror_t m;
    trial_form(&trial, name, form);
    fill(dtype, count, 0, values);
    if (!CHECK(trial_make(&trial, dtype, count, row, values, master)))
        return;
    mirror_init(&m, &trial);
    for (int push = 0; push < PUSHES; push++) {
        kv_step_t step;
        kv_norm_sums_t sums = {.weight = 0};
        trial_step(&trial, &step);
        for (int i = 0; i < m.num_src; i++) {
            m.src[i] = array_random(dtype, count, push == 2 ? 200 : 0, any_shift(dtype));
            m.from[i] = m.src[i].device;
            m.host_from[i] = m.src[i].host;
        }
        kv_gradients_t gradients = {.num_src = m.num_src, .src = m.host_from};
        if (kv_step_needs_norms(&step))
            kv_host_measure(&host, &step, &trial.weight, &gradients, &sums);
        push_on_device(&trial, &step, &m, &sums);
        kv_host_update(&host, &step, &trial.weight, &gradients, 0, NULL);
    }
    mirror_check(&m, &trial);
    gpu_free_arrays();
    trial_end(&trial);
}

/* A form a seed, so that all come in turn. */
static void classes(void)
{
    static int turn;
    int form = turn++ % 4;
    for (size_t n = 0; n < sizeof optims / sizeof optims[0]; n++)
        for (int dtype = KV_FLOAT64; dtype <= KV_BFLOAT16; dtype++)
            class_of(optims[n], form, (kv_dtype_t)dtype,
                     kv_dtype_is_narrow((kv_dtype_t)dtype) && between(0, 1) == 0);
}

static void every_class_steps_as_on_the_cpu(void)
{
    host = (kv_host_t){.kernels = cpu(), .num_threads = 1};
    if (!CHECK_STATUS(kv_team_new(1, &host.team), KV_OK))
        return;
    gpu_each_seed(1, classes);
    kv_team_stop(host.team);
    kv_team_free(host.team);
}

static const test_t tests[] = {
    TEST(element_functions_are_those_of_the_cpu),
    TEST(sums_of_squares_are_those_of_the_cpu),
    TEST(so_is_a_large_one),
    TEST(every_class_steps_as_on_the_cpu),
};
TEST_MAIN(tests)
