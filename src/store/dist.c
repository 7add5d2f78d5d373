/* Calls of a dist store: the values go to servers and come from there.
 *
 * A call is one operation on all its keys and arrays. While it holds the keys it merges what has to
 * be merged and hands everything to the client (ps/client.h), which keeps the order of calls on a
 * key from there on; so the keys are given back at once, and the next call on them can follow over
 * the wire. Values are held until they have gone out, outs until the answers are there.
 *
 * The part of a call that outlives it, if it does, is a request: a task that is pending until its
 * last answer has come. A synchronous call holds the arrays itself and waits only as long as its
 * memory is in use; a push therefore returns when its values have been sent, and what becomes of it
 * later is told as of any asynchronous operation.
 *
 * Values in device memory come while the call is on its way: the thread that has started it waits
 * for one slice after the other and tells the client, which sends what it has; and it puts answers
 * on their devices as they come. Such a call is always synchronous. It begins when the devices have
 * come to the copies, and from then on it waits for these whatever the caller wants: nothing of it
 * has gone out, or all will. Where that cannot be, because a device failed in between, the servers
 * have a part of a push that will never be whole, and the store leaves them.
 *
 * Three things happen to a request, in this order but for the first, which may come last: it was
 * issued (the starting thread is through with it), its values were sent, it is done. Whoever
 * completes the set ends the task.
 */
#include "base/memory.h"
#include "store/dist.h"

#include <stdio.h>
#include <string.h>

enum { NAME_BYTES = 96, ISSUED = 1, SENT = 2, DONE = 4 };

/* A copy that a device has come to and that takes longer will never end. */
#define COPY_NS (30 * INT64_C(1000000000))

static kv_request_t *of_call(kv_client_call_t *call)
{
    return (kv_request_t *)((char *)call - offsetof(kv_request_t, call));
}

static kv_var_t *var_of(const kv_view_t *view)
{
    return view->array != NULL    ? &view->array->var
           : view->sparse != NULL ? &view->sparse->var
                                  : NULL;
}

static void request_rele(kv_request_t *request)
{
    if (atomic_fetch_sub(&request->refs, 1) > 1)
        return;
    if (request->expected) /* while an entry keeps the client */
        kv_client_expect(request->client, -1);
    for (int64_t i = 0; i < request->num_targets; i++)
        kv_target_fini(&request->targets[i]);
    kv_handle_rele(request->sent);
    kv_free(request);
}

static void request_finish(kv_op_t *op)
{
    kv_request_t *request = (kv_request_t *)((char *)op - offsetof(kv_request_t, op));
    kv_handle_rele(op->handle);
    if (request->hold != NULL && atomic_fetch_sub(&request->hold->refs, 1) == 1)
        request->hold->release(request->hold);
    request_rele(request);
}

/* ------------------------------------------------------------------------ the three events */

static void end(kv_request_t *request)
{
    kv_status_t status = atomic_load(&request->given_up) ? KV_OK : request->status;
    if (status != KV_OK)
        kv_sentence_restore(&request->sentence);
    if (request->sent != NULL && request->call.unsent) {
        kv_handle_end_one(request->sent, status); /* somebody waits, and is told of it there */
        status = KV_OK;
    }
    kv_engine_end(request->engine, &request->op, status, request->keys,
                  request->push ? request->num_targets : 0);
}

/* The starting thread's last word. */
static void note_issued(kv_request_t *request)
{
    kv_engine_give_back(request->engine, &request->op, request->first_key);
    int state = atomic_load(&request->state);
    do {
        if (state & SENT)
            kv_engine_give_back(request->engine, &request->op, request->first_value);
    } while (!atomic_compare_exchange_strong(&request->state, &state, state | ISSUED));
    if (state & DONE)
        end(request);
}

static void note_done(kv_request_t *request, kv_status_t status)
{
    request->status = status;
    if (status != KV_OK)
        kv_sentence_save(&request->sentence);
    if (atomic_fetch_or(&request->state, DONE) & ISSUED)
        end(request);
}

static void call_sent(kv_client_call_t *call)
{
    kv_request_t *request = of_call(call);
    if (atomic_fetch_or(&request->state, SENT) & ISSUED)
        kv_engine_give_back(request->engine, &request->op, request->first_value);
    if (request->sent != NULL && !call->unsent)
        kv_handle_end_one(request->sent, KV_OK);
}

/* Where the answer is goes to all outs of the key. */
static kv_status_t deliver(kv_request_t *request)
{
    for (int64_t i = 0; i < request->num_targets; i++) {
        kv_target_t *target = &request->targets[i];
        bool arrives = kv_dist_rows_arrive(&target->rows);
        if (target->num_outs == 0 || (target->num_outs == 1 && target->arrived == NULL && !arrives))
            continue;
        KV_TRY(kv_dist_rows_deliver(&target->rows, &request->host, target->entry,
                                    arrives ? NULL : request->parts[i].out, target->num_outs,
                                    target->outs));
    }
    return KV_OK;
}

/* 0: everything is where it belongs. */
static size_t delivery_bytes(const kv_request_t *request)
{
    size_t bytes = 0;
    for (int64_t i = 0; i < request->num_targets; i++) {
        const kv_target_t *target = &request->targets[i];
        if (kv_dist_rows_arrive(&target->rows))
            bytes +=
                kv_dist_rows_bytes(&target->rows, target->entry, target->num_outs, target->outs);
        else if (target->num_outs > 1 || target->arrived != NULL)
            bytes += 1 + target->entry->bytes * (size_t)target->num_outs;
    }
    return bytes;
}

static kv_status_t copy_run(kv_op_t *op)
{
    kv_request_t *request = (kv_request_t *)((char *)op - offsetof(kv_request_t, copy));
    request->copied = deliver(request);
    kv_sentence_save(&request->sentence);
    return KV_OK;
}

static void copy_finish(kv_op_t *op)
{
    kv_request_t *request = (kv_request_t *)((char *)op - offsetof(kv_request_t, copy));
    if (request->copied != KV_OK)
        kv_sentence_restore(&request->sentence);
    note_done(request, request->copied);
}

/* In the endpoint's thread, which has other things to do than to copy much. */
static void call_done(kv_client_call_t *call, kv_status_t status)
{
    kv_request_t *request = of_call(call);
    size_t bytes = status == KV_OK && request->own_outs ? delivery_bytes(request) : 0;
    if (bytes > KV_DETACH_BYTES) {
        kv_op_init(&request->copy, NULL, 0, request->op.priority);
        request->copy.run = copy_run;
        request->copy.finish = copy_finish;
        request->copied = kv_fail(KV_NO_MEMORY, "the engine could not copy the outs of a call");
        kv_sentence_save(&request->sentence);
        if (kv_engine_submit(request->engine, &request->copy) == KV_OK)
            return;
    }
    if (bytes > 0)
        status = deliver(request);
    note_done(request, status);
}

/* -------------------------------------------------------------------------------- issuing */

/* With all variables held, and the task begun: always ends in note_issued or end. */
static void issue(kv_request_t *request)
{
    kv_status_t status = KV_OK;
    bool asks = false;
    for (int64_t i = 0; i < request->num_targets && status == KV_OK; i++) {
        const kv_client_part_t *part = &request->parts[i];
        status = kv_target_prepare(request, i);
        if (status == KV_OK && !request->call.late)
            kv_target_fill(request, i);
        request->call.watched =
            request->call.watched || kv_staged_arrives(request->targets[i].staged, part->out);
        asks = asks || request->push || part->out != NULL || part->found != NULL;
    }
    if (status == KV_OK)
        status = asks ? kv_client_start(request->client, &request->call)
                      : kv_client_check(request->client);
    request->expected = false;
    kv_client_expect(request->client, -1);
    for (int64_t i = 0; i < request->num_targets; i++)
        kv_dist_rows_issued(&request->targets[i].rows);
    if (status != KV_OK) {
        request->call.unsent = true;
        call_sent(&request->call);
        note_done(request, status);
    } else if (!asks) { /* no row is wanted */
        request->call.unsent = false;
        call_sent(&request->call);
        call_done(&request->call, KV_OK);
    }
    note_issued(request);
}

static void request_start(kv_op_t *op)
{
    issue((kv_request_t *)((char *)op - offsetof(kv_request_t, op)));
}

/* ------------------------------------------------------------------------------- requests */

static void fill_deps(kv_request_t *request)
{
    kv_dep_t *next = request->deps;
    kv_var_t *var;
    for (int64_t i = 0; i < request->num_targets; i++)
        for (int32_t j = 0; j < request->targets[i].num_outs; j++)
            if ((var = var_of(&request->targets[i].outs[j])) != NULL)
                *next++ = (kv_dep_t){.var = var, .access = KV_OVERWRITE};
    request->first_value = (int32_t)(next - request->deps);
    for (int64_t i = 0; i < request->num_targets; i++)
        for (int32_t j = 0; j < request->targets[i].num_values; j++)
            if ((var = var_of(&request->targets[i].values[j])) != NULL)
                *next++ = (kv_dep_t){.var = var, .access = KV_READ};
    for (int64_t i = 0; i < request->num_targets; i++)
        *next++ = (kv_dep_t){.var = &request->targets[i].entry->var,
                             .access = request->push ? KV_WRITE : KV_READ};
    request->num_deps = (int32_t)(next - request->deps);
}

static int64_t timeout_ms(const kv_caller_t *caller)
{
    int64_t ms = caller->timeout_ns / 1000000;
    return ms > 0 ? ms : 1;
}

static kv_status_t request_new(kv_store_t *store, const kv_plan_t *plan, const kv_call_t *call,
                               bool push, const kv_caller_t *caller, kv_request_t **out)
{
    size_t groups = (size_t)plan->num_groups;
    size_t views = (size_t)(call->num_values + call->num_outs);
    size_t num_ids = call->row_ids != NULL ? (size_t)call->num_outs : 0;
    bool counted = push && plan->counted != 0, late = false;
    kv_request_t *request = kv_calloc(
        1, sizeof *request +
               groups * (sizeof(kv_target_t) + sizeof(kv_client_part_t) + sizeof(void *)) +
               (views + groups) * sizeof(kv_dep_t) + views * sizeof(kv_view_t) +
               (counted ? groups * sizeof(kv_client_step_t) : 0) + num_ids * sizeof(kv_row_ids_t));
    KV_TRY_ALLOC(request, "a request");
    request->targets = (kv_target_t *)(request + 1);
    request->parts = (kv_client_part_t *)(request->targets + groups);
    request->keys = (kv_var_t **)(request->parts + groups);
    request->deps = (kv_dep_t *)(request->keys + groups);
    kv_view_t *next = (kv_view_t *)(request->deps + views + groups);
    kv_row_ids_t *next_ids = (kv_row_ids_t *)(next + views);
    kv_client_step_t *steps = (kv_client_step_t *)(next_ids + num_ids);
    for (int64_t g = 0; g < plan->num_groups; g++) {
        const kv_group_t *group = &plan->groups[g];
        if (!push && group->num_outs == 0)
            continue; /* its row-sparse outs were left out */
        request->keys[request->num_targets] = &group->entry->var;
        kv_target_t *target = &request->targets[request->num_targets++];
        *target = (kv_target_t){.entry = group->entry,
                                .num_values = push ? group->num_values : 0,
                                .num_outs = group->num_outs,
                                .values = next,
                                .staged = group->staged};
        late = late || (push && kv_staged_bytes(group->staged) > 0);
        if (target->num_values > 0)
            memcpy(next, group->values, (size_t)target->num_values * sizeof *next);
        next += target->num_values;
        target->outs = next;
        if (target->num_outs > 0)
            memcpy(next, group->outs, (size_t)target->num_outs * sizeof *next);
        next += target->num_outs;
        if (group->row_ids != NULL && target->num_outs > 0) {
            memcpy(next_ids, group->row_ids, (size_t)target->num_outs * sizeof *next_ids);
            for (int32_t i = 0; i < target->num_outs; i++)
                kv_buffer_hold(next_ids[i].ids);
            target->rows.row_ids = next_ids;
            next_ids += target->num_outs;
        }
        kv_var_pin(&group->entry->var);
    }
    if (counted) {
        request->steps = steps;
        for (int64_t g = 0; g < plan->num_groups; g++)
            request->steps[g] = (kv_client_step_t){.optimizer = plan->optimizer->declared,
                                                   .step = *plan->groups[g].step};
    }
    atomic_init(&request->refs, 1);
    request->engine = store->runtime->engine;
    request->client = store->client;
    request->host = store->host;
    request->push = push;
    request->codec = plan->codec;
    request->codec_epoch = plan->codec_epoch;
    request->expected = true;
    kv_client_expect(store->client, 1);
    fill_deps(request);
    request->call = (kv_client_call_t){.verb = KV_CLIENT_MOVE,
                                       .priority = call->priority,
                                       .timeout_ms = timeout_ms(caller),
                                       .parts = request->parts,
                                       .num_parts = request->num_targets,
                                       .host = &request->host,
                                       .late = late,
                                       .sent = call_sent,
                                       .done = call_done,
                                       .unsent = true};
    *out = request;
    return KV_OK;
}

static void op_prepare(kv_request_t *request, bool held_here)
{
    kv_op_init(&request->op, request->deps, held_here ? 0 : request->num_deps,
               request->call.priority);
    request->op.start = request_start;
    request->op.finish = request_finish;
    request->first_key = request->op.num_deps - (held_here ? 0 : (int32_t)request->num_targets);
    if (held_here)
        request->first_value = 0;
}

/* ---------------------------------------------------------------------------------- calls */

static size_t merge_bytes(const kv_request_t *request)
{
    size_t bytes = 0;
    for (int64_t i = 0; i < request->num_targets; i++) {
        const kv_target_t *target = &request->targets[i];
        if (target->num_values > 0 && target->values[0].sparse != NULL)
            bytes += KV_DETACH_BYTES + 1; /* nobody can tell before they are held */
        else if (target->num_values > 1 || (target->num_values == 1 && target->values[0].strides))
            bytes += target->entry->bytes * (size_t)target->num_values;
    }
    return bytes;
}

/* Hands a request over; it has one share for the engine. */
static kv_status_t run_later(kv_request_t *request, kv_call_t *call)
{
    kv_engine_t *engine = request->engine;
    kv_handle_t *handle = NULL;
    if (call->handle != NULL) {
        kv_status_t status = kv_handle_new(engine, 1, &handle);
        if (status != KV_OK) {
            request_rele(request);
            return status;
        }
    }
    request->own_outs = true;
    op_prepare(request, false);
    request->op.handle = handle != NULL ? kv_handle_hold(handle) : NULL;
    request->hold = call->hold;
    if (request->hold != NULL)
        atomic_fetch_add(&request->hold->refs, 1);
    kv_status_t status;
    if (kv_engine_try_inline(engine, &request->op, merge_bytes(request))) {
        status = kv_engine_begin(engine, &request->op);
        if (status == KV_OK)
            issue(request);
        else
            kv_engine_leave(engine, &request->op);
    } else {
        status = kv_engine_submit(engine, &request->op);
    }
    if (status == KV_OK) {
        if (handle != NULL)
            *call->handle = handle;
        return KV_OK;
    }
    request_finish(&request->op);
    kv_handle_rele(handle);
    return status;
}

/* The sentence for a wait that ended early; the memory of the caller is free afterwards. */
static kv_status_t give_up(kv_request_t *request, kv_status_t status, const kv_caller_t *caller)
{
    char missing[128], name[NAME_BYTES];
    kv_sentence_t why;
    kv_sentence_save(&why);
    atomic_store(&request->given_up, true);
    kv_client_cancel(request->client, &request->call, missing, sizeof missing);
    if (status != KV_TIMEOUT) {
        kv_sentence_restore(&why);
        return status;
    }
    kv_name_format(&request->targets[0].entry->name, name, sizeof name);
    return kv_fail(KV_TIMEOUT, "key %s: %s %s not answered within the deadline of %.3g s%s", name,
                   missing[0] != '\0' ? missing : "the servers",
                   missing[0] != '\0' ? "has" : "have", (double)caller->timeout_ns * 1e-9,
                   request->push ? "; the push may have counted" : "");
}

static void stay(kv_caller_t *caller)
{
    (void)caller;
}

static kv_status_t go_on(kv_caller_t *caller)
{
    (void)caller;
    return KV_OK;
}

static kv_status_t supply_target(kv_request_t *request, int64_t i)
{
    kv_target_t *target = &request->targets[i];
    size_t there = 0, bytes = kv_staged_bytes(target->staged);
    while (there < bytes) {
        /* It has begun, so the copies are all there is to wait for. */
        kv_caller_t patient = {stay, stay, go_on, .timeout_ns = COPY_NS, .detached = true};
        KV_TRY(kv_staged_next(target->staged, &there, &patient));
        if (kv_target_is_plain(target) && there < bytes)
            kv_client_supply(request->client, &request->call, i, there);
    }
    kv_target_fill(request, i);
    kv_client_supply(request->client, &request->call, i + 1, 0);
    return KV_OK;
}

/* With the keys held. The values go out as they come from their devices. */
static kv_status_t supply(kv_request_t *request)
{
    kv_status_t status = KV_OK;
    for (int64_t i = 0; i < request->num_targets && status == KV_OK; i++)
        status = supply_target(request, i);
    if (status == KV_OK)
        return KV_OK;
    char why[KV_MESSAGE_BYTES];
    atomic_store(&request->given_up, true); /* the caller is told here */
    snprintf(why, sizeof why, "a push of this worker broke off: %s", kv_status_message(status));
    kv_client_abandon(request->client, why);
    return kv_fail(KV_DEVICE, "%s; the servers may have parts of this push, so the store left them",
                   why);
}

/* Answers go to their devices as they come. */
static kv_status_t pass_on(kv_request_t *request, kv_caller_t *caller)
{
    kv_client_range_t range;
    int64_t poll_at = kv_clock_ns() + KV_POLL_NS;
    if (!request->call.watched)
        return KV_OK;
    for (;;) {
        KV_TRY(kv_client_next(request->client, &request->call, caller, &range));
        if (range.bytes == 0)
            return KV_OK;
        kv_staged_t *staged = request->targets[range.part].staged;
        if (kv_staged_arrives(staged, request->parts[range.part].out))
            KV_TRY(kv_staged_upload(staged, range.offset, range.bytes));
        int64_t now = kv_clock_ns();
        if (now >= kv_caller_deadline(caller))
            return kv_fail(KV_TIMEOUT, "the servers have not answered in time");
        if (now >= poll_at) {
            KV_TRY(caller->poll(caller));
            poll_at = now + KV_POLL_NS;
        }
    }
}

/* With arrays and keys held by `op`. */
static kv_status_t run_held(kv_request_t *request, kv_op_t *op, kv_caller_t *caller)
{
    kv_engine_t *engine = request->engine;
    kv_handle_t *handle;
    bool wants_outs = request->targets[0].num_outs > 0;
    KV_TRY(kv_handle_new(engine, 1, &handle));
    op_prepare(request, true);
    if (wants_outs)
        request->op.handle = kv_handle_hold(handle);
    else
        request->sent = kv_handle_hold(handle);
    kv_status_t status = kv_engine_begin(engine, &request->op);
    if (status != KV_OK) {
        kv_handle_rele(request->op.handle);
        kv_handle_rele(handle);
        return status;
    }
    atomic_fetch_add(&request->refs, 1); /* the task's */
    issue(request);
    kv_sentence_t broken = {.code = KV_OK};
    if (request->call.late && !request->call.unsent && supply(request) != KV_OK)
        kv_sentence_save(&broken);
    kv_engine_give_back(engine, op, op->num_deps - (int32_t)request->num_targets);
    status = pass_on(request, caller);
    if (status == KV_OK)
        status = kv_handle_wait(handle, caller);
    kv_caller_detach(caller);
    if (status != KV_OK) {
        status = give_up(request, status, caller);
        if (kv_handle_done(handle))
            (void)kv_handle_error(handle); /* too late to be told */
    } else if (broken.code == KV_OK) {
        kv_error_t *error = kv_handle_error(handle);
        status = error != NULL ? kv_error_raise(error) : deliver(request);
    }
    kv_handle_rele(handle);
    if (broken.code != KV_OK)
        kv_sentence_restore(&broken);
    return broken.code != KV_OK ? broken.code : status;
}

static kv_status_t run_now(kv_request_t *request, kv_call_t *call, kv_caller_t *caller)
{
    kv_engine_t *engine = request->engine;
    kv_dep_t local[8], *deps = local;
    if (request->num_deps > (int32_t)(sizeof local / sizeof *local)) {
        deps = kv_alloc((size_t)request->num_deps * sizeof *deps);
        KV_TRY_ALLOC(deps, "the arrays of a call");
    }
    memcpy(deps, request->deps, (size_t)request->num_deps * sizeof *deps);
    kv_op_t op;
    kv_op_init(&op, deps, request->num_deps, call->priority);
    kv_status_t status = kv_engine_enter(engine, &op, caller);
    if (status == KV_OK) {
        kv_caller_detach(caller);
        status = run_held(request, &op, caller);
        kv_engine_leave(engine, &op);
        kv_caller_attach(caller);
    }
    if (deps != local)
        kv_free(deps);
    return status;
}

kv_status_t kv_dist_run(kv_store_t *store, kv_plan_t *plan, kv_call_t *call, bool push,
                        kv_caller_t *caller)
{
    kv_request_t *request = NULL;
    if (plan->num_groups == 0 || (!push && call->num_outs == 0))
        return KV_OK;
    if (push && plan->stage != NULL)
        KV_TRY(kv_stage_begun(plan->stage, caller));
    KV_TRY(request_new(store, plan, call, push, caller, &request));
    kv_status_t status = KV_OK;
    if (request->num_targets == 0) {
        request_rele(request);
    } else if (call->async) {
        status = run_later(request, call);
    } else {
        status = run_now(request, call, caller);
        if (!request->call.unsent)
            plan->counted = 0; /* the servers have it, whatever the caller is told */
        request_rele(request);
    }
    for (int64_t g = 0; g < plan->num_groups && status == KV_OK; g++)
        status = kv_staged_finish(plan->groups[g].staged, caller);
    if (status == KV_OK)
        call->num_done = plan->num_groups;
    return status;
}
