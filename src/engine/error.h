/* The error of an operation that nobody was waiting for when it failed.
 *
 * One object is shared by the variables, the handle and the engine's list that might deliver it;
 * the first to raise it marks it as told, and the others then drop it silently (handles excepted:
 * a failed handle raises whenever it is asked).
 */
#ifndef KV_ENGINE_ERROR_H
#define KV_ENGINE_ERROR_H

#include "base/status.h"
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct kv_error {
    _Atomic int64_t refs;
    _Atomic bool told;
    kv_status_t status;
    char message[KV_MESSAGE_BYTES];
} kv_error_t;

/* Captures status and this thread's sentence, with one share. Never fails: without memory it gives
 * a static error object that says so. */
kv_error_t *kv_error_capture(kv_status_t status);
kv_error_t *kv_error_hold(kv_error_t *error);
void kv_error_rele(kv_error_t *error); /* NULL is allowed */

void kv_error_mark_told(kv_error_t *error);

/* Makes the error this thread's own (kv_fail), marks it as told, returns its status. */
kv_status_t kv_error_raise(kv_error_t *error);

#endif
