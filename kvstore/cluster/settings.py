"""What a process knows of its cluster: options of `create` before KVSTORE_* before DMLC_*.

One table says how each setting is called in all three places; it serves the reading, the messages
and the list of `python -m kvstore`.
"""

import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidArgumentError

ROLES = ("worker", "server", "scheduler")
MAX_TIMEOUT_S = 1e9
MAX_NODES = 1 << 20


@dataclass(frozen=True)
class Setting:
    """A setting: its option, its variables (ours first), its default and its help text."""

    option: str
    variables: tuple[str, ...]
    default: str
    text: str

    def told(self) -> str:
        """How a message calls it."""
        return f"{' or '.join(self.variables)} or the option {self.option}"


TABLE = (
    Setting(
        "role",
        ("KVSTORE_ROLE", "DMLC_ROLE"),
        "worker",
        "What this process is in a cluster: worker, server or scheduler.",
    ),
    Setting(
        "scheduler",
        ("KVSTORE_SCHEDULER", "DMLC_PS_ROOT_URI"),
        "",
        "Where the scheduler listens, as host:port ([host]:port for IPv6). In MXNet's variables: "
        "DMLC_PS_ROOT_URI and DMLC_PS_ROOT_PORT.",
    ),
    Setting(
        "num_workers",
        ("KVSTORE_NUM_WORKERS", "DMLC_NUM_WORKER"),
        "",
        "How many workers the cluster has. The scheduler must know; the others may.",
    ),
    Setting(
        "num_servers",
        ("KVSTORE_NUM_SERVERS", "DMLC_NUM_SERVER"),
        "",
        "How many servers the cluster has: 0 for stores of kind nccl. The scheduler must know; the "
        "others may.",
    ),
    Setting(
        "rank",
        ("KVSTORE_RANK",),
        "",
        "The rank that this node wants. Without it the free ranks are given in order of arrival.",
    ),
    Setting(
        "token",
        ("KVSTORE_TOKEN",),
        "",
        "The secret that all nodes of a cluster share. Needed unless the scheduler listens on "
        "loopback only.",
    ),
    Setting(
        "bind",
        ("KVSTORE_BIND",),
        "",
        "The address of this machine that is listened on. Without it the scheduler takes the host "
        "of KVSTORE_SCHEDULER, the others the address by which they reach the scheduler.",
    ),
    Setting(
        "advertise",
        ("KVSTORE_ADVERTISE", "DMLC_NODE_HOST"),
        "",
        "The name or address by which the other nodes know this machine.",
    ),
    Setting(
        "interface",
        ("KVSTORE_INTERFACE", "DMLC_INTERFACE"),
        "",
        "The network device that values travel by. Without it the one that has the address of "
        "KVSTORE_BIND, or by which the scheduler is reached.",
    ),
    Setting(
        "port_range",
        ("KVSTORE_PORT_RANGE",),
        "",
        "The ports that values may travel by, as first-last.",
    ),
    Setting(
        "same_host_copies",
        ("KVSTORE_TRANSPORT_CMA",),
        "auto",
        "auto: nodes on one machine copy values straight from each other's memory where all may; "
        "off: never.",
    ),
    Setting(
        "allow_import",
        ("KVSTORE_ALLOW_IMPORT",),
        "",
        "The modules that a server may import optimizers of users from, with those below them; "
        "several with commas between.",
    ),
    Setting(
        "timeout",
        ("KVSTORE_TIMEOUT",),
        "300",
        "Seconds that joining a cluster, and every call on a dist store, may take.",
    ),
)
BY_OPTION = {setting.option: setting for setting in TABLE}
# Set by launchers for the processes that they start, and MXNet's second half of an address.
INTERNAL = ("KVSTORE_ANNOUNCE_FD", "KVSTORE_PARENT_FD")
PORT = "DMLC_PS_ROOT_PORT"


@dataclass(frozen=True)
class Settings:
    """The settings of one process, checked.

    `host` and `port` are the scheduler's; a number that nobody has given is None.
    """

    role: str
    host: str
    port: int
    num_workers: int | None
    num_servers: int | None
    rank: int | None
    token: str
    bind: str
    advertise: str
    interface: str
    port_range: str
    same_host_copies: bool
    allow_import: tuple[str, ...]
    timeout: float

    @property
    def address(self) -> str:
        """The scheduler's address as it is written."""
        return join_address(self.host, self.port)


def read(options: Mapping[str, Any] | None = None) -> Settings:
    """The settings from options and the environment.

    Parameters
    ----------
    options
        Values by name; None counts as not given.

    Raises
    ------
    InvalidArgumentError
        A setting is missing or has a bad value. The message names its variable and its option.
    """
    options = options or {}
    for name in options:
        if name not in BY_OPTION:
            known = ", ".join(BY_OPTION)
            raise InvalidArgumentError(
                f"there is no option {name!r} of a cluster (options: {known})"
            )
    look = _Look(options)
    role = _role(look, BY_OPTION["role"].default)
    host, port = _scheduler(look, role)
    copies = look.text("same_host_copies") or "auto"
    if copies not in ("auto", "off"):
        raise look.bad("same_host_copies", "it is auto or off")
    settings = Settings(
        role=role,
        host=host,
        port=port,
        num_workers=look.count("num_workers", 1, MAX_NODES),
        num_servers=look.count("num_servers", 0, MAX_NODES),
        rank=look.count("rank", 0, MAX_NODES - 1) if role != "scheduler" else None,
        token=look.text("token"),
        bind=look.text("bind"),
        advertise=look.text("advertise"),
        interface=look.text("interface"),
        port_range=_port_range(look),
        same_host_copies=copies == "auto",
        allow_import=_modules(look),
        timeout=_timeout(look),
    )
    if role == "scheduler":
        for name in ("num_workers", "num_servers"):
            if getattr(settings, name) is None:
                raise InvalidArgumentError(
                    f"the scheduler must know {name}: set {BY_OPTION[name].told()}"
                )
    return settings


def has_cluster(options: Mapping[str, Any]) -> bool:
    """Whether options or the environment tell of a cluster: where its scheduler is, or more."""
    cluster = [option for option in BY_OPTION if option != "timeout"]
    given = any(options.get(option) is not None for option in cluster)
    return given or _Look({}).find("scheduler")[1] is not None


def serving_role() -> str:
    """The role that the environment gives to a process that serves."""
    role = _role(_Look({}), None)
    if role == "worker":
        raise InvalidArgumentError(
            f"{_Look({}).find('role')[0]}=worker: a worker does not serve, it calls "
            "kvstore.create('dist')"
        )
    return role


def _role(look: "_Look", default: str | None) -> str:
    role = look.text("role") or default
    if role is None:
        raise InvalidArgumentError(
            "there is no role to serve in: set DMLC_ROLE to server or scheduler (or KVSTORE_ROLE)"
        )
    if role not in ROLES:
        raise look.bad("role", f"a role is one of {', '.join(ROLES)}")
    return role


class _Look:
    """Finds values, and remembers where, for the messages."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options

    def find(self, option: str) -> tuple[str, Any]:
        """Where a setting was found, and its value; an empty variable counts as not set."""
        if self.options.get(option) is not None:
            return f"the option {option}", self.options[option]
        for variable in BY_OPTION[option].variables:
            if os.environ.get(variable):
                return variable, os.environ[variable]
        return option, None

    def text(self, option: str) -> str:
        _, value = self.find(option)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.bad(option, "it is a str")
        return value

    def count(self, option: str, low: int, high: int) -> int | None:
        _, value = self.find(option)
        if value is None:
            return None
        try:
            number = int(value) if isinstance(value, str) else value.__index__()
        except (AttributeError, ValueError, TypeError):
            number = low - 1
        if isinstance(value, bool) or not low <= number <= high:
            raise self.bad(option, f"{option} must be an integer from {low} to {high}")
        return int(number)

    def bad(self, option: str, due: str) -> InvalidArgumentError:
        where, value = self.find(option)
        shown = "(not shown)" if option == "token" else repr(value)[:100]
        return InvalidArgumentError(f"{where}={shown}: {due} (set by {BY_OPTION[option].told()})")


def _scheduler(look: _Look, role: str) -> tuple[str, int]:
    where, value = look.find("scheduler")
    if value is None:
        start = f"`{_launch()}` starts a cluster of its own; for another one, " * (role == "worker")
        raise InvalidArgumentError(
            f"a {role} must know where the scheduler is: {start}set KVSTORE_SCHEDULER or the "
            f"option scheduler to host:port, or DMLC_PS_ROOT_URI and {PORT}"
        )
    text = look.text("scheduler")
    if where == "DMLC_PS_ROOT_URI":
        port = os.environ.get(PORT, "")
        if not port:
            raise InvalidArgumentError(
                f"DMLC_PS_ROOT_URI={text} needs {PORT}, the scheduler's port, beside it"
            )
        text = join_address(text.strip("[]"), port)
    host, port = _split_address(text)
    lowest = 0 if role == "scheduler" else 1
    if not host or not (port.isascii() and port.isdigit() and lowest <= int(port[:9]) <= 65535):
        raise look.bad("scheduler", f"it is host:port, with a port from {lowest} to 65535")
    return host, int(port)


def _launch() -> str:
    """What starts this program as workers of a cluster on this machine."""
    script, *rest = sys.argv or [""]
    program = [script, *rest] if script.endswith(".py") else ["train.py"]
    return f"kvrun -n 2 -s 2 python {shlex.join(program)}"


def _split_address(text: str) -> tuple[str, str]:
    """Host and port of host:port or [host]:port; an IPv6 address without brackets is none."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1], port
    return ("" if ":" in host else host), port


def join_address(host: str, port: int | str) -> str:
    """host:port, with brackets where the host is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _port_range(look: _Look) -> str:
    text = look.text("port_range")
    if text:
        parts = text.split("-")
        numbers = [int(part) for part in parts if part.isascii() and part.isdigit() and part[:6]]
        if len(parts) != 2 or len(numbers) != 2 or not 0 < numbers[0] <= numbers[1] <= 65535:
            raise look.bad("port_range", "it is first-last, two ports from 1 to 65535")
    return text


def _modules(look: _Look) -> tuple[str, ...]:
    _, value = look.find("allow_import")
    if value is None:
        return ()
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(
        isinstance(name, str) and all(part.isidentifier() for part in name.split("."))
        for name in names
    ):
        raise look.bad("allow_import", "it is a module such as 'models.optimizers', or a list")
    return tuple(names)


def modules(given: object = None) -> str:
    """The setting allow_import alone, checked, as its variable has it."""
    return ",".join(_modules(_Look({"allow_import": given})))


def _timeout(look: _Look) -> float:
    _, value = look.find("timeout")
    if value is None:
        return float(BY_OPTION["timeout"].default)
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if isinstance(value, bool) or not 0 < seconds <= MAX_TIMEOUT_S:
        raise look.bad("timeout", "a timeout is a number of seconds above 0")
    return seconds


def timeout(given: object = None) -> float:
    """The setting of that name alone: as given, else from the environment."""
    return _timeout(_Look({"timeout": given}))


def listing() -> Iterator[tuple[str, str, str, str]]:
    """(variable, value, default, text) of each setting, as `_core.settings` gives its own."""
    for setting in TABLE:
        name = next((v for v in setting.variables if os.environ.get(v)), setting.variables[0])
        value = os.environ.get(name) or setting.default
        if setting.option == "token" and value:
            value = "(set)"
        yield name, value, setting.default, setting.text


def variables() -> list[str]:
    """Every variable that is read here."""
    return [name for setting in TABLE for name in setting.variables] + [PORT, *INTERNAL]
