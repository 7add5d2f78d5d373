/* Finds and opens libnccl, once; it is never closed: its threads may still run. */
#include "comm/nccl_load.h"

#include "base/config.h"
#include "base/thread.h"
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SONAME "libnccl.so.2"
#define INSTALL                                                                                    \
    "pip install nvidia-nccl-cu12 (nvidia-nccl-cu13 for CUDA 13), or name the file of an NCCL of " \
    "2.18 or newer in KVSTORE_NCCL"

_Static_assert(sizeof(kv_nccl_config_t) == 48, "as ncclConfig_t of 2.18");
_Static_assert(offsetof(kv_nccl_config_t, blocking) == 16, "as ncclConfig_t of 2.18");
_Static_assert(offsetof(kv_nccl_config_t, network) == 32, "as ncclConfig_t of 2.18");

static kv_mutex_t lock = KV_MUTEX_INIT(KV_RANK_LEAF);
static kv_nccl_library_t table;
static bool loaded;
static char file[PATH_MAX];
static int number;

static kv_status_t open_library(const char *folder, void **out)
{
    int how = RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE;
    const char *named = kv_config_text(KV_CONFIG_NCCL);
    if (strcmp(named, "auto") != 0) {
        *out = named[0] != '\0' ? dlopen(named, how) : NULL;
        const char *why = *out == NULL && named[0] != '\0' ? dlerror() : NULL;
        return *out != NULL ? KV_OK
                            : kv_fail(KV_NOT_BUILT,
                                      "KVSTORE_NCCL='%.150s' does not load (%.150s): name the file "
                                      "of an NCCL, or auto",
                                      named, why != NULL ? why : "it names no file");
    }
    char path[PATH_MAX];
    *out = dlopen(SONAME, how | RTLD_NOLOAD);
    if (*out == NULL && folder != NULL &&
        snprintf(path, sizeof path, "%s/" SONAME, folder) < (int)sizeof path)
        *out = dlopen(path, how);
    if (*out == NULL)
        *out = dlopen(SONAME, how);
    if (*out != NULL)
        return KV_OK;
    const char *why = dlerror();
    return kv_fail(KV_NOT_BUILT, "NCCL is not on this machine (%.200s): " INSTALL,
                   why != NULL ? why : SONAME " was not found");
}

static kv_status_t fill(void *library, kv_nccl_library_t *out)
{
    const char *missing = NULL;
#define FIND(name, arguments)                                                                      \
    do {                                                                                           \
        void *symbol = dlsym(library, #name);                                                      \
        memcpy(&out->name, &symbol, sizeof symbol);                                                \
        if (symbol == NULL)                                                                        \
            missing = #name;                                                                       \
    } while (0);
    KV_NCCL_CALLS(FIND)
    FIND(ncclGetErrorString, )
    FIND(ncclGetLastError, )
#undef FIND
    Dl_info where;
    void *address;
    memcpy(&address, &out->ncclGetVersion, sizeof address);
    bool known = address != NULL && dladdr(address, &where) != 0 && where.dli_fname != NULL;
    snprintf(file, sizeof file, "%s", known ? where.dli_fname : SONAME);
    if (missing != NULL)
        return kv_fail(KV_NOT_BUILT, "%.200s is no NCCL that can be used, it lacks %s: " INSTALL,
                       file, missing);
    if (out->ncclGetVersion(&number) != KV_NCCL_SUCCESS || number < KV_NCCL_OLDEST)
        return kv_fail(KV_NOT_BUILT, "%.200s is NCCL of version %d, older than 2.18: " INSTALL,
                       file, number);
    return KV_OK;
}

static kv_status_t load_locked(const char *folder)
{
    void *library = NULL;
    kv_nccl_library_t found;
    if (loaded)
        return KV_OK;
    KV_TRY(open_library(folder, &library));
    KV_TRY(fill(library, &found));
    table = found;
    loaded = true;
    return KV_OK;
}

static kv_status_t load(const char *folder)
{
    kv_mutex_lock(&lock);
    kv_status_t status = load_locked(folder);
    kv_mutex_unlock(&lock);
    return status;
}

kv_status_t kv_nccl_load(const char *folder, const char **out_file, int *out_version)
{
    KV_TRY(load(folder));
    *out_file = file;
    *out_version = number;
    return KV_OK;
}

kv_status_t kv_nccl_library(const kv_nccl_library_t **out)
{
    KV_TRY(load(NULL));
    *out = &table;
    return KV_OK;
}

int kv_nccl_dtype(kv_dtype_t dtype)
{
    static const int numbers[KV_DTYPE_COUNT] = {
        [KV_FLOAT64] = 8, [KV_FLOAT32] = 7, [KV_FLOAT16] = 6, [KV_BFLOAT16] = 9,
        [KV_INT8] = 0,    [KV_UINT8] = 1,   [KV_INT32] = 2,   [KV_INT64] = 4,
    };
    return numbers[dtype];
}
