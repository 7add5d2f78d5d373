/* Allocating and freeing, of devices, pools and pinned memory. */
#include "emu.h"

#include <algorithm>
#include <cstring>
#include <sys/mman.h>

namespace emu
{

enum { GRAIN = 256, BEHIND = 256, SPOILT = 0xff, UNTOUCHED = 0xa5 };

void memory_reset(int devices, size_t bytes)
{
    handle_faults();
    for (Device &device : state.devices)
        for (Arena &arena : device.arenas)
            munmap(arena.base, arena.room);
    for (auto &[address, block] : pinned)
        if (!block.registered)
            munmap(address, round_up(block.bytes, page()));
    pinned.clear();
    state.devices.assign((size_t)devices, Device{});
    for (int i = 0; i < devices; i++) {
        for (Arena &arena : state.devices[i].arenas) {
            /* Twice what the device has, for the bytes behind blocks and for holes. */
            arena.room = round_up(2 * bytes + (16 << 20), page());
            arena.base = (char *)mmap(nullptr, arena.room, PROT_NONE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            arena.seen_by = 1u << i;
        }
    }
}

static size_t in_use(const Device &device)
{
    return device.arenas[PLAIN].used + device.arenas[POOL].reserved;
}

void release_pools()
{
    for (Device &device : state.devices) {
        Arena &pool = device.arenas[POOL];
        pool.reserved = std::max(pool.used, (size_t)std::min<uint64_t>(pool.reserved, pool.keep));
    }
}

/* The first hole that is large enough, so that freed memory is soon another's. */
static char *find_hole(const Arena &arena, size_t room)
{
    char *at = arena.base;
    for (const auto &[address, block] : arena.blocks) {
        if ((size_t)(address - at) >= room)
            return at;
        at = address + block.room;
    }
    return (size_t)(arena.base + arena.room - at) >= room ? at : nullptr;
}

static void spoil(char *address, const Block &block)
{
    open_all();
    memset(address, SPOILT, block.bytes);
    memset(address + block.bytes, UNTOUCHED, block.room - block.bytes);
}

static cudaError_t allocate(int device, int which, size_t bytes, char **out)
{
    Device &owner = state.devices[device];
    Arena &arena = owner.arenas[which];
    if (bytes > state.bytes)
        return cudaErrorMemoryAllocation;
    size_t charged = round_up(bytes, GRAIN), more = charged;
    if (which == POOL)
        more = arena.used + charged > arena.reserved ? arena.used + charged - arena.reserved : 0;
    char *address = find_hole(arena, charged + BEHIND);
    if (in_use(owner) + more > state.bytes || address == nullptr)
        return cudaErrorMemoryAllocation;
    if (which == POOL)
        arena.reserved += more;
    arena.used += charged;
    Block block = {bytes, charged + BEHIND, false};
    arena.blocks[address] = block;
    open_all();
    spoil(address, block);
    *out = address;
    return cudaSuccess;
}

static bool block_is_whole(char *address, const Block &block)
{
    for (size_t i = block.bytes; i < block.room; i++)
        if (address[i] != (char)UNTOUCHED)
            return false;
    return true;
}

bool behind_blocks_changed(const char *by)
{
    for (Device &device : state.devices) {
        for (Arena &arena : device.arenas) {
            if (arena.open == 0)
                continue;
            for (auto &[address, block] : arena.blocks) {
                if (block_is_whole(address, block))
                    continue;
                mistake(cudaSuccess, "%s wrote behind a block: %s", by, describe(address).c_str());
                memset(address + block.bytes, UNTOUCHED, block.room - block.bytes);
                return true;
            }
        }
    }
    return false;
}

void spoil_device(int device)
{
    open_all();
    for (Arena &arena : state.devices[device].arenas)
        for (auto &[address, block] : arena.blocks)
            spoil(address, block);
}

static void release(Arena &arena, char *address)
{
    auto block = arena.blocks.find(address);
    open_all();
    memset(address, SPOILT, block->second.room);
    arena.used -= block->second.room - BEHIND;
    arena.blocks.erase(block);
}

/* The block that begins there and is nobody's freed one. */
static cudaError_t find_block(const char *caller, void *pointer, Arena **arena, int *device)
{
    char *address = (char *)pointer;
    *arena = arena_of(address, device);
    if (*arena != nullptr) {
        auto block = (*arena)->blocks.find(address);
        if (block != (*arena)->blocks.end() && !block->second.freed)
            return state.devices[*device].dead;
    }
    return mistake(cudaErrorInvalidValue, "%s of %s", caller, describe(pointer).c_str());
}

static cudaError_t allocate_in_order(void **out, size_t bytes, int device, size_t stream)
{
    *out = nullptr;
    if (bytes == 0)
        return cudaSuccess;
    char *address = nullptr;
    if (allocation_fails())
        return cudaErrorMemoryAllocation;
    cudaError_t error = allocate(device, POOL, bytes, &address);
    if (error != cudaSuccess) { /* the driver waits for memory that is being freed */
        while (step())
            ;
        error = allocate(device, POOL, bytes, &address);
    }
    if (error != cudaSuccess)
        return error;
    enqueue(stream, [device, address] {
        auto block = state.devices[device].arenas[POOL].blocks.find(address);
        if (block != state.devices[device].arenas[POOL].blocks.end())
            spoil(address, block->second);
    });
    *out = address;
    return cudaSuccess;
}

static cudaError_t find_pool(cudaMemPool_t pool, int *device)
{
    *device = (int)(uintptr_t)pool - 1;
    return *device >= 0 && *device < (int)state.devices.size() ? state.devices[*device].dead
                                                               : cudaErrorInvalidValue;
}

} // namespace emu

using namespace emu;

cudaError_t cudaMemGetInfo(size_t *free, size_t *total)
{
    return call(__func__, ON_CURRENT, [&] {
        *total = state.bytes;
        *free = state.bytes - in_use(state.devices[this_thread().device]);
        return cudaSuccess;
    });
}

cudaError_t cudaMalloc(void **out, size_t bytes)
{
    return call(__func__, ON_CURRENT, [&] {
        *out = nullptr;
        if (bytes == 0)
            return cudaSuccess;
        if (allocation_fails())
            return cudaErrorMemoryAllocation;
        return allocate(this_thread().device, PLAIN, bytes, (char **)out);
    });
}

cudaError_t cudaFree(void *pointer)
{
    return call(__func__, ANYWHERE, [&] {
        Arena *arena;
        int device;
        if (pointer == nullptr)
            return cudaSuccess;
        cudaError_t error = find_block("cudaFree", pointer, &arena, &device);
        if (error == cudaSuccess)
            release(*arena, (char *)pointer);
        return error;
    });
}

cudaError_t cudaMallocAsync(void **out, size_t bytes, cudaStream_t handle)
{
    return call(__func__, ANYWHERE, [&] {
        size_t stream;
        cudaError_t error = find_stream(handle, &stream);
        if (error != cudaSuccess)
            return error;
        return allocate_in_order(out, bytes, state.streams[stream].device, stream);
    });
}

cudaError_t cudaMallocFromPoolAsync(void **out, size_t bytes, cudaMemPool_t pool,
                                    cudaStream_t handle)
{
    return call(__func__, ANYWHERE, [&] {
        size_t stream;
        int device;
        cudaError_t error = find_pool(pool, &device);
        if (error == cudaSuccess)
            error = find_stream(handle, &stream);
        return error == cudaSuccess ? allocate_in_order(out, bytes, device, stream) : error;
    });
}

cudaError_t cudaFreeAsync(void *pointer, cudaStream_t handle)
{
    return call(__func__, ANYWHERE, [&] {
        size_t stream;
        Arena *arena;
        int device;
        cudaError_t error = find_stream(handle, &stream);
        if (error != cudaSuccess || pointer == nullptr)
            return error;
        error = find_block("cudaFreeAsync", pointer, &arena, &device);
        if (error != cudaSuccess)
            return error;
        arena->blocks[(char *)pointer].freed = true;
        enqueue(stream, [arena, pointer] { release(*arena, (char *)pointer); });
        return cudaSuccess;
    });
}

/* --------------------------------------------------------------------------------------- pools */

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *out, int device)
{
    return call(__func__, ANYWHERE, [&] {
        if (device < 0 || device >= (int)state.devices.size())
            return cudaErrorInvalidDevice;
        *out = (cudaMemPool_t)(uintptr_t)(device + 1);
        return cudaSuccess;
    });
}

cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t keep)
{
    return call(__func__, ANYWHERE, [&] {
        int device;
        cudaError_t error = find_pool(pool, &device);
        if (error != cudaSuccess)
            return error;
        Arena &arena = state.devices[device].arenas[POOL];
        arena.reserved = std::max(arena.used, std::min(arena.reserved, keep));
        return cudaSuccess;
    });
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr which, void *value)
{
    return call(__func__, ANYWHERE, [&] {
        int device;
        cudaError_t error = find_pool(pool, &device);
        if (error != cudaSuccess)
            return error;
        if (which != cudaMemPoolAttrReleaseThreshold)
            return cudaErrorInvalidValue;
        memcpy(&state.devices[device].arenas[POOL].keep, value, sizeof(uint64_t));
        return cudaSuccess;
    });
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, cudaMemPoolAttr which, void *value)
{
    return call(__func__, ANYWHERE, [&] {
        int device;
        cudaError_t error = find_pool(pool, &device);
        if (error != cudaSuccess)
            return error;
        const Arena &arena = state.devices[device].arenas[POOL];
        uint64_t number = which == cudaMemPoolAttrReleaseThreshold     ? arena.keep
                          : which == cudaMemPoolAttrReservedMemCurrent ? arena.reserved
                                                                       : arena.used;
        memcpy(value, &number, sizeof number);
        return cudaSuccess;
    });
}

cudaError_t cudaMemPoolSetAccess(cudaMemPool_t pool, const cudaMemAccessDesc *list, size_t count)
{
    return call(__func__, ANYWHERE, [&] {
        int device;
        cudaError_t error = find_pool(pool, &device);
        for (size_t i = 0; i < count && error == cudaSuccess; i++) {
            int peer = list[i].location.id;
            if (peer < 0 || peer >= (int)state.devices.size())
                return cudaErrorInvalidDevice;
            bool given = list[i].flags == cudaMemAccessFlagsProtReadWrite;
            if (peer == device ? !given : !state.peer)
                return cudaErrorInvalidValue;
            uint32_t &seen_by = state.devices[device].arenas[POOL].seen_by;
            seen_by = (seen_by & ~(1u << peer)) | (uint32_t)given << peer;
        }
        return error;
    });
}

/* ------------------------------------------------------------------------------- pinned memory */

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned)
{
    return call(__func__, ON_CURRENT, [&] {
        *out = nullptr;
        if (bytes == 0)
            return cudaSuccess;
        if (allocation_fails())
            return cudaErrorMemoryAllocation;
        void *address = mmap(nullptr, round_up(bytes, page()), PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (address == MAP_FAILED)
            return cudaErrorMemoryAllocation;
        memset(address, SPOILT, bytes);
        pinned[(char *)address] = {bytes, false, false};
        *out = address;
        return cudaSuccess;
    });
}

cudaError_t cudaFreeHost(void *pointer)
{
    return call(__func__, ANYWHERE, [&] {
        if (pointer == nullptr)
            return cudaSuccess;
        auto block = pinned.find((char *)pointer);
        if (block == pinned.end() || block->second.registered || block->second.freed)
            return mistake(cudaErrorInvalidValue, "cudaFreeHost of %s", describe(pointer).c_str());
        block->second.freed = true;
        mprotect(pointer, round_up(block->second.bytes, page()), PROT_NONE);
        return cudaSuccess;
    });
}

cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned)
{
    return call(__func__, ON_CURRENT, [&] {
        if (pointer == nullptr || bytes == 0)
            return cudaErrorInvalidValue;
        auto next = pinned.lower_bound((char *)pointer);
        if (place(pointer, 1).where != ON_PAGEABLE ||
            (next != pinned.end() && next->first < (char *)pointer + bytes))
            return cudaErrorHostMemoryAlreadyRegistered;
        pinned[(char *)pointer] = {bytes, true, false};
        return cudaSuccess;
    });
}

cudaError_t cudaHostUnregister(void *pointer)
{
    return call(__func__, ANYWHERE, [&] {
        auto block = pinned.find((char *)pointer);
        if (block == pinned.end() || !block->second.registered)
            return cudaErrorHostMemoryNotRegistered;
        pinned.erase(block);
        return cudaSuccess;
    });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *out, const void *pointer)
{
    return call(__func__, ANYWHERE, [&] {
        Place found = place(pointer, 1);
        *out = {cudaMemoryTypeUnregistered, -2, nullptr, (void *)pointer};
        if (found.where == ON_DEVICE && found.whole)
            *out = {cudaMemoryTypeDevice, found.device, (void *)pointer, nullptr};
        else if (found.where == ON_PINNED && found.whole)
            *out = {cudaMemoryTypeHost, this_thread().device, (void *)pointer, (void *)pointer};
        return cudaSuccess;
    });
}
