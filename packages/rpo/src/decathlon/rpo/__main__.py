"""`python -m decathlon.rpo` is the command line, also under `accelerate launch -m`."""

import sys

from decathlon.rpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
