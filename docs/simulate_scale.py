"""Simulate how 1,000 workers encode 10^9 images while some are slow and all may be killed: the figures of docs/scale.md.

    python docs/simulate_scale.py

A worker takes a shard, computes for a while, commits it, takes the next. One that is killed loses the shard it was at, which
goes back to the others; a new worker comes after a while. Three ways to hand out shards are compared:

    fixed    worker r of n has the shards r, r + n, r + 2n ... (`--engine accelerate`)
    queue    whoever is free takes the next (`--engine ray`)
    copies   a queue, and whoever is free at the end starts a shard again that another worker is still at; since a repeated
             shard has the same bytes, the first to finish counts (a second run at once, on the same output)
"""

import heapq
import random
from collections import deque
from dataclasses import dataclass, replace

SCHEDULES = ("fixed", "queue", "copies")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the workers are like; times in seconds."""

    workers: int = 1000
    images_per_second: float = 220.0
    """Of a worker: an H100 that encodes 512x512 images with an autoencoder of Stable Diffusion's size (docs/scale.md)."""
    spread: float = 0.05
    """Standard deviation of the logarithm of a shard's duration."""
    slow_share: float = 0.02
    """Of the workers: stragglers."""
    slow_factor: float = 4.0
    """How much longer a straggler takes."""
    hours_between_failures: float = 24.0
    """Of one worker, in the mean; exponentially distributed."""
    recovery: float = 300.0
    """Until a new worker has replaced one that was killed and has opened the codec."""
    start: float = 60.0
    """Until a worker's first shard."""
    commit: float = 0.3
    """For which a shard's worker does not compute: two writes to an object store, and the next shard's assignment."""
    dispatch: float = 0.002
    """For which the driver is busy with each shard that it hands out."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    hours: float
    """Until the last shard was committed."""
    over_ideal: float
    """By how much that is longer than `images / (workers * images_per_second)`, as a share."""
    failures: int
    lost: float
    """Share of all computing that killed workers had done on shards that they did not commit."""
    repeated: float
    """Share of all computing that was spent on copies of shards that another worker committed."""
    shards: int


class _Worker:
    def __init__(self, cluster: Cluster, rng: random.Random, now: float):
        self.cluster, self.rng = cluster, rng
        self.factor = cluster.slow_factor if rng.random() < cluster.slow_share else 1.0
        self.dies = now + rng.expovariate(1 / (3600 * cluster.hours_between_failures))

    def duration(self, images: int) -> float:
        noise = self.rng.lognormvariate(0.0, self.cluster.spread)
        return images / self.cluster.images_per_second * self.factor * noise + self.cluster.commit


def simulate(
    cluster: Cluster, images: int, images_per_shard: int, schedule: str = "queue", seed: int = 0
) -> Outcome:
    """Run one job to its end."""
    rng = random.Random(seed)
    num_shards = -(-images // images_per_shard)
    is_fixed = schedule == "fixed"
    waiting = [
        deque(range(worker, num_shards, cluster.workers)) if is_fixed else None
        for worker in range(cluster.workers)
    ]
    queue = deque(range(num_shards))
    workers = [_Worker(cluster, rng, 0.0) for _ in range(cluster.workers)]
    # What happens next: (time, worker, its shard, when it took that, whether the worker died at it).
    events = [(cluster.start, number, None, 0.0, False) for number in range(cluster.workers)]
    heapq.heapify(events)
    committed = bytearray(num_shards)
    running: dict[int, float] = {}
    idle: list[int] = []
    left, ended, driver_free = num_shards, 0.0, 0.0
    computed = lost = repeated = 0.0
    failures = 0

    def copied() -> int | None:
        """The shard that has been at work for the longest, unless somebody copies it already."""
        for shard, copies in running.items():  # in the order in which they began
            if copies < 2 and not committed[shard]:
                return shard
        return None

    def take(now: float, number: int) -> None:
        nonlocal driver_free
        mine = waiting[number] if is_fixed else queue
        shard = mine.popleft() if mine else copied() if schedule == "copies" else None
        if shard is None:
            idle.append(number)
            return
        running[shard] = running.get(shard, 0) + 1
        begins = now if is_fixed else max(now, driver_free)
        driver_free = begins + cluster.dispatch
        worker = workers[number]
        ends = begins + worker.duration(min(images_per_shard, images - shard * images_per_shard))
        dies = worker.dies < ends
        heapq.heappush(events, (max(worker.dies, begins) if dies else ends, number, shard, begins, dies))

    while left:
        now, number, shard, began, died = heapq.heappop(events)
        if shard is not None:
            computed += now - began
            running[shard] -= 1
            if not running[shard]:
                del running[shard]
            if committed[shard]:
                repeated += now - began
            elif not died:
                committed[shard] = 1
                left -= 1
                ended = now
            else:
                lost += now - began
                if shard not in running:
                    (waiting[number] if is_fixed else queue).appendleft(shard)
        if died:
            failures += 1
            workers[number] = _Worker(cluster, rng, now + cluster.recovery)
            heapq.heappush(events, (now + cluster.recovery, number, None, now, False))
            if idle and not is_fixed:
                take(now, idle.pop())
        else:
            take(now, number)
    ideal = images / (cluster.workers * cluster.images_per_second)
    return Outcome(
        hours=ended / 3600,
        over_ideal=ended / ideal - 1,
        failures=failures,
        lost=lost / computed,
        repeated=repeated / computed,
        shards=num_shards,
    )


def table(images: int = 10**9, cluster: Cluster = Cluster(), sizes: tuple = (1_000, 10_000, 100_000)) -> str:
    """What the schedules do with shards of these sizes, as docs/scale.md has it."""
    preemptible = replace(cluster, hours_between_failures=2.0)
    lines = [
        "| workers killed every | images per shard | handed out by | hours | over the ideal | killed | work lost | work repeated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in (cluster, preemptible):
        for size in sizes if each is cluster else sizes[-2:]:
            for schedule in SCHEDULES:
                found = simulate(each, images, size, schedule)
                lines.append(
                    f"| {each.hours_between_failures:.0f} h | {size:,} | {schedule} | {found.hours:.2f} | "
                    f"{found.over_ideal:.0%} | {found.failures} | {found.lost:.2%} | {found.repeated:.2%} |"
                )
    return "\n".join(lines)


def drivers_table(images: int = 10**9, cluster: Cluster = Cluster(), counts: tuple = (1, 10, 100)) -> str:
    """The same work in equal parts, each with a driver and a queue of its own."""
    lines = [
        "| drivers | workers of each | images of each | hours until the last ends | hours in the mean |",
        "|---|---|---|---|---|",
    ]
    for count in counts:
        part = replace(cluster, workers=cluster.workers // count)
        hours = [simulate(part, images // count, 10_000, "queue", seed).hours for seed in range(count)]
        mean = sum(hours) / count
        lines.append(f"| {count} | {part.workers:,} | {images // count:,} | {max(hours):.2f} | {mean:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    print()
    print(drivers_table())
