"""Fixtures of the contract tests."""

import gc

import pytest
from helpers import PRELUDE, run_script


@pytest.fixture(scope="session", autouse=True)
def only_young_garbage():
    """What was imported is not looked through again at each test's start and end."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=["local", "device"])
def script(request):
    """Runs a script that finds a store `kv` with the keys 'v' and 'w', and `hold(key)`."""

    def run(text, *args, **options):
        return run_script(PRELUDE.replace("KIND", repr(request.param)) + text, *args, **options)

    return run
