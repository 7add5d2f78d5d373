/* Allocation, live-object counters and fault points. */
#include "base/memory.h"
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
    ELEMENT_ALIGN = 64,
    HUGE_PAGE = 2 * 1024 * 1024,
    HUGE_FROM = 2 * HUGE_PAGE,
};

/* ------------------------------------------------------------------------------- counters */

/* Relaxed: a counter orders nothing. Who compares one with zero has joined or waited before. */
static _Atomic int64_t counters[KV_COUNTER_COUNT];

static const char *const counter_names[KV_COUNTER_COUNT] = {
#define ROW(id, name) [KV_COUNT_##id] = name,
    KV_COUNTER_LIST(ROW)
#undef ROW
};

void kv_count(kv_counter_t counter, int64_t difference)
{
    atomic_fetch_add_explicit(&counters[counter], difference, memory_order_relaxed);
}

int64_t kv_counter_value(kv_counter_t counter)
{
    return atomic_load_explicit(&counters[counter], memory_order_relaxed);
}

const char *kv_counter_name(kv_counter_t counter)
{
    return counter_names[counter];
}

/* ---------------------------------------------------------------------------- fault points */

static struct {
    const char *name;
    _Atomic int64_t nth;
    _Atomic int64_t passed;
} faults[KV_FAULT_COUNT] = {
#define ROW(id, name_) [KV_FAULT_##id] = {.name = name_},
    KV_FAULT_LIST(ROW)
#undef ROW
};

static _Atomic uint32_t armed; /* one bit a point */

int64_t kv_fault_set(const char *name, int64_t nth)
{
    for (int point = 0; point < KV_FAULT_COUNT; point++) {
        if (strcmp(faults[point].name, name) != 0)
            continue;
        atomic_fetch_and(&armed, ~(UINT32_C(1) << point));
        int64_t passed = atomic_exchange(&faults[point].passed, 0);
        atomic_store(&faults[point].nth, nth);
        if (nth > 0)
            atomic_fetch_or(&armed, UINT32_C(1) << point);
        return passed;
    }
    return -1;
}

bool kv_fault_hit(kv_fault_point_t point)
{
    /* Relaxed: a thread that sees the bit late only counts late. */
    uint32_t bits = atomic_load_explicit(&armed, memory_order_relaxed);
    if (KV_LIKELY((bits >> point & 1) == 0))
        return false;
    return atomic_fetch_add(&faults[point].passed, 1) + 1 == atomic_load(&faults[point].nth);
}

/* ------------------------------------------------------------------------------ allocation */

void *kv_alloc(size_t bytes)
{
    if (kv_fault_hit(KV_FAULT_ALLOC))
        return NULL;
    return malloc(bytes > 0 ? bytes : 1);
}

void *kv_calloc(size_t count, size_t bytes)
{
    if (kv_fault_hit(KV_FAULT_ALLOC))
        return NULL;
    return count > 0 && bytes > 0 ? calloc(count, bytes) : calloc(1, 1);
}

void *kv_alloc_elements(size_t bytes)
{
    if (kv_fault_hit(KV_FAULT_ALLOC))
        return NULL;
    bool huge = bytes >= HUGE_FROM;
    void *pointer;
    if (posix_memalign(&pointer, huge ? HUGE_PAGE : ELEMENT_ALIGN, bytes > 0 ? bytes : 1) != 0)
        return NULL;
#ifdef MADV_HUGEPAGE
    /* Advice only: where the kernel does not take it the memory is as good, only slower. */
    if (huge)
        (void)madvise(pointer, bytes, MADV_HUGEPAGE);
#endif
    return pointer;
}

void kv_free(void *pointer)
{
    free(pointer);
}
