/* Finds and opens the plug-in. All that is kept is written once, under the lock, before `state`
 * tells of it.
 *
 * A child forked from a process that has begun with this gets an error without the lock, which may
 * have been held at the fork: CUDA does not survive one. */
#include "kernels/device_load.h"

#include "base/config.h"
#include "base/thread.h"
#include <dlfcn.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ANEW                                                                                       \
    "install kvstore again with the CUDA toolkit on the machine and KVSTORE_CUDA=on in the "       \
    "environment"

enum { UNTRIED, LOADED, FAILED };

static kv_mutex_t lock = KV_MUTEX_INIT(KV_RANK_LEAF);
static atomic_int state;
static _Atomic uint64_t opener; /* 1 + the fork generation of the process that has begun, 0: none */
static kv_device_api_t table;
static kv_sentence_t failure;
static char file[PATH_MAX];

static kv_status_t find_file(void)
{
    const char *named = kv_config_text(KV_CONFIG_CUDA_PLUGIN);
    if (strcmp(named, "auto") != 0) {
        if (realpath(named, file) == NULL)
            return kv_fail(KV_NOT_BUILT,
                           "KVSTORE_CUDA_PLUGIN='%.300s' is not there: name the file of a plug-in, "
                           "or auto",
                           named);
        return KV_OK;
    }
    Dl_info core;
    char beside[PATH_MAX];
    kv_status_t (*here)(const kv_device_api_t **) = kv_device_load;
    void *address;
    memcpy(&address, &here, sizeof address);
    const char *path = dladdr(address, &core) != 0 && core.dli_fname != NULL ? core.dli_fname : "";
    const char *slash = strrchr(path, '/');
    int folder = slash != NULL ? (int)(slash - path) + 1 : 0;
    int length = snprintf(beside, sizeof beside, "%.*s" KV_DEVICE_PLUGIN, folder, path);
    if (length >= (int)sizeof beside || realpath(beside, file) == NULL)
        return kv_fail(KV_NOT_BUILT,
                       "this installation has no CUDA plug-in (%.200s is not there): " ANEW
                       "; `python -m kvstore` tells why it was not built",
                       beside);
    return KV_OK;
}

static kv_status_t open_file(void)
{
    void *library = dlopen(file, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library == NULL) {
        const char *why = dlerror();
        return kv_fail(KV_NOT_BUILT, "the CUDA plug-in does not load (%.300s): " ANEW,
                       why != NULL ? why : file);
    }
    kv_device_open_t *entry;
    void *symbol = dlsym(library, KV_DEVICE_ENTRY);
    memcpy(&entry, &symbol, sizeof entry);
    if (symbol == NULL)
        return kv_fail(KV_NOT_BUILT, "%.300s is no plug-in for kvstore: it has no " KV_DEVICE_ENTRY,
                       file);
    char sentence[KV_DEVICE_SENTENCE] = "no reason given";
    kv_device_code_t code = entry(KV_DEVICE_ABI, sizeof table, &table, sentence);
    if (code == KV_DEVICE_REFUSED)
        return kv_fail(KV_NOT_BUILT, "the CUDA plug-in %.150s cannot be used (%.200s): " ANEW, file,
                       sentence);
    KV_TRY(kv_device_check(code, sentence));
    if (table.abi != KV_DEVICE_ABI || table.bytes != sizeof table || table.num_devices < 1)
        return kv_fail(KV_NOT_BUILT,
                       "the CUDA plug-in %.150s gave no table of version %d with a device: " ANEW,
                       file, (int)KV_DEVICE_ABI);
    return KV_OK;
}

static void load_locked(void)
{
    if (atomic_load(&state) != UNTRIED)
        return;
    kv_status_t status = find_file();
    if (status == KV_OK)
        status = open_file();
    if (status != KV_OK)
        kv_sentence_save(&failure);
    atomic_store(&state, status == KV_OK ? LOADED : FAILED);
}

kv_status_t kv_device_load(const kv_device_api_t **out)
{
    uint64_t own = kv_fork_generation() + 1;
    uint64_t before = 0;
    bool is_first = atomic_compare_exchange_strong(&opener, &before, own);
    if (KV_LIKELY(before == own && atomic_load(&state) == LOADED)) {
        *out = &table;
        return KV_OK;
    }
    if (is_first || before == own) {
        kv_mutex_lock(&lock);
        load_locked();
        kv_mutex_unlock(&lock);
    } else if (atomic_load(&state) != FAILED) {
        return kv_fail(KV_DEVICE, "CUDA does not work in a process forked from one that has used "
                                  "it: start that process anew (spawn)");
    }
    if (atomic_load(&state) == FAILED) {
        kv_sentence_restore(&failure);
        return failure.code;
    }
    *out = &table;
    return KV_OK;
}

const char *kv_device_file(void)
{
    return file;
}

kv_status_t kv_device_check(kv_device_code_t code, const char *sentence)
{
    return code == KV_DEVICE_OK ? KV_OK : kv_fail(KV_DEVICE, "%s", sentence);
}
