"""The examples in the docstrings of everything public run and print what they say."""

import doctest
import inspect

import numpy
import pytest

import kvstore

WITH_EXAMPLES = ("KVStore.", "RowSparse", "compression.", "lr_scheduler.", "optimizer.")
# One only refuses in this version, the others need SciPy or PyTorch.
WITHOUT_EXAMPLE = {
    "send_command_to_servers",
    "from_scipy",
    "from_torch",
    "toscipy",
    "to_torch",
}


def documented():
    """(name, object) of all public functions and classes, and of the classes' public methods."""
    for name in kvstore.__all__:
        thing = getattr(kvstore, name)
        if inspect.ismodule(thing) and thing is not kvstore.errors:
            for inner in thing.__all__:
                yield f"{name}.{inner}", getattr(thing, inner)
        if not callable(thing):
            continue
        yield name, thing
        if inspect.isclass(thing) and thing.__module__.startswith("kvstore"):
            for method, value in vars(thing).items():
                if not method.startswith("_") and callable(value):
                    yield f"{name}.{method}", value


DOCUMENTED = dict(documented())


# Their examples start a cluster.
CLUSTERS = ("LocalCluster", "cluster.LocalCluster")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.ucx] if name in CLUSTERS else [])
        for name in DOCUMENTED
    ],
)
def test_the_examples_of_a_docstring_run(name):
    text = inspect.getdoc(DOCUMENTED[name]) or ""
    assert text, "no docstring"
    names = {"kvstore": kvstore, "numpy": numpy, "np": numpy}
    test = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    output = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, tried = doctest.DocTestRunner(optionflags=flags).run(test, out=output.append)
    assert failed == 0, "".join(output)
    if name.startswith(WITH_EXAMPLES) and name.partition(".")[2] not in WITHOUT_EXAMPLE:
        assert tried > 0, "no example"


def test_signatures_can_be_read():
    signature = inspect.signature(kvstore.KVStore.push)
    assert list(signature.parameters) == ["self", "key", "value", "priority", "async_op"]
    assert signature.parameters["async_op"].kind is inspect.Parameter.KEYWORD_ONLY
