"""`python -m decathlon.sid` is the command line, also under `accelerate launch -m`."""

import sys

from decathlon.sid.cli import main

if __name__ == "__main__":
    sys.exit(main())
