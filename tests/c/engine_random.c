/* Random programs on every engine: the same bytes and the same answers as on the naive one.
 *
 *     engine_random --seeds N [--first S]
 *
 * A program is a list of steps made from a seed: tasks, caller-run operations, callbacks with
 * operations inside, waits. Its variables are small integer arrays, its arithmetic does not
 * commute, some tasks fail. What an operation has seen, how it ended and with which words goes into
 * a log with one place a step. The naive engine's log and final arrays are right by definition; the
 * stepping engine (order chosen by the seed) and the threaded one must give the same.
 */
#include "engine/engine.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_VARS = 6, MAX_STEPS = 64, MAX_DEPS = 4, MAX_INNER = 3, NUM_ELEMENTS = 3 };

/* ------------------------------------------------------------------------------- programs */

typedef enum kind {
    TASK,     /* submitted */
    INLINE,   /* run at once if the engine likes, else submitted */
    CALLER,   /* entered, run, left */
    CALLBACK, /* the same, with the steps after it run inside */
    WAIT,     /* for the handle of an earlier task */
    WAIT_ALL,
} kind_t;

typedef struct step {
    kind_t kind;
    int32_t num_deps;
    int var[MAX_DEPS];
    kv_access_t access[MAX_DEPS];
    int32_t priority;
    bool fails;
    bool has_handle;
    int inner;  /* callbacks: how many of the next steps run inside */
    int target; /* waits: the step whose handle it is */
    int64_t salt;
} step_t;

typedef struct program {
    int num_vars;
    bool poisons[MAX_VARS];
    int num_steps;
    step_t steps[MAX_STEPS];
} program_t;

static uint64_t next(uint64_t *state)
{
    uint64_t x = *state += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static int below(uint64_t *state, int limit)
{
    return (int)(next(state) % (uint64_t)limit);
}

static step_t make_step(uint64_t *state, const program_t *program, int index)
{
    static const kind_t kinds[] = {TASK,   TASK,   TASK,     TASK,     INLINE, INLINE,
                                   CALLER, CALLER, CALLBACK, CALLBACK, WAIT,   WAIT_ALL};
    step_t step = {.kind = kinds[below(state, sizeof kinds / sizeof kinds[0])]};
    step.num_deps = 1 + below(state, MAX_DEPS);
    for (int i = 0; i < step.num_deps; i++) {
        step.var[i] = below(state, program->num_vars);
        step.access[i] = (kv_access_t)below(state, 3);
    }
    step.priority = below(state, 5) - 2;
    step.fails = step.kind == TASK && below(state, 5) == 0;
    step.has_handle = (step.kind == TASK || step.kind == INLINE) && below(state, 3) == 0;
    step.inner = step.kind == CALLBACK ? below(state, MAX_INNER + 1) : 0;
    step.target = index > 0 ? below(state, index) : 0;
    step.salt = (int64_t)(next(state) >> 8);
    if (step.kind == CALLBACK && step.access[0] == KV_READ)
        step.access[0] = KV_WRITE;
    return step;
}

static void make_program(uint64_t seed, program_t *program)
{
    uint64_t state = seed;
    memset(program, 0, sizeof *program);
    program->num_vars = 2 + below(&state, MAX_VARS - 1);
    for (int i = 0; i < program->num_vars; i++)
        program->poisons[i] = below(&state, 2) != 0;
    program->num_steps = 8 + below(&state, MAX_STEPS - 7);
    for (int i = 0; i < program->num_steps; i++)
        program->steps[i] = make_step(&state, program, i);
}

/* ------------------------------------------------------------------------------------ runs */

typedef struct entry {
    int64_t seen;
    kv_status_t status;
    char words[96];
} entry_t;

typedef struct outcome {
    int64_t values[MAX_VARS][NUM_ELEMENTS];
    bool freed[MAX_VARS];
    entry_t log[MAX_STEPS];
    entry_t last[MAX_STEPS]; /* errors that nobody had been told of at the end */
} outcome_t;

typedef struct run {
    const program_t *program;
    kv_engine_t *engine;
    outcome_t *outcome;
    kv_var_t vars[MAX_VARS];
    kv_handle_t *handles[MAX_STEPS];
} run_t;

typedef struct task {
    kv_op_t op; /* first: a task is found by its operation */
    kv_dep_t deps[MAX_DEPS];
    run_t *run;
    int index;
} task_t;

static void note(entry_t *entry, kv_status_t status, const char *words)
{
    entry->status = status;
    snprintf(entry->words, sizeof entry->words, "%s", words);
}

static void nothing(kv_caller_t *caller)
{
    (void)caller;
}

static kv_status_t go_on(kv_caller_t *caller)
{
    (void)caller;
    return KV_OK;
}

static kv_caller_t make_caller(void)
{
    return (kv_caller_t){nothing, nothing, go_on, .timeout_ns = 60 * INT64_C(1000000000)};
}

/* Whether the merged access of a step to a variable looks at what was there, and whether it writes.
 */
static void merged_access(const step_t *step, int var, bool *looks, bool *writes)
{
    *looks = *writes = false;
    for (int i = 0; i < step->num_deps; i++) {
        if (step->var[i] == var) {
            *looks = *looks || step->access[i] != KV_OVERWRITE;
            *writes = *writes || step->access[i] != KV_READ;
        }
    }
}

/* What an operation does: reads all it may look at, then writes. `num_vars` variables of the step
 * are held. */
static void compute(run_t *run, int index, int num_held)
{
    const step_t *step = &run->program->steps[index];
    int64_t(*values)[NUM_ELEMENTS] = run->outcome->values;
    uint64_t seen = (uint64_t)step->salt;
    for (int v = 0; v < run->program->num_vars; v++) {
        bool looks, writes;
        merged_access(step, v, &looks, &writes);
        for (int e = 0; looks && e < NUM_ELEMENTS && (num_held > 1 || step->var[0] == v); e++)
            seen = seen * 31 + (uint64_t)values[v][e];
    }
    run->outcome->log[index].seen = (int64_t)seen;
    for (int v = 0; v < run->program->num_vars; v++) {
        bool looks, writes;
        merged_access(step, v, &looks, &writes);
        for (int e = 0; writes && e < NUM_ELEMENTS && (num_held > 1 || step->var[0] == v); e++) {
            uint64_t before = looks ? (uint64_t)values[v][e] : 0;
            values[v][e] = (int64_t)(before * 17 + seen + (uint64_t)e);
        }
    }
}

static kv_status_t task_run(kv_op_t *op)
{
    task_t *task = (task_t *)op;
    if (task->run->program->steps[task->index].fails)
        return kv_fail(KV_DEVICE, "step %d failed", task->index);
    compute(task->run, task->index, MAX_DEPS);
    return KV_OK;
}

static void task_finish(kv_op_t *op)
{
    kv_handle_rele(op->handle);
    kv_free(op);
}

static void fill_deps(run_t *run, const step_t *step, kv_dep_t *deps)
{
    for (int i = 0; i < step->num_deps; i++)
        deps[i] = (kv_dep_t){.var = &run->vars[step->var[i]], .access = step->access[i]};
}

static kv_status_t run_task(run_t *run, int index)
{
    const step_t *step = &run->program->steps[index];
    task_t *task = kv_alloc(sizeof *task);
    KV_TRY_ALLOC(task, "a task");
    task->run = run;
    task->index = index;
    fill_deps(run, step, task->deps);
    kv_op_init(&task->op, task->deps, step->num_deps, step->priority);
    task->op.run = task_run;
    task->op.finish = task_finish;
    if (step->has_handle) {
        kv_status_t status = kv_handle_new(run->engine, 1, &run->handles[index]);
        if (status != KV_OK) {
            kv_free(task);
            return status;
        }
        task->op.handle = kv_handle_hold(run->handles[index]);
    }
    if (step->kind == INLINE && kv_engine_try_inline(run->engine, &task->op, 1)) {
        kv_status_t status = task_run(&task->op);
        kv_engine_leave(run->engine, &task->op);
        if (step->has_handle)
            kv_handle_end_one(run->handles[index], status);
        task_finish(&task->op);
        return status;
    }
    kv_status_t status = kv_engine_submit(run->engine, &task->op);
    if (status != KV_OK)
        task_finish(&task->op);
    return status;
}

static int run_step(run_t *run, int index, bool inside);

/* Gives the number of steps that it ran. */
static int run_caller(run_t *run, int index, kv_status_t *status)
{
    const step_t *step = &run->program->steps[index];
    kv_caller_t caller = make_caller();
    kv_dep_t deps[MAX_DEPS];
    kv_op_t op;
    int steps = 1;
    fill_deps(run, step, deps);
    kv_op_init(&op, deps, step->num_deps, step->priority);
    *status = kv_engine_enter(run->engine, &op, &caller);
    if (*status != KV_OK)
        return steps;
    if (step->kind == CALLBACK) {
        kv_engine_begin_callback(run->engine, &op);
        while (steps <= step->inner && index + steps < run->program->num_steps)
            steps += run_step(run, index + steps, true);
        compute(run, index, 1);
    } else {
        compute(run, index, MAX_DEPS);
    }
    kv_engine_leave(run->engine, &op);
    return steps;
}

static kv_status_t run_wait(run_t *run, int index)
{
    kv_handle_t *handle = run->handles[run->program->steps[index].target];
    kv_caller_t caller = make_caller();
    if (handle == NULL)
        return KV_OK;
    KV_TRY(kv_handle_wait(handle, &caller));
    kv_error_t *error = kv_handle_error(handle);
    return error != NULL ? kv_error_raise(error) : KV_OK;
}

static int run_step(run_t *run, int index, bool inside)
{
    kv_caller_t caller = make_caller();
    kv_status_t status = KV_OK;
    int steps = 1;
    switch (run->program->steps[index].kind) {
    case TASK:
    case INLINE:
        status = run_task(run, index);
        break;
    case CALLER:
    case CALLBACK:
        steps = run_caller(run, index, &status);
        break;
    case WAIT:
        status = run_wait(run, index);
        break;
    case WAIT_ALL:
        status = kv_engine_wait_all(run->engine, &caller);
        break;
    }
    if (status != KV_OK)
        note(&run->outcome->log[index], status, kv_status_message(status));
    if ((kv_callback_depth() > 0) != inside)
        note(&run->outcome->log[index], KV_INVALID, "the depth of callbacks is wrong");
    return steps;
}

static void mark_freed(void *context)
{
    *(bool *)context = true;
}

static kv_status_t run_program(const program_t *program, const char *engine, uint64_t seed,
                               outcome_t *outcome)
{
    run_t run = {.program = program, .outcome = outcome};
    kv_caller_t caller = make_caller();
    memset(outcome, 0, sizeof *outcome);
    KV_TRY(kv_engine_new(engine, seed, 3, &run.engine));
    for (int i = 0; i < program->num_vars; i++)
        kv_var_init(&run.vars[i], program->poisons[i], mark_freed, &outcome->freed[i]);
    for (int i = 0; i < program->num_steps;)
        i += run_step(&run, i, false);
    for (int i = 0; i < program->num_vars; i++)
        kv_var_retire(&run.vars[i]);
    for (int i = 0; i < MAX_STEPS; i++) {
        kv_status_t status = kv_engine_wait_all(run.engine, &caller);
        if (status != KV_OK)
            note(&outcome->last[i], status, kv_status_message(status));
    }
    for (int i = 0; i < MAX_STEPS; i++)
        kv_handle_rele(run.handles[i]);
    kv_engine_close(run.engine);
    kv_engine_stop(run.engine, NULL);
    kv_engine_free(run.engine);
    return KV_OK;
}

/* ----------------------------------------------------------------------------------- check */

static bool same_entry(const char *what, int index, const entry_t *due, const entry_t *got)
{
    if (due->seen == got->seen && due->status == got->status && strcmp(due->words, got->words) == 0)
        return true;
    printf("  %s %d: seen %" PRIx64 " status %d '%s', due %" PRIx64 " status %d '%s'\n", what,
           index, (uint64_t)got->seen, (int)got->status, got->words, (uint64_t)due->seen,
           (int)due->status, due->words);
    return false;
}

static bool same(const program_t *program, const outcome_t *due, const outcome_t *got)
{
    bool good = memcmp(due->values, got->values, sizeof due->values) == 0;
    if (!good)
        printf("  the variables differ\n");
    for (int i = 0; i < MAX_STEPS; i++) {
        good = same_entry("step", i, &due->log[i], &got->log[i]) && good;
        good = same_entry("untold", i, &due->last[i], &got->last[i]) && good;
    }
    for (int i = 0; i < program->num_vars; i++) {
        if (!due->freed[i] || !got->freed[i]) {
            printf("  variable %d was not freed\n", i);
            good = false;
        }
    }
    for (int counter = 0; counter < KV_COUNTER_COUNT; counter++) {
        if (kv_counter_value((kv_counter_t)counter) != 0) {
            printf("  counter %s is %" PRId64 "\n", kv_counter_name((kv_counter_t)counter),
                   kv_counter_value((kv_counter_t)counter));
            good = false;
        }
    }
    return good;
}

static bool check_seed(uint64_t seed)
{
    static program_t program;
    static outcome_t due, got;
    static const char *const engines[] = {"stepping", "threaded"};
    make_program(seed, &program);
    if (run_program(&program, "naive", seed, &due) != KV_OK)
        return false;
    for (int i = 0; i < 2; i++) {
        if (run_program(&program, engines[i], seed, &got) != KV_OK || !same(&program, &due, &got)) {
            printf("seed %" PRIu64 ": the %s engine differs from the naive one\n", seed,
                   engines[i]);
            return false;
        }
    }
    return true;
}

int main(int argc, char **argv)
{
    uint64_t count = 0, first = 1;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--seeds") == 0)
            count = strtoull(argv[i + 1], NULL, 10);
        else if (strcmp(argv[i], "--first") == 0)
            first = strtoull(argv[i + 1], NULL, 10);
    }
    if (count == 0) {
        fprintf(stderr, "usage: engine_random --seeds N [--first S]\n");
        return 2;
    }
    for (uint64_t seed = first; seed < first + count; seed++) {
        if (!check_seed(seed))
            return 1;
    }
    printf("%" PRIu64 " programs: the same on all engines\n", count);
    return 0;
}
