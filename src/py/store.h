/* kvstore.KVStore, shared by the files that implement it. */
#ifndef KV_PY_STORE_H
#define KV_PY_STORE_H

#include "py/py.h"
#include "py/updater.h"

typedef struct kv_py_store {
    PyObject_HEAD
    kv_state_t *state;
    kv_store_t *store;
    kv_updater_t *updater; /* the store's own, borrowed: for the garbage collector */
    PyObject *schedule;    /* its optimizer's, likewise */
    PyObject *owner;       /* the optimizer as it was given, NULL if there is none */
    PyObject *pending;     /* dict: states that wait for the init of their keys, or NULL */
    PyObject *member;      /* of several processes: this one's place in the cluster … */
    PyObject *node;        /* … and its Node, of kind nccl its Ranks, kept as long as the store */
    int64_t timeout_ns;
    PyObject *weakrefs;
} kv_py_store_t;

static inline kv_py_store_t *as_store(PyObject *object)
{
    return (kv_py_store_t *)object;
}

/* options.c: what may be given to a store when it is made. */
typedef struct kv_py_options {
    int64_t timeout_ns;
    kv_store_options_t store;
    PyObject *member; /* borrowed; NULL: not given */
} kv_py_options_t;

/* Reads all keywords but `name`. False with an exception. */
bool kv_py_parse_options(kv_state_t *state, const kv_kind_t *kind, PyObject *keywords,
                         kv_py_options_t *options);

/* kvstore._core.options_check. */
PyObject *kv_py_options_check(PyObject *module, PyObject *args, PyObject *keywords);

/* Every method begins with it: ClosedError, and references given back meanwhile. */
bool kv_py_store_check_open(kv_py_store_t *self);

/* store_calls.c, vectorcall methods. */
#define KV_PY_METHOD(name)                                                                         \
    PyObject *name(PyObject *self, PyObject *const *args, Py_ssize_t num_args, PyObject *names)
KV_PY_METHOD(kv_py_store_init);
KV_PY_METHOD(kv_py_store_push);
KV_PY_METHOD(kv_py_store_pull);
KV_PY_METHOD(kv_py_store_pushpull);
KV_PY_METHOD(kv_py_store_broadcast);
KV_PY_METHOD(kv_py_store_row_sparse_pull);

/* store_cluster.c. */
PyObject *kv_py_store_close(PyObject *self, PyObject *unused);
PyObject *kv_py_store_enter(PyObject *self, PyObject *unused);
PyObject *kv_py_store_exit(PyObject *self, PyObject *args);
static inline bool kv_py_store_has_servers(const kv_py_store_t *self)
{
    return self->node != NULL && Py_IS_TYPE(self->node, self->state->node_type);
}
/* (member, timeout in seconds) of a dist store, or None. */
PyObject *kv_py_store_place(PyObject *self, PyObject *unused);
PyObject *kv_py_store_barrier(PyObject *self, PyObject *unused);
KV_PY_METHOD(kv_py_store_set_barrier_before_exit);
KV_PY_METHOD(kv_py_store_send_command);
KV_PY_METHOD(kv_py_store_num_dead_node);

/* store.c: set_updater's work; `function` may be None, `owner` NULL. */
bool kv_py_store_use_updater(kv_py_store_t *self, PyObject *function, PyObject *owner);

/* optimizer.c, states.c: private methods, and functions of the module. */
PyObject *kv_py_optimizer_common(PyObject *module, PyObject *unused);
/* Functions of the module: device.c. */
PyObject *kv_py_cuda_plugin(PyObject *module, PyObject *unused);
PyObject *kv_py_cuda_device(PyObject *module, PyObject *number);
PyObject *kv_py_nccl_library(PyObject *module, PyObject *folder);
PyObject *kv_py_optimizer_classes(PyObject *module, PyObject *unused);
PyObject *kv_py_optimizer_check(PyObject *module, PyObject *args);
/* A built-in class and its numbers out of Python's dicts, ranges unchecked; false with an
 * exception.
 */
bool kv_py_optimizer_read(kv_state_t *state, PyObject *name, PyObject *numbers, PyObject *flags,
                          long long begin_num_update, const kv_optim_class_t **optim,
                          kv_optim_numbers_t *out);
PyObject *kv_py_store_optimizer_set(PyObject *self, PyObject *args);
PyObject *kv_py_store_optimizer_owner(PyObject *self, PyObject *unused);
PyObject *kv_py_store_updater_set(PyObject *self, PyObject *args);
PyObject *kv_py_store_compression_set(PyObject *self, PyObject *args);
PyObject *kv_py_store_states_export(PyObject *self, PyObject *args);
PyObject *kv_py_store_states_import(PyObject *self, PyObject *states);
PyObject *kv_py_store_states_put(PyObject *self, PyObject *args);
PyObject *kv_py_store_states_later(PyObject *self, PyObject *entries);

/* kvstore._training.<function>(self, *args, **keywords). */
PyObject *kv_py_training(PyObject *self, const char *function, PyObject *args, PyObject *keywords);
/* Gives keys (a list) that were just initialised the states that wait for them. False with an
 * exception. */
bool kv_py_store_arrive(kv_py_store_t *self, PyObject *keys);

#endif
