"""Ctrl-C and other signals in a wait."""

import pytest
from helpers import assert_clean

INTERRUPT = """
def interrupt_when_waiting():
    '''Sends SIGINT when the main thread has stood at one instruction of `blocked` for a while.'''
    main, place, since = threading.main_thread().ident, None, time.monotonic()
    while True:
        frame = sys._current_frames()[main]
        now = frame.f_code, frame.f_lasti
        if now != place or now[0] is not blocked.__code__:
            place, since = now, time.monotonic()
        elif time.monotonic() - since > 0.1:
            break
        time.sleep(0.001)
    global sent
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)

def blocked(call):
    call()

def interrupted(call):
    thread = threading.Thread(target=interrupt_when_waiting)
    thread.start()
    try:
        blocked(call)
    except KeyboardInterrupt:
        took = time.monotonic() - sent
    else:
        raise AssertionError("no KeyboardInterrupt")
    thread.join()
    assert took < 1, took

from functools import partial
release = hold("w")
"""

WAITS = {
    "push": "partial(kv.push, 'w', np.full(3, 7.0))",
    "pull": "partial(kv.pull, 'w', out=out)",
    "pushpull": "partial(kv.pushpull, 'w', np.full(3, 7.0), out=out)",
    "push of a list": "partial(kv.push, ['w'], [np.full(3, 7.0)])",
}


@pytest.mark.parametrize("call", WAITS.values(), ids=WAITS)
def test_ctrl_c_ends_a_wait_within_a_second_and_cancels_the_call(script, call):
    done = script(
        INTERRUPT
        + f"""
out = np.full(3, 9.0)
interrupted({call})
release.set()
assert kv.pull("w").asnumpy().tolist() == [0, 0, 0]
assert out.tolist() == [9, 9, 9]
kv.push("w", np.ones(3))
assert kv.pull("w").asnumpy().tolist() == [1, 1, 1]
"""
    )
    assert_clean(done)


ASYNC_WAITS = {
    "handle": "handle.wait",
    "handle with a timeout": "partial(handle.wait, 25)",
    "array": "array.asnumpy",
    "wait_to_read": "array.wait_to_read",
    "wait_all": "kvstore.wait_all",
}


@pytest.mark.parametrize("call", ASYNC_WAITS.values(), ids=ASYNC_WAITS)
def test_ctrl_c_ends_a_wait_for_an_operation_which_goes_on(script, call):
    done = script(
        INTERRUPT
        + f"""
handle = kv.push("w", np.full(3, 7.0), async_op=True)
array = kv.pull("w")
interrupted({call})
assert not handle.done()
release.set()
handle.wait()
assert array.asnumpy().tolist() == [7, 7, 7]
"""
    )
    assert_clean(done)


def test_ctrl_c_waits_for_its_turn_of_an_updater_and_does_not_run_it(script):
    done = script(
        INTERRUPT
        + """
ran = []
kv.set_updater(lambda key, recv, stored: ran.append(key))
interrupted(partial(kv.push, "w", np.ones(3)))
release.set()
kv.push("v", np.ones(3))
assert ran == ["v"], ran
kv.push("w", np.ones(3))
assert ran == ["v", "w"], ran
"""
    )
    assert_clean(done)


def test_a_signal_handler_that_returns_lets_the_wait_go_on(script):
    done = script(
        INTERRUPT
        + """
seen = []
def handler(number, frame):
    seen.append(number)
    release.set()
signal.signal(signal.SIGINT, handler)
thread = threading.Thread(target=interrupt_when_waiting)
thread.start()
blocked(partial(kv.push, "w", np.full(3, 7.0)))
thread.join()
assert seen == [signal.SIGINT]
assert kv.pull("w").asnumpy().tolist() == [7, 7, 7]
"""
    )
    assert_clean(done)


def test_a_signal_handler_may_use_the_store(script):
    done = script(
        INTERRUPT
        + """
def handler(number, frame):
    kv.push("v", np.full(3, 3.0))
    kv.push("v", kvstore.full(3, 4, "float64"))
    assert kv.pull("v").asnumpy().tolist() == [4, 4, 4]
    release.set()
signal.signal(signal.SIGINT, handler)
thread = threading.Thread(target=interrupt_when_waiting)
thread.start()
blocked(partial(kv.push, "w", np.full(3, 7.0)))
thread.join()
assert kv.pull("w").asnumpy().tolist() == [7, 7, 7]
"""
    )
    assert_clean(done)
