"""The engine ray, really: workers and the driver are killed, and the files are those of a quiet process.

Takes minutes, most of them until Ray has started. Needs the extra [ray], which `CI_EXTRAS=1 .ci/run` installs.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from helpers import ROOT
from helpers.commands import files_in
from helpers.encoding import small_codec, write_photos
from helpers.processes import run_fresh

from latent_codec import LatentCodec
from latent_codec.images.sources import open_source
from latent_codec.latents.encoding import encode_data_set
from latent_codec.latents.plan import EncodingOptions

pytest.importorskip("ray", reason="needs Ray Data, of the extra [ray]")

IMAGES = 120
OPTIONS = EncodingOptions(container="webdataset", images_per_shard=4)
WORKER = "ray::MapWorker"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`photos/`, of which one cannot be read, `codec/`, and `quiet/`, made of them by one undisturbed process."""
    folder = tmp_path_factory.mktemp("ray")
    write_photos(folder, IMAGES, [(160, 192), (192, 160)], digits=3)
    small_codec(8, 16, name="codec").save_pretrained(folder / "codec")
    codec = LatentCodec.from_pretrained(folder / "codec")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        encode_data_set(codec, open_source(folder / "photos"), folder / "quiet", OPTIONS, num_workers=0)
    finally:
        torch.set_num_threads(threads)
    return folder


class Driver:
    """The command, begun in a process of its own."""

    def __init__(self, folder, out: str, workers: int):
        command = [sys.executable, "-m", "latent_codec.cli", "encode", "photos", "--codec", "codec"]
        command += ["--format", "webdataset", "--shard", "4", "--out", out]
        command += ["--engine", "ray", "--num-workers", str(workers), "--json"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.folder = folder / out
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        return [each for each in self.descendants() if _title(each).startswith(WORKER)]

    def committed(self) -> int:
        return len(list(self.folder.glob("shards/*.json")))

    def wait_for(self, condition, seconds: float = 300) -> None:
        ends = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < ends, "it takes too long"
            time.sleep(0.01)

    def kill_worker(self) -> None:
        """With -9, one of those that there are, when a further shard has been committed and the next have begun."""
        before = self.committed()
        self.wait_for(lambda: self.committed() > before)
        self.wait_for(self.workers)
        random.choice(self.workers()).send_signal(signal.SIGKILL)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_killed_five_times_and_then_the_driver(folder, workers):
    out = f"killed-{workers}"
    driver = Driver(folder, out, workers)
    driver.wait_for(lambda: len(driver.workers()) == workers)
    for _ in range(5):
        driver.kill_worker()
    before = driver.committed()
    driver.wait_for(lambda: driver.committed() > before)
    started = driver.workers()
    driver.process.kill()
    driver.process.communicate()
    done = driver.committed()
    assert 6 <= done < IMAGES / 4 and not (folder / out / "index.json").exists()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive, "workers end with the driver"

    again = Driver(folder, out, workers)
    stdout, stderr = again.process.communicate(timeout=600)
    assert again.process.returncode == 0, stderr
    assert files_in(folder / out) == files_in(folder / "quiet")
    counts = json.loads(stdout.splitlines()[-1])
    assert (counts["images"], counts["samples"], counts["skipped"]) == (IMAGES - 1, IMAGES - 1, 1)
    assert counts["kept"] >= 4 * (done - 1)  # all but the shard with the image that cannot be read

    events = [json.loads(line) for line in stdout.splitlines()]  # and nothing of Ray's
    assert {event["event"] for event in events} <= {"progress", "done"}
    said = [
        line for line in stderr.splitlines() if not line.startswith(("encoding: ", "loading ", "opening "))
    ]
    assert len(said) <= 1 and all(line.startswith("skipped: ") for line in said)


DEADLY = """
import os, sys
from pathlib import Path

from deadly import DeadlyImages
from latent_codec import LatentCodec
from latent_codec.latents.encoding import encode_data_set
from latent_codec.latents.engines import ray
from latent_codec.latents.plan import EncodingOptions

ray.MAX_TRIES = 2
source = DeadlyImages([Path("photos")], Path("photos")).part(range(8, 20))
options = EncodingOptions(container="webdataset", images_per_shard=4)
encode_data_set(LatentCodec.from_pretrained("codec"), source, "deadly", options, engine="ray", num_workers=1)
"""

SOURCE = """
import os, signal

from latent_codec.images.sources import FolderImages

class DeadlyImages(FolderImages):
    def read(self, index, channels=3):
        if self.name(index).endswith("014.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index, channels)
"""


def test_a_shard_that_kills_its_workers_is_named_and_the_others_are_encoded(folder, tmp_path):
    (tmp_path / "deadly.py").write_text(SOURCE)
    done = run_fresh(DEADLY, check=False, cwd=folder, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert "ValueError: deadly: 1 of 3 shards are missing, the first is 00001-" in done.stderr
    assert "run the same command again" in done.stderr and done.stdout == ""
    assert sorted(path.name[:5] for path in folder.glob("deadly/shards/*.tar")) == ["00000", "00002"]

    source = open_source(folder / "photos").part(range(8, 20))
    codec = LatentCodec.from_pretrained(folder / "codec")
    index, counts = encode_data_set(codec, source, folder / "deadly", OPTIONS, num_workers=0)
    assert (index["images"], counts.kept) == (12, 8)


def test_an_address_without_a_cluster_is_one_line(folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    codec = LatentCodec.from_pretrained(folder / "codec")
    with pytest.raises(
        ConnectionError, match=rf"no cluster of Ray answers at {address} \(Connection refused\)"
    ):
        encode_data_set(
            codec, open_source(folder / "photos"), folder / "none", OPTIONS, engine="ray", ray_address=address
        )
