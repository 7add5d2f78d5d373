/* The engine: who runs when.
 *
 * An operation names the variables that it reads and writes. Readers share a variable, a writer is
 * alone, and the order on every variable is the order in which the operations entered. Three
 * engines stand behind one table: `threaded` (production), `naive` (an operation runs in the thread
 * that makes it runnable; the oracle of tests) and `stepping` (no threads: a seed picks what runs
 * next, in the thread that waits). Any legal schedule gives the bytes of the naive engine.
 *
 * Two ways to run an operation:
 *
 *   caller-run   kv_engine_enter … kv_engine_leave around the work, in the calling thread. The
 *                operation lives on the caller's stack. If its variables are idle this is one
 *                compare-and-swap a variable, no lock, no allocation; else the operation queues
 *                and the caller waits for its turn, under its deadline. A caller that gives up is
 *                taken out of the queues under the same lock that grants turns, so it is never
 *                granted afterwards.
 *   engine-run   kv_engine_submit hands over a task; an engine thread runs it when its variables
 *                are free, among the runnable those of higher priority first (equal priority: in
 *                order of submission). A thread that waits does not sleep beside a task that it
 *                waits for: if that is the next in order, it runs it (unless its deadline is near).
 *
 * The state of a variable is one 64-bit word: number of readers, a writer bit, number of pins, and
 * flags. QUEUED means that operations stand in its list; then, and to look at the list, the
 * engine's lock is taken. One lock for the whole engine, not one a variable: an operation enters
 * all its queues in one step, so no two can block each other, and the path that must be fast does
 * not take it. While QUEUED is set nobody enters without the lock, so under the lock the counts can
 * only fall. An operation stays in the lists of its variables until it ends, granted ones first, so
 * that a walk from a waiter finds whom it waits for.
 *
 * Lifetime: the owner retires a variable; whoever takes away the last reader, writer, pin or queued
 * operation of a retired variable calls its `on_free`, exactly once, with no lock held. Nothing
 * ever waits to free.
 */
#ifndef KV_ENGINE_ENGINE_H
#define KV_ENGINE_ENGINE_H

#include "base/caller.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/thread.h"
#include "engine/error.h"
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum { KV_UNTOLD_ERRORS = 64 };

typedef struct kv_engine kv_engine_t;
typedef struct kv_op kv_op_t;
typedef struct kv_dep kv_dep_t;
typedef struct kv_handle kv_handle_t;
typedef struct kv_actor kv_actor_t; /* one thread, as the walk for cycles sees it (walk.c) */

/* ------------------------------------------------------------------------------- variables */

#define KV_VAR_READER (UINT64_C(1) << 0)
#define KV_VAR_READERS UINT64_C(0x00ffffff)
#define KV_VAR_WRITER (UINT64_C(1) << 24)
#define KV_VAR_PIN (UINT64_C(1) << 32)
#define KV_VAR_PINS (UINT64_C(0x00ffffff) << 32)
#define KV_VAR_QUEUED (UINT64_C(1) << 60)
#define KV_VAR_ERROR (UINT64_C(1) << 61)
#define KV_VAR_RETIRED (UINT64_C(1) << 62)

typedef struct kv_var {
    _Atomic uint64_t state;
    bool poisons; /* an error left here fails the tasks that read it (arrays), or is only reported
                     to those who wait (keys: a failed push leaves the value as it was) */
    kv_dep_t *head, *tail;     /* engine lock: operations, granted ones first */
    kv_dep_t *waiting;         /* engine lock: the first of them that is not granted */
    kv_error_t *error;         /* engine lock: of a failed operation, until it is delivered */
    kv_actor_t *_Atomic actor; /* the thread that runs a callback while it holds this variable */
    struct kv_var *next_freed; /* in the list of those to free when the lock is dropped */
    void (*on_free)(void *context);
    void *context;
} kv_var_t;

void kv_var_init(kv_var_t *var, bool poisons, void (*on_free)(void *context), void *context);

/* A pin keeps the variable alive and nothing else. */
void kv_var_pin(kv_var_t *var);
void kv_var_unpin(kv_var_t *var);

/* The owner's last word: nobody can reach the variable any more but those who are in it. */
void kv_var_retire(kv_var_t *var);

/* Whether the calling thread is inside a callback that holds this variable; then every operation
 * on it would wait for itself. */
bool kv_var_held_here(const kv_var_t *var);

/* ------------------------------------------------------------------------------ operations */

typedef enum kv_access {
    KV_READ,
    KV_WRITE,
    KV_OVERWRITE, /* a write that does not look at what was there: it wipes out a stored error */
} kv_access_t;

/* One variable of one operation. */
struct kv_dep {
    kv_var_t *var;
    kv_access_t access;
    bool granted; /* engine lock, as all below */
    bool queued;  /* stands in the variable's list */
    kv_op_t *op;
    kv_dep_t *prev, *next;
};

/* An operation. Filled by kv_op_init; the fields are the engine's own. `deps` stays the caller's.
 */
struct kv_op {
    kv_dep_t *deps;
    int32_t num_deps;
    int32_t num_missing; /* engine lock: variables not yet granted */
    int32_t priority;
    bool caller_run;
    uint64_t sequence;    /* engine-run: order of submission */
    kv_actor_t *actor;    /* engine lock; caller-run: the thread that waits for its turn */
    kv_actor_t *callback; /* caller-run: the thread, from kv_engine_begin_callback to leave */
    kv_error_t *error;    /* engine lock; engine-run: found on a variable, so it fails with it */
    int32_t error_dep;    /* that variable, the first of several */
    uint64_t visited;     /* engine lock: last walk that came by, and what that walk noted */
    kv_op_t *walk_next;
    int32_t walk_threads;
    /* Engine-run only. `run` works with no lock held, in whatever thread the engine chose, and may
     * not wait; on failure the engine stores the error on the written variables and on the handle.
     * `finish` is called last, once, with no lock held, also for a task that failed before it ran;
     * it frees the task. The handle is done only after that. */
    kv_status_t (*run)(kv_op_t *op);
    /* Instead of `run`: begins work that goes on elsewhere and is ended by kv_engine_end, perhaps
     * before `start` returns. */
    void (*start)(kv_op_t *op);
    void (*finish)(kv_op_t *op);
    kv_handle_t *handle; /* one share, the task's own: `finish` gives it back. May be NULL */
    kv_op_t *handle_prev, *handle_next; /* engine lock: the unfinished tasks of the handle */
};

/* Prepares an operation, for one use, on the variables in `deps` (var and access filled in;
 * borrowed until the operation has ended). A variable that stands twice is merged into its first
 * place with the stronger access, so `num_deps` may shrink; the order of the rest is kept. */
void kv_op_init(kv_op_t *op, kv_dep_t *deps, int32_t num_deps, int32_t priority);

/* -------------------------------------------------------------------------------- engines */

/* Gives an engine: "threaded", "naive" or "stepping" (seed used by stepping only; at most
 * `num_threads` threads of threaded, but at least 1). KV_INVALID for another name, with the list.
 * Starts no thread. The engine outlives its handles and all operations on it. */
KV_MUST_CHECK kv_status_t kv_engine_new(const char *name, uint64_t seed, int num_threads,
                                        kv_engine_t **out);
const char *kv_engine_name(const kv_engine_t *engine);
/* From now on enter and submit fail with KV_CLOSED. Does not block. */
void kv_engine_close(kv_engine_t *engine);
/* Runs everything that was submitted, joins the threads. After close; blocks, and with a caller
 * leaves it detached. With a caller it goes on only while tasks end, each within the timeout: those
 * that wait for a callback that never returns are given up, and whatever they hold stays held. */
void kv_engine_stop(kv_engine_t *engine, kv_caller_t *caller);
void kv_engine_free(kv_engine_t *engine); /* after stop */

/* ------------------------------------------------------------------------------ caller-run */

/* Takes all variables without a lock, or none and returns false: because one is busy, an error is
 * stored on one, or the engine is closed. */
bool kv_engine_try_enter(kv_engine_t *engine, kv_op_t *op);

/* The same for one variable and no operation around it, for work that can neither wait nor run a
 * callback: only `var` and `access` of the dependency are used. */
bool kv_engine_try_enter_one(kv_engine_t *engine, kv_dep_t *dep);
void kv_engine_leave_one(kv_engine_t *engine, kv_dep_t *dep);

/* The same as try_enter for a task that the calling thread could run at once, if this engine thinks
 * that better than a queue: threaded up to KV_DETACH_BYTES of work, naive always, stepping when its
 * seed says so. */
bool kv_engine_try_inline(kv_engine_t *engine, kv_op_t *op, size_t work_bytes);

/* Takes all variables, at once or after waiting for the turn (detached), and holds them until
 * kv_engine_leave by the same thread. An error stored on a
 * variable that the operation does not overwrite is raised here and taken away; nothing is held
 * then. Other errors: KV_TIMEOUT and KV_INTERRUPTED or KV_CALLBACK (the operation has been taken
 * out of the queues), KV_INVALID when the wait could never end because callbacks of this and other
 * threads wait for each other, KV_CLOSED. On return the caller is attached or detached as it was.
 */
KV_MUST_CHECK kv_status_t kv_engine_enter(kv_engine_t *engine, kv_op_t *op, kv_caller_t *caller);

/* Gives all variables back. Leaves the sentence of this thread's last kv_fail as it was. */
void kv_engine_leave(kv_engine_t *engine, kv_op_t *op);

/* Before a user's function runs inside an operation: gives back all but the first variable (an
 * updater holds its key and nothing else) and marks this one as held by the calling thread, until
 * kv_engine_leave. */
void kv_engine_begin_callback(kv_engine_t *engine, kv_op_t *op);

/* How many callbacks the calling thread is inside of, over all engines. */
int kv_callback_depth(void);

/* ------------------------------------------------------------------------------ engine-run */

/* Hands over a task: `run`, `finish` and `handle` are filled in after kv_op_init. A variable that
 * poisons and has an error fails the tasks that look at it (KV_READ and KV_WRITE): they do not run
 * and end with an error of the same words, which is their own: it is delivered apart from the first
 * one, or a push of a poisoned array would be lost without a word once somebody knows why the array
 * is poisoned. On an error of this call (KV_CLOSED, no thread could be started: KV_NO_MEMORY) the
 * task is still the caller's and `finish` was not called. */
KV_MUST_CHECK kv_status_t kv_engine_submit(kv_engine_t *engine, kv_op_t *op);

/* For a task that the calling thread begins itself, its variables entered (kv_engine_try_inline) or
 * none: from now on it is pending, as if it had been submitted and had started, until
 * kv_engine_end. KV_CLOSED, KV_NO_MEMORY: it is still the caller's. */
KV_MUST_CHECK kv_status_t kv_engine_begin(kv_engine_t *engine, kv_op_t *op);

/* Gives back the variables from `first` on, in the order that kv_op_init left; the operation, which
 * holds all of them, goes on with the rest. */
void kv_engine_give_back(kv_engine_t *engine, kv_op_t *op, int32_t first);

/* Ends a task that was begun: once, any thread, no lock held. An error (its sentence this thread's)
 * is stored on the variables that it still holds and writes, on its handle, and on `also`, which
 * are pinned. */
void kv_engine_end(kv_engine_t *engine, kv_op_t *op, kv_status_t status, kv_var_t *const *also,
                   int64_t num_also);

/* Waits until no task is pending, then raises the first error (in order of submission) that nobody
 * has been told of; the engine remembers KV_UNTOLD_ERRORS of them.
 * KV_INVALID inside a callback; KV_TIMEOUT, KV_INTERRUPTED, KV_CALLBACK as above. */
KV_MUST_CHECK kv_status_t kv_engine_wait_all(kv_engine_t *engine, kv_caller_t *caller);

/* Tasks submitted and not finished. */
int64_t kv_engine_pending(kv_engine_t *engine);

/* -------------------------------------------------------------------------------- handles */

/* A handle stands for the tasks of one call. It is shared by counting: the binding's object has
 * one share, every task one. It is done when `num_tasks` tasks have ended, and failed with the
 * first error of them (in order of submission). kv_handle_done, _error and _rele do not touch the
 * engine. */

/* Gives a handle with one share. */
KV_MUST_CHECK kv_status_t kv_handle_new(kv_engine_t *engine, int64_t num_tasks, kv_handle_t **out);
kv_handle_t *kv_handle_hold(kv_handle_t *handle);
void kv_handle_rele(kv_handle_t *handle); /* NULL is allowed */

/* One of its tasks has ended without the engine (it ran inline, or could not be submitted: then
 * `status` is an error whose sentence is this thread's). The share stays the caller's. */
void kv_handle_end_one(kv_handle_t *handle, kv_status_t status);

/* Never blocks. */
bool kv_handle_done(kv_handle_t *handle);

/* The error of a handle that is done, NULL if there is none; borrowed from the handle. Counts as
 * told to the user. */
kv_error_t *kv_handle_error(kv_handle_t *handle);
/* The same, but nobody has been told. */
const kv_error_t *kv_handle_peek(const kv_handle_t *handle);

/* Waits until the handle is done; the status is that of the wait, not of the tasks. KV_INVALID when
 * a callback of this thread holds what the tasks wait for. */
KV_MUST_CHECK kv_status_t kv_handle_wait(kv_handle_t *handle, kv_caller_t *caller);

/* Calls notify(context) once, when the handle is done: at once in this thread, or later in the one
 * that ends the last task, with no lock held. At most one at a time; NULL takes it back, and after
 * that returned the old one is not running and will not run. */
void kv_handle_notify(kv_handle_t *handle, void (*notify)(void *context), void *context);

#endif
