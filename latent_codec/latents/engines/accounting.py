"""What a run has done so far: images, speed, failures by reason, and which stage is the slowest."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from latent_codec.latents.plan import Shard
from latent_codec.latents.samples import Sample, Unreadable


@dataclass(kw_only=True)
class Accounting:
    """Counts of a run, which its engine keeps."""

    total: int
    """Images of the source."""
    kept: int = 0
    """Images whose shards were complete before."""
    done: int = 0
    """Images encoded, or found unreadable, in this run."""
    samples: int = 0
    pixels: int = 0
    """Of the images that the network was given."""
    failures: Counter[str] = field(default_factory=Counter)
    """How many images could not be read, by reason."""
    waits: dict[str, float] = field(default_factory=dict)
    """Seconds for which the network waited: for images, "decoding"; for the writer, "writing"."""
    started: float = field(default_factory=time.monotonic)
    worked: float = 0.0
    """Seconds that other processes have worked on the shards that they committed; their networks' waits are among them."""
    first_batch: float | None = None
    """When the network got its first batch."""
    ended: float | None = None

    @classmethod
    def of(cls, plan: Sequence[Shard], missing: Sequence[Shard]) -> Self:
        """Of a run that is to encode the missing shards of a plan."""
        total, absent = (sum(len(shard.numbers) for shard in shards) for shards in (plan, missing))
        return cls(total=total, kept=total - absent)

    def encoded(self, samples: list[Sample]) -> None:
        self.done += sum(each.version == 0 for each in samples)
        self.samples += len(samples)
        self.pixels += sum(each.frame.size[0] * each.frame.size[1] for each in samples)

    def unreadable(self, image: Unreadable) -> None:
        self.done += 1
        self.failures[image.reason.partition(" (")[0]] += 1

    def committed(self, marker: dict[str, Any], worked: float, waited: float) -> None:
        """Count a shard that another process has encoded: what its marker says, its seconds, and those that the network waited."""
        self.done += marker["images"] + len(marker["skipped"])
        self.samples += marker["samples"]
        for size, count in marker["sizes"].items():
            height, width = map(int, size.split("x"))
            self.pixels += height * width * count
        self.failures.update(reason.partition(" (")[0] for _, reason in marker["skipped"])
        self.worked += worked
        self.waits["decoding"] = self.waits.get("decoding", 0.0) + waited

    def add(self, other: "Accounting") -> None:
        """Count what another process has done at the same time."""
        for name in ("total", "kept", "done", "samples", "pixels"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.failures.update(other.failures)

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.started

    @property
    def images_per_second(self) -> float:
        return self.done / max(self.seconds, 1e-9)

    @property
    def megapixels_per_second(self) -> float:
        return self.pixels / 1e6 / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """None before anything is done."""
        left = self.total - self.kept - self.done
        return None if not self.done else left / self.images_per_second

    @property
    def waiting_share(self) -> float:
        """The share of time, from its first batch on, for which the network waited."""
        waited = sum(self.waits.values())
        if self.worked:
            return waited / self.worked
        if self.first_batch is None:
            return 0.0
        return waited / max((self.ended or time.monotonic()) - self.first_batch, 1e-9)

    @property
    def slowest_stage(self) -> str:
        """decoding, network or writing: the one that the others wait for."""
        waited = max(self.waits, key=self.waits.get, default=None)
        return waited if waited is not None and self.waiting_share > 0.5 else "network"

    def to_json(self) -> dict[str, Any]:
        """For machines: one event's entries."""
        left = self.seconds_left
        return {
            "images": self.kept + self.done,
            "total": self.total,
            "kept": self.kept,
            "samples": self.samples,
            "failures": dict(self.failures),
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images_per_second, 3),
            "megapixels_per_second": round(self.megapixels_per_second, 3),
            "seconds_left": None if left is None else round(left, 1),
            "slowest_stage": self.slowest_stage,
            "waiting_share": round(self.waiting_share, 4),
        }


Progress = Callable[[Accounting], None]
