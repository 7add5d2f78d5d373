"""What is measured: the families of jobs, their subjects and their goals.

A family is run by its own processes and has its own limit program, table rows, record and plot.
"""

from typing import NamedTuple


class Job(NamedTuple):
    title: str
    limit: str | None  # the job of the limit program
    goals: dict  # ratios of speed: the store's to the limit's and to each peer's


class Family(NamedTuple):
    limit: str  # LIMIT.c
    subjects: dict  # name -> environment ("": this Python), script and its arguments
    jobs: dict
    asked_only: bool = False  # it takes minutes, or root: measured by --only


LOCAL = {
    "push_pull_1KiB": Job(
        "push + pull, 1 KiB", "push_pull_1KiB", {"limit": 1 / 6, "dict": 3, "mxnet": 50}
    ),
    "pushpull_1KiB": Job(
        "pushpull, 1 KiB", "pushpull_1KiB", {"limit": 1 / 5, "dict": 4, "mxnet": 80}
    ),
    "list_1000x4KiB": Job(
        "push + pull, 1,000 keys of 4 KiB, a key",
        "list_1000x4KiB",
        {"limit": 1 / 2, "dict": 2.5, "mxnet": 15},
    ),
    "updater_1KiB": Job("push with updater, 1 KiB", None, {"dict": 0.7, "mxnet": 35}),
    "sum_4x64MiB": Job(
        "sum of 4 × 64 MiB float32",
        "sum_4x64MiB",
        {"limit": 0.9, "compiled": 1.0, "torch": 1.4, "mxnet": 3.2},
    ),
    "sum_4x64MiB_2dst": Job(
        "the same, pushpull into one out",
        "sum_4x64MiB_2dst",
        {"limit": 0.9, "compiled": 1.1, "mxnet": 3.3},
    ),
    "sum_fp16_4x32MiB": Job(
        "sum of 4 × 32 MiB float16",
        "sum_fp16_4x32MiB",
        {"limit": 0.85, "compiled": 1.0, "torch": 1.6, "mxnet": 80},
    ),
    "push_64MiB": Job("push of 64 MiB", "copy_64MiB", {"limit": 0.9, "torch": 1.25}),
    "pull_64MiB": Job("pull of 64 MiB", "copy_64MiB", {"limit": 0.9, "torch": 1.25, "mxnet": 1.5}),
    "push_1KiB_1_thread": Job("push of 1 KiB, 1 thread", None, {}),
    "push_1KiB_4_threads": Job("push of 1 KiB, 4 threads, own keys", None, {"1 thread": 1.0}),
}

TRAINING = {
    "sgd_momentum_64MiB": Job(
        "SGD with momentum, one 64 MiB gradient",
        "sgd_momentum_64MiB",
        {"limit": 0.9, "torch": 0.95, "mxnet": 4},
    ),
    "sgd_momentum_4x64MiB": Job(
        "the same, 4 gradients summed and applied",
        "sgd_momentum_4x64MiB",
        {"limit": 0.85, "torch": 1.5, "mxnet": 4},
    ),
    "adam_64MiB_pull": Job(
        "Adam, one 64 MiB gradient, then pull (pushpull)",
        "adam_64MiB_pull",
        {"limit": 0.9, "torch": 1.2, "mxnet": 4},
    ),
    "adagrad_64MiB": Job(
        "AdaGrad, one 64 MiB gradient",
        "adagrad_64MiB",
        {"limit": 0.9, "torch": 0.95, "mxnet": 50},
    ),
    "sgd_1KiB": Job("SGD on 1 KiB", "sgd_1KiB", {"limit": 1 / 8, "numpy": 7, "mxnet": 400}),
    "sgd_1KiB_handle": Job("the same, async_op and wait", None, {}),
    "momentum_list_1000x4KiB": Job(
        "momentum SGD, list of 1,000 keys of 4 KiB, a key",
        "momentum_list_1000x4KiB",
        {"limit": 1 / 3, "torch": 8, "mxnet": 200},
    ),
    "rows_pull": Job(
        "row_sparse_pull of 10,000 unsorted ids from 1,000,000 × 64 float32",
        "rows_pull",
        {"limit": 0.45, "torch": 1.5, "fbgemm": 1.2, "mxnet": 4},
    ),
    "rows_sgd": Job(
        "push of 10,000 rows, lazy SGD",
        "rows_sgd",
        {"limit": 0.8, "torch": 2.5, "mxnet": 3.5},
    ),
    "rows_sgd_handle": Job("the same, async_op and wait", None, {}),
    "rows_sgd_4": Job(
        "push of a list of 4 such", "rows_sgd_4", {"limit": 0.4, "torch": 4, "mxnet": 4.5}
    ),
    "rows_adam": Job(
        "push of 10,000 rows, Adam, lazy",
        "rows_adam",
        {"limit": 0.8, "torch": 5, "mxnet": 2.5},
    ),
    "rows_pull_adagrad": Job(
        "pull 10,000 rows, push their gradient, AdaGrad",
        "rows_pull_adagrad",
        {"limit": 0.6, "torch": 2.5, "fbgemm": 4, "mxnet": 3.5},
    ),
    "encode_64MiB": Job(
        "2-bit encode of 64 MiB with residual",
        "encode_64MiB",
        {"limit": 0.85, "numpy": 10},
    ),
}

DIST = {
    "push_pull_64MiB": Job(
        "push + pull of 64 MiB", "push_pull_64MiB", {"limit": 0.5, "gloo": 1.7, "mxnet": 5.5}
    ),
    "resnet50": Job(
        "push + pull of ResNet-50's 161 keys, 102 MB, in lists",
        "resnet50",
        {"limit": 0.45, "gloo": 1.35, "mxnet": 3},
    ),
    "pushpull_4KiB": Job(
        "pushpull of 4 KiB", "pushpull_4KiB", {"limit": 0.4, "gloo": 8, "mxnet": 3}
    ),
    "list_1000x4KiB": Job(
        "push + pull, 1,000 keys of 4 KiB in lists, a key",
        "list_1000x4KiB",
        {"limit": 0.6, "gloo": 1.0, "mxnet": 20},
    ),
    "processor_64MiB": Job("processor time of push + pull of 64 MiB, a byte", None, {"mxnet": 3}),
}

DIST_TRAINING = {
    "resnet50": Job(
        "push + pull of ResNet-50's keys, momentum SGD on the servers",
        None,
        {"sums": 0.9, "mxnet": 5},
    ),
}

DIST_ROWS = {
    "rows_adagrad": Job(
        "push + pull of 10,000 rows of 1,000,000 × 64, AdaGrad on the servers", None, {"mxnet": 5}
    ),
}

DIST_MANY = {
    "resnet50": Job(
        "push + pull of ResNet-50's keys, 8 workers and 4 servers, the work of 2 workers",
        None,
        {"few": 0.8},
    ),
}

DIST_SLOW = {
    "push_resnet50": Job(
        "push of ResNet-50's keys, 2-bit, over 200 Mbit/s", None, {"uncompressed": 8}
    ),
}

FAMILIES = {
    "local": Family(
        "limit",
        {
            "kvstore": ("", "kvstore_local.py"),
            "dict": ("", "dict_numpy.py"),
            "torch": ("torch", "torch_cpu.py"),
            "compiled": ("torch", "torch_cpu.py", "--compiled"),
            "mxnet": ("mxnet", "mxnet_local.py"),
        },
        LOCAL,
    ),
    "training": Family(
        "limit_train",
        {
            "kvstore": ("", "kvstore_training.py"),
            "numpy": ("", "numpy_training.py"),
            "torch": ("torch", "torch_training.py"),
            "fbgemm": ("fbgemm", "fbgemm_training.py"),
            "mxnet": ("mxnet", "mxnet_training.py"),
        },
        TRAINING,
    ),
    "dist": Family(
        "limit_dist",
        {
            "kvstore": ("", "kvstore_dist.py"),
            "gloo": ("torch", "gloo_dist.py"),
            "views": ("torch", "gloo_dist.py", "--views"),
            "mxnet": ("mxnet", "mxnet_dist.py"),
        },
        DIST,
    ),
    "dist_training": Family(
        "limit_dist",
        {
            "kvstore": ("", "kvstore_dist.py", "--optimizer"),
            "sums": ("", "kvstore_dist.py"),
            "mxnet": ("mxnet", "mxnet_dist.py", "--optimizer"),
        },
        DIST_TRAINING,
    ),
    "dist_rows": Family(
        "limit_dist",
        {
            "kvstore": ("", "kvstore_dist.py", "--rows"),
            "mxnet": ("mxnet", "mxnet_dist.py", "--rows"),
        },
        DIST_ROWS,
    ),
    "dist_many": Family(
        "limit_dist",
        {
            "kvstore": ("", "kvstore_dist.py", "--workers", "8", "--servers", "4"),
            "few": ("", "kvstore_dist.py"),
        },
        DIST_MANY,
    ),
    "dist_slow": Family(
        "limit_dist",
        {
            "kvstore": ("", "kvstore_dist.py", "--slow", "--compress"),
            "uncompressed": ("", "kvstore_dist.py", "--slow"),
        },
        DIST_SLOW,
        asked_only=True,
    ),
}
