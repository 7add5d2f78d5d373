/* The runtime: what the stores and arrays of a process share. */
#include "base/config.h"
#include "base/memory.h"
#include "base/thread.h"
#include "kv.h"

/* Tasks are few and each uses the team, so a handful of workers keeps every processor busy. */
enum { MAX_WORKERS = 4 };

kv_status_t kv_runtime_new(kv_runtime_t **out)
{
    int64_t num_threads, seed;
    KV_TRY(kv_config_int(KV_CONFIG_NUM_THREADS, 0, KV_MAX_THREADS, &num_threads));
    KV_TRY(kv_config_int(KV_CONFIG_ENGINE_SEED, 0, INT64_MAX, &seed));
    const kv_kernels_t *kernels;
    KV_TRY(kv_kernels_get(&kernels));

    kv_runtime_t *runtime = kv_calloc(1, sizeof *runtime);
    KV_TRY_ALLOC(runtime, "the runtime");
    kv_var_init(&runtime->nccl, false, NULL, NULL);
    runtime->kernels = kernels;
    runtime->num_threads = num_threads > 0 ? (int)num_threads : kv_processor_count();
    runtime->generation = kv_fork_generation();
    int workers = runtime->num_threads < MAX_WORKERS ? runtime->num_threads : MAX_WORKERS;
    kv_status_t status =
        kv_engine_new(kv_config_text(KV_CONFIG_ENGINE), (uint64_t)seed, workers, &runtime->engine);
    if (status == KV_OK) {
        status = kv_team_new(KV_MAX_THREADS, &runtime->team);
        if (status != KV_OK) {
            kv_engine_close(runtime->engine);
            kv_engine_stop(runtime->engine, NULL);
            kv_engine_free(runtime->engine);
        }
    }
    if (status != KV_OK) {
        kv_free(runtime);
        return status;
    }
    *out = runtime;
    return KV_OK;
}

void kv_runtime_stop(kv_runtime_t *runtime, kv_caller_t *caller)
{
    kv_engine_close(runtime->engine);
    kv_engine_stop(runtime->engine, caller);
    kv_team_stop(runtime->team);
}

void kv_runtime_free(kv_runtime_t *runtime)
{
    kv_engine_free(runtime->engine);
    kv_team_free(runtime->team);
    kv_free(runtime);
}
