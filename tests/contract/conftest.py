"""Fixtures of the tests that run a script in a process of its own."""

import pytest
from helpers import PRELUDE, run_script


@pytest.fixture(params=["local", "device"])
def script(request):
    def run(text, *args, **options):
        return run_script(PRELUDE.replace("KIND", repr(request.param)) + text, *args, **options)

    return run
