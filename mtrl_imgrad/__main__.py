"""`python -m mtrl_imgrad`."""

import sys

from mtrl_imgrad.cli import main

if __name__ == "__main__":
    sys.exit(main())
