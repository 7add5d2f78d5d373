/* The calls of kvstore.KVStore that move values: from Python's arguments to one core call. */
#include "py/call.h"
#include "py/store.h"

static bool parse_priority(kv_state_t *state, PyObject *value, int32_t *out)
{
    *out = 0;
    if (value == NULL)
        return true;
    int overflow = 0;
    long long number = -1;
    if (PyIndex_Check(value))
        number = PyLong_AsLongLongAndOverflow(value, &overflow);
    else
        PyErr_SetNone(PyExc_TypeError);
    if (number == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        kv_py_fail(state, KV_BAD_TYPE, "priority must be an integer, not %.100s",
                   Py_TYPE(value)->tp_name);
        return false;
    }
    if (overflow != 0 || number < INT32_MIN || number > INT32_MAX) {
        kv_py_fail(state, KV_INVALID, "priority must be within 32 bits");
        return false;
    }
    *out = (int32_t)number;
    return true;
}

typedef kv_status_t call_fn(kv_store_t *store, kv_call_t *call, kv_caller_t *caller);

/* One call of init, push, pull, pushpull or broadcast, as given by Python. */
typedef struct request {
    const char *verb;
    call_fn *call;
    PyObject *key, *value, *out, *priority, *async_op;
    bool single;       /* exactly one value a key */
    bool out_is_value; /* pushpull without out */
    bool skip_sparse;  /* pull leaves out row-sparse outs, with a warning */
    PyObject *row_ids; /* row_sparse_pull */
} request_t;

/* Tells an exception that an updater raised which keys had been updated: none by a call with one
 * key, for which `args` may be NULL. */
static void tell_updated_keys(const kv_args_t *args)
{
    PyObject *class, *error, *trace;
    PyErr_Fetch(&class, &error, &trace);
    PyErr_NormalizeException(&class, &error, &trace);
    PyObject *keys = args != NULL ? kv_args_first_keys(args, args->call.num_done) : PyList_New(0);
    if (keys != NULL && PyObject_SetAttrString(error, "updated_keys", keys) == 0 && args != NULL &&
        args->listed) {
        PyObject *note =
            PyUnicode_FromFormat("kvstore: keys updated before by the same call: %R", keys);
        PyObject *done = note != NULL ? PyObject_CallMethod(error, "add_note", "O", note) : NULL;
        Py_XDECREF(note);
        Py_XDECREF(done);
    }
    /* Exceptions without a __dict__ and Python 3.10, which has no notes, do without. */
    PyErr_Clear();
    Py_XDECREF(keys);
    PyErr_Restore(class, error, trace);
}

/* What a call returns that was to be asynchronous: errors of the checks come out at once, errors of
 * the work through the handle. */
static PyObject *async_result(kv_py_store_t *self, const kv_args_t *args, kv_status_t status,
                              kv_handle_t *handle)
{
    if (handle != NULL)
        return kv_handle_wrap(self->state, handle, self->timeout_ns);
    if (status == KV_OK)
        return kv_handle_finished(self->state, NULL);
    kv_py_raise(self->state, status);
    if (!args->call.checked || status == KV_INTERRUPTED)
        return NULL;
    return kv_handle_finished(self->state, kv_py_take_exception());
}

/* Leaves the row-sparse outs out, and warns of them once for a key. */
static bool skip_sparse_outs(kv_py_store_t *self, kv_args_t *args)
{
    kv_view_t *views = args->outs.views;
    kv_lease_t *leases = args->outs.leases;
    int64_t at = 0, kept = 0;
    bool good = true, warned = false;
    for (int64_t i = 0; i < args->num_items; i++) {
        kv_item_t *item = &args->items[i];
        int32_t left = 0;
        bool skipped = false;
        for (int32_t j = 0; j < item->num_outs; j++, at++) {
            if (views[at].sparse != NULL) {
                skipped = true;
                continue;
            }
            /* Those that are left out gather at the end, where they are dropped with the others. */
            kv_view_t view = views[kept];
            kv_lease_t lease = leases[kept];
            views[kept] = views[at];
            leases[kept++] = leases[at];
            views[at] = view;
            leases[at] = lease;
            left++;
        }
        item->outs = views + kept - left;
        item->num_outs = left;
        if (good && skipped && kv_store_first_skip(self->store, &item->name)) {
            warned = true;
            good = PyErr_WarnFormat(PyExc_UserWarning, 1,
                                    "pull of key %R leaves its row-sparse out as it is; use "
                                    "row_sparse_pull, or pull(..., ignore_sparse=False)",
                                    args->keys[i]) == 0;
        }
    }
    args->call.num_outs = kept;
    return good && (!warned || kv_args_look_again(args));
}

/* Tells of compression that has met a NaN or an infinity. */
static bool warn_not_finite(const kv_args_t *args)
{
    return args->call.not_finite[0] == '\0' ||
           PyErr_WarnFormat(PyExc_RuntimeWarning, 1,
                            "the compression of key %s has met a NaN or an infinity: the elements "
                            "concerned stay wrong until set_gradient_compression({'type': 'none'})",
                            args->call.not_finite) == 0;
}

static bool arrive(kv_py_store_t *self, const kv_args_t *args)
{
    PyObject *keys = kv_args_keys(args);
    bool good = keys != NULL && kv_py_store_arrive(self, keys);
    Py_XDECREF(keys);
    return good;
}

static PyObject *run_request(kv_py_store_t *self, const request_t *request)
{
    kv_args_t local, *args = &local;
    kv_py_caller_t caller;
    kv_handle_t *handle = NULL;
    PyObject *result = NULL;
    int wants_handle = 0;
    int32_t priority;

    if (!kv_py_store_check_open(self) || !parse_priority(self->state, request->priority, &priority))
        return NULL;
    if (request->async_op != NULL) {
        wants_handle = PyObject_IsTrue(request->async_op);
        if (wants_handle < 0)
            return NULL;
    }
    if (wants_handle && (args = kv_args_new()) == NULL)
        return NULL;
    if (!kv_args_init(args, self->state, request->verb, request->key, request->value, request->out,
                      request->single, request->out_is_value))
        goto done;
    args->call.priority = priority;
    if ((request->skip_sparse && args->outs.count > 0 && !skip_sparse_outs(self, args)) ||
        (request->row_ids != NULL && !kv_args_row_ids(args, request->row_ids)) ||
        (!wants_handle && !kv_args_keep(args))) {
        if (args == &local)
            kv_args_fini(args);
        goto done;
    }
    if (wants_handle) {
        args->call.async = true;
        args->call.hold = &args->hold;
        args->call.handle = &handle;
    } else {
        args->call.async = kv_args_all_ours(args);
    }
    kv_py_caller_init(&caller, self->timeout_ns);
    kv_status_t status = request->call(self->store, &args->call, &caller.base);
    if (status == KV_CALLBACK)
        tell_updated_keys(args);
    if (wants_handle)
        result = async_result(self, args, status, handle);
    else
        result = status == KV_OK ? Py_NewRef(Py_None) : kv_py_raise(self->state, status);
    if (result != NULL && !warn_not_finite(args))
        Py_CLEAR(result);
    if (result != NULL && KV_UNLIKELY(self->pending != NULL) && request->call == kv_store_init &&
        !arrive(self, args)) {
        PyObject *cause = kv_py_take_exception();
        kv_status_t undone = kv_store_delete(self->store, &args->call, &caller.base);
        (void)undone; /* the keys are there: this call made them */
        PyErr_SetObject((PyObject *)Py_TYPE(cause), cause);
        Py_DECREF(cause);
        Py_CLEAR(result);
    }
    if (args == &local)
        kv_args_fini(args);
done:
    if (args != &local)
        kv_args_drop(args);
    return result;
}

/* A str key without looking at how to make one's UTF-8, or a small integer. */
static bool quick_name(PyObject *key, kv_name_t *name)
{
    if (PyUnicode_CheckExact(key) && PyUnicode_IS_COMPACT_ASCII(key)) {
        name->text = (const char *)PyUnicode_1BYTE_DATA(key);
        name->bytes = (size_t)PyUnicode_GET_LENGTH(key);
        return true;
    }
    int overflow = 1;
    if (PyLong_CheckExact(key)) {
        name->text = NULL;
        name->number = PyLong_AsLongLongAndOverflow(key, &overflow);
    }
    return overflow == 0;
}

/* One small push, pull or pushpull of NumPy arrays. The GIL is kept, so nothing needs to be held.
 * 1: done; 0: left to run_request; -1: the updater has raised. */
static int try_small(kv_py_store_t *self, PyObject *key, PyObject *value, PyObject *out)
{
    kv_name_t name;
    kv_view_t views[2];
    kv_py_caller_t caller;
    bool done;
    if (!quick_name(key, &name) ||
        (value != NULL && !kv_numpy_borrow(self->state, value, false, &views[0])) ||
        (out != NULL && !kv_numpy_borrow(self->state, out, true, &views[1])))
        return 0;
    kv_py_release_now();
    kv_py_caller_init(&caller, self->timeout_ns);
    kv_status_t status = kv_store_try_small(self->store, &name, value != NULL ? &views[0] : NULL,
                                            out != NULL ? &views[1] : NULL, &caller.base, &done);
    if (KV_LIKELY(status == KV_OK))
        return done;
    if (status == KV_CALLBACK)
        tell_updated_keys(NULL);
    else
        kv_py_raise(self->state, status);
    return -1;
}

static const kv_param_t INIT_PARAMS[] = {{"key", true}, {"value", true}};
static const kv_signature_t INIT = {"init", 2, 2, INIT_PARAMS};

PyObject *kv_py_store_init(PyObject *self, PyObject *const *args, Py_ssize_t num_args,
                           PyObject *names)
{
    PyObject *v[2];
    if (!kv_py_parse(&INIT, args, num_args, names, v))
        return NULL;
    request_t request = {
        .verb = "init", .call = kv_store_init, .key = v[0], .value = v[1], .single = true};
    return run_request(as_store(self), &request);
}

static const kv_param_t PUSH_PARAMS[] = {
    {"key", true}, {"value", true}, {"priority", false}, {"async_op", false}};
static const kv_signature_t PUSH = {"push", 4, 3, PUSH_PARAMS};

PyObject *kv_py_store_push(PyObject *self, PyObject *const *args, Py_ssize_t num_args,
                           PyObject *names)
{
    PyObject *v[4];
    if (num_args == 2 && names == NULL) {
        int done = try_small(as_store(self), args[0], args[1], NULL);
        if (KV_LIKELY(done != 0))
            return done > 0 ? Py_NewRef(Py_None) : NULL;
    }
    if (!kv_py_parse(&PUSH, args, num_args, names, v))
        return NULL;
    request_t request = {.verb = "push",
                         .call = kv_store_push,
                         .key = v[0],
                         .value = v[1],
                         .priority = v[2],
                         .async_op = v[3]};
    return run_request(as_store(self), &request);
}

static PyObject *none_as_null(PyObject *object)
{
    return object == Py_None ? NULL : object;
}

static const kv_param_t PUSHPULL_PARAMS[] = {
    {"key", true}, {"value", true}, {"out", false}, {"priority", false}, {"async_op", false}};
static const kv_signature_t PUSHPULL = {"pushpull", 5, 4, PUSHPULL_PARAMS};

PyObject *kv_py_store_pushpull(PyObject *self, PyObject *const *args, Py_ssize_t num_args,
                               PyObject *names)
{
    PyObject *v[5];
    if (num_args == 3 && names == NULL) {
        int done = try_small(as_store(self), args[0], args[1], args[2]);
        if (KV_LIKELY(done != 0))
            return done > 0 ? Py_NewRef(Py_None) : NULL;
    }
    if (!kv_py_parse(&PUSHPULL, args, num_args, names, v))
        return NULL;
    PyObject *out = none_as_null(v[2]);
    request_t request = {.verb = "pushpull",
                         .call = kv_store_push,
                         .key = v[0],
                         .value = v[1],
                         .out = out,
                         .priority = v[3],
                         .async_op = v[4],
                         .out_is_value = out == NULL};
    return run_request(as_store(self), &request);
}

static const kv_param_t BROADCAST_PARAMS[] = {
    {"key", true}, {"value", true}, {"out", true}, {"priority", false}, {"async_op", false}};
static const kv_signature_t BROADCAST = {"broadcast", 5, 4, BROADCAST_PARAMS};

PyObject *kv_py_store_broadcast(PyObject *self, PyObject *const *args, Py_ssize_t num_args,
                                PyObject *names)
{
    PyObject *v[5];
    if (!kv_py_parse(&BROADCAST, args, num_args, names, v))
        return NULL;
    request_t request = {.verb = "broadcast",
                         .call = kv_store_init,
                         .key = v[0],
                         .value = v[1],
                         .out = v[2],
                         .priority = v[3],
                         .async_op = v[4],
                         .single = true};
    return run_request(as_store(self), &request);
}

static PyObject *make_out(kv_py_store_t *self, const kv_name_t *name, bool rows)
{
    kv_dtype_t dtype;
    bool sparse;
    int ndim;
    int64_t shape[KV_MAX_DIMS];
    kv_array_t *array = NULL;
    kv_sparse_t *set = NULL;
    kv_status_t status =
        kv_store_describe(self->store, name, "pull", &dtype, &sparse, &ndim, shape);
    if (status == KV_OK)
        status = rows || sparse ? kv_sparse_new(dtype, ndim, shape, &set)
                                : kv_array_new(dtype, ndim, shape, &array);
    if (status != KV_OK)
        return kv_py_raise(self->state, status);
    return set != NULL ? kv_rowsparse_wrap(self->state, set) : kv_ndarray_wrap(self->state, array);
}

/* New arrays of the keys' shapes and types: one for a key, a list for a list of keys. */
static PyObject *make_outs(kv_py_store_t *self, const char *verb, PyObject *key, bool rows)
{
    kv_args_t args;
    if (!kv_args_init(&args, self->state, verb, key, NULL, NULL, false, false))
        return NULL;
    kv_status_t status = kv_store_check_keys(self->store, &args.call, verb);
    PyObject *outs = NULL;
    if (status != KV_OK)
        kv_py_raise(self->state, status);
    else if (!args.listed)
        outs = make_out(self, &args.items[0].name, rows);
    else
        outs = PyList_New(0);
    for (int64_t i = 0; args.listed && outs != NULL && i < args.num_items; i++) {
        PyObject *out = make_out(self, &args.items[i].name, rows);
        if (out == NULL || PyList_Append(outs, out) < 0)
            Py_CLEAR(outs);
        Py_XDECREF(out);
    }
    kv_args_fini(&args);
    return outs;
}

/* Runs a request whose out may be missing: then the new arrays are the result. */
static PyObject *run_pull(kv_py_store_t *self, request_t *request, bool rows)
{
    PyObject *made = NULL;
    if (request->out == NULL) {
        if (request->async_op != NULL && request->async_op != Py_False)
            return kv_py_fail(self->state, KV_INVALID,
                              "%s with async_op=True needs an out; without one it returns arrays "
                              "that wait for their values when they are read",
                              request->verb);
        if (!kv_py_store_check_open(self) ||
            (made = make_outs(self, request->verb, request->key, rows)) == NULL)
            return NULL;
        request->out = made;
        request->skip_sparse = false;
    }
    PyObject *result = run_request(self, request);
    if (made == NULL || result == NULL || result != Py_None) {
        Py_XDECREF(made);
        return result;
    }
    Py_DECREF(result);
    return made;
}

static const kv_param_t PULL_PARAMS[] = {{"key", true},
                                         {"out", false},
                                         {"priority", false},
                                         {"ignore_sparse", false},
                                         {"async_op", false}};
static const kv_signature_t PULL = {"pull", 5, 4, PULL_PARAMS};

PyObject *kv_py_store_pull(PyObject *self, PyObject *const *args, Py_ssize_t num_args,
                           PyObject *names)
{
    PyObject *v[5];
    if (num_args == 2 && names == NULL) {
        int done = try_small(as_store(self), args[0], NULL, args[1]);
        if (KV_LIKELY(done != 0))
            return done > 0 ? Py_NewRef(Py_None) : NULL;
    }
    if (!kv_py_parse(&PULL, args, num_args, names, v))
        return NULL;
    int ignore = v[3] != NULL ? PyObject_IsTrue(v[3]) : 1;
    if (ignore < 0)
        return NULL;
    request_t request = {.verb = "pull",
                         .call = kv_store_pull,
                         .key = v[0],
                         .out = none_as_null(v[1]),
                         .priority = v[2],
                         .async_op = v[4],
                         .skip_sparse = ignore > 0};
    return run_pull(as_store(self), &request, false);
}

static const kv_param_t ROW_SPARSE_PULL_PARAMS[] = {
    {"key", true}, {"out", false}, {"priority", false}, {"row_ids", false}, {"async_op", false}};
static const kv_signature_t ROW_SPARSE_PULL = {"row_sparse_pull", 5, 4, ROW_SPARSE_PULL_PARAMS};

PyObject *kv_py_store_row_sparse_pull(PyObject *self, PyObject *const *args, Py_ssize_t num_args,
                                      PyObject *names)
{
    PyObject *v[5];
    if (!kv_py_parse(&ROW_SPARSE_PULL, args, num_args, names, v))
        return NULL;
    if (!kv_py_store_check_open(as_store(self)))
        return NULL;
    if (v[3] == NULL || v[3] == Py_None)
        return kv_py_fail(as_store(self)->state, KV_INVALID,
                          "row_sparse_pull needs row_ids, an integer array of rows");
    request_t request = {.verb = "row_sparse_pull",
                         .call = kv_store_row_sparse_pull,
                         .key = v[0],
                         .out = none_as_null(v[1]),
                         .priority = v[2],
                         .async_op = v[4],
                         .row_ids = v[3]};
    return run_pull(as_store(self), &request, true);
}
