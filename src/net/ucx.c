/* The place of the UCX transport in a build without it. */
#include "net/internal.h"

static kv_status_t open_none(kv_net_t *net, const kv_net_config_t *config)
{
    (void)net;
    (void)config;
    return kv_fail(KV_NOT_BUILT, "this build of kvstore has no UCX: install libucx-cu12 and build "
                                 "kvstore again");
}

const kv_transport_t kv_transport_ucx = {.name = "ucx", .open = open_none};
