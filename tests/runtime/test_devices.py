"""What the devices' helpers say, and leave as it was."""

import logging
import sys

from sit_atconv.runtime.devices import import_compiler


def test_the_compiler_comes_without_a_word_of_a_cuda_that_is_not_there(monkeypatch, tmp_path, caplog):
    name = "torch.utils.cpp_extension"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delitem(sys.modules, name, raising=False)
    level = logging.getLogger(name).level
    import_compiler()
    assert name in sys.modules
    assert caplog.records == []
    assert logging.getLogger(name).level == level
