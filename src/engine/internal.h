/* What the files of the engine share: the engine itself, threads as the walk sees them, waits.
 *
 *   var.c       the state word: pins, retiring, the path without a lock
 *   queue.c     lists of variables: entering, granting, leaving, errors stored on variables
 *   walk.c      whom would this wait for? cycles through callbacks
 *   caller.c    operations run by their caller
 *   task.c      operations run by the engine: submit, run, the runnable ones
 *   handle.c    handles
 *   engine.c    new, close, stop, free; how a thread waits; wait_all and untold errors
 *   threaded.c, serial.c   the engines behind the table
 */
#ifndef KV_ENGINE_INTERNAL_H
#define KV_ENGINE_INTERNAL_H

#include "engine/engine.h"

/* What a thread waits for: the turn of `op`, the end of `handle`, or, with neither, that no task is
 * pending. Lives on the stack of the thread. */
typedef struct kv_wait {
    kv_op_t *op;
    kv_handle_t *handle;
    kv_cond_t *cond; /* set by kv_wait_locked: broadcast when it may be over */
} kv_wait_t;

/* One thread. */
struct kv_actor {
    int depth; /* callbacks that it is inside of; its own */
    /* Where it waits, NULL while it does not. Set and cleared under that engine's lock, which
     * guards the rest: a thread that waits in one engine is not looked at by a walk in another. */
    kv_engine_t *_Atomic engine;
    kv_wait_t *wait;
    uint64_t visited;
    kv_engine_t *draining; /* the naive engine whose tasks it is running; its own */
};

kv_actor_t *kv_actor_self(void);

/* One engine, as the table sees it. */
typedef struct kv_engine_kind {
    const char *name;
    bool waiters_run; /* only threads that wait run tasks: so all of them hear of one */
    bool drains;      /* a thread that made tasks runnable runs them when it drops the lock */
    bool (*wants_inline)(kv_engine_t *engine, size_t work_bytes);
    /* Before a task is queued; an error refuses it. */
    kv_status_t (*prepare_locked)(kv_engine_t *engine);
    /* A task has become runnable. */
    void (*runnable_locked)(kv_engine_t *engine);
    /* Gives a runnable task that a thread shall run instead of sleeping, or NULL. */
    kv_op_t *(*take_locked)(kv_engine_t *engine, const kv_wait_t *wait, int64_t deadline_ns);
    /* No task is pending any more and none will come. */
    void (*join)(kv_engine_t *engine);
} kv_engine_kind_t;

extern const kv_engine_kind_t kv_engine_threaded;
extern const kv_engine_kind_t kv_engine_naive;
extern const kv_engine_kind_t kv_engine_stepping;

typedef struct kv_untold {
    kv_error_t *error; /* one share */
    uint64_t sequence; /* of the operation that failed */
} kv_untold_t;

struct kv_engine {
    _Atomic bool closed; /* set under the lock */
    const kv_engine_kind_t *kind;
    kv_mutex_t lock; /* guards everything below, and what engine.h says of variables */
    kv_cond_t ended; /* broadcast when a handle that is waited for is done, when nothing is pending,
                        and for waiters that run tasks when there is one to run */
    int64_t pending; /* tasks submitted and not finished */
    uint64_t sequence;
    kv_op_t **runnable; /* binary heap, or for stepping a plain set; room for all pending tasks */
    int64_t num_runnable, runnable_room;
    kv_var_t *freed; /* to free when the lock is dropped */
    kv_untold_t untold[KV_UNTOLD_ERRORS];
    int num_untold;
    /* threaded */
    kv_cond_t work;
    kv_thread_t *threads;
    int max_threads, num_threads, num_idle;
    bool stopping;
    /* stepping */
    uint64_t random;
};

/* Every unlock of an engine goes through here: frees the variables that were given up under the
 * lock, and lets a naive engine run what became runnable. */
void kv_engine_unlock(kv_engine_t *engine) KV_RELEASES(engine->lock);

/* --------------------------------------------------------------------------------- var.c */

/* What an operation adds to the state of a variable that it holds. */
static inline uint64_t kv_access_unit(kv_access_t access)
{
    return access == KV_READ ? KV_VAR_READER : KV_VAR_WRITER;
}

/* Whether this state, left behind by a change of one's own, means that one has to free. */
static inline bool kv_state_is_over(uint64_t state)
{
    return (state & ~KV_VAR_ERROR) == KV_VAR_RETIRED;
}

void kv_var_free(kv_var_t *var); /* no lock held */

/* ------------------------------------------------------------------------------- queue.c */

/* Appends the operation to the lists of all its variables, and grants what can be granted. */
void kv_queue_enter_locked(kv_engine_t *engine, kv_op_t *op) KV_REQUIRES(engine->lock);

/* Gives back the variables from `first` on, granted or not, and grants them to who comes next. */
void kv_queue_leave_locked(kv_engine_t *engine, kv_op_t *op, int32_t first)
    KV_REQUIRES(engine->lock);

/* Replaces the error stored on a variable that is held; NULL clears it. */
void kv_var_store_error_locked(kv_engine_t *engine, kv_var_t *var, kv_error_t *error)
    KV_REQUIRES(engine->lock);

/* -------------------------------------------------------------------------------- walk.c */

/* Whether a wait of this thread, for an operation in the queues or for a handle, could only end
 * after the thread itself went on. Gives the number of threads in the circle, 0 if there is none.
 */
int32_t kv_walk_locked(kv_engine_t *engine, kv_actor_t *self, const kv_wait_t *wait)
    KV_REQUIRES(engine->lock);

/* The error for a circle of so many threads. */
kv_status_t kv_walk_fail(const kv_actor_t *self, int32_t num_threads);

/* -------------------------------------------------------------------------------- task.c */

/* A task has been granted this variable: from now on it is known whether it will run. Not only when
 * it has all of them: meanwhile another reader may take the error away. */
void kv_task_granted_locked(kv_engine_t *engine, kv_op_t *op, const kv_dep_t *dep)
    KV_REQUIRES(engine->lock);
/* A task has been granted all its variables. */
void kv_task_ready_locked(kv_engine_t *engine, kv_op_t *op) KV_REQUIRES(engine->lock);

/* Takes a runnable task, NULL if there is none: the first in order, or one chosen by a number. */
kv_op_t *kv_runnable_pop_locked(kv_engine_t *engine) KV_REQUIRES(engine->lock);
kv_op_t *kv_runnable_pick_locked(kv_engine_t *engine, uint64_t number) KV_REQUIRES(engine->lock);

/* Runs a runnable task to its end; no lock held. */
void kv_task_run(kv_engine_t *engine, kv_op_t *op);

/* ------------------------------------------------------------------------------ engine.c */

/* Waits detached, with the lock dropped meanwhile, until it is over, or the caller's deadline or
 * poll ends it. Without a caller: until it is over. Afterwards the caller is still detached. */
kv_status_t kv_wait_locked(kv_engine_t *engine, kv_wait_t *wait, kv_caller_t *caller)
    KV_REQUIRES(engine->lock);

/* Remembers an error for wait_all. */
void kv_untold_add_locked(kv_engine_t *engine, kv_error_t *error, uint64_t sequence)
    KV_REQUIRES(engine->lock);
/* Forgets those that somebody has been told of meanwhile. */
void kv_untold_sweep_locked(kv_engine_t *engine) KV_REQUIRES(engine->lock);

/* ------------------------------------------------------------------------------ serial.c */

uint64_t kv_stepping_random_locked(kv_engine_t *engine) KV_REQUIRES(engine->lock);

/* ------------------------------------------------------------------------------ handle.c */

struct kv_handle {
    kv_engine_t *engine;
    _Atomic int64_t refs;
    _Atomic int64_t num_left; /* tasks not ended; changed under the lock */
    kv_error_t *error;        /* engine lock until it is done, then constant */
    /* engine lock, all below */
    uint64_t error_sequence; /* of the operation that failed */
    int num_waiting;         /* threads that sleep until it is done */
    kv_op_t *tasks;          /* submitted and not ended */
    void (*notify)(void *context);
    void *notify_context;
    kv_actor_t *notifying; /* the thread that runs the notification */
};

void kv_handle_link_locked(kv_handle_t *handle, kv_op_t *op);
/* The task gives back its variables, with this error or NULL. */
void kv_handle_unlink_locked(kv_handle_t *handle, kv_op_t *op, kv_error_t *error);
/* One task less; no lock held. */
void kv_handle_count_down(kv_handle_t *handle);

#endif
