"""``python -m kvstore``: version, build, what was found on this machine, and every setting."""

import argparse
import os
import sys

from ._about import report

if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m kvstore", description=__doc__).parse_args()
    try:
        for line in report():
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        # `python -m kvstore | head`: nobody reads on, and the interpreter would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
