/* kvstore._core.Node: this process's place on the data plane: an endpoint with a client or a server
 * behind it. The control plane (kvstore/cluster) makes it, tells it its peers and that one is gone.
 *
 * Handlers of the endpoint run in its own thread and never see Python.
 */
#include "py/node.h"

#include "py/store.h"
#include "py/updating.h"

typedef struct kv_py_node {
    PyObject_HEAD
    kv_state_t *state;
    kv_net_t *net;
    kv_client_t *client; /* of a worker */
    kv_server_t *server; /* of a server */
    int32_t num_workers, num_servers, self;
    uint64_t generation;
    bool closed;
    kv_py_updating_t updating; /* of a server */
} kv_py_node_t;

static kv_py_node_t *as_node(PyObject *object)
{
    return (kv_py_node_t *)object;
}

kv_client_t *kv_py_node_client(kv_state_t *state, PyObject *object)
{
    return Py_IS_TYPE(object, state->node_type) ? as_node(object)->client : NULL;
}

static bool check_open(kv_py_node_t *self)
{
    if (self->generation == kv_fork_generation() && !self->closed)
        return true;
    kv_py_fail(self->state, KV_CLOSED,
               self->closed ? "the node is closed"
                            : "the node belongs to the parent of this forked process");
    return false;
}

/* ------------------------------------------------------------------------ making and ending */

static kv_status_t open_worker(kv_py_node_t *self, int rank)
{
    kv_client_config_t config = {
        .rank = rank, .num_workers = self->num_workers, .num_servers = self->num_servers};
    return kv_client_new(&config, &self->client);
}

static kv_status_t open_server(kv_py_node_t *self, const kv_runtime_t *runtime, int rank,
                               bool asynchronous, int num_threads)
{
    kv_server_config_t config = {
        .engine = runtime->engine,
        .host = {.kernels = runtime->kernels,
                 .team = runtime->team,
                 .num_threads = num_threads > 0 ? num_threads : runtime->num_threads},
        .index = rank,
        .num_workers = self->num_workers,
        .num_servers = self->num_servers,
        .async = asynchronous};
    return kv_server_new(&config, &self->server);
}

static kv_status_t open_net(kv_py_node_t *self, const kv_net_config_t *config)
{
    kv_net_handlers_t handlers =
        self->client != NULL ? kv_client_handlers(self->client) : kv_server_handlers(self->server);
    KV_TRY(kv_net_open(config, &handlers, &self->net));
    if (self->client != NULL)
        kv_client_attach(self->client, self->net);
    else
        kv_server_attach(self->server, self->net);
    return KV_OK;
}

/* Detached: ends the sessions, then what stands on them. */
static void close_node(kv_py_node_t *self)
{
    if (self->net != NULL)
        kv_net_close(self->net);
    if (self->client != NULL)
        kv_client_close(self->client);
    if (self->server != NULL)
        kv_server_stop(self->server);
}

static PyObject *node_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    /* Without a session there are no bytes of one, which is refused below. */
    static const char *const names[] = {
        "role",        "rank",    "num_workers", "num_servers", "session",          "asynchronous",
        "transport",   "library", "interface",   "port_range",  "same_host_copies", "inet6",
        "num_threads", "seed",    "faults",      NULL};
    kv_state_t *state = PyType_GetModuleState(type);
    const char *role, *session = NULL;
    Py_ssize_t session_bytes = 0;
    int rank, num_workers, num_servers, asynchronous = 0, copies = 0, inet6 = 0, num_threads = 0;
    unsigned long long seed = 0;
    kv_net_config_t config = {.transport = "ucx"};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "siii|$y#pszzzppiKz:Node", (char **)names,
                                     &role, &rank, &num_workers, &num_servers, &session,
                                     &session_bytes, &asynchronous, &config.transport,
                                     &config.library, &config.interface, &config.port_range,
                                     &copies, &inet6, &num_threads, &seed, &config.faults))
        return NULL;
    bool server = strcmp(role, "server") == 0;
    if (num_servers == 0)
        return kv_py_fail(state, KV_INVALID,
                          "a dist store needs servers, and this cluster has none: start it with "
                          "one or more (num_servers=, kvrun -s), or create('nccl')");
    if ((!server && strcmp(role, "worker") != 0) || num_workers < 1 || num_servers < 1 ||
        rank < 0 || rank >= (server ? num_servers : num_workers) ||
        session_bytes != KV_NET_SESSION_BYTES)
        return kv_py_fail(state, KV_INVALID,
                          "a node is worker or server %d of %d workers and %d servers with a "
                          "session of %d bytes; this one is not",
                          rank, num_workers, num_servers, KV_NET_SESSION_BYTES);
    kv_runtime_t *runtime = kv_py_runtime(state);
    if (runtime == NULL)
        return NULL;
    kv_py_node_t *self = (kv_py_node_t *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->state = state;
    self->generation = kv_fork_generation();
    self->num_workers = num_workers;
    self->num_servers = num_servers;
    self->self = server ? kv_node_of_server(num_workers, rank) : rank;
    memcpy(config.session, session, KV_NET_SESSION_BYTES);
    config.self = self->self;
    config.num_peers = num_workers + num_servers;
    config.same_host_copies = copies;
    config.inet6 = inet6;
    config.seed = seed;
    kv_status_t status;
    Py_BEGIN_ALLOW_THREADS status =
        server ? open_server(self, runtime, rank, asynchronous, num_threads)
               : open_worker(self, rank);
    if (status == KV_OK)
        status = open_net(self, &config);
    Py_END_ALLOW_THREADS if (status == KV_OK) return (PyObject *)self;
    kv_py_raise(state, status);
    Py_DECREF(self);
    return NULL;
}

static void node_dealloc(PyObject *object)
{
    kv_py_node_t *self = as_node(object);
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    kv_py_updating_drop(&self->updating, self->generation == kv_fork_generation());
    /* In a forked child the locks may have been held by threads that are not there any more. */
    if (self->generation == kv_fork_generation()) {
        Py_BEGIN_ALLOW_THREADS close_node(self);
        kv_net_free(self->net);
        if (self->client != NULL)
            kv_client_free(self->client);
        if (self->server != NULL)
            kv_server_free(self->server);
        Py_END_ALLOW_THREADS
    }
    type->tp_free(object);
    Py_DECREF(type);
}

static int node_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    return 0;
}

static PyObject *node_close(PyObject *object, PyObject *unused)
{
    (void)unused;
    kv_py_node_t *self = as_node(object);
    if (self->generation != kv_fork_generation() || self->closed)
        Py_RETURN_NONE;
    self->closed = true;
    Py_BEGIN_ALLOW_THREADS close_node(self);
    Py_END_ALLOW_THREADS kv_py_release_now();
    Py_RETURN_NONE;
}

/* ----------------------------------------------------------------------------------- peers */

static PyObject *node_address(PyObject *object, PyObject *unused)
{
    (void)unused;
    unsigned char address[KV_NET_ADDRESS_BYTES];
    size_t bytes;
    if (!check_open(as_node(object)))
        return NULL;
    kv_net_address(as_node(object)->net, address, &bytes);
    return PyBytes_FromStringAndSize((const char *)address, (Py_ssize_t)bytes);
}

static PyObject *node_connect(PyObject *object, PyObject *peers)
{
    kv_py_node_t *self = as_node(object);
    if (!check_open(self))
        return NULL;
    PyObject *items = PySequence_Fast(peers, "peers is a list of (number, name, address)");
    if (items == NULL)
        return NULL;
    kv_status_t status = KV_OK;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items) && status == KV_OK; i++) {
        int number;
        const char *name, *address;
        Py_ssize_t bytes;
        PyObject *item = PySequence_Fast_GET_ITEM(items, i);
        if (!PyTuple_Check(item)) {
            PyErr_SetString(PyExc_TypeError, "peers is a list of (number, name, address)");
            break;
        }
        if (!PyArg_ParseTuple(item, "isy#", &number, &name, &address, &bytes))
            break;
        if (number < 0 || number >= self->num_workers + self->num_servers)
            status = kv_fail(KV_INVALID, "%s has number %d; there are %d nodes", name, number,
                             self->num_workers + self->num_servers);
        else
            status = kv_net_connect(self->net, number, name, address, (size_t)bytes);
    }
    Py_DECREF(items);
    if (PyErr_Occurred())
        return NULL;
    return status == KV_OK ? Py_NewRef(Py_None) : kv_py_raise(self->state, status);
}

/* Runs a wait of the endpoint within a timeout from Python. */
static PyObject *wait_for(PyObject *object, PyObject *timeout,
                          kv_status_t (*wait)(kv_py_node_t *self, kv_caller_t *caller))
{
    kv_py_node_t *self = as_node(object);
    kv_py_caller_t caller;
    int64_t timeout_ns;
    if (!check_open(self) ||
        !kv_py_timeout(self->state, timeout, KV_PY_DEFAULT_TIMEOUT_NS, &timeout_ns))
        return NULL;
    kv_py_caller_init(&caller, timeout_ns);
    kv_status_t status = wait(self, &caller.base);
    kv_caller_attach(&caller.base);
    return status == KV_OK ? Py_NewRef(Py_None) : kv_py_raise(self->state, status);
}

static kv_status_t wait_ready(kv_py_node_t *self, kv_caller_t *caller)
{
    return kv_net_wait_ready(self->net, caller);
}

static PyObject *node_wait_ready(PyObject *self, PyObject *timeout)
{
    return wait_for(self, timeout, wait_ready);
}

static kv_status_t wait_alone(kv_py_node_t *self, kv_caller_t *caller)
{
    return kv_net_wait_alone(self->net, self->num_workers, caller);
}

static PyObject *node_wait_alone(PyObject *self, PyObject *timeout)
{
    return wait_for(self, timeout, wait_alone);
}

static PyObject *node_lose(PyObject *object, PyObject *why)
{
    kv_py_node_t *self = as_node(object);
    const char *text = PyUnicode_AsUTF8(why);
    if (text == NULL)
        return NULL;
    if (self->generation != kv_fork_generation() || self->closed)
        Py_RETURN_NONE;
    Py_BEGIN_ALLOW_THREADS if (self->client != NULL) kv_client_lose(self->client, text);
    else kv_server_lose(self->server, text);
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

static PyObject *node_left(PyObject *object, PyObject *args)
{
    kv_py_node_t *self = as_node(object);
    int rank, finished;
    if (!PyArg_ParseTuple(args, "ip:left", &rank, &finished))
        return NULL;
    if (rank < 0 || rank >= self->num_workers)
        return kv_py_fail(self->state, KV_INVALID, "there is no worker %d", rank);
    if (self->generation != kv_fork_generation() || self->closed || self->server == NULL)
        Py_RETURN_NONE;
    Py_BEGIN_ALLOW_THREADS kv_server_left(self->server, rank, finished);
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

static PyObject *node_drain(PyObject *object, PyObject *timeout)
{
    kv_py_node_t *self = as_node(object);
    kv_py_caller_t caller;
    int64_t timeout_ns;
    if (self->closed || self->client == NULL)
        Py_RETURN_NONE;
    if (!check_open(self) ||
        !kv_py_timeout(self->state, timeout, KV_PY_DEFAULT_TIMEOUT_NS, &timeout_ns))
        return NULL;
    kv_py_caller_init(&caller, timeout_ns);
    kv_status_t status = kv_client_drain(self->client, &caller.base);
    kv_caller_attach(&caller.base);
    return status == KV_OK ? Py_NewRef(Py_None) : kv_py_raise(self->state, status);
}

/* ------------------------------------------------------------------------------- optimizers */

static PyObject *node_add_optimizer(PyObject *object, PyObject *args)
{
    kv_py_node_t *self = as_node(object);
    unsigned long long number;
    long long begin, training;
    PyObject *name, *numbers, *flags;
    const kv_optim_class_t *optim;
    kv_optim_numbers_t parsed;
    if (!check_open(self) ||
        !PyArg_ParseTuple(args, "KOO!O!LL", &number, &name, &PyDict_Type, &numbers, &PyDict_Type,
                          &flags, &begin, &training) ||
        !kv_py_optimizer_read(self->state, name, numbers, flags, begin, &optim, &parsed))
        return NULL;
    if (self->server == NULL || number == 0)
        return kv_py_fail(self->state, KV_INVALID,
                          "optimizers are given to servers, by a number that is not 0");
    kv_status_t status;
    Py_BEGIN_ALLOW_THREADS status =
        kv_server_add_optimizer(self->server, number, training, optim, &parsed);
    Py_END_ALLOW_THREADS return status == KV_OK ? Py_NewRef(Py_None)
                                                : kv_py_raise(self->state, status);
}

static bool check_server(kv_py_node_t *self)
{
    if (!check_open(self))
        return false;
    if (self->server == NULL)
        kv_py_fail(self->state, KV_INVALID, "updates are a server's");
    return self->server != NULL;
}

static PyObject *node_next_update(PyObject *object, PyObject *timeout)
{
    kv_py_node_t *self = as_node(object);
    int64_t timeout_ns;
    if (!check_server(self) ||
        !kv_py_timeout(self->state, timeout, KV_PY_DEFAULT_TIMEOUT_NS, &timeout_ns))
        return NULL;
    return kv_py_updating_next(self->state, self->server, timeout_ns, &self->updating);
}

static PyObject *node_end_update(PyObject *object, PyObject *args)
{
    kv_py_node_t *self = as_node(object);
    PyObject *failure, *kept, *stored;
    if (!PyArg_ParseTuple(args, "OOO:end_update", &failure, &kept, &stored))
        return NULL;
    /* Also of one that was closed meanwhile: it has memory to give back. */
    if (self->generation != kv_fork_generation() || self->server == NULL) {
        (void)check_server(self); /* raises what it is */
        return NULL;
    }
    return kv_py_updating_end(self->state, self->server, failure, kept, stored, &self->updating);
}

static PyObject *node_wake(PyObject *object, PyObject *unused)
{
    (void)unused;
    kv_py_node_t *self = as_node(object);
    if (self->generation == kv_fork_generation() && !self->closed && self->server != NULL) {
        Py_BEGIN_ALLOW_THREADS kv_server_wake(self->server);
        Py_END_ALLOW_THREADS
    }
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------- figures */

static PyObject *node_counters(PyObject *object, PyObject *unused)
{
    (void)unused;
    kv_py_node_t *self = as_node(object);
    if (self->generation != kv_fork_generation())
        return check_open(self) ? NULL : NULL;
    kv_net_counters_t net;
    kv_server_counters_t server = {0};
    kv_net_counters(self->net, &net);
    if (self->server != NULL)
        kv_server_counters(self->server, &server);
    return Py_BuildValue("{s:K,s:K,s:K,s:K,s:K,s:L,s:L,s:L,s:L,s:L}", "messages_sent",
                         (unsigned long long)net.messages_sent, "bytes_sent",
                         (unsigned long long)net.bytes_sent, "messages_received",
                         (unsigned long long)net.messages_received, "bytes_received",
                         (unsigned long long)net.bytes_received, "sleeps",
                         (unsigned long long)net.sleeps, "keys", (long long)server.keys, "slices",
                         (long long)server.slices, "value_bytes", (long long)server.value_bytes,
                         "rounds", (long long)server.rounds, "waiting", (long long)server.waiting);
}

static PyObject *node_lanes(PyObject *object, PyObject *number)
{
    kv_py_node_t *self = as_node(object);
    char text[256];
    long peer = PyLong_AsLong(number);
    if ((peer == -1 && PyErr_Occurred()) || !check_open(self))
        return NULL;
    if (peer < 0 || peer >= self->num_workers + self->num_servers)
        return kv_py_fail(self->state, KV_INVALID, "there is no node %ld", peer);
    kv_net_lanes(self->net, (int32_t)peer, text, sizeof text);
    return PyUnicode_FromString(text);
}

static PyObject *node_repr(PyObject *object)
{
    kv_py_node_t *self = as_node(object);
    bool server = self->server != NULL;
    return PyUnicode_FromFormat(
        "<kvstore._core.Node %s %d of %d workers and %d servers%s>", server ? "server" : "worker",
        (int)(self->self - (server ? self->num_workers : 0)), (int)self->num_workers,
        (int)self->num_servers, self->closed ? ", closed" : "");
}

static PyMethodDef METHODS[] = {
    {"address", node_address, METH_NOARGS,
     "address($self, /)\n--\n\nWhat other nodes need to connect."},
    {"connect", node_connect, METH_O,
     "connect($self, peers, /)\n--\n\nBegin to connect peers: (number, name, address)."},
    {"wait_ready", node_wait_ready, METH_O,
     "wait_ready($self, timeout, /)\n--\n\nWait until all connected peers have greeted."},
    {"wait_alone", node_wait_alone, METH_O,
     "wait_alone($self, timeout, /)\n--\n\n"
     "Wait until all sessions with workers have ended, or the time is over."},
    {"lose", node_lose, METH_O,
     "lose($self, why, /)\n--\n\nFail every call from now on with PeerLostError(why)."},
    {"left", node_left, METH_VARARGS,
     "left($self, rank, finished, /)\n--\n\n"
     "On a server: a worker leaves; what needs more of it fails.\n\n"
     "`finished`: all its calls have been answered. Else it has left when its session ends."},
    {"drain", node_drain, METH_O,
     "drain($self, timeout, /)\n--\n\n"
     "Wait until every call of this worker has its answers; PeerLostError if a server is lost "
     "then."},
    {"add_optimizer", node_add_optimizer, METH_VARARGS,
     "add_optimizer($self, number, kind, numbers, flags, begin_num_update, training, /)\n--\n\n"
     "On a server: let pushes name an optimizer by this number; kind: a built-in one, or\n"
     "'module:class'."},
    {"next_update", node_next_update, METH_O,
     "next_update($self, timeout, /)\n--\n\n"
     "On a server: the next round that an optimizer in Python is to end, or None: the time is\n"
     "over, `wake` was called, or the node closes.\n\n"
     "(optimizer's number, key, recv, stored, rate, t, num_update, what was kept or None,\n"
     "what a file had or None). With None for recv and stored: what was kept is to be packed."},
    {"end_update", node_end_update, METH_VARARGS,
     "end_update($self, failure, kept, stored, /)\n--\n\n"
     "End that round: with the sentence why it has failed, or None; with what is to be kept, also\n"
     "of what a file had. `stored`: the value, the bytes of what was packed, or the exception."},
    {"wake", node_wake, METH_NOARGS,
     "wake($self, /)\n--\n\nLet next_update return, or the next one if none waits."},
    {"counters", node_counters, METH_NOARGS,
     "counters($self, /)\n--\n\nWhat went over the wire, and what a server holds."},
    {"lanes", node_lanes, METH_O,
     "lanes($self, number, /)\n--\n\nThe transports in use to a peer."},
    {"close", node_close, METH_NOARGS, "close($self, /)\n--\n\nEnd all sessions. Idempotent."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot SLOTS[] = {
    {Py_tp_doc,
     (void *)"Node(role, rank, num_workers, num_servers, *, session, asynchronous=False,\n"
             "     transport='ucx', library=None, interface=None, port_range=None,\n"
             "     same_host_copies=False, inet6=False, num_threads=0, seed=0, faults=None)\n"
             "--\n\nThis process on the data plane of a cluster."},
    {Py_tp_new, node_new},
    {Py_tp_dealloc, node_dealloc},
    {Py_tp_traverse, node_traverse},
    {Py_tp_repr, node_repr},
    {Py_tp_methods, METHODS},
    {0, NULL},
};

static PyType_Spec SPEC = {
    .name = "kvstore._core.Node",
    .basicsize = sizeof(kv_py_node_t),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = SLOTS,
};

int kv_node_setup(PyObject *module, kv_state_t *state)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &SPEC, NULL);
    if (type == NULL)
        return -1;
    state->node_type = (PyTypeObject *)type;
    return PyModule_AddObjectRef(module, "Node", type);
}
