"""``python -m kvstore``: version, build, what was found on this machine, and every setting."""

import argparse

from ._about import report

if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m kvstore", description=__doc__).parse_args()
    for line in report():
        print(line)
