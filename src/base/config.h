/* The settings that a user can give by environment: one table, shown by `python -m kvstore`.
 *
 * Read once, when the first object that needs a setting is made. A value that does not parse is an
 * error there, never a silent default.
 */
#ifndef KV_BASE_CONFIG_H
#define KV_BASE_CONFIG_H

#include "base/status.h"
#include <stdint.h>

/* X(id, variable, default, help) */
#define KV_CONFIG_LIST(X)                                                                          \
    X(ENGINE, "KVSTORE_ENGINE", "threaded",                                                        \
      "who runs queued operations: threaded, or for tests naive (at once) and stepping (in an "    \
      "order chosen by KVSTORE_ENGINE_SEED)")                                                      \
    X(ENGINE_SEED, "KVSTORE_ENGINE_SEED", "1", "seed of the stepping engine, a whole number")      \
    X(NUM_THREADS, "KVSTORE_NUM_THREADS", "0",                                                     \
      "threads of the kernels, for stores made without num_threads=; 0: as many as the process "   \
      "has processors")                                                                            \
    X(ISA, "KVSTORE_ISA", "auto",                                                                  \
      "instruction set of the kernels: auto, or baseline, avx2, avx512 where the processor has "   \
      "them; results do not depend on it")                                                         \
    X(CUDA_PLUGIN, "KVSTORE_CUDA_PLUGIN", "auto",                                                  \
      "file of the CUDA plug-in; auto: the one that stands beside the core, where the "            \
      "installation has built it")                                                                 \
    X(NCCL, "KVSTORE_NCCL", "auto",                                                                \
      "file of NCCL's library; auto: one that the process has loaded, else that of the package "   \
      "nvidia-nccl-cu12 or nvidia-nccl-cu13, else the system's libnccl.so.2")

typedef enum kv_config {
#define KV_CONFIG_ENUM(id, variable, fallback, help) KV_CONFIG_##id,
    KV_CONFIG_LIST(KV_CONFIG_ENUM)
#undef KV_CONFIG_ENUM
        KV_CONFIG_COUNT
} kv_config_t;

typedef struct kv_config_row {
    const char *variable;
    const char *fallback;
    const char *help;
} kv_config_row_t;

const kv_config_row_t *kv_config_row(kv_config_t setting);

/* The text in force: the environment's, or the default. Valid until the environment changes. */
const char *kv_config_text(kv_config_t setting);

/* The setting as a whole number within [low, high]; KV_INVALID names variable, text and limits. */
KV_MUST_CHECK kv_status_t kv_config_int(kv_config_t setting, int64_t low, int64_t high,
                                        int64_t *out);

#endif
