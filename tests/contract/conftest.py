"""Fixtures of the contract tests."""

import pytest
from helpers import PRELUDE, run_script


@pytest.fixture(params=["local", "device"])
def script(request):
    """Runs a script that finds a store `kv` with the keys 'v' and 'w', and `hold(key)`."""

    def run(text, *args, **options):
        return run_script(PRELUDE.replace("KIND", repr(request.param)) + text, *args, **options)

    return run
