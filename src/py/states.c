/* States of training as Python objects: a dict of numbers and NumPy arrays, for kvstore._training
 * to write to a file or to take from one.
 */
#include "py/call.h"
#include "py/store.h"

#include <math.h>

/* --------------------------------------------------------------------------------- export */

/* Adds what one key has to `keys` and `residuals`. */
static bool export_key(kv_state_t *state, const kv_key_state_t *key, bool sparse, PyObject *keys,
                       PyObject *residuals)
{
    PyObject *name = kv_py_name_object(&key->name), *slots = PyDict_New();
    bool good = name != NULL && slots != NULL;
    for (int i = 0; good && i < key->num_parts; i++) {
        const kv_state_part_t *part = &key->parts[i];
        PyObject *array = kv_numpy_buffer(state, part->dtype, part->ndim, part->shape, part->data);
        PyObject *item = NULL;
        good = array != NULL;
        if (good && strncmp(part->slot, "residual.", 9) == 0) {
            item = Py_BuildValue("(OlO)", name, strtol(part->slot + 9, NULL, 10), array);
            good = item != NULL && PyList_Append(residuals, item) == 0;
        } else if (good) {
            good = PyDict_SetItemString(slots, part->slot, array) == 0;
        }
        Py_XDECREF(item);
        Py_XDECREF(array);
    }
    if (good && key->count >= 0) {
        PyObject *item = Py_BuildValue("(OLsO)", name, (long long)key->count,
                                       sparse ? "row_sparse" : "default", slots);
        good = item != NULL && PyList_Append(keys, item) == 0;
        Py_XDECREF(item);
    }
    Py_XDECREF(slots);
    Py_XDECREF(name);
    return good;
}

static PyObject *export_all(kv_py_store_t *self, const kv_states_t *states)
{
    PyObject *keys = PyList_New(0), *residuals = PyList_New(0), *codec = NULL, *result = NULL;
    bool good = keys != NULL && residuals != NULL;
    for (int64_t k = 0; good && k < states->num_keys; k++) {
        kv_dtype_t dtype;
        int ndim;
        bool sparse = false;
        /* A key deleted meanwhile counts as dense: nobody can look. */
        if (kv_store_describe(self->store, &states->keys[k].name, "save", &dtype, &sparse, &ndim,
                              NULL) != KV_OK)
            sparse = false;
        good = export_key(self->state, &states->keys[k], sparse, keys, residuals);
    }
    if (good)
        codec = states->codec.type == KV_CODEC_NONE
                    ? Py_NewRef(Py_None)
                    : Py_BuildValue("{sssd}", "type", kv_codec_type_name(states->codec.type),
                                    "threshold", states->codec.threshold);
    if (codec != NULL) {
        const kv_optim_state_t *whole = &states->whole;
        PyObject *last =
            isnan(whole->last_rate) ? Py_NewRef(Py_None) : PyFloat_FromDouble(whole->last_rate);
        if (last != NULL)
            result = Py_BuildValue(
                "{sKsLsLsdsNsKsKsOsOsO}", "counted", (unsigned long long)states->counted, "total",
                (long long)states->total, "num_update", (long long)whole->num_update,
                "nadam_product", whole->nadam_product, "last_rate", last, "seed",
                (unsigned long long)whole->seed, "draws", (unsigned long long)whole->draws, "keys",
                keys, "residuals", residuals, "compression", codec);
    }
    Py_XDECREF(codec);
    Py_XDECREF(residuals);
    Py_XDECREF(keys);
    return result;
}

/* kvstore._states.<function>(first, a, b), `b` may be NULL. */
static PyObject *call_states(const char *function, PyObject *first, PyObject *a, PyObject *b)
{
    PyObject *module = PyImport_ImportModule("kvstore._states");
    PyObject *result = NULL;
    if (module != NULL)
        result = b != NULL ? PyObject_CallMethod(module, function, "OOO", first, a, b)
                           : PyObject_CallMethod(module, function, "OO", first, a);
    Py_XDECREF(module);
    return result;
}

PyObject *kv_py_store_states_export(PyObject *object, PyObject *args)
{
    kv_py_store_t *self = as_store(object);
    kv_states_t states;
    kv_py_caller_t caller;
    int share = KV_STATES_ALL;
    if (!kv_py_store_check_open(self) || !PyArg_ParseTuple(args, "|i", &share))
        return NULL;
    kv_py_caller_init(&caller, self->timeout_ns);
    kv_status_t status =
        kv_store_export_states(self->store, (kv_states_share_t)share, &states, &caller.base);
    if (status != KV_OK)
        return kv_py_raise(self->state, status);
    PyObject *result = export_all(self, &states);
    kv_states_fini(&states);
    if (result != NULL && share == KV_STATES_ALL && self->pending != NULL) {
        PyObject *pending = Py_NewRef(self->pending);
        PyObject *done = call_states("add_pending", object, result, pending);
        if (done == NULL)
            Py_CLEAR(result);
        Py_XDECREF(done);
        Py_DECREF(pending);
    }
    return result;
}

/* --------------------------------------------------------------------------------- import */

/* States under construction: what was read from Python's dict. */
typedef struct reader {
    kv_state_t *state;
    kv_states_t states;
    int64_t (*shapes)[KV_MAX_DIMS]; /* of the parts, in their order */
    int64_t num_parts, max_parts;
} reader_t;

/* A copy of the array as the next part of `key`. */
static bool read_part(reader_t *reader, kv_key_state_t *key, const char *slot, PyObject *array)
{
    kv_view_t view;
    kv_lease_t lease;
    kv_state_part_t *part = &key->parts[key->num_parts];
    if (strlen(slot) >= sizeof part->slot) {
        kv_py_fail(reader->state, KV_INVALID, "no optimizer keeps a state called '%.64s'", slot);
        return false;
    }
    if (!kv_py_array_in(reader->state, array, false, &view, &lease))
        return false;
    bool good = false;
    kv_status_t status = KV_OK;
    if (view.array != NULL || view.sparse != NULL || view.dtype == KV_DTYPE_NONE ||
        kv_view_beyond(&view))
        kv_py_fail(reader->state, KV_BAD_TYPE, "state '%s' must be an array of numbers", slot);
    else if ((status = kv_buffer_new((size_t)view.count * kv_dtype_bytes(view.dtype),
                                     &part->data)) != KV_OK)
        kv_py_raise(reader->state, status);
    else
        good = true;
    if (good) {
        int64_t *shape = reader->shapes[reader->num_parts++];
        strcpy(part->slot, slot);
        part->dtype = (kv_dtype_t)view.dtype;
        part->ndim = view.ndim;
        part->shape = shape;
        for (int i = 0; i < view.ndim; i++)
            shape[i] = view.shape[i];
        key->num_parts++;
        good = kv_view_copy_out(reader->state, &view, part->data->data);
    }
    kv_lease_drop(&lease);
    return good;
}

/* One (key, count, {slot: array}). The name's text is borrowed from the key object, which the list
 * keeps. */
static bool read_key(reader_t *reader, PyObject *item)
{
    PyObject *key, *slots, *slot, *array;
    long long count;
    Py_ssize_t position = 0;
    kv_key_state_t *state = &reader->states.keys[reader->states.num_keys];
    if (!PyArg_ParseTuple(item, "OLO!", &key, &count, &PyDict_Type, &slots) ||
        !kv_py_name(reader->state, key, &state->name))
        return false;
    state->count = count;
    state->parts = kv_calloc((size_t)PyDict_GET_SIZE(slots), sizeof *state->parts);
    if (state->parts == NULL) {
        PyErr_NoMemory();
        return false;
    }
    reader->states.num_keys++;
    while (PyDict_Next(slots, &position, &slot, &array)) {
        const char *text = PyUnicode_Check(slot) ? PyUnicode_AsUTF8(slot) : NULL;
        if (text == NULL || reader->num_parts == reader->max_parts) {
            if (!PyErr_Occurred())
                kv_py_fail(reader->state, KV_INVALID, "a state's name must be a str");
            return false;
        }
        if (!read_part(reader, state, text, array))
            return false;
    }
    return true;
}

static bool read_whole(PyObject *whole, kv_optim_state_t *out)
{
    long long num_update;
    unsigned long long seed, draws;
    PyObject *last;
    if (!PyArg_ParseTuple(whole, "LdOKK", &num_update, &out->nadam_product, &last, &seed, &draws))
        return false;
    out->num_update = num_update;
    out->last_rate = last == Py_None ? NAN : PyFloat_AsDouble(last);
    out->seed = seed;
    out->draws = draws;
    return !PyErr_Occurred();
}

static bool count_parts(reader_t *reader, PyObject *list)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++) {
        PyObject *item = PyList_GET_ITEM(list, i);
        if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) != 3 ||
            !PyDict_Check(PyTuple_GET_ITEM(item, 2))) {
            PyErr_SetString(PyExc_TypeError, "states are (key, count, {slot: array})");
            return false;
        }
        reader->max_parts += PyDict_GET_SIZE(PyTuple_GET_ITEM(item, 2));
    }
    reader->shapes = kv_calloc((size_t)reader->max_parts, sizeof *reader->shapes);
    reader->states.keys = kv_calloc((size_t)PyList_GET_SIZE(list), sizeof *reader->states.keys);
    if (reader->shapes != NULL && reader->states.keys != NULL)
        return true;
    PyErr_NoMemory();
    return false;
}

PyObject *kv_py_store_states_put(PyObject *object, PyObject *args)
{
    kv_py_store_t *self = as_store(object);
    PyObject *whole, *list;
    int share = KV_STATES_ALL;
    unsigned long long counted = 0;
    reader_t reader = {.state = self->state};
    if (!kv_py_store_check_open(self) ||
        !PyArg_ParseTuple(args, "OO!|iK", &whole, &PyList_Type, &list, &share, &counted))
        return NULL;
    bool good = count_parts(&reader, list);
    for (Py_ssize_t i = 0; good && i < PyList_GET_SIZE(list); i++)
        good = read_key(&reader, PyList_GET_ITEM(list, i));
    bool keep = whole == Py_None;
    reader.states.counted = counted;
    if (good && !keep)
        good = read_whole(whole, &reader.states.whole);
    kv_status_t status = KV_OK;
    if (good) {
        kv_py_caller_t caller;
        kv_py_caller_init(&caller, self->timeout_ns);
        status = kv_store_import_states(self->store, &reader.states, keep, (kv_states_share_t)share,
                                        &caller.base);
    }
    kv_states_fini(&reader.states);
    kv_free(reader.shapes);
    if (!good)
        return NULL;
    if (status != KV_OK)
        return kv_py_raise(self->state, status);
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------- states that come early */

PyObject *kv_py_store_states_import(PyObject *object, PyObject *states)
{
    if (!kv_py_store_check_open(as_store(object)))
        return NULL;
    return call_states("import_states", object, states, NULL);
}

PyObject *kv_py_store_states_later(PyObject *object, PyObject *entries)
{
    kv_py_store_t *self = as_store(object);
    if (!kv_py_store_check_open(self))
        return NULL;
    PyObject *later = PyDict_Check(entries) && PyDict_GET_SIZE(entries) > 0 ? entries : NULL;
    Py_XSETREF(self->pending, Py_XNewRef(later));
    Py_RETURN_NONE;
}

bool kv_py_store_arrive(kv_py_store_t *self, PyObject *keys)
{
    PyObject *pending = Py_NewRef(self->pending);
    PyObject *result = call_states("arrive", (PyObject *)self, pending, keys);
    Py_DECREF(pending);
    Py_XDECREF(result);
    return result != NULL;
}
