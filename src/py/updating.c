/* Optimizers in Python on servers: rounds handed to the thread that serves.
 *
 * What a class keeps with a key is a Python object in the slice's hands, so that it goes with the
 * slice or with another optimizer; the wrapper for it is made before the class runs, since
 * afterwards nothing may fail.
 */
#include "py/updating.h"

#include "ps/wire.h"
#include "py/call.h"
#include "py/updater.h"

struct kv_py_kept {
    kv_server_kept_t base; /* first */
    kv_release_t release;
    PyObject *object; /* NULL: nothing yet */
};

static void release_kept(kv_release_t *release)
{
    kv_py_kept_t *kept = (kv_py_kept_t *)((char *)release - offsetof(kv_py_kept_t, release));
    Py_XDECREF(kept->object);
    kv_free(kept);
    kv_count(KV_COUNT_CACHES, -1);
}

static void drop_kept(kv_server_kept_t *base)
{
    kv_py_release_later(&((kv_py_kept_t *)base)->release);
}

static bool ensure_kept(kv_py_updating_t *updating)
{
    updating->kept = (kv_py_kept_t *)updating->update.kept;
    updating->update.kept = NULL;
    if (updating->kept != NULL)
        return true;
    updating->kept = kv_calloc(1, sizeof *updating->kept);
    if (updating->kept == NULL) {
        PyErr_NoMemory();
        return false;
    }
    updating->kept->base.drop = drop_kept;
    updating->kept->release.free = release_kept;
    kv_count(KV_COUNT_CACHES, 1);
    return true;
}

/* The round's own shape as an update of a store. */
static kv_update_t update_of(kv_server_update_t *update)
{
    return (kv_update_t){.name = &update->name,
                         .dtype = update->dtype,
                         .ndim = update->ndim,
                         .shape = update->shape,
                         .recv = update->recv,
                         .stored = update->stored,
                         .device = -1,
                         .recv_rows = &update->recv_rows,
                         .stored_rows = &update->stored_rows};
}

/* What was pushed, and the value; the new references are NULL where there is none, or no memory. */
static bool show_arrays(kv_state_t *state, kv_server_update_t *update, PyObject **recv,
                        PyObject **stored)
{
    kv_update_t view = update_of(update);
    if (update->reads) {
        *recv = Py_NewRef(Py_None);
        *stored = Py_NewRef(Py_None);
        return true;
    }
    *recv = update->rows ? kv_py_update_rows(state, &view, &update->recv_rows)
                         : kv_py_update_view(state, &view, update->recv);
    if (*recv != NULL)
        *stored = update->sparse ? kv_py_update_rows(state, &view, &update->stored_rows)
                                 : kv_py_update_view(state, &view, update->stored);
    return *stored != NULL;
}

static PyObject *show_loaded(kv_state_t *state, kv_buffer_t *loaded)
{
    if (loaded == NULL)
        return Py_NewRef(Py_None);
    int64_t bytes = (int64_t)loaded->bytes;
    return kv_numpy_buffer(state, KV_UINT8, 1, &bytes, loaded);
}

static PyObject *describe(kv_state_t *state, kv_py_updating_t *updating)
{
    kv_server_update_t *update = &updating->update;
    if (!ensure_kept(updating))
        return NULL;
    PyObject *kept = updating->kept->object != NULL ? updating->kept->object : Py_None;
    PyObject *key = kv_py_name_object(&update->name), *recv = NULL, *stored = NULL, *made = NULL;
    PyObject *loaded = key != NULL ? show_loaded(state, update->loaded) : NULL;
    if (loaded != NULL && show_arrays(state, update, &recv, &stored))
        made = Py_BuildValue("(KOOOdLLOO)", (unsigned long long)update->optimizer, key, recv,
                             stored, update->rate, (long long)update->t,
                             (long long)update->num_update, kept, loaded);
    Py_XDECREF(key);
    Py_XDECREF(recv);
    Py_XDECREF(stored);
    Py_XDECREF(loaded);
    return made;
}

/* With the words why it has failed, NULL: it has not. */
static void end(kv_server_t *server, kv_status_t status, const char *words,
                kv_py_updating_t *updating)
{
    kv_error_t *error = words != NULL ? kv_error_capture(kv_fail(status, "%s", words)) : NULL;
    updating->is = false;
    updating->update.kept = updating->kept != NULL ? &updating->kept->base : updating->update.kept;
    updating->kept = NULL;
    Py_BEGIN_ALLOW_THREADS kv_server_end_update(server, &updating->update, error);
    Py_END_ALLOW_THREADS
}

/* A round fails as the class does, whatever it is; that something cannot be saved has reasons. */
static kv_status_t status_of(kv_state_t *state, const kv_py_updating_t *updating,
                             PyObject *exception)
{
    if (updating->update.reads && PyErr_GivenExceptionMatches(exception, PyExc_MemoryError))
        return KV_NO_MEMORY;
    if (updating->update.reads &&
        PyErr_GivenExceptionMatches(exception, state->errors[KV_BAD_TYPE]))
        return KV_BAD_TYPE;
    return KV_INVALID;
}

/* What the pushers are told when the round cannot even be shown to Python. */
static void fail_round(kv_state_t *state, kv_server_t *server, kv_py_updating_t *updating)
{
    PyObject *exception = kv_py_take_exception();
    PyObject *text = PyUnicode_FromFormat("%s: %S", Py_TYPE(exception)->tp_name, exception);
    const char *words = text != NULL ? PyUnicode_AsUTF8(text) : NULL;
    end(server, status_of(state, updating, exception),
        words != NULL ? words : "no memory for an update", updating);
    Py_XDECREF(text);
    Py_DECREF(exception);
    PyErr_Clear();
}

PyObject *kv_py_updating_next(kv_state_t *state, kv_server_t *server, int64_t timeout_ns,
                              kv_py_updating_t *updating)
{
    kv_py_caller_t caller;
    kv_server_update_t update;
    bool found;
    kv_py_release_now();
    kv_py_caller_init(&caller, timeout_ns);
    kv_status_t status = kv_server_next_update(server, &caller.base, &update, &found);
    if (status != KV_OK)
        return kv_py_raise(state, status);
    if (!found)
        Py_RETURN_NONE;
    *updating = (kv_py_updating_t){.is = true, .update = update};
    PyObject *made = describe(state, updating);
    if (made != NULL)
        return made;
    fail_round(state, server, updating);
    Py_RETURN_NONE;
}

/* The rows that are in the object now become the update's. */
static kv_status_t take_stored(kv_state_t *state, kv_server_update_t *update, PyObject *stored)
{
    kv_update_t view = update_of(update);
    if (!update->sparse)
        return KV_OK;
    if (!kv_rowsparse_check(state, stored) || kv_rowsparse_array(stored)->dtype != update->dtype ||
        kv_rowsparse_array(stored)->shape[0] != update->shape[0])
        return kv_fail(KV_BAD_TYPE, "an update has left something else than its weight");
    return kv_py_update_take(state, &view, stored);
}

/* The bytes that are in the object. */
static kv_status_t take_packed(PyObject *object, kv_buffer_t **out)
{
    if (!PyBytes_Check(object))
        return kv_fail(KV_BAD_TYPE, "what is kept was not packed into bytes");
    size_t bytes = (size_t)PyBytes_GET_SIZE(object);
    if (bytes > KV_WIRE_ROWS_BYTES)
        return kv_fail(KV_INVALID,
                       "its state is %zu bytes, and one key's can have %d on its way to a file",
                       bytes, (int)KV_WIRE_ROWS_BYTES);
    KV_TRY(kv_buffer_new(bytes, out));
    memcpy((*out)->data, PyBytes_AS_STRING(object), bytes);
    return KV_OK;
}

PyObject *kv_py_updating_end(kv_state_t *state, kv_server_t *server, PyObject *failure,
                             PyObject *kept, PyObject *stored, kv_py_updating_t *updating)
{
    kv_server_update_t *update = &updating->update;
    kv_status_t status = KV_OK;
    const char *words = NULL;
    if (failure != Py_None && (words = PyUnicode_AsUTF8(failure)) == NULL)
        return NULL;
    if (!updating->is)
        return kv_py_fail(state, KV_INVALID, "no update is under way");
    if (words != NULL)
        status = status_of(state, updating, stored);
    else if ((status = update->reads ? take_packed(stored, &update->packed)
                                     : take_stored(state, update, stored)) != KV_OK)
        words = kv_status_message(status);
    Py_XSETREF(updating->kept->object, Py_NewRef(kept));
    kv_buffer_rele(update->loaded); /* it is among what is kept */
    update->loaded = NULL;
    end(server, status, words, updating);
    kv_py_release_now();
    Py_RETURN_NONE;
}

void kv_py_updating_drop(kv_py_updating_t *updating, bool at_home)
{
    if (!updating->is || !at_home)
        return;
    kv_buffer_rele(updating->update.key);
    kv_buffer_rele(updating->update.recv);
    kv_buffer_rele(updating->update.stored);
    kv_rowset_fini(&updating->update.recv_rows);
    kv_rowset_fini(&updating->update.stored_rows);
    kv_buffer_rele(updating->update.loaded);
    if (updating->kept != NULL)
        drop_kept(&updating->kept->base);
}
