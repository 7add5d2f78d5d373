/* The team: helper threads that share one large piece of work with the thread that calls.
 *
 * One job at a time. A caller that finds the team busy works alone: no waiting, so no deadlock.
 * Helpers start at the first job that wants them, sleep between jobs and are joined by
 * kv_team_stop. Work is handed out in chunks numbered 0 … n-1; which thread runs a chunk is open,
 * so a job must give the same result in any order.
 */
#ifndef KV_KERNELS_TEAM_H
#define KV_KERNELS_TEAM_H

#include "base/status.h"
#include <stdint.h>

typedef struct kv_team kv_team_t;

/* Gives a team that may use up to `max_threads` (>= 1), the caller counted in. Starts no thread. */
KV_MUST_CHECK kv_status_t kv_team_new(int max_threads, kv_team_t **out);

/* Refuses helpers from now on and joins them; running jobs end first. Callers still work, alone. */
void kv_team_stop(kv_team_t *team);
void kv_team_free(kv_team_t *team); /* after stop */

/* Runs body(context, i) once for every i in [0, num_chunks), in this thread and up to
 * num_threads - 1 helpers, and returns when all are done. Cannot fail: a helper that cannot be
 * started is done without. Must not be called from a body. */
void kv_team_run(kv_team_t *team, int num_threads, int64_t num_chunks,
                 void (*body)(void *context, int64_t chunk), void *context);

#endif
