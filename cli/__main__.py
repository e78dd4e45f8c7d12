"""``python -m cli`` from a checkout does what the installed ``clips`` does."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
