"""Clusters for the tests of this folder, ended with them, and an environment without settings."""

import pytest
from fakes import Cluster

from kvstore.cluster import settings


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in settings.variables():
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make_cluster():
    made = []

    def make(*arguments, **options):
        made.append(Cluster(*arguments, **options))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()
