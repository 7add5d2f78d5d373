/* The shared error objects of operations that failed with nobody waiting. */
#include "engine/error.h"
#include "base/memory.h"
#include <stdio.h>

/* Stands in for every error that there was no memory to describe. Never counted, never told: it may
 * stand for several failures at once. */
static kv_error_t no_memory = {
    .refs = 1,
    .status = KV_NO_MEMORY,
    .message = "an operation failed, and there was no memory to keep the reason",
};

kv_error_t *kv_error_capture(kv_status_t status)
{
    kv_error_t *error = kv_alloc(sizeof *error);
    if (error == NULL)
        return &no_memory;
    atomic_init(&error->refs, 1);
    atomic_init(&error->told, false);
    error->status = status;
    snprintf(error->message, sizeof error->message, "%s", kv_status_message(status));
    kv_count(KV_COUNT_ERRORS, 1);
    return error;
}

kv_error_t *kv_error_hold(kv_error_t *error)
{
    if (error != &no_memory)
        atomic_fetch_add(&error->refs, 1);
    return error;
}

void kv_error_rele(kv_error_t *error)
{
    if (error == NULL || error == &no_memory || atomic_fetch_sub(&error->refs, 1) > 1)
        return;
    kv_count(KV_COUNT_ERRORS, -1);
    kv_free(error);
}

void kv_error_mark_told(kv_error_t *error)
{
    if (error != &no_memory)
        atomic_store(&error->told, true);
}

kv_status_t kv_error_raise(kv_error_t *error)
{
    kv_error_mark_told(error);
    return kv_fail(error->status, "%s", error->message);
}
