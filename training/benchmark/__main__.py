"""Command of the training benchmark."""

import sys

from training.benchmark.step import main

if __name__ == "__main__":
    sys.exit(main())
