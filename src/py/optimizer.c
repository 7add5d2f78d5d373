/* What the Python side of optimizers and states stands on: private methods of kvstore.KVStore that
 * give a store an optimizer, and take out or put back what training has left. The public calls are
 * Python functions of kvstore._training; none of them is called in a training step.
 */
#include "py/call.h"
#include "py/store.h"

#include <math.h>

/* --------------------------------------------------------------------------------- tables */

static const char *const KINDS[] = {"number", "optional", "count", "flag", "choice"};

static PyObject *optional_number(double number)
{
    return isnan(number) ? Py_NewRef(Py_None) : PyFloat_FromDouble(number);
}

static PyObject *choices_tuple(const kv_optim_param_t *param)
{
    Py_ssize_t count = 0;
    while (param->choices != NULL && param->choices[count] != NULL)
        count++;
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple != NULL && i < count; i++) {
        PyObject *text = PyUnicode_FromString(param->choices[i]);
        if (text == NULL)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, text);
    }
    return tuple;
}

/* (name, kind, default, low, high, above_low, below_high, choices) */
static PyObject *param_tuple(const kv_optim_param_t *param)
{
    PyObject *fallback = NULL;
    if (param->kind == KV_PARAM_FLAG)
        fallback = PyBool_FromLong(param->fallback != 0);
    else if (param->kind == KV_PARAM_CHOICE)
        fallback = PyUnicode_FromString(param->choices[(int)param->fallback]);
    else if (param->kind == KV_PARAM_COUNT)
        fallback = PyLong_FromDouble(param->fallback);
    else
        fallback = optional_number(param->fallback);
    PyObject *choices = fallback != NULL ? choices_tuple(param) : NULL;
    if (choices == NULL) {
        Py_XDECREF(fallback);
        return NULL;
    }
    return Py_BuildValue("(ssNddOON)", param->name, KINDS[param->kind], fallback, param->low,
                         param->high, param->above_low ? Py_True : Py_False,
                         param->below_high ? Py_True : Py_False, choices);
}

static bool append(PyObject *list, PyObject *item)
{
    bool done = item != NULL && PyList_Append(list, item) == 0;
    Py_XDECREF(item);
    return done;
}

PyObject *kv_py_optimizer_common(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    PyObject *list = PyList_New(0);
    const kv_optim_param_t *param;
    for (int i = 0; list != NULL && (param = kv_optim_common_at(i)) != NULL; i++)
        if (!append(list, param_tuple(param)))
            Py_CLEAR(list);
    return list;
}

PyObject *kv_py_optimizer_classes(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    PyObject *classes = PyDict_New();
    const kv_optim_class_t *optim;
    for (int i = 0; classes != NULL && (optim = kv_optim_class_at(i)) != NULL; i++) {
        PyObject *params = PyList_New(0);
        for (int p = 0; params != NULL && p < optim->num_params; p++)
            if (!append(params, param_tuple(&optim->params[p])))
                Py_CLEAR(params);
        PyObject *entry = params != NULL
                              ? Py_BuildValue("{sssdsN}", "title", optim->title, "learning_rate",
                                              optim->learning_rate, "params", params)
                              : NULL;
        if (entry == NULL || PyDict_SetItemString(classes, optim->name, entry) < 0)
            Py_CLEAR(classes);
        Py_XDECREF(entry);
    }
    return classes;
}

/* -------------------------------------------------------------------------------- numbers */

/* The value of a parameter out of a dict (absent: its default). */
static bool read_param(kv_state_t *state, const kv_optim_param_t *param, PyObject *numbers,
                       double *out)
{
    PyObject *value = PyDict_GetItemString(numbers, param->name); /* borrowed */
    *out = param->fallback;
    if (value == NULL)
        return true;
    if (value == Py_None && param->kind == KV_PARAM_OPTIONAL) {
        *out = NAN;
        return true;
    }
    if (param->kind == KV_PARAM_CHOICE && PyUnicode_Check(value)) {
        for (int i = 0; param->choices[i] != NULL; i++) {
            if (PyUnicode_CompareWithASCIIString(value, param->choices[i]) == 0) {
                *out = i;
                return true;
            }
        }
    } else if (param->kind != KV_PARAM_CHOICE && !PyUnicode_Check(value)) {
        *out = PyFloat_AsDouble(value);
        /* NaN stands for None in the core; the user's own NaN must not pass for it. */
        if (!(*out == -1.0 && PyErr_Occurred()) &&
            !(param->kind == KV_PARAM_OPTIONAL && isnan(*out)))
            return true;
        PyErr_Clear();
    }
    PyObject *shown = PyObject_Repr(value);
    if (shown != NULL)
        kv_py_fail(state, KV_INVALID, "%s=%.100s is no value that this parameter can have",
                   param->name, PyUnicode_AsUTF8(shown));
    Py_XDECREF(shown);
    return false;
}

static bool read_flag(PyObject *flags, const char *name, bool *out)
{
    PyObject *value = PyDict_GetItemString(flags, name);
    int truth = value != NULL ? PyObject_IsTrue(value) : 0;
    *out = truth > 0;
    return truth >= 0;
}

static bool read_numbers(kv_state_t *state, PyObject *name, PyObject *numbers,
                         const kv_optim_class_t **optim, kv_optim_numbers_t *out)
{
    const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : NULL;
    const kv_optim_param_t *param;
    bool python = text != NULL && strchr(text, ':') != NULL; /* module:class */
    *optim = python ? kv_optim_python() : text != NULL ? kv_optim_class_find(text) : NULL;
    if (*optim == NULL || !PyDict_Check(numbers)) {
        PyErr_Clear();
        kv_py_fail(state, KV_INVALID, "there is no built-in optimizer of this name");
        return false;
    }
    *out = (kv_optim_numbers_t){.clip_gradient = NAN};
    if (python)
        out->python = kv_name_hash(&(kv_name_t){.text = text, .bytes = (uint32_t)strlen(text)}) | 1;
    for (int i = 0; (param = kv_optim_common_at(i)) != NULL; i++) {
        double *target = strcmp(param->name, "learning_rate") == 0  ? &out->learning_rate
                         : strcmp(param->name, "wd") == 0           ? &out->wd
                         : strcmp(param->name, "rescale_grad") == 0 ? &out->rescale_grad
                                                                    : &out->clip_gradient;
        if (!read_param(state, param, numbers, target))
            return false;
    }
    if (PyDict_GetItemString(numbers, "learning_rate") == NULL)
        out->learning_rate = (*optim)->learning_rate;
    for (int p = 0; p < (*optim)->num_params; p++)
        if (!read_param(state, &(*optim)->params[p], numbers, &out->params[p]))
            return false;
    return true;
}

bool kv_py_optimizer_read(kv_state_t *state, PyObject *name, PyObject *numbers, PyObject *flags,
                          long long begin_num_update, const kv_optim_class_t **optim,
                          kv_optim_numbers_t *out)
{
    if (!read_numbers(state, name, numbers, optim, out) ||
        !read_flag(flags, "multi_precision", &out->multi_precision) ||
        !read_flag(flags, "lazy_update", &out->lazy_update))
        return false;
    out->begin_num_update = begin_num_update;
    return true;
}

PyObject *kv_py_optimizer_check(PyObject *module, PyObject *args)
{
    kv_state_t *state = kv_py_state(module);
    PyObject *name, *numbers;
    const kv_optim_class_t *optim;
    kv_optim_numbers_t parsed;
    if (!PyArg_ParseTuple(args, "OO", &name, &numbers) ||
        !read_numbers(state, name, numbers, &optim, &parsed))
        return NULL;
    kv_status_t status = kv_optim_check(optim, &parsed);
    if (status != KV_OK)
        return kv_py_raise(state, status);
    Py_RETURN_NONE;
}

/* ------------------------------------------------------------------------------- schedule */

typedef struct py_schedule {
    kv_schedule_t base;
    kv_release_t release;
    kv_state_t *state;
    PyObject *function;
} py_schedule_t;

static kv_status_t schedule_rate(kv_schedule_t *base, int64_t num_update, double *rate)
{
    py_schedule_t *schedule = (py_schedule_t *)base;
    PyObject *result = PyObject_CallFunction(schedule->function, "L", (long long)num_update);
    if (result == NULL)
        return KV_CALLBACK;
    double number = PyFloat_AsDouble(result);
    bool failed = number == -1.0 && PyErr_Occurred();
    if (!failed && isfinite(number)) {
        *rate = number;
        Py_DECREF(result);
        return KV_OK;
    }
    PyErr_Clear();
    PyObject *shown = PyObject_Repr(result);
    if (shown != NULL)
        kv_py_fail(schedule->state, KV_INVALID,
                   "the schedule gave %.100s as the learning rate of update %lld, which is no "
                   "finite number",
                   PyUnicode_AsUTF8(shown), (long long)num_update);
    Py_XDECREF(shown);
    Py_DECREF(result);
    return KV_CALLBACK;
}

static void release_schedule(kv_release_t *release)
{
    py_schedule_t *schedule = (py_schedule_t *)((char *)release - offsetof(py_schedule_t, release));
    Py_XDECREF(schedule->function);
    kv_free(schedule);
    kv_count(KV_COUNT_HOLDS, -1);
}

static void schedule_free(kv_schedule_t *base)
{
    kv_py_release_later(&((py_schedule_t *)base)->release);
}

static py_schedule_t *schedule_new(kv_state_t *state, PyObject *function)
{
    py_schedule_t *schedule = kv_calloc(1, sizeof *schedule);
    if (schedule == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    *schedule = (py_schedule_t){.base = {schedule_rate, schedule_free},
                                .release.free = release_schedule,
                                .state = state,
                                .function = Py_NewRef(function)};
    kv_count(KV_COUNT_HOLDS, 1);
    return schedule;
}

/* ------------------------------------------------------------------------ set an optimizer */

/* [(key, lr_mult, wd_mult, plain_rate), …] into a block of the caller's to free. */
static bool read_multipliers(kv_state_t *state, PyObject *list, kv_multiplier_t **out,
                             Py_ssize_t *count)
{
    *count = PyList_GET_SIZE(list);
    *out = kv_calloc((size_t)*count, sizeof **out);
    if (*out == NULL) {
        PyErr_NoMemory();
        return false;
    }
    for (Py_ssize_t i = 0; i < *count; i++) {
        PyObject *key;
        kv_multiplier_t *one = &(*out)[i];
        int plain;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(list, i), "Oddp", &key, &one->lr, &one->wd, &plain) ||
            !kv_py_name(state, key, &one->name)) {
            kv_free(*out);
            return false;
        }
        one->plain_rate = plain != 0;
    }
    return true;
}

PyObject *kv_py_store_optimizer_set(PyObject *object, PyObject *args)
{
    kv_py_store_t *self = as_store(object);
    PyObject *owner, *name, *numbers, *flags, *schedule, *list;
    long long begin;
    unsigned long long declared;
    kv_optim_numbers_t parsed;
    const kv_optim_class_t *optim;
    if (!kv_py_store_check_open(self) ||
        !PyArg_ParseTuple(args, "OOO!O!OO!LK", &owner, &name, &PyDict_Type, &numbers, &PyDict_Type,
                          &flags, &schedule, &PyList_Type, &list, &begin, &declared) ||
        !kv_py_optimizer_read(self->state, name, numbers, flags, begin, &optim, &parsed))
        return NULL;
    kv_multiplier_t *multipliers;
    Py_ssize_t count;
    if (!read_multipliers(self->state, list, &multipliers, &count))
        return NULL;
    py_schedule_t *asked = NULL;
    if (schedule != Py_None && (asked = schedule_new(self->state, schedule)) == NULL) {
        kv_free(multipliers);
        return NULL;
    }
    kv_optimizer_t *optimizer;
    kv_status_t status = kv_optimizer_new(optim, &parsed, asked != NULL ? &asked->base : NULL,
                                          multipliers, count, declared, &optimizer);
    kv_free(multipliers);
    if (status == KV_OK) {
        status = kv_store_set_optimizer(self->store, optimizer);
        if (status != KV_OK)
            kv_optimizer_rele(optimizer);
    }
    if (status != KV_OK)
        return kv_py_raise(self->state, status);
    self->updater = NULL;
    self->schedule = asked != NULL ? schedule : NULL;
    Py_XSETREF(self->owner, Py_NewRef(owner));
    kv_py_release_now();
    Py_RETURN_NONE;
}

PyObject *kv_py_store_optimizer_owner(PyObject *object, PyObject *unused)
{
    (void)unused;
    kv_py_store_t *self = as_store(object);
    if (!kv_py_store_check_open(self))
        return NULL;
    return Py_NewRef(self->owner != NULL ? self->owner : Py_None);
}

PyObject *kv_py_store_updater_set(PyObject *object, PyObject *args)
{
    kv_py_store_t *self = as_store(object);
    PyObject *function, *owner;
    if (!kv_py_store_check_open(self) || !PyArg_ParseTuple(args, "OO", &function, &owner))
        return NULL;
    if (!kv_py_store_use_updater(self, function, owner))
        return NULL;
    Py_RETURN_NONE;
}

PyObject *kv_py_store_compression_set(PyObject *object, PyObject *args)
{
    kv_py_store_t *self = as_store(object);
    const char *type;
    kv_codec_t codec = {0};
    if (!kv_py_store_check_open(self) || !PyArg_ParseTuple(args, "sd", &type, &codec.threshold))
        return NULL;
    int parsed = kv_codec_type_parse(type);
    if (parsed < 0)
        return kv_py_fail(self->state, KV_INVALID, "there is no compression '%.64s'", type);
    codec.type = (kv_codec_type_t)parsed;
    kv_status_t status = kv_store_set_compression(self->store, &codec);
    if (status != KV_OK)
        return kv_py_raise(self->state, status);
    Py_RETURN_NONE;
}

/* -------------------------------------------------------------- calls that Python carries out */

PyObject *kv_py_training(PyObject *object, const char *function, PyObject *args, PyObject *keywords)
{
    if (!kv_py_store_check_open(as_store(object)))
        return NULL;
    PyObject *result = NULL, *all = NULL, *callable = NULL;
    PyObject *module = PyImport_ImportModule("kvstore._training");
    if (module != NULL)
        callable = PyObject_GetAttrString(module, function);
    PyObject *first = callable != NULL ? PyTuple_Pack(1, object) : NULL;
    if (first != NULL)
        all = PySequence_Concat(first, args);
    if (all != NULL)
        result = PyObject_Call(callable, all, keywords);
    Py_XDECREF(all);
    Py_XDECREF(first);
    Py_XDECREF(callable);
    Py_XDECREF(module);
    return result;
}
