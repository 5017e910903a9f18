"""The page itself: the form, and beside it what the models drew. In gradio, which the rest of the app does without."""

import inspect
import io
import random
import re
import shutil
import tempfile
import uuid
import zipfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from sit_atconv.app.form import Control, Drawn, shared
from sit_atconv.app.studio import Studio
from sit_atconv.runtime.errors import InputError, of_the_user
from sit_atconv.runtime.files import png, write_atomic

KEPT = 128  # files of drawings that stay on the disk, for those who look at them
SEEDS = 2**32  # of which the button takes one
PLAIN = {"language": None, "show_line_numbers": False, "buttons": ["copy"]}  # colours of a shell are pale on white
STYLE = Path(__file__).with_name("style.css")


class Files:
    """The files of the last drawings, in a folder that goes with this object."""

    def __init__(self):
        self.folder, self.made = Path(tempfile.mkdtemp(prefix="sit-atconv-")), deque()

    def put(self, name: str, content: bytes) -> str:
        """Write a file of that name in a folder of its own; its path."""
        folder = self.folder / uuid.uuid4().hex
        folder.mkdir()
        write_atomic(folder / name, content)
        self.made.append(folder)
        while len(self.made) > KEPT:
            shutil.rmtree(self.made.popleft(), ignore_errors=True)
        return str(folder / name)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def theme() -> gr.themes.Base:
    """Fonts of the reader's own machine: none is fetched."""
    plain, mono = ("ui-sans-serif", "system-ui", "sans-serif"), ("ui-monospace", "Consolas", "monospace")
    grey = {"body_text_color_subdued": "*neutral_500", "block_info_text_color_dark": "*neutral_300"}  # to be read
    return gr.themes.Default(primary_hue="blue", font=plain, font_mono=mono).set(**grey)


def build(studio: Studio, files: Files) -> gr.Blocks:
    """The page. Other programs send its requests by name: /draw takes the fields of the form in their order, /way a
    time between 0 and 1."""
    sides, controls = studio.sides, shared(studio.sides)
    common, rare = [[each for each in controls if each.rare == kind] for kind in (False, True)]
    names, both = [control.name for control in (*common, *rare)], len(studio.sides) > 1
    has_way, live = all(side.has_way for side in sides), all(side.live for side in sides)

    def draw(*values, progress=gr.Progress()):  # noqa: B008 (gradio finds it by the default)
        with errors_shown():
            made = studio.draw(dict(zip(names, values, strict=True)), lambda share, text: progress(share, desc=text))
        return [
            made,
            *(part for side, each in zip(sides, made, strict=True) for part in shown(side.language, each, files)),
        ]

    def way(made: list[Drawn] | None, moment: float):
        if made is None:
            return [gr.skip()] * 2 * len(sides)
        with errors_shown():
            stops = studio.at(made, moment)
        return [
            gr.Image(files.put(f"{name}.png", png), label=f"{label}, t = {stop.time:.2f}")
            for stop in stops
            for name, label, png in (("states", STATES, stop.states), ("expected", EXPECTED, stop.expected))
        ]

    # A request from a program names the fields.
    form = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    told = inspect.Parameter("progress", inspect.Parameter.KEYWORD_ONLY, default=gr.Progress())
    draw.__signature__ = inspect.Signature([*form, told])

    with gr.Blocks(title="sit-atconv", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        drawn = gr.State(None)
        who = "Two models draw from the same noise." if both else "A model draws from noise."
        when = "They draw" if both else "It draws"
        gr.Markdown(
            f"# sit-atconv\n{who} "
            + (f"{when} at every change of the form." if live else "Fill in the form, then press **Draw**.")
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                fields = form_of(common)
                go = gr.Button("Draw", variant="primary")
                with gr.Row():
                    another, stop = gr.Button("New seed", min_width=100), gr.Button("Stop", min_width=100)
                if rare:
                    with gr.Accordion("More settings", open=False):
                        fields += form_of(rare)
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    places = [place_of(side.title, side.about) for side in sides]
                outputs, later = [part for parts, _ in places for part in parts], [each for _, each in places]
                if has_way:
                    with gr.Accordion("The way from noise to data", visible=False) as road:
                        moment = gr.Slider(0, 1, 0.5, step=0.025, label="t: 0 is noise, 1 is data")
                        with gr.Row():
                            stops = [part for side in sides for part in stops_of(side.title if both else "")]
                    later.append(road)

        request = {"fn": draw, "inputs": fields, "outputs": [drawn, *outputs], "concurrency_id": "draw"}
        request["show_progress_on"] = outputs[:: len(outputs) // len(sides)]  # the pictures
        events = [go.click(**request, concurrency_limit=1, scroll_to_output=True, api_name="draw")]
        changed = another.click(lambda: str(random.randrange(SEEDS)), None, fields[names.index("seed")], api_name=False)
        if live:
            changes = [field.change for field in fields]
            events.append(gr.on(changes, **request, trigger_mode="always_last", api_name=False))
        else:
            events.append(changed.then(**request, api_name=False))
        stop.click(studio.stop, None, None, queue=False, api_name=False)
        for event in events:
            event.success(lambda: {each: gr.update(visible=True) for each in later}, None, later, api_name=False)
        if has_way:
            seen = {"fn": way, "inputs": [drawn, moment], "outputs": stops, "show_progress": "hidden"}
            moment.input(**seen, trigger_mode="always_last", api_name="way")
            for event in events:
                event.success(**seen, api_name=False)
    return page


STATES, EXPECTED = "The state", "The data expected there"


@contextmanager
def errors_shown() -> Iterator[None]:
    """Within it, an error that a user can mend is shown on the page, in its one line, and is no fault of the server."""
    try:
        yield
    except (InputError, MemoryError, OSError, RuntimeError) as error:
        told = of_the_user(error)
        if told is None:
            raise
        text = re.sub("<(?=[a-zA-Z/!?])", "&lt;", str(told))  # gradio takes it for HTML
        raise gr.Error(text, duration=30, print_exception=False) from None


def form_of(controls: Sequence[Control]) -> list[gr.components.Component]:
    """A field for each control; numbers stand two in a row."""
    fields: list[gr.components.Component] = []
    waiting = list(controls)
    while waiting:
        pair = 2 if len(waiting) > 1 and all(control.kind == "number" for control in waiting[:2]) else 1
        with gr.Row():
            fields += [field_of(control) for control in waiting[:pair]]
        waiting = waiting[pair:]
    return fields


def field_of(control: Control) -> gr.components.Component:
    """The field of a control, with its value in it."""
    value = f"{control.value:g}" if isinstance(control.value, int | float) else control.value
    said: dict[str, Any] = {"value": value, "label": control.label, "info": control.about}
    match control.kind:
        case "choice":
            return gr.Dropdown(control.choices, **said, allow_custom_value=True)  # which is refused with what is near
        case "choices":
            return gr.Dropdown(control.choices, **said, multiselect=True, allow_custom_value=True)
    return gr.Textbox(**said, max_lines=1, min_width=100)  # gradio's field for numbers shows 0 where it is blank


def place_of(title: str, about: str) -> tuple[list[gr.components.Component], gr.Column]:
    """Where what a model draws is shown, see `shown`; and the part of it that is hidden until there is something."""
    with gr.Column(min_width=300):
        gr.Markdown(f"### {title}\n{about}")
        picture = picture_of("Images")
        with gr.Column(visible=False) as later:
            facts = gr.Markdown("")
            repeat = gr.Code(label="Draws the same again", interactive=False, lines=1, wrap_lines=True, **PLAIN)
            every = gr.DownloadButton("Download all images", interactive=False)
    return [picture, facts, repeat, every], later


def picture_of(label: str) -> gr.Image:
    """The place of a picture."""
    return gr.Image(
        label=label, type="filepath", format="png", interactive=False, elem_classes="picture",
        buttons=["fullscreen", "download"],
    )  # fmt: skip


def stops_of(title: str) -> list[gr.components.Component]:
    """Where a stop on the way of a model is shown: its states, and the data expected there."""
    with gr.Column(min_width=300):
        if title:
            gr.Markdown(f"**{title}**")
        return [picture_of(label) for label in (STATES, EXPECTED)]


def shown(language: str, drawn: Drawn, files: Files) -> list[Any]:
    """What is put in the places of a model."""
    count, evaluations = len(drawn.images), drawn.evaluations
    facts = (
        f"**{count:,} image{'s' * (count != 1)}**, {evaluations:g} evaluation{'s' * (evaluations != 1)} each, "
        f"**{1000 * drawn.seconds / count:.0f} ms** per image, {drawn.seconds:.2f} s in all"
    )
    picture = files.put("grid.png", drawn.png)
    every = files.put("images.zip", zipped(drawn, "again.py" if language == "python" else "again.sh"))
    return [picture, facts, drawn.repeat, gr.DownloadButton(value=every, interactive=True)]


def zipped(drawn: Drawn, repeat: str) -> bytes:
    """A ZIP of all images, each as a PNG, of the picture of all, and of what draws them again."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("grid.png", drawn.png)
        archive.writestr(repeat, drawn.repeat + "\n")
        for index, image in enumerate(drawn.images):
            archive.writestr(f"{index:06}.png", png(image))
    return content.getvalue()
