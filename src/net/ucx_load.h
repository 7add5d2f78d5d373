/* UCX at run time: its functions in a table, filled from a library that is opened when the first
 * endpoint needs it, and contexts with our settings. Nothing links UCX, so one build serves
 * machines with it and without. */
#ifndef KV_NET_UCX_LOAD_H
#define KV_NET_UCX_LOAD_H

#include "net/net.h"
#include <signal.h>
#include <ucp/api/ucp.h>

/* What we use of UCX: 1.13 has all of it. */
#define KV_UCX_LIST(X)                                                                             \
    X(ucp_get_version)                                                                             \
    X(ucp_config_read)                                                                             \
    X(ucp_config_modify)                                                                           \
    X(ucp_config_release)                                                                          \
    X(ucp_init_version)                                                                            \
    X(ucp_cleanup)                                                                                 \
    X(ucp_context_print_info)                                                                      \
    X(ucp_worker_create)                                                                           \
    X(ucp_worker_destroy)                                                                          \
    X(ucp_worker_get_address)                                                                      \
    X(ucp_worker_release_address)                                                                  \
    X(ucp_worker_get_efd)                                                                          \
    X(ucp_worker_arm)                                                                              \
    X(ucp_worker_signal)                                                                           \
    X(ucp_worker_progress)                                                                         \
    X(ucp_worker_set_am_recv_handler)                                                              \
    X(ucp_ep_create)                                                                               \
    X(ucp_ep_close_nbx)                                                                            \
    X(ucp_ep_print_info)                                                                           \
    X(ucp_am_send_nbx)                                                                             \
    X(ucp_am_recv_data_nbx)                                                                        \
    X(ucp_request_free)                                                                            \
    X(ucs_status_string)

enum { KV_UCX_MAJOR = 1, KV_UCX_MINOR = 13 };

typedef struct kv_ucx {
#define KV_UCX_MEMBER(name) __typeof__(name) *name;
    KV_UCX_LIST(KV_UCX_MEMBER)
#undef KV_UCX_MEMBER
} kv_ucx_t;

/* Gives the table, the same for the whole process: what was loaded first stays, whatever folder is
 * named later. `folder` may be NULL: the system's loader searches. KV_NOT_BUILT says what to
 * install. */
KV_MUST_CHECK kv_status_t kv_ucx_load(const char *folder, const kv_ucx_t **out);

/* Gives a context that has our settings, those of the user before them (KVSTORE_UCX_*), and none of
 * the transports that are refused. */
KV_MUST_CHECK kv_status_t kv_ucx_context(const kv_ucx_t *ucx, const kv_net_config_t *config,
                                         ucp_context_h *out);

/* Gives the address of a worker, in KV_NET_ADDRESS_BYTES. */
KV_MUST_CHECK kv_status_t kv_ucx_address(const kv_ucx_t *ucx, ucp_worker_h worker, void *out,
                                         size_t *out_bytes);

/* UCX's part of such an address; NULL when it is none, which UCX itself would not notice. */
const ucp_address_t *kv_ucx_check_address(const void *address, size_t bytes);

/* What UCX prints about itself is the only way to learn its transports. Gives the names in the text
 * (which is changed): of each line with `mark` the word behind the next `until`, its number left
 * out, a space between two: "tcp/lo cma/memory". */
void kv_ucx_names(char *text, const char *mark, const char *until, char *out, size_t bytes);

/* UCX takes over handlers of signals when its library is loaded or first used: those of crashes,
 * which belong to Python's faulthandler and to core dumps, and SIGHUP. Between these calls the
 * process's handlers are kept and given back. */
typedef struct kv_ucx_signals {
    struct sigaction handlers[32]; /* by number, of the standard ones */
} kv_ucx_signals_t;

void kv_ucx_signals_keep(kv_ucx_signals_t *signals);
void kv_ucx_signals_restore(const kv_ucx_signals_t *signals);

#endif
