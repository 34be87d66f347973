"""`python -m benchmarks NAME`, from a checkout: benchmarks are not installed with the packages."""

import sys

from benchmarks.cli import main

if __name__ == "__main__":
    sys.exit(main())
