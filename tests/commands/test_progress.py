"""Every command whose work is long tells how far it is."""

import importlib.util
import shlex

import pytest
from conftest import ROOT, reset_accelerate
from hub_server import TOKEN, serving_hub
from huggingface_hub import constants

from sit_atconv.__main__ import main
from sit_atconv.commands import COMMANDS
from sit_atconv.runtime.console import Progress

# Why a command tells nothing.
SHORT = {
    "recipes": "it lists files",
    "table": "it reads some results",
    "report": "it reads a run; with --nearest it tells",
    "watch": "it is what tells",
    "convert": "one file is read, and one written",
    "export": "one model is read, and one written",
    "train --dry-run": "it counts",
    "swap-check": "told not to time, it counts",
}
OF_FILES = {"SHA-256", "to the disk"}  # of every file, told where it is large


@pytest.mark.slow
def test_every_command_with_long_work_tells_how_far_it_is(tmp_path, monkeypatch, vae_folder):
    spec = importlib.util.spec_from_file_location("installed", ROOT / "tests/installed.py")
    installed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(installed)
    monkeypatch.chdir(tmp_path)
    installed.place(tmp_path)
    told, update = {}, Progress.update

    def count(self, number: int = 1) -> None:
        told[name].add(self.desc)
        update(self, number)

    monkeypatch.setattr(Progress, "update", count)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving_hub() as hub:
        files = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.url)
        stand_in = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": files}
        for key, value in {**stand_in, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(constants, key, value)
        for line in installed.COMMANDS:
            words = shlex.split(line)
            if "--help" in words:  # of the app, which tells on its page
                continue
            name = f"train {words[-1]}" if "--dry-run" in words else words[0]
            told.setdefault(name, set())
            reset_accelerate()
            main(words)
    assert {name for name, bars in told.items() if bars <= OF_FILES} == SHORT.keys()
    assert COMMANDS.keys() - told.keys() == {"app"}
