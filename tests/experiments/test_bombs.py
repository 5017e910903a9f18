"""Small files that ask for a lot of memory: each is refused in one line before the memory is taken."""

import sys

import pytest
from conftest import slowly

from experiments.bombs import bombs, measure


@pytest.mark.skipif(sys.platform != "linux", reason="a child's peak memory is Linux's")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nth", [4, *slowly([1])])
def test_every_bomb_is_refused_before_it_takes_memory(tmp_path, nth):
    for name, (path, read) in [*bombs(tmp_path).items()][::nth]:
        taken = measure(name, path, read)
        assert taken.said, name
        assert "\n" not in taken.said
        assert taken.memory < 48 << 20, taken
