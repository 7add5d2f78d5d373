/* What this machine can do at best in training: the arithmetic of the store's updates, in plain C
 * without the store, each value read and written as few times as it can be:
 *
 *     cc -std=c17 -O3 -march=native -pthread limit_train.c -lm -o limit_train
 *     ./limit_train [--job NAME] [--reps N] [--threads N]
 *
 * As in limit.c there is one JSON line a job, and a job is tried in several ways, of which the
 * fastest counts. What a store has to find out first is known here: row ids are sorted and
 * distinct, and of a list of row sets the union is made.
 */
#include "limit.h"

#include <math.h>

/* ------------------------------------------------------------------------------ one element */

static const float rate = 0.01f, decay = 0.0f, momentum = 0.9f, beta1 = 0.9f, beta2 = 0.999f,
                   epsilon = 1e-7f;

ALWAYS_INLINE floats load(const void *from)
{
    floats value;
    memcpy(&value, from, WIDTH);
    return value;
}

ALWAYS_INLINE floats root(floats x)
{
#if defined(__AVX512F__)
    return (floats)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (floats)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
    return (floats)_mm_sqrt_ps((__m128)x);
#else
    for (size_t i = 0; i < WIDTH / sizeof(float); i++)
        x[i] = sqrtf(x[i]);
    return x;
#endif
}

/* SUM is no step: what the encoder reads and writes of gradient and residual. */
typedef enum step_kind { SGD, SGD_MOMENTUM, ADAM, ADAGRAD, SUM } step_kind;

/* The new weight; `state` changes. */
ALWAYS_INLINE floats update(step_kind step, floats w, floats g, floats *state)
{
    switch (step) {
    case SGD:
        return w - rate * decay * w - rate * g;
    case SGD_MOMENTUM:
        state[0] = momentum * state[0] - rate * decay * w - rate * g;
        return w + state[0];
    case ADAM:
        g += decay * w;
        state[0] = beta1 * state[0] + (1 - beta1) * g;
        state[1] = beta2 * state[1] + (1 - beta2) * g * g;
        return w - rate * state[0] / (root(state[1]) + epsilon);
    case ADAGRAD:
        state[0] += g * g;
        return w - rate * (g / root(state[0] + epsilon) + decay * w);
    case SUM:
        return w + g;
    }
    return w;
}

ALWAYS_INLINE int num_states(step_kind step)
{
    return step == ADAM ? 2 : step == SGD_MOMENTUM || step == ADAGRAD ? 1 : 0;
}

/* ------------------------------------------------------------------------------ dense values */

enum { MAX_GRADS = 4, CODE_SHARE = 16 /* bytes of a float32 gradient for one of its 2-bit code */ };

/* Which stores go past the caches. */
typedef enum stream_kind { NO_STREAM, STREAM_OUT, STREAM_ALL } stream_kind;

typedef struct dense_job {
    step_kind step;
    int num_grads;
    char *grads[MAX_GRADS], *weight, *states[2];
    char *out;   /* gets the new weight; may be NULL */
    char *codes; /* written for the encoder; may be NULL */
    size_t bytes;
    stream_kind streams;
    size_t piece; /* bytes that a thread takes at a time; pieces go round the threads */
} dense_job;

ALWAYS_INLINE void dense_part(const dense_job *job, size_t begin, size_t end, step_kind step,
                              int num_grads, bool out, bool codes, stream_kind streams)
{
    for (size_t at = begin; at < end; at += WIDTH) {
        floats state[2], g = load(job->grads[0] + at);
        for (int i = 1; i < num_grads; i++)
            g += load(job->grads[i] + at);
        for (int i = 0; i < num_states(step); i++)
            state[i] = load(job->states[i] + at);
        floats w = update(step, load(job->weight + at), g, state);
        store(job->weight + at, (words)w, streams == STREAM_ALL);
        for (int i = 0; i < num_states(step); i++)
            store(job->states[i] + at, (words)state[i], streams == STREAM_ALL);
        if (out)
            store(job->out + at, (words)w, streams != NO_STREAM);
        if (codes && at / WIDTH % CODE_SHARE == 0)
            store(job->codes + at / CODE_SHARE, (words)w, streams != NO_STREAM);
    }
}

static void dense_share(const void *argument, int thread)
{
    const dense_job *job = argument;
    size_t round = job->piece * (size_t)num_threads;
    bool out = job->out != NULL, codes = job->codes != NULL;
    for (size_t begin = job->piece * (size_t)thread; begin < job->bytes; begin += round) {
        size_t end = begin + job->piece < job->bytes ? begin + job->piece : job->bytes;
#define CASE(step_, num_grads_, out_, codes_)                                                      \
    if (job->step == step_ && job->num_grads == num_grads_ && out == out_ && codes == codes_) {    \
        if (job->streams == NO_STREAM)                                                             \
            dense_part(job, begin, end, step_, num_grads_, out_, codes_, NO_STREAM);               \
        else if (job->streams == STREAM_OUT)                                                       \
            dense_part(job, begin, end, step_, num_grads_, out_, codes_, STREAM_OUT);              \
        else                                                                                       \
            dense_part(job, begin, end, step_, num_grads_, out_, codes_, STREAM_ALL);              \
    }
        CASE(SGD_MOMENTUM, 1, false, false)
        CASE(SGD_MOMENTUM, 4, false, false)
        CASE(ADAM, 1, true, false)
        CASE(ADAGRAD, 1, false, false)
        CASE(SUM, 1, false, true)
#undef CASE
    }
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

/* The median of the way that has the least; times[way * num_reps + rep]. */
static double best_way(double *times, int num_ways)
{
    double best = 1e9;
    for (int way = 0; way < num_ways; way++) {
        double seconds = median(times + way * num_reps, num_reps);
        best = seconds < best ? seconds : best;
    }
    return best;
}

static double dense(step_kind step, int num_grads, bool out, bool codes)
{
    const size_t bytes = 64 * MIB;
    dense_job job = {.step = step, .num_grads = num_grads, .bytes = bytes};
    for (int i = 0; i < num_grads; i++)
        job.grads[i] = memory(bytes);
    job.weight = memory(bytes);
    for (int i = 0; i < num_states(step); i++)
        job.states[i] = memory(bytes);
    if (out)
        job.out = memory(bytes);
    if (codes)
        job.codes = memory(bytes / CODE_SHARE);

    size_t equal = (bytes / (size_t)num_threads + 4095) / 4096 * 4096;
    const struct {
        stream_kind streams;
        size_t piece;
    } ways[] = {{NO_STREAM, equal}, {STREAM_OUT, equal}, {STREAM_ALL, equal},
                {NO_STREAM, MIB},   {STREAM_OUT, MIB},   {STREAM_ALL, MIB}};
    enum { WAYS = sizeof ways / sizeof ways[0] };
    double *times = malloc(sizeof *times * WAYS * (size_t)num_reps);
    for (int rep = 0; rep < num_reps; rep++)
        for (int way = 0; way < WAYS; way++) {
            job.streams = ways[way].streams;
            job.piece = ways[way].piece;
            double start = now();
            run_on_all(dense_share, &job);
            times[way * num_reps + rep] = now() - start;
        }
    double best = best_way(times, WAYS);
    free(times);
    for (int i = 0; i < num_grads; i++)
        free(job.grads[i]);
    free(job.weight);
    for (int i = 0; i < 2; i++)
        free(job.states[i]);
    free(job.out);
    free(job.codes);
    return best;
}

static double sgd_momentum_64mib(void)
{
    return dense(SGD_MOMENTUM, 1, false, false);
}

static double sgd_momentum_4x64mib(void)
{
    return dense(SGD_MOMENTUM, 4, false, false);
}

static double adam_64mib_pull(void)
{
    return dense(ADAM, 1, true, false);
}

static double adagrad_64mib(void)
{
    return dense(ADAGRAD, 1, false, false);
}

static double encode_64mib(void)
{
    return dense(SUM, 1, false, true);
}

/* ------------------------------------------------------------------------------ small values */

typedef void (*update_function)(void *weight, void *state, const void *grad, size_t bytes);

static __attribute__((noinline)) void sgd_once(void *weight, void *state, const void *grad,
                                               size_t bytes)
{
    (void)state;
    char *w = weight;
    const char *g = grad;
    for (size_t at = 0; at + WIDTH <= bytes; at += WIDTH) {
        floats none[2];
        store(w + at, (words)update(SGD, load(w + at), load(g + at), none), false);
    }
}

static __attribute__((noinline)) void momentum_once(void *weight, void *state, const void *grad,
                                                    size_t bytes)
{
    char *w = weight, *m = state;
    const char *g = grad;
    for (size_t at = 0; at + WIDTH <= bytes; at += WIDTH) {
        floats now[2] = {load(m + at)};
        store(w + at, (words)update(SGD_MOMENTUM, load(w + at), load(g + at), now), false);
        store(m + at, (words)now[0], false);
    }
}

static update_function volatile sgd_pointer = sgd_once;
static update_function volatile momentum_pointer = momentum_once;

static double sgd_1kib(void)
{
    static float weight[256], grad[256];
    enum { CALLS = 40000 };
    double *times = malloc(sizeof *times * (size_t)num_reps);
    for (int rep = 0; rep < num_reps; rep++) {
        double start = now();
        for (int call = 0; call < CALLS; call++)
            sgd_pointer(weight, NULL, grad, sizeof weight);
        times[rep] = (now() - start) / CALLS;
    }
    double result = median(times, num_reps);
    free(times);
    return result;
}

enum { KEYS = 1000, KEY_BYTES = 4096 };

typedef struct list_job {
    char *blocks[3][KEYS]; /* weight, momentum, gradient */
} list_job;

static void list_range(const list_job *job, int begin, int end)
{
    for (int key = begin; key < end; key++)
        momentum_pointer(job->blocks[0][key], job->blocks[1][key], job->blocks[2][key], KEY_BYTES);
}

static void list_share(const void *job, int thread)
{
    list_range(job, KEYS * thread / num_threads, KEYS * (thread + 1) / num_threads);
}

/* Seconds a key: each key's weight, momentum and gradient are blocks of their own. */
static double momentum_list_1000x4kib(void)
{
    static list_job job;
    for (int i = 0; i < 3; i++)
        for (int key = 0; key < KEYS; key++) {
            job.blocks[i][key] = malloc(KEY_BYTES);
            memset(job.blocks[i][key], FILL, KEY_BYTES);
        }
    double *times = malloc(sizeof *times * 2 * (size_t)num_reps);
    for (int rep = 0; rep < num_reps; rep++)
        for (int way = 0; way < 2; way++) {
            double start = now();
            if (way == 0)
                list_range(&job, 0, KEYS);
            else
                run_on_all(list_share, &job);
            times[way * num_reps + rep] = (now() - start) / KEYS;
        }
    double best = best_way(times, 2);
    for (int i = 0; i < 3; i++)
        for (int key = 0; key < KEYS; key++)
            free(job.blocks[i][key]);
    free(times);
    return best;
}

/* ------------------------------------------------------------------------------ rows
 *
 * Row sets take turns, as the batches of training do: together their rows do not fit the caches.
 */

enum { TABLE_ROWS = 1000000, ROW = 64, ROW_BYTES = ROW * sizeof(float), IDS = 10000, SETS = 32 };

/* Rows to change, and what adds up to the gradient of each: parts[starts[i]] up to the next. */
typedef struct row_set {
    int num_rows;
    int *rows, *starts;
    const char **parts;
} row_set;

typedef struct rows_job {
    step_kind step;
    bool gather, update; /* the rows are copied out; the gradient is applied */
    bool several;        /* a gradient may have more than one part */
    char *weight, *states[2], *out;
    const row_set *set;
    int ahead; /* how many rows before their turn they are asked for */
    bool alone;
} rows_job;

ALWAYS_INLINE void ask_for(const char *row)
{
    for (size_t at = 0; at < ROW_BYTES; at += 64)
        __builtin_prefetch(row + at);
}

ALWAYS_INLINE void gather_rows(const rows_job *job, int begin, int end)
{
    const row_set *set = job->set;
    for (int i = begin; i < end; i++) {
        if (i + job->ahead < end)
            ask_for(job->weight + (size_t)set->rows[i + job->ahead] * ROW_BYTES);
        memcpy(job->out + (size_t)i * ROW_BYTES, job->weight + (size_t)set->rows[i] * ROW_BYTES,
               ROW_BYTES);
    }
}

ALWAYS_INLINE void update_rows(const rows_job *job, int begin, int end, step_kind step,
                               bool several)
{
    const row_set *set = job->set;
    for (int i = begin; i < end; i++) {
        if (i + job->ahead < end) {
            size_t next = (size_t)set->rows[i + job->ahead] * ROW_BYTES;
            ask_for(job->weight + next);
            for (int s = 0; s < num_states(step); s++)
                ask_for(job->states[s] + next);
            if (several)
                ask_for(set->parts[set->starts[i + job->ahead]]);
        }
        size_t row = (size_t)set->rows[i] * ROW_BYTES;
        int first = several ? set->starts[i] : i, last = several ? set->starts[i + 1] : i + 1;
        for (size_t at = 0; at < ROW_BYTES; at += WIDTH) {
            floats state[2], g = load(set->parts[first] + at);
            for (int part = first + 1; part < last; part++)
                g += load(set->parts[part] + at);
            for (int s = 0; s < num_states(step); s++)
                state[s] = load(job->states[s] + row + at);
            floats w = update(step, load(job->weight + row + at), g, state);
            store(job->weight + row + at, (words)w, false);
            for (int s = 0; s < num_states(step); s++)
                store(job->states[s] + row + at, (words)state[s], false);
        }
    }
}

static void rows_share(const void *argument, int thread)
{
    const rows_job *job = argument;
    int parts = job->alone ? 1 : num_threads, num_rows = job->set->num_rows;
    int begin = (int)((int64_t)num_rows * thread / parts);
    int end = (int)((int64_t)num_rows * (thread + 1) / parts);
    if (job->gather)
        gather_rows(job, begin, end);
    if (!job->update)
        return;
    if (job->step == SGD && job->several)
        update_rows(job, begin, end, SGD, true);
    else if (job->step == SGD)
        update_rows(job, begin, end, SGD, false);
    else if (job->step == ADAM)
        update_rows(job, begin, end, ADAM, false);
    else
        update_rows(job, begin, end, ADAGRAD, false);
}

static uint64_t random_state = 1;

static int random_row(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (int)((random_state >> 33) % TABLE_ROWS);
}

/* IDS different rows of each of `num_parts` gradients, and their union. */
static void make_set(row_set *set, int num_parts)
{
    unsigned char *has = calloc(TABLE_ROWS, 1); /* bit i: gradient i has the row */
    char *data[MAX_GRADS];
    int next[MAX_GRADS] = {0}, num_rows = 0, num_all = 0;
    for (int part = 0; part < num_parts; part++) {
        data[part] = memory((size_t)IDS * ROW_BYTES);
        for (int drawn = 0; drawn < IDS;) {
            unsigned char *row = &has[random_row()];
            drawn += (*row >> part & 1) == 0;
            *row |= (unsigned char)(1 << part);
        }
    }
    set->rows = malloc(sizeof *set->rows * IDS * (size_t)num_parts);
    set->starts = malloc(sizeof *set->starts * (IDS * (size_t)num_parts + 1));
    set->parts = malloc(sizeof *set->parts * IDS * (size_t)num_parts);
    for (int row = 0; row < TABLE_ROWS; row++) {
        if (has[row] == 0)
            continue;
        set->rows[num_rows] = row;
        set->starts[num_rows++] = num_all;
        for (int part = 0; part < num_parts; part++)
            if (has[row] >> part & 1)
                set->parts[num_all++] = data[part] + (size_t)next[part]++ * ROW_BYTES;
    }
    set->starts[num_rows] = num_all;
    set->num_rows = num_rows;
    free(has);
}

/* Ends with the process: nothing of it is freed. */
static double rows(step_kind step, bool gather, bool update, int num_parts)
{
    const int num_sets = SETS / num_parts;
    const size_t bytes = (size_t)TABLE_ROWS * ROW_BYTES;
    row_set sets[SETS];
    for (int i = 0; i < num_sets; i++)
        make_set(&sets[i], num_parts);
    rows_job job = {.step = step, .gather = gather, .update = update, .several = num_parts > 1};
    job.weight = memory(bytes);
    for (int i = 0; i < num_states(step); i++)
        job.states[i] = memory(bytes);
    job.out = memory((size_t)IDS * ROW_BYTES);

    const struct {
        int ahead;
        bool alone;
    } ways[] = {{8, false}, {16, false}, {32, false}, {16, true}};
    enum { WAYS = sizeof ways / sizeof ways[0] };
    double *times = malloc(sizeof *times * WAYS * (size_t)num_reps);
    for (int rep = 0; rep < num_reps; rep++)
        for (int way = 0; way < WAYS; way++) {
            job.ahead = ways[way].ahead;
            job.alone = ways[way].alone;
            double start = now();
            for (int i = 0; i < num_sets; i++) {
                job.set = &sets[i];
                if (job.alone)
                    rows_share(&job, 0);
                else
                    run_on_all(rows_share, &job);
            }
            times[way * num_reps + rep] = (now() - start) / num_sets;
        }
    double best = best_way(times, WAYS);
    free(times);
    return best;
}

static double rows_pull(void)
{
    return rows(SGD, true, false, 1);
}

static double rows_sgd(void)
{
    return rows(SGD, false, true, 1);
}

static double rows_sgd_4(void)
{
    return rows(SGD, false, true, 4);
}

static double rows_adam(void)
{
    return rows(ADAM, false, true, 1);
}

static double rows_pull_adagrad(void)
{
    return rows(ADAGRAD, true, true, 1);
}

static const named_job jobs[] = {
    {"sgd_momentum_64MiB", sgd_momentum_64mib, "three arrays read, two written"},
    {"sgd_momentum_4x64MiB", sgd_momentum_4x64mib, "six arrays read, two written"},
    {"adam_64MiB_pull", adam_64mib_pull, "four arrays read, four written, in one pass"},
    {"adagrad_64MiB", adagrad_64mib, "three arrays read, two written"},
    {"sgd_1KiB", sgd_1kib, "one call through a pointer"},
    {"momentum_list_1000x4KiB", momentum_list_1000x4kib,
     "1000 calls through a pointer, shared by the threads or not; seconds of one key"},
    {"rows_pull", rows_pull, "10000 sorted rows of 256 bytes copied"},
    {"rows_sgd", rows_sgd, "10000 sorted rows read and written, their gradients read"},
    {"rows_sgd_4", rows_sgd_4, "the rows of four gradients, whose union is there, in one pass"},
    {"rows_adam", rows_adam, "10000 sorted rows of three arrays read and written"},
    {"rows_pull_adagrad", rows_pull_adagrad, "10000 sorted rows copied, then updated"},
    {"encode_64MiB", encode_64mib,
     "memory traffic only: two arrays read, one written, and a sixteenth of it for the codes"},
};

int main(int argc, char **argv)
{
    return run_jobs(argc, argv, jobs, sizeof jobs / sizeof jobs[0]);
}
