"""Stores with one key, for the tests of this folder."""

import numpy as np
import pytest
from helpers import sparse


@pytest.fixture
def w(kv):
    kv.init("w", np.ones(2, np.float32))
    return kv


@pytest.fixture
def s(kv):
    kv.init("s", sparse({1: 10, 4: 40}))
    return kv
