"""Stores over CUDA memory, on the emulation: the tests of stores/, and those of the contract with
CUDA tensors, in processes of their own."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import plugin

STORES = plugin.HERE / "stores"
FILES = sorted(path.name for path in STORES.glob("check_*.py"))

# Mistakes in the core: file, text, what stands there instead, the tests that notice, of
# check_order.py or the file that is named.
NONE = "no mistake, which nobody may notice"
MISTAKES = {
    NONE: (None, "", "", "streams"),
    "a value's place is not waited for": (
        "comm/device.c",
        "kv_status_t status = mark != NULL ? kv_mark_before(mark, lane) : KV_OK;",
        "kv_status_t status = KV_OK;",
        "streams_need or overtaken",
    ),
    "a value's place keeps its old mark": (
        "comm/device.c",
        "            place->newest = mark;",
        "            (void)0;",
        "streams_need or overtaken",
    ),
    "another stream's work is not waited for": (
        "comm/device.c",
        "kv_status_t status = kv_mark_before(mark, to);",
        "kv_status_t status = KV_OK;",
        "several_streams or after_the_work",
    ),
    "another stream does not come after": (
        "store/device_batch.c",
        "kv_status_t behind = kv_mark_before(mark, batch->others[i]);",
        "kv_status_t behind = KV_OK;",
        "right_after_its_push or training_loop or random",
    ),
    "arrays are let go at once": (
        "store/device_batch.c",
        "    kv_mark_keep(mark, drop_hold, hold);",
        "    drop_hold(hold);",
        "held_until or too_early",
    ),
    "arrays are never let go": (
        "comm/device.c",
        "    for (kept_t *next; ready != NULL; ready = next) {",
        "    for (kept_t *next; false; ready = next) {",
        "held_until",
    ),
    "memory is freed before its last use": (
        "comm/device.c",
        "kv_lane_free(lane, mark, base->data);",
        "kv_lane_free(lane, NULL, base->data);",
        "closes_and_keys_go",
    ),
    "a mark passes early": (
        "comm/device.c",
        "KV_TRY(kv_mark_passed(mark, &passed));\n    if (passed)",
        "passed = true;\n    if (passed)",
        "right_after_its_push or host_waits",
    ),
    "an array of another device is read in place": (
        "store/device_batch.c",
        "} else if (value->device != device) {",
        "} else if (false) {",
        "after_the_work",
    ),
    "the thread's device is another one afterwards": (
        "comm/device.c",
        "(void)api->make_current(current.before, sentence);",
        "(void)sentence;",
        "current_device_stays",
    ),
    "the host does not wait for a library that tells no stream": (
        "store/device_batch.c",
        "batch->waits = batch->waits || !(view->flags & KV_VIEW_FOLLOWS);",
        "",
        "the_host_waits",
    ),
    "the host waits for every push": (
        "store/device_batch.c",
        "batch->waits = batch->waits || !(view->flags & KV_VIEW_FOLLOWS);",
        "batch->waits = true;",
        "does_not_wait",
    ),
    "a key changes alone, and its twins stay": (
        "store/device.c",
        "        kv_entry_drop_twins(work->group.entry);",
        "        (void)0;",
        "check_nccl.py: goes_another_way and value",
    ),
    "an updater changes a key alone, and its twins stay": (
        "store/apply.c",
        "        kv_entry_drop_twins(entry);",
        "        (void)0;",
        "check_nccl.py: goes_another_way and updater",
    ),
    "twins begin without the key's state": (
        "store/nccl.c",
        "copy->slot[s] = slots->slot[s] != NULL ? kv_buffer_hold(slots->slot[s]) : NULL;",
        "copy->slot[s] = NULL;",
        "check_nccl_training.py: states or middle",
    ),
    "twins keep an older state": (
        "store/nccl.c",
        "slots == NULL || twins->mirrored == slots)",
        "slots == NULL || twins->mirrored != NULL)",
        "check_nccl_training.py: states or middle",
    ),
    "the key steps before its twins": (
        "store/nccl.c",
        "for (int k = push->crew->count - 1; k >= 0; k--) {",
        "for (int k = 0; k < push->crew->count; k++) {",
        "check_nccl.py: goes_another_way and adam and value",
    ),
    "a push by NCCL comes before the work on its values": (
        "store/nccl.c",
        "KV_TRY(kv_lane_join(kv_view_lane(value), push->lanes[k]));",
        "",
        "check_nccl_order.py: several_streams",
    ),
    "an owner does not come after a push by NCCL": (
        "store/nccl.c",
        "KV_TRY(kv_mark_before(mark, kv_view_lane(value)));",
        "return KV_OK;",
        "check_nccl_order.py: several_streams",
    ),
    "a value is sent before it has come": (
        "store/stage.c",
        "    KV_TRY(kv_mark_wait(value->marks[value->num_passed], caller));",
        "",
        "check_overlap.py: numbers",
    ),
    "a slice is sent with the one before it": (
        "store/stage.c",
        "size_t bytes = ++value->num_passed * SLICE_BYTES;",
        "size_t bytes = (++value->num_passed + 1) * SLICE_BYTES;",
        "check_overlap.py: numbers",
    ),
    "codes are made of what has not come": (
        "store/dist.c",
        "if (status == KV_OK && !request->call.late)",
        "if (status == KV_OK)",
        "check_overlap.py: numbers",
    ),
    "nothing is sent before all has come": (
        "store/dist.c",
        "        if (kv_target_is_plain(target) && there < bytes)",
        "        if (false)",
        "check_overlap.py: is_sent_while",
    ),
    "no answer goes on before all have come": (
        "store/dist.c",
        "    if (!request->call.watched)",
        "    if (true)",
        "check_overlap.py: goes_on_while",
    ),
    "a push begins before its device has come to it": (
        "store/dist.c",
        "        KV_TRY(kv_stage_begun(plan->stage, caller));",
        "        (void)0;",
        "check_overlap.py: has_not_begun",
    ),
    "pinned memory is used again too early": (
        "store/stage.c",
        "        kv_mark_keep(mark, kv_buffer_drop, kv_buffer_hold(staged->arrived));",
        "",
        "check_overlap.py: leaves_its_answer",
    ),
    "what an error of NCCL leaves is taken for a number": (
        "store/store.c",
        "        status = kv_nccl_team_check(plan->team);",
        "        status = KV_OK;",
        "check_nccl_failures.py: comes_later",
    ),
    "a store that is lost goes on": (
        "store/store.c",
        "kv_status_t status = kv_nccl_team_check(plan->team);",
        "kv_status_t status = KV_OK;",
        "check_nccl_failures.py: loses_the_devices",
    ),
}

# The kinds whose stores the contract's tests are given (contract_on_cuda.py), in a process.
CONTRACT = ("device", "nccl", "local dist_device_sync")
# Not again what is the same code for other kinds, or tested by files of its own.
ONCE = (
    "device and not dist or not (test_threads or test_training_threads"
    " or nccl and (test_optimizers or test_compressed_push))"
)

NCCL = ("check_nccl.py", "check_nccl_order.py", "check_nccl_failures.py")
# Devices without access to each other, one alone, three.
MACHINES = {
    "no peers": (("check_values.py", "check_order.py", "check_overlap.py"), {"EMU_PEER": "0"}),
    "one device": (("check_order.py", "check_training.py"), {"EMU_DEVICES": "1"}),
    "three devices": (("check_order.py", "check_random.py"), {"EMU_DEVICES": "3"}),
    "NCCL for one device": (("check_nccl.py", "check_nccl_order.py"), {"EMU_DEVICES": "1"}),
    "NCCL for three": (NCCL, {"EMU_DEVICES": "3"}),
    "NCCL without peers": (NCCL, {"EMU_PEER": "0"}),
}

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the emulation is built with g++, which is missing here"
)


@pytest.fixture(scope="module", autouse=True)
def nccl(tmp_path_factory):
    """The stand-in for NCCL, for all stores here."""
    library = plugin.nccl(tmp_path_factory.mktemp("nccl") / "libnccl.so.2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVSTORE_NCCL", str(library))
        yield library


def run(library, *arguments, path=(), **env):
    """pytest's status and output."""
    env = {**os.environ, "KVSTORE_CUDA_PLUGIN": str(library), **env}
    env["PYTHONPATH"] = os.pathsep.join([*map(str, path), env.get("PYTHONPATH", "")])
    options = ("-c", plugin.ROOT / "pyproject.toml", "--rootdir", plugin.ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", *arguments],
        env=env,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=300,
    )
    return done.returncode, done.stdout


def run_file(library, folder, name):
    return run(library, STORES / name)


def run_machine(library, folder, machine):
    files, env = MACHINES[machine]
    return run(library, *(STORES / name for name in files), KVSTORE_CUDA_SEEDS="1", **env)


def run_contract(library, folder, kinds):
    arguments = ("-p", "contract_on_cuda", plugin.ROOT / "tests" / "contract", "-k", ONCE)
    return run(library, *arguments, path=[plugin.HERE], KVSTORE_TESTS_KINDS=kinds)


def run_mistake(library, folder, mistake):
    name, *change, tests = MISTAKES[mistake]
    plugin.package(folder, name, *change)
    file, _, names = tests.rpartition(": ")
    arguments = ("-x", STORES / (file or "check_order.py"), "-k", names)
    status, output = run(library, *arguments, path=[folder], KVSTORE_CUDA_SEEDS="6")
    assert f"{folder}/kvstore/_core" in output, output
    return status, output


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """What has come of the run of each test that was asked for, by its name: some run at once."""
    library = plugin.link(plugin.objects().values(), tmp_path_factory.mktemp("gpu") / "emulated.so")
    jobs, later = {}, []
    functions = {
        "test_file_passes_on_the_emulation": run_file,
        "test_so_does_one_on_other_machines": run_machine,
        "test_the_contract_holds_there": run_contract,
    }
    with ThreadPoolExecutor(plugin.build.JOBS) as pool:

        def submit(item, function):
            folder = tmp_path_factory.mktemp("run")
            jobs[item.name] = pool.submit(function, library, folder, **item.callspec.params)

        for item in request.session.items:
            if item.path != request.path:
                continue
            if item.originalname in functions:
                submit(item, functions[item.originalname])
            else:
                later.append(item)
        if later:
            plugin.package(tmp_path_factory.mktemp("whole"))  # compiles what all share
        for item in later:
            submit(item, run_mistake)
        yield jobs
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", FILES)
def test_file_passes_on_the_emulation(outcomes, request, name):
    status, output = outcomes[request.node.name].result()
    assert status == 0, output


@pytest.mark.parametrize("machine", MACHINES)
def test_so_does_one_on_other_machines(outcomes, request, machine):
    status, output = outcomes[request.node.name].result()
    assert status == 0, output


@pytest.mark.parametrize("kinds", CONTRACT)
def test_the_contract_holds_there(outcomes, request, kinds):
    status, output = outcomes[request.node.name].result()
    assert status == 0, output


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_core_is_noticed(outcomes, request, mistake):
    status, output = outcomes[request.node.name].result()
    assert status == (0 if mistake == NONE else 1), output
