"""What draws on the page, against the commands that it shows; and the page by its HTTP interface."""

import argparse
import io
import json
import shlex
import threading
import zipfile
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import browser
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image

from sit_atconv import SiTTransformer2DModel
from sit_atconv.__main__ import main
from sit_atconv.app.form import Control, shared, whole_number
from sit_atconv.app.opening import is_foreign, opened
from sit_atconv.app.own import class_words
from sit_atconv.app.studio import Stopped, Studio
from sit_atconv.commands import parser_of
from sit_atconv.commands.app import options_of, reading
from sit_atconv.runtime.classes import Classes
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.pictures import to_uint8
from sit_atconv.sampling import SCHEDULERS
from sit_atconv.swap import save_delta, swap_attention

CPU = torch.device("cpu")
SAME_SIZE = {"height": None, "width": None}
TEN = [str(label) for label in range(10)]
FORM = {
    "classes": ["3", "1", "4"], "count": 2, "seed": "7", "sampler": "heun", "steps": 3, "guidance": 2.5, "low": 0.25,
    "high": 1, "height": None, "width": None,
}  # fmt: skip


def write_model(folder: Path, mixer: str = "atconv", **options) -> Path:
    """A model of 8 x 8 grey pixels in ten classes, whose output is not zero."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}
    model = SiTTransformer2DModel(**sizes, num_classes=10, learn_sigma=False, token_mixer=mixer, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "attention": str(write_model(folder / "attention", "attention")),
        "atconv": str(write_model(folder / "atconv")),
        "one step": str(write_model(folder / "one_step", use_meanflow=True)),
    }


def asked(*words: str) -> argparse.Namespace:
    return parser_of("app", "sit-atconv app").parse_args([*words, "--device", "cpu"])


@contextmanager
def studio_of(*words: str):
    args = asked(*words)
    with Studio(opened(args.ckpt, args.beside, args.dtype, CPU, args.vae, reading(args)), CPU) as studio:
        yield studio


def silent(share: float, text: str) -> None:
    pass


def drawn_by(line: str, folder: Path, monkeypatch) -> bytes:
    """The picture that a command line draws in an empty folder."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    program, *words = shlex.split(line)
    assert program == "sit-atconv"
    main([*words, "--force"])
    return (folder / "grid.png").read_bytes()


def test_the_line_that_is_shown_draws_the_same_file(models, tmp_path, monkeypatch):
    told = []
    with studio_of(models["atconv"]) as studio:
        for number, change in enumerate(
            ({}, {"classes": [], "count": 5}, {"height": 12, "width": 6}, {"guidance": None})
        ):
            (drawn,) = studio.draw(FORM | change, lambda share, text: told.append(share))
            assert drawn_by(drawn.repeat, tmp_path / str(number), monkeypatch) == drawn.png
            assert len(drawn.images) == (5 if number == 1 else 6)
            assert drawn.images[0].size == ((6, 12) if number == 2 else (8, 8))
            assert drawn.evaluations == 11  # of six, those from t = 1/3 on are guided
            assert drawn.seconds > 0
    assert told[-1] == 1
    assert told[:7] == sorted(told[:7])


def test_two_models_draw_from_the_same_noise(models):
    with studio_of(models["attention"], models["atconv"]) as studio:
        drawn = studio.draw(FORM, silent)
        starts = [each.way(0.0) for each in drawn]
    assert starts[0].time == 0
    assert starts[0].states == starts[1].states
    assert drawn[0].png != drawn[1].png
    assert [each.repeat.split()[3] for each in drawn] == [models["attention"], models["atconv"]]


def test_the_way_leads_from_the_noise_by_the_velocity_to_the_image(models):
    """Euler: x_next = x + h v, so the data expected at x is x + (1 - t) v."""
    form = FORM | {"sampler": "euler", "steps": 4, "guidance": 1, "low": None, "high": None}
    with studio_of(models["atconv"]) as studio:
        (side,) = studio.sides
        seen, by = [], side.ready.trained.model
        hook = by.register_forward_hook(lambda model, args, output: seen.append((args[0].clone(), output[0].clone())))
        (drawn,) = studio.draw(form, silent)
        hook.remove()
        stops = [drawn.way(t) for t in (0.0, 0.3, 0.5, 0.75, 0.95)]
    assert [stop.time for stop in stops] == [0, 0.25, 0.5, 0.75, 1]
    for stop, (x, v), t in zip(stops, seen, (0, 0.25, 0.5, 0.75), strict=False):
        assert np.array_equal(cells(stop.states, 3), to_uint8(x)[:, 0].numpy())
        assert np.array_equal(cells(stop.expected, 3), to_uint8(x + (1 - t) * v)[:, 0].numpy())
    assert stops[4].states == stops[4].expected == drawn.png
    assert np.array_equal(cells(drawn.png, 3), [np.array(image) for image in drawn.images])


def cells(png: bytes, columns: int) -> np.ndarray:
    """The images of 8 x 8 in a picture of them, each enlarged eight times above a caption of 13 pixels."""
    picture = np.array(Image.open(io.BytesIO(png)).convert("L"))
    rows = picture.shape[0] // (64 + 13 + 4)
    return np.stack([
        picture[4 + 81 * row : 68 + 81 * row : 8, 4 + 68 * column : 68 + 68 * column : 8]
        for row in range(rows)
        for column in range(columns)
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": "abc"}, "--seed: invalid int value: 'abc'"),
        ({"seed": "--force"}, "--seed: invalid int value: '--force'"),
        ({"seed": str(2**64)}, "since torch's generators take 64 bits"),
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"steps": 2.5}, "--steps: invalid int value: '2.5'"),
        ({"sampler": "adams3", "steps": 2}, "needs at least 3 steps"),
        ({"sampler": "eule"}, "--sampler: invalid choice: 'eule'"),
        ({"classes": ["10"]}, "class id 10 is out of range"),
        ({"classes": ["nine"]}, "the checkpoint names no classes"),
        ({"classes": ["3", "--ckpt=elsewhere"]}, "elsewhere"),
        ({"count": 0}, "--rows 0: must be at least 1"),
        ({"count": 4000}, "one picture holds at most 4,096"),
        ({"guidance": 1}, "nothing is guided"),
        ({"low": 0.9, "high": 0.1}, "--cfg-interval=[0.9, 0.1]"),
        ({"low": 0.9, "high": 0.95}, "no step evaluates the model at a time in it"),
        ({"high": None}, "--cfg-interval: expected 2 arguments"),
        ({"height": 9, "width": 8}, "a patch of this model covers 2 x 2 pixels; give multiples of 2"),
        ({"height": 8}, "--size: expected 2 arguments"),
    ],
)
def test_what_is_wrong_in_the_form_is_told_as_the_command_tells_it(change, told, models):
    with studio_of(models["atconv"]) as studio, pytest.raises(InputError) as error:
        studio.draw(FORM | change, silent)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_blank_fields_are_left_out():
    blank = dict.fromkeys(FORM) | {"classes": []}
    assert options_of(blank) == []
    assert options_of(blank | {"count": 3, "guidance": 2.0, "low": 0, "high": 1.0}) == [["--num", "3"], ["--cfg", "2"]]
    assert options_of(blank | {"classes": ["a b"], "count": 1}) == [["--classes", "a b"]]


def test_classes_have_the_names_that_a_command_takes():
    names = {0: "tench, Tinca tinca", 1: "crane", 2: "crane", 3: "1", 4: "-x", 5: "99"}
    words = class_words(classes := Classes(7, names))
    assert words == ("tench", "1", "2", "3", "4", "5", "6")
    assert [classes.read(word) for word in words] == list(range(7))


def test_a_form_of_two_is_blank_where_they_differ(models):
    with studio_of(models["atconv"], models["one step"]) as studio:
        fields = {control.name: control for control in shared(studio.sides)}
        drawn = studio.draw(FORM | {"sampler": "euler", "steps": None, "guidance": None, "low": 0}, silent)
    assert (fields["steps"].value, fields["guidance"].value, fields["sampler"].value) == (None, None, "euler")
    assert [each.evaluations for each in drawn] == [100, 1]

    class Other:
        title, controls = "other", [Control("prompt", "Prompt", "text")]

    with pytest.raises(InputError, match="'other' asks for other things"):
        shared([studio.sides[0], Other()])


def test_a_one_step_model_is_live(models):
    with studio_of(models["one step"]) as studio:
        (side,) = studio.sides
        assert side.live
        assert {control.name: control.choices for control in side.controls}["sampler"] == ("euler",)
        (drawn,) = studio.draw({control.name: control.value for control in side.controls}, silent)
        assert drawn.evaluations == 1
        assert [drawn.way(t).time for t in (0.2, 0.9)] == [0, 1]


def test_a_drawing_is_stopped_at_its_next_evaluation(models):
    with studio_of(models["attention"], models["atconv"]) as studio:

        def stops(share: float, text: str) -> None:
            seen.append(share)
            studio.stop()

        seen: list[float] = []
        with pytest.raises(Stopped, match=r"^stopped; draw again$"):
            studio.draw(FORM, stops)
        assert len(seen) == 1
        assert len(studio.draw(FORM, silent)) == 2


def test_requests_wait_for_one_another(models):
    """Two threads draw at once: each gets what it gets alone."""
    with studio_of(models["atconv"]) as studio:
        alone = [studio.draw(FORM | {"seed": seed}, silent)[0].png for seed in "12"]
        at_work, drawn, overlaps = [], {}, []

        def draw(seed: str) -> None:
            def tell(share: float, text: str) -> None:
                overlaps.append(at_work[:1] not in ([], [seed]))
                at_work[:] = [seed] if share < 1 else []

            drawn[seed] = studio.draw(FORM | {"seed": seed}, tell)[0].png

        threads = [threading.Thread(target=draw, args=(seed,)) for seed in "12"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [drawn[seed] for seed in "12"] == alone
    assert not any(overlaps)


def test_a_picture_of_another_size_by_a_scheduler(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in ([], ["--scheduler", next(iter(SCHEDULERS))]):
        main(["sample", "--ckpt", models["atconv"], "--classes", "1", "--steps", "2", "--size", "12", "6", *words])
        with Image.open("grid.png") as picture:
            assert picture.size == (60, 120 + 13)  # 64 // 6 times as large, above the caption


# Pipelines of diffusers


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory, vae_folder) -> dict[str, str]:
    """A pipeline of a tiny DiT, and its swap in all three forms."""
    folder = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
    model = DiTTransformer2DModel(in_channels=4, out_channels=8, num_embeds_ada_norm=1000, **sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKL.from_pretrained(vae_folder, use_safetensors=True)
    pipe = DiTPipeline(model, vae, DDIMScheduler())
    pipe.save_pretrained(folder / "before")
    swap_attention(pipe, select="all", init="copy_vo")
    pipe.save_pretrained(folder / "pipeline")
    for name in ("before", "pipeline"):  # as published ones have it; diffusers does not store what it was given
        index = folder / name / "model_index.json"
        index.write_text(
            json.dumps(json.loads(index.read_text()) | {"id2label": {"0": "crane", "1": "tench, Tinca tinca"}})
        )
    pipe.transformer.save_pretrained(folder / "model")
    save_delta(pipe, folder / "atconv-delta.safetensors")
    return {each.name: str(each) for each in folder.iterdir()}


SMALL = {"classes": ["tench", "crane"], "count": 2, "seed": "3", "steps": 2, "guidance": None}


@pytest.mark.parametrize("after", ["pipeline", "model", "atconv-delta.safetensors"])
def test_a_pipeline_before_and_after_its_swap(after, pipelines):
    assert is_foreign(pipelines["before"])
    with studio_of(pipelines["before"], pipelines[after]) as studio:
        before, swapped = studio.draw(SMALL, silent)
        assert [control.name for control in studio.sides[0].controls] == list(SMALL)
    assert before.png != swapped.png
    assert before.evaluations == swapped.evaluations == 4  # two steps, each of class and no class
    for drawn in (before, swapped):
        found: dict = {}
        exec(drawn.repeat, found)
        assert len(drawn.images) == 4
        assert all(np.array_equal(a, b) for a, b in zip(drawn.images, found["images"], strict=True))
    # The image at index i has the generator of seed + i, whatever stands beside it.
    with studio_of(pipelines["before"]) as studio:
        (one,) = studio.draw(SMALL | {"classes": ["tench"], "count": 1}, silent)
    assert np.abs(np.asarray(one.images[0], float) - np.asarray(before.images[0], float)).max() <= 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": "x"}, "steps='x': give a whole number"),
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"seed": "1.5"}, "seed='1.5': give a whole number"),
        ({"seed": str(2**64 - 1)}, "since torch's generators take 64 bits"),
        ({"classes": ["tnech"]}, "did you mean 'tench'?"),
        ({"classes": []}, "classes is blank"),
        ({"guidance": "a"}, "guidance='a': give a number"),
    ],
)
def test_what_is_wrong_in_the_form_of_a_pipeline(change, told, pipelines):
    with studio_of(pipelines["before"]) as studio, pytest.raises(InputError) as error:
        studio.draw(SMALL | change, silent)
    assert told in str(error.value)


def test_whole_numbers():
    assert [whole_number({"n": value}, "n", 4) for value in (3, 3.0, "3", "", None)] == [3, 3, 3, 4, 4]
    for value in (2.5, "2.5", float("inf"), float("nan"), [1]):
        with pytest.raises(InputError, match="give a whole number"):
            whole_number({"n": value}, "n", 4)


def test_what_cannot_be_opened_is_told_in_one_line(pipelines, models, tmp_path, fails, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # whether gradio is there or not
    assert "is a pipeline of diffusers" in fails(main, "app", models["atconv"], pipelines["before"])
    assert "brings its own autoencoder" in fails(main, "app", pipelines["before"], "--vae", tmp_path)
    assert "it is a SiTTransformer2DModel" in fails(main, "app", pipelines["before"], models["atconv"])
    assert "CKPT2 'nowhere': no such file" in fails(main, "app", models["atconv"], "nowhere")
    assert "--port 0: must be at least 1" in fails(main, "app", models["atconv"], "--port", 0)


def test_without_gradio_the_extra_is_named(models, fails, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'sit_atconv[app]'" in fails(main, "app", models["atconv"])


# The page, over HTTP


@contextmanager
def page_of(*words: str, monkeypatch):
    """The address of the page, which is served while this is open."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'sit_atconv[app]'")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    from sit_atconv.app.page import Files
    from sit_atconv.app.serving import started

    with studio_of(*words) as studio, closing(Files()) as files:
        page = started(studio, files, "127.0.0.1")
        try:
            yield page.local_url
        finally:
            page.close(verbose=False)
    assert not files.folder.exists()


def client_of(url: str, folder: Path):
    from gradio_client import Client

    return Client(url, verbose=False, analytics_enabled=False, download_files=str(folder))


def fields(client) -> list[dict]:
    """What the page says of the fields of its form, in their order."""
    return client.view_api(return_format="dict")["named_endpoints"]["/draw"]["parameters"]


@pytest.mark.slow
def test_ten_digits_by_name_over_http(models, tmp_path, monkeypatch):
    with page_of(models["atconv"], models["attention"], monkeypatch=monkeypatch) as url:
        client = client_of(url, tmp_path)
        made = client.predict(classes=TEN, seed="5", steps="4", **SAME_SIZE, api_name="/draw")
        states = client.predict(moment=0.5, api_name="/way")
        begun = [each.get("parameter_default") for each in fields(client)]
        assert begun[2:6] == ["0", "euler", "50", "1.5"]
        assert not any(begun[8:])  # blank, and not 0: in a browser a field for numbers would show that
        assert "0" not in begun[8:]
        for change, told in (({"seed": "abc"}, "invalid int value: 'abc'"), ({"steps": "0"}, "--steps 0: must be")):
            with pytest.raises(Exception, match=told):
                client.predict(classes=TEN, **change, **SAME_SIZE, api_name="/draw")
        with pytest.raises(Exception, match="class '&lt;b': "):
            client.predict(classes=["<b"], **SAME_SIZE, api_name="/draw")
    pictures = []
    for number, (picture, facts, line, every) in enumerate((made[:4], made[4:])):
        pictures.append(Path(picture).read_bytes())
        assert facts.startswith("**10 images**, 8 evaluations each, **")
        assert drawn_by(line, tmp_path / str(number), monkeypatch) == pictures[-1]
        with zipfile.ZipFile(every["value"]) as archive:
            assert len(archive.namelist()) == 12
            assert archive.read("grid.png") == pictures[-1]
            assert archive.read("again.sh").decode() == f"{line}\n"
            with Image.open(archive.open("000003.png")) as image:
                assert np.array_equal(cells(pictures[-1], 10)[3], np.array(image))
    assert pictures[0] != pictures[1]
    assert [each["label"] for each in states] == 2 * ["The state, t = 0.50", "The data expected there, t = 0.50"]


def test_a_port_that_is_taken_is_told_in_one_line(models, fails, monkeypatch):
    with page_of(models["atconv"], monkeypatch=monkeypatch) as url:
        port = urlsplit(url).port
        assert f"--port {port}: the app cannot listen there" in fails(main, "app", models["atconv"], "--port", port)


@pytest.mark.slow
def test_the_page_in_a_browser_draws_and_asks_no_other_server(models, tmp_path, monkeypatch):
    if browser.program() is None:
        pytest.skip(f"none of {', '.join(browser.PROGRAMS)} is installed")
    images = "[...document.querySelectorAll('.picture img')].map(image => image.src)"
    with page_of(models["one step"], monkeypatch=monkeypatch) as url, browser.browsing(tmp_path / "browser") as page:
        page.open(url, width=390)
        page.until("[...document.querySelectorAll('button')].some(button => button.textContent.trim() == 'Draw')")
        assert not page.run("document.body.innerText.includes('Download all images')")  # there are none yet
        page.click("Draw")
        first = page.until(f"{images}.length == 3 && {images}")
        page.until("document.body.innerText.includes('Download all images')")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        page.click("New seed")  # of a one-step model: drawn at once
        page.until(f"!{images}.includes({first[0]!r}) && {images}.length == 3")
        assert "sit-atconv sample" in page.run("document.querySelector('.cm-content').textContent")
        assert {urlsplit(each).hostname for each in page.requested if each.startswith("http")} == {"127.0.0.1"}
