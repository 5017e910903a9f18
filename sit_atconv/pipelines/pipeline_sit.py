"""Class-conditional images from a SiT as a diffusers pipeline."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from os import PathLike

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor

from sit_atconv.flow.guidance import Evaluations, GuidedVelocity, Reuse
from sit_atconv.flow.path import LinearPath
from sit_atconv.models.sit import SiTTransformer2DModel  # model_index.json names this module: it must be loaded
from sit_atconv.pipelines.from_run import FromRun
from sit_atconv.pipelines.lora import TakesLora
from sit_atconv.pipelines.schedulers import check_scheduler, set_steps
from sit_atconv.runtime.classes import Classes
from sit_atconv.runtime.compat.diffusers import execution_device, reset_cache
from sit_atconv.runtime.errors import InputError, check_choice, named, option
from sit_atconv.runtime.limits import EVALUATIONS
from sit_atconv.runtime.pictures import check_latents, decoded, to_pil, to_uint8
from sit_atconv.sampling import caches
from sit_atconv.sampling.settings import Sampling, check_guide, check_velocities

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def _flatten(labels) -> list[int | str]:
    if isinstance(labels, str):
        return [labels]
    if isinstance(labels, Integral):
        return [int(labels)]
    if isinstance(labels, torch.Tensor | np.ndarray):
        return _flatten(labels.tolist())
    if isinstance(labels, Sequence):
        return [label for part in labels for label in _flatten(part)]
    raise InputError(f"class_labels holds {labels!r}; give ids (integers) or names")


def _form(given) -> str:
    if not isinstance(given, torch.Tensor):
        return f"a {type(given).__name__}"
    return f"{'floats' if given.is_floating_point() else 'integers'} of shape {tuple(given.shape)}"


def _take_back(name: str, given, handed: torch.Tensor) -> torch.Tensor:
    """What a callback gives for a tensor that it was handed, in its dtype, on its device."""
    if _form(given) != _form(handed):
        raise InputError(
            f"callback_on_step_end gave {_form(given)} for {name}; give a tensor of {_form(handed)}, as it was handed"
        )
    return given.to(handed)


def _check_kind(guide) -> None:
    """Raise InputError for a guide that is no model."""
    if isinstance(guide, str | PathLike):
        raise InputError(f"guide={str(guide)!r} is a place; give the model in it, as SiTPipeline.from_run does")
    if not (guide is None or isinstance(guide, SiTTransformer2DModel) or is_compiled_module(guide)):
        raise InputError(f"guide is a {type(guide).__name__}; give a SiTTransformer2DModel, or None")


class SiTPipeline(FromRun, TakesLora, DiffusionPipeline):
    """Samples a SiT with diffusers' flow-matching schedulers.

    transformer: a SiTTransformer2DModel of the linear path. vae: an AutoencoderKL, or None for a model of pixels in
    [-1, 1]. guide: a weaker SiTTransformer2DModel of the same latents and classes, or None; guidance is then away from
    it (autoguidance), and not from the null class. One that is assigned later goes to the pipeline's device.
    scheduler: a flow-matching one, see `schedulers.check_scheduler`. id2label: names of the classes by id; one with
    commas stands for each of its parts, as ImageNet's do.
    Time: the scheduler's sigma is 1 - t, and what it integrates, noise - data, is minus the velocity.
    Raises ValueError for a transformer, guide or scheduler that does not fit.
    """

    # The guide is in no order: beside the transformer at every step, it stays on the device until the end.
    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae", "guide"]  # noqa: RUF012 (diffusers' own type)
    _callback_tensor_inputs = ["latents", "class_labels"]  # noqa: RUF012
    _current_timestep = None
    _cache, _ratios = None, None
    guide = None  # in a class derived from this one that takes none

    def __init__(
        self,
        transformer: SiTTransformer2DModel,
        vae: AutoencoderKL | None = None,
        guide: SiTTransformer2DModel | None = None,
        *,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
    ):
        super().__init__()
        if transformer.config.path != "linear":
            raise InputError(
                f"path={transformer.config.path!r}: flow-matching schedulers follow the linear path; sample this "
                "transformer with `sit-atconv sample`"
            )
        check_scheduler(scheduler, transformer.config.use_meanflow)
        _check_kind(guide)
        modules = {"transformer": transformer, "vae": vae, "guide": guide, "scheduler": scheduler}
        taken = inspect.signature(type(self)).parameters
        self.register_modules(**{name: module for name, module in modules.items() if name in taken})
        self.register_to_config(id2label=id2label)
        self._check_vae()
        self._check_guide()
        self._classes = Classes(transformer.config.num_classes, id2label, "the pipeline has no id2label")

    def __setattr__(self, name: str, value) -> None:
        if name == "guide":
            _check_kind(value)
        given = name in self._optional_components and name in vars(self) and value is not None
        if given and self.config[name][0] is None:
            self.register_modules(**{name: value})  # which comes back; the index would say that there is none still
            return
        if given and name == "guide":
            value.to(execution_device(self))
        super().__setattr__(name, value)

    @property
    def labels(self) -> dict[str, int]:
        """{lower-case name: id} of the names that are of one class alone."""
        return self._classes.names

    @property
    def guidance_scale(self) -> float:
        """The guidance scale in use; a callback may set `_guidance_scale`, to 1 or 0 for no guidance from then on."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the null class is evaluated too: where there is guidance, and no guide."""
        return self._guidance_scale != 1 and self.guide is None

    @property
    def num_timesteps(self) -> int:
        """Calls of the scheduler in the last run; a Heun scheduler makes two of nearly every step."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The scheduler's timestep that is being worked on, for diffusers' caches; None outside a run."""
        return self._current_timestep

    @property
    def nfe(self) -> Evaluations:
        """Network evaluations per image in the last run; a guided evaluation counts two, of which one is `of_guide`
        where there is a guide."""
        return self._nfe

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to skip the rest of the run."""
        return self._interrupt

    def get_label_ids(self, labels) -> list[int]:
        """Class ids of a name or an id, or of lists of them, nested ones and integer tensors too.

        Raises ValueError for what is no class, suggesting the nearest.
        """
        ids = self._classes.ids(_flatten(labels))
        if not ids:
            raise InputError("class_labels is empty; give at least one class")
        return ids

    def prepare_latents(
        self,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise (batch, C, H, W) in fp32 on the pipeline's device: drawn, image i from generator i of a list, or given.

        Given latents may have any size that the patch divides. Raises ValueError when the shape or the number of
        generators does not fit.
        """
        transformer = self.transformer
        channels, patch, device = transformer.config.in_channels, transformer.config.patch_size, execution_device(self)
        if isinstance(generator, list | tuple) and len(generator) != batch:
            raise InputError(f"{len(generator)} generators for {batch} images; give one for each, or a single one")
        if latents is None:
            shape = (batch, channels, *transformer.latent_size)
            generator = list(generator) if isinstance(generator, tuple) else generator
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if (
            latents.ndim != 4
            or latents.shape[:2] != (batch, channels)
            or any(n % patch or n < 1 for n in latents.shape[2:])
        ):
            raise InputError(
                f"latents of shape {tuple(latents.shape)}: give ({batch}, {channels}, H, W) with H and W multiples of "
                f"{patch}"
            )
        return latents.to(device, torch.float32)

    def enable_cache(self, cache: str, ratios: Mapping | None = None) -> None:
        """Leave blocks of the transformer, and of the guide, out where they change little, from the next call on.

        cache: "first_block:THRESHOLD", "taylorseer:INTERVAL:ORDER" or "mag:THRESHOLD", as `sit-atconv sample` takes it.
        ratios: for mag, what is in the file that `sit-atconv calibrate` wrote beside the weights of the transformer.
        Raises InputError for a cache that is none, and for ratios that are missing, damaged or idle. A call raises it
        where the cache cannot work in its steps.
        """
        asked = caches.parse(cache)
        if (asked.kind == caches.MAG) != (ratios is not None):
            needs = "takes no ratios" if ratios is not None else "needs the ratios that `sit-atconv calibrate` writes"
            raise InputError(f"cache={cache!r}: {asked.kind} {needs}")
        if ratios is not None:
            caches.check_ratios(ratios)
        self._cache, self._ratios = asked, ratios

    def disable_cache(self) -> None:
        """Switch the cache off again."""
        self._cache, self._ratios = None, None
        for model in filter(None, (self.transformer, self.guide)):
            caches.disable(model)

    def check_cache(self, times: Sequence[float], reused: Sequence = ()) -> None:
        """Raise InputError where the cache cannot work in evaluations at these times.

        reused: of classifier-free guidance, see `Sampling.reused`.
        """
        caches.check(self._cache, times, *reused)
        if self._ratios is not None and self.guide is not None:
            raise InputError(
                f"{option('cache', str(self._cache))}: its ratios are not the guide's; take another cache, or no guide"
            )

    def _begin_cache(self, times: Sequence[float], reused: Sequence) -> None:
        """Have the caches begin anew, for evaluations at these times."""
        models = [model for model in (self.transformer, self.guide) if model is not None]
        if self._cache is not None:
            self.check_cache(times, reused)
            for model in models:
                caches.enable(model, self._cache, self._ratios and caches.ratios_at(self._ratios, times))
        for model in models:
            reset_cache(model)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_channels: str = "all",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_images_per_prompt: int = 1,
        sigmas: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["SiTPipeline", int, torch.Tensor, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        guidance_every: int = 1,
        guidance_batches: int = 1,
    ) -> ImagePipelineOutput | tuple:
        """Images of the classes asked for: num_images_per_prompt of each, those of one class together.

        class_labels: ids or names, one or more. num_inference_steps: steps of the scheduler, by default 50, and 1 of a
            MeanFlow transformer; with FlowMatchEulerDiscreteScheduler they are uniform down to 0 unless `sigmas` says
            otherwise.
        guidance_scale: 1 is none; by default 1.5, and 1 of a MeanFlow transformer. Guidance is away from the
            pipeline's guide, without one from the null class. guidance_channels: "all" or "first3" as the public SiT
            code. guidance_interval: guidance acts for t in it, t = 0 noise, t = 1 data. guidance_every: of the
            evaluations there it is evaluated at every so many, and reused between, see `flow.guidance.Reuse`.
            guidance_batches: 1 is class and no class in one batch, 2 one after the other, with half of the memory.
            At scale 1 these four do nothing, and are not refused, since a callback may set another scale.
        sigmas: noise levels of the steps, from 1 down, for schedulers that take them; the final 0 is added. They may
            begin lower for `latents` of that level.
        generator: for the noise, one per image or one for all. latents: that noise itself, (images, C, H, W).
        output_type: "pil" (rounded by images.UINT8_RULE), "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], "latent".
        callback_on_step_end: called (pipeline, step, timestep, tensors), where tensors holds those of
            `callback_on_step_end_tensor_inputs` ("latents", "class_labels"); what it returns takes their place.
            diffusers' callback objects say by their `tensor_inputs` which. class_labels (images,) are the ids, without
            those of the null class.
        Returns ImagePipelineOutput, or a tuple with the images; state and velocity are fp32, the transformer runs in
        its own dtype.
        Warns of a scheduler that is right for distilled models alone.
        Raises ValueError for bad labels, shapes, choices, schedulers, for guidance without null class and guide, for
        settings of guidance beside a default scale of 1, for an interval of guidance that no step lies in, and for a
        guide that does not fit.
        """
        if caution := check_scheduler(self.scheduler, self.transformer.config.use_meanflow):
            warnings.warn(caution, stacklevel=3)  # of the caller: torch.no_grad is between
        self._check_vae()
        self._check_guide()
        check_choice("output_type", output_type, OUTPUT_TYPES)
        fitting = Sampling(guidance_scale=guidance_scale, guide=self._guide_at(guidance_scale)).for_model(
            self.transformer
        )
        num_inference_steps = fitting.steps if num_inference_steps is None else num_inference_steps
        # Apart from the scale: at 1 they do nothing, until a callback sets another one.
        guided_by = Sampling(
            guidance_channels=guidance_channels,
            guidance_interval=guidance_interval,
            guidance_every=guidance_every,
            guidance_batches=guidance_batches,
            guide=self.guide,
        )
        if guidance_scale is None:
            guided_by.fitted(self.transformer.config.use_meanflow)
        guidance_scale = fitting.guidance_scale
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        handed_over = callback_on_step_end_tensor_inputs or ()
        for name in handed_over:
            check_choice("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)
        if num_images_per_prompt < 1:
            raise InputError(f"num_images_per_prompt={num_images_per_prompt}: must be at least 1")
        channels = self.transformer.config.in_channels
        if output_type == "pil" and self.vae is None and channels not in (1, 3):
            raise InputError(f"latents of {channels} channels are no picture without a vae; use output_type='pt'")

        self._guidance_scale, self._interrupt, self._nfe = guidance_scale, False, Evaluations()
        ids = [label for label in self.get_label_ids(class_labels) for _ in range(num_images_per_prompt)]
        given, latents = latents, self.prepare_latents(len(ids), generator, latents)
        class_labels, reuse = torch.tensor(ids, device=latents.device), Reuse(guidance_every)
        timesteps, times = self._schedule(num_inference_steps, sigmas, given is not None)
        if guidance_scale != 1:
            guided_by.check_acts(times.clamp(*guided_by.interval(self.transformer)))
        # An average velocity is asked for up to the next time.
        ends = [*times[1:], times.new_ones(())] if self.transformer.config.use_meanflow else len(times) * [None]
        self._begin_cache(times.tolist(), guided_by.reused if guidance_scale != 1 else ())
        self._num_timesteps = len(timesteps)
        # A list of generators is for schedulers that draw, too.
        draws = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}

        with self.progress_bar(total=len(timesteps)) as bar:
            for step, (timestep, t, s) in enumerate(zip(timesteps, times, ends, strict=True)):
                if self.interrupt:
                    continue
                self._current_timestep = timestep
                guided = self._guided(class_labels, guided_by, reuse)
                # Where the predictions of those that act give a velocity; a callback may have changed the scale.
                acting = Sampling(guidance_scale=self._guidance_scale, guide=self._guide_at(self._guidance_scale))
                acting = acting.for_model(self.transformer)
                velocity = guided(latents, t.clamp(*acting.interval(self.transformer)), s)
                self._nfe += guided.nfe
                latents = self.scheduler.step(-velocity, timestep, latents, return_dict=False, **draws)[0]
                if callback_on_step_end is not None:
                    handed = {"latents": latents, "class_labels": class_labels}
                    chosen = {name: handed[name] for name in handed_over}
                    returned = callback_on_step_end(self, step, timestep, chosen) or {}
                    taken = handed | returned
                    if "class_labels" in returned:  # what guidance added was of others
                        reuse = Reuse(guidance_every)
                    latents, class_labels = (_take_back(name, taken[name], old) for name, old in handed.items())
                    if "class_labels" in chosen.keys() | returned.keys():  # reading them, the host waits for a device
                        self._check_label_ids(class_labels)
                    if self._guidance_scale == 0 != guidance_scale:  # by which diffusers' callbacks end the guidance
                        self._guidance_scale = 1.0
                bar.update()

        self._current_timestep = None
        check_latents(latents, self.transformer.dtype, sampler=type(self.scheduler).__name__)
        images = latents if output_type == "latent" else self._to_images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_vae(self) -> None:
        """Raise InputError for an autoencoder whose latents are not those of the transformer."""
        if self.vae is None:
            return
        config, channels = self.vae.config, self.transformer.config.in_channels
        if config.latent_channels != channels:
            raise InputError(
                f"the vae has {config.latent_channels} latent channels, the transformer {channels}; they were not made "
                "for each other"
            )
        if getattr(config, "latents_mean", None) is not None:
            raise InputError("the vae normalises each channel (latents_mean); only scale and shift are known")

    def _check_guide(self) -> None:
        """Raise InputError for a guide of other latents or classes than the transformer's, or for that one."""
        if self.guide is not None:
            with named("guide"):
                check_guide(self.guide, self.transformer)
                check_velocities(self.guide, self.transformer)

    def _guide_at(self, scale: float) -> SiTTransformer2DModel | None:
        """The guide, where that guidance scale guides."""
        return None if scale == 1 else self.guide

    def _guided(self, labels: torch.Tensor, guided_by: Sampling, reuse: Reuse) -> GuidedVelocity:
        """The velocity of a step, by the guidance scale in use."""
        transformer, guide, scale = self.transformer, self._guide_at(self._guidance_scale), self._guidance_scale
        by = {"path": LinearPath(), "prediction": transformer.config.prediction, "reuse": reuse}
        by["batches"] = guided_by.guidance_batches
        if guide is not None:
            by |= {"guide": self._network_of(guide), "guide_prediction": guide.config.prediction}
        scales = scale, *guided_by.guidance[1:]
        return GuidedVelocity(self._network_of(transformer), labels, transformer.null_label, *scales, **by)

    def _check_label_ids(self, ids: torch.Tensor) -> None:
        """Raise InputError for an id that a callback gave and the transformer has no row for."""
        null = self.transformer.null_label
        last = self.transformer.config.num_classes - 1 if null is None else null
        if outside := [label for label in ids.tolist() if not 0 <= label <= last]:
            raise InputError(f"callback_on_step_end gave class id {outside[0]}; this model has ids 0 to {last}")

    def _network_of(self, model: SiTTransformer2DModel) -> Callable[..., torch.Tensor]:
        def network(
            x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, r: torch.Tensor | None = None
        ) -> torch.Tensor:
            average = {} if r is None else {"timestep_r": r}
            # Caches keep states of one shape each: batches with and without guidance are contexts of their own.
            with model.cache_context(f"batch of {len(x)}"):
                return model(x.to(model.dtype), t, labels, return_dict=False, **average)[0].float()

        return network

    def _schedule(self, steps: int, sigmas: Sequence[float] | None, given: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The scheduler's timesteps, and t = 1 - sigma of each on the CPU. given: the latents were given."""
        EVALUATIONS.check("num_inference_steps=", steps)
        if sigmas is not None and not (
            len(sigmas) and sigmas[0] <= 1 and sigmas[-1] > 0 and all(a > b for a, b in pairwise(sigmas))
        ):
            raise InputError(f"sigmas={sigmas}: give falling noise levels, from 1 at the most and above 0; 0 is added")
        levels = set_steps(self.scheduler, steps, sigmas, execution_device(self), given and sigmas is not None)
        self.scheduler.set_begin_index(0)
        return self.scheduler.timesteps, 1 - levels

    def _to_images(self, latents: torch.Tensor, output_type: str):
        """latents (B, C, h, w) -> images of that type."""
        images = latents
        if self.vae is not None:
            config = self.vae.config
            unscaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
            images = decoded(unscaled.to(self.vae.dtype), lambda scaled: self.vae.decode(scaled, return_dict=False)[0])
        if output_type == "pil":
            return [to_pil(image) for image in to_uint8(images)]
        images = (images / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()
