"""Fixtures of the fault tests."""

from helpers import only_young_garbage

__all__ = ["only_young_garbage"]
