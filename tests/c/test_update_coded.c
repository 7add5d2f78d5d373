/* Gradients that arrive as codes, and plain ones among them: the step and the sum have the bits of
 * decoding each, adding from left to right in the wide type and going on with one plain gradient,
 * whatever the instruction set, the number of threads and the place where a row begins. */
#include "update.h"

enum { MAX_SRC = 4, MAX_DST = 2, PUSHES = 2 };

/* What the gradients of a push are. */
typedef struct list {
    int num_src;
    kv_codec_t coded[MAX_SRC];
} list_t;

#define PLAIN                                                                                      \
    {                                                                                              \
        KV_CODEC_NONE, 0                                                                           \
    }
#define TWO                                                                                        \
    {                                                                                              \
        KV_CODEC_2BIT, 0.3                                                                         \
    }
#define TWO_WIDE                                                                                   \
    {                                                                                              \
        KV_CODEC_2BIT, 0.7                                                                         \
    }
#define ONE                                                                                        \
    {                                                                                              \
        KV_CODEC_1BIT, 0.1                                                                         \
    }

static const list_t lists[] = {
    {1, {TWO}},
    {1, {ONE}},
    {1, {PLAIN}},
    {2, {TWO, TWO_WIDE}},
    {3, {ONE, PLAIN, TWO}},
    {4, {PLAIN, PLAIN, ONE, TWO}},
};
enum { NUM_LISTS = sizeof lists / sizeof lists[0] };

/* Rows that begin anywhere, blocks that end anywhere, rows longer than a block, and what is cut
 * for the team. */
static const struct {
    int64_t rows, row_count;
    bool large;
} shapes[] = {
    {1, 1, false},    {1, 31, false},   {3, 11, false},   {41, 25, false},   {2, 32, false},
    {1, 1023, false}, {3, 1027, false}, {2, 2080, false}, {295, 1017, true}, {59, 5085, true},
};

static const kv_dtype_t dtypes[] = {KV_FLOAT64, KV_FLOAT32, KV_FLOAT16, KV_BFLOAT16};

/* ------------------------------------------------------------------------ the gradients */

/* Each in memory of exactly its size. */
typedef struct sources {
    const list_t *list;
    int64_t count;
    kv_dtype_t dtype;
    void *src[MAX_SRC];
    void *sum; /* in the wide type, by the reference */
} sources_t;

static kv_dtype_t wide_of(kv_dtype_t dtype)
{
    return dtype == KV_FLOAT64 ? KV_FLOAT64 : KV_FLOAT32;
}

static bool sources_make(sources_t *sources, const list_t *list, kv_dtype_t dtype, int64_t count,
                         uint64_t *random)
{
    const kv_kernels_t *kernels = kv_kernels_at(0);
    size_t wide = kv_dtype_bytes(wide_of(dtype)), bytes = kv_dtype_bytes(dtype);
    *sources = (sources_t){.list = list, .count = count, .dtype = dtype};
    void *plain = malloc((size_t)count * bytes), *residual = malloc((size_t)count * wide);
    void *decoded = malloc((size_t)count * wide);
    sources->sum = malloc((size_t)count * wide);
    bool made = plain != NULL && residual != NULL && decoded != NULL && sources->sum != NULL;
    for (int i = 0; made && i < list->num_src; i++) {
        const kv_codec_t *codec = &list->coded[i];
        bool coded = codec->type != KV_CODEC_NONE;
        size_t size = coded ? (size_t)kv_codec_bytes(codec->type, count) : (size_t)count * bytes;
        made = (sources->src[i] = malloc(size)) != NULL;
        if (!made)
            break;
        trial_fill(dtype, count, random, plain);
        if (coded) {
            memset(residual, 0, (size_t)count * wide);
            kv_codec_encode(kernels, codec, dtype, 0, count, count, plain, residual,
                            sources->src[i]);
            kv_codec_decode(kernels, codec, dtype, 0, count, sources->src[i], true, decoded);
        } else {
            memcpy(sources->src[i], plain, size);
            if (bytes == wide)
                memcpy(decoded, plain, size);
            else
                kernels->float32_from[dtype](count, plain, decoded);
        }
        for (int64_t k = 0; k < count; k++)
            if (dtype == KV_FLOAT64)
                ((double *)sources->sum)[k] =
                    i == 0 ? ((double *)decoded)[k]
                           : ((double *)sources->sum)[k] + ((double *)decoded)[k];
            else
                ((float *)sources->sum)[k] =
                    i == 0 ? ((float *)decoded)[k]
                           : ((float *)sources->sum)[k] + ((float *)decoded)[k];
    }
    free(plain);
    free(residual);
    free(decoded);
    return CHECK(made);
}

static void sources_free(sources_t *sources)
{
    for (int i = 0; i < MAX_SRC; i++)
        free(sources->src[i]);
    free(sources->sum);
}

static kv_gradients_t gradients_of(const sources_t *sources)
{
    return (kv_gradients_t){.num_src = sources->list->num_src,
                            .src = (const void *const *)sources->src,
                            .coded = sources->list->coded};
}

/* `wide` in the type of the value. */
static void rounded(kv_dtype_t dtype, int64_t count, const void *wide, void *to)
{
    if (kv_dtype_is_narrow(dtype))
        kv_kernels_at(0)->float32_to[dtype](count, wide, to);
    else
        memcpy(to, wide, (size_t)count * kv_dtype_bytes(dtype));
}

/* --------------------------------------------------------------- every set, many threads */

/* body() with each instruction set, alone and with a team. */
static void on_every_host(bool (*body)(const kv_host_t *host, void *context), void *context)
{
    const kv_kernels_t *kernels;
    for (int k = 0; (kernels = kv_kernels_at(k)) != NULL; k++)
        for (int threads = 1; threads <= 3; threads += 2) {
            kv_host_t host = {.kernels = kernels, .num_threads = threads};
            if (!CHECK_STATUS(kv_team_new(threads, &host.team), KV_OK))
                return;
            if (!CHECK(body(&host, context)))
                printf("    %s, %d threads\n", kernels->name, threads);
            kv_team_stop(host.team);
            kv_team_free(host.team);
        }
}

/* ------------------------------------------------------------------------------ the sum */

typedef struct sum_case {
    const sources_t *sources;
    const void *due; /* the sum, rounded once */
} sum_case_t;

/* Into other memory and into a plain source. */
static bool sums_right(const kv_host_t *host, void *context)
{
    const sum_case_t *c = context;
    const sources_t *sources = c->sources;
    int64_t count = sources->count;
    size_t bytes = (size_t)count * kv_dtype_bytes(sources->dtype);
    void *out = malloc(bytes), *inside = malloc(bytes), *src[MAX_SRC];
    kv_gradients_t gradients = gradients_of(sources);
    bool right = out != NULL && inside != NULL;
    memcpy(src, sources->src, sizeof src);
    gradients.src = (const void *const *)src;
    for (int i = 0; right && i < gradients.num_src; i++)
        if (gradients.coded[i].type == KV_CODEC_NONE) {
            memcpy(inside, src[i], bytes);
            src[i] = inside;
            break;
        }
    void *dst[MAX_DST] = {inside, out};
    right = right &&
            kv_host_sum_gradients(host, sources->dtype, count, &gradients, MAX_DST, dst) == 0 &&
            memcmp(out, c->due, bytes) == 0 && memcmp(inside, c->due, bytes) == 0;
    free(out);
    free(inside);
    return right;
}

static void sum_of_codes_is_exact_and_rounded_once(void)
{
    uint64_t random = 21;
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++)
        for (size_t d = 0; d < sizeof dtypes / sizeof dtypes[0]; d++)
            for (int n = shapes[s].large ? NUM_LISTS - 1 : 0; n < NUM_LISTS; n++) {
                sources_t sources;
                int64_t count = shapes[s].rows * shapes[s].row_count;
                void *due = malloc((size_t)count * 8);
                if (sources_make(&sources, &lists[n], dtypes[d], count, &random) &&
                    CHECK(due != NULL)) {
                    rounded(dtypes[d], count, sources.sum, due);
                    on_every_host(sums_right, &(sum_case_t){&sources, due});
                }
                free(due);
                sources_free(&sources);
            }
}

/* ----------------------------------------------------------------------------- the step */

typedef struct step_case {
    const char *optim;
    const sources_t *sources;
    int64_t row_count;
    bool master;
    const void *values;    /* the weight's first ones */
    const trial_t *due;    /* of the wide type, PUSHES steps on */
    const void *due_value; /* its weight in the type of the value */
} step_case_t;

static void begin(trial_t *trial, const char *optim, bool master)
{
    trial_begin(trial, optim);
    *trial_param(trial, "momentum") = 0.9;
    trial->numbers.wd = 0.01;
    trial->numbers.rescale_grad = 0.5;
    trial->numbers.multi_precision = master;
}

static bool steps_right(const kv_host_t *host, void *context)
{
    const step_case_t *c = context;
    const sources_t *sources = c->sources;
    int64_t count = sources->count;
    size_t bytes = (size_t)count * kv_dtype_bytes(sources->dtype);
    trial_t trial;
    begin(&trial, c->optim, c->master);
    kv_gradients_t gradients = gradients_of(sources);
    void *out = malloc(bytes);
    bool right = trial_make(&trial, sources->dtype, count, c->row_count, c->values, c->master) &&
                 out != NULL;
    for (int push = 0; right && push < PUSHES; push++)
        right = trial_push(&trial, host, &gradients, 1, &out) == 0;
    right = right && memcmp(trial.weight.data, c->due_value, bytes) == 0 &&
            memcmp(out, c->due_value, bytes) == 0;
    for (int i = 0; right && i < KV_MAX_SLOTS; i++)
        right =
            trial.weight.slots[i] == NULL || memcmp(trial.weight.slots[i], c->due->weight.slots[i],
                                                    (size_t)count * trial_wide(&trial)) == 0;
    if (right && c->master)
        right = memcmp(trial.weight.master, c->due->weight.data, (size_t)count * 4) == 0;
    free(out);
    trial_end(&trial);
    return right;
}

/* The reference is of the wide type, where one plain gradient is the sum itself. A 16-bit weight
 * without a master is rounded by each push. */
static bool reference(const step_case_t *c, trial_t *due, void *due_value)
{
    const sources_t *sources = c->sources;
    kv_dtype_t dtype = sources->dtype, wide = wide_of(dtype);
    bool narrow = kv_dtype_is_narrow(dtype);
    kv_host_t host = {.kernels = kv_kernels_at(0), .num_threads = 1};
    void *values = malloc((size_t)sources->count * kv_dtype_bytes(wide));
    bool made = CHECK(values != NULL) && CHECK_STATUS(kv_team_new(1, &host.team), KV_OK);
    if (made) {
        if (narrow)
            host.kernels->float32_from[dtype](sources->count, c->values, values);
        else
            memcpy(values, c->values, (size_t)sources->count * kv_dtype_bytes(dtype));
        made = CHECK(trial_make(due, wide, sources->count, c->row_count, values, false));
        for (int push = 0; made && push < PUSHES; push++) {
            trial_push_one(due, &host, sources->sum);
            rounded(dtype, sources->count, due->weight.data, due_value);
            if (narrow && !c->master)
                host.kernels->float32_from[dtype](sources->count, due_value, due->weight.data);
        }
        kv_team_stop(host.team);
        kv_team_free(host.team);
    }
    free(values);
    return made;
}

static void one_step(const char *optim, const sources_t *sources, int64_t row_count, bool master,
                     uint64_t *random)
{
    trial_t due;
    void *values = malloc((size_t)sources->count * 8);
    void *due_value = malloc((size_t)sources->count * 8);
    begin(&due, optim, master);
    step_case_t c = {.optim = optim,
                     .sources = sources,
                     .row_count = row_count,
                     .master = master,
                     .values = values,
                     .due = &due,
                     .due_value = due_value};
    int before = atomic_load(&test_failures);
    if (CHECK(values != NULL && due_value != NULL)) {
        trial_fill(sources->dtype, sources->count, random, values);
        if (reference(&c, &due, due_value))
            on_every_host(steps_right, &c);
    }
    if (atomic_load(&test_failures) != before)
        printf("    %s of %" PRId64 " %s in rows of %" PRId64 ", %d gradients, master %d\n", optim,
               sources->count, kv_dtype_name(sources->dtype), row_count, sources->list->num_src,
               master);
    trial_end(&due);
    free(values);
    free(due_value);
}

/* LAMB and LARS read the gradients a second time, for their norms. With 16 bits they have roundings
 * of their own there. */
static void steps_with_codes_are_steps_with_their_sum(void)
{
    static const char *const optims[] = {"sgd", "adam", "groupadagrad", "lamb", "lars"};
    uint64_t random = 22;
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++)
        for (size_t d = 0; d < sizeof dtypes / sizeof dtypes[0]; d++)
            for (int n = shapes[s].large ? NUM_LISTS - 1 : 0; n < NUM_LISTS; n++) {
                sources_t sources;
                bool narrow = kv_dtype_is_narrow(dtypes[d]);
                int64_t count = shapes[s].rows * shapes[s].row_count;
                if (sources_make(&sources, &lists[n], dtypes[d], count, &random))
                    for (int o = 0; o < (narrow ? 3 : 5); o++)
                        for (int master = 0; master <= narrow; master++)
                            one_step(optims[o], &sources, shapes[s].row_count, master, &random);
                sources_free(&sources);
            }
}

static const test_t tests[] = {
    TEST(sum_of_codes_is_exact_and_rounded_once),
    TEST(steps_with_codes_are_steps_with_their_sum),
};
TEST_MAIN(tests)
