/* Pinned memory of the host in blocks of powers of two: to pin memory takes longer than to copy it,
 * so blocks that nobody uses are kept for the next one.
 */
#include "comm/device.h"

#include "base/memory.h"
#include "base/thread.h"

enum {
    FIRST_ORDER = 12, /* blocks of 4 KiB and more */
    NUM_ORDERS = 64 - FIRST_ORDER,
};

/* So much is kept although nobody uses it. */
#define MOST_KEPT (INT64_C(256) << 20)

typedef struct pinned {
    kv_buffer_t base;
    int device, order;
    struct pinned *next; /* among those that are free */
} pinned_t;

static struct {
    kv_mutex_t lock;
    pinned_t *kept[NUM_ORDERS];
    int64_t kept_bytes;
} blocks = {.lock = KV_MUTEX_INIT(KV_RANK_LEAF)};

static size_t pinned_bytes(int order)
{
    return (size_t)1 << (order + FIRST_ORDER);
}

static kv_status_t pin(int device, size_t bytes, void **data)
{
    const kv_device_api_t *api;
    char sentence[KV_DEVICE_SENTENCE];
    KV_TRY(kv_device_enter(&api));
    kv_status_t status =
        kv_device_check(api->host_alloc(device, (int64_t)bytes, data, sentence), sentence);
    kv_device_leave();
    return status;
}

static void free_pinned(pinned_t *pinned)
{
    const kv_device_api_t *api;
    char sentence[KV_DEVICE_SENTENCE];
    if (kv_device_enter(&api) == KV_OK) {
        (void)api->host_free(pinned->device, pinned->base.data, sentence); /* or lost with it */
        kv_device_leave();
    }
    kv_free(pinned);
}

static void release_pinned(kv_buffer_t *base)
{
    pinned_t *pinned = (pinned_t *)base;
    kv_count(KV_COUNT_BUFFERS, -1);
    kv_count(KV_COUNT_VALUE_BYTES, -(int64_t)base->bytes);
    int64_t bytes = (int64_t)pinned_bytes(pinned->order);
    kv_mutex_lock(&blocks.lock);
    bool keeps = blocks.kept_bytes + bytes <= MOST_KEPT;
    if (keeps) {
        blocks.kept_bytes += bytes;
        pinned->next = blocks.kept[pinned->order];
        blocks.kept[pinned->order] = pinned;
    }
    kv_mutex_unlock(&blocks.lock);
    if (!keeps)
        free_pinned(pinned);
}

kv_status_t kv_pinned_new(int device, size_t bytes, kv_buffer_t **out)
{
    int order = 0;
    while (order < NUM_ORDERS - 2 && pinned_bytes(order) < bytes)
        order++;
    kv_mutex_lock(&blocks.lock);
    pinned_t *pinned = blocks.kept[order];
    if (pinned != NULL) {
        blocks.kept[order] = pinned->next;
        blocks.kept_bytes -= (int64_t)pinned_bytes(order);
    }
    kv_mutex_unlock(&blocks.lock);
    if (pinned == NULL) {
        void *data;
        pinned = kv_alloc(sizeof *pinned);
        KV_TRY_ALLOC(pinned, "pinned memory");
        kv_status_t status = pin(device, pinned_bytes(order), &data);
        if (status != KV_OK) {
            kv_free(pinned);
            return status;
        }
        pinned->base.data = data;
        pinned->base.release = release_pinned;
        pinned->device = device;
        pinned->order = order;
    }
    atomic_init(&pinned->base.refs, 1);
    pinned->base.bytes = bytes;
    kv_count(KV_COUNT_BUFFERS, 1);
    kv_count(KV_COUNT_VALUE_BYTES, (int64_t)bytes);
    *out = &pinned->base;
    return KV_OK;
}

void kv_pinned_trim(void)
{
    for (int order = 0; order < NUM_ORDERS; order++) {
        kv_mutex_lock(&blocks.lock);
        pinned_t *pinned = blocks.kept[order], *next;
        blocks.kept[order] = NULL;
        for (pinned_t *each = pinned; each != NULL; each = each->next)
            blocks.kept_bytes -= (int64_t)pinned_bytes(order);
        kv_mutex_unlock(&blocks.lock);
        for (; pinned != NULL; pinned = next) {
            next = pinned->next;
            free_pinned(pinned);
        }
    }
}
