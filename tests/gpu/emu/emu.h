/* The emulation of CUDA's runtime: what its files share, and what it promises.
 *
 * Streams (streams.cpp). A stream is a queue of operations, and nothing runs when it is put there.
 * An operation begins when those before it in its stream, and those it was ordered behind by an
 * event or by the legacy default stream, are done. A call that synchronises runs operations in its
 * own thread until what it waits for is done, each whole, taking the next stream by the seed: so
 * what is not ordered runs in any order, under some seed, and what nobody waited for may not have
 * run. A query runs a few operations or none. An event stands for what was in the stream when it
 * was recorded, a wait for what the event stood for when it was called.
 *
 * Memory (memory.cpp, allocation.cpp). Each device has mappings of its own, one for cudaMalloc and
 * one for its pool, which nobody may touch except while an operation runs: an access of the host
 * ends the process with a sentence. A kernel sees its own device's memory, that of peers it was
 * given access to (a pool is given by itself, cudaMemPoolSetAccess), and host memory. Memory is
 * spoilt, with 0xff, when it is allocated and when it is freed: by cudaMallocAsync and
 * cudaFreeAsync in the order of their stream, by cudaFree at once, without waiting for anybody.
 * Behind every block are some bytes that must not change. Copies must lie inside one block and go
 * in the direction that they name. A copy with pageable memory is done in the call or later, by the
 * seed.
 *
 * Kernels (kernels.cpp). Blocks run one after the other, in an order by the seed, threads too,
 * until they end or come to a barrier. A barrier that some threads do not reach, or reach
 * elsewhere, is an error. Shared memory is spoilt before each block. A pointer among a kernel's
 * arguments must not be pageable host memory.
 *
 * Errors. A kernel or copy that touches what it may not kills its device: cudaErrorIllegalAddress,
 * and cudaErrorLaunchFailure for a barrier; every later call on that device returns it, the others
 * live. Every mistake found is told in a sentence on stderr and by emu_report. As CUDA does, an
 * error returned by any call, cudaErrorNotReady too, stays for cudaGetLastError.
 *
 * All of it is under one lock, which a call holds from beginning to end.
 */
#ifndef EMU_H
#define EMU_H

#include "emu_control.h"
#include "emu_cuda.h"

#include <deque>
#include <map>
#include <string>

namespace emu
{

enum { MAX_DEVICES = 32, PLAIN = 0, POOL = 1 };

/* -------------------------------------------------------------------------------------- memory */

struct Block {
    size_t bytes, room; /* as asked for; with the bytes behind it */
    bool freed;         /* its cudaFreeAsync was called */
};

struct Arena {
    char *base;
    size_t room;
    size_t open;      /* bytes from the base that may be touched now */
    uint32_t seen_by; /* devices, by bit */
    std::map<char *, Block> blocks;
    size_t used;     /* sum of room */
    size_t reserved; /* of a pool: what it holds of the device's memory */
    uint64_t keep;   /* of a pool: its release threshold */
};

struct Device {
    cudaError_t dead; /* cudaSuccess: it lives */
    int64_t kill_at;  /* the number of the launch that kills it, 0: none */
    int64_t launches;
    size_t legacy; /* its default stream */
    Arena arenas[2];
};

void memory_reset(int devices, size_t bytes);
/* Opens the memory that a kernel of this device sees, or all of it. */
void open_for(int device);
void open_all();
void close_all();
/* Runs the operation. False: it touched what it may not. *what then says where. */
bool guarded(const std::function<void()> &work, std::string *what);
/* What this address is, in words. */
std::string describe(const void *pointer);
/* Whether bytes behind blocks were changed; says so. */
bool behind_blocks_changed(const char *by);
void spoil_device(int device);
int64_t pinned_blocks();
void release_pools(); /* down to their thresholds, as a synchronisation does */

size_t round_up(size_t bytes, size_t to);
size_t page();
void handle_faults();
Arena *arena_of(const char *address, int *device); /* nullptr: nobody's */

struct Pinned {
    size_t bytes;
    bool registered, freed; /* freed memory keeps its addresses until the next emu_reset */
};
extern std::map<char *, Pinned> &pinned;

enum Where { ON_DEVICE, ON_PINNED, ON_PAGEABLE };
struct Place {
    Where where;
    int device;
    bool whole; /* the range lies inside one block that is not freed */
};
Place place(const void *pointer, size_t bytes);

/* ------------------------------------------------------------------------------------- streams */

struct Behind {
    size_t stream;
    uint64_t count;
};

struct Operation {
    std::function<void()> work; /* may be none */
    std::vector<Behind> behind;
    std::function<bool()> may_begin; /* asked when it comes to it; may be none */
};

struct Stream {
    int device;
    bool blocking;
    uint64_t rank; /* the runnable one with the highest is next */
    uint64_t issued, done;
    std::deque<Operation> queue;
};

struct Event {
    int device;
    bool recorded;
    Behind at;
};

void streams_reset(int devices);
size_t add_stream(int device, bool blocking);
void enqueue(size_t stream, std::function<void()> work, std::vector<Behind> behind = {},
             std::function<bool()> may_begin = {});
bool step();
void step_a_little();
void run_until_done(size_t stream, uint64_t count);
/* The stream's number, its device's error, or cudaErrorInvalidResourceHandle. */
cudaError_t find_stream(cudaStream_t handle, size_t *out);

/* ------------------------------------------------------------------------------------- kernels */

struct Kernel {
    std::string name;
    dim3 grid, block;
    std::function<void()> run;
    std::vector<const void *> pointers;
};

void run_kernel(const Kernel &kernel, int device);

/* ------------------------------------------------------------------------------------- control */

/* What a thread of the host has of its own. */
struct Thread {
    uint64_t generation;
    int device;
    cudaError_t last;
    std::map<int, size_t> streams; /* cudaStreamPerThread, by device */
};

struct State {
    uint64_t generation, random;
    bool peer;
    size_t bytes;
    std::vector<Device> devices;
    std::deque<Stream> streams;
    std::map<uintptr_t, size_t> handles; /* of streams that were made and not destroyed */
    std::map<uintptr_t, Event> events;
    int64_t copies, copies_at_most, mistakes;
    int asked; /* how often in a row whether work is done */
    int64_t fail_alloc_at, fail_alloc_times, allocations;
    std::map<std::string, int64_t> calls;
    struct Failure {
        int64_t at;
        cudaError_t error;
    };
    std::map<std::string, Failure> failures;
    std::string report;
};
extern State &state;

Thread &this_thread();
uint64_t random64();
uint64_t random_below(uint64_t n);
/* A number for a handle, never given twice. */
uintptr_t new_handle();

/* Says what is wrong, and gives `error` back. */
__attribute__((format(printf, 2, 3))) cudaError_t mistake(cudaError_t error, const char *format,
                                                          ...);
void kill_device(int device, cudaError_t error);
/* Whether this allocation is to find no memory. */
bool allocation_fails();

/* Every call of the runtime goes through here: one lock, failures asked for, counts, the last
 * error. ON_CURRENT: it returns the current device's error if that is dead. */
enum Scope { ANYWHERE, ON_CURRENT };
cudaError_t call(const char *name, Scope scope, const std::function<cudaError_t()> &body);

} // namespace emu

#endif
