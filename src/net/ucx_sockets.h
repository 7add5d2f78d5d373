/* The sockets beneath an endpoint of UCX, which has no call that closes a connection at once.
 *
 * Its forced close leaves the socket of a living peer half open until that peer has answered, and
 * UCX (to 1.22) reads freed memory when the answer comes while bytes still wait to be sent: a peer
 * that stood still, was given up, and goes on, would kill its server. So a connection is cut at its
 * socket, which UCX then takes for the death of the peer, on both sides and safely.
 *
 * Which socket leads to which peer UCX does not tell either. Both ends of a connection have the
 * same two addresses: each node tells its peers all that it has, and what a peer has too is theirs.
 */
#ifndef KV_NET_UCX_SOCKETS_H
#define KV_NET_UCX_SOCKETS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { KV_UCX_MAX_SOCKETS = 4096, KV_UCX_MAX_LINKS = 4 };

/* Goes on with a hash that begins with KV_UCX_HASH (FNV-1a). */
#define KV_UCX_HASH UINT64_C(0xcbf29ce484222325)
uint64_t kv_ucx_hash(uint64_t hash, const void *data, size_t bytes);

/* Gives a number for each connection beneath an epoll descriptor of UCX, the same at both ends; 0
 * where the system does not tell. */
size_t kv_ucx_sockets_list(int epoll_fd, uint64_t *out, size_t room);

/* Gives the descriptors of these connections, good until UCX tells that the session has failed. */
size_t kv_ucx_sockets_find(int epoll_fd, const uint64_t *links, size_t num_links, int *fds,
                           size_t room);
/* Whether the other side, or this one, has ended one of these connections. */
bool kv_ucx_sockets_ended(const int *fds, size_t count);

/* Ends these connections in both directions; gives how many were found. */
size_t kv_ucx_sockets_cut(int epoll_fd, const uint64_t *links, size_t num_links);

#endif
