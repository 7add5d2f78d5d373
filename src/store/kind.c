/* The kinds of stores and their names. */
#include "kv.h"

#include <string.h>
#include <strings.h>

typedef struct kind_row {
    const char *name;
    kv_kind_t kind;
} kind_row_t;

static const kind_row_t KINDS[] = {
    {"local", {KV_KIND_LOCAL, false, false}},
    {"local_update_cpu", {KV_KIND_LOCAL, false, false}},
    {"local_allreduce_cpu", {KV_KIND_LOCAL, false, false}},
    {"device", {KV_KIND_DEVICE, false, true}},
    {"local_allreduce_device", {KV_KIND_DEVICE, false, true}},
    {"nccl", {KV_KIND_NCCL, false, true}},
    {"dist", {KV_KIND_DIST, false, false}},
    {"dist_sync", {KV_KIND_DIST, false, false}},
    {"dist_async", {KV_KIND_DIST, true, false}},
    {"dist_device_sync", {KV_KIND_DIST, false, true}},
    {"dist_sync_device", {KV_KIND_DIST, false, true}},
    {"dist_device_async", {KV_KIND_DIST, true, true}},
    {"dist_async_device", {KV_KIND_DIST, true, true}},
};

enum { NUM_KINDS = sizeof KINDS / sizeof KINDS[0], MAX_NAME = 64 };

const char *kv_kind_name(int i)
{
    return i >= 0 && i < NUM_KINDS ? KINDS[i].name : NULL;
}

/* Levenshtein's distance, letter case aside; names longer than MAX_NAME are near to nothing. */
static int distance(const char *a, const char *b)
{
    int len_a = (int)strlen(a), len_b = (int)strlen(b), row[MAX_NAME + 1];
    if (len_a > MAX_NAME || len_b > MAX_NAME)
        return MAX_NAME;
    for (int j = 0; j <= len_b; j++)
        row[j] = j;
    for (int i = 1; i <= len_a; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= len_b; j++) {
            int best = diagonal + (strncasecmp(&a[i - 1], &b[j - 1], 1) != 0);
            diagonal = row[j];
            best = best < row[j] + 1 ? best : row[j] + 1;
            row[j] = best < row[j - 1] + 1 ? best : row[j - 1] + 1;
        }
    }
    return row[len_b];
}

kv_status_t kv_kind_parse(const char *name, kv_kind_t *out)
{
    int nearest = 0;
    for (int i = 0; i < NUM_KINDS; i++) {
        if (strcasecmp(name, KINDS[i].name) == 0) {
            *out = KINDS[i].kind;
            return KV_OK;
        }
        if (distance(name, KINDS[i].name) < distance(name, KINDS[nearest].name))
            nearest = i;
    }
    return kv_fail(KV_INVALID,
                   "there is no kind of store named '%.64s'; the nearest is '%s' (kinds: local, "
                   "device, nccl, dist_sync, dist_async and their aliases, or a class registered "
                   "with KVStoreBase.register)",
                   name, KINDS[nearest].name);
}
