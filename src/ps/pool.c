/* Memory for values on their way: a list of free buffers for each size.
 *
 * A buffer and its memory are one block, the buffer in the line before the first element. While it
 * lies here it is no live object: counters tell what is lent.
 */
#include "ps/pool.h"
#include "ps/wire.h"

enum {
    SMALLEST = 64,
    SIZES = 15, /* 64 bytes to a slice */
    FRONT = 64,
};
_Static_assert(SMALLEST << (SIZES - 1) == KV_WIRE_SLICE_BYTES, "the largest size is a slice");

typedef struct pooled {
    kv_buffer_t buffer; /* first, so that each is the other */
    kv_pool_t *pool;
    struct pooled *next; /* pool's lock: free buffers of the same size */
    int size;            /* SIZES: not kept */
} pooled_t;
_Static_assert(sizeof(pooled_t) <= FRONT, "a buffer fits before its elements");

struct kv_pool {
    kv_mutex_t mutex;
    pooled_t *free[SIZES]; /* mutex */
};

kv_status_t kv_pool_new(kv_pool_t **out)
{
    kv_pool_t *pool = kv_calloc(1, sizeof *pool);
    KV_TRY_ALLOC(pool, "a pool of buffers");
    kv_mutex_init(&pool->mutex, KV_RANK_LEAF);
    *out = pool;
    return KV_OK;
}

static void free_all(pooled_t *pooled)
{
    while (pooled != NULL) {
        pooled_t *next = pooled->next;
        kv_free(pooled);
        pooled = next;
    }
}

/* Gives every free buffer back to the system. Returns whether there was one. */
static bool trim(kv_pool_t *pool)
{
    bool some = false;
    for (int size = 0; size < SIZES; size++) {
        kv_mutex_lock(&pool->mutex);
        pooled_t *list = pool->free[size];
        pool->free[size] = NULL;
        kv_mutex_unlock(&pool->mutex);
        some = some || list != NULL;
        free_all(list);
    }
    return some;
}

static void give_back(kv_buffer_t *buffer)
{
    pooled_t *pooled = (pooled_t *)buffer;
    kv_pool_t *pool = pooled->pool;
    kv_count(KV_COUNT_BUFFERS, -1);
    kv_count(KV_COUNT_VALUE_BYTES, -(int64_t)buffer->bytes);
    if (pooled->size == SIZES) {
        kv_free(pooled);
        return;
    }
    kv_mutex_lock(&pool->mutex);
    pooled->next = pool->free[pooled->size];
    pool->free[pooled->size] = pooled;
    kv_mutex_unlock(&pool->mutex);
}

static pooled_t *allocate(kv_pool_t *pool, int size, size_t bytes)
{
    if (bytes > SIZE_MAX - FRONT)
        return NULL;
    pooled_t *pooled = kv_alloc_elements(FRONT + bytes);
    /* What is kept in other sizes may be what is missing. */
    if (pooled == NULL && trim(pool))
        pooled = kv_alloc_elements(FRONT + bytes);
    if (pooled != NULL)
        *pooled = (pooled_t){.pool = pool, .size = size};
    return pooled;
}

kv_status_t kv_pool_get(kv_pool_t *pool, size_t bytes, kv_buffer_t **out)
{
    int size = 0;
    while (size < SIZES && bytes > (size_t)SMALLEST << size)
        size++;
    pooled_t *pooled = NULL;
    if (size < SIZES) {
        kv_mutex_lock(&pool->mutex);
        pooled = pool->free[size];
        if (pooled != NULL)
            pool->free[size] = pooled->next;
        kv_mutex_unlock(&pool->mutex);
    }
    if (pooled == NULL)
        pooled = allocate(pool, size, size < SIZES ? (size_t)SMALLEST << size : bytes);
    if (pooled == NULL)
        return kv_fail(KV_NO_MEMORY, "no memory for a value of %zu bytes", bytes);
    atomic_init(&pooled->buffer.refs, 1);
    pooled->buffer.data = (char *)pooled + FRONT;
    pooled->buffer.bytes = bytes;
    pooled->buffer.release = give_back;
    kv_count(KV_COUNT_BUFFERS, 1);
    kv_count(KV_COUNT_VALUE_BYTES, (int64_t)bytes);
    *out = &pooled->buffer;
    return KV_OK;
}

void kv_pool_free(kv_pool_t *pool)
{
    if (pool == NULL)
        return;
    trim(pool);
    kv_mutex_fini(&pool->mutex);
    kv_free(pool);
}
