/* Lanes, marks and buffers of devices. What a process keeps of them (own streams, events, what
 * waits for a mark) is in one table under one lock, which is held for moments only.
 */
#include "comm/device.h"

#include "base/memory.h"
#include "base/thread.h"
#include <inttypes.h>
#include <string.h>
#include <time.h>

enum {
    MAX_DEVICES = 64,
    SPIN_NS = 20 * 1000,           /* a wait that is over by then does not sleep */
    SLEEP_NS = 50 * 1000,          /* at first, then longer each time … */
    LONGEST_SLEEP_NS = 500 * 1000, /* … up to this */
    KEPT_LOOKS = 4,                /* marks that a look at what is kept finds not passed, at most */
};

#define SETTLE_NS (5 * INT64_C(1000000000))

struct kv_mark {
    _Atomic int64_t refs;
    int device;
    void *event;
    kv_mark_t *next; /* among those that are free */
};

typedef struct kept kept_t;
struct kept {
    kv_mark_t *mark;
    void (*drop)(void *what);
    void *what;
    kept_t *next;
};

typedef struct device_buffer {
    kv_buffer_t base;
    kv_place_t *place;
} device_buffer_t;

struct kv_place {
    _Atomic int64_t refs;
    int device;
    kv_mark_t *newest; /* lock of `devices` */
};

static struct {
    kv_mutex_t lock;
    void *streams[MAX_DEVICES]; /* own ones, NULL until needed */
    kv_mark_t *marks[MAX_DEVICES];
    kept_t *kept, *newest_kept; /* the oldest first */
    _Atomic int64_t num_kept;
    _Atomic uint64_t user; /* 1 + kv_fork_generation of the process that has had a lane, 0: none */
} devices = {.lock = KV_MUTEX_INIT(KV_RANK_LEAF)};

/* ------------------------------------------------------------------------- the current device */

static _Thread_local struct {
    int depth;
    int before; /* -1: unknown */
} current;

kv_status_t kv_device_enter(const kv_device_api_t **out)
{
    KV_TRY(kv_device_load(out));
    char sentence[KV_DEVICE_SENTENCE];
    if (current.depth++ == 0 && (*out)->current(&current.before, sentence) != KV_DEVICE_OK)
        current.before = -1;
    return KV_OK;
}

void kv_device_leave(void)
{
    const kv_device_api_t *api;
    char sentence[KV_DEVICE_SENTENCE];
    if (--current.depth == 0 && current.before >= 0 && kv_device_load(&api) == KV_OK)
        (void)api->make_current(current.before, sentence); /* a device that died stays so */
}

/* One call of the table. `api` and `sentence` are there for `call`. */
#define ONE_CALL(status, call)                                                                     \
    do {                                                                                           \
        const kv_device_api_t *api;                                                                \
        (status) = kv_device_enter(&api);                                                          \
        if ((status) == KV_OK) {                                                                   \
            char sentence[KV_DEVICE_SENTENCE];                                                     \
            (status) = kv_device_check((call), sentence);                                          \
            kv_device_leave();                                                                     \
        }                                                                                          \
    } while (0)

/* ----------------------------------------------------------------------------------- lanes */

kv_status_t kv_lane_own(int device, kv_lane_t *out)
{
    const kv_device_api_t *table;
    KV_TRY(kv_device_load(&table));
    int most = table->num_devices < MAX_DEVICES ? table->num_devices : MAX_DEVICES;
    if (device < 0 || device >= most)
        return kv_fail(KV_DEVICE,
                       "there is no CUDA device %d: this process sees %d, counted from 0", device,
                       most);
    kv_mutex_lock(&devices.lock);
    void *stream = devices.streams[device], *made = NULL;
    kv_mutex_unlock(&devices.lock);
    if (KV_UNLIKELY(stream == NULL)) {
        kv_status_t status;
        ONE_CALL(status, api->stream_new(device, &made, sentence));
        KV_TRY(status);
        kv_mutex_lock(&devices.lock);
        if (devices.streams[device] == NULL) {
            devices.streams[device] = made;
            made = NULL;
        }
        stream = devices.streams[device];
        kv_mutex_unlock(&devices.lock);
        if (made != NULL) /* another thread was faster */
            ONE_CALL(status, api->stream_free(device, made, sentence));
        atomic_store(&devices.user, kv_fork_generation() + 1);
    }
    *out = (kv_lane_t){.device = device, .stream = stream};
    return KV_OK;
}

bool kv_device_used(void)
{
    return atomic_load_explicit(&devices.user, memory_order_relaxed) != 0;
}

/* A forked child leaves to its parent what that has kept: no device works in it, and the lock may
 * have been held at the fork. */
static bool used_here(void)
{
    return atomic_load(&devices.user) == kv_fork_generation() + 1;
}

kv_status_t kv_lane_join(kv_lane_t from, kv_lane_t to)
{
    kv_mark_t *mark;
    if (kv_lane_same(from, to))
        return KV_OK;
    KV_TRY(kv_mark_new(from, &mark));
    kv_status_t status = kv_mark_before(mark, to);
    kv_mark_rele(mark);
    return status;
}

/* ----------------------------------------------------------------------------------- marks */

static kv_status_t take_mark(int device, kv_mark_t **out)
{
    if (device < 0 || device >= MAX_DEVICES)
        return kv_fail(KV_DEVICE, "there is no CUDA device %d", device);
    kv_mutex_lock(&devices.lock);
    kv_mark_t *mark = devices.marks[device];
    if (mark != NULL)
        devices.marks[device] = mark->next;
    kv_mutex_unlock(&devices.lock);
    if (mark == NULL) {
        kv_status_t status;
        void *event;
        mark = kv_alloc(sizeof *mark);
        KV_TRY_ALLOC(mark, "an event");
        ONE_CALL(status, api->event_new(device, &event, sentence));
        if (status != KV_OK) {
            kv_free(mark);
            return status;
        }
        mark->device = device;
        mark->event = event;
    }
    atomic_init(&mark->refs, 1);
    *out = mark;
    return KV_OK;
}

kv_status_t kv_mark_new(kv_lane_t lane, kv_mark_t **out)
{
    kv_mark_t *mark = NULL;
    kv_status_t status = KV_DEVICE;
    /* Once more, since nobody would know how far the work on the lane is. */
    for (int attempt = 0; attempt < 2 && status != KV_OK; attempt++) {
        status = take_mark(lane.device, &mark);
        if (status == KV_OK)
            ONE_CALL(status, api->event_record(lane.device, mark->event, lane.stream, sentence));
        if (status != KV_OK)
            kv_mark_rele(mark);
        else
            *out = mark;
        mark = NULL;
    }
    return status;
}

kv_mark_t *kv_mark_hold(kv_mark_t *mark)
{
    atomic_fetch_add(&mark->refs, 1);
    return mark;
}

void kv_mark_rele(kv_mark_t *mark)
{
    if (mark == NULL || atomic_fetch_sub(&mark->refs, 1) != 1)
        return;
    /* An event may be recorded anew while the work before it goes on. */
    kv_mutex_lock(&devices.lock);
    mark->next = devices.marks[mark->device];
    devices.marks[mark->device] = mark;
    kv_mutex_unlock(&devices.lock);
}

kv_status_t kv_mark_before(const kv_mark_t *mark, kv_lane_t lane)
{
    kv_status_t status;
    ONE_CALL(status, api->stream_wait(lane.device, lane.stream, mark->event, sentence));
    return status;
}

kv_status_t kv_mark_passed(const kv_mark_t *mark, bool *passed)
{
    kv_status_t status;
    ONE_CALL(status, api->event_done(mark->device, mark->event, passed, sentence));
    return status;
}

static kv_status_t look(const kv_mark_t *mark, kv_caller_t *caller, int64_t *next_poll,
                        int64_t deadline)
{
    int64_t now = kv_clock_ns();
    if (now >= deadline)
        return kv_fail(KV_TIMEOUT, "CUDA device %d has not come to the end of its work in time",
                       mark->device);
    if (caller == NULL || now < *next_poll)
        return KV_OK;
    *next_poll = now + KV_POLL_NS;
    return caller->poll(caller);
}

kv_status_t kv_mark_wait(const kv_mark_t *mark, kv_caller_t *caller)
{
    bool passed = false;
    KV_TRY(kv_mark_passed(mark, &passed));
    if (passed)
        return KV_OK;
    int64_t start = kv_clock_ns(), sleep_ns = SLEEP_NS, next_poll = start;
    int64_t deadline = caller != NULL ? kv_caller_deadline(caller) : start + KV_DEVICE_WAIT_NS;
    bool attached = caller != NULL && !caller->detached;
    kv_status_t status = KV_OK;
    while (status == KV_OK && !passed) {
        if (kv_clock_ns() - start > SPIN_NS) {
            if (caller != NULL)
                kv_caller_detach(caller);
            nanosleep(&(struct timespec){.tv_nsec = sleep_ns}, NULL);
            sleep_ns = sleep_ns * 2 < LONGEST_SLEEP_NS ? sleep_ns * 2 : LONGEST_SLEEP_NS;
            status = look(mark, caller, &next_poll, deadline);
        }
        if (status == KV_OK)
            status = kv_mark_passed(mark, &passed);
    }
    if (attached)
        kv_caller_attach(caller);
    return status;
}

void kv_mark_keep(kv_mark_t *mark, void (*drop)(void *what), void *what)
{
    kept_t *kept = kv_alloc(sizeof *kept);
    if (kept == NULL) {
        kv_status_t status = kv_mark_wait(mark, NULL);
        if (status != KV_TIMEOUT) /* else the device may still use it: it is lost */
            drop(what);
        return;
    }
    *kept = (kept_t){.mark = kv_mark_hold(mark), .drop = drop, .what = what};
    kv_mutex_lock(&devices.lock);
    if (devices.kept == NULL)
        devices.kept = kept;
    else
        devices.newest_kept->next = kept;
    devices.newest_kept = kept;
    atomic_fetch_add(&devices.num_kept, 1);
    kv_mutex_unlock(&devices.lock);
}

/* The list comes back in front, also to what others have added meanwhile. */
static void put_back(kept_t *first, kept_t *last)
{
    kv_mutex_lock(&devices.lock);
    last->next = devices.kept;
    if (devices.kept == NULL)
        devices.newest_kept = last;
    devices.kept = first;
    kv_mutex_unlock(&devices.lock);
}

void kv_device_reap(void)
{
    if (KV_LIKELY(atomic_load_explicit(&devices.num_kept, memory_order_relaxed) == 0) ||
        !used_here())
        return;
    kv_mutex_lock(&devices.lock);
    kept_t *first = devices.kept, *last = devices.newest_kept;
    devices.kept = NULL;
    kv_mutex_unlock(&devices.lock);
    /* What is far behind those that wait will wait too: nobody looks at all of a long list. */
    kept_t *ready = NULL, **at = &first, *before = NULL;
    for (int waiting = 0; *at != NULL && waiting < KEPT_LOOKS;) {
        kept_t *kept = *at;
        bool passed = false;
        /* Nothing runs on a device that is lost. */
        if (kv_mark_passed(kept->mark, &passed) == KV_OK && !passed) {
            waiting++;
            before = kept;
            at = &kept->next;
            continue;
        }
        *at = kept->next;
        if (kept == last)
            last = before;
        kept->next = ready;
        ready = kept;
    }
    if (first != NULL)
        put_back(first, last);
    for (kept_t *next; ready != NULL; ready = next) {
        next = ready->next;
        ready->drop(ready->what);
        kv_mark_rele(ready->mark);
        kv_free(ready);
        atomic_fetch_sub(&devices.num_kept, 1);
    }
}

/* --------------------------------------------------------------------------------- buffers */

kv_status_t kv_place_new(int device, kv_place_t **out)
{
    kv_place_t *place = kv_calloc(1, sizeof *place);
    KV_TRY_ALLOC(place, "a value in device memory");
    atomic_init(&place->refs, 1);
    place->device = device;
    *out = place;
    return KV_OK;
}

kv_place_t *kv_place_hold(kv_place_t *place)
{
    atomic_fetch_add(&place->refs, 1);
    return place;
}

void kv_place_rele(kv_place_t *place)
{
    if (place == NULL || atomic_fetch_sub(&place->refs, 1) != 1)
        return;
    kv_mark_rele(place->newest);
    kv_free(place);
}

int kv_place_device(const kv_place_t *place)
{
    return place->device;
}

static kv_mark_t *newest(kv_place_t *place)
{
    kv_mutex_lock(&devices.lock);
    kv_mark_t *mark = place->newest != NULL ? kv_mark_hold(place->newest) : NULL;
    kv_mutex_unlock(&devices.lock);
    return mark;
}

kv_status_t kv_place_begin(kv_place_t *place, kv_lane_t lane, kv_mark_t **after)
{
    kv_mark_t *mark = newest(place);
    kv_status_t status = mark != NULL ? kv_mark_before(mark, lane) : KV_OK;
    if (status == KV_OK)
        *after = mark;
    else
        kv_mark_rele(mark);
    return status;
}

kv_status_t kv_place_end(kv_place_t *place, kv_lane_t lane, kv_mark_t *mark, kv_mark_t *after)
{
    kv_status_t status = KV_OK;
    kv_mark_hold(mark);
    for (;;) {
        kv_mark_t *other = NULL;
        kv_mutex_lock(&devices.lock);
        if (place->newest == after)
            place->newest = mark;
        else
            other = kv_mark_hold(place->newest);
        kv_mutex_unlock(&devices.lock);
        kv_mark_rele(after);
        if (other == NULL) {
            kv_mark_rele(after); /* the place's */
            return status;
        }
        after = other;
        kv_mark_t *behind;
        status = kv_mark_before(other, lane);
        if (status == KV_OK)
            status = kv_mark_new(lane, &behind);
        if (status != KV_OK) { /* the device is lost, or as good as that */
            kv_mark_rele(after);
            kv_mark_rele(mark);
            return status;
        }
        kv_mark_rele(mark);
        mark = behind;
    }
}

void kv_lane_free(kv_lane_t lane, const kv_mark_t *mark, void *pointer)
{
    kv_status_t status = KV_DEVICE;
    for (int attempt = 0; attempt < 2 && status != KV_OK; attempt++) {
        status = mark != NULL ? kv_mark_before(mark, lane) : KV_OK;
        if (status == KV_OK)
            ONE_CALL(status, api->free(lane.device, lane.stream, pointer, sentence));
    }
}

static void release_on_device(kv_buffer_t *base)
{
    device_buffer_t *buffer = (device_buffer_t *)base;
    kv_lane_t lane;
    kv_mark_t *mark = newest(buffer->place);
    if (base->bytes > 0 && kv_lane_own(buffer->place->device, &lane) == KV_OK)
        kv_lane_free(lane, mark, base->data);
    kv_mark_rele(mark);
    kv_place_rele(buffer->place);
    kv_count(KV_COUNT_BUFFERS, -1);
    kv_count(KV_COUNT_VALUE_BYTES, -(int64_t)base->bytes);
    kv_free(buffer);
}

kv_status_t kv_device_buffer_new(kv_place_t *place, kv_lane_t lane, size_t bytes, kv_buffer_t **out)
{
    void *data = NULL;
    device_buffer_t *buffer = kv_alloc(sizeof *buffer);
    KV_TRY_ALLOC(buffer, "a buffer in device memory");
    if (bytes > 0) {
        kv_status_t status;
        ONE_CALL(status, api->alloc(lane.device, lane.stream, (int64_t)bytes, &data, sentence));
        if (status != KV_OK) {
            kv_free(buffer);
            return status;
        }
    }
    atomic_init(&buffer->base.refs, 1);
    buffer->base.data = data;
    buffer->base.bytes = bytes;
    buffer->base.release = release_on_device;
    buffer->place = kv_place_hold(place);
    kv_count(KV_COUNT_BUFFERS, 1);
    kv_count(KV_COUNT_VALUE_BYTES, (int64_t)bytes);
    *out = &buffer->base;
    return KV_OK;
}

kv_place_t *kv_buffer_place(const kv_buffer_t *buffer)
{
    return buffer->release == release_on_device ? ((const device_buffer_t *)buffer)->place : NULL;
}

void kv_buffer_drop(void *buffer)
{
    kv_buffer_rele(buffer);
}

void kv_device_settle(void)
{
    int64_t deadline = kv_clock_ns() + SETTLE_NS;
    if (!used_here())
        return;
    kv_device_reap();
    while (atomic_load(&devices.num_kept) > 0 && kv_clock_ns() < deadline) {
        nanosleep(&(struct timespec){.tv_nsec = LONGEST_SLEEP_NS}, NULL);
        kv_device_reap();
    }
    kv_pinned_trim();
}

kv_status_t kv_device_fetch(const kv_view_t *view, void *to, kv_caller_t *caller)
{
    size_t bytes = (size_t)view->count * kv_dtype_bytes((kv_dtype_t)view->dtype);
    kv_lane_t own, lane = {.device = view->device, .stream = view->stream};
    kv_buffer_t *pinned;
    kv_mark_t *mark = NULL;
    KV_TRY(kv_lane_own(lane.device, &own)); /* says so if there is no such device */
    if (view->strides != NULL)
        return kv_fail(KV_INVALID, "an array in device memory must be contiguous here: call its "
                                   ".contiguous() first");
    if (bytes == 0)
        return KV_OK;
    KV_TRY(kv_pinned_new(lane.device, bytes, &pinned));
    kv_status_t status;
    ONE_CALL(status, api->copy(lane.device, lane.stream, KV_DEVICE_TO_HOST, (int64_t)bytes,
                               view->data, pinned->data, sentence));
    if (status == KV_OK)
        status = kv_mark_new(lane, &mark);
    if (status == KV_OK)
        status = kv_mark_wait(mark, caller);
    if (status == KV_OK)
        memcpy(to, pinned->data, bytes);
    if (mark != NULL && status != KV_OK)
        kv_mark_keep(mark, kv_buffer_drop, pinned);
    else
        kv_buffer_rele(pinned);
    kv_mark_rele(mark);
    return status;
}
