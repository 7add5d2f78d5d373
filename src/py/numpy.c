/* NumPy's C interface, all of it: views of the user's arrays, arrays over our memory, element
 * types.
 *
 * Built with the headers of NumPy 2, it runs with 1.26 and later. NumPy has no bfloat16 of its own;
 * that of ml_dtypes is recognised when an array of it comes along and imported only when one must
 * be made.
 */
#define NPY_NO_DEPRECATED_API NPY_1_25_API_VERSION
#define NPY_TARGET_VERSION NPY_1_25_API_VERSION
#include "py/py.h"
#include <numpy/arrayobject.h>

#include "base/memory.h"
#include <string.h>

static_assert(sizeof(npy_intp) == sizeof(int64_t), "extents are used in place");

bool kv_numpy_import(void)
{
    return _import_array() == 0;
}

/* --------------------------------------------------------------------------- element types */

static bool remember_bfloat16(kv_state_t *state, int type_num)
{
    PyArray_Descr *descr = PyArray_DescrFromType(type_num);
    if (descr == NULL)
        return false;
    Py_XSETREF(state->numpy_bfloat16, (PyObject *)descr);
    state->numpy_bfloat16_num = type_num;
    return true;
}

/* The type numbers of foreign types are given out as they are registered (and types of NumPy's new
 * kind have none), so the first array of ml_dtypes' type is told by the name of its scalars. */
static bool is_bfloat16(kv_state_t *state, const PyArray_Descr *descr)
{
    if (descr->type_num < NPY_USERDEF)
        return false;
    if (state->numpy_bfloat16 != NULL)
        return descr->type_num == state->numpy_bfloat16_num;
    if (strcmp(descr->typeobj->tp_name, "ml_dtypes.bfloat16") != 0)
        return false;
    if (!remember_bfloat16(state, descr->type_num))
        PyErr_Clear();
    return true;
}

static bool import_bfloat16(kv_state_t *state)
{
    PyObject *module = NULL, *scalar = NULL;
    PyArray_Descr *descr = NULL;
    bool done = false;
    module = PyImport_ImportModule("ml_dtypes");
    if (module == NULL) {
        if (PyErr_ExceptionMatches(PyExc_ImportError)) {
            PyErr_Clear();
            kv_py_fail(state, KV_NOT_BUILT,
                       "bfloat16 as a NumPy array needs the ml_dtypes package: pip install "
                       "ml_dtypes");
        }
        goto end;
    }
    scalar = PyObject_GetAttrString(module, "bfloat16");
    if (scalar == NULL || !PyArray_DescrConverter(scalar, &descr))
        goto end;
    done = remember_bfloat16(state, descr->type_num);
end:
    Py_XDECREF(descr);
    Py_XDECREF(scalar);
    Py_XDECREF(module);
    return done;
}

/* C has several integer types of one width, and NumPy a number for each. */
#define SIGNED(type) (sizeof(type) == 8 ? KV_INT64 : sizeof(type) == 4 ? KV_INT32 : KV_DTYPE_NONE)

static inline kv_dtype_t dtype_of(kv_state_t *state, const PyArray_Descr *descr)
{
    /* One more than the number, so that what is not listed is 0. */
    static const uint8_t table[NPY_USERDEF] = {
        [NPY_DOUBLE] = 1 + KV_FLOAT64, [NPY_FLOAT] = 1 + KV_FLOAT32,
        [NPY_HALF] = 1 + KV_FLOAT16,   [NPY_BYTE] = 1 + KV_INT8,
        [NPY_UBYTE] = 1 + KV_UINT8,    [NPY_INT] = 1 + SIGNED(int),
        [NPY_LONG] = 1 + SIGNED(long), [NPY_LONGLONG] = 1 + SIGNED(long long),
    };
    int num = descr->type_num;
    if (KV_UNLIKELY(descr->byteorder == NPY_OPPBYTE))
        return KV_DTYPE_NONE;
    if (KV_UNLIKELY(num < 0 || num >= NPY_USERDEF))
        return is_bfloat16(state, descr) ? KV_BFLOAT16 : KV_DTYPE_NONE;
    return table[num] > 0 ? (kv_dtype_t)(table[num] - 1) : KV_DTYPE_NONE;
}

static int type_num_of(kv_dtype_t dtype)
{
    static const int8_t nums[KV_DTYPE_COUNT] = {
        [KV_FLOAT64] = NPY_FLOAT64, [KV_FLOAT32] = NPY_FLOAT32, [KV_FLOAT16] = NPY_FLOAT16,
        [KV_BFLOAT16] = -1,         [KV_INT8] = NPY_INT8,       [KV_UINT8] = NPY_UINT8,
        [KV_INT32] = NPY_INT32,     [KV_INT64] = NPY_INT64,
    };
    return nums[dtype];
}

/* A new reference. */
static PyArray_Descr *descr_of(kv_state_t *state, kv_dtype_t dtype)
{
    if (dtype != KV_BFLOAT16)
        return PyArray_DescrFromType(type_num_of(dtype));
    if (state->numpy_bfloat16 == NULL && !import_bfloat16(state))
        return NULL;
    return (PyArray_Descr *)Py_NewRef(state->numpy_bfloat16);
}

PyObject *kv_numpy_dtype_object(kv_state_t *state, kv_dtype_t dtype)
{
    return (PyObject *)descr_of(state, dtype);
}

kv_dtype_t kv_numpy_dtype(kv_state_t *state, PyObject *like)
{
    /* Our names first: NumPy knows 'bfloat16' only once ml_dtypes has been imported. */
    if (PyUnicode_Check(like)) {
        const char *name = PyUnicode_AsUTF8(like);
        kv_dtype_t dtype = name != NULL ? kv_dtype_parse(name) : KV_DTYPE_NONE;
        PyErr_Clear();
        if (dtype != KV_DTYPE_NONE)
            return dtype;
    }
    kv_dtype_t dtype = KV_DTYPE_NONE;
    PyArray_Descr *descr = NULL;
    /* NumPy would take None for float64. */
    if (like != Py_None && PyArray_DescrConverter(like, &descr))
        dtype = dtype_of(state, descr);
    else if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception))
        return KV_DTYPE_NONE;
    PyErr_Clear();
    if (dtype == KV_DTYPE_NONE) {
        PyObject *text = PyObject_Str(descr != NULL ? (PyObject *)descr : like);
        const char *name = text != NULL ? PyUnicode_AsUTF8(text) : NULL;
        PyErr_Clear();
        kv_py_fail(state, KV_BAD_TYPE,
                   "'%s' is no element type of a store, which holds native float64, float32, "
                   "float16, bfloat16, int8, uint8, int32, int64",
                   name != NULL ? name : Py_TYPE(like)->tp_name);
        Py_XDECREF(text);
    }
    Py_XDECREF(descr);
    return dtype;
}

/* ------------------------------------------------------------------------------- arrays in */

/* Anything but an exact array: 1 for a subclass that is good as it is, 0 for what is not NumPy's,
 * -1 with ArrayTypeError for masked arrays and NumPy's scalars (they export buffers). */
static int check_other(kv_state_t *state, PyObject *object)
{
    if (!PyArray_Check(object)) {
        if (!PyArray_IsScalar(object, Generic))
            return 0;
        kv_py_fail(state, KV_BAD_TYPE,
                   "%s is a scalar, not an array: numpy.asarray makes one of it",
                   Py_TYPE(object)->tp_name);
        return -1;
    }
    PyObject *name = NULL, *module = NULL, *masked = NULL;
    int result = -1;
    name = PyUnicode_FromString("numpy.ma");
    if (name == NULL)
        goto end;
    /* Where nobody has imported numpy.ma there are no masked arrays. */
    module = PyImport_GetModule(name);
    if (module == NULL) {
        result = PyErr_Occurred() ? -1 : 1;
        goto end;
    }
    masked = PyObject_GetAttrString(module, "MaskedArray");
    if (masked == NULL)
        goto end;
    int is_masked = PyObject_IsInstance(object, masked);
    if (is_masked > 0)
        kv_py_fail(state, KV_BAD_TYPE,
                   "a masked array cannot be stored: pass its .data, or .filled(value)");
    result = is_masked == 0 ? 1 : -1;
end:
    Py_XDECREF(masked);
    Py_XDECREF(module);
    Py_XDECREF(name);
    return result;
}

/* For a type that the store cannot hold, what NumPy calls it. */
static int keep_type_name(kv_view_t *view, PyArrayObject *array, kv_lease_t *lease)
{
    PyObject *text = PyObject_Str((PyObject *)PyArray_DESCR(array));
    Py_ssize_t length = 0;
    const char *name = text != NULL ? PyUnicode_AsUTF8AndSize(text, &length) : NULL;
    char *copy = NULL;
    if (name != NULL) {
        copy = kv_alloc((size_t)length + 1);
        if (copy != NULL)
            memcpy(copy, name, (size_t)length + 1);
        else
            PyErr_NoMemory();
    }
    Py_XDECREF(text);
    view->type_name = lease->data = copy;
    lease->drop = kv_free;
    return copy != NULL ? 1 : -1;
}

/* Another thread may set a.shape while this one is detached, which replaces the array's own. */
static int keep_extents(kv_view_t *view, PyArrayObject *array, kv_lease_t *lease)
{
    size_t bytes = (size_t)view->ndim * sizeof(int64_t);
    int64_t *copy = kv_alloc(2 * bytes);
    if (copy == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    if (bytes > 0) {
        memcpy(copy, PyArray_DIMS(array), bytes);
        memcpy(copy + view->ndim, PyArray_STRIDES(array), bytes);
    }
    view->shape = copy;
    view->strides = copy + view->ndim;
    lease->data = copy;
    lease->drop = kv_free;
    return 1;
}

bool kv_numpy_borrow(kv_state_t *state, PyObject *object, bool for_out, kv_view_t *view)
{
    if (!PyArray_CheckExact(object))
        return false;
    PyArrayObject *array = (PyArrayObject *)object;
    int due = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED | (for_out ? NPY_ARRAY_WRITEABLE : 0);
    if ((~PyArray_FLAGS(array) & due) != 0)
        return false;
    view->data = PyArray_DATA(array);
    view->shape = (const int64_t *)PyArray_DIMS(array);
    view->strides = NULL;
    view->ndim = PyArray_NDIM(array);
    view->dtype = (uint8_t)dtype_of(state, PyArray_DESCR(array));
    view->flags = 0;
    view->array = NULL;
    view->owner = object;
    return true;
}

int kv_numpy_array_in(kv_state_t *state, PyObject *object, kv_view_t *view, kv_lease_t *lease)
{
    if (KV_UNLIKELY(!PyArray_CheckExact(object))) {
        int known = check_other(state, object);
        if (known <= 0)
            return known;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    int flags = PyArray_FLAGS(array);
    int ndim = PyArray_NDIM(array);
    const int64_t *shape = (const int64_t *)PyArray_DIMS(array);
    kv_dtype_t dtype = dtype_of(state, PyArray_DESCR(array));
    int64_t count = 1;
    for (int i = 0; i < ndim; i++)
        count *= shape[i];
    *view = (kv_view_t){
        .data = PyArray_DATA(array),
        .shape = shape,
        .count = count,
        .ndim = ndim,
        .dtype = (uint8_t)dtype,
        .flags = flags & NPY_ARRAY_WRITEABLE ? 0 : KV_VIEW_READONLY,
        .owner = object,
    };
    *lease = (kv_lease_t){.owner = Py_NewRef(object)};
    int done = 1;
    /* Kernels read whole elements: what is not aligned goes the way of strided arrays. */
    if (KV_UNLIKELY(dtype == KV_DTYPE_NONE))
        done = keep_type_name(view, array, lease);
    else if (KV_UNLIKELY(~flags & (NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED)))
        done = keep_extents(view, array, lease);
    if (KV_UNLIKELY(done < 0))
        kv_lease_drop(lease);
    return done;
}

/* ------------------------------------------------------------------------------ arrays out */

static PyObject *make_array(kv_state_t *state, kv_dtype_t dtype, int ndim, const int64_t *shape,
                            void *data)
{
    PyArray_Descr *descr = descr_of(state, dtype);
    if (descr == NULL)
        return NULL;
    return PyArray_NewFromDescr(&PyArray_Type, descr, ndim, (const npy_intp *)shape, NULL, data,
                                data != NULL ? NPY_ARRAY_CARRAY : 0, NULL);
}

PyObject *kv_numpy_view(kv_state_t *state, kv_dtype_t dtype, int ndim, const int64_t *shape,
                        void *data, PyObject *base)
{
    PyObject *array = make_array(state, dtype, ndim, shape, data);
    if (array == NULL)
        Py_DECREF(base);
    else if (PyArray_SetBaseObject((PyArrayObject *)array, base) < 0)
        Py_CLEAR(array);
    return array;
}

static void rele_capsule(PyObject *capsule)
{
    kv_buffer_rele(PyCapsule_GetPointer(capsule, NULL));
}

PyObject *kv_numpy_buffer(kv_state_t *state, kv_dtype_t dtype, int ndim, const int64_t *shape,
                          kv_buffer_t *buffer)
{
    PyObject *base = PyCapsule_New(buffer, NULL, rele_capsule);
    if (base == NULL)
        return NULL;
    kv_buffer_hold(buffer);
    return kv_numpy_view(state, dtype, ndim, shape, buffer->data, base);
}

PyObject *kv_numpy_empty(kv_state_t *state, kv_dtype_t dtype, int ndim, const int64_t *shape,
                         void **data)
{
    PyObject *array = make_array(state, dtype, ndim, shape, NULL);
    if (array != NULL)
        *data = PyArray_DATA((PyArrayObject *)array);
    return array;
}

bool kv_numpy_view_intact(PyObject *object, kv_dtype_t dtype, int ndim, const int64_t *shape,
                          const void *data)
{
    enum { FLAGS = NPY_ARRAY_CARRAY };
    if (!PyArray_CheckExact(object) || Py_REFCNT(object) != 1)
        return false;
    PyArrayObject *array = (PyArrayObject *)object;
    const PyArray_Descr *descr = PyArray_DESCR(array);
    bool same_type = dtype != KV_BFLOAT16
                         ? descr->type_num == type_num_of(dtype)
                         : descr->type_num >= NPY_USERDEF &&
                               strcmp(descr->typeobj->tp_name, "ml_dtypes.bfloat16") == 0;
    if (!same_type || descr->byteorder == NPY_OPPBYTE || PyArray_DATA(array) != data ||
        PyArray_NDIM(array) != ndim || (PyArray_FLAGS(array) & FLAGS) != FLAGS)
        return false;
    for (int i = 0; i < ndim; i++)
        if (PyArray_DIM(array, i) != shape[i])
            return false;
    return true;
}

const char *kv_numpy_target(void)
{
    return NPY_FEATURE_VERSION_STRING;
}
