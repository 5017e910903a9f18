"""`SiTPipeline.from_run`, apart from the pipeline: an exported pipeline has another text in its place."""

from pathlib import Path
from typing import Self


class FromRun:
    """A pipeline that can be made of a run."""

    @classmethod
    def from_run(cls, run: str | Path, vae: str | None = None, guide: str | Path | None = None) -> Self:
        """The pipeline of a run's newest checkpoint, or of a checkpoint, a model folder or a pipeline's folder.

        Its transformer has the averaged weights (EMA), `id2label` the names of the run's classes. vae: folder or hub id
        of the autoencoder, where it is not the one that the run names, or lies elsewhere today. guide: of
        autoguidance, another such folder; of a pipeline's, in the place of its own.
        Raises InputError for a folder that is none of these, is damaged, or needs another autoencoder, and for a guide
        that does not fit.
        """
        from sit_atconv.pipelines.opening import open_as

        return open_as(cls, run, vae, guide=guide).pipeline
