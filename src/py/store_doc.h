/* The docstrings of kvstore.KVStore. */
#ifndef KV_PY_STORE_DOC_H
#define KV_PY_STORE_DOC_H

#define CLASS_DOC                                                                                  \
    "KVStore(name='local', **options)\n"                                                           \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "A key-value store for arrays; `kvstore.create` makes one.\n"                                  \
    "\n"                                                                                           \
    "Parameters\n"                                                                                 \
    "----------\n"                                                                                 \
    "name : str\n"                                                                                 \
    "    The kind: 'local' or 'device', or one of their aliases; letter case is\n"                 \
    "    free.\n"                                                                                  \
    "timeout : float, default 300\n"                                                               \
    "    Seconds that all waits of one call may take together.\n"                                  \
    "num_threads : int, optional\n"                                                                \
    "    Threads that a large sum may use; default: the process's cores.\n"                        \
    "deterministic : bool, default False\n"                                                        \
    "    For the dist kinds. Here sums are always taken from left to right.\n"                     \
    "\n"                                                                                           \
    "Raises\n"                                                                                     \
    "------\n"                                                                                     \
    "InvalidArgumentError\n"                                                                       \
    "    An unknown kind or option, or a number out of range.\n"                                   \
    "NotBuiltError\n"                                                                              \
    "    A kind that this version cannot run.\n"                                                   \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore, numpy as np\n"                                                            \
    ">>> with kvstore.create('local') as kv:\n"                                                    \
    "...     kv.init('w', np.zeros(3, 'float32'))\n"                                               \
    "...     kv.push('w', [np.ones(3, 'float32'), np.ones(3, 'float32')])\n"                       \
    "...     print(kv.pull('w').asnumpy())\n"                                                      \
    "[2. 2. 2.]\n"

#define INIT_DOC                                                                                   \
    "init($self, /, key, value)\n"                                                                 \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "Give keys their first value; must come before any other use of a key.\n"                      \
    "\n"                                                                                           \
    "The call fixes shape and element type of each key.\n"                                         \
    "\n"                                                                                           \
    "Parameters\n"                                                                                 \
    "----------\n"                                                                                 \
    "key : str, int, or list of them\n"                                                            \
    "    The first `init` fixes whether the store's keys are strings or integers.\n"               \
    "value : array, or list of one array a key\n"                                                  \
    "    NumPy, DLPack, buffer protocol, `__cuda_array_interface__` or\n"                          \
    "    `kvstore.NDArray`. It is copied.\n"                                                       \
    "\n"                                                                                           \
    "Raises\n"                                                                                     \
    "------\n"                                                                                     \
    "InvalidArgumentError\n"                                                                       \
    "    A key that is known already or stands twice; lists that do not match.\n"                  \
    "ArrayTypeError\n"                                                                             \
    "    No array, an element type that cannot be held, a key of the other type.\n"                \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore, numpy as np\n"                                                            \
    ">>> kv = kvstore.create('local')\n"                                                           \
    ">>> kv.init(['w', 'b'], [np.ones((2, 3), 'float32'), np.zeros(3, 'float32')])\n"              \
    ">>> kv.shape('w')\n"                                                                          \
    "(2, 3)\n"

#define PUSH_DOC                                                                                   \
    "push($self, /, key, value, priority=0, *, async_op=False)\n"                                  \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "Sum the values of each key and update the stored value with the sum.\n"                       \
    "\n"                                                                                           \
    "Without an updater the sum replaces the stored value. Sums are taken from\n"                  \
    "left to right; 16-bit floats are summed in float32 and rounded once, integers\n"              \
    "wrap.\n"                                                                                      \
    "\n"                                                                                           \
    "Parameters\n"                                                                                 \
    "----------\n"                                                                                 \
    "key : str, int, or list of them\n"                                                            \
    "value : array, list of arrays, or a list of either for each key\n"                            \
    "    Of the key's shape and element type. Never written to. A CUDA array is read\n"            \
    "    after the work on its library's current stream, and work put there later\n"               \
    "    comes after the reading.\n"                                                               \
    "priority : int, default 0\n"                                                                  \
    "    Among waiting operations that could run, higher ones run first.\n"                        \
    "async_op : bool, default False\n"                                                             \
    "    Return a `Handle` at once; the arrays must not be touched before it is\n"                 \
    "    done.\n"                                                                                  \
    "\n"                                                                                           \
    "Returns\n"                                                                                    \
    "-------\n"                                                                                    \
    "None or Handle\n"                                                                             \
    "\n"                                                                                           \
    "Raises\n"                                                                                     \
    "------\n"                                                                                     \
    "KeyNotFoundError\n"                                                                           \
    "    A key that was not initialised.\n"                                                        \
    "InvalidArgumentError\n"                                                                       \
    "    A wrong shape, lists that do not match, a call from inside the key's own\n"               \
    "    updater.\n"                                                                               \
    "ArrayTypeError\n"                                                                             \
    "    No array, or another element type than the key's.\n"                                      \
    "TimeoutError\n"                                                                               \
    "    The key stayed busy for longer than the store's timeout.\n"                               \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore, numpy as np\n"                                                            \
    ">>> kv = kvstore.create('local')\n"                                                           \
    ">>> kv.init('w', np.zeros(2, 'float32'))\n"                                                   \
    ">>> kv.push('w', [np.array([1, 2], 'float32'), np.array([10, 20], 'float32')])\n"             \
    ">>> kv.pull('w').asnumpy()\n"                                                                 \
    "array([11., 22.], dtype=float32)\n"

#define PULL_DOC                                                                                   \
    "pull($self, /, key, out=None, priority=0, ignore_sparse=True, *, async_op=False)\n"           \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "Copy the stored value of each key into every out.\n"                                          \
    "\n"                                                                                           \
    "Parameters\n"                                                                                 \
    "----------\n"                                                                                 \
    "key : str, int, or list of them\n"                                                            \
    "out : array, list of arrays, or a list of either for each key, optional\n"                    \
    "    Writable arrays of the key's shape and element type that do not overlap.\n"               \
    "    CUDA arrays are written in the order of their library's current stream.\n"                \
    "    Without it new `NDArray`s are returned.\n"                                                \
    "priority : int, default 0\n"                                                                  \
    "ignore_sparse : bool, default True\n"                                                         \
    "    Leave row-sparse outs as they are, with a warning.\n"                                     \
    "async_op : bool, default False\n"                                                             \
    "    Return a `Handle` at once; needs `out`.\n"                                                \
    "\n"                                                                                           \
    "Returns\n"                                                                                    \
    "-------\n"                                                                                    \
    "None, Handle, NDArray or list of NDArray\n"                                                   \
    "\n"                                                                                           \
    "Raises\n"                                                                                     \
    "------\n"                                                                                     \
    "KeyNotFoundError, ArrayTypeError, TimeoutError\n"                                             \
    "    As `push`.\n"                                                                             \
    "InvalidArgumentError\n"                                                                       \
    "    A wrong shape, a read-only out, outs that overlap.\n"                                     \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore, numpy as np\n"                                                            \
    ">>> kv = kvstore.create('local')\n"                                                           \
    ">>> kv.init('w', np.arange(3))\n"                                                             \
    ">>> out = np.empty(3, int)\n"                                                                 \
    ">>> kv.pull('w', out)\n"                                                                      \
    ">>> out\n"                                                                                    \
    "array([0, 1, 2])\n"

#define PUSHPULL_DOC                                                                               \
    "pushpull($self, /, key, value, out=None, priority=0, *, async_op=False)\n"                    \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "Push and pull in one operation and one pass over memory.\n"                                   \
    "\n"                                                                                           \
    "Parameters\n"                                                                                 \
    "----------\n"                                                                                 \
    "key : str, int, or list of them\n"                                                            \
    "value : as for `push`\n"                                                                      \
    "out : as for `pull`, optional\n"                                                              \
    "    May be the same array as a value. Without it the result is written back\n"                \
    "    into every value.\n"                                                                      \
    "priority : int, default 0\n"                                                                  \
    "async_op : bool, default False\n"                                                             \
    "\n"                                                                                           \
    "Returns\n"                                                                                    \
    "-------\n"                                                                                    \
    "None or Handle\n"                                                                             \
    "\n"                                                                                           \
    "Raises\n"                                                                                     \
    "------\n"                                                                                     \
    "KeyNotFoundError, InvalidArgumentError, ArrayTypeError, TimeoutError\n"                       \
    "    As `push` and `pull`; also an out that overlaps a value without being the\n"              \
    "    same array.\n"                                                                            \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore, numpy as np\n"                                                            \
    ">>> kv = kvstore.create('local')\n"                                                           \
    ">>> kv.init('w', np.zeros(2, 'float32'))\n"                                                   \
    ">>> a, b = np.ones(2, 'float32'), np.ones(2, 'float32')\n"                                    \
    ">>> kv.pushpull('w', [a, b])\n"                                                               \
    ">>> a\n"                                                                                      \
    "array([2., 2.], dtype=float32)\n"

#define BROADCAST_DOC                                                                              \
    "broadcast($self, /, key, value, out, priority=0, *, async_op=False)\n"                        \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "`init` the keys, then pull them into the outs.\n"                                             \
    "\n"                                                                                           \
    "Parameters\n"                                                                                 \
    "----------\n"                                                                                 \
    "key, value : as for `init`\n"                                                                 \
    "out : as for `pull`\n"                                                                        \
    "priority : int, default 0\n"                                                                  \
    "async_op : bool, default False\n"                                                             \
    "\n"                                                                                           \
    "Returns\n"                                                                                    \
    "-------\n"                                                                                    \
    "None or Handle\n"                                                                             \
    "\n"                                                                                           \
    "Raises\n"                                                                                     \
    "------\n"                                                                                     \
    "KVStoreError\n"                                                                               \
    "    What `init` and `pull` raise; nothing is changed then.\n"                                 \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore, numpy as np\n"                                                            \
    ">>> kv = kvstore.create('local')\n"                                                           \
    ">>> out = np.zeros(2)\n"                                                                      \
    ">>> kv.broadcast('w', np.ones(2), out)\n"                                                     \
    ">>> out\n"                                                                                    \
    "array([1., 1.])\n"

#define SET_UPDATER_DOC                                                                            \
    "set_updater($self, /, updater)\n"                                                             \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "Let a Python function update stored values: updater(key, recv, stored).\n"                    \
    "\n"                                                                                           \
    "The function changes `stored` in place. `recv` is the sum of what was pushed,\n"              \
    "never the caller's own array. Both are zero-copy arrays: torch tensors if the\n"              \
    "first pushed value is one, else NumPy arrays. Where a store merges on a CUDA\n"               \
    "device they are CUDA arrays of that value's library. It runs in the pushing\n"                \
    "thread, in the order of the pushes; an exception comes out of that push, and\n"               \
    "what was written before stays.\n"                                                             \
    "\n"                                                                                           \
    "Parameters\n"                                                                                 \
    "----------\n"                                                                                 \
    "updater : callable or None\n"                                                                 \
    "    None: the sum replaces the stored value.\n"                                               \
    "\n"                                                                                           \
    "Raises\n"                                                                                     \
    "------\n"                                                                                     \
    "ArrayTypeError\n"                                                                             \
    "    Neither callable nor None.\n"                                                             \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore, numpy as np\n"                                                            \
    ">>> kv = kvstore.create('local')\n"                                                           \
    ">>> kv.init('w', np.ones(2))\n"                                                               \
    ">>> def sgd(key, grad, weight):\n"                                                            \
    "...     weight -= 0.5 * grad\n"                                                               \
    ">>> kv.set_updater(sgd)\n"                                                                    \
    ">>> kv.push('w', np.ones(2))\n"                                                               \
    ">>> kv.pull('w').asnumpy()\n"                                                                 \
    "array([0.5, 0.5])\n"

#define CLOSE_DOC                                                                                  \
    "close($self, /)\n"                                                                            \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "Forget all keys and refuse further calls; may be called again.\n"                             \
    "\n"                                                                                           \
    "In a dist store it waits until the servers have what was pushed, and, unless\n"               \
    "set_barrier_before_exit(False) was called, until all workers close; then it leaves.\n"        \
    "\n"                                                                                           \
    "Raises\n"                                                                                     \
    "------\n"                                                                                     \
    "TimeoutError\n"                                                                               \
    "    When others have not closed in the store's timeout; it is closed all the same.\n"         \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore\n"                                                                         \
    ">>> kv = kvstore.create('local')\n"                                                           \
    ">>> kv.close()\n"

#define KEYS_DOC                                                                                   \
    "keys($self, /)\n"                                                                             \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "All keys in the order of their `init`, as a list.\n"                                          \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore, numpy as np\n"                                                            \
    ">>> kv = kvstore.create('local')\n"                                                           \
    ">>> kv.init([3, 1], [np.ones(2), np.ones(2)])\n"                                              \
    ">>> kv.keys()\n"                                                                              \
    "[3, 1]\n"

#define DELETE_DOC                                                                                 \
    "delete($self, /, key)\n"                                                                      \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "Drop a key, or each of a list; it may be initialised anew.\n"                                 \
    "\n"                                                                                           \
    "Raises\n"                                                                                     \
    "------\n"                                                                                     \
    "KeyNotFoundError\n"                                                                           \
    "    A key that was not initialised; none is dropped then.\n"                                  \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore, numpy as np\n"                                                            \
    ">>> kv = kvstore.create('local')\n"                                                           \
    ">>> kv.init('w', np.ones(2))\n"                                                               \
    ">>> kv.delete('w')\n"                                                                         \
    ">>> 'w' in kv\n"                                                                              \
    "False\n"

#define SHAPE_DOC                                                                                  \
    "shape($self, /, key)\n"                                                                       \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "The shape of a key, as `init` fixed it.\n"                                                    \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore, numpy as np\n"                                                            \
    ">>> kv = kvstore.create('local')\n"                                                           \
    ">>> kv.init('w', np.ones((4, 2)))\n"                                                          \
    ">>> kv.shape('w')\n"                                                                          \
    "(4, 2)\n"

#define DTYPE_DOC                                                                                  \
    "dtype($self, /, key)\n"                                                                       \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "The element type of a key as a NumPy dtype, as `init` fixed it.\n"                            \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore, numpy as np\n"                                                            \
    ">>> kv = kvstore.create('local')\n"                                                           \
    ">>> kv.init('w', np.ones(2, 'float16'))\n"                                                    \
    ">>> kv.dtype('w')\n"                                                                          \
    "dtype('float16')\n"

#define STYPE_DOC                                                                                  \
    "stype($self, /, key)\n"                                                                       \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "The storage of a key: 'default', which is dense.\n"                                           \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore, numpy as np\n"                                                            \
    ">>> kv = kvstore.create('local')\n"                                                           \
    ">>> kv.init('w', np.ones(2))\n"                                                               \
    ">>> kv.stype('w')\n"                                                                          \
    "'default'\n"

#define IS_CAPABLE_DOC                                                                             \
    "is_capable($self, /, capability)\n"                                                           \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "Whether the store can do something that not every store can.\n"                               \
    "\n"                                                                                           \
    "Parameters\n"                                                                                 \
    "----------\n"                                                                                 \
    "capability : str\n"                                                                           \
    "    'optimizer': it runs optimizers itself; all built-in kinds do.\n"                         \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore\n"                                                                         \
    ">>> kvstore.create('local').is_capable('optimizer')\n"                                        \
    "True\n"

#define BARRIER_DOC                                                                                \
    "barrier($self, /)\n"                                                                          \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "Wait until all workers have called it; in one process there is nobody to wait for.\n"         \
    "\n"                                                                                           \
    "Raises\n"                                                                                     \
    "------\n"                                                                                     \
    "TimeoutError\n"                                                                               \
    "    Names the workers that have not come.\n"                                                  \
    "PeerLostError\n"                                                                              \
    "    A node of the cluster is gone, or a worker has closed its store.\n"                       \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore\n"                                                                         \
    ">>> kvstore.create('local').barrier()\n"

#define BARRIER_BEFORE_EXIT_DOC                                                                    \
    "set_barrier_before_exit($self, /, barrier_before_exit=True)\n"                                \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "Whether close waits for the other workers, where there are several.\n"                        \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore\n"                                                                         \
    ">>> kvstore.create('local').set_barrier_before_exit(False)\n"

#define COMMAND_DOC                                                                                \
    "send_command_to_servers($self, /, head, body)\n"                                              \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "Have every server of a dist store run its controller; return when all have.\n"                \
    "\n"                                                                                           \
    "Parameters\n"                                                                                 \
    "----------\n"                                                                                 \
    "head : int\n"                                                                                 \
    "    From 0 on; the package's own commands are negative.\n"                                    \
    "body : str or bytes\n"                                                                        \
    "    Given to controller(head, body) as it is.\n"                                              \
    "\n"                                                                                           \
    "Raises\n"                                                                                     \
    "------\n"                                                                                     \
    "KVStoreError\n"                                                                               \
    "    A controller failed: with the server and what it raised.\n"                               \
    "InvalidArgumentError\n"                                                                       \
    "    A store of one process has no server; a negative head.\n"

#define DEAD_DOC                                                                                   \
    "num_dead_node($self, /, role='worker', timeout=60)\n"                                         \
    "--\n"                                                                                         \
    "\n"                                                                                           \
    "How many nodes of a role have not been heard of; none, in one process.\n"                     \
    "\n"                                                                                           \
    "Parameters\n"                                                                                 \
    "----------\n"                                                                                 \
    "role : str or int\n"                                                                          \
    "    'worker', 'server' or 'scheduler', or MXNet's mask of nodes.\n"                           \
    "timeout : float, default 60\n"                                                                \
    "    Seconds of silence after which a node counts as gone.\n"                                  \
    "\n"                                                                                           \
    "Examples\n"                                                                                   \
    "--------\n"                                                                                   \
    ">>> import kvstore\n"                                                                         \
    ">>> kvstore.create('local').num_dead_node()\n"                                                \
    "0\n"

#endif
