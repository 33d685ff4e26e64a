"""`python -m xquant_jax`: the same as the console script `xquant`."""

import sys

from xquant_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
