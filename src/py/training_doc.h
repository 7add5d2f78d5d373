/* Docstrings of the calls of kvstore.KVStore on row-sparse values, optimizers and compression. */
#ifndef KV_PY_TRAINING_DOC_H
#define KV_PY_TRAINING_DOC_H

#define ROW_SPARSE_PULL_DOC                                                                        \
    "row_sparse_pull($self, /, key, out=None, priority=0, row_ids=None, *, async_op=False)\n"      \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "Copy rows of a value, dense or row-sparse, into row-sparse arrays.\n"                         \
    "\n"                                                                                           \
    "Each ``out`` ends with the rows asked for, sorted and without repetitions; a row that a\n"    \
    "row-sparse value has not is zeros.\n"                                                         \
    "\n"                                                                                           \
    "Parameters\n"                                                                                 \
    "----------\n"                                                                                 \
    "key : str or int, or a list of them\n"                                                        \
    "    Keys of values with at least one dimension.\n"                                            \
    "out : kvstore.RowSparse or a list, optional\n"                                                \
    "    Of the key's shape and element type; for a list of keys a list with one entry (an array " \
    "or a\n"                                                                                       \
    "    list of arrays) for each. None: new arrays are made.\n"                                   \
    "priority : int, optional\n"                                                                   \
    "    Among operations that could run, those of higher priority first.\n"                       \
    "row_ids : integer array of any shape, or a list\n"                                            \
    "    Row numbers in [0, shape[0]), in any order, repeated or not, possibly none. One array "   \
    "for all\n"                                                                                    \
    "    outs is looked at once; a list has one array for each out (nested for a list of keys).\n" \
    "async_op : bool, optional\n"                                                                  \
    "    Return a Handle at once.\n"                                                               \
    "\n"                                                                                           \
    "Returns\n"                                                                                    \
    "-------\n"                                                                                    \
    "None, or the new RowSparse (for a list of keys a list of them), or a Handle\n"                \
    "\n"                                                                                           \
    "Raises\n"                                                                                     \
    "------\n"                                                                                     \
    "KeyNotFoundError\n"                                                                           \
    "    For a key that was not initialised.\n"                                                    \
    "InvalidArgumentError\n"                                                                       \
    "    For a row id outside the shape, no ``row_ids``, lists that do not match.\n"               \
    "ArrayTypeError\n"                                                                             \
    "    For ids that are no integers, a dense ``out``, another element type.\n"                   \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore, numpy as np\n"                                                            \
    ">>> kv = kvstore.create('local')\n"                                                           \
    ">>> kv.init('table', np.arange(8, dtype=np.float32).reshape(4, 2))\n"                         \
    ">>> rows = kv.row_sparse_pull('table', row_ids=np.array([3, 0, 3]))\n"                        \
    ">>> rows.indices.tolist(), rows.data.tolist()\n"                                              \
    "([0, 3], [[0.0, 1.0], [6.0, 7.0]])\n"

#define SET_OPTIMIZER_DOC                                                                          \
    "set_optimizer($self, /, optimizer)\n"                                                         \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "Let the store update its values: from now on a push applies the optimizer to the sum of its " \
    "values.\n"                                                                                    \
    "\n"                                                                                           \
    "An optimizer of the same class as before goes on with counts and state, another one begins "  \
    "anew.\n"                                                                                      \
    "Optimizer and updater replace each other.\n"                                                  \
    "\n"                                                                                           \
    "In a dist store the servers apply it. Worker 0's call gives it to all of them before it "     \
    "returns;\n"                                                                                   \
    "its pushes carry rate, decay and count, as its schedule tells. Another worker need not "      \
    "call; if\n"                                                                                   \
    "it does, its call returns when worker 0 has set an equal optimizer. In a ``dist_async`` "     \
    "store each\n"                                                                                 \
    "worker that has called tells its own rates.\n"                                                \
    "\n"                                                                                           \
    "Parameters\n"                                                                                 \
    "----------\n"                                                                                 \
    "optimizer : kvstore.optimizer.Optimizer\n"                                                    \
    "    One of the classes of `kvstore.optimizer`, or of your own. In a dist store one of your "  \
    "own must\n"                                                                                   \
    "    be in a module that servers may import, and the schedule, if any, one of those of\n"      \
    "    `kvstore.lr_scheduler`.\n"                                                                \
    "\n"                                                                                           \
    "Raises\n"                                                                                     \
    "------\n"                                                                                     \
    "ArrayTypeError\n"                                                                             \
    "    For something else. Pushing to a key whose element type is an integer then raises it "    \
    "too.\n"                                                                                       \
    "InvalidArgumentError\n"                                                                       \
    "    In a dist store for a schedule of your own, or on a worker whose optimizer is not "       \
    "worker 0's.\n"                                                                                \
    "TimeoutError\n"                                                                               \
    "    On another worker, when worker 0 has set none within the store's timeout; on worker 0, "  \
    "when\n"                                                                                       \
    "    a server has not answered.\n"                                                             \
    "KVStoreError\n"                                                                               \
    "    A server could not take it, or may not import its class; the store keeps the optimizer "  \
    "that it\n"                                                                                    \
    "    had.\n"                                                                                   \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore, numpy as np\n"                                                            \
    ">>> kv = kvstore.create('local')\n"                                                           \
    ">>> kv.set_optimizer(kvstore.optimizer.SGD(learning_rate=0.5))\n"                             \
    ">>> kv.init('w', np.ones(2, np.float32))\n"                                                   \
    ">>> kv.push('w', np.array([1, 2], np.float32))\n"                                             \
    ">>> kv.pull('w').asnumpy()\n"                                                                 \
    "array([0.5, 0. ], dtype=float32)\n"

#define SET_OPTIMIZER_PARAMS_DOC                                                                   \
    "set_optimizer_params($self, /, **numbers)\n"                                                  \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "Change numbers of the optimizer while training; its counts and state stay.\n"                 \
    "\n"                                                                                           \
    "In a dist store worker 0's call changes them on all servers; another worker's waits for "     \
    "that, as in\n"                                                                                \
    "`set_optimizer`, and is not needed.\n"                                                        \
    "\n"                                                                                           \
    "Parameters\n"                                                                                 \
    "----------\n"                                                                                 \
    "**numbers\n"                                                                                  \
    "    ``lr`` (or ``learning_rate``), ``wd``, ``rescale_grad``, ``clip_gradient``, "             \
    "``lr_mult``,\n"                                                                               \
    "    ``wd_mult``, and those of the optimizer's class.\n"                                       \
    "\n"                                                                                           \
    "Raises\n"                                                                                     \
    "------\n"                                                                                     \
    "InvalidArgumentError\n"                                                                       \
    "    Without an optimizer, for a name that it has not or a number out of range; nothing is "   \
    "changed.\n"                                                                                   \
    "    In a dist store also where the numbers are not those that worker 0 has set.\n"            \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore\n"                                                                         \
    ">>> kv = kvstore.create('local')\n"                                                           \
    ">>> kv.set_optimizer(kvstore.optimizer.SGD(learning_rate=0.5, momentum=0.9))\n"               \
    ">>> kv.set_optimizer_params(lr=0.05)\n"                                                       \
    ">>> kv.optimizer.learning_rate\n"                                                             \
    "0.05\n"

#define OPTIMIZER_DOC "The optimizer with the numbers that are in force, None if there is none.\n"

#define SAVE_STATES_DOC                                                                            \
    "save_optimizer_states($self, /, fname, dump_optimizer=False)\n"                               \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "Write everything that training has left besides the values: the optimizer's state and "       \
    "counts, the\n"                                                                                \
    "position of the schedule, and the residuals of compression.\n"                                \
    "\n"                                                                                           \
    "The file is a safetensors file with tensors ``<key>/<slot>``. It is written under a "         \
    "temporary name\n"                                                                             \
    "and then renamed, so there is the old file or the new one.\n"                                 \
    "\n"                                                                                           \
    "In a dist store any one worker may call, between two barriers, and the file is that of a "    \
    "local store\n"                                                                                \
    "which has had the same pushes; residuals of compression, which lie on the workers, are left " \
    "out.\n"                                                                                       \
    "\n"                                                                                           \
    "Parameters\n"                                                                                 \
    "----------\n"                                                                                 \
    "fname : str or os.PathLike\n"                                                                 \
    "    The file.\n"                                                                              \
    "dump_optimizer : bool, optional\n"                                                            \
    "    Also the optimizer itself: class, numbers, multipliers, schedule.\n"                      \
    "\n"                                                                                           \
    "Raises\n"                                                                                     \
    "------\n"                                                                                     \
    "ArrayTypeError\n"                                                                             \
    "    For an optimizer of your own that keeps anything but NumPy arrays of numbers, and "       \
    "lists,\n"                                                                                     \
    "    tuples and dicts of them.\n"                                                              \
    "InvalidArgumentError\n"                                                                       \
    "    Without an optimizer, or for one that cannot be dumped; on another worker than worker 0 " \
    "while\n"                                                                                      \
    "    that one pushes.\n"                                                                       \
    "OSError\n"                                                                                    \
    "    As of any file.\n"                                                                        \
    "NotBuiltError\n"                                                                              \
    "    Without the safetensors package: ``pip install 'mlkvstore[state]'``.\n"                   \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore, numpy as np, os, tempfile\n"                                              \
    ">>> kv = kvstore.create('local')\n"                                                           \
    ">>> kv.set_optimizer(kvstore.optimizer.Adam())\n"                                             \
    ">>> kv.init('w', np.ones(2, np.float32))\n"                                                   \
    ">>> kv.push('w', np.ones(2, np.float32))\n"                                                   \
    ">>> with tempfile.TemporaryDirectory() as folder:\n"                                          \
    "...     kv.save_optimizer_states(os.path.join(folder, 'adam.safetensors'))\n"                 \
    "...     kv.load_optimizer_states(os.path.join(folder, 'adam.safetensors'))\n"

#define LOAD_STATES_DOC                                                                            \
    "load_optimizer_states($self, /, fname)\n"                                                     \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "Take back what `save_optimizer_states` has written: training goes on as if it had not "       \
    "stopped.\n"                                                                                   \
    "\n"                                                                                           \
    "A file with an optimizer sets it; else the same class must be set before. States of keys "    \
    "that are\n"                                                                                   \
    "not initialised yet wait for their init. The values themselves are not in the file.\n"        \
    "\n"                                                                                           \
    "In a dist store any one worker may call, between two barriers, or all of them; it may have "  \
    "another number\n"                                                                             \
    "of servers and workers than the one that wrote the file.\n"                                   \
    "\n"                                                                                           \
    "Parameters\n"                                                                                 \
    "----------\n"                                                                                 \
    "fname : str or os.PathLike\n"                                                                 \
    "    The file.\n"                                                                              \
    "\n"                                                                                           \
    "Raises\n"                                                                                     \
    "------\n"                                                                                     \
    "InvalidArgumentError\n"                                                                       \
    "    For a file that is damaged or of something else, or whose shapes are not those of the "   \
    "keys;\n"                                                                                      \
    "    nothing is changed. In a dist store also when worker 0 pushes meanwhile.\n"               \
    "OSError\n"                                                                                    \
    "    As of any file.\n"                                                                        \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore, os, tempfile\n"                                                           \
    ">>> with tempfile.TemporaryDirectory() as folder:\n"                                          \
    "...     fname = os.path.join(folder, 'sgd.safetensors')\n"                                    \
    "...     with kvstore.create('local') as kv:\n"                                                \
    "...         kv.set_optimizer(kvstore.optimizer.SGD(learning_rate=0.5))\n"                     \
    "...         kv.save_optimizer_states(fname, dump_optimizer=True)\n"                           \
    "...     with kvstore.create('local') as kv:\n"                                                \
    "...         kv.load_optimizer_states(fname)\n"                                                \
    "...         kv.optimizer.learning_rate\n"                                                     \
    "0.5\n"

#define COMPRESSION_DOC                                                                            \
    "set_gradient_compression($self, /, compression_params)\n"                                     \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "Let dense floating values that are pushed travel as one or two bits an element, with error "  \
    "feedback.\n"                                                                                  \
    "\n"                                                                                           \
    "Each position of a key's value list keeps the difference as a residual and adds it to its "   \
    "next\n"                                                                                       \
    "value. Integers and row-sparse values travel as they are; pulls are exact.\n"                 \
    "\n"                                                                                           \
    "In a dist store each worker sets its own and keeps its residuals; what it sends to the "      \
    "servers is\n"                                                                                 \
    "that much smaller.\n"                                                                         \
    "\n"                                                                                           \
    "Parameters\n"                                                                                 \
    "----------\n"                                                                                 \
    "compression_params : dict\n"                                                                  \
    "    ``{'type': '2bit', 'threshold': 0.5}``, ``{'type': '1bit', 'threshold': 0.5}``, or\n"     \
    "    ``{'type': 'none'}``, which turns compression off and forgets the residuals.\n"           \
    "\n"                                                                                           \
    "Raises\n"                                                                                     \
    "------\n"                                                                                     \
    "InvalidArgumentError\n"                                                                       \
    "    For an unknown type or key, a threshold that is not finite, negative, or 0 for 2bit.\n"   \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore, numpy as np\n"                                                            \
    ">>> kv = kvstore.create('device')\n"                                                          \
    ">>> kv.set_gradient_compression({'type': '2bit', 'threshold': 0.5})\n"                        \
    ">>> kv.init('w', np.zeros(3, np.float32))\n"                                                  \
    ">>> kv.push('w', np.array([0.7, -0.6, 0.3], np.float32))\n"                                   \
    ">>> kv.pull('w').asnumpy()\n"                                                                 \
    "array([ 0.5, -0.5,  0. ], dtype=float32)\n"

#endif
