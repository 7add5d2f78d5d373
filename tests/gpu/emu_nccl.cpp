/* A stand-in for libnccl on the emulation of CUDA's runtime, for communicators that do not block,
 * of one process, or of several that name a folder by EMU_NCCL_SHARED.
 *
 * Each call of a rank waits in its communicator's list until all ranks have made theirs; then both
 * become one piece of work of all their streams (emu_together): it begins when each stream has come
 * to it. Before that the state of a communicator is "in progress", for a few questions more by the
 * seed: so what is put on a stream without asking comes before the sum, under some seed. Sums begin
 * at any rank, and round after each.
 *
 * Between processes everything is a file in the folder: a rank that joins leaves one, and each sum
 * or broadcast has two pieces of work, of which the first writes what the ranks here bring and the
 * second begins when the files of all ranks are there. Nobody is told of a process that dies.
 *
 * Told as mistakes: several communicators of one thread used outside a group; a call while one is
 * in progress, or after its end; ranks that differ in what they call; an array or a stream of
 * another device; a communicator that ends unfinished.
 */
#include "emu_control.h"
#include "emu_nccl.h"
#include "emu_nccl_work.h"

#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace
{

enum Result {
    SUCCESS,
    CUDA_ERROR,
    SYSTEM_ERROR,
    INTERNAL_ERROR,
    INVALID_ARGUMENT,
    INVALID_USAGE,
    REMOTE_ERROR,
    IN_PROGRESS,
};

struct Id {
    char bytes[128];
};

struct Config {
    size_t bytes;
    unsigned magic, version;
    int blocking, settings[3];
    const char *network;
    int share;
};

struct Comm {
    std::shared_ptr<Clique> clique;
    int rank, device, error;
    bool ends, never_ends;
    std::thread::id maker;
    std::deque<Call> calls; /* not put on the stream yet */
};

struct Group {
    int depth, error;
    std::set<std::shared_ptr<Clique>> cliques;
    std::vector<std::pair<Comm *, Call>> calls;
    bool inits;
};

std::mutex &lock = *new std::mutex;
struct State {
    uint64_t random, ids;
    std::set<Comm *> live;
    std::map<std::string, std::shared_ptr<Clique>> cliques;
    std::map<std::string, int64_t> faults, counts;
    std::string last_error;
};
State &state = *new State{};
thread_local Group group;

uint64_t random_below(uint64_t n)
{
    uint64_t z = state.random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) % n;
}

/* ------------------------------------------------------------------------------- the emulation */

/* A function of the plug-in that the process has open. */
template <typename F> F *emulation(const char *name)
{
    const char *file = getenv("KVSTORE_CUDA_PLUGIN");
    void *library = file == nullptr ? nullptr : dlopen(file, RTLD_NOW | RTLD_NOLOAD);
    void *symbol = library == nullptr ? nullptr : dlsym(library, name);
    if (symbol == nullptr) {
        fprintf(stderr, "emulated NCCL: there is no emulation with %s in KVSTORE_CUDA_PLUGIN\n",
                name);
        _Exit(3);
    }
    return (F *)symbol;
}

__attribute__((format(printf, 2, 3))) int mistake(int result, const char *format, ...)
{
    char text[512];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    emulation<decltype(emu_tell)>("emu_tell")(text);
    state.last_error = text;
    return result;
}

int fail(int result, const char *text)
{
    state.last_error = text;
    return result;
}

bool hit(const char *what)
{
    auto found = state.faults.find(what);
    return found != state.faults.end() && found->second > 0 && --found->second == 0;
}

/* ------------------------------------------------------------------------------ on the devices */

void run(void *context)
{
    Work &work = *(Work *)context;
    if (!work.clique->shared.empty()) {
        work.gathers ? gather(work) : bring(work);
        return;
    }
    run_whole(work);
}

/* Kernels end when all ranks here are aborted; those of one alone go on waiting for the others. */
int may_begin(void *context)
{
    Work &work = *(Work *)context;
    int aborted = work.clique->aborted;
    if (aborted == work.clique->here())
        return -1;
    return aborted == 0 && !work.never && (!work.gathers || all_there(work));
}

void drop(void *context)
{
    Work *work = (Work *)context;
    work->clique->under_way--;
    delete work;
}

/* ------------------------------------------------------------------------------------ progress */

bool same(const Call &a, const Call &b)
{
    return a.count == b.count && a.dtype == b.dtype && a.root == b.root;
}

int put(const std::shared_ptr<Clique> &clique)
{
    int first = (int)random_below(clique->ranks.size());
    bool is_shared = !clique->shared.empty();
    Work *work = new Work{clique, {}, {}, first, hit("work never"), false, clique->sequence++};
    std::vector<int> devices;
    std::vector<void *> streams;
    std::vector<emu_array_t> arrays;
    for (Comm *comm : clique->ranks) {
        if (comm == nullptr)
            continue; /* another process's */
        Call call = comm->calls.front();
        comm->calls.pop_front();
        size_t bytes = call.count * types[call.dtype].bytes;
        if (call.root < 0 || call.root == comm->rank)
            arrays.push_back({comm->device, call.src, bytes});
        arrays.push_back({comm->device, call.dst, bytes});
        devices.push_back(comm->device);
        streams.push_back(call.stream);
        work->calls.push_back(call);
        work->ranks.push_back(comm->rank);
    }
    bool agree = true;
    for (const Call &call : work->calls)
        agree = agree && same(call, work->calls[0]);
    if (!agree || hit("put")) {
        delete work;
        return agree ? fail(CUDA_ERROR, "Cuda failure 'asked for'")
                     : mistake(INVALID_USAGE, "ranks differ in what they sum or broadcast");
    }
    state.counts["puts"]++;
    for (int piece = 0; piece <= is_shared; piece++) {
        Work *own = piece == is_shared ? work : new Work(*work);
        own->gathers = piece > 0;
        clique->under_way++;
        int error = emulation<decltype(emu_together)>("emu_together")(
            "NCCL", (int)streams.size(), devices.data(), streams.data(), (int)arrays.size(),
            arrays.data(), may_begin, run, drop, own);
        if (error != 0) {
            drop(own);
            return fail(CUDA_ERROR, "Cuda failure");
        }
    }
    return SUCCESS;
}

void set_error(Clique &clique, int error)
{
    for (Comm *comm : clique.ranks)
        if (comm != nullptr)
            comm->error = error;
}

bool all_have_called(const Clique &clique)
{
    int calling = 0;
    for (Comm *comm : clique.ranks)
        calling += comm != nullptr && !comm->calls.empty();
    return calling > 0 && calling == clique.here();
}

bool all_have_joined(const Clique &clique)
{
    if (clique.shared.empty())
        return clique.joined == clique.size();
    for (int rank = 0; rank < clique.size(); rank++)
        if (!is_there(clique.file("join", 0, rank)))
            return false;
    return true;
}

void go_on(const std::shared_ptr<Clique> &clique)
{
    if (clique->patience > 0) {
        clique->patience--;
        return;
    }
    if (clique->never || (!clique->begun && !all_have_joined(*clique)))
        return;
    clique->begun = true;
    if (clique->fails)
        set_error(*clique, SYSTEM_ERROR);
    int error = SUCCESS;
    while (error == SUCCESS && !clique->fails && all_have_called(*clique))
        error = put(clique);
    if (error != SUCCESS)
        set_error(*clique, error);
    if (clique->ending == clique->here())
        emulation<decltype(emu_run_some)>("emu_run_some")();
}

int state_of(const Comm *comm)
{
    const Clique &clique = *comm->clique;
    if (comm->error != SUCCESS)
        return comm->error;
    bool is_busy = !clique.begun || clique.never || !comm->calls.empty();
    bool is_ending =
        comm->ends && (comm->never_ends || clique.ending < clique.here() || clique.under_way > 0);
    return is_busy || is_ending ? IN_PROGRESS : SUCCESS;
}

bool knows(Comm *comm, const char *caller)
{
    if (state.live.count(comm) != 0)
        return true;
    mistake(INVALID_ARGUMENT, "%s of a communicator that is none, or not any more", caller);
    return false;
}

/* Alone, a thread that has several would wait in the first call. */
bool is_alone(const Comm *comm, const char *caller)
{
    for (const Comm *other : comm->clique->ranks)
        if (group.depth == 0 && other != nullptr && other != comm && other->maker == comm->maker) {
            mistake(INVALID_USAGE, "%s outside a group, by a thread with several communicators",
                    caller);
            return false;
        }
    return true;
}

int add_call(Comm *comm, const Call &call, const char *caller)
{
    std::lock_guard<std::mutex> guard(lock);
    int error = SUCCESS;
    if (!knows(comm, caller) || !is_alone(comm, caller))
        error = INVALID_ARGUMENT;
    else if (state_of(comm) == IN_PROGRESS)
        error = mistake(INVALID_ARGUMENT, "%s while the communicator is in progress", caller);
    else if (state_of(comm) != SUCCESS)
        error = state_of(comm);
    else if (group.inits)
        error = mistake(INVALID_USAGE, "%s in a group that begins communicators", caller);
    else if (call.dtype < 0 || call.dtype >= TYPES || call.root >= comm->clique->size())
        error = fail(INVALID_ARGUMENT, "no such type or root");
    else if (hit("call"))
        error = fail(INTERNAL_ERROR, "asked for");
    if (error != SUCCESS) {
        group.error = group.depth > 0 ? error : SUCCESS;
        return error;
    }
    group.calls.emplace_back(comm, call);
    group.cliques.insert(comm->clique);
    return group.depth > 0 ? SUCCESS : IN_PROGRESS;
}

int end_group_locked()
{
    Group done = std::move(group);
    group = Group{};
    if (done.error != SUCCESS)
        return done.error;
    for (const auto &[comm, call] : done.calls)
        comm->calls.push_back(call);
    state.counts["groups"] += !done.calls.empty();
    int result = SUCCESS;
    for (const auto &clique : done.cliques) {
        clique->never = clique->never || hit(done.inits ? "init never" : "put never");
        clique->patience = random_below(4);
        if (clique->patience == 0)
            go_on(clique);
        for (const Comm *comm : clique->ranks)
            if (comm != nullptr && state_of(comm) != SUCCESS)
                result = IN_PROGRESS; /* an error is told when they are asked */
    }
    return result;
}

int end_call()
{
    std::lock_guard<std::mutex> guard(lock);
    return group.depth > 0 ? (int)SUCCESS : end_group_locked();
}

} // namespace

/* ----------------------------------------------------------------------------------- the calls */

#define EXPORT extern "C" EMU_NCCL

EXPORT int ncclGetVersion(int *version)
{
    *version = 22900;
    return SUCCESS;
}

EXPORT const char *ncclGetErrorString(int result)
{
    static const char *const texts[] = {
        "no error",
        "unhandled cuda error",
        "unhandled system error",
        "internal error",
        "invalid argument",
        "invalid usage",
        "remote process exited or there was a network error",
        "NCCL operation in progress",
    };
    return result >= 0 && result <= IN_PROGRESS ? texts[result] : "unknown result code";
}

EXPORT const char *ncclGetLastError(Comm *)
{
    std::lock_guard<std::mutex> guard(lock);
    static std::string *kept = new std::string;
    *kept = state.last_error;
    return kept->c_str();
}

EXPORT int ncclGetUniqueId(Id *out)
{
    std::lock_guard<std::mutex> guard(lock);
    memset(out, 0, sizeof *out);
    snprintf(out->bytes, sizeof out->bytes, "emulated-%d-%llu", (int)getpid(),
             (unsigned long long)++state.ids);
    return SUCCESS;
}

EXPORT int ncclGroupStart(void)
{
    group.depth++;
    return SUCCESS;
}

EXPORT int ncclGroupEnd(void)
{
    std::lock_guard<std::mutex> guard(lock);
    if (group.depth == 0)
        return mistake(INVALID_USAGE, "ncclGroupEnd without a group");
    return --group.depth > 0 ? (int)SUCCESS : end_group_locked();
}

static int init_locked(Comm **out, int ranks, const Id &id, int rank, const Config *config)
{
    if (config == nullptr || config->bytes < offsetof(Config, settings) ||
        config->magic != 0xcafebeefu || config->version < 21400)
        return mistake(INVALID_ARGUMENT, "a configuration that is none");
    if (config->blocking != 0)
        return mistake(INVALID_USAGE, "a communicator that blocks, with its deadline nobody's");
    if (rank < 0 || rank >= ranks || memchr(id.bytes, '\0', sizeof id.bytes) == nullptr)
        return mistake(INVALID_ARGUMENT, "rank %d of %d", rank, ranks);
    if (!group.calls.empty())
        return mistake(INVALID_USAGE, "a communicator begins in a group of calls");
    std::shared_ptr<Clique> &clique = state.cliques[id.bytes];
    if (!clique) {
        clique = std::make_shared<Clique>();
        clique->ranks.resize(ranks);
        const char *folder = getenv("EMU_NCCL_SHARED");
        clique->shared = folder != nullptr ? std::string(folder) + "/" + id.bytes : "";
    }
    if (clique->size() != ranks || clique->ranks[rank] != nullptr)
        return mistake(INVALID_USAGE, "rank %d of %d has joined already", rank, ranks);
    int device = emulation<decltype(emu_current_device)>("emu_current_device")();
    for (const Comm *other : clique->ranks)
        if (other != nullptr && other->device == device)
            return fail(INVALID_USAGE, "Duplicate GPU detected");
    Comm *comm = new Comm{};
    comm->clique = clique;
    comm->rank = rank;
    comm->device = device;
    comm->maker = std::this_thread::get_id();
    clique->ranks[rank] = comm;
    clique->joined++;
    if (!clique->shared.empty())
        write_file(clique->file("join", 0, rank), "", 0, "", 0);
    clique->fails = clique->fails || hit("init");
    state.live.insert(comm);
    state.counts["inits"]++;
    group.cliques.insert(clique);
    group.inits = true;
    *out = comm;
    return is_alone(comm, "ncclCommInitRankConfig") ? SUCCESS : INVALID_USAGE;
}

EXPORT int ncclCommInitRankConfig(Comm **out, int ranks, Id id, int rank, Config *config)
{
    {
        std::lock_guard<std::mutex> guard(lock);
        int error = init_locked(out, ranks, id, rank, config);
        if (error != SUCCESS) {
            group.error = group.depth > 0 ? error : (int)SUCCESS;
            return error;
        }
    }
    int result = end_call();
    return group.depth > 0 ? (int)IN_PROGRESS : result;
}

EXPORT int ncclAllReduce(const void *src, void *dst, size_t count, int dtype, int op, Comm *comm,
                         void *stream)
{
    if (op != 0)
        return INVALID_ARGUMENT;
    int error = add_call(comm, {src, dst, count, dtype, -1, stream}, "ncclAllReduce");
    return error == IN_PROGRESS ? end_call() : error;
}

EXPORT int ncclBroadcast(const void *src, void *dst, size_t count, int dtype, int root, Comm *comm,
                         void *stream)
{
    int error = add_call(comm, {src, dst, count, dtype, root, stream}, "ncclBroadcast");
    return error == IN_PROGRESS ? end_call() : error;
}

EXPORT int ncclCommGetAsyncError(Comm *comm, int *out)
{
    std::lock_guard<std::mutex> guard(lock);
    if (!knows(comm, "ncclCommGetAsyncError"))
        return INVALID_ARGUMENT;
    go_on(comm->clique);
    *out = state_of(comm);
    if (*out == SUCCESS && hit("async"))
        *out = comm->error = fail(REMOTE_ERROR, "the peer is gone");
    return SUCCESS;
}

EXPORT int ncclCommFinalize(Comm *comm)
{
    std::lock_guard<std::mutex> guard(lock);
    if (!knows(comm, "ncclCommFinalize"))
        return INVALID_ARGUMENT;
    if (comm->ends || state_of(comm) != SUCCESS)
        return mistake(INVALID_ARGUMENT, "ncclCommFinalize of a communicator that is at work");
    comm->ends = true;
    comm->never_ends = hit("end never");
    comm->clique->ending++;
    return IN_PROGRESS;
}

static void forget_locked(Comm *comm)
{
    state.live.erase(comm);
    comm->clique->ranks[comm->rank] = nullptr;
    delete comm;
}

EXPORT int ncclCommDestroy(Comm *comm)
{
    std::lock_guard<std::mutex> guard(lock);
    if (!knows(comm, "ncclCommDestroy"))
        return INVALID_ARGUMENT;
    if (!comm->ends || state_of(comm) == IN_PROGRESS)
        mistake(INVALID_USAGE, "ncclCommDestroy before the communicator has ended");
    forget_locked(comm);
    return SUCCESS;
}

EXPORT int ncclCommAbort(Comm *comm)
{
    std::lock_guard<std::mutex> guard(lock);
    if (!knows(comm, "ncclCommAbort"))
        return INVALID_ARGUMENT;
    comm->clique->aborted++;
    state.counts["aborted"]++;
    forget_locked(comm);
    return SUCCESS;
}

/* ------------------------------------------------------------------------------------- control */

void emu_nccl_reset(uint64_t seed)
{
    std::lock_guard<std::mutex> guard(lock);
    for (Comm *comm : state.live)
        delete comm;
    state = State{};
    state.random = seed;
    group = Group{};
}

void emu_nccl_fault(const char *what, int64_t n)
{
    std::lock_guard<std::mutex> guard(lock);
    state.faults[what] = n;
}

int64_t emu_nccl_counter(const char *what)
{
    std::lock_guard<std::mutex> guard(lock);
    return strcmp(what, "live") == 0 ? (int64_t)state.live.size() : state.counts[what];
}
