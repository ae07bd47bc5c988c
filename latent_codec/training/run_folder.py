"""The run folder: which run it belongs to, and what a killed process left in it.

RUN/
    .lock            held by the process that trains (run_lock.py)
    config.toml      the resolved configuration
    metrics.jsonl    one line every run.log_every steps
    samples/STEP.png
    checkpoints/STEP/
    codec/, prior/, ...    the averaged weights, with each checkpoint and at the end
    curves.png       at the end
"""

import shutil
import tomllib
from pathlib import Path

from latent_codec.errors import SettingError
from latent_codec.files import replacing
from latent_codec.training.checkpoints import latest_checkpoint
from latent_codec.training.config import TrainingConfig, dump_toml

# May differ between a run and its resumption: they change no step already made. Batches may be cut otherwise as
# long as the number of images in a step stays the same, which the checkpoint knows.
_MAY_CHANGE = {
    "data": {"num_workers", "cache_gigabytes"},
    "optimizer": {"batch_size", "accumulation"},
    "run": {
        "steps",
        "log_every",
        "sample_every",
        "checkpoint_every",
        "keep_checkpoints",
        "calibration_images",
        "codec_dtype",
    },
}
_MAY_BE_DECIDED = {"model": {"pipeline"}}
"""May be named where the run began without: runs of 0.1 did not record it, and tasks know their latent space."""


def configuration_to_resume(out: Path) -> TrainingConfig | None:
    """What the run in `out` was started with; None where there is nothing to go on with.

    Raises:
        ValueError: if config.toml cannot be read.
    """
    path = out / "config.toml"
    if latest_checkpoint(out) is None or not path.is_file():
        return None
    try:
        return TrainingConfig.from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); train in another run folder.") from error


def check_run_folder(out: Path) -> None:
    """Refuse a folder of something else.

    Raises:
        ValueError: naming what it holds.
    """
    if not out.is_dir() or (out / "config.toml").is_file():
        return
    # Codes to train on are there before the run is.
    foreign = sorted(
        each.name for each in out.iterdir() if each.name != "codes" and not each.name.startswith(".")
    )
    if foreign:
        raise SettingError(
            "run_folder", "a run's folder, or a new or empty one", str(out), advice=f"it holds {foreign[0]}"
        )


def open_run(out: Path, config: TrainingConfig) -> Path | None:
    """Claim `out` for a run of `config`; return the checkpoint to resume from, or None.

    Writes config.toml and removes what a killed process left half-written.

    Raises:
        ValueError: if there is a run of another configuration, naming the settings that differ.
    """
    path, before = out / "config.toml", configuration_to_resume(out)
    if before is not None:
        differing = _differences(before, config)
        if differing:
            raise SettingError(
                "run_folder",
                "the folder of a run with this configuration",
                str(out),
                advice=f"it differs in {', '.join(differing)}; give another `run_folder`, or the settings that it was started with",
            )
    for folder in (out, out / "checkpoints", out / "samples"):
        for leftover in folder.glob(".*.partial"):
            shutil.rmtree(leftover)
    with replacing(path) as written:
        written.write_text(dump_toml(config.to_dict()), encoding="utf-8")
    return latest_checkpoint(out)


def _differences(before: TrainingConfig, now: TrainingConfig) -> list[str]:
    """`section.key (before -> now)` for every setting that must not change."""
    # As config.toml will hold them, in which a list and a tuple are one.
    old, new = (tomllib.loads(dump_toml(each.to_dict())) for each in (before, now))
    return [
        f"{section}.{key} ({old[section].get(key)} -> {new[section].get(key)})"
        for section in new
        for key in sorted(old[section].keys() | new[section].keys())
        if old[section].get(key) != new[section].get(key)
        and key not in _MAY_CHANGE.get(section, ())
        and not (key not in old[section] and key in _MAY_BE_DECIDED.get(section, ()))
    ]
