/* Finds libucp, checks its version, fills the table of its functions, makes contexts with our
 * settings, and writes and checks addresses. The library is never closed: UCX patches functions of
 * the C library in memory, and its threads may still run. */
#ifdef KV_WITH_UCX

#include "net/ucx_load.h"
#include "base/memory.h"
#include "base/thread.h"
#include "net/ucx_sockets.h"
#include <dlfcn.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SONAME "libucp.so.0"

static kv_mutex_t lock = KV_MUTEX_INIT(KV_RANK_LEAF);
static kv_ucx_t table;
static bool loaded;
static uint64_t generation;

/* A copy that another module has brought is taken: two in one process would patch the same
 * functions of the C library. */
static void *open_library(const char *folder, bool *is_shared)
{
    int how = RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE;
    void *library = dlopen(SONAME, how | RTLD_NOLOAD);
    *is_shared = library != NULL;
    if (library != NULL || folder == NULL)
        return library != NULL ? library : dlopen(SONAME, how);
    /* What libucp needs stands beside it. A library's own search path cannot be trusted with that,
     * but one that is loaded is found by its name. */
    static const char *const names[] = {"libucm.so.0", "libucs.so.0", "libuct.so.0", SONAME};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        char path[PATH_MAX];
        if (snprintf(path, sizeof(path), "%s/%s", folder, names[i]) >= (int)sizeof(path))
            return NULL;
        library = dlopen(path, how);
    }
    return library;
}

/* What goes wrong is told by statuses. UCX would write to standard output that a peer is gone. */
static void make_quiet(void *library)
{
    ucs_status_t (*set)(const char *name, const char *value);
    void *symbol = dlsym(library, "ucs_global_opts_set_value");
    memcpy(&set, &symbol, sizeof(symbol));
    if (symbol != NULL && getenv("UCX_LOG_LEVEL") == NULL)
        (void)set("LOG_LEVEL", "fatal");
}

static kv_status_t fill(void *library, kv_ucx_t *out)
{
    kv_ucx_t found;
    const char *missing = NULL;
#define FIND(name)                                                                                 \
    do {                                                                                           \
        void *symbol = dlsym(library, #name);                                                      \
        memcpy(&found.name, &symbol, sizeof(symbol));                                              \
        if (symbol == NULL)                                                                        \
            missing = #name;                                                                       \
    } while (0);
    KV_UCX_LIST(FIND)
#undef FIND
    unsigned major = 0;
    unsigned minor = 0;
    unsigned patch = 0;
    if (found.ucp_get_version != NULL)
        found.ucp_get_version(&major, &minor, &patch);
    if (missing != NULL || major != KV_UCX_MAJOR || minor < KV_UCX_MINOR)
        return kv_fail(KV_NOT_BUILT,
                       "UCX %u.%u of this machine is not of the versions from %d.%d that are "
                       "needed%s%s: pip install 'mlkvstore[dist]'",
                       major, minor, KV_UCX_MAJOR, KV_UCX_MINOR,
                       missing == NULL ? "" : ", it lacks ", missing == NULL ? "" : missing);
    *out = found;
    return KV_OK;
}

static kv_status_t load_locked(const char *folder)
{
    if (loaded && generation != kv_fork_generation())
        return kv_fail(KV_NOT_BUILT, "UCX does not work in a process forked from one that has used "
                                     "it: start that process anew (spawn)");
    if (loaded)
        return KV_OK;
    kv_ucx_signals_t signals;
    kv_ucx_signals_keep(&signals);
    bool is_shared = false;
    void *library = open_library(folder, &is_shared);
    kv_ucx_signals_restore(&signals);
    if (library == NULL) {
        const char *why = dlerror();
        return kv_fail(KV_NOT_BUILT,
                       "UCX is not on this machine: pip install 'mlkvstore[dist]' (%s)",
                       why == NULL ? SONAME " was not found" : why);
    }
    KV_TRY(fill(library, &table));
    if (!is_shared)
        make_quiet(library);
    generation = kv_fork_generation();
    loaded = true;
    return KV_OK;
}

kv_status_t kv_ucx_load(const char *folder, const kv_ucx_t **out)
{
    kv_mutex_lock(&lock);
    kv_status_t status = load_locked(folder);
    kv_mutex_unlock(&lock);
    if (status == KV_OK)
        *out = &table;
    return status;
}

void kv_ucx_signals_keep(kv_ucx_signals_t *signals)
{
    for (int number = 1; number < 32; number++)
        sigaction(number, NULL, &signals->handlers[number]);
}

void kv_ucx_signals_restore(const kv_ucx_signals_t *signals)
{
    for (int number = 1; number < 32; number++) {
        struct sigaction now;
        const struct sigaction *before = &signals->handlers[number];
        /* The handler's place in this union is the same for both of its types. */
        if (sigaction(number, NULL, &now) == 0 && now.sa_handler != before->sa_handler)
            sigaction(number, before, NULL);
    }
}

void kv_ucx_names(char *text, const char *mark, const char *until, char *out, size_t bytes)
{
    size_t used = 0;
    out[0] = '\0';
    char *rest = NULL;
    for (char *line = strtok_r(text, "\n", &rest); line != NULL;
         line = strtok_r(NULL, "\n", &rest)) {
        char *name = strstr(line, mark);
        name = name == NULL ? NULL : strstr(name + strlen(mark), until);
        if (name == NULL)
            continue;
        name += strlen(until);
        name += strspn(name, " 0123456789:"); /* the number of a lane's resource */
        size_t length = strcspn(name, " ");
        size_t path = length; /* ".0": one of several paths of a device */
        while (path > 0 && '0' <= name[path - 1] && name[path - 1] <= '9')
            path--;
        if (0 < path && path < length && name[path - 1] == '.')
            length = path - 1;
        int added =
            snprintf(out + used, bytes - used, "%s%.*s", used == 0 ? "" : " ", (int)length, name);
        if (added < 0 || (size_t)added >= bytes - used)
            return;
        used += (size_t)added;
    }
}

/* Sets what the user has not set by KVSTORE_UCX_<name>; UCX_<name> is for the process's other users
 * of UCX. Versions spell a transport's settings with its name (from 1.18) or without, and the older
 * ones take the long name and ignore it: both are set. */
static kv_status_t set_one(const kv_ucx_t *ucx, ucp_config_t *config, const char *transport,
                           const char *name, const char *value)
{
    const char *const prefixes[] = {transport, ""};
    bool taken = false;
    for (int i = transport[0] == '\0'; i < 2; i++) {
        char full[64];
        snprintf(full, sizeof(full), "KVSTORE_UCX_%s%s", prefixes[i], name);
        taken |= getenv(full) != NULL ||
                 ucx->ucp_config_modify(config, full + strlen("KVSTORE_UCX_"), value) == UCS_OK;
    }
    if (taken)
        return KV_OK;
    return kv_fail(KV_INVALID, "UCX does not take the setting %s%s=%s", transport, name, value);
}

/* The older way to choose protocols leaves cma unused here, the newer one has nothing fast for tcp
 * between worker addresses; and 1.13 ends the process when a message comes before the connection is
 * up. */
static bool chooses_copies(const kv_ucx_t *ucx)
{
    unsigned major = 0, minor = 0, patch = 0;
    ucx->ucp_get_version(&major, &minor, &patch);
    return major > 1 || minor >= 18;
}

static kv_status_t set_all(const kv_ucx_t *ucx, ucp_config_t *ucx_config,
                           const kv_net_config_t *config)
{
    const struct {
        const char *transport, *name, *value; /* NULL: as UCX has it */
    } settings[] = {
        {"", "TLS", config->same_host_copies ? "tcp,cma" : "tcp"},
        {"", "NET_DEVICES", config->interface},
        {"", "PROTO_ENABLE", config->same_host_copies && chooses_copies(ucx) ? "y" : "n"},
        /* What a process reads out of the sender's memory pays sooner than what it asks for. */
        {"", "RNDV_THRESH", config->same_host_copies ? "64k" : "256k"},
        {"", "KEEPALIVE_INTERVAL", "1s"},
        /* Without it cma is left out where errors of peers are to be told. */
        {"CMA_", "MEMORY_INVALIDATE", config->same_host_copies ? "y" : NULL},
        {"TCP_", "PORT_RANGE", config->port_range},
        {"TCP_", "AF_PRIO", config->inet6 ? "inet6" : NULL},
    };
    for (size_t i = 0; i < sizeof(settings) / sizeof(settings[0]); i++) {
        if (settings[i].value != NULL)
            KV_TRY(set_one(ucx, ucx_config, settings[i].transport, settings[i].name,
                           settings[i].value));
    }
    return KV_OK;
}

/* UCX takes any text. */
static kv_status_t check_ports(const char *range)
{
    unsigned low = 0;
    unsigned high = 0;
    int used = -1;
    if (range == NULL || (sscanf(range, "%5u-%5u%n", &low, &high, &used) == 2 &&
                          range[used] == '\0' && 0 < low && low <= high && high <= UINT16_MAX))
        return KV_OK;
    return kv_fail(KV_INVALID, "ports are given as two numbers, \"20000-20100\", not as \"%s\"",
                   range);
}

static bool has_device(const char *names, const char *device)
{
    size_t length = strlen(device);
    for (const char *at = names; (at = strchr(at, '/')) != NULL;) {
        at++;
        if (strncmp(at, device, length) == 0 && (at[length] == ' ' || at[length] == '\0'))
            return true;
    }
    return false;
}

/* A transport that the context does not have cannot become a lane of any of its endpoints. Where
 * the network's is missing, UCX only warns. */
static kv_status_t check_transports(const kv_ucx_t *ucx, ucp_context_h context,
                                    const char *interface)
{
    char *text = NULL;
    size_t bytes = 0;
    FILE *stream = open_memstream(&text, &bytes);
    KV_TRY_ALLOC(stream, "the transports of UCX");
    ucx->ucp_context_print_info(context, stream);
    char names[1024] = "";
    if (fclose(stream) == 0)
        kv_ucx_names(text, "resource", " flags -- ", names, sizeof(names));
    free(text);
    if (strstr(names, "posix/") != NULL || strstr(names, "sysv/") != NULL ||
        strstr(names, "xpmem/") != NULL)
        return kv_fail(KV_INVALID,
                       "UCX would use shared memory (%s), where one process that is killed stops "
                       "all others: leave it out of KVSTORE_UCX_TLS",
                       names);
    if (interface != NULL && !has_device(names, interface))
        return kv_fail(KV_INVALID, "UCX finds no network interface %s here", interface);
    if (names[0] == '\0' || strcmp(names, "cma/memory") == 0)
        return kv_fail(KV_DEVICE, "UCX finds no network here");
    return KV_OK;
}

kv_status_t kv_ucx_context(const kv_ucx_t *ucx, const kv_net_config_t *config, ucp_context_h *out)
{
    KV_TRY(check_ports(config->port_range));
    ucp_config_t *settings = NULL;
    ucs_status_t made = ucx->ucp_config_read("KVSTORE", NULL, &settings);
    if (made != UCS_OK)
        return kv_fail(KV_INVALID, "UCX does not take its settings (KVSTORE_UCX_*): %s",
                       ucx->ucs_status_string(made));
    kv_status_t status = set_all(ucx, settings, config);
    ucp_context_h context = NULL;
    if (status == KV_OK) {
        ucp_params_t params = {
            .field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_ESTIMATED_NUM_EPS,
            .features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP,
            .estimated_num_eps = (size_t)config->num_peers,
        };
        /* The version that we need, not the one of the headers: UCX warns of an older one. */
        made = ucx->ucp_init_version(KV_UCX_MAJOR, KV_UCX_MINOR, &params, settings, &context);
        if (made != UCS_OK)
            status = kv_fail(config->interface != NULL ? KV_INVALID : KV_DEVICE,
                             "UCX cannot use the network interface %s: %s",
                             config->interface != NULL ? config->interface : "of this machine",
                             ucx->ucs_status_string(made));
    }
    ucx->ucp_config_release(settings);
    KV_TRY(status);
    status = check_transports(ucx, context, config->interface);
    if (status != KV_OK)
        ucx->ucp_cleanup(context);
    else
        *out = context;
    return status;
}

/* ------------------------------------------------------------------------------- addresses */

/* An address is UCX's, which it takes without a look, behind this. */
typedef struct address_head {
    char magic[8];
    uint64_t bytes; /* behind the head */
    uint64_t hash;  /* of those */
} address_head_t;

static const char address_magic[8] = "KVUCX 1";

kv_status_t kv_ucx_address(const kv_ucx_t *ucx, ucp_worker_h worker, void *out, size_t *out_bytes)
{
    ucp_address_t *own = NULL;
    size_t bytes = 0;
    ucs_status_t got = ucx->ucp_worker_get_address(worker, &own, &bytes);
    if (got != UCS_OK)
        return kv_fail(KV_DEVICE, "UCX gives no address: %s", ucx->ucs_status_string(got));
    address_head_t head = {.bytes = bytes, .hash = kv_ucx_hash(KV_UCX_HASH, own, bytes)};
    memcpy(head.magic, address_magic, sizeof(head.magic));
    bool fits = sizeof(head) + bytes <= KV_NET_ADDRESS_BYTES;
    if (fits) {
        memcpy(out, &head, sizeof(head));
        memcpy((unsigned char *)out + sizeof(head), own, bytes);
        *out_bytes = sizeof(head) + bytes;
    }
    ucx->ucp_worker_release_address(worker, own);
    if (!fits)
        return kv_fail(KV_INVALID,
                       "the address of this node has %zu bytes, %d are allowed: name one network "
                       "interface",
                       bytes, KV_NET_ADDRESS_BYTES);
    return KV_OK;
}

const ucp_address_t *kv_ucx_check_address(const void *address, size_t bytes)
{
    address_head_t head;
    if (bytes <= sizeof(head) || bytes > KV_NET_ADDRESS_BYTES)
        return NULL;
    memcpy(&head, address, sizeof(head));
    const unsigned char *own = (const unsigned char *)address + sizeof(head);
    size_t own_bytes = bytes - sizeof(head);
    if (memcmp(head.magic, address_magic, sizeof(head.magic)) != 0 || head.bytes != own_bytes ||
        head.hash != kv_ucx_hash(KV_UCX_HASH, own, own_bytes))
        return NULL;
    return (const ucp_address_t *)own;
}

#else
typedef int kv_ucx_not_in_this_build_t; /* a file may not be empty */
#endif
