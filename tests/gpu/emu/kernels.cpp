/* Launches: blocks one after the other, each block's threads in fibers.
 *
 * One fiber runs thread after thread as long as they end without a barrier. A thread that comes to
 * one stays there with its fiber, and another fiber takes the threads that have not begun. When all
 * are at the barrier they go on in a new order. So kernels without barriers cost no switches, and
 * need no mark.
 */
#include "emu.h"

#include <cstring>
#include <link.h>
#include <numeric>
#include <sys/mman.h>
#include <ucontext.h>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu
{

enum { STACK_BYTES = 128 << 10, MAX_THREADS = 1024, MAX_GRID_YZ = 65535 };

struct Fiber {
    ucontext_t context;
    char *stack;
    bool begun; /* has a context to be resumed */
    uint3 thread;
    int line; /* of the barrier where it waits */
};

/* All numbers below n, once each, in an order by the seed. */
struct Order {
    uint64_t n, first, by;
    void begin(uint64_t count)
    {
        n = count;
        first = random_below(n);
        do
            by = 1 + random_below(n);
        while (std::gcd(by, n) != 1);
    }
    uint64_t at(uint64_t i) const
    {
        return (uint64_t)((first + (unsigned __int128)i * by) % n);
    }
};

/* The block that runs. */
static struct {
    const std::function<void()> *body;
    Order order;
    uint64_t total, next; /* threads; those that have begun */
    std::vector<Fiber *> waiting, turn;
    size_t turn_at;
    bool torn; /* a barrier that some threads did not reach */
    Fiber *current;
    ucontext_t home;
} &block = *new std::remove_reference_t<decltype(block)>();

static std::vector<Fiber *> &fibers = *new std::vector<Fiber *>;
static std::vector<Fiber *> &idle = *new std::vector<Fiber *>;

static void fiber_main();

static Fiber *idle_fiber()
{
    if (idle.empty()) {
        Fiber *made = new Fiber{};
        size_t guard = 4096;
        char *memory = (char *)mmap(nullptr, STACK_BYTES + guard, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        mprotect(memory, guard, PROT_NONE);
        made->stack = memory + guard;
        fibers.push_back(made);
        idle.push_back(made);
    }
    Fiber *fiber = idle.back();
    idle.pop_back();
    if (!fiber->begun) {
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack;
        fiber->context.uc_stack.ss_size = STACK_BYTES;
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, fiber_main, 0);
        fiber->begun = true;
    }
    return fiber;
}

/* After an error: fibers stand in the middle of kernels, and begin anew. */
static void forget_fibers()
{
    idle = fibers;
    for (Fiber *fiber : fibers)
        fiber->begun = false;
}

static void resume(Fiber *fiber)
{
    Fiber *from = block.current;
    block.current = fiber;
    threadIdx = fiber->thread;
    if (fiber != from)
        swapcontext(&from->context, &fiber->context);
}

static bool all_wait_together()
{
    if (block.waiting.size() != block.total)
        return false;
    for (const Fiber *fiber : block.waiting)
        if (fiber->line != block.waiting[0]->line)
            return false;
    return true;
}

static void open_barrier()
{
    Order order;
    order.begin(block.total);
    block.turn.resize(block.total);
    for (size_t i = 0; i < block.total; i++)
        block.turn[i] = block.waiting[order.at(i)];
    block.waiting.clear();
    block.turn_at = 0;
}

/* The current fiber has nothing to do: the next one that has. */
static void pass_on()
{
    if (block.turn_at == block.turn.size() && block.next == block.total && all_wait_together())
        open_barrier();
    if (block.turn_at < block.turn.size())
        resume(block.turn[block.turn_at++]);
    else if (block.next < block.total)
        resume(idle_fiber());
    else {
        block.torn = !block.waiting.empty();
        swapcontext(&block.current->context, &block.home);
    }
}

static void fiber_main()
{
    for (;;) {
        while (block.next < block.total) {
            unsigned i = (unsigned)block.order.at(block.next++);
            threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y,
                         i / (blockDim.x * blockDim.y)};
            block.current->thread = threadIdx;
            (*block.body)();
        }
        idle.push_back(block.current);
        pass_on();
    }
}

static void run_block(const std::function<void()> &body)
{
    block.body = &body;
    block.total = (uint64_t)blockDim.x * blockDim.y * blockDim.z;
    block.order.begin(block.total);
    block.next = 0;
    block.waiting.clear();
    block.turn.clear();
    block.turn_at = 0;
    block.torn = false;
    block.current = idle_fiber();
    swapcontext(&block.home, &block.current->context);
}

/* ------------------------------------------------------------------------------- shared memory */

struct Shared {
    const char *code; /* in: an address in this module */
    void *memory;     /* out: its thread-local memory, in this thread */
    size_t bytes;
};

static int find_shared(dl_phdr_info *module, size_t, void *context)
{
    Shared *shared = (Shared *)context;
    bool here = false;
    size_t bytes = 0;
    for (int i = 0; i < module->dlpi_phnum; i++) {
        const ElfW(Phdr) &part = module->dlpi_phdr[i];
        const char *begin = (const char *)module->dlpi_addr + part.p_vaddr;
        here |=
            part.p_type == PT_LOAD && shared->code >= begin && shared->code < begin + part.p_memsz;
        if (part.p_type == PT_TLS)
            bytes = part.p_memsz;
    }
    if (here)
        *shared = {shared->code, module->dlpi_tls_data, bytes};
    return here;
}

static Shared shared_memory()
{
    static thread_local volatile char first; /* or this thread may have none yet */
    (void)first;
    Shared shared = {(const char *)run_block, nullptr, 0};
    dl_iterate_phdr(find_shared, &shared);
    return shared;
}

/* ------------------------------------------------------------------------------------ launches */

/* What is wrong with a pointer that a kernel was given, or nothing. */
static std::string wrong_pointer(const Kernel &kernel, int device)
{
    for (const void *pointer : kernel.pointers) {
        if (pointer == nullptr)
            continue;
        Place found = place(pointer, 0);
        if (found.where == ON_PAGEABLE)
            return describe(pointer);
        if (found.where != ON_DEVICE || found.device == device)
            continue;
        const Arena *arenas = state.devices[found.device].arenas;
        const char *address = (const char *)pointer;
        bool pool = address >= arenas[POOL].base && address < arenas[POOL].base + arenas[POOL].room;
        if ((arenas[pool ? POOL : PLAIN].seen_by >> device & 1) == 0)
            return describe(pointer) + ", without access to it";
    }
    return "";
}

static uint3 coordinates(uint64_t i, const dim3 &extent)
{
    return {(unsigned)(i % extent.x), (unsigned)(i / extent.x % extent.y),
            (unsigned)(i / extent.x / extent.y)};
}

void run_kernel(const Kernel &kernel, int device)
{
    Device &own = state.devices[device];
    const char *name = kernel.name.c_str();
    if (++own.launches == own.kill_at)
        return kill_device(device, cudaErrorIllegalAddress);
    std::string wrong = wrong_pointer(kernel, device);
    if (!wrong.empty())
        return kill_device(device,
                           mistake(cudaErrorIllegalAddress, "kernel %s on device %d was given %s",
                                   name, device, wrong.c_str()));
    open_for(device);
    blockDim = kernel.block;
    gridDim = kernel.grid;
    Order order;
    order.begin((uint64_t)gridDim.x * gridDim.y * gridDim.z);
    Shared shared = shared_memory();
    bool whole = guarded(
        [&] {
            for (uint64_t i = 0; i < order.n && !block.torn; i++) {
                blockIdx = coordinates(order.at(i), gridDim);
                memset(shared.memory, 0xff, shared.bytes);
                run_block(kernel.run);
            }
        },
        &wrong);
    char where[160];
    snprintf(where, sizeof where, "kernel %s on device %d, block (%u, %u, %u)", name, device,
             blockIdx.x, blockIdx.y, blockIdx.z);
    if (!whole) {
        forget_fibers();
        return kill_device(device,
                           mistake(cudaErrorIllegalAddress, "%s, thread (%u, %u, %u) touched %s",
                                   where, threadIdx.x, threadIdx.y, threadIdx.z, wrong.c_str()));
    }
    if (block.torn) {
        unsigned long waiting = block.waiting.size();
        int line = block.waiting[0]->line;
        block.torn = false;
        forget_fibers();
        return kill_device(device,
                           mistake(cudaErrorLaunchFailure,
                                   "%s: %lu of %lu threads wait at a barrier, one of them in "
                                   "line %d, and the others do not come there",
                                   where, waiting, (unsigned long)block.total, line));
    }
    if (behind_blocks_changed(where))
        kill_device(device, cudaErrorIllegalAddress);
}

} // namespace emu

using namespace emu;

void emu_barrier(int line)
{
    block.current->line = line;
    block.waiting.push_back(block.current);
    pass_on();
}

static bool fits(const dim3 &grid, const dim3 &threads)
{
    return grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= INT32_MAX && grid.y <= MAX_GRID_YZ &&
           grid.z <= MAX_GRID_YZ && threads.x > 0 && threads.y > 0 && threads.z > 0 &&
           threads.z <= 64 && threads.x <= MAX_THREADS && threads.y <= MAX_THREADS &&
           threads.x * threads.y * threads.z <= MAX_THREADS;
}

void emu_enqueue(const char *name, dim3 grid, dim3 threads, cudaStream_t handle,
                 std::function<void()> run, std::vector<const void *> pointers)
{
    call("cudaLaunchKernel", ON_CURRENT, [&] {
        size_t stream;
        cudaError_t error = find_stream(handle, &stream);
        if (error != cudaSuccess)
            return error;
        int device = state.streams[stream].device;
        if (device != this_thread().device)
            return mistake(
                cudaErrorInvalidResourceHandle,
                "kernel %s is launched with device %d current into a stream of device %d", name,
                this_thread().device, device);
        if (!fits(grid, threads))
            return mistake(cudaErrorInvalidConfiguration,
                           "kernel %s: no grid of (%u, %u, %u) blocks of (%u, %u, %u) threads",
                           name, grid.x, grid.y, grid.z, threads.x, threads.y, threads.z);
        Kernel kernel = {name, grid, threads, std::move(run), std::move(pointers)};
        enqueue(stream, [kernel, device] { run_kernel(kernel, device); });
        return cudaSuccess;
    });
}
