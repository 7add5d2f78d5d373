"""Keys and list forms."""

import numpy as np
import pytest
from helpers import contents, pulled, refused

import kvstore


def ones(number=1):
    return np.full(2, float(number))


@pytest.fixture
def ab(kv):
    kv.init(["a", "b"], [np.zeros(2), np.zeros(2)])
    return kv


def test_a_single_key_takes_an_array_or_a_list_of_arrays(ab):
    ab.push("a", ones())
    ab.push("b", [ones(), ones(2)])
    assert (pulled(ab, "a")[0], pulled(ab, "b")[0]) == (1, 3)


def test_a_list_of_keys_takes_a_list_of_arrays(ab):
    ab.push(["a", "b"], [ones(1), ones(2)])
    assert (pulled(ab, "a")[0], pulled(ab, "b")[0]) == (1, 2)


def test_a_list_of_keys_takes_a_list_of_lists(ab):
    ab.push(["a", "b"], [[ones(1), ones(2)], [ones(3), ones(4), ones(5)]])
    assert (pulled(ab, "a")[0], pulled(ab, "b")[0]) == (3, 12)


def test_a_list_of_one_key_is_not_a_single_key(ab):
    ab.push(["a"], [ones(4)])
    ab.push(["b"], [[ones(4), ones(5)]])
    assert (pulled(ab, "a")[0], pulled(ab, "b")[0]) == (4, 9)
    with refused(ab, kvstore.InvalidArgumentError, "1", "2"):
        ab.push(["a"], [ones(), ones()])


def test_tuples_count_as_lists(ab):
    ab.push(("a", "b"), ((ones(1), ones(2)), [ones(3)]))
    outs = (np.empty(2), np.empty(2))
    ab.pull(("a", "b"), out=outs)
    assert [o[0] for o in outs] == [3, 3]
    ab.pull("a", out=outs)
    assert outs[1][0] == 3
    assert [p.asnumpy()[0] for p in ab.pull(("a",))] == [3]


def test_list_subclasses_count_as_lists(ab):
    class Lines(list):
        pass

    ab.push(Lines(["a"]), Lines([Lines([ones(1), ones(2)])]))
    assert pulled(ab, "a")[0] == 3


def test_values_of_a_key_that_stands_twice_are_summed(ab):
    ab.push(["a", "b", "a"], [ones(1), ones(10), [ones(2), ones(3)]])
    assert (pulled(ab, "a")[0], pulled(ab, "b")[0]) == (6, 10)


def test_outs_of_a_key_that_stands_twice_are_all_filled(ab):
    ab.push(["a", "b"], [ones(1), ones(2)])
    outs = [np.empty(2) for _ in range(4)]
    ab.pull(["a", "b", "a"], out=[outs[0], outs[1], outs[2:]])
    assert [o[0] for o in outs] == [1, 2, 1, 1]


def test_pushpull_groups_values_and_outs_of_a_key_that_stands_twice(ab):
    outs = [np.empty(2) for _ in range(3)]
    ab.pushpull(["a", "b", "a"], [ones(1), ones(5), ones(2)], out=outs)
    assert [o[0] for o in outs] == [3, 5, 3]
    values = [ones(1), ones(2)]
    ab.pushpull(["a", "a"], values)
    assert [v[0] for v in values] == [3, 3]


@pytest.mark.one_process
def test_an_updater_runs_once_for_a_key_that_stands_twice(ab):
    seen = []
    ab.set_updater(lambda key, recv, stored: seen.append((key, recv[0])))
    ab.push(["b", "a", "b"], [ones(1), ones(2), ones(4)])
    assert seen == [("b", 5), ("a", 2)]


def test_empty_lists_of_keys_do_nothing(ab):
    before = contents(ab)
    assert ab.init([], []) is None
    assert ab.push([], []) is None
    assert ab.pull([], out=[]) is None
    assert ab.pushpull([], []) is None
    assert ab.pushpull((), (), out=()) is None
    assert ab.broadcast([], [], []) is None
    assert ab.pull([]) == []
    assert contents(ab) == before


def test_an_empty_list_of_keys_leaves_the_key_type_open(kv):
    kv.init([], [])
    kv.init(3, np.ones(1))


LENGTHS = {
    "more values": (lambda kv: kv.push(["a", "b"], [ones()] * 3), "2", "3"),
    "fewer values": (lambda kv: kv.push(["a", "b"], [ones()]), "2", "1"),
    "no values": (lambda kv: kv.push(["a", "b"], []), "2", "0"),
    "no keys": (lambda kv: kv.push([], [ones()]), "0", "1"),
    "more outs": (lambda kv: kv.pull(["a", "b"], out=[ones()] * 3), "2", "3"),
    "outs of pushpull": (lambda kv: kv.pushpull(["a"], [ones()], out=[ones()] * 2), "1", "2"),
    "init": (lambda kv: kv.init(["c", "d"], [ones()]), "2", "1"),
    "broadcast": (lambda kv: kv.broadcast(["c", "d"], [ones()] * 2, [ones()]), "2", "1"),
}


@pytest.mark.parametrize("case", LENGTHS.values(), ids=LENGTHS)
def test_a_length_mismatch_names_both_lengths(ab, case):
    call, *numbers = case
    with refused(ab, kvstore.InvalidArgumentError, *(rf"\b{n}\b" for n in numbers)):
        call(ab)


EMPTY = {
    "push": lambda kv: kv.push("a", []),
    "push in list": lambda kv: kv.push(["b", "a"], [ones(), []]),
    "pull": lambda kv: kv.pull("a", out=[]),
    "pull in list": lambda kv: kv.pull(["b", "a"], out=[[ones()], []]),
    "pushpull": lambda kv: kv.pushpull("a", []),
    "out of pushpull": lambda kv: kv.pushpull("a", ones(), out=[]),
}


@pytest.mark.parametrize("call", EMPTY.values(), ids=EMPTY)
def test_an_empty_list_of_values_for_a_key_is_refused(ab, call):
    with refused(ab, kvstore.InvalidArgumentError, "'a'|empty"):
        call(ab)


def test_an_empty_list_of_values_for_init_is_refused(ab):
    with refused(ab, kvstore.InvalidArgumentError, "'c'|empty"):
        ab.init("c", [])
    assert "c" not in ab


DEEP = {
    "single key": lambda kv: kv.push("a", [[ones()]]),
    "single key, mixed": lambda kv: kv.push("a", [ones(), [ones()]]),
    "list of keys": lambda kv: kv.push(["a"], [[[ones()]]]),
    "out": lambda kv: kv.pull("a", out=[[ones()]]),
    "outs": lambda kv: kv.pull(["a"], out=[[[ones()]]]),
    "init": lambda kv: kv.init("c", [[ones()]]),
    "tuple": lambda kv: kv.push("a", (((ones(),),),)),
}


@pytest.mark.parametrize("call", DEEP.values(), ids=DEEP)
def test_deeper_nesting_is_refused(ab, call):
    with refused(ab, kvstore.InvalidArgumentError, "'[ac]'|nest|list"):
        call(ab)
    assert "c" not in ab


def test_a_list_within_itself_is_refused(ab):
    loop = []
    loop.append(loop)
    with refused(ab, kvstore.InvalidArgumentError):
        ab.push("a", loop)
    with pytest.raises(TypeError):
        ab.push(loop, [ones()])


def test_a_list_of_keys_needs_a_list_of_values(ab):
    with pytest.raises((kvstore.ArrayTypeError, kvstore.InvalidArgumentError)):
        ab.push(["a", "b"], np.ones((2, 2)))
    with pytest.raises((kvstore.ArrayTypeError, kvstore.InvalidArgumentError)):
        ab.pull(["a", "b"], out=np.ones((2, 2)))
    assert pulled(ab, "a").tolist() == [0, 0]


def test_a_nested_list_of_keys_is_refused(ab):
    with refused(ab, kvstore.ArrayTypeError, "key"):
        ab.push([["a"]], [[ones()]])


@pytest.mark.parametrize(
    "container",
    [set, frozenset, dict.fromkeys, iter, np.array, lambda k: {}.keys()],
)
def test_keys_in_another_container_are_refused(ab, container):
    with refused(ab, kvstore.ArrayTypeError, "key"):
        ab.push(container(["a", "b"]), [ones(), ones()])


@pytest.mark.parametrize(
    "container",
    [lambda v: dict(enumerate(v)), iter, lambda v: {"a": v[0]}.values()],
)
def test_values_in_another_container_are_refused(ab, container):
    with pytest.raises((kvstore.ArrayTypeError, kvstore.InvalidArgumentError), match="list"):
        ab.push(["a", "b"], container([ones(), ones()]))
    with refused(ab, kvstore.ArrayTypeError, "'a'"):
        ab.push("a", container([ones(), ones()]))


# ------------------------------------------------------------------------------- kinds of keys


class Index:
    def __init__(self, number):
        self.number = number

    def __index__(self):
        return self.number


@pytest.mark.parametrize("number", [0, -1, 3, 2**63 - 1, -(2**63)])
def test_any_64_bit_integer_is_a_key(kv, number):
    kv.init(number, ones())
    assert list(kv.keys()) == [number]
    assert number in kv
    assert pulled(kv, number)[0] == 1


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**40])
def test_an_integer_beyond_64_bits_is_refused(kv, number):
    kv.init(1, ones())
    with refused(kv, kvstore.InvalidArgumentError, "64"):
        kv.push(number, ones())
    with refused(kv, kvstore.InvalidArgumentError, "64"):
        kv.init(number, ones())


@pytest.mark.parametrize("make", [np.int64, np.uint8, np.int16, np.uint64, Index])
def test_whatever_has_an_index_is_an_integer_key(kv, make):
    kv.init(make(3), ones())
    kv.push(3, ones(2))
    assert pulled(kv, make(3))[0] == 2
    assert make(3) in kv
    assert [type(k) for k in kv.keys()] == [int]  # noqa: SIM118
    kv.push([make(3), 3], [ones(), ones()])
    assert pulled(kv, 3)[0] == 2


@pytest.mark.parametrize("key", [True, False, np.bool_(True)])
def test_a_bool_is_no_key(kv, key):
    kv.init([0, 1], [ones(0), ones(0)])
    with refused(kv, kvstore.ArrayTypeError, "bool"):
        kv.push(key, ones())
    with refused(kv, kvstore.ArrayTypeError, "bool"):
        kv.push([0, key], [ones(), ones()])
    with refused(kv, kvstore.ArrayTypeError, "bool"):
        kv.init(key, ones())


@pytest.mark.parametrize(
    "key", [1.0, float("nan"), None, b"a", 1j, np.float64(1), np.array([1, 2]), object()]
)
def test_what_is_neither_str_nor_integer_is_no_key(kv, key):
    kv.init(1, ones(0))
    for call in (
        lambda: kv.push(key, ones()),
        lambda: kv.push([1, key], [ones(), ones()]),
        lambda: kv.init(key, ones()),
        lambda: kv.pull(key, out=ones()),
        lambda: kv.delete(key),
        lambda: kv.shape(key),
    ):
        with refused(kv, kvstore.ArrayTypeError, "key"):
            call()


def test_an_error_in_index_comes_out(kv):
    class Bad:
        def __index__(self):
            raise ZeroDivisionError("index")

    with pytest.raises((ZeroDivisionError, kvstore.ArrayTypeError)):
        kv.init(Bad(), ones())


@pytest.mark.parametrize(
    "key", ["w", "ключ", "é" * 300, "a\0b", "a\0c", " ", "'", "🗝", "x" * 100_000]
)
def test_any_text_is_a_key(kv, key):
    kv.init([key, "other"], [ones(1), ones(0)])
    assert key in kv
    assert list(kv.keys()) == [key, "other"]
    kv.push(key, ones(5))
    assert pulled(kv, key)[0] == 5


def test_an_unknown_key_with_long_text_gives_a_readable_error(kv):
    kv.init("w", ones())
    with refused(kv, kvstore.KeyNotFoundError, "éé"):
        kv.pull("é" * 1000)


def test_the_empty_text_is_no_key(kv):
    kv.init("w", ones())
    with refused(kv, kvstore.InvalidArgumentError, "empty|''"):
        kv.push("", ones())
    with refused(kv, kvstore.InvalidArgumentError, "empty|''"):
        kv.init("", ones())


def test_text_with_a_lone_surrogate_is_no_key(kv):
    kv.init("w", ones())
    with refused(kv, kvstore.InvalidArgumentError, "surrogate|UTF-8"):
        kv.push("a\ud800", ones())


def test_a_str_subclass_is_a_str_key(kv):
    class Name(str):
        __slots__ = ()

    kv.init(Name("w"), ones())
    assert [type(k) for k in kv.keys()] == [str]  # noqa: SIM118
    kv.push(np.str_("w"), ones(3))
    assert pulled(kv, "w")[0] == 3


@pytest.mark.one_process
def test_the_first_init_fixes_the_key_type(kv):
    kv.init("w", ones())
    with refused(kv, kvstore.ArrayTypeError, r"\b3\b"):
        kv.init(3, ones())
    with refused(kv, kvstore.ArrayTypeError, r"\b3\b"):
        kv.push(3, ones())
    with refused(kv, kvstore.ArrayTypeError, r"\b3\b"):
        kv.push(["w", 3], [ones(), ones()])
    with refused(kv, kvstore.ArrayTypeError, r"\b3\b"):
        kv.delete(3)
    assert 3 not in kv
    with kvstore.create(kv.type) as numbers:
        numbers.init(3, ones())
        with refused(numbers, kvstore.ArrayTypeError, "'3'"):
            numbers.push("3", ones())
        assert "3" not in numbers


def test_the_key_type_outlives_the_keys(kv):
    kv.init("w", ones())
    kv.delete("w")
    with refused(kv, kvstore.ArrayTypeError, r"\b3\b"):
        kv.init(3, ones())


def test_a_failed_init_fixes_no_key_type(kv):
    with pytest.raises(kvstore.ArrayTypeError):
        kv.init("w", None)
    with pytest.raises(kvstore.ArrayTypeError):
        kv.init(["w", 3], [ones(), ones()])
    with pytest.raises(kvstore.InvalidArgumentError):
        kv.init(["w", "w"], [ones(), ones()])
    assert list(kv.keys()) == []
    kv.init(3, ones())


# --------------------------------------------------- lists that change while the call reads them


def test_a_value_list_emptied_by_a_keys_index_is_read_safely(kv):
    kv.init(3, ones(0))
    values = [np.full(2, 4.0), np.full(2, 5.0)]

    class Emptier:
        def __index__(self):
            values.clear()
            return 3

    try:
        kv.push(Emptier(), values)
    except kvstore.KVStoreError:
        assert pulled(kv, 3)[0] == 0
    else:
        assert pulled(kv, 3)[0] == 9


def test_a_key_list_emptied_by_a_keys_index_is_read_safely(kv):
    kv.init([3, 4], [ones(0), ones(0)])
    keys = []

    class Emptier:
        def __index__(self):
            keys.clear()
            return 3

    keys += [Emptier(), 4]
    before = contents(kv)
    try:
        kv.push(keys, [ones(1), ones(2)])
    except kvstore.KVStoreError:
        assert contents(kv) == before
    else:
        assert (pulled(kv, 3)[0], pulled(kv, 4)[0]) == (1, 2)


def test_lists_changed_by_an_arrays_dlpack_are_read_safely(kv):
    kv.init([3, 4], [ones(0), ones(0)])
    values = []

    class Emptier:
        def __init__(self, array):
            self.array = array

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

        def __dlpack__(self, **options):
            values.clear()
            values.extend([None] * 100)
            return self.array.__dlpack__(**options)

    values += [Emptier(ones(1)), ones(2)]
    before = contents(kv)
    try:
        kv.push([3, 4], values)
    except kvstore.KVStoreError:
        assert contents(kv) == before
    else:
        assert (pulled(kv, 3)[0], pulled(kv, 4)[0]) == (1, 2)
    values[:] = [Emptier(ones(1)), ones(2)]
    before = contents(kv)
    try:
        kv.push(3, values)
    except kvstore.KVStoreError:
        assert contents(kv) == before
    else:
        assert pulled(kv, 3)[0] == 3
