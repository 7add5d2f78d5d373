/* Arguments of a vectorcall against a table of parameters. */
#include "py/py.h"

static int find_param(const kv_signature_t *signature, PyObject *name)
{
    for (int i = 0; i < signature->num_params; i++)
        if (PyUnicode_CompareWithASCIIString(name, signature->params[i].name) == 0)
            return i;
    return -1;
}

bool kv_py_parse(const kv_signature_t *signature, PyObject *const *args, Py_ssize_t num_args,
                 PyObject *keyword_names, PyObject **values)
{
    if (num_args > signature->num_positional) {
        PyErr_Format(PyExc_TypeError, "%s() takes at most %d positional arguments (%zd given)",
                     signature->function, signature->num_positional, num_args);
        return false;
    }
    for (int i = 0; i < signature->num_params; i++)
        values[i] = i < num_args ? args[i] : NULL;
    Py_ssize_t num_keywords = keyword_names != NULL ? PyTuple_GET_SIZE(keyword_names) : 0;
    for (Py_ssize_t k = 0; k < num_keywords; k++) {
        PyObject *name = PyTuple_GET_ITEM(keyword_names, k);
        int i = find_param(signature, name);
        if (i < 0) {
            PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument '%U'",
                         signature->function, name);
            return false;
        }
        if (values[i] != NULL) {
            PyErr_Format(PyExc_TypeError, "%s() got multiple values for argument '%U'",
                         signature->function, name);
            return false;
        }
        values[i] = args[num_args + k];
    }
    for (int i = 0; i < signature->num_params; i++) {
        if (signature->params[i].required && values[i] == NULL) {
            PyErr_Format(PyExc_TypeError, "%s() missing required argument: '%s'",
                         signature->function, signature->params[i].name);
            return false;
        }
    }
    return true;
}
