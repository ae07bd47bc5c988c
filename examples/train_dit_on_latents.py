"""Train a small diffusion transformer of diffusers on a data set of latents, and decode what it draws to a sheet.

    latent-codec encode fashion_mnist/ --codec latent_codec/assets/fashion-mnist --latents --format webdataset
    python examples/train_dit_on_latents.py latents --codec latent_codec/assets/fashion-mnist --out garments.png

It learns the velocity from latents to noise (flow matching), given a class: a quarter of an hour on one core gives
garments.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

from latent_codec import LatentCodec, LatentDataset
from latent_codec.images.sheets import sheet
from latent_codec.images.tensors import write_image

GUIDANCE = 2.0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("latents")
    parser.add_argument("--codec", default="default")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("samples.png"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    codec = LatentCodec.from_pretrained(args.codec)
    dataset = LatentDataset(args.latents, codec=codec)  # refused if they are of another codec
    channels, side, _ = dataset[0]["latents"].shape
    network = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=channels,
        num_layers=args.layers,
        sample_size=side,
        patch_size=1,
        num_embeds_ada_norm=args.classes,
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, args.steps)
    stream = dataset.stream(
        args.batch_size, shuffle=True, drop_last=True
    )  # again and again, in another order
    for step, batch in zip(range(1, args.steps + 1), (batch for _ in range(args.steps) for batch in stream)):
        latents, noise = batch["latents"], torch.randn_like(batch["latents"])
        time = torch.randn(len(latents)).sigmoid()
        noisy = latents.lerp(noise, time.view(-1, 1, 1, 1))
        labels = batch.get("label", torch.zeros(len(latents), dtype=torch.int64))
        velocity = network(noisy, time * 1000, labels).sample
        loss = (velocity - (noise - latents)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == args.steps:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    network.eval()
    rows = [codec.decode(draw(network, label), output_type="pt") for label in range(args.classes)]
    write_image(sheet(rows, side=56), args.out)
    print(args.out)


@torch.no_grad()
def draw(network: DiTTransformer2DModel, label: int, count: int = 10, steps: int = 30) -> torch.Tensor:
    """Draw latents of a class: from noise along the velocity, by Euler's steps, with classifier-free guidance."""
    side = network.config.sample_size
    latents = torch.randn(count, network.config.in_channels, side, side)
    labels = torch.tensor([label] * count + [network.config.num_embeds_ada_norm] * count)
    for step in range(steps, 0, -1):
        time = torch.full((2 * count,), 1000 * step / steps)
        given, free = network(latents.repeat(2, 1, 1, 1), time, labels).sample.chunk(2)
        latents = latents - (free + GUIDANCE * (given - free)) / steps
    return latents


if __name__ == "__main__":
    main()
