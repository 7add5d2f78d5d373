/* What this machine can do at best between processes: the bytes of a dist store's jobs, moved in
 * plain C without the store and without arithmetic:
 *
 *     cc -std=c17 -O3 -march=native -pthread limit_dist.c -o limit_dist
 *     ./limit_dist [--job NAME] [--reps N]
 *
 * As in limit.c there is one JSON line a job, and a job is tried in several ways, of which the
 * fastest counts. Two workers and two servers are processes of their own. Large values are copied
 * by process_vm_readv: a server reads its half of every worker's arrays, and when it has all of
 * them each worker reads the result from it. Small ones go through TCP sockets on loopback. Each
 * worker times its own loop, in which it waits for results only; the slower one counts.
 */
#include "limit.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>

enum {
    WORKERS = 2,
    SERVERS = 2,
    MAX_REPS = 1000,
    SECONDS = 120, /* that a process may take */
};

/* What the processes of a job share. */
typedef struct meeting {
    pthread_barrier_t all;
    sem_t pushed[WORKERS][SERVERS], merged[WORKERS][SERVERS];
    pid_t server_pids[SERVERS], worker_pids[WORKERS];
    char *pushes[WORKERS], *stored[SERVERS][2];
    double times[WORKERS][MAX_REPS];
} meeting;

static meeting *shared;

/* ------------------------------------------------------------------------------ processes */

typedef void (*role_function)(const void *job, int number);

static pid_t start(role_function role, const void *job, int number)
{
    pid_t parent = getpid(), child = fork();
    if (child < 0)
        fail("no process");
    if (child > 0)
        return child;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1);
    alarm(SECONDS);
    role(job, number);
    _exit(0);
}

/* Median seconds of a repetition's slower worker. */
static double run_processes(role_function worker, role_function server, const void *job)
{
    pid_t children[WORKERS + SERVERS];
    fflush(stdout);
    for (int i = 0; i < SERVERS; i++)
        children[i] = shared->server_pids[i] = start(server, job, i);
    for (int i = 0; i < WORKERS; i++)
        children[SERVERS + i] = shared->worker_pids[i] = start(worker, job, i);
    bool good = true;
    for (int left = WORKERS + SERVERS; left > 0; left--) {
        int status = 0;
        pid_t ended = wait(&status);
        for (int i = 0; i < WORKERS + SERVERS; i++)
            if (children[i] == ended)
                children[i] = 0;
        if (status != 0 && good) {
            good = false;
            for (int i = 0; i < WORKERS + SERVERS; i++)
                if (children[i] != 0)
                    kill(children[i], SIGKILL);
        }
    }
    if (!good)
        fail("a process failed");
    double slower[MAX_REPS];
    for (int rep = 0; rep < num_reps; rep++) {
        slower[rep] = shared->times[0][rep];
        for (int i = 1; i < WORKERS; i++)
            if (shared->times[i][rep] > slower[rep])
                slower[rep] = shared->times[i][rep];
    }
    return median(slower, num_reps);
}

static void make_meeting(void)
{
    if (num_reps > MAX_REPS)
        fail("too many repetitions");
    if (shared != NULL)
        return;
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        fail("out of memory");
    pthread_barrierattr_t across;
    pthread_barrierattr_init(&across);
    pthread_barrierattr_setpshared(&across, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&shared->all, &across, WORKERS + SERVERS);
    for (int w = 0; w < WORKERS; w++)
        for (int s = 0; s < SERVERS; s++) {
            sem_init(&shared->pushed[w][s], 1, 0);
            sem_init(&shared->merged[w][s], 1, 0);
        }
}

static void meet(void)
{
    pthread_barrier_wait(&shared->all);
}

static void take(sem_t *semaphore)
{
    while (sem_wait(semaphore) != 0)
        if (errno != EINTR)
            fail("no semaphore");
}

/* ------------------------------------------------------------------------------ large jobs */

enum { MAX_KEYS = 161, LARGE_CALLS = 3 };

typedef struct large_job {
    int num_keys;
    size_t bytes[MAX_KEYS]; /* of each key; a server has half of it */
    size_t piece;           /* bytes that a server reads at a time */
} large_job;

static size_t half_bytes(const large_job *job)
{
    size_t sum = 0;
    for (int key = 0; key < job->num_keys; key++)
        sum += job->bytes[key] / SERVERS;
    return sum;
}

static void read_from(pid_t process, char *to, char *from, size_t bytes)
{
    struct iovec here = {to, bytes}, there = {from, bytes};
    if (process_vm_readv(process, &here, 1, &there, 1, 0) != (ssize_t)bytes)
        fail("process_vm_readv is refused");
}

/* An array of a worker holds the halves of server 0 in the order of the keys, then those of
 * server 1. Two results take turns, so that a fast worker's next push does not change what a slow
 * one still reads. One worker's half becomes the result, the other's lands in `piece` bytes that
 * are used again and again. */
static void large_server(const void *argument, int server)
{
    const large_job *job = argument;
    size_t half = half_bytes(job);
    char *landing = memory(job->piece);
    for (int i = 0; i < 2; i++)
        shared->stored[server][i] = memory(half);
    meet();
    for (int rep = 0, call = 0; rep < num_reps; rep++) {
        meet();
        for (int end = call + LARGE_CALLS; call < end; call++) {
            for (int i = 0; i < WORKERS; i++) {
                int worker = (server + i) % WORKERS;
                char *to = shared->stored[server][call % 2];
                char *from = shared->pushes[worker] + (size_t)server * half;
                take(&shared->pushed[worker][server]);
                for (int key = 0; key < job->num_keys; key++) {
                    size_t bytes = job->bytes[key] / SERVERS, size;
                    for (size_t at = 0; at < bytes; at += size) {
                        size = bytes - at < job->piece ? bytes - at : job->piece;
                        read_from(shared->worker_pids[worker], i == 0 ? to + at : landing,
                                  from + at, size);
                    }
                    to += bytes;
                    from += bytes;
                }
            }
            for (int worker = 0; worker < WORKERS; worker++)
                sem_post(&shared->merged[worker][server]);
        }
    }
    meet(); /* nobody reads here any more */
}

static void large_worker(const void *argument, int worker)
{
    const large_job *job = argument;
    size_t half = half_bytes(job);
    char *push = memory(half * SERVERS), *out = memory(half * SERVERS);
    memset(push, worker + 1, half * SERVERS);
    shared->pushes[worker] = push;
    meet();
    for (int rep = 0, call = 0; rep < num_reps; rep++) {
        meet();
        double begin = now();
        for (int end = call + LARGE_CALLS; call < end; call++) {
            for (int i = 0; i < SERVERS; i++)
                sem_post(&shared->pushed[worker][(worker + i) % SERVERS]);
            for (int i = 0; i < SERVERS; i++) {
                int server = (worker + i) % SERVERS;
                char *from = shared->stored[server][call % 2], *to = out + (size_t)server * half;
                take(&shared->merged[worker][server]);
                for (int key = 0; key < job->num_keys; key++) {
                    size_t bytes = job->bytes[key] / SERVERS;
                    read_from(shared->server_pids[server], to, from, bytes);
                    to += bytes;
                    from += bytes;
                }
            }
        }
        shared->times[worker][rep] = (now() - begin) / LARGE_CALLS;
    }
    meet();
    for (size_t at = 0; at < half * SERVERS; at++)
        if (out[at] != (char)(at / half % WORKERS + 1))
            fail("wrong bytes arrived");
}

static double large(large_job *job)
{
    static const size_t pieces[] = {256 * KIB, MIB, 64 * MIB};
    double best = 1e9;
    make_meeting();
    for (size_t way = 0; way < sizeof pieces / sizeof pieces[0]; way++) {
        job->piece = pieces[way];
        double seconds = run_processes(large_worker, large_server, job);
        if (seconds < best)
            best = seconds;
    }
    return best;
}

static double push_pull_64mib(void)
{
    large_job job = {1, {64 * MIB}, 0};
    return large(&job);
}

static void add_key(large_job *job, size_t elements)
{
    job->bytes[job->num_keys++] = elements * sizeof(float);
}

/* A convolution without bias and the scale and shift of its normalization. */
static void add_convolution(large_job *job, size_t in, size_t out, size_t area)
{
    add_key(job, in * out * area);
    add_key(job, out);
    add_key(job, out);
}

static double resnet50(void)
{
    static const int blocks[] = {3, 4, 6, 3};
    large_job job = {0};
    size_t in = 64;
    add_convolution(&job, 3, in, 49);
    for (int stage = 0; stage < 4; stage++)
        for (int block = 0; block < blocks[stage]; block++) {
            size_t inner = (size_t)64 << stage, out = 4 * inner;
            add_convolution(&job, in, inner, 1);
            add_convolution(&job, inner, inner, 9);
            add_convolution(&job, inner, out, 1);
            if (block == 0)
                add_convolution(&job, in, out, 1);
            in = out;
        }
    add_key(&job, in * 1000);
    add_key(&job, 1000);
    return large(&job);
}

/* ------------------------------------------------------------------------------ small jobs */

enum { KEY_BYTES = 4096, LIST_KEYS = 1000, MAX_GATHERED = 500 };

typedef struct small_job {
    int num_servers, num_keys; /* keys of one server */
    int gathered;              /* keys that one call of the system sends or receives */
    int calls;
    int worker_ends[WORKERS][SERVERS], server_ends[WORKERS][SERVERS];
} small_job;

typedef ssize_t (*message_function)(int socket, struct msghdr *message, int flags);

static ssize_t send_message(int socket, struct msghdr *message, int flags)
{
    return sendmsg(socket, message, flags);
}

/* The keys of one server through its socket. */
static void transfer(const small_job *job, message_function move, int socket, char **keys)
{
    struct iovec parts[MAX_GATHERED];
    for (int at = 0; at < job->num_keys; at += job->gathered) {
        int count = job->num_keys - at < job->gathered ? job->num_keys - at : job->gathered;
        ssize_t bytes = (ssize_t)count * KEY_BYTES;
        for (int i = 0; i < count; i++)
            parts[i] = (struct iovec){keys[at + i], KEY_BYTES};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)count};
        if (move(socket, &message, move == recvmsg ? MSG_WAITALL : MSG_NOSIGNAL) != bytes)
            fail("a connection is lost");
    }
}

static char **make_keys(int count, int fill)
{
    char **keys = malloc(sizeof *keys * (size_t)count);
    for (int key = 0; key < count; key++) {
        keys[key] = malloc(KEY_BYTES);
        memset(keys[key], fill, KEY_BYTES);
    }
    return keys;
}

/* Each worker begins with another server and each server with another worker, so that all are
 * busy; a server answers when it has everything of both workers. */
static void small_server(const void *argument, int server)
{
    const small_job *job = argument;
    char **stored[WORKERS];
    for (int i = 0; i < WORKERS; i++)
        stored[i] = make_keys(job->num_keys, 0);
    int calls = server < job->num_servers ? job->calls : 0;
    for (int rep = 0; rep < num_reps; rep++) {
        meet();
        for (int call = 0; call < calls; call++) {
            for (int i = 0; i < WORKERS; i++)
                transfer(job, recvmsg, job->server_ends[(server + i) % WORKERS][server], stored[i]);
            for (int i = 0; i < WORKERS; i++)
                transfer(job, send_message, job->server_ends[(server + i) % WORKERS][server],
                         stored[0]);
        }
    }
}

static void small_worker(const void *argument, int worker)
{
    const small_job *job = argument;
    char **values[SERVERS], **outs[SERVERS];
    for (int i = 0; i < job->num_servers; i++) {
        values[i] = make_keys(job->num_keys, worker + 1);
        outs[i] = make_keys(job->num_keys, 0);
    }
    for (int rep = 0; rep < num_reps; rep++) {
        meet();
        double begin = now();
        for (int call = 0; call < job->calls; call++) {
            for (int i = 0; i < job->num_servers; i++) {
                int server = (worker + i) % job->num_servers;
                transfer(job, send_message, job->worker_ends[worker][server], values[server]);
            }
            for (int i = 0; i < job->num_servers; i++) {
                int server = (worker + i) % job->num_servers;
                transfer(job, recvmsg, job->worker_ends[worker][server], outs[server]);
            }
        }
        shared->times[worker][rep] = (now() - begin) / job->calls;
    }
    for (int server = 0; server < job->num_servers; server++)
        for (int key = 0; key < job->num_keys; key++)
            if (outs[server][key][KEY_BYTES - 1] != server % WORKERS + 1)
                fail("wrong bytes arrived");
}

static void connect_ends(small_job *job)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t size = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    if (bind(listener, (struct sockaddr *)&address, size) != 0 || listen(listener, 1) != 0 ||
        getsockname(listener, (struct sockaddr *)&address, &size) != 0)
        fail("no socket");
    for (int w = 0; w < WORKERS; w++)
        for (int s = 0; s < SERVERS; s++) {
            int near = socket(AF_INET, SOCK_STREAM, 0), far = -1;
            if (connect(near, (struct sockaddr *)&address, size) != 0 ||
                (far = accept(listener, NULL, NULL)) < 0)
                fail("no connection");
            setsockopt(near, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
            setsockopt(far, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
            job->worker_ends[w][s] = near;
            job->server_ends[w][s] = far;
        }
    close(listener);
}

static double small(small_job job)
{
    make_meeting();
    connect_ends(&job);
    double seconds = run_processes(small_worker, small_server, &job);
    for (int w = 0; w < WORKERS; w++)
        for (int s = 0; s < SERVERS; s++) {
            close(job.worker_ends[w][s]);
            close(job.server_ends[w][s]);
        }
    return seconds;
}

static double pushpull_4kib(void)
{
    return small((small_job){.num_servers = 1, .num_keys = 1, .gathered = 1, .calls = 500});
}

static double list_1000x4kib(void)
{
    static const int gathered[] = {1, 16, 100, MAX_GATHERED};
    double best = 1e9;
    for (size_t way = 0; way < sizeof gathered / sizeof gathered[0]; way++) {
        double seconds = small((small_job){.num_servers = SERVERS,
                                           .num_keys = LIST_KEYS / SERVERS,
                                           .gathered = gathered[way],
                                           .calls = 5});
        if (seconds < best)
            best = seconds;
    }
    return best / LIST_KEYS;
}

static const named_job jobs[] = {
    {"push_pull_64MiB", push_pull_64mib,
     "process_vm_readv: 32 MiB from each worker to each server and back"},
    {"resnet50", resnet50, "the same for 161 keys of 102 MB, a call a key"},
    {"pushpull_4KiB", pushpull_4kib,
     "TCP: 4 KiB from both workers to one server, then back to both"},
    {"list_1000x4KiB", list_1000x4kib,
     "TCP: 500 keys of 4 KiB from each worker to each server, then back; seconds of one key"},
};

int main(int argc, char **argv)
{
    return run_jobs(argc, argv, jobs, sizeof jobs / sizeof jobs[0]);
}
