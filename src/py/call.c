/* See call.h. The order of the checks is that of the contract: first the form of the lists and what
 * is no array, then what is no key. */
#include "py/call.h"

/* ---------------------------------------------------------------------------------- keys */

/* NumPy 1's bool has an __index__, and warns of it. */
static bool is_bool(PyObject *key)
{
    return PyBool_Check(key) || strcmp(Py_TYPE(key)->tp_name, "numpy.bool_") == 0 ||
           strcmp(Py_TYPE(key)->tp_name, "numpy.bool") == 0;
}

bool kv_py_name(kv_state_t *state, PyObject *key, kv_name_t *name)
{
    if (PyUnicode_Check(key)) {
        Py_ssize_t bytes;
        const char *text = PyUnicode_AsUTF8AndSize(key, &bytes);
        if (text == NULL) {
            if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError))
                return false;
            PyErr_Clear();
            kv_py_fail(state, KV_INVALID, "a key holds a lone surrogate, which no UTF-8 text can");
            return false;
        }
        if (bytes == 0) {
            kv_py_fail(state, KV_INVALID, "a key must not be the empty str ''");
            return false;
        }
        *name = (kv_name_t){.text = text, .bytes = (size_t)bytes};
        return true;
    }
    if (is_bool(key) || !PyIndex_Check(key)) {
        kv_py_fail(state, KV_BAD_TYPE, "a key must be a str or an integer, not %.100s",
                   Py_TYPE(key)->tp_name);
        return false;
    }
    PyObject *index = PyNumber_Index(key);
    if (index == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_TypeError))
            return false;
        PyErr_Clear();
        kv_py_fail(state, KV_BAD_TYPE, "a key must be a str or an integer, not %.100s",
                   Py_TYPE(key)->tp_name);
        return false;
    }
    int overflow;
    long long number = PyLong_AsLongLongAndOverflow(index, &overflow);
    Py_DECREF(index);
    if (overflow) {
        kv_py_fail(state, KV_INVALID, "an integer key must fit into signed 64 bits");
        return false;
    }
    *name = (kv_name_t){.number = number};
    return true;
}

PyObject *kv_py_name_object(const kv_name_t *name)
{
    if (name->text != NULL)
        return PyUnicode_DecodeUTF8(name->text, (Py_ssize_t)name->bytes, NULL);
    return PyLong_FromLongLong(name->number);
}

/* --------------------------------------------------------------------------------- lists */

static bool is_list(PyObject *object)
{
    return PyList_Check(object) || PyTuple_Check(object);
}

static Py_ssize_t list_length(PyObject *list)
{
    return PyList_Check(list) ? PyList_GET_SIZE(list) : PyTuple_GET_SIZE(list);
}

/* A new reference to item i, NULL when another thread has shortened the list. */
static PyObject *list_item(PyObject *list, Py_ssize_t i)
{
    if (i >= list_length(list))
        return NULL;
    PyObject *item = PyList_Check(list) ? PyList_GET_ITEM(list, i) : PyTuple_GET_ITEM(list, i);
    return Py_NewRef(item);
}

static bool views_reserve(kv_views_t *views)
{
    if (KV_LIKELY(views->count < views->capacity))
        return true;
    int64_t capacity = views->capacity * 4;
    kv_view_t *more = kv_alloc((size_t)capacity * sizeof *more);
    kv_lease_t *leases = kv_alloc((size_t)capacity * sizeof *leases);
    if (more == NULL || leases == NULL) {
        kv_free(more);
        kv_free(leases);
        PyErr_NoMemory();
        return false;
    }
    memcpy(more, views->views, (size_t)views->count * sizeof *more);
    memcpy(leases, views->leases, (size_t)views->count * sizeof *leases);
    if (views->views != views->local_views) {
        kv_free(views->views);
        kv_free(views->leases);
    }
    views->views = more;
    views->leases = leases;
    views->capacity = capacity;
    return true;
}

static void views_init(kv_views_t *views)
{
    views->views = views->local_views;
    views->leases = views->local_leases;
    views->count = 0;
    views->capacity = KV_LOCAL_VIEWS;
}

static void views_fini(kv_views_t *views)
{
    for (int64_t i = 0; i < views->count; i++)
        kv_lease_drop(&views->leases[i]);
    if (views->views != views->local_views) {
        kv_free(views->views);
        kv_free(views->leases);
    }
    views_init(views);
}

/* Puts "push of key 'w': " before the message of the error in flight, if it is one of ours. */
static void name_key(const kv_args_t *args, PyObject *key)
{
    PyObject *class, *error, *trace;
    if (!PyErr_ExceptionMatches(args->state->errors[KV_BAD_TYPE]))
        return;
    PyErr_Fetch(&class, &error, &trace);
    PyErr_NormalizeException(&class, &error, &trace);
    PyObject *text = PyUnicode_FromFormat("%s of key %R: %S", args->verb, key, error);
    if (text != NULL) {
        PyObject *arguments = PyTuple_Pack(1, text);
        if (arguments == NULL || PyObject_SetAttrString(error, "args", arguments) < 0)
            PyErr_Clear();
        Py_XDECREF(arguments);
        Py_DECREF(text);
    } else {
        PyErr_Clear();
    }
    PyErr_Restore(class, error, trace);
}

static bool add_array(kv_args_t *args, PyObject *key, PyObject *array, bool for_out,
                      kv_views_t *views)
{
    if (!views_reserve(views))
        return false;
    if (KV_UNLIKELY(is_list(array))) {
        kv_py_fail(args->state, KV_INVALID,
                   "%s nests lists deeper than a list of keys with a list of arrays for each",
                   args->verb);
        return false;
    }
    if (KV_UNLIKELY(!kv_py_array_in(args->state, array, for_out, &views->views[views->count],
                                    &views->leases[views->count]))) {
        name_key(args, key);
        return false;
    }
    args->python_ran = args->python_ran || views->leases[views->count].data != NULL;
    views->count++;
    return true;
}

static bool look_at_views(kv_args_t *args, kv_views_t *views)
{
    for (int64_t i = 0; i < views->count; i++) {
        kv_lease_t *lease = &views->leases[i], fresh;
        if (lease->data != NULL || views->views[i].array != NULL || views->views[i].sparse != NULL)
            continue;
        int known = kv_numpy_array_in(args->state, lease->owner, &views->views[i], &fresh);
        if (known < 0)
            return false;
        if (known > 0) {
            kv_lease_drop(lease);
            *lease = fresh;
        }
    }
    return true;
}

bool kv_args_look_again(kv_args_t *args)
{
    return look_at_views(args, &args->values) && look_at_views(args, &args->outs);
}

/* The array or the list of arrays that belongs to one key. */
static bool add_entry(kv_args_t *args, PyObject *key, PyObject *entry, const char *what,
                      bool single, bool for_out, kv_views_t *views, int32_t *count)
{
    int64_t before = views->count;
    if (!is_list(entry)) {
        *count = 1;
        return add_array(args, key, entry, for_out, views);
    }
    Py_ssize_t length = list_length(entry);
    if (length == 0 || length > INT32_MAX || (single && length != 1)) {
        const char *due = single ? "exactly one is needed" : "at least one is needed";
        PyObject *shown = PyObject_Repr(key);
        if (shown != NULL)
            kv_py_fail(args->state, KV_INVALID, "%s of key %.100s: %zd %ss were given, %s",
                       args->verb, PyUnicode_AsUTF8(shown), length, what, due);
        Py_XDECREF(shown);
        return false;
    }
    for (Py_ssize_t i = 0; i < length; i++) {
        PyObject *array = list_item(entry, i);
        if (array == NULL) {
            kv_py_fail(args->state, KV_INVALID, "a list of %ss was changed during the call", what);
            return false;
        }
        bool added = add_array(args, key, array, for_out, views);
        Py_DECREF(array);
        if (!added)
            return false;
    }
    *count = (int32_t)(views->count - before);
    return true;
}

/* All values, or all outs, of the call. */
static bool add_all(kv_args_t *args, PyObject *key, PyObject *given, const char *what, bool single,
                    bool for_out, kv_views_t *views)
{
    bool outs = views == &args->outs;
    if (!args->listed)
        return add_entry(args, key, given, what, single, for_out, views,
                         outs ? &args->items[0].num_outs : &args->items[0].num_values);
    if (!is_list(given)) {
        kv_py_fail(args->state, KV_INVALID,
                   "%s of a list of %lld keys needs a list of %lld %ss, not one %.100s", args->verb,
                   (long long)args->num_items, (long long)args->num_items, what,
                   Py_TYPE(given)->tp_name);
        return false;
    }
    if (list_length(given) != args->num_items) {
        kv_py_fail(args->state, KV_INVALID, "%s of a list of %lld keys got a list of %zd %ss",
                   args->verb, (long long)args->num_items, list_length(given), what);
        return false;
    }
    for (int64_t i = 0; i < args->num_items; i++) {
        PyObject *entry = list_item(given, (Py_ssize_t)i);
        if (entry == NULL) {
            kv_py_fail(args->state, KV_INVALID, "a list of %ss was changed during the call", what);
            return false;
        }
        bool added = add_entry(args, args->keys[i], entry, what, single, for_out, views,
                               outs ? &args->items[i].num_outs : &args->items[i].num_values);
        Py_DECREF(entry);
        if (!added)
            return false;
    }
    return true;
}

/* Takes references to the keys, which are converted last. */
static bool take_keys(kv_args_t *args, PyObject *key)
{
    args->listed = is_list(key);
    args->num_items = args->listed ? list_length(key) : 1;
    args->items = args->local_items;
    args->keys = args->local_keys;
    if (args->num_items > KV_LOCAL_ITEMS) {
        args->items = kv_alloc((size_t)args->num_items * (sizeof(kv_item_t) + sizeof(PyObject *)));
        if (args->items == NULL) {
            args->items = args->local_items;
            args->num_items = 0;
            PyErr_NoMemory();
            return false;
        }
        args->keys = (PyObject **)(args->items + args->num_items);
    }
    int64_t wanted = args->num_items;
    for (int64_t i = 0; i < wanted; i++) {
        PyObject *one = args->listed ? list_item(key, (Py_ssize_t)i) : Py_NewRef(key);
        if (one == NULL) {
            args->num_items = i;
            kv_py_fail(args->state, KV_INVALID, "a list of keys was changed during the call");
            return false;
        }
        args->keys[i] = one;
        args->items[i].num_values = args->items[i].num_outs = 0;
    }
    return true;
}

bool kv_args_init(kv_args_t *args, kv_state_t *state, const char *verb, PyObject *key,
                  PyObject *value, PyObject *out, bool single, bool out_is_value)
{
    args->state = state;
    args->verb = verb;
    args->python_ran = false;
    args->row_ids = NULL;
    args->kept = NULL;
    views_init(&args->values);
    views_init(&args->outs);
    if (!take_keys(args, key) ||
        (value != NULL &&
         !add_all(args, key, value, "value", single, out_is_value, &args->values)) ||
        (out != NULL && !add_all(args, key, out, "out", false, true, &args->outs)))
        goto error;
    const kv_view_t *values = args->values.views;
    const kv_view_t *outs = out_is_value ? values : args->outs.views;
    for (int64_t i = 0; i < args->num_items; i++) {
        kv_item_t *item = &args->items[i];
        if (!kv_py_name(state, args->keys[i], &item->name))
            goto error;
        args->python_ran = args->python_ran || !(PyUnicode_CheckExact(args->keys[i]) ||
                                                 PyLong_CheckExact(args->keys[i]));
        if (out_is_value)
            item->num_outs = item->num_values;
        item->values = values;
        item->outs = outs;
        values += item->num_values;
        outs += item->num_outs;
    }
    if (args->python_ran && !kv_args_look_again(args))
        goto error;
    args->call = (kv_call_t){.items = args->items,
                             .num_items = args->num_items,
                             .values = args->values.views,
                             .outs = out_is_value ? args->values.views : args->outs.views,
                             .num_values = args->values.count,
                             .num_outs = out_is_value ? args->values.count : args->outs.count};
    return true;
error:
    kv_args_fini(args);
    return false;
}

/* ------------------------------------------------------------------- CUDA arrays of a call */

typedef struct keep {
    kv_hold_t hold;
    kv_release_t release;
    int64_t count;
    kv_lease_t leases[];
} keep_t;

static keep_t *keep_of(kv_hold_t *hold)
{
    return (keep_t *)((char *)hold - offsetof(keep_t, hold));
}

static void release_keep(kv_release_t *release)
{
    keep_t *keep = (keep_t *)((char *)release - offsetof(keep_t, release));
    for (int64_t i = 0; i < keep->count; i++)
        kv_lease_drop(&keep->leases[i]);
    kv_free(keep);
    kv_count(KV_COUNT_HOLDS, -1);
}

static void release_keep_later(kv_hold_t *hold)
{
    kv_py_release_later(&keep_of(hold)->release);
}

static int64_t count_cuda(const kv_views_t *views)
{
    int64_t count = 0;
    for (int64_t i = 0; i < views->count; i++)
        count += (views->views[i].flags & KV_VIEW_CUDA) != 0;
    return count;
}

static void move_leases(kv_views_t *views, keep_t *keep)
{
    for (int64_t i = 0; i < views->count; i++) {
        if (!(views->views[i].flags & KV_VIEW_CUDA))
            continue;
        keep->leases[keep->count++] = views->leases[i];
        views->leases[i] = (kv_lease_t){.owner = NULL};
    }
}

bool kv_args_keep(kv_args_t *args)
{
    int64_t count = count_cuda(&args->values) + count_cuda(&args->outs);
    if (KV_LIKELY(count == 0))
        return true;
    keep_t *keep = kv_alloc(sizeof *keep + (size_t)count * sizeof keep->leases[0]);
    if (keep == NULL) {
        PyErr_NoMemory();
        return false;
    }
    atomic_init(&keep->hold.refs, 1);
    keep->hold.release = release_keep_later;
    keep->release.free = release_keep;
    keep->count = 0;
    move_leases(&args->values, keep);
    move_leases(&args->outs, keep);
    kv_count(KV_COUNT_HOLDS, 1);
    args->kept = args->call.hold = &keep->hold;
    return true;
}

/* --------------------------------------------------------------------------------- row ids */

/* Whether the object is row ids, and not a list of such for several outs: a list of integers is. */
static bool is_ids(PyObject *object)
{
    if (!is_list(object) || list_length(object) == 0)
        return true;
    PyObject *first = list_item(object, 0);
    /* Not every array is a sequence. */
    bool number = first != NULL && !PySequence_Check(first) &&
                  !PyObject_HasAttrString(first, "__dlpack__") &&
                  !PyObject_HasAttrString(first, "__cuda_array_interface__");
    Py_XDECREF(first);
    return number;
}

/* The ids of outs [begin, end), all the same. */
static bool add_ids(kv_args_t *args, PyObject *ids, int64_t begin, int64_t end)
{
    kv_row_ids_t found;
    if (begin == end)
        return true;
    if (!kv_py_row_ids(args->state, ids, &found.ids, &found.count))
        return false;
    for (int64_t i = begin; i < end; i++) {
        args->row_ids[i] = found;
        kv_buffer_hold(found.ids);
    }
    kv_buffer_rele(found.ids);
    return true;
}

static bool refuse_ids(kv_args_t *args, Py_ssize_t given, int64_t due, const char *what)
{
    kv_py_fail(args->state, KV_INVALID, "%s got a list of %zd row_ids for %lld %s", args->verb,
               given, (long long)due, what);
    return false;
}

/* The ids of one key's outs. */
static bool add_key_ids(kv_args_t *args, PyObject *ids, int64_t begin, int64_t end)
{
    if (is_ids(ids))
        return add_ids(args, ids, begin, end);
    if (list_length(ids) != end - begin)
        return refuse_ids(args, list_length(ids), end - begin, "outs");
    for (int64_t i = begin; i < end; i++) {
        PyObject *one = list_item(ids, (Py_ssize_t)(i - begin));
        if (one == NULL)
            return refuse_ids(args, list_length(ids), end - begin, "outs");
        bool added = add_ids(args, one, i, i + 1);
        Py_DECREF(one);
        if (!added)
            return false;
    }
    return true;
}

static bool add_list_ids(kv_args_t *args, PyObject *ids)
{
    int64_t begin = 0;
    if (list_length(ids) != args->num_items)
        return refuse_ids(args, list_length(ids), args->num_items, "keys");
    for (int64_t i = 0; i < args->num_items; i++) {
        int64_t end = begin + args->items[i].num_outs;
        PyObject *one = list_item(ids, (Py_ssize_t)i);
        if (one == NULL)
            return refuse_ids(args, list_length(ids), args->num_items, "keys");
        bool added = add_key_ids(args, one, begin, end);
        Py_DECREF(one);
        if (!added)
            return false;
        begin = end;
    }
    return true;
}

bool kv_args_row_ids(kv_args_t *args, PyObject *row_ids)
{
    args->row_ids = kv_calloc((size_t)args->outs.count, sizeof *args->row_ids);
    if (args->row_ids == NULL) {
        PyErr_NoMemory();
        return false;
    }
    bool added = is_ids(row_ids) ? add_ids(args, row_ids, 0, args->outs.count)
                 : args->listed  ? add_list_ids(args, row_ids)
                                 : add_key_ids(args, row_ids, 0, args->outs.count);
    args->call.row_ids = args->row_ids;
    /* Arrays of the user's may have run Python code, or let another thread. */
    return added && kv_args_look_again(args);
}

void kv_args_fini(kv_args_t *args)
{
    if (args->kept != NULL && atomic_fetch_sub(&args->kept->refs, 1) == 1)
        release_keep(&keep_of(args->kept)->release);
    args->kept = NULL;
    for (int64_t i = 0; args->row_ids != NULL && i < args->outs.count; i++)
        kv_buffer_rele(args->row_ids[i].ids);
    kv_free(args->row_ids);
    args->row_ids = NULL;
    views_fini(&args->values);
    views_fini(&args->outs);
    for (int64_t i = 0; i < args->num_items; i++)
        Py_DECREF(args->keys[i]);
    if (args->items != args->local_items)
        kv_free(args->items);
    args->items = args->local_items;
    args->num_items = 0;
}

/* --------------------------------------------------------------------------------- holds */

static void release_args(kv_release_t *release)
{
    kv_args_t *args = (kv_args_t *)((char *)release - offsetof(kv_args_t, release));
    kv_args_fini(args);
    kv_free(args);
    kv_count(KV_COUNT_HOLDS, -1);
}

static void release_hold(kv_hold_t *hold)
{
    kv_args_t *args = (kv_args_t *)((char *)hold - offsetof(kv_args_t, hold));
    kv_py_release_later(&args->release);
}

kv_args_t *kv_args_new(void)
{
    kv_args_t *args = kv_alloc(sizeof *args);
    if (args == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    args->hold.refs = 1;
    args->hold.release = release_hold;
    args->release.free = release_args;
    kv_count(KV_COUNT_HOLDS, 1);
    return args;
}

void kv_args_drop(kv_args_t *args)
{
    if (atomic_fetch_sub(&args->hold.refs, 1) == 1)
        release_args(&args->release);
}

static bool views_all_ours(const kv_views_t *views)
{
    for (int64_t i = 0; i < views->count; i++) {
        const kv_view_t *view = &views->views[i];
        if (view->sparse != NULL ? atomic_load(&view->sparse->exports) != 0
                                 : view->array == NULL || atomic_load(&view->array->exports) != 0)
            return false;
    }
    return true;
}

bool kv_args_all_ours(const kv_args_t *args)
{
    return views_all_ours(&args->values) && views_all_ours(&args->outs);
}

PyObject *kv_args_keys(const kv_args_t *args)
{
    PyObject *keys = PyList_New((Py_ssize_t)args->num_items);
    for (int64_t i = 0; keys != NULL && i < args->num_items; i++) {
        PyObject *key = kv_py_name_object(&args->items[i].name);
        if (key == NULL)
            Py_CLEAR(keys);
        else
            PyList_SET_ITEM(keys, (Py_ssize_t)i, key);
    }
    return keys;
}

PyObject *kv_args_first_keys(const kv_args_t *args, int64_t count)
{
    PyObject *seen = PyDict_New();
    for (int64_t i = 0; seen != NULL && i < args->num_items && PyDict_GET_SIZE(seen) < count; i++)
        if (PyDict_SetItem(seen, args->keys[i], Py_None) < 0)
            Py_CLEAR(seen);
    PyObject *keys = seen != NULL ? PyDict_Keys(seen) : NULL;
    Py_XDECREF(seen);
    return keys;
}
