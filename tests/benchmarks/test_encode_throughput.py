"""A data set of latents of 996 photos: `encode_data_set` against a plain DataLoader and AutoencoderKL.encode.

    pytest tests/benchmarks/test_encode_throughput.py -s -o addopts=        (ROUNDS=1: of 249 photos; SIDE=128)

Both sides have as many worker processes, threads and images in a batch, and write what they encode. They take turns,
of one tar of photos each, in processes of their own, and each turn begins with another side.
"""

import json
import os
import statistics
import threading

import psutil
from processes import run_script
from tables import table

ROUNDS = int(os.environ.get("ROUNDS", 4))
SIDE = int(os.environ.get("SIDE", 128))
WORKERS = 2

MEASURE = """
import json, resource, sys, time
import torch
from latent_codec import LatentCodec

tar, out, side, workers = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
codec = LatentCodec.from_pretrained("default")

def cpu():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)

def measured(work):
    before, start = cpu(), time.perf_counter()
    found = work()
    print(json.dumps({"wall": time.perf_counter() - start, "cpu": cpu() - before} | found))
"""

OURS = (
    MEASURE
    + """
from latent_codec.images.sources import open_source
from latent_codec.latents.encoding import encode_data_set
from latent_codec.latents.plan import EncodingOptions

def work():
    options = EncodingOptions(container="webdataset", size=side)
    index, counts = encode_data_set(codec, open_source(tar), out, options, num_workers=workers)
    return {"images": index["images"], "waiting": counts.waiting_share, "slowest": counts.slowest_stage}

measured(work)
"""
)

PLAIN = (
    MEASURE
    + """
import io, tarfile
import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

autoencoder = codec.autoencoder.to(memory_format=torch.contiguous_format)

class Photos(Dataset):
    def __init__(self):
        with tarfile.open(tar) as file:
            self.members = [each for each in file if each.name.endswith(".jpg")]
        self.transform = v2.Compose([
            v2.Resize(side, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(side), v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5]),
        ])

    def __len__(self):
        return len(self.members)

    def __getitem__(self, index):
        with open(tar, "rb") as file:
            file.seek(self.members[index].offset_data)
            content = file.read(self.members[index].size)
        return self.transform(Image.open(io.BytesIO(content)).convert("RGB"))

def work():
    latents = []
    with torch.no_grad():
        for images in DataLoader(Photos(), batch_size=32, num_workers=workers):
            latents.append(autoencoder.encode(images).latent_dist.mode().numpy())
    latents = np.concatenate(latents)
    np.save(out, latents)
    return {"images": len(latents)}

measured(work)
"""
)


def measure(script: str, *arguments) -> dict:
    """What the script says of itself, and the peak memory of it and its workers: the sum of proportional set sizes, in MB."""
    peak, ended = 0, threading.Event()
    me = psutil.Process()
    others = set(me.children(recursive=True))

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.2):
            total = 0
            for process in set(me.children(recursive=True)) - others:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            peak = max(peak, total)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        done = run_script(script, *arguments)
    finally:
        ended.set()
        watching.join()
    return json.loads(done.stdout.splitlines()[-1]) | {"memory": peak / 1e6}


def test_throughput_and_memory_against_a_plain_loop(shared, tmp_path):
    turns = {"plain": [], "ours": []}
    for number in range(ROUNDS):
        tar = shared / f"data/photos/photos-{number:03d}.tar"
        sides = {"plain": (PLAIN, tmp_path / f"{number}.npy"), "ours": (OURS, tmp_path / f"{number}")}
        for name in sorted(sides, reverse=number % 2 == 1):
            script, out = sides[name]
            turns[name].append(measure(script, tar, out, SIDE, WORKERS))
            print(name, number, turns[name][-1], flush=True)
    assert [each["images"] for each in turns["ours"]] == [each["images"] for each in turns["plain"]]

    def total(name: str, what: str) -> float:
        return sum(each[what] for each in turns[name])

    rows = [
        [
            name,
            total(name, "images") / total(name, "wall"),
            total(name, "images") / total(name, "cpu"),
            max(each["memory"] for each in turns[name]),
            statistics.mean(each.get("waiting", float("nan")) for each in turns[name]),
        ]
        for name in turns
    ]
    title = f"{total('ours', 'images'):.0f} photos at {SIDE}x{SIDE}, {WORKERS} workers, one thread"
    table(title, ["side", "images/s", "images per CPU second", "peak MB", "network waits"], rows)
    plain, ours = rows
    print(f"ratio of wall times {ours[1] / plain[1]:.3f}, of CPU times {ours[2] / plain[2]:.3f}")
    assert ours[2] >= plain[2]
    assert ours[3] < plain[3]
    assert ours[4] < 0.05
