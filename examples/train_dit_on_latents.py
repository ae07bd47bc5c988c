"""Train a small diffusion transformer of diffusers on a data set of latents, and decode what it draws to a sheet.

    latent-codec encode fashion_mnist/ --codec fashion-mnist --latents --format webdataset --out latents
    python examples/train_dit_on_latents.py latents --codec fashion-mnist --steps 1500 --out garments.png

Flow matching: the network learns the velocity from latents to noise, given a class. Ten minutes on one core give garments.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

from latent_codec import LatentCodec, LatentDataset
from latent_codec.images.sheets import sheet
from latent_codec.images.tensors import write_image


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("latents")
    parser.add_argument("--codec", default="default")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--out", type=Path, default=Path("samples.png"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    codec = LatentCodec.from_pretrained(args.codec)
    dataset = LatentDataset(args.latents, codec=codec)
    shape = dataset[0]["latents"].shape
    model = DiTTransformer2DModel(
        num_attention_heads=args.width // 32,
        attention_head_dim=32,
        in_channels=shape[0],
        num_layers=6,
        sample_size=shape[1],
        patch_size=1,
        num_embeds_ada_norm=args.classes,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    stream = dataset.stream(64, shuffle=True, drop_last=True)
    step = 0
    while step < args.steps:
        for batch in stream:
            latents, noise = batch["latents"], torch.randn_like(batch["latents"])
            time = torch.randn(len(latents)).sigmoid()
            amount = time.view(-1, 1, 1, 1)
            velocity = model(latents.lerp(noise, amount), time * 1000, batch["label"].clamp(min=0)).sample
            loss = (velocity - (noise - latents)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 5e-4 * (1 - step / args.steps)
            step += 1
            if step % 100 == 0 or step == args.steps:
                print(f"step {step}: loss {loss.item():.3f}", flush=True)
            if step == args.steps:
                break

    rows = [draw(model.eval(), codec, shape, label) for label in range(args.classes)]
    write_image(sheet(rows, side=64), args.out)
    print(args.out)


@torch.no_grad()
def draw(model, codec: LatentCodec, shape: torch.Size, label: int, count: int = 8, steps: int = 30) -> list:
    """Images of a class: from noise, by Euler's steps along the velocity."""
    latents = torch.randn(count, *shape)
    for time in torch.linspace(1, 1 / steps, steps):
        labels = torch.full((count,), label)
        latents = latents - model(latents, time.expand(count) * 1000, labels).sample / steps
    return list(codec.decode(latents, output_type="pt"))


if __name__ == "__main__":
    main()
