/* kvstore.KVStore: the calls that concern the cluster and not its values. In one process they have
 * little to do; in a dist store they are the control plane's, which is written in Python.
 */
#include "py/store.h"

/* kvstore._dist.<function>(*args); takes `args`, which may be NULL with an exception. */
static PyObject *in_cluster(const char *function, PyObject *args)
{
    PyObject *module = args != NULL ? PyImport_ImportModule("kvstore._dist") : NULL;
    PyObject *callable = module != NULL ? PyObject_GetAttrString(module, function) : NULL;
    PyObject *result = callable != NULL ? PyObject_Call(callable, args, NULL) : NULL;
    Py_XDECREF(callable);
    Py_XDECREF(module);
    Py_XDECREF(args);
    return result;
}

static double timeout_s(const kv_py_store_t *self)
{
    return (double)self->timeout_ns * 1e-9;
}

/* `together`: None as the user has set it, or False: without waiting for other workers. */
static PyObject *close_store(PyObject *object, PyObject *together)
{
    kv_py_store_t *self = as_store(object);
    if (kv_store_generation(self->store) != kv_fork_generation())
        Py_RETURN_NONE; /* the parent's; nothing of it can be closed here */
    self->updater = NULL;
    self->schedule = NULL;
    /* It may wait for devices. */
    Py_BEGIN_ALLOW_THREADS;
    kv_store_close(self->store);
    Py_END_ALLOW_THREADS;
    kv_py_release_now();
    if (self->member == NULL)
        Py_RETURN_NONE;
    return in_cluster("close", Py_BuildValue("(OdO)", self->member, timeout_s(self), together));
}

PyObject *kv_py_store_close(PyObject *object, PyObject *unused)
{
    (void)unused;
    return close_store(object, Py_None);
}

PyObject *kv_py_store_enter(PyObject *object, PyObject *unused)
{
    (void)unused;
    return kv_py_store_check_open(as_store(object)) ? Py_NewRef(object) : NULL;
}

PyObject *kv_py_store_exit(PyObject *object, PyObject *args)
{
    /* The others would wait for one that will not go on. */
    bool failed = PyTuple_GET_SIZE(args) > 0 && PyTuple_GET_ITEM(args, 0) != Py_None;
    return close_store(object, failed ? Py_False : Py_None);
}

PyObject *kv_py_store_place(PyObject *object, PyObject *unused)
{
    (void)unused;
    kv_py_store_t *self = as_store(object);
    if (!kv_py_store_check_open(self))
        return NULL;
    if (!kv_py_store_has_servers(self))
        Py_RETURN_NONE;
    return Py_BuildValue("(Od)", self->member, timeout_s(self));
}

PyObject *kv_py_store_barrier(PyObject *object, PyObject *unused)
{
    (void)unused;
    kv_py_store_t *self = as_store(object);
    if (!kv_py_store_check_open(self))
        return NULL;
    if (self->member == NULL)
        Py_RETURN_NONE;
    return in_cluster("barrier", Py_BuildValue("(Od)", self->member, timeout_s(self)));
}

static const kv_param_t BARRIER_BEFORE_EXIT_PARAMS[] = {{"barrier_before_exit", false}};
static const kv_signature_t BARRIER_BEFORE_EXIT = {"set_barrier_before_exit", 1, 1,
                                                   BARRIER_BEFORE_EXIT_PARAMS};

KV_PY_METHOD(kv_py_store_set_barrier_before_exit)
{
    PyObject *value;
    kv_py_store_t *store = as_store(self);
    if (!kv_py_store_check_open(store) ||
        !kv_py_parse(&BARRIER_BEFORE_EXIT, args, num_args, names, &value))
        return NULL;
    if (value != NULL && !PyBool_Check(value))
        return kv_py_fail(store->state, KV_BAD_TYPE,
                          "barrier_before_exit must be True or False, not %.100s",
                          Py_TYPE(value)->tp_name);
    if (store->member == NULL)
        Py_RETURN_NONE;
    return in_cluster("set_barrier_before_exit",
                      Py_BuildValue("(OO)", store->member, value != NULL ? value : Py_True));
}

static const kv_param_t COMMAND_PARAMS[] = {{"head", true}, {"body", true}};
static const kv_signature_t COMMAND = {"send_command_to_servers", 2, 2, COMMAND_PARAMS};

KV_PY_METHOD(kv_py_store_send_command)
{
    PyObject *values[2];
    kv_py_store_t *store = as_store(self);
    if (!kv_py_store_check_open(store) || !kv_py_parse(&COMMAND, args, num_args, names, values))
        return NULL;
    if (kv_py_store_has_servers(store))
        return in_cluster("command", Py_BuildValue("(OOOd)", store->member, values[0], values[1],
                                                   timeout_s(store)));
    return kv_py_fail(store->state, KV_INVALID,
                      "a store of kind '%s' has no server to send a command to",
                      kv_store_kind(store->store));
}

static const kv_param_t DEAD_PARAMS[] = {{"role", false}, {"timeout", false}};
static const kv_signature_t DEAD = {"num_dead_node", 2, 2, DEAD_PARAMS};

KV_PY_METHOD(kv_py_store_num_dead_node)
{
    PyObject *values[2];
    kv_py_store_t *store = as_store(self);
    int64_t timeout_ns;
    if (!kv_py_store_check_open(store) || !kv_py_parse(&DEAD, args, num_args, names, values) ||
        !kv_py_timeout(store->state, values[1], 60 * INT64_C(1000000000), &timeout_ns))
        return NULL;
    bool known = values[0] == NULL || (PyIndex_Check(values[0]) && !PyBool_Check(values[0]));
    static const char *const ROLES[] = {"worker", "server", "scheduler"};
    for (int i = 0; !known && PyUnicode_Check(values[0]) && i < 3; i++)
        known = PyUnicode_CompareWithASCIIString(values[0], ROLES[i]) == 0;
    if (!known) {
        PyObject *shown = PyObject_Repr(values[0]);
        if (shown != NULL)
            kv_py_fail(store->state, KV_INVALID,
                       "role must be 'worker', 'server' or 'scheduler', or an integer mask; got "
                       "%.100s",
                       PyUnicode_AsUTF8(shown));
        Py_XDECREF(shown);
        return NULL;
    }
    if (store->member == NULL)
        return PyLong_FromLong(0);
    PyObject *role = values[0] != NULL ? Py_NewRef(values[0]) : PyUnicode_FromString("worker");
    return in_cluster("dead_nodes",
                      Py_BuildValue("(ONd)", store->member, role, (double)timeout_ns * 1e-9));
}
