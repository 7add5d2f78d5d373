/* Streams, events, the one executor, and copies. */
#include "emu.h"

#include <algorithm>
#include <cstring>
#include <memory>

namespace emu
{

void streams_reset(int devices)
{
    for (int i = 0; i < devices; i++)
        state.devices[i].legacy = add_stream(i, true);
}

size_t add_stream(int device, bool blocking)
{
    Stream stream = {};
    stream.device = device;
    stream.blocking = blocking;
    stream.rank = random64();
    state.streams.push_back(std::move(stream));
    return state.streams.size() - 1;
}

cudaError_t find_stream(cudaStream_t handle, size_t *out)
{
    if (state.devices.empty())
        return cudaErrorNoDevice;
    int device = this_thread().device;
    if (handle == nullptr || handle == cudaStreamLegacy) {
        *out = state.devices[device].legacy;
    } else if (handle == cudaStreamPerThread) {
        auto &own = this_thread().streams;
        if (own.count(device) == 0)
            own[device] = add_stream(device, true);
        *out = own[device];
    } else {
        auto found = state.handles.find((uintptr_t)handle);
        if (found == state.handles.end())
            return mistake(cudaErrorInvalidResourceHandle, "%p is no stream, or not any more",
                           (void *)handle);
        *out = found->second;
    }
    return state.devices[state.streams[*out].device].dead;
}

/* The default stream is behind all earlier work of the blocking streams of its device, and before
 * their later work. */
void enqueue(size_t number, std::function<void()> work, std::vector<Behind> behind,
             std::function<bool()> may_begin)
{
    Stream &stream = state.streams[number];
    size_t legacy = state.devices[stream.device].legacy;
    for (size_t i = 0; i < state.streams.size(); i++) {
        const Stream &other = state.streams[i];
        bool ordered = number == legacy ? other.blocking && other.device == stream.device
                                        : stream.blocking && i == legacy;
        if (i != number && ordered && other.done < other.issued)
            behind.push_back({i, other.issued});
    }
    stream.queue.push_back({std::move(work), std::move(behind), std::move(may_begin)});
    stream.issued++;
    state.asked = 0;
}

static bool may_begin(const Stream &stream)
{
    if (stream.queue.empty())
        return false;
    const Operation &next = stream.queue.front();
    for (const Behind &behind : next.behind)
        if (state.streams[behind.stream].done < behind.count)
            return false;
    return !next.may_begin || next.may_begin();
}

/* Runs one operation, of the stream with the highest rank, which now and then gets a new one: so a
 * stream may run far ahead of the others, or be left behind. False: nothing is queued. */
bool step()
{
    Stream *next = nullptr;
    for (Stream &stream : state.streams)
        if (may_begin(stream) && (next == nullptr || stream.rank > next->rank))
            next = &stream;
    if (next == nullptr)
        return false;
    if (random_below(4) == 0)
        next->rank = random64();
    Operation operation = std::move(next->queue.front());
    next->queue.pop_front();
    if (operation.work && state.devices[next->device].dead == cudaSuccess)
        operation.work();
    next->done++;
    return true;
}

void run_until_done(size_t stream, uint64_t count)
{
    while (state.streams[stream].done < count && step())
        ;
    if (state.streams[stream].done < count)
        mistake(cudaErrorUnknown, "a wait for a stream of device %d would never end",
                state.streams[stream].device);
    release_pools();
}

/* A device goes on while the host asks again and again: then ever more runs. */
void step_a_little()
{
    int doubled = std::clamp(state.asked++ - 16, 0, 16);
    for (uint64_t n = random_below(4) << doubled; n > 0 && step(); n--)
        ;
}

static cudaError_t find_event(cudaEvent_t handle, Event **out)
{
    auto found = state.events.find((uintptr_t)handle);
    if (found == state.events.end())
        return mistake(cudaErrorInvalidResourceHandle, "%p is no event, or not any more",
                       (void *)handle);
    *out = &found->second;
    return state.devices[found->second.device].dead;
}

static bool has_passed(const Event &event)
{
    return !event.recorded || state.streams[event.at.stream].done >= event.at.count;
}

/* -------------------------------------------------------------------------------------- copies */

static bool agrees(cudaMemcpyKind kind, bool to_device, bool from_device)
{
    switch (kind) {
    case cudaMemcpyHostToHost:
        return !to_device && !from_device;
    case cudaMemcpyHostToDevice:
        return to_device && !from_device;
    case cudaMemcpyDeviceToHost:
        return !to_device && from_device;
    case cudaMemcpyDeviceToDevice:
        return to_device && from_device;
    case cudaMemcpyDefault:
        return true;
    }
    return false;
}

static cudaError_t check_range(const char *caller, const char *what, const void *pointer,
                               size_t bytes, Place *out)
{
    *out = place(pointer, bytes);
    if (!out->whole)
        return mistake(cudaErrorInvalidValue, "%s of %zu bytes %s %s: not inside one block", caller,
                       bytes, what, describe(pointer).c_str());
    return out->where == ON_DEVICE ? state.devices[out->device].dead : cudaSuccess;
}

/* Puts memory's operation into the stream. Pageable memory: CUDA may do it at once or later. */
static void enqueue_memory(size_t stream, bool pageable, const char *caller, void *to,
                           const void *from, int value, size_t bytes)
{
    int device = state.streams[stream].device;
    auto move = [=] {
        std::string where;
        open_all();
        auto work = [=] {
            if (from != nullptr)
                memmove(to, from, bytes);
            else
                memset(to, value, bytes);
        };
        if (guarded(work, &where)) {
            state.copies++;
            return;
        }
        kill_device(device, mistake(cudaErrorIllegalAddress, "%s of %zu bytes touched %s", caller,
                                    bytes, where.c_str()));
    };
    enqueue(stream, move, {}, [] { return state.copies < state.copies_at_most; });
    if (pageable && random_below(2) == 0)
        run_until_done(stream, state.streams[stream].issued);
}

static cudaError_t copy(const char *caller, void *to, const void *from, size_t bytes,
                        cudaMemcpyKind kind, cudaStream_t handle, int to_device, int from_device)
{
    size_t stream;
    Place target, source;
    cudaError_t error = find_stream(handle, &stream);
    if (error != cudaSuccess || bytes == 0)
        return error;
    error = check_range(caller, "to", to, bytes, &target);
    if (error == cudaSuccess)
        error = check_range(caller, "from", from, bytes, &source);
    if (error != cudaSuccess)
        return error;
    if (!agrees(kind, target.where == ON_DEVICE, source.where == ON_DEVICE))
        return mistake(cudaErrorInvalidValue, "%s to %s from %s: the direction says otherwise",
                       caller, describe(to).c_str(), describe(from).c_str());
    if ((to_device >= 0 && target.device != to_device) ||
        (from_device >= 0 && source.device != from_device))
        return mistake(cudaErrorInvalidValue, "%s to device %d from device %d: to %s from %s",
                       caller, to_device, from_device, describe(to).c_str(),
                       describe(from).c_str());
    bool pageable = target.where == ON_PAGEABLE || source.where == ON_PAGEABLE;
    enqueue_memory(stream, pageable, caller, to, from, 0, bytes);
    return cudaSuccess;
}

/* ------------------------------------------------------------------- work of several streams */

/* The first stream does it, behind the others, which wait for it. */
static void enqueue_together(const char *caller, const std::vector<size_t> &streams,
                             const std::vector<int> &devices, std::function<int()> begin,
                             std::function<void()> run)
{
    std::vector<Behind> arrived;
    for (size_t stream : streams) {
        enqueue(stream, nullptr);
        arrived.push_back({stream, state.streams[stream].issued});
    }
    auto may_begin = [=] {
        bool live = true;
        for (int device : devices)
            live = live && state.devices[device].dead == cudaSuccess;
        int answer = begin();
        return answer < 0 || (answer > 0 && live);
    };
    auto work = [=] {
        std::string where;
        open_all();
        if (begin() > 0 && !guarded(run, &where))
            for (int device : devices)
                kill_device(device, mistake(cudaErrorIllegalAddress, "%s touched %s", caller,
                                            where.c_str()));
    };
    enqueue(streams[0], work, arrived, may_begin);
    Behind done = {streams[0], state.streams[streams[0]].issued};
    for (size_t i = 1; i < streams.size(); i++)
        enqueue(streams[i], nullptr, {done});
}

static cudaError_t check_array(const char *caller, const emu_array_t &array)
{
    Place found = place(array.pointer, array.bytes);
    if (!found.whole || found.where != ON_DEVICE || found.device != array.device)
        return mistake(cudaErrorInvalidValue, "%s of %zu bytes %s: not an array of device %d",
                       caller, array.bytes, describe(array.pointer).c_str(), array.device);
    return state.devices[array.device].dead;
}

/* As a library does that makes the device of the stream current. */
static cudaError_t find_stream_of(int device, cudaStream_t handle, size_t *out)
{
    int before = this_thread().device;
    this_thread().device = device;
    cudaError_t error = find_stream(handle, out);
    this_thread().device = before;
    if (error == cudaSuccess && state.streams[*out].device != device)
        return mistake(cudaErrorInvalidResourceHandle, "a stream of device %d is used for %d",
                       state.streams[*out].device, device);
    return error;
}

} // namespace emu

using namespace emu;

int emu_together(const char *caller, int num_streams, const int *devices, void *const *streams,
                 int num_arrays, const emu_array_t *arrays, int (*begin)(void *),
                 void (*run)(void *), void (*drop)(void *), void *context)
{
    return call("emu_together", ANYWHERE, [&] {
        std::vector<size_t> found((size_t)num_streams);
        for (int i = 0; i < num_streams; i++) {
            cudaError_t error = find_stream_of(devices[i], (cudaStream_t)streams[i], &found[i]);
            if (error != cudaSuccess)
                return error;
        }
        for (int i = 0; i < num_arrays; i++) {
            cudaError_t error = check_array(caller, arrays[i]);
            if (error != cudaSuccess)
                return error;
        }
        std::shared_ptr<void> held(context, drop);
        enqueue_together(
            caller, found, {devices, devices + num_streams}, [=] { return begin(held.get()); },
            [=] { run(held.get()); });
        return cudaSuccess;
    });
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream)
{
    return call(__func__, ANYWHERE,
                [&] { return copy("cudaMemcpyAsync", to, from, bytes, kind, stream, -1, -1); });
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device,
                                size_t bytes, cudaStream_t stream)
{
    return call(__func__, ANYWHERE, [&] {
        int devices = (int)state.devices.size();
        if (to_device < 0 || to_device >= devices || from_device < 0 || from_device >= devices)
            return cudaErrorInvalidDevice;
        return copy("cudaMemcpyPeerAsync", to, from, bytes, cudaMemcpyDeviceToDevice, stream,
                    to_device, from_device);
    });
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t handle)
{
    return call(__func__, ANYWHERE, [&] {
        size_t stream;
        Place target;
        cudaError_t error = find_stream(handle, &stream);
        if (error != cudaSuccess || bytes == 0)
            return error;
        error = check_range("cudaMemsetAsync", "of", to, bytes, &target);
        if (error != cudaSuccess)
            return error;
        if (target.where == ON_PAGEABLE)
            return mistake(cudaErrorInvalidValue, "cudaMemsetAsync of %s", describe(to).c_str());
        enqueue_memory(stream, false, "cudaMemsetAsync", to, nullptr, value, bytes);
        return cudaSuccess;
    });
}

/* ------------------------------------------------------------------------------------- streams */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags)
{
    return call(__func__, ON_CURRENT, [&] {
        if (flags > cudaStreamNonBlocking)
            return cudaErrorInvalidValue;
        size_t stream = add_stream(this_thread().device, flags == cudaStreamDefault);
        uintptr_t handle = new_handle();
        state.handles[handle] = stream;
        *out = (cudaStream_t)handle;
        return cudaSuccess;
    });
}

/* What is queued still runs. */
cudaError_t cudaStreamDestroy(cudaStream_t handle)
{
    return call(__func__, ANYWHERE, [&] {
        size_t stream;
        if ((uintptr_t)handle <= (uintptr_t)cudaStreamPerThread)
            return cudaErrorInvalidResourceHandle;
        cudaError_t error = find_stream(handle, &stream);
        if (error == cudaSuccess)
            state.handles.erase((uintptr_t)handle);
        return error;
    });
}

static cudaError_t synchronise(size_t stream, uint64_t count)
{
    run_until_done(stream, count);
    return state.devices[state.streams[stream].device].dead;
}

/* The default stream has no end of its own: an empty operation stands for what it waits for. */
static uint64_t end_of(size_t stream)
{
    if (stream == state.devices[state.streams[stream].device].legacy)
        enqueue(stream, nullptr);
    return state.streams[stream].issued;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle)
{
    return call(__func__, ANYWHERE, [&] {
        size_t stream;
        cudaError_t error = find_stream(handle, &stream);
        return error == cudaSuccess ? synchronise(stream, end_of(stream)) : error;
    });
}

cudaError_t cudaStreamQuery(cudaStream_t handle)
{
    return call(__func__, ANYWHERE, [&] {
        size_t stream;
        cudaError_t error = find_stream(handle, &stream);
        if (error != cudaSuccess)
            return error;
        uint64_t count = end_of(stream);
        step_a_little();
        error = state.devices[state.streams[stream].device].dead;
        if (error != cudaSuccess)
            return error;
        return state.streams[stream].done >= count ? cudaSuccess : cudaErrorNotReady;
    });
}

cudaError_t cudaDeviceSynchronize(void)
{
    return call(__func__, ON_CURRENT, [&] {
        int device = this_thread().device;
        for (size_t i = 0; i < state.streams.size(); i++)
            if (state.streams[i].device == device)
                run_until_done(i, state.streams[i].issued);
        return state.devices[device].dead;
    });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned flags)
{
    return call(__func__, ANYWHERE, [&] {
        size_t stream;
        Event *event;
        cudaError_t error = find_stream(handle, &stream);
        if (error == cudaSuccess)
            error = find_event(event_handle, &event);
        if (error != cudaSuccess)
            return error;
        if (flags != 0)
            return cudaErrorInvalidValue;
        if (!has_passed(*event))
            enqueue(stream, nullptr, {event->at});
        return cudaSuccess;
    });
}

/* -------------------------------------------------------------------------------------- events */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags)
{
    return call(__func__, ON_CURRENT, [&] {
        if (flags > (cudaEventBlockingSync | cudaEventDisableTiming))
            return cudaErrorInvalidValue;
        uintptr_t handle = new_handle();
        state.events[handle] = {this_thread().device, false, {}};
        *out = (cudaEvent_t)handle;
        return cudaSuccess;
    });
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle)
{
    return call(__func__, ANYWHERE, [&] {
        size_t stream;
        Event *event;
        cudaError_t error = find_event(handle, &event);
        if (error == cudaSuccess)
            error = find_stream(stream_handle, &stream);
        if (error != cudaSuccess)
            return error;
        int device = state.streams[stream].device;
        if (device != event->device)
            return mistake(cudaErrorInvalidResourceHandle,
                           "an event of device %d is recorded in a stream of device %d",
                           event->device, device);
        enqueue(stream, nullptr);
        event->recorded = true;
        event->at = {stream, state.streams[stream].issued};
        return cudaSuccess;
    });
}

cudaError_t cudaEventQuery(cudaEvent_t handle)
{
    return call(__func__, ANYWHERE, [&] {
        Event *event;
        cudaError_t error = find_event(handle, &event);
        if (error != cudaSuccess)
            return error;
        step_a_little();
        error = state.devices[event->device].dead;
        if (error != cudaSuccess)
            return error;
        return has_passed(*event) ? cudaSuccess : cudaErrorNotReady;
    });
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle)
{
    return call(__func__, ANYWHERE, [&] {
        Event *event;
        cudaError_t error = find_event(handle, &event);
        if (error != cudaSuccess || !event->recorded)
            return error;
        return synchronise(event->at.stream, event->at.count);
    });
}

cudaError_t cudaEventDestroy(cudaEvent_t handle)
{
    return call(__func__, ANYWHERE, [&] {
        Event *event;
        cudaError_t error = find_event(handle, &event);
        if (error == cudaSuccess)
            state.events.erase((uintptr_t)handle);
        return error;
    });
}
