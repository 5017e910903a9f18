"""python tests/telling.py SCRIPT WORDS: a script that tells of every step, for tests that wait for one on a pipe."""

import os
import runpy
import sys

sys.path[0] = os.getcwd()

from sit_atconv.runtime import console  # noqa: E402

console.EVERY = 0

if __name__ == "__main__":  # a loader's process imports this file anew
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
