"""The CUDA sources on the emulation: what the programs of test_gpu_*.c say, and that they notice
mistakes which are planted in the sources."""

import os
import re
import shutil
import subprocess

import pytest

import plugin

PROGRAMS = sorted(path.stem for path in plugin.HERE.glob("test_gpu_*.c"))

# What each mistake is: file, text, what stands there instead; the sources to be made again where
# the file is a header; the tests that notice.
ORDER = ("test_gpu_order", "streams_wait_for_events_of_other_devices")
STREAM = "(cudaStream_t)stream"
BARRIER = "__syncthreads();"
PLANTED = {
    "an event is not waited for": (
        "device.cu",
        f"cudaStreamWaitEvent({STREAM}, (cudaEvent_t)event, 0)",
        "cudaSuccess",
        (),
        ORDER,
    ),
    "an event is not recorded": (
        "device.cu",
        f"cudaEventRecord((cudaEvent_t)event, {STREAM})",
        "cudaSuccess",
        (),
        ORDER,
    ),
    "an event passes before its work": (
        "device.cu",
        "*done = error == cudaSuccess;",
        "*done = true;",
        (),
        ORDER,
    ),
    "memory is freed early": (
        "device.cu",
        f"cudaFreeAsync(pointer, {STREAM})",
        "cudaFreeAsync(pointer, 0)",
        (),
        ORDER,
    ),
    "memory is there late": ("device.cu", f"pool, {STREAM})", "pool, 0)", (), ORDER),
    "a copy is in another stream": (
        "device.cu",
        f"kinds[way], {STREAM})",
        "kinds[way])",
        (),
        ORDER,
    ),
    "zeros are in another stream": (
        "device.cu",
        f"(size_t)bytes, {STREAM})",
        "(size_t)bytes)",
        (),
        ORDER,
    ),
    "a wrong device": ("device.cu", "cudaSetDevice(device),", "cudaSetDevice(0),", (), ORDER),
    "a launch is in another stream": (
        "batch.cu",
        f"packer->stream = {STREAM};",
        "packer->stream = 0;",
        (),
        ORDER,
    ),
    "a peer's pool stays closed": (
        "device.cu",
        "cudaMemPoolSetAccess(pool, &access, 1)",
        "cudaSuccess",
        (),
        ("test_gpu_order", "a_peer_sees_the_memory_of_the_pool"),
    ),
    "a launch fails unseen": (
        "batch.cu",
        "KV_CUDA_TRY(packer->device, cudaGetLastError()",
        "KV_CUDA_TRY(packer->device, cudaSuccess",
        (),
        ("test_gpu_failures", "no_call_of_the_runtime_fails_unseen"),
    ),
    "a death is forgotten": (
        "device.cu",
        "__atomic_store_n(&devices.error[device], (int)error, __ATOMIC_RELAXED);",
        "",
        (),
        ("test_gpu_failures", "a_dead_device_is_named_and_the_others_live"),
    ),
    "the pool is not trimmed": (
        "device.cu",
        "if (error == cudaErrorMemoryAllocation) {",
        "if (false) {",
        (),
        ("test_gpu_failures", "without_memory_nothing_is_lost"),
    ),
    "a barrier between the levels of a tree is missing": (
        "tree.h",
        f"{BARRIER}\n            if",
        "if",
        ("squares.cu",),
        ("test_gpu_steps", "sums_of_squares_are_those_of_the_cpu"),
    ),
    "a barrier between two trees is missing": (
        "tree.h",
        f"subtrees++;\n        {BARRIER}",
        "subtrees++;",
        ("squares.cu",),
        ("test_gpu_steps", "so_is_a_large_one"),
    ),
    "a barrier of a row is missing": (
        "step_group.cu",
        BARRIER,
        "",
        (),
        ("test_gpu_steps", "every_class_steps_as_on_the_cpu"),
    ),
    "the end of an array is passed": (
        "number.h",
        " && count - i >= N",
        "",
        ("sum.cu",),
        ("test_gpu_numbers", "sums_are_those_of_the_cpu"),
    ),
}

# In comm/nccl.c, likewise.
SUMS = ("test_gpu_nccl", "lists_of_all_types_are_summed_in_one_group")
PLANTED_NCCL = {
    "a call returns before its work is on the lanes": (
        "if (state == KV_NCCL_SUCCESS)",
        "if (is_fine(state))",
        SUMS,
    ),
    "a sum is in another lane": ("member, lanes[member]", "member, lanes[0]", SUMS),
    "a group is not ended": (
        "int ended = nccl->library->ncclGroupEnd();\n    return is_fine(result) ? ended : result;\n"
        "}\n\nstatic kv_status_t run(",
        "return result;\n}\n\nstatic kv_status_t run(",
        SUMS,
    ),
    "a type is another one": ("kv_nccl_dtype(job->dtype)", "7", SUMS),
    "a broadcast comes from another device": (
        "first_rank + member == root",
        "first_rank + member == 0",
        ("test_gpu_nccl", "one_device_gives_its_values_to_all"),
    ),
    "two threads are inside": (
        "bool is_entered = !is_over && !nccl->is_entered;",
        "bool is_entered = !is_over;",
        ("test_gpu_nccl_failures", "a_signal_handler_does_not_wait_for_itself"),
    ),
    "a communicator is not aborted": (
        "if (nccl->members[i].comm != NULL)",
        "if (nccl->members[i].comm != NULL && i > 0)",
        ("test_gpu_nccl_failures", "a_group_that_does_not_begin_is_aborted"),
    ),
    "a lost group is used": (
        "bool is_over = nccl->is_lost ||",
        "bool is_over =",
        ("test_gpu_nccl_failures", "an_error_in_a_call_ends_the_group"),
    ),
}

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("gcc") is None,
    reason="the emulation is built with gcc and g++, one of which is missing here",
)


@pytest.fixture(scope="module")
def programs():
    return plugin.programs()


@pytest.fixture(scope="module")
def nccl(tmp_path_factory):
    return plugin.nccl(tmp_path_factory.mktemp("nccl") / "libnccl.so.2")


def run(program, library, *names, seeds=None, nccl=None):
    """The program's status and what it printed."""
    env = {**os.environ, "KVSTORE_CUDA_PLUGIN": str(library)}
    if nccl is not None:
        env["KVSTORE_NCCL"] = str(nccl)
    if seeds is not None:
        env["KVSTORE_CUDA_SEEDS"] = str(seeds)
    done = subprocess.run(
        [program, *names],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=200,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return plugin.link(plugin.objects().values(), tmp_path_factory.mktemp("gpu") / "emulated.so")


def test_the_emulation_shows_mistakes(tmp_path):
    status, output = run(plugin.rules(tmp_path / "rules"), "")
    assert status == 0, output


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_passes_on_the_emulation(programs, emulated, nccl, name):
    status, output = run(programs[name], emulated, nccl=nccl)
    assert status == 0 and "ok " in output, output


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_noticed(programs, tmp_path, mistake):
    file, old, new, users, (program, name) = PLANTED[mistake]
    library = plugin.planted(tmp_path, file, old, new, users)
    status, output = run(programs[program], library, name, seeds=8)
    assert status != 0 and re.search(r"\.[ch]:\d+: ", output), output
    assert "KVSTORE_CUDA_PLUGIN" not in output, output


@pytest.mark.parametrize("mistake", PLANTED_NCCL)
def test_a_planted_mistake_with_nccl_is_noticed(emulated, nccl, tmp_path, mistake):
    old, new, (program, name) = PLANTED_NCCL[mistake]
    program = plugin.planted_core(tmp_path, "comm/nccl.c", old, new, program)
    status, output = run(program, emulated, name, seeds=8, nccl=nccl)
    assert status != 0, output
    assert re.search(r"\.[ch]:\d+: ", output) or status < 0, output
