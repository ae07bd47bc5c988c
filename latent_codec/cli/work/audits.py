"""`latent-codec info --audit` and `--against`."""

import argparse
from collections.abc import Iterator

from torch import Tensor

from latent_codec import LatentCodec
from latent_codec.cli.progress import progress, showing
from latent_codec.cli.work.opening import device_of
from latent_codec.cli.work.printing import for_people, print_json, table
from latent_codec.evaluation import drop_in_audit, host_audit
from latent_codec.evaluation.diffusers_audit import made_for
from latent_codec.images.sample_photograph import SAMPLE_SIZE, sample_photograph
from latent_codec.images.sources import open_source, spread
from latent_codec.images.tensors import center_crop


def audit_hosts(args: argparse.Namespace) -> None:
    with showing(f"opening {args.thing}"):
        codec = LatentCodec.from_pretrained(args.thing, pipeline=args.for_pipeline)
    with showing(f"auditing {args.thing}"):
        audits, families = host_audit.audit_hosts(codec), made_for(codec)
    if args.json:
        hosts = [audit.to_dict() for audit in audits]
        print_json(
            {"codec": codec.name, "fingerprint": codec.fingerprint, "made_for": families, "hosts": hosts}
        )
        return
    print(f"made for: {', '.join(families) or 'no released denoiser that is known here'}")
    print(f"{codec.name}, {type(codec.autoencoder).__name__}")
    audits.sort(key=lambda audit: ("as it is", "with limits", "no").index(audit.verdict))
    rows = [(audit.host, _version(audit), audit.verdict) for audit in audits]
    table(("host", "as of", "verdict"), rows, justify="l")
    alike: dict[tuple, list[str]] = {}
    for audit in audits:
        alike.setdefault((audit.verdict, audit.reasons, audit.remedy), []).append(audit.host)
    for (verdict, reasons, remedy), hosts in alike.items():
        if reasons:
            print(f"{', '.join(hosts)}: {verdict}")
        for reason in reasons:
            print(f"  - {reason}")
        if remedy:
            print(f"  what helps: {remedy}")


def _version(audit: host_audit.HostAudit) -> str:
    return f"diffusers {audit.diffusers}" if audit.diffusers else f"{audit.version}, {audit.date}"


def audit_drop_in(args: argparse.Namespace) -> None:
    device = device_of(args)
    with showing(f"opening {args.thing} and {args.against}"):
        codec, reference = (
            LatentCodec.from_pretrained(each, pipeline=args.for_pipeline, device=device)
            for each in (args.thing, args.against)
        )
    audit = drop_in_audit.audit_drop_in(codec, reference, _images(args, codec.channels))
    data = " ".join(args.data)
    if args.json:
        print_json(audit.to_dict() | {"images": data or None})
        return
    count = "1 image" if audit.num_images == 1 else f"{audit.num_images} images"
    _print_drop_in(audit, f"{count} of {data}" if data else "the sample photograph")


def _images(args: argparse.Namespace, channels: int) -> Iterator[Tensor]:
    """Images in [-1, 1], cut to at most 512 px a side."""
    source = open_source(args.data or sample_photograph())
    for index in progress(spread(len(source), args.limit), "comparing"):
        image = source.image(index, channels)
        yield center_crop(image, tuple(min(side, SAMPLE_SIZE) for side in image.shape[1:]))


def _print_drop_in(audit: drop_in_audit.DropInAudit, where: str) -> None:
    print(f"{audit.codec} against {audit.reference}: {audit.verdict}.")
    for side in ("encoder", "decoder"):
        weights = getattr(audit, side)
        names = [*weights.differing, *weights.missing]
        print(
            f"{side}: {weights.num_equal} of {weights.num_tensors} tensors equal to the bit"
            + (f"; not {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "")
        )
    for difference in audit.config_differences:
        print(f"config: {difference}")
    for key, value in audit.space.to_config().items():
        other = audit.reference_space.to_config()[key]
        if value != other:
            print(f"{key}: {for_people(value)} against {for_people(other)}")
    rows = []
    for channel, each in enumerate(audit.channels):
        figures = each.mean, each.reference_mean, each.mean_difference, each.std, each.reference_std
        correlation = "-" if each.correlation is None else f"{each.correlation:.4f}"
        rows.append((str(channel), *(f"{figure:.4f}" for figure in figures), correlation))
    table(
        ("latent channel", "mean", "theirs", "difference", "std", "theirs", "correlation"), rows, justify="r"
    )
    rows = [
        ("its latents", f"{audit.psnr:.2f}", f"{audit.psnr_by_reference:.2f}"),
        ("their latents", f"{audit.psnr_of_reference_by_codec:.2f}", f"{audit.psnr_of_reference:.2f}"),
    ]
    table(("PSNR, dB", "its decoder", "their decoder"), rows)
    print(f"Latents drift by {audit.drift:.3g} of their spread, on {where}.")
