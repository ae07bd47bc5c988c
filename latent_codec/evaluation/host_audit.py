"""Whether a codec's autoencoder loads and works in diffusers' pipelines and in three user interfaces, and why not.

The rules are rows of data, each of a version of a host that the answer names:

    diffusers     its pipelines take any autoencoder object, and read entries of its config: `families/pipeline_spaces.py`
    ComfyUI, A1111, InvokeAI     what they build, whatever a file holds: `conversion/hosts.py`

"As it is" means that the host's latents are decoded as this codec decodes them. Whether a denoiser that was trained
on another's latents fits these is another question: `drop_in_audit`.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from latent_codec.codec import LatentCodec
from latent_codec.conversion.hosts import A1111, COMFYUI, INVOKEAI
from latent_codec.evaluation.diffusers_audit import in_diffusers
from latent_codec.evaluation.host_findings import Finding, Verdict
from latent_codec.evaluation.interface_audit import in_host
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
    version: str | None = None
    """The version of the user interface that this is of."""
    date: str | None = None
    """Of that version."""

    def to_dict(self) -> dict:
        return plain(asdict(self))


def audit_hosts(codec: LatentCodec) -> list[HostAudit]:
    """Each host's verdict on `codec`, from its class, its config and its space; no weight is touched."""
    audits = [_summary(row.title, in_diffusers(codec, row), row.read_in) for row in ROWS]
    for each in (COMFYUI, A1111, INVOKEAI):
        found = _summary(each.host, in_host(codec, each.host))
        audits.append(replace(found, version=each.version, date=each.date))
    return audits


def _summary(host: str, findings: Iterable[Finding], diffusers: str | None = None) -> HostAudit:
    findings = list(findings)
    verdicts = {finding.verdict for finding in findings}
    verdict = next((each for each in ("no", "with limits") if each in verdicts), "as it is")
    remedies = dict.fromkeys(finding.remedy for finding in findings if finding.remedy)
    return HostAudit(
        host, verdict, tuple(finding.reason for finding in findings), "; ".join(remedies) or None, diffusers
    )
