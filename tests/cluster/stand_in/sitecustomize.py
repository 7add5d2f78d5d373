"""What every Python of a launcher's test begins with: the data plane is one that moves nothing, and
the role that the test names in KVSTORE_TEST_BROKEN=ROLE:STATUS ends before it has begun. With
KVSTORE_TEST_IDLE scheduler and servers do nothing but be there, which costs a test little."""

import os
import signal
import sys
from pathlib import Path

_role = os.environ.get("KVSTORE_ROLE")
_broken, _, _status = os.environ.get("KVSTORE_TEST_BROKEN", "").partition(":")
if _broken and _broken == _role:
    print("broken by the test", file=sys.stderr, flush=True)
    os._exit(int(_status))
if "KVSTORE_TEST_IDLE" in os.environ and _role in ("scheduler", "server"):
    if _role == "scheduler":
        os.write(int(os.environ["KVSTORE_ANNOUNCE_FD"]), b'{"host": "127.0.0.1", "port": 1}\n')
    while True:
        signal.pause()
if _role in ("worker", "server"):
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from fakes import FakeCore

    from kvstore import _core

    _core.Node = FakeCore
