"""`python -m jaxlora.cli` is `jaxlora`."""

import sys

from jaxlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
