/* kvstore.KVStore: making and ending a store, and the calls that move no values. The public class
 * is this type itself; no Python function stands between a user and push, pull, pushpull.
 */
#include "py/node.h"
#include "py/ranks.h"
#include "py/store.h"
#include "py/store_doc.h"
#include "py/training_doc.h"
#include "py/call.h"

#include <structmember.h>

bool kv_py_store_check_open(kv_py_store_t *self)
{
    kv_py_release_now();
    kv_status_t status = kv_store_check_open(self->store);
    if (KV_LIKELY(status == KV_OK))
        return true;
    kv_py_raise(self->state, status);
    return false;
}

/* -------------------------------------------------------------------------- construction */

/* The data plane of a member of a cluster: a new reference, NULL in a process that has no worker.
 */
static bool take_node(kv_state_t *state, const kv_kind_t *kind, kv_py_options_t *options,
                      PyObject **node)
{
    bool nccl = kind->family == KV_KIND_NCCL;
    if (kind->family != KV_KIND_DIST && (!nccl || options->member == NULL))
        return true;
    if (options->member == NULL) {
        kv_py_fail(state, KV_INVALID,
                   "a dist store is made by kvstore.create, which joins the "
                   "cluster");
        return false;
    }
    if (options->member == Py_None)
        return true;
    PyObject *core = PyObject_GetAttrString(options->member, "core");
    if (core == NULL)
        return false;
    if (nccl)
        options->store.team = kv_py_ranks_team(state, core);
    else
        options->store.client = kv_py_node_client(state, core);
    if (options->store.client == NULL && options->store.team == NULL) {
        kv_py_fail(state, KV_BAD_TYPE, "the core of a member must be a worker's %s",
                   nccl ? "Ranks" : "Node");
        Py_DECREF(core);
        return false;
    }
    *node = core;
    return true;
}

static PyObject *store_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    kv_state_t *state = PyType_GetModuleState(type);
    PyObject *name = NULL;
    if (PyTuple_GET_SIZE(args) > 1) {
        PyErr_SetString(PyExc_TypeError, "KVStore() takes one positional argument, the name of a "
                                         "kind; options are given by name");
        return NULL;
    }
    if (PyTuple_GET_SIZE(args) == 1)
        name = PyTuple_GET_ITEM(args, 0);
    else if (keywords != NULL)
        name = PyDict_GetItemString(keywords, "name");
    const char *kind = "local";
    if (name != NULL) {
        if (!PyUnicode_Check(name))
            return kv_py_fail(state, KV_BAD_TYPE, "the name of a kind must be a str, not %.100s",
                              Py_TYPE(name)->tp_name);
        Py_ssize_t length;
        kind = PyUnicode_AsUTF8AndSize(name, &length);
        if (kind == NULL || (size_t)length != strlen(kind)) {
            PyErr_Clear();
            return kv_py_fail(state, KV_INVALID,
                              "the name of a kind holds a character that is none");
        }
    }
    kv_py_options_t options = {.timeout_ns = KV_PY_DEFAULT_TIMEOUT_NS};
    kv_kind_t parsed;
    kv_status_t status = kv_kind_parse(kind, &parsed);
    if (status != KV_OK)
        return kv_py_raise(state, status);
    kv_runtime_t *runtime = kv_py_runtime(state);
    if (runtime == NULL)
        return NULL;
    if (!kv_py_parse_options(state, &parsed, keywords, &options))
        return NULL;
    PyObject *node = NULL;
    if (!take_node(state, &parsed, &options, &node))
        return NULL;
    kv_store_t *store;
    status = kv_store_new(runtime, kind, &options.store, &store);
    if (status != KV_OK) {
        Py_XDECREF(node);
        return kv_py_raise(state, status);
    }
    kv_py_store_t *self = (kv_py_store_t *)type->tp_alloc(type, 0);
    if (self == NULL) {
        kv_store_free(store);
        Py_XDECREF(node);
        return NULL;
    }
    self->node = node;
    self->member = node != NULL ? Py_NewRef(options.member) : NULL;
    self->state = state;
    self->store = store;
    self->timeout_ns = options.timeout_ns;
    return (PyObject *)self;
}

static int store_traverse(PyObject *object, visitproc visit, void *arg)
{
    kv_py_store_t *self = as_store(object);
    Py_VISIT(Py_TYPE(object));
    if (self->updater != NULL)
        Py_VISIT(kv_py_updater_function(self->updater));
    Py_VISIT(self->schedule);
    Py_VISIT(self->owner);
    Py_VISIT(self->pending);
    Py_VISIT(self->member);
    Py_VISIT(self->node);
    return 0;
}

static int store_clear(PyObject *object)
{
    kv_py_store_t *self = as_store(object);
    bool holds = self->updater != NULL || self->schedule != NULL;
    if (self->store != NULL && holds && kv_store_check_open(self->store) == KV_OK) {
        self->updater = NULL;
        self->schedule = NULL;
        kv_status_t status = kv_store_set_updater(self->store, NULL);
        (void)status; /* it can only say that the store is closed */
        kv_py_release_now();
    }
    Py_CLEAR(self->owner);
    Py_CLEAR(self->pending);
    Py_CLEAR(self->member);
    return 0;
}

static void store_dealloc(PyObject *object)
{
    kv_py_store_t *self = as_store(object);
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    if (self->weakrefs != NULL)
        PyObject_ClearWeakRefs(object);
    /* In a forked child the lock may have been held by a thread that is not there any more. */
    if (self->store != NULL && kv_store_generation(self->store) == kv_fork_generation())
        kv_store_free(self->store);
    Py_XDECREF(self->owner);
    Py_XDECREF(self->pending);
    Py_XDECREF(self->member);
    Py_XDECREF(self->node);
    kv_py_release_now();
    type->tp_free(object);
    Py_DECREF(type);
}

/* The argument of a method that takes exactly one, by position or by name; NULL with an exception.
 */
static PyObject *only_argument(const char *function, const char *param, PyObject *const *args,
                               Py_ssize_t num_args, PyObject *names)
{
    const kv_param_t params[] = {{param, true}};
    const kv_signature_t signature = {function, 1, 1, params};
    PyObject *value;
    return kv_py_parse(&signature, args, num_args, names, &value) ? value : NULL;
}

/* -------------------------------------------------------------------------------- updater */

static KV_PY_METHOD(store_set_updater)
{
    PyObject *function = only_argument("set_updater", "updater", args, num_args, names);
    if (function == NULL)
        return NULL;
    if (!kv_py_store_check_open(as_store(self)) ||
        !kv_py_store_use_updater(as_store(self), function, NULL))
        return NULL;
    Py_RETURN_NONE;
}

bool kv_py_store_use_updater(kv_py_store_t *self, PyObject *function, PyObject *owner)
{
    if (function != Py_None && !PyCallable_Check(function)) {
        kv_py_fail(self->state, KV_BAD_TYPE,
                   "an updater must be callable as updater(key, recv, stored), or None; got %.100s",
                   Py_TYPE(function)->tp_name);
        return false;
    }
    /* `owner` is None where the optimizer is to go; set_updater has none. */
    if (self->member != NULL && (function != Py_None || owner != Py_None)) {
        kv_py_fail(self->state, KV_INVALID,
                   kv_py_store_has_servers(self)
                       ? "an updater runs in one process, and the values of a dist store lie on "
                         "its servers: use set_optimizer"
                       : "an updater, as an optimizer in Python, runs in one process, and this "
                         "store is of several: use set_optimizer with a built-in one");
        return false;
    }
    kv_updater_t *updater = NULL;
    if (function != Py_None && (updater = kv_py_updater_new(self->state, function)) == NULL)
        return false;
    kv_status_t status = kv_store_set_updater(self->store, updater);
    if (status != KV_OK) {
        if (updater != NULL)
            updater->free(updater);
        kv_py_raise(self->state, status);
        return false;
    }
    /* All in one go: what is given back may run Python code that sets another. */
    self->updater = updater;
    self->schedule = NULL;
    Py_XSETREF(self->owner, Py_XNewRef(owner));
    kv_py_release_now();
    return true;
}

/* ----------------------------------------------------------------------------------- keys */

static PyObject *store_keys(PyObject *object, PyObject *unused)
{
    (void)unused;
    kv_py_store_t *self = as_store(object);
    kv_name_t *names;
    int64_t num_names;
    if (!kv_py_store_check_open(self))
        return NULL;
    kv_status_t status = kv_store_keys(self->store, &names, &num_names);
    if (status != KV_OK)
        return kv_py_raise(self->state, status);
    PyObject *keys = PyList_New((Py_ssize_t)num_names);
    for (int64_t i = 0; keys != NULL && i < num_names; i++) {
        PyObject *key = kv_py_name_object(&names[i]);
        if (key == NULL)
            Py_CLEAR(keys);
        else
            PyList_SET_ITEM(keys, (Py_ssize_t)i, key);
    }
    kv_free(names);
    return keys;
}

static int store_contains(PyObject *object, PyObject *key)
{
    kv_py_store_t *self = as_store(object);
    kv_name_t name;
    if (!kv_py_store_check_open(self))
        return -1;
    if (!kv_py_name(self->state, key, &name)) {
        /* What cannot be a key is not in the store. */
        if (!PyErr_ExceptionMatches(self->state->errors[KV_BAD_TYPE]) &&
            !PyErr_ExceptionMatches(self->state->errors[KV_INVALID]))
            return -1;
        PyErr_Clear();
        return 0;
    }
    return kv_store_contains(self->store, &name);
}

static KV_PY_METHOD(store_delete)
{
    PyObject *key = only_argument("delete", "key", args, num_args, names);
    if (key == NULL)
        return NULL;
    kv_py_store_t *store = as_store(self);
    kv_args_t call;
    if (!kv_py_store_check_open(store) ||
        !kv_args_init(&call, store->state, "delete", key, NULL, NULL, false, false))
        return NULL;
    kv_py_caller_t caller;
    kv_py_caller_init(&caller, store->timeout_ns);
    kv_status_t status = kv_store_delete(store->store, &call.call, &caller.base);
    PyObject *keys = NULL, *owner = NULL, *result = NULL;
    if (status != KV_OK)
        kv_py_raise(store->state, status);
    else if ((keys = kv_args_keys(&call)) != NULL)
        result = Py_NewRef(Py_None);
    kv_args_fini(&call);
    kv_py_release_now();
    /* An optimizer in Python keeps its state itself. */
    owner = Py_XNewRef(store->owner);
    if (result != NULL && owner != NULL && PyObject_HasAttrString(owner, "forget"))
        Py_SETREF(result, PyObject_CallMethod(owner, "forget", "O", keys));
    Py_XDECREF(owner);
    Py_XDECREF(keys);
    return result;
}

/* What init fixed of one key. */
typedef struct description {
    kv_dtype_t dtype;
    bool sparse;
    int ndim;
    int64_t shape[KV_MAX_DIMS];
} description_t;

/* Of the one key that the method `verb` was given. */
static bool describe(kv_py_store_t *self, const char *verb, PyObject *const *args,
                     Py_ssize_t num_args, PyObject *names, description_t *out)
{
    kv_name_t name;
    PyObject *key = only_argument(verb, "key", args, num_args, names);
    if (key == NULL || !kv_py_store_check_open(self) || !kv_py_name(self->state, key, &name))
        return false;
    kv_status_t status = kv_store_describe(self->store, &name, verb, &out->dtype, &out->sparse,
                                           &out->ndim, out->shape);
    if (status != KV_OK)
        kv_py_raise(self->state, status);
    return status == KV_OK;
}

static KV_PY_METHOD(store_shape)
{
    description_t found;
    return describe(as_store(self), "shape", args, num_args, names, &found)
               ? kv_py_shape(found.ndim, found.shape)
               : NULL;
}

static KV_PY_METHOD(store_dtype)
{
    description_t found;
    return describe(as_store(self), "dtype", args, num_args, names, &found)
               ? kv_numpy_dtype_object(as_store(self)->state, found.dtype)
               : NULL;
}

static KV_PY_METHOD(store_stype)
{
    description_t found;
    return describe(as_store(self), "stype", args, num_args, names, &found)
               ? PyUnicode_FromString(found.sparse ? "row_sparse" : "default")
               : NULL;
}

static KV_PY_METHOD(store_is_capable)
{
    PyObject *capability = only_argument("is_capable", "capability", args, num_args, names);
    if (capability == NULL)
        return NULL;
    if (!PyUnicode_Check(capability))
        return kv_py_fail(as_store(self)->state, KV_BAD_TYPE,
                          "a capability is named by a str, not %.100s",
                          Py_TYPE(capability)->tp_name);
    return PyBool_FromLong(PyUnicode_CompareWithASCIIString(capability, "optimizer") == 0);
}

/* Calls that take long anyway and are written in Python. */
#define IN_PYTHON(name)                                                                            \
    static PyObject *store_##name(PyObject *object, PyObject *args, PyObject *keywords)            \
    {                                                                                              \
        return kv_py_training(object, #name, args, keywords);                                      \
    }

IN_PYTHON(set_optimizer)
IN_PYTHON(set_optimizer_params)
IN_PYTHON(save_optimizer_states)
IN_PYTHON(load_optimizer_states)
IN_PYTHON(set_gradient_compression)

static PyObject *store_optimizer(PyObject *object, void *unused)
{
    (void)unused;
    PyObject *none = PyTuple_New(0);
    PyObject *result = none != NULL ? kv_py_training(object, "optimizer", none, NULL) : NULL;
    Py_XDECREF(none);
    return result;
}

/* ----------------------------------------------------------------------------------- type */

static PyObject *store_type_name(PyObject *object, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(kv_store_kind(as_store(object)->store));
}

static PyObject *store_rank(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromLong(kv_store_rank(as_store(object)->store));
}

static PyObject *store_num_workers(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromLong(kv_store_num_workers(as_store(object)->store));
}

static PyObject *store_repr(PyObject *object)
{
    kv_py_store_t *self = as_store(object);
    kv_name_t *names;
    int64_t num_names;
    if (kv_store_check_open(self->store) != KV_OK)
        return PyUnicode_FromFormat("<kvstore.KVStore '%s', closed>", kv_store_kind(self->store));
    kv_status_t status = kv_store_keys(self->store, &names, &num_names);
    if (status != KV_OK)
        return kv_py_raise(self->state, status);
    kv_free(names);
    return PyUnicode_FromFormat("<kvstore.KVStore '%s', %lld key%s>", kv_store_kind(self->store),
                                (long long)num_names, num_names == 1 ? "" : "s");
}

#define VECTORCALL(name, function, doc)                                                            \
    {                                                                                              \
        name, (PyCFunction)(void (*)(void))function, METH_FASTCALL | METH_KEYWORDS, doc            \
    }
#define KEYWORDS(name, function, doc)                                                              \
    {                                                                                              \
        name, (PyCFunction)(void (*)(void))function, METH_VARARGS | METH_KEYWORDS, doc             \
    }

static PyMethodDef METHODS[] = {
    VECTORCALL("init", kv_py_store_init, INIT_DOC),
    VECTORCALL("push", kv_py_store_push, PUSH_DOC),
    VECTORCALL("pull", kv_py_store_pull, PULL_DOC),
    VECTORCALL("pushpull", kv_py_store_pushpull, PUSHPULL_DOC),
    VECTORCALL("broadcast", kv_py_store_broadcast, BROADCAST_DOC),
    VECTORCALL("set_updater", store_set_updater, SET_UPDATER_DOC),
    VECTORCALL("_set_updater", store_set_updater, SET_UPDATER_DOC),
    {"keys", store_keys, METH_NOARGS, KEYS_DOC},
    VECTORCALL("delete", store_delete, DELETE_DOC),
    VECTORCALL("shape", store_shape, SHAPE_DOC),
    VECTORCALL("dtype", store_dtype, DTYPE_DOC),
    VECTORCALL("stype", store_stype, STYPE_DOC),
    {"close", kv_py_store_close, METH_NOARGS, CLOSE_DOC},
    {"__enter__", kv_py_store_enter, METH_NOARGS, NULL},
    {"__exit__", kv_py_store_exit, METH_VARARGS, NULL},
    VECTORCALL("is_capable", store_is_capable, IS_CAPABLE_DOC),
    {"barrier", kv_py_store_barrier, METH_NOARGS, BARRIER_DOC},
    {"_barrier", kv_py_store_barrier, METH_NOARGS, BARRIER_DOC},
    VECTORCALL("set_barrier_before_exit", kv_py_store_set_barrier_before_exit,
               BARRIER_BEFORE_EXIT_DOC),
    VECTORCALL("send_command_to_servers", kv_py_store_send_command, COMMAND_DOC),
    VECTORCALL("_send_command_to_servers", kv_py_store_send_command, COMMAND_DOC),
    VECTORCALL("num_dead_node", kv_py_store_num_dead_node, DEAD_DOC),
    VECTORCALL("get_num_dead_node", kv_py_store_num_dead_node, DEAD_DOC),
    VECTORCALL("row_sparse_pull", kv_py_store_row_sparse_pull, ROW_SPARSE_PULL_DOC),
    KEYWORDS("set_optimizer", store_set_optimizer, SET_OPTIMIZER_DOC),
    KEYWORDS("set_optimizer_params", store_set_optimizer_params, SET_OPTIMIZER_PARAMS_DOC),
    KEYWORDS("save_optimizer_states", store_save_optimizer_states, SAVE_STATES_DOC),
    KEYWORDS("load_optimizer_states", store_load_optimizer_states, LOAD_STATES_DOC),
    KEYWORDS("set_gradient_compression", store_set_gradient_compression, COMPRESSION_DOC),
    {"_optimizer_set", kv_py_store_optimizer_set, METH_VARARGS, NULL},
    {"_place", kv_py_store_place, METH_NOARGS, NULL},
    {"_optimizer_owner", kv_py_store_optimizer_owner, METH_NOARGS, NULL},
    {"_updater_set", kv_py_store_updater_set, METH_VARARGS, NULL},
    {"_compression_set", kv_py_store_compression_set, METH_VARARGS, NULL},
    {"_states_export", kv_py_store_states_export, METH_VARARGS, NULL},
    {"_states_import", kv_py_store_states_import, METH_O, NULL},
    {"_states_put", kv_py_store_states_put, METH_VARARGS, NULL},
    {"_states_later", kv_py_store_states_later, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef PROPERTIES[] = {
    {"type", store_type_name, NULL, "The kind, as it was asked for, in lower case.", NULL},
    {"rank", store_rank, NULL, "This worker's number: 0 in one process.", NULL},
    {"num_workers", store_num_workers, NULL, "How many workers there are: 1 in one process.", NULL},
    {"optimizer", store_optimizer, NULL, OPTIMIZER_DOC, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef MEMBERS[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(kv_py_store_t, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot SLOTS[] = {
    {Py_tp_doc, (void *)CLASS_DOC},
    {Py_tp_new, store_new},
    {Py_tp_dealloc, store_dealloc},
    {Py_tp_traverse, store_traverse},
    {Py_tp_clear, store_clear},
    {Py_tp_repr, store_repr},
    {Py_tp_methods, METHODS},
    {Py_tp_getset, PROPERTIES},
    {Py_tp_members, MEMBERS},
    {Py_sq_contains, store_contains},
    {0, NULL},
};

static PyType_Spec SPEC = {
    .name = "kvstore.KVStore",
    .basicsize = sizeof(kv_py_store_t),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = SLOTS,
};

int kv_store_setup(PyObject *module, kv_state_t *state)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &SPEC, NULL);
    if (type == NULL)
        return -1;
    state->store_type = (PyTypeObject *)type;
    return PyModule_AddObjectRef(module, "KVStore", type);
}
