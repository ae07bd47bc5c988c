"""Encode on many machines by Ray Data: actors, one for each GPU or CPU core, take shard after shard.

    listing --a shard's part of it--> queue --> actors: read, encode, commit --markers--> this process, which counts

Only listings and markers pass through Ray: images are read, and shards written, by the actors. So these need to see the
images under the same paths, and the data set under the same URL. An actor that is killed is replaced, and its shard handed
out again; that costs time and nothing else, since a repeated shard has the same bytes.
"""

import logging
import os
import pickle
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from fsspec.implementations.memory import MemoryFileSystem

from latent_codec.errors import SettingError
from latent_codec.latents.engines.accounting import Accounting, Progress
from latent_codec.latents.plan import Shard
from latent_codec.latents.shards import Job, encode_shard

logger = logging.getLogger(__name__)

MAX_TRIES = 10
"""Actors that may be killed at a shard before it is given up."""
_MAX_FAILURES = 10
"""Shards that may fail, none succeeding between them, before the run ends: a full disk is full for all."""
_CONNECT_WITHIN = 30.0
"""Seconds for a cluster's head to answer."""
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # or Ray reports to its makers
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # its notes of actors that were killed go to stdout, where results are
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # as it will be: actors without a GPU keep the variables they have
}
"""Read when Ray is imported and when it starts; what the user has set stays."""


def run(
    job: Job,
    on_progress: Progress | None = None,
    *,
    num_workers: int | None = None,
    ray_address: str | None = None,
    device: str | None = None,
) -> Accounting:
    """Encode the missing shards of a job on a cluster of Ray, or on this machine.

    A shard fails where its images cannot be reached, or it cannot be written; the others are encoded nevertheless.

    Args:
        num_workers: actors; None: one for each GPU of the cluster, or, where it has none, for each CPU core. More than
            there are share them.
        ray_address: of a cluster's head, "HOST:6379", or "auto"; None: Ray runs on this machine until the work is done.
        device: where actors compute; None: on GPUs, if the cluster has any.

    Raises:
        SettingError: for a folder that only this process has (memory://), or another device.
        ConnectionError: if there is no cluster at that address.
        ValueError: without Ray.
        LabelError, ValueError, OSError: of the first shard that failed.
    """
    if isinstance(job.folder.fs, MemoryFileSystem):
        raise SettingError("out", "a folder or URL that the processes of Ray see", job.folder.url)
    if device not in (None, "cpu", "cuda"):
        raise SettingError("device", "cpu or cuda, of which Ray gives each worker its own", device)
    missing = job.missing()
    accounting = Accounting.of(job.plan, missing)
    report = on_progress or (lambda accounting: None)
    report(accounting)
    if missing:
        ray = _import_ray()
        with _started(ray, ray_address):
            _encode(ray, job, missing, accounting, report, num_workers, device)
    accounting.ended = time.monotonic()
    report(accounting)
    return accounting


def _encode(
    ray, job: Job, missing: Sequence[Shard], accounting: Accounting, report: Progress, num_workers, device
) -> None:
    resources = ray.cluster_resources()
    num_cpus, num_gpus = resources.get("CPU", 1), resources.get("GPU", 0)
    device = torch.device(device or ("cuda" if num_gpus else "cpu"))
    places = num_gpus if device.type == "cuda" else num_cpus
    workers = min(num_workers or max(int(places), 1), len(missing))
    share = {"num_cpus": _share(num_cpus, workers)}
    if device.type == "cuda":
        share["num_gpus"] = _share(num_gpus, workers)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a shard whose actors were killed too often
    light = replace(job, codec=job.codec.to("cpu"), plan=(), source=_without_listing(job))
    threads = max(int(num_cpus / workers), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, of arguments that later versions name otherwise
        results = ray.data.from_items(
            [{"task": _task(job, shard)} for shard in missing], override_num_blocks=len(missing)
        ).map_batches(
            _Encoder,
            fn_constructor_args=(ray.put(light), os.getcwd(), device.type, threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            max_restarts=-1,
            max_task_retries=MAX_TRIES - 1,
            **share,
        )
    failures: list[Exception] = []
    since_success = 0
    for row in results.iter_rows():
        found = pickle.loads(row["found"])
        if isinstance(found, Exception):
            failures.append(found)
            since_success += 1
            if since_success >= _MAX_FAILURES:
                break
            continue
        since_success = 0
        marker, worked, waited = found
        for name, reason in marker["skipped"]:
            logger.warning("skipped: %s: %s", name, reason)
        accounting.committed(marker, worked, waited)
        report(accounting)
    if failures:
        logger.warning(
            "%d of %d shards failed; the same command tries them again", len(failures), len(missing)
        )
        raise failures[0]


class _Encoder:
    """An actor; calling it with a shard encodes and commits that."""

    def __init__(self, job, folder: str, device: str, num_threads: int):
        import ray

        with suppress(OSError):
            os.chdir(folder)  # for relative paths, where it is the driver's machine
        if device == "cpu":
            torch.set_num_threads(1)  # or sums would differ with the number of cores
        self.job: Job = ray.get(job)
        self.job.codec.to(device)
        self.num_threads = num_threads

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"found": [self._encode(bytes(task)) for task in batch["task"]]}

    def _encode(self, task: bytes) -> bytes:
        job, began = self.job, time.monotonic()
        try:
            shard, source = pickle.loads(task)
            encoded = encode_shard(
                job.codec,
                job.source if source is None else source,
                shard,
                job.options,
                batch_size=job.batch_size,
                num_threads=self.num_threads,
            )
            job.folder.commit(encoded, job.options)
            return pickle.dumps((encoded.marker, time.monotonic() - began, encoded.waited))
        except Exception as error:  # which Ray would wrap in its own traceback
            return _pickled(error)


def _pickled(error: Exception) -> bytes:
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
        return content
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _task(job: Job, shard: Shard) -> bytes:
    """A shard, and the source of its images where that can be cut."""
    part = job.source.part(shard.numbers)
    if part is not None:
        shard = Shard(shard.name, 0, len(part))
    return pickle.dumps((shard, part))


def _without_listing(job: Job):
    part = job.source.part([])
    return job.source if part is None else part


def _share(available: float, workers: int) -> float:
    """What each of the workers asks for, at most 1, so that all of them find a place."""
    return min(1.0, int(available / workers * 1000) / 1000)


def _import_ray():
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ValueError('the engine ray needs Ray Data: pip install "latent-codec[ray]"') from error
    return ray


@contextmanager
def _started(ray, address: str | None) -> Iterator[None]:
    """Ray, started or connected to, unless the caller has done so."""
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    # "local": without an address Ray looks for a cluster that was started here, and waits for one that is gone.
    settings = {"address": address} if address else {"address": "local", "include_dashboard": False}
    _check_port(address)
    try:
        with _silent_libraries():
            ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **settings)
    except ConnectionError as error:
        reason = str(error).partition("\n")[0]
        advice = "where it wants a token, set RAY_AUTH_MODE=token in the environment"
        raise ConnectionError(f"no cluster of Ray takes us at {address} ({reason}); {advice}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_port(address: str | None) -> None:
    """Whether somebody listens at "HOST:PORT", for which Ray itself would wait many minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_WITHIN).close()
        except OSError as error:
            reason = error.strerror or error
            raise ConnectionError(f"no cluster of Ray answers at {address} ({reason})") from None


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """Drop what libraries in C++ write to stderr, which no logger of theirs keeps back; what Python writes there is kept."""
    sys.stderr.flush()
    is_ours = False
    with suppress(OSError, ValueError, AttributeError):
        is_ours = sys.stderr.fileno() == 2
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    before = sys.stderr
    try:
        os.dup2(nowhere, 2)
        if is_ours:
            sys.stderr = os.fdopen(
                kept, "w", 1, encoding=before.encoding, errors=before.errors, closefd=False
            )
        yield
    finally:
        sys.stderr = before
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
