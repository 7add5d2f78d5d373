"""Stores by name: ``create``, the abstract class of stores, and the registry of users' own."""

import abc
import contextlib
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, overload

from . import _core
from .errors import ArrayTypeError, InvalidArgumentError, NotBuiltError

if TYPE_CHECKING:
    from .cluster.settings import Settings

_registered: dict[str, type["KVStoreBase"]] = {}

_Class = TypeVar("_Class", bound="type[KVStoreBase]")


class KVStoreBase(abc.ABC):
    """What every store can do, under the names of MXNet 2.

    Derive from it and decorate with ``KVStoreBase.register`` to make a store of your own that
    ``kvstore.create`` finds. The built-in stores are instances of it too.
    """

    OPTIMIZER: ClassVar[str] = "optimizer"

    @abc.abstractmethod
    def broadcast(self, key: Any, value: Any, out: Any, priority: int = 0) -> Any:
        """Initialise ``key`` from rank 0's ``value`` and copy it into every ``out``."""

    @abc.abstractmethod
    def pushpull(self, key: Any, value: Any, out: Any = None, priority: int = 0) -> Any:
        """Sum the values of all workers, update, and copy the result into ``out``."""

    @abc.abstractmethod
    def is_capable(self, capability: str) -> bool:
        """Whether the store can do more than move values: ``'optimizer'``."""

    @property
    @abc.abstractmethod
    def type(self) -> str:
        """The name that the store was created by, in lower case."""

    @property
    @abc.abstractmethod
    def rank(self) -> int:
        """The number of this worker, from 0."""

    @property
    @abc.abstractmethod
    def num_workers(self) -> int:
        """How many workers there are."""

    def set_optimizer(self, optimizer: Any) -> None:
        """Let the store update its values with ``optimizer``."""
        raise self._lacks("set_optimizer")

    def save_optimizer_states(self, fname: Any, dump_optimizer: bool = False) -> None:
        """Write the optimizer's state to a file."""
        raise self._lacks("save_optimizer_states")

    def load_optimizer_states(self, fname: Any) -> None:
        """Read the optimizer's state from a file."""
        raise self._lacks("load_optimizer_states")

    def _lacks(self, call: str) -> NotBuiltError:
        return NotBuiltError(f"a {type(self).__name__} has no {call}: it keeps no optimizer")

    @staticmethod
    def register(klass: _Class) -> _Class:
        """Class decorator: ``kvstore.create`` finds the class by its name, letter case free.

        A class that is defined again (a notebook cell run twice) replaces itself; another class of
        the same name replaces it with a warning.
        """
        if not (isinstance(klass, type) and issubclass(klass, KVStoreBase)):
            raise ArrayTypeError(
                f"register takes a class derived from kvstore.KVStoreBase, not {klass!r}"
            )
        name = klass.__name__.lower()
        if name in _core.kinds():
            raise InvalidArgumentError(
                f"{klass.__qualname__} cannot be registered: {name!r} is a built-in kind of store"
            )
        old = _registered.get(name)
        if old is not None and _identity(old) != _identity(klass):
            warnings.warn(
                f"kvstore.create({name!r}) made a {'.'.join(_identity(old))} "
                f"and from now on makes a {'.'.join(_identity(klass))}",
                stacklevel=2,
            )
        _registered[name] = klass
        return klass


def _identity(klass: type) -> tuple[str, str]:
    return klass.__module__, klass.__qualname__


# The decorator above hides ABCMeta.register, which makes the C type a virtual subclass.
abc.ABCMeta.register(KVStoreBase, _core.KVStore)


_LocalKind = Literal[
    "local", "local_update_cpu", "local_allreduce_cpu", "device", "local_allreduce_device"
]


@overload
def create(name: _LocalKind = "local", **options: Any) -> _core.KVStore: ...
@overload
def create(name: str, **options: Any) -> Any: ...
def create(name: str = "local", **options: Any) -> Any:
    """Make a store of the kind ``name`` (letter case free); ``options`` are those of the kind.

    A class registered with ``KVStoreBase.register`` is called with the options. The dist kinds join
    their cluster; so does ``nccl`` where options or the environment tell of one.
    """
    make: Callable[..., Any] | None = None
    if isinstance(name, str):
        make = _registered.get(name.lower())
        if make is None and name.lower() in _core.kinds() and name.lower().startswith("dist"):
            return _create_dist(name, options)
        if make is None and name.lower() == "nccl":
            return _create_nccl(name, options)
    return _core.KVStore(name, **options) if make is None else make(**options)


def _open_nccl() -> None:
    """Lets the core find NCCL in its package. What is wrong with it the core tells itself."""
    from ._about import nccl_folder

    with contextlib.suppress(NotBuiltError):
        _core.nccl_library(nccl_folder())


_STORE_OPTIONS = ("timeout", "deterministic", "num_threads")


def _create_dist(name: str, options: dict[str, Any]) -> Any:
    """A store of a dist kind: this process joins its cluster first, if it is a worker."""
    from .cluster import entry

    # Before the cluster hears anything.
    _core.options_check(name, **options)
    entry.check_ucx()
    found, own = _read(options)
    if found.role != "worker":
        return _core.KVStore(name, _member=None, **own)
    return _join(name, found, own)


def _create_nccl(name: str, options: dict[str, Any]) -> Any:
    """A store of kind nccl: over all workers of the cluster, where this process is one of them."""
    from .cluster import settings

    _open_nccl()
    _core.options_check(name, **options)
    if not settings.has_cluster(options):
        return _core.KVStore(name, **options)
    found, own = _read(options)
    if found.role != "worker":
        raise InvalidArgumentError(
            f"this process is the {found.role} of its cluster and has no values to push or pull; "
            "call kvstore.serve()"
        )
    from . import _nccl

    return _join(name, found, own, _nccl.Ranks().take_place)


def _read(options: dict[str, Any]) -> tuple["Settings", dict[str, Any]]:
    """The settings of a cluster, and the options of the store itself."""
    from .cluster import settings

    own = {option: options[option] for option in _STORE_OPTIONS if option in options}
    found = settings.read({o: v for o, v in options.items() if o not in _STORE_OPTIONS[1:]})
    own["timeout"] = found.timeout
    return found, own


def _join(name: str, found: "Settings", own: dict[str, Any], make_core: Any = None) -> Any:
    from .cluster.member import Member, leave_abandoned, of_this_process

    leave_abandoned()
    member = of_this_process()
    if member is not None:
        raise InvalidArgumentError(
            f"this process already is a worker of the cluster at {member.settings.address}: "
            "close that store before you make another"
        )
    asynchronous = "async" in name.lower().split("_")
    member = Member.join(found, asynchronous=asynchronous, make_core=make_core)
    try:
        store = _core.KVStore(name, _member=member, **own)
    except BaseException as error:
        member.fail(f"its store could not be made: {type(error).__name__}: {error}")
        raise
    member.store = weakref.ref(store)
    return store
