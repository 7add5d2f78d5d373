/* Memory of devices and pinned memory: who may touch it when, what an address is, faults. */
#include "emu.h"

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstring>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

namespace emu
{

std::map<char *, Pinned> &pinned = *new std::map<char *, Pinned>;

size_t round_up(size_t bytes, size_t to)
{
    return (bytes + to - 1) / to * to;
}

size_t page()
{
    static const size_t bytes = (size_t)sysconf(_SC_PAGESIZE);
    return bytes;
}

/* -------------------------------------------------------------------------- opening and closing */

static size_t top(const Arena &arena)
{
    if (arena.blocks.empty())
        return 0;
    auto last = arena.blocks.rbegin();
    return (size_t)(last->first - arena.base) + last->second.room;
}

/* No further than the last block, so that what runs far behind it is caught. */
static void open_arena(Arena &arena)
{
    size_t bytes = round_up(top(arena), page());
    if (bytes > arena.open) {
        mprotect(arena.base, bytes, PROT_READ | PROT_WRITE);
        arena.open = bytes;
    }
}

static void close_arena(Arena &arena)
{
    if (arena.open > 0)
        mprotect(arena.base, arena.open, PROT_NONE);
    arena.open = 0;
}

void open_for(int device)
{
    for (Device &each : state.devices) {
        for (Arena &arena : each.arenas) {
            if (arena.seen_by >> device & 1)
                open_arena(arena);
            else
                close_arena(arena);
        }
    }
}

void open_all()
{
    for (Device &device : state.devices)
        for (Arena &arena : device.arenas)
            open_arena(arena);
}

void close_all()
{
    for (Device &device : state.devices)
        for (Arena &arena : device.arenas)
            close_arena(arena);
}

/* --------------------------------------------------------------------------- what an address is */

Arena *arena_of(const char *address, int *device)
{
    for (Device &each : state.devices) {
        for (Arena &arena : each.arenas) {
            if (address >= arena.base && address < arena.base + arena.room) {
                *device = (int)(&each - state.devices.data());
                return &arena;
            }
        }
    }
    return nullptr;
}

/* The entry at or before the address that reaches it, or the end. */
template <class Map> static typename Map::iterator entry_at(Map &map, const char *address)
{
    auto next = map.upper_bound((char *)address);
    if (next == map.begin())
        return map.end();
    --next;
    return (size_t)(address - next->first) <= next->second.bytes ? next : map.end();
}

Place place(const void *pointer, size_t bytes)
{
    const char *address = (const char *)pointer;
    int device = 0;
    Arena *arena = arena_of(address, &device);
    if (arena != nullptr) {
        auto block = entry_at(arena->blocks, address);
        bool whole = block != arena->blocks.end() && !block->second.freed &&
                     bytes <= block->second.bytes - (size_t)(address - block->first);
        return {ON_DEVICE, device, whole};
    }
    auto block = entry_at(pinned, address);
    if (block == pinned.end())
        return {ON_PAGEABLE, -1, true};
    bool whole =
        !block->second.freed && bytes <= block->second.bytes - (size_t)(address - block->first);
    /* Memory that begins where pinned memory ends is not that. */
    if (address == block->first + block->second.bytes && bytes > 0)
        return {ON_PAGEABLE, -1, true};
    return {ON_PINNED, -1, whole};
}

std::string describe(const void *pointer)
{
    const char *address = (const char *)pointer;
    char text[200], where[40];
    int device = 0;
    snprintf(where, sizeof where, "%p", pointer);
    Arena *arena = arena_of(address, &device);
    if (arena != nullptr) {
        auto block = entry_at(arena->blocks, address);
        const char *what = arena == &state.devices[device].arenas[POOL] ? "the pool" : "the memory";
        if (block == arena->blocks.end() || block->second.freed)
            snprintf(text, sizeof text, ", which is in no block of %s of device %d", what, device);
        else
            snprintf(text, sizeof text,
                     ", which is byte %zd of a block of %zu bytes in %s of device %d",
                     address - block->first, block->second.bytes, what, device);
    } else {
        auto block = entry_at(pinned, address);
        if (block == pinned.end())
            snprintf(text, sizeof text, ", which is not memory of CUDA");
        else
            snprintf(text, sizeof text, ", which is pinned host memory%s",
                     block->second.freed ? " that was freed" : "");
    }
    return std::string(where) + text;
}

int64_t pinned_blocks()
{
    return std::count_if(pinned.begin(), pinned.end(),
                         [](auto &each) { return !each.second.freed && !each.second.registered; });
}

/* -------------------------------------------------------------------------------------- faults */

static volatile bool running; /* an operation, in this thread: */
static pthread_t runner;
static sigjmp_buf back;
static void *volatile fault_address;
static volatile bool fault_has_address;
static struct sigaction previous;

static void on_fault(int, siginfo_t *info, void *)
{
    if (running && pthread_equal(runner, pthread_self())) {
        fault_address = info->si_addr;
        fault_has_address = info->si_code == SEGV_ACCERR || info->si_code == SEGV_MAPERR;
        siglongjmp(back, 1);
    }
    int device;
    char *address = (char *)info->si_addr;
    if (arena_of(address, &device) != nullptr || entry_at(pinned, address) != pinned.end())
        mistake(cudaSuccess, "the host touches %s", describe(address).c_str());
    /* The access happens again, and whoever else handles it does. */
    sigaction(SIGSEGV, &previous, nullptr);
}

void handle_faults()
{
    struct sigaction now;
    sigaction(SIGSEGV, nullptr, &now);
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_fault)
        return;
    struct sigaction ours = {};
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &ours, &previous);
}

bool guarded(const std::function<void()> &work, std::string *what)
{
    runner = pthread_self();
    if (sigsetjmp(back, 1) != 0) {
        running = false;
        *what = fault_has_address ? describe(fault_address)
                                  : "an address that is not aligned, or none at all";
        return false;
    }
    running = true;
    work();
    running = false;
    return true;
}

} // namespace emu
