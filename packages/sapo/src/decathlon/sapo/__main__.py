"""`python -m decathlon.sapo` is the command line, also under `accelerate launch -m`."""

import sys

from decathlon.sapo.cli import main

if __name__ == "__main__":
    sys.exit(main())
