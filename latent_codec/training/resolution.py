"""What a configuration leaves to the machine, to its codec and to the length of the run: precision, whose latents, shares of
`run.steps`, how often a line is logged.

They are decided when a run begins, and config.toml holds what was decided. A run that goes on keeps it.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

from latent_codec.components.codec_folders import pipeline_of_codec
from latent_codec.precision import EMULATED, computes_bfloat16
from latent_codec.training.config import IN_STEPS, TrainingConfig
from latent_codec.training.run_folder import configuration_to_resume

logger = logging.getLogger(__name__)


def resolve(
    config: TrainingConfig, out: Path, device: str, *, say: Callable[[str], None] = logger.info
) -> TrainingConfig:
    """Decide what `config` leaves open, and report it.

    Args:
        config: of the run.
        out: the run folder, which may hold a run to go on with.
        device: what will compute.
        say: takes each line.

    Raises:
        ValueError: if the configuration in `out` cannot be read, or there is no codec of that name.
    """
    before = configuration_to_resume(out)
    precision = config.run.precision
    if precision == "auto" and before is not None:
        precision = before.run.precision
    if precision == "auto":
        precision = "bf16" if computes_bfloat16(device) else "fp32"
    if precision == "bf16" and device == "cpu" and computes_bfloat16(device) is False:
        advice = (
            "begin a run with run.precision=fp32"
            if before is None
            else f"{out} began in bf16 and goes on in it; a run in another folder can be in fp32"
        )
        say(f"Note: {EMULATED}; {advice}")
    log_every = config.run.log_every or min(50, max(5, config.run.steps // 20))
    sections = {"run": dataclasses.replace(config.run, precision=precision, log_every=log_every)}
    if config.model.pipeline is None and config.codec is not None:
        pipeline = pipeline_of_codec(config.codec)
        sections["model"] = dataclasses.replace(config.model, pipeline=pipeline)
    decided = []
    for section, names in IN_STEPS.items():
        settings = getattr(config, section)
        shares = {
            name: getattr(settings, name) for name in names if isinstance(getattr(settings, name), float)
        }
        steps = {name: _steps(share, config.run.steps, name) for name, share in shares.items()}
        if before is not None:
            steps = {name: getattr(getattr(before, section), name) for name in shares}
        sections[section] = dataclasses.replace(settings, **steps)
        decided += [f"{section}.{name} {count}" for name, count in steps.items()]
    if decided:
        why = f"shares of {config.run.steps} steps" if before is None else "as the run began"
        say(f"{out}: {', '.join(decided)} ({why})")
    return dataclasses.replace(config, **sections)


def _steps(share: float, num_steps: int, name: str) -> int:
    """Rounded down, so that what begins at a share below 1 begins before the end; a ramp has at least one step."""
    steps = int(round(share * num_steps, 6))  # 50 / 3000 * 3000 is a little less than 50
    return max(steps, 1) if name == "gan_ramp" else steps
