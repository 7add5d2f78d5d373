/* kvstore._core.Ranks: this process's place among those of a store of kind `nccl`. It stands where
 * a dist store has its Node: the control plane makes it and tells it who is gone. kvstore/_nccl.py
 * derives from it and gives it `meet`, which the core calls when a group is to be made.
 */
#include "py/ranks.h"

#include "store/nccl.h"

typedef struct kv_py_ranks {
    PyObject_HEAD
    kv_state_t *state;
    kv_nccl_team_t *team; /* one share */
    uint64_t generation;
    bool closed;
} kv_py_ranks_t;

static kv_py_ranks_t *as_ranks(PyObject *object)
{
    return (kv_py_ranks_t *)object;
}

kv_nccl_team_t *kv_py_ranks_team(kv_state_t *state, PyObject *object)
{
    return PyObject_TypeCheck(object, state->ranks_type) ? as_ranks(object)->team : NULL;
}

/* Whether there is anything to do for it: it is open, and this process's. */
static bool is_open(const kv_py_ranks_t *self)
{
    return self->generation == kv_fork_generation() && !self->closed;
}

/* ----------------------------------------------------------------------------------- meetings */

/* What `meet` has given: None, or (number of ranks, the first of this process, id). */
static bool read_ranks(PyObject *result, kv_meeting_t *meeting)
{
    const char *id;
    Py_ssize_t bytes;
    meeting->all_fit = result == Py_None;
    if (meeting->all_fit)
        return true;
    if (!PyArg_ParseTuple(result, "iiy#", &meeting->num_ranks, &meeting->first_rank, &id, &bytes))
        return false;
    if (bytes != KV_NCCL_ID_BYTES) {
        PyErr_Format(PyExc_ValueError, "an id of %zd bytes", bytes);
        return false;
    }
    memcpy(meeting->id.bytes, id, sizeof meeting->id.bytes);
    return true;
}

static kv_status_t meet(void *context, kv_meeting_t *meeting, kv_caller_t *caller)
{
    double left = (double)(kv_caller_deadline(caller) - kv_clock_ns()) * 1e-9;
    PyObject *result =
        PyObject_CallMethod(context, "meet", "siOd", meeting->call, meeting->num_devices,
                            meeting->fits ? Py_True : Py_False, left > 0 ? left : 1e-3);
    bool good = result != NULL && read_ranks(result, meeting);
    Py_XDECREF(result);
    return good ? KV_OK : KV_CALLBACK;
}

/* ---------------------------------------------------------------------------- making, ending */

static PyObject *ranks_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    kv_nccl_team_t *team;
    kv_status_t status;
    (void)args, (void)keywords;
    /* Of a class in Python, whose base is the one that this module has made. */
    PyTypeObject *base = type;
    while (base->tp_new == ranks_new && base->tp_base != NULL && base->tp_base->tp_new == ranks_new)
        base = base->tp_base;
    kv_state_t *state = PyType_GetModuleState(base);
    if (state == NULL)
        return NULL;
    kv_nccl_peers_t peers = {.num_workers = 1, .meet = meet};
    Py_BEGIN_ALLOW_THREADS;
    status = kv_nccl_team_new(&peers, &team);
    Py_END_ALLOW_THREADS;
    if (status != KV_OK)
        return kv_py_raise(state, status);
    kv_py_ranks_t *self = (kv_py_ranks_t *)type->tp_alloc(type, 0);
    if (self == NULL) {
        kv_nccl_team_rele(team);
        return NULL;
    }
    self->state = state;
    self->team = team;
    self->generation = kv_fork_generation();
    kv_nccl_team_peers(team)->context = self;
    return (PyObject *)self;
}

static void ranks_dealloc(PyObject *object)
{
    kv_py_ranks_t *self = as_ranks(object);
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    if (self->generation == kv_fork_generation()) {
        Py_BEGIN_ALLOW_THREADS;
        if (!self->closed)
            kv_nccl_team_end(self->team, false);
        kv_nccl_team_rele(self->team);
        Py_END_ALLOW_THREADS;
    }
    type->tp_free(object);
    Py_DECREF(type);
}

static int ranks_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    return 0;
}

static PyObject *ranks_set_place(PyObject *object, PyObject *args)
{
    int rank, num_workers;
    if (!PyArg_ParseTuple(args, "ii:set_place", &rank, &num_workers))
        return NULL;
    kv_nccl_peers_t *peers = kv_nccl_team_peers(as_ranks(object)->team);
    if (rank < 0 || rank >= num_workers)
        return kv_py_fail(as_ranks(object)->state, KV_INVALID, "there is no worker %d of %d", rank,
                          num_workers);
    peers->rank = rank;
    peers->num_workers = num_workers;
    Py_RETURN_NONE;
}

static PyObject *tell(PyObject *object, PyObject *why,
                      void (*function)(kv_nccl_team_t *team, const char *why))
{
    kv_py_ranks_t *self = as_ranks(object);
    const char *text = PyUnicode_AsUTF8(why);
    if (text == NULL)
        return NULL;
    if (is_open(self)) {
        Py_BEGIN_ALLOW_THREADS;
        function(self->team, text);
        Py_END_ALLOW_THREADS;
    }
    Py_RETURN_NONE;
}

static PyObject *ranks_lose(PyObject *object, PyObject *why)
{
    return tell(object, why, kv_nccl_team_lose);
}

static PyObject *ranks_depart(PyObject *object, PyObject *why)
{
    return tell(object, why, kv_nccl_team_depart);
}

static PyObject *ranks_drain(PyObject *object, PyObject *timeout)
{
    kv_py_ranks_t *self = as_ranks(object);
    kv_py_caller_t caller;
    int64_t timeout_ns;
    if (!kv_py_timeout(self->state, timeout, KV_PY_DEFAULT_TIMEOUT_NS, &timeout_ns))
        return NULL;
    if (!is_open(self))
        Py_RETURN_NONE;
    kv_py_caller_init(&caller, timeout_ns);
    kv_status_t status = kv_nccl_team_drain(self->team, &caller.base);
    kv_caller_attach(&caller.base);
    return status == KV_OK ? Py_NewRef(Py_None) : kv_py_raise(self->state, status);
}

static PyObject *ranks_end(PyObject *object, PyObject *together)
{
    kv_py_ranks_t *self = as_ranks(object);
    int with_others = PyObject_IsTrue(together);
    if (with_others < 0)
        return NULL;
    if (is_open(self)) {
        self->closed = true;
        Py_BEGIN_ALLOW_THREADS;
        kv_nccl_team_end(self->team, with_others > 0);
        Py_END_ALLOW_THREADS;
    }
    Py_RETURN_NONE;
}

/* ------------------------------------------------------------------------------------ module */

PyObject *kv_py_nccl_id(PyObject *module, PyObject *unused)
{
    (void)unused;
    kv_nccl_id_t id;
    kv_status_t status;
    Py_BEGIN_ALLOW_THREADS;
    status = kv_nccl_id(&id);
    Py_END_ALLOW_THREADS;
    return status == KV_OK ? PyBytes_FromStringAndSize(id.bytes, sizeof id.bytes)
                           : kv_py_raise(kv_py_state(module), status);
}

static PyMethodDef METHODS[] = {
    {"set_place", ranks_set_place, METH_VARARGS,
     "set_place($self, rank, num_workers, /)\n--\n\nBefore a store uses it."},
    {"lose", ranks_lose, METH_O,
     "lose($self, why, /)\n--\n\n"
     "Fail every call from now on with PeerLostError(why), and end what NCCL does."},
    {"depart", ranks_depart, METH_O,
     "depart($self, why, /)\n--\n\n"
     "The same for calls that take all processes; others go on."},
    {"drain", ranks_drain, METH_O,
     "drain($self, timeout, /)\n--\n\nWait for the devices' work for NCCL."},
    {"end", ranks_end, METH_O,
     "end($self, together, /)\n--\n\n"
     "End all groups, together with the other processes or at once. Idempotent."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot SLOTS[] = {
    {Py_tp_doc, (void *)"Ranks()\n--\n\nThis process among those of an nccl store."},
    {Py_tp_new, ranks_new},
    {Py_tp_dealloc, ranks_dealloc},
    {Py_tp_traverse, ranks_traverse},
    {Py_tp_methods, METHODS},
    {0, NULL},
};

static PyType_Spec SPEC = {
    .name = "kvstore._core.Ranks",
    .basicsize = sizeof(kv_py_ranks_t),
    .flags =
        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = SLOTS,
};

int kv_ranks_setup(PyObject *module, kv_state_t *state)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &SPEC, NULL);
    if (type == NULL)
        return -1;
    state->ranks_type = (PyTypeObject *)type;
    return PyModule_AddObjectRef(module, "Ranks", type);
}
