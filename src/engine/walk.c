/* Whom would this thread wait for?
 *
 * A thread inside a callback (a Python updater) holds the key of that callback, and may wait for
 * another: so threads can come to wait for each other in a circle, or one for itself. The walk goes
 * from an operation to those it has to wait for on each of its variables, from a variable to the
 * thread whose callback holds it, and from a thread to what it waits for; if it comes back to the
 * thread that asks, the wait could never end.
 *
 * It is enough that every thread walks once, when it is about to wait. A circle closes with its
 * last edge. Edges from an operation arise when it enters the queues and only go away afterwards:
 * whoever comes later stands behind. An operation that has just entered has nobody behind it, so an
 * edge out of it closes a circle only through the thread that waits for it. A variable gets a
 * thread when a callback begins, and that thread is running, so it has no edge out of it yet. The
 * tasks of a handle are submitted by the call that made the handle, before anybody can wait for it.
 * So the last edge is always one of a thread that is about to wait, and by then all the others can
 * be seen under the lock. wait_all has no place in it: it is refused to a thread that somebody
 * could be waiting for.
 *
 * The walk is for threads that are inside something; others have nobody behind them. "Inside" is a
 * callback, or a signal handler that runs in the poll of a wait: then the call that was interrupted
 * stands in the queues and cannot go on before the handler has returned.
 *
 * A READ does not wait for the READs before it, but for the last writer before it, and a writer for
 * all READs back to the last writer: the rest follows from those. So a list is passed about once.
 */
#include "engine/internal.h"

typedef struct walk {
    kv_engine_t *engine;
    const kv_actor_t *self;
    uint64_t stamp;
    kv_op_t *todo;
    int32_t found; /* threads in the circle */
} walk_t;

/* Stamps of one engine must not look like those of another on a thread that works with both. */
static _Atomic uint64_t last_stamp;

static void visit(walk_t *walk, kv_op_t *op, int32_t num_threads)
{
    if (op->visited == walk->stamp)
        return;
    op->visited = walk->stamp;
    op->walk_threads = num_threads;
    op->walk_next = walk->todo;
    walk->todo = op;
}

static void visit_wait(walk_t *walk, const kv_wait_t *wait, int32_t num_threads)
{
    if (wait->op != NULL)
        visit(walk, wait->op, num_threads);
    if (wait->handle != NULL) {
        for (kv_op_t *task = wait->handle->tasks; task != NULL; task = task->handle_next)
            visit(walk, task, num_threads);
    }
}

/* An operation that `num_threads` threads wait for, one through the other, needs this one to go on.
 */
static void visit_actor(walk_t *walk, kv_actor_t *actor, int32_t num_threads)
{
    if (actor == walk->self) {
        walk->found = num_threads;
    } else if (atomic_load(&actor->engine) == walk->engine && actor->visited != walk->stamp) {
        actor->visited = walk->stamp;
        visit_wait(walk, actor->wait, num_threads + 1);
    }
}

static void visit_those_before(walk_t *walk, const kv_dep_t *dep, int32_t num_threads)
{
    kv_actor_t *holder = atomic_load(&dep->var->actor);
    if (holder != NULL)
        visit_actor(walk, holder, num_threads);
    for (kv_dep_t *before = dep->prev; before != NULL; before = before->prev) {
        if (dep->access == KV_READ && before->access == KV_READ) {
            if (before->op->visited == walk->stamp)
                break; /* its own turn brings the writer */
            continue;
        }
        visit(walk, before->op, num_threads);
        if (before->op->actor != NULL)
            visit_actor(walk, before->op->actor, num_threads);
        if (before->access != KV_READ)
            break;
    }
}

int32_t kv_walk_locked(kv_engine_t *engine, kv_actor_t *self, const kv_wait_t *wait)
{
    if (self->depth == 0 && self->wait == NULL)
        return 0;
    walk_t walk = {.engine = engine, .self = self, .stamp = atomic_fetch_add(&last_stamp, 1) + 1};
    visit_wait(&walk, wait, 1);
    while (walk.todo != NULL && walk.found == 0) {
        kv_op_t *op = walk.todo;
        walk.todo = op->walk_next;
        for (int32_t i = 0; i < op->num_deps; i++) {
            if (op->deps[i].queued && !op->deps[i].granted)
                visit_those_before(&walk, &op->deps[i], op->walk_threads);
        }
    }
    return walk.found;
}

kv_status_t kv_walk_fail(const kv_actor_t *self, int32_t num_threads)
{
    if (num_threads > 1)
        return kv_fail(KV_INVALID,
                       "this call would wait for an updater that waits for this one: the updaters "
                       "of %d threads wait for each other in a circle",
                       (int)num_threads);
    if (self->depth == 0)
        return kv_fail(KV_INVALID,
                       "this call would wait for the call that the signal handler it is "
                       "made from has interrupted");
    return kv_fail(KV_INVALID, "this call would wait for the updater that it is made from");
}
