"""Whether a codec's autoencoder loads and works in diffusers' pipelines and in three user interfaces, and why not.

The rules are what the hosts' code reads (ComfyUI, A1111 and InvokeAI in 2026):

    diffusers     its pipelines take any autoencoder object, and read entries of its config: `families/pipeline_spaces.py`
    ComfyUI       a weight file, diffusers' or latent-diffusion's keys; rebuilds Stable Diffusion's network
    A1111         a weight file of latent-diffusion's keys, loaded strictly into its model's network
    InvokeAI      a diffusers folder, recognized by the class and the latents' channels in its config

"As it is" means that the host's latents are decoded as this codec decodes them. Whether a denoiser that was trained
on another's latents fits these is another question: `drop_in_audit`.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from latent_codec.codec import LatentCodec
from latent_codec.evaluation.diffusers_audit import in_diffusers
from latent_codec.evaluation.host_findings import Finding, Verdict
from latent_codec.evaluation.interface_audit import in_a1111, in_comfyui, in_invokeai
from latent_codec.families.pipeline_spaces import ROWS
from latent_codec.files import plain


@dataclass(frozen=True)
class HostAudit:
    """One host's answer."""

    host: str
    """A family of diffusers' pipelines, by its title, or a user interface."""
    verdict: Verdict
    """The worst of what was found: "no" where loading or decoding fails, "with limits" where some use of it does."""
    reasons: tuple[str, ...]
    """Why it is not better; where it works as it is, what to know."""
    remedy: str | None
    """The export or setting that helps, with CODEC for the codec's name; None where nothing does or need."""
    diffusers: str | None = None
    """The version of diffusers that the family was read from."""

    def to_dict(self) -> dict:
        return plain(asdict(self))


def audit_hosts(codec: LatentCodec) -> list[HostAudit]:
    """Each host's verdict on `codec`, from its class, its config and its space; no weight is touched."""
    audits = [_summary(row.title, in_diffusers(codec, row), row.read_in) for row in ROWS]
    others = {"ComfyUI": in_comfyui, "A1111": in_a1111, "InvokeAI": in_invokeai}
    return audits + [_summary(host, rules(codec)) for host, rules in others.items()]


def _summary(host: str, findings: Iterable[Finding], version: str | None = None) -> HostAudit:
    findings = list(findings)
    verdicts = {finding.verdict for finding in findings}
    verdict = next((each for each in ("no", "with limits") if each in verdicts), "as it is")
    remedies = dict.fromkeys(finding.remedy for finding in findings if finding.remedy)
    return HostAudit(
        host, verdict, tuple(finding.reason for finding in findings), "; ".join(remedies) or None, version
    )
