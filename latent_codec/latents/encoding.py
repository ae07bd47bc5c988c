"""Encode a source of images into a data set of latents, once: `encode_data_set`."""

import os
from importlib import import_module
from typing import Any

from latent_codec.codec import LatentCodec
from latent_codec.errors import SettingError
from latent_codec.images.sources import ImageSource
from latent_codec.latents.engines.accounting import Accounting, Progress
from latent_codec.latents.plan import EncodingOptions, plan_shards
from latent_codec.latents.shards import DataSetFolder, Job

ENGINES = ("local", "accelerate", "ray")
"""Modules of `latent_codec.latents.engines`."""


def encode_data_set(
    codec: LatentCodec,
    source: ImageSource,
    folder: str | os.PathLike,
    options: EncodingOptions | None = None,
    *,
    engine: str = "local",
    batch_size: int = 32,
    on_progress: Progress | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], Accounting]:
    """Encode a source's images into shards below `folder`, which others read, with an index.

    Every shard is complete or absent, and complete ones are kept: a run that was killed goes on where it was, and
    several runs of the same work do no harm to each other. Images that cannot be read are reported on the log, left out,
    and looked at again by the next run.

    Args:
        source: what `open_source` gives; images of more than 8 bits are encoded with all of them.
        folder: a path, or a URL that fsspec opens.
        options: None: latent files of the images in their own sizes.
        engine: who does the work, one of `ENGINES`.
        batch_size: samples of one size that are encoded together, at most; fewer where they are large.
        on_progress: called with the counts so far.
        settings: of the engine, such as `num_workers` of local.

    Returns:
        The index, and the counts of this run.

    Raises:
        LabelError: for a label that cannot be read, or is neither an integer nor a dict.
        ValueError: if no image can be read, for options that do not suit the codec, or if `folder` holds another encoding,
            which is never overwritten.
        OSError: if a shard cannot be written.
    """
    options = options or EncodingOptions()
    if engine not in ENGINES:
        raise SettingError("engine", f"one of {', '.join(ENGINES)}", engine)
    if batch_size < 1:
        raise SettingError("batch_size", "at least 1", batch_size)
    if options.kind == "indices" and not codec.is_discrete:
        raise ValueError(f"{codec.name} has no codebook, and so no indices; encode latents")
    if options.posterior != "mean" and not codec.family.has_posterior:
        name = type(codec.autoencoder).__name__
        raise SettingError("posterior", f"mean, as {name} has no posterior", options.posterior)
    job = Job(codec, source, options, DataSetFolder(folder), plan_shards(source, options, codec), batch_size)
    work = import_module(f"latent_codec.latents.engines.{engine}")
    accounting = work.run(job, on_progress, **settings)
    return job.finish(), accounting
