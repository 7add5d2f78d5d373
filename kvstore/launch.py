"""``python -m kvstore.launch`` is ``kvrun``."""

import sys

from .cluster.launch import main

if __name__ == "__main__":
    sys.exit(main())
