"""Where the first weights of a run come from: `train.init`.

The model is made by the recipe, its data and its codec, as always, with the weights that `run.seed` draws; then it gets
those of the source that fit, see `models.fitting`. What does not fit stays as it was drawn, and has to be named by
`train.init_anew`, as has whatever else is to be drawn anew. A run that goes on does not need its source any more.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sit_atconv.config import Recipe
from sit_atconv.data.held_out import tell_of_share
from sit_atconv.flow.path import PATHS
from sit_atconv.latents.codecs import differing
from sit_atconv.models.fitting import (
    MIXER_OPTIONS,
    check_names,
    differences,
    has_positions,
    is_named,
    part_of,
    take_weights,
)
from sit_atconv.models.lora import bare_state
from sit_atconv.models.sit import SiTTransformer2DModel, mixer_names, options_of
from sit_atconv.runtime import files, processes
from sit_atconv.runtime.console import say
from sit_atconv.runtime.errors import InputError, named
from sit_atconv.runtime.processes import is_main
from sit_atconv.runtime.reading import as_stored, spelt
from sit_atconv.runtime.weights import digest_of
from sit_atconv.training.checkpoint import Trained, load_any, read_manifest, step_folders
from sit_atconv.training.resolved import FROM_DATA, FROM_FLOW

TOLD = ("codec", "vae", "scale", "shift")  # of a codec
MOST_NAMED = 6  # parts that a plan and a model card name


class Origin:
    """The source of a run's first weights.

    stated: as the recipe says it. record: what a manifest says of it, without the parts that are drawn anew. source:
    the model itself; None where the run has begun already, and is told by its manifest. options: of the source's model.
    """

    def __init__(self, stated: str, record: dict[str, Any], source: Trained | None = None):
        self.stated, self.record, self.source = stated, record, source
        self.options = {**options_of(None), **record["from"]["model"]}

    def completed(self, recipe: Recipe) -> Recipe:
        """The recipe with the source's options in the place of its model's nulls, where it names no preset.

        Data, codec and the section flow decide about the others, and options of a mixer that the model has not are left
        out. Raises InputError for a token_mixer that does not fit the depth.
        """
        if recipe.model.name is not None:
            return recipe
        stated = recipe.model.options()
        own = {**self.options, **stated}
        mixers = mixer_names(own["token_mixer"], own["depth"])
        idle = {name for mixer, names in MIXER_OPTIONS.items() if mixer not in mixers for name in names}
        idle -= {"num_heads"}  # which ATConv has no use for, and every model has
        taken, positions = dict(self.options), has_positions(self.options)
        if has_positions({**own, "pos_embed": self.options["pos_embed"]}) != positions:
            taken["pos_embed"] = positions  # which was left to the mixers there
        decided = {*FROM_DATA, *FROM_FLOW, *idle, *stated}
        filled = {name: taken[name] for name in options_of(None).keys() - decided}
        return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **filled))

    def check(self, recipe: Recipe, model: SiTTransformer2DModel) -> None:
        """Record what is drawn anew. Raises InputError where the source is of another architecture, something does not
        fit that `train.init_anew` does not name, or that names what is not there."""
        anew = recipe.train.init_anew
        check_names("train.init_anew", anew, model)
        if self.source is not None:
            self._check_fits(recipe, model)
        drawn = (part_of(name) for name in model.state_dict() if is_named(name, anew))
        self.record = {**self.record, "anew": list(dict.fromkeys(drawn))}

    def _check_fits(self, recipe: Recipe, model: SiTTransformer2DModel) -> None:
        anew, where = recipe.train.init_anew, f"train.init={self.stated!r}"
        found = differences(self.source.model, model)
        if wrong := [each for each in found if not each.part]:
            options = dict(each.option for each in wrong)
            others = {"lora.rank": recipe.lora.rank, "repa.encoder": recipe.repa.encoder}
            if "use_meanflow" in options and (key := next((key for key in others if others[key] is not None), None)):
                raise InputError(
                    f"{where} predicts average velocities (MeanFlow), and {key}={others[key]} goes with a flow alone; "
                    "begin with a flow"
                )
            stated = " ".join(_as_key(*option) for option in options.items())
            raise InputError(
                f"{where} is of another architecture: {', '.join(each.said for each in wrong)}; state {stated}, or "
                "begin with another"
            )
        if lost := [each for each in found if not is_named(each.part, anew)]:
            names = [*anew, *(each.part for each in lost)]
            options = dict(each.option for each in lost if each.option is not None)
            instead = "".join(f" {_as_key(*option)}" for option in options.items())
            raise InputError(
                f"{where}: what does not fit has to be drawn anew: "
                f"{', '.join(f'{each.part} ({each.said})' for each in lost)}; state "
                f"train.init_anew=[{','.join(names)}]{f', or{instead} as there' if instead else ''}"
            )

    def tell_of_data(self, recipe: Recipe, names: Sequence[str]) -> None:
        """Say where labels of the source, whose embeddings are kept, are those of other classes here, and where it was
        trained with another share held out. names: of the classes. A run that goes on has said so."""
        if self.source is not None:
            tell_of_share(f"train.init={self.stated!r}", self.source.manifest, recipe.data.held_out)
        theirs = {} if self.source is None or is_named("y_embedder", recipe.train.init_anew) else self.source.id2label
        other = next((label for label, name in enumerate(names) if (theirs or {}).get(label, name) != name), None)
        if other is not None and len(theirs) == len(names) and is_main():
            say(
                f"warning: train.init={self.stated!r}: class {other} is {theirs[other]!r} there, {names[other]!r} here "
                "and begins with its embedding; train.init_anew=[y_embedder] draws all of them anew"
            )

    def row(self) -> str:
        """What a plan says of it."""
        which, step = self.record["from"]["which"], self.record["from"]["step"]
        of = ", ".join(filter(None, (which, None if step is None else f"step {step:,}")))
        return f"{self.stated}{f' ({of})' if of else ''}; {told_of_anew(self.record['anew'])}"

    def give(self, recipe: Recipe, model: SiTTransformer2DModel, codec: Mapping[str, Any]) -> None:
        """Put the source's weights into the model, all but what is drawn anew, and say where its codec was another.

        codec: as the run's own describes itself. The source is let go of. Raises InputError where a run that has begun
        already needs its source, and that is gone, has changed, or does not fit.
        """
        if self.source is None:
            record, self.source = read(self.record["from"]["source"])
            if record["sha256"] != self.record["sha256"]:
                raise InputError(
                    f"train.init={self.stated!r}: its weights are others than those that run.out={recipe.run.out!r} "
                    "began with; choose another run.out"
                )
            self._check_fits(recipe, model)
        source, self.source = self.source.model, None
        take_weights(source.state_dict(), bare_state(model), recipe.train.init_anew)
        if is_main():
            self._tell_of_codec(codec)
            if model.pos_embed is not None and model.pos_embed.shape != source.pos_embed.shape:
                there, here = (each.pos_embed.shape[1] for each in (source, model))
                say(f"train.init: its position embedding is of {there} tokens, and is computed anew for {here}")

    def _tell_of_codec(self, codec: Mapping[str, Any]) -> None:
        then = self.record["from"]["codec"]
        if differing(then, codec):
            there, here = (json.dumps({key: each[key] for key in TOLD if key in each}) for each in (then, codec))
            say(f"warning: train.init was trained on other latents: {there} there, {here} here")


def told_of_anew(anew: list[str]) -> str:
    """Which parts were drawn anew, in words."""
    if not anew:
        return "all of it fits"
    return f"drawn anew: {', '.join(anew[:MOST_NAMED])}{', ...' if len(anew) > MOST_NAMED else ''}"


def _as_key(option: str, value: Any) -> str:
    """An option of the model as a recipe states it."""
    if option == "use_meanflow":
        return "meanflow.share=0.25"
    section = "flow" if option in FROM_FLOW else "model"
    return f"{section}.{option}={value if isinstance(value, str) else json.dumps(value)}"


def opened(recipe: Recipe) -> Origin | None:
    """The source that `train.init` names; None without one. Of a run that has begun from it, what its manifest says.

    Collective. Raises InputError for a source that is not there, is no SiT, or is another one in another process.
    """
    stated = recipe.train.init
    if stated is None:
        return None
    origin = processes.together(lambda: _recorded(recipe) or Origin(stated, *read(stated)))
    if len(set(processes.gathered(origin.record["sha256"]))) > 1:
        raise InputError(f"train.init={stated!r}: the processes read different weights; name a checkpoint that stays")
    return origin


def _recorded(recipe: Recipe) -> Origin | None:
    """By the newest checkpoint of the recipe's run, where that began with the same words."""
    for folder in reversed(step_folders(files.resolved(recipe.run.out, "run.out"))):
        try:
            manifest = read_manifest(folder, under="model/config.json")
        except InputError:  # which is told where the run is taken
            continue
        record, stored = manifest.get("init"), manifest.get("recipe") or {}
        if record and stored.get("train", {}).get("init") == recipe.train.init:
            return Origin(recipe.train.init, record)
    return None


def read(stated: str) -> tuple[dict[str, Any], Trained]:
    """What a manifest says of a source, without what is drawn anew, and the source.

    Raises InputError for what is no checkpoint of a SiT, or of one that is no flow.
    """
    with named(f"train.init={stated!r}"), torch.device("cpu"):
        source = load_any(stated)
    if source.model.config.path not in PATHS:
        raise InputError(
            f"train.init={stated!r} is a DiT, which predicts noise at times 0 to 999; begin with a SiT, or train anew"
        )
    step = source.manifest["step"]
    place = {
        "source": spelt(str(source.folder if step is None else source.folder / source.which)),
        "which": source.which,
        "step": step,
        "codec": source.manifest["codec"],
        "model": as_stored({name: source.model.config[name] for name in options_of(None)}),
    }
    return {"sha256": digest_of(source.model.state_dict()), "from": place}, source
