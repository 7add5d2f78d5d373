/* Memory for values on their way: for each size a list of free buffers, cut from slabs.
 *
 * Slabs of large buffers are huge pages: a process that reads another's memory pays for each page,
 * and with small ones more than for the copying. While a buffer lies here it is no live object:
 * counters tell what is lent.
 */
#include "ps/pool.h"
#include "ps/wire.h"

enum {
    SMALLEST = 64,
    SIZES = 15, /* 64 bytes to a slice */
    SMALL_SLAB = 64 << 10,
    LARGE_SLAB = 4 << 20,
    HALF_PAGE = 2048,
};
_Static_assert(SMALLEST << (SIZES - 1) == KV_WIRE_SLICE_BYTES, "the largest size is a slice");

typedef struct slab slab_t;

typedef struct pooled {
    kv_buffer_t buffer; /* first, so that each is the other */
    slab_t *slab;
    struct pooled *next; /* pool's lock: free buffers of the same size */
    bool is_free;        /* pool's lock */
} pooled_t;

struct slab {
    kv_pool_t *pool;
    slab_t *next; /* pool's lock: all slabs of the size */
    int size;     /* SIZES: one buffer, not kept */
    char *memory;
    int32_t num_parts, num_free; /* pool's lock: the second */
    pooled_t parts[];
};

struct kv_pool {
    kv_mutex_t mutex;
    slab_t *slabs[SIZES];  /* mutex */
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

static void slab_free(slab_t *slab)
{
    kv_free(slab->memory);
    kv_free(slab);
}

/* Gives slabs that are all free back to the system. Returns whether there was one. */
static bool trim(kv_pool_t *pool)
{
    slab_t *given = NULL;
    kv_mutex_lock(&pool->mutex);
    for (int size = 0; size < SIZES; size++) {
        pool->free[size] = NULL;
        for (slab_t **link = &pool->slabs[size]; *link != NULL;) {
            slab_t *slab = *link;
            if (slab->num_free == slab->num_parts) {
                *link = slab->next;
                slab->next = given;
                given = slab;
                continue;
            }
            for (int32_t i = 0; i < slab->num_parts; i++) {
                if (!slab->parts[i].is_free)
                    continue;
                slab->parts[i].next = pool->free[size];
                pool->free[size] = &slab->parts[i];
            }
            link = &slab->next;
        }
    }
    kv_mutex_unlock(&pool->mutex);
    bool some = given != NULL;
    while (given != NULL) {
        slab_t *next = given->next;
        slab_free(given);
        given = next;
    }
    return some;
}

static void give_back(kv_buffer_t *buffer)
{
    pooled_t *pooled = (pooled_t *)buffer;
    slab_t *slab = pooled->slab;
    kv_count(KV_COUNT_BUFFERS, -1);
    kv_count(KV_COUNT_VALUE_BYTES, -(int64_t)buffer->bytes);
    if (slab->size == SIZES) {
        slab_free(slab);
        return;
    }
    kv_pool_t *pool = slab->pool;
    kv_mutex_lock(&pool->mutex);
    pooled->is_free = true;
    pooled->next = pool->free[slab->size];
    pool->free[slab->size] = pooled;
    slab->num_free++;
    kv_mutex_unlock(&pool->mutex);
}

static slab_t *slab_try(size_t memory_bytes, int32_t num_parts)
{
    slab_t *slab = kv_alloc(sizeof *slab + (size_t)num_parts * sizeof(pooled_t));
    char *memory = slab != NULL ? kv_alloc_elements(memory_bytes) : NULL;
    if (memory == NULL) {
        kv_free(slab);
        return NULL;
    }
    *slab = (slab_t){.memory = memory, .num_parts = num_parts};
    return slab;
}

/* All parts free, and in no list. */
static slab_t *slab_new(kv_pool_t *pool, int size, size_t bytes)
{
    int32_t num_parts = 1;
    if (size < SIZES) {
        bytes = (size_t)SMALLEST << size;
        num_parts = (int32_t)((bytes < SMALL_SLAB ? SMALL_SLAB : LARGE_SLAB) / bytes);
    }
    size_t begin = bytes < SMALL_SLAB || bytes > SIZE_MAX - HALF_PAGE ? 0 : HALF_PAGE;
    size_t memory_bytes = begin + bytes * (size_t)num_parts;
    slab_t *slab = slab_try(memory_bytes, num_parts);
    /* What is kept in other sizes may be what is missing. */
    if (slab == NULL && trim(pool))
        slab = slab_try(memory_bytes, num_parts);
    if (slab == NULL)
        return NULL;
    slab->pool = pool;
    slab->size = size;
    slab->num_free = num_parts;
    for (int32_t i = 0; i < num_parts; i++)
        slab->parts[i] = (pooled_t){
            .buffer = {.data = slab->memory + begin + (size_t)i * bytes, .release = give_back},
            .slab = slab,
            .is_free = true};
    return slab;
}

static void enter_locked(kv_pool_t *pool, slab_t *slab) KV_REQUIRES(pool->mutex)
{
    slab->next = pool->slabs[slab->size];
    pool->slabs[slab->size] = slab;
    for (int32_t i = slab->num_parts - 1; i >= 0; i--) {
        slab->parts[i].next = pool->free[slab->size];
        pool->free[slab->size] = &slab->parts[i];
    }
}

static pooled_t *take_locked(kv_pool_t *pool, int size) KV_REQUIRES(pool->mutex)
{
    pooled_t *pooled = pool->free[size];
    if (pooled != NULL) {
        pool->free[size] = pooled->next;
        pooled->is_free = false;
        pooled->slab->num_free--;
    }
    return pooled;
}

static pooled_t *take(kv_pool_t *pool, int size, size_t bytes)
{
    pooled_t *pooled = NULL;
    if (size < SIZES) {
        kv_mutex_lock(&pool->mutex);
        pooled = take_locked(pool, size);
        kv_mutex_unlock(&pool->mutex);
        if (pooled != NULL)
            return pooled;
    }
    slab_t *slab = slab_new(pool, size, bytes);
    if (slab == NULL || size == SIZES)
        return slab != NULL ? &slab->parts[0] : NULL;
    kv_mutex_lock(&pool->mutex);
    enter_locked(pool, slab);
    pooled = take_locked(pool, size);
    kv_mutex_unlock(&pool->mutex);
    return pooled;
}

kv_status_t kv_pool_get(kv_pool_t *pool, size_t bytes, kv_buffer_t **out)
{
    int size = 0;
    while (size < SIZES && bytes > (size_t)SMALLEST << size)
        size++;
    pooled_t *pooled = take(pool, size, bytes);
    if (pooled == NULL)
        return kv_fail(KV_NO_MEMORY, "no memory for a value of %zu bytes", bytes);
    atomic_init(&pooled->buffer.refs, 1);
    pooled->buffer.bytes = bytes;
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
