"""`python -m decathlon.ir_dro` is the command line, also under `accelerate launch -m`."""

import sys

from decathlon.ir_dro.cli import main

if __name__ == "__main__":
    sys.exit(main())
