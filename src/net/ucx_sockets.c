/* Finds connections by what the kernel tells of an epoll descriptor: UCX's waits for one descriptor
 * a transport, and tcp's is again an epoll descriptor, that of its sockets. Only those are looked
 * at, so no socket of somebody else is ever touched. */
#ifdef KV_WITH_UCX

#include "net/ucx_sockets.h"
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

enum { DEPTH = 2 };

typedef struct visit {
    void (*see)(struct visit *visit, int fd, uint64_t link);
    uint64_t *out;
    const uint64_t *links;
    int *fds;
    size_t num_links, count, limit;
} visit_t;

uint64_t kv_ucx_hash(uint64_t hash, const void *data, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ ((const unsigned char *)data)[i]) * UINT64_C(0x100000001b3);
    return hash;
}

/* 0 for what is no address of the internet. */
static uint64_t hash_address(const struct sockaddr_storage *address)
{
    uint64_t hash = KV_UCX_HASH;
    if (address->ss_family == AF_INET) {
        const struct sockaddr_in *v4 = (const struct sockaddr_in *)address;
        hash = kv_ucx_hash(hash, &v4->sin_addr, sizeof(v4->sin_addr));
        return kv_ucx_hash(hash, &v4->sin_port, sizeof(v4->sin_port));
    }
    if (address->ss_family != AF_INET6)
        return 0;
    const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)address;
    hash = kv_ucx_hash(hash, &v6->sin6_addr, sizeof(v6->sin6_addr));
    return kv_ucx_hash(hash, &v6->sin6_port, sizeof(v6->sin6_port));
}

static uint64_t link_of(int fd)
{
    struct sockaddr_storage here;
    struct sockaddr_storage there;
    socklen_t here_bytes = sizeof(here);
    socklen_t there_bytes = sizeof(there);
    if (getsockname(fd, (struct sockaddr *)&here, &here_bytes) != 0 ||
        getpeername(fd, (struct sockaddr *)&there, &there_bytes) != 0)
        return 0;
    uint64_t a = hash_address(&here);
    uint64_t b = hash_address(&there);
    return a == 0 || b == 0 ? 0 : a + b; /* from either end */
}

static void visit_all(visit_t *visit, int epoll_fd, int depth)
{
    char line[256];
    snprintf(line, sizeof(line), "/proc/self/fdinfo/%d", epoll_fd);
    FILE *file = fopen(line, "re");
    if (file == NULL)
        return;
    while (fgets(line, sizeof(line), file) != NULL) {
        int fd = -1;
        if (sscanf(line, "tfd: %d", &fd) != 1)
            continue;
        uint64_t link = link_of(fd);
        if (link != 0)
            visit->see(visit, fd, link);
        else if (depth > 1)
            visit_all(visit, fd, depth - 1);
    }
    fclose(file);
}

static void note(visit_t *visit, int fd, uint64_t link)
{
    (void)fd;
    if (visit->count < visit->limit)
        visit->out[visit->count++] = link;
}

static void cut(visit_t *visit, int fd, uint64_t link)
{
    for (size_t i = 0; i < visit->num_links; i++) {
        if (visit->links[i] == link && shutdown(fd, SHUT_RDWR) == 0)
            visit->count++;
    }
}

size_t kv_ucx_sockets_list(int epoll_fd, uint64_t *out, size_t room)
{
    visit_t visit = {.see = note, .out = out, .limit = room};
    visit_all(&visit, epoll_fd, DEPTH);
    return visit.count;
}

static void note_fd(visit_t *visit, int fd, uint64_t link)
{
    for (size_t i = 0; i < visit->num_links; i++) {
        if (visit->links[i] == link && visit->count < visit->limit)
            visit->fds[visit->count++] = fd;
    }
}

size_t kv_ucx_sockets_find(int epoll_fd, const uint64_t *links, size_t num_links, int *fds,
                           size_t room)
{
    visit_t visit = {
        .see = note_fd, .links = links, .num_links = num_links, .fds = fds, .limit = room};
    if (num_links > 0)
        visit_all(&visit, epoll_fd, DEPTH);
    return visit.count;
}

bool kv_ucx_sockets_ended(const int *fds, size_t count)
{
    struct pollfd polled[KV_UCX_MAX_LINKS];
    for (size_t i = 0; i < count; i++)
        polled[i] = (struct pollfd){.fd = fds[i], .events = POLLRDHUP};
    return count > 0 && poll(polled, (nfds_t)count, 0) > 0;
}

size_t kv_ucx_sockets_cut(int epoll_fd, const uint64_t *links, size_t num_links)
{
    visit_t visit = {.see = cut, .links = links, .num_links = num_links};
    if (num_links > 0)
        visit_all(&visit, epoll_fd, DEPTH);
    return visit.count;
}

#else
typedef int kv_ucx_sockets_not_in_this_build_t; /* a file may not be empty */
#endif
