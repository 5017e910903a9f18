"""Moving digits whose model is swapped: the clips, what is held out, an arm's stages, and what is kept of a run."""

import json

import pytest
import torch

from experiments import video
from experiments.video import ARMS, KEPT, Arm, Settings, batches, clips, figures, follow, held_out, table, teach
from sit_atconv.data.digits import Digits
from sit_atconv.flow.path import LinearPath
from sit_atconv.runtime.errors import InputError

SETTINGS = Settings(steps=2, regression=2, tuning=1)


def test_a_digit_moves_and_comes_back_from_the_walls():
    """Against a walk of one pixel after the other, drawn with slices."""
    digits = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = clips(digits, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    start, speed = (torch.randint(*range_, (64, 1, 2), generator=generator)[:, 0] for range_ in ((0, 9), (-2, 3)))
    assert found.shape == (64, 1, 8, 16, 16)
    walls = 0
    for clip, digit, (y, x), (dy, dx) in zip(found[:, 0], digits[:, 0], start.tolist(), speed.tolist(), strict=True):
        for frame in clip:
            wanted = torch.full((16, 16), -1.0)
            wanted[y : y + 8, x : x + 8] = digit
            assert torch.equal(frame, wanted)
            for _ in range(abs(dy)):
                dy, walls = (-dy, walls + 1) if not 0 <= y + (1 if dy > 0 else -1) <= 8 else (dy, walls)
                y += 1 if dy > 0 else -1
            for _ in range(abs(dx)):
                dx, walls = (-dx, walls + 1) if not 0 <= x + (1 if dx > 0 else -1) <= 8 else (dx, walls)
                x += 1 if dx > 0 else -1
    assert walls > 20


def test_held_out_clips_are_of_held_out_digits_at_all_times():
    first, second = held_out(), held_out()
    assert all(torch.equal(one[name], two[name]) for one, two in zip(first, second, strict=True) for name in one)
    times = torch.cat([each["t"] for each in first])
    assert times.histc(60, 0, 1).tolist() == [6] * 60
    seen = {tuple(image.flatten().tolist()) for image in Digits("train").images}
    for clip in torch.cat([each["data"] for each in first])[::37, 0]:
        rows, columns = (clip[0] > -1).nonzero().T
        windows = [
            clip[0, y : y + 8, x : x + 8] for y in range(9) for x in range(9)
            if y <= rows.min() and x <= columns.min() and y + 8 > rows.max() and x + 8 > columns.max()
        ]  # fmt: skip
        assert not seen & {tuple(window.flatten().tolist()) for window in windows}


def test_batches_are_of_their_seed_alone():
    def some(seed):
        return [each["data"] for _, each in zip(range(2), batches(seed))]  # noqa: B905

    assert all(map(torch.equal, some(1), some(1)))
    assert not any(map(torch.equal, some(1), some(2)))


def test_a_model_that_knows_the_answer_has_the_loss_of_none():
    each = held_out()[0]
    target = LinearPath().velocity(each["data"], each["noise"], each["t"])

    class Knowing(torch.nn.Module):
        def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
            assert torch.equal(timestep, 1000 * each["t"])
            assert torch.equal(encoder_hidden_states, each["classes"])
            return (target + 0.5,)

    found = figures(Knowing(), [target], [each])
    assert found["loss"] == pytest.approx(0.25)
    assert found["distance"] == pytest.approx((0.25 * target.numel() / target.square().sum()).sqrt().item(), rel=1e-5)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(video, "MODEL", video.MODEL | {"num_attention_heads": 2, "num_layers": 2, "ffn_dim": 16})
    monkeypatch.setattr(video, "BATCH", 2)
    monkeypatch.setattr(video, "CALIBRATIONS", 2)
    monkeypatch.setattr(video, "COMPARED", 1)
    whole = held_out()
    fewer = [{name: value[:2] for name, value in each.items()} for each in whole[:2]]
    monkeypatch.setattr(video, "held_out", lambda: fewer)


@pytest.mark.slow
def test_an_arm_goes_through_its_stages(small, tmp_path):
    teach(tmp_path, 0, SETTINGS)
    kept, half, whole = (follow(tmp_path, arm, 0, SETTINGS) for arm in (KEPT, Arm(0.5, "full"), Arm(1.0, "factored")))
    assert kept["start"]["distance"] == 0
    assert kept["tuned"]["distance"] > 0
    assert "regressed" not in kept
    assert (len(half["errors"]["box"]), len(whole["errors"]["box"])) == (1, 2)
    for each in (half, whole):
        starts = {name: list(errors.values()) for name, errors in each["errors"].items()}
        assert len({tuple(errors) for errors in starts.values()}) == 5  # each start is another one
        assert max(starts["closed form"]) < min(starts["random"])
        assert each["regressed"]["loss"] != each["start"]["loss"] != kept["start"]["loss"]
    assert follow(tmp_path, KEPT, 0, SETTINGS) == kept  # found, not made
    results = [
        {**each, "seed": seed, "arm": arm.name}
        for seed in (0, 1)
        for arm, each in zip(ARMS, (kept, half, half, whole, whole), strict=True)
    ]
    told = table(results)
    assert f"| all, factored | {whole['start']['loss']:.4f} ± 0.0000 |" in told
    assert "| kept |" in told
    with pytest.raises(InputError, match=r"result\.json' is of other settings"):
        follow(tmp_path, KEPT, 0, Settings(2, 2, 2))
    with pytest.raises(InputError, match="is of other settings"):
        teach(tmp_path, 0, Settings(3, 2, 1))


def test_what_is_left_is_told_without_work(tmp_path, capsys):
    done = tmp_path / "seed0" / "kept" / video.RESULT
    done.parent.mkdir(parents=True)
    done.write_text(json.dumps({}))
    video.main(["--runs", str(tmp_path), "--seeds", "0", "1", "--dry-run", "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(ARMS) - 1
    assert not (tmp_path / "out").exists()
