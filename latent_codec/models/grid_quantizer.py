"""Quantizers without a learned codebook: codewords are the points of a grid, found channel by channel.

FSQ (arXiv:2309.15505), LFQ (arXiv:2310.05737) and BSQ (arXiv:2406.07548) differ in the grid and in what keeps latents
near all of it. Their codewords are written down as those of any VectorQuantizer, so that a reader who only
looks for the nearest one, such as diffusers' VQModel, finds the same indices. SuccessiveSigns, ours, are LFQ's bits
found one after the other.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_codec.models.quantizers import (
    QuantizerOutput,
    VectorQuantizer,
    at_least_float32,
    count_indices,
    perplexity,
    straight_through,
)
from latent_codec.tensors import check_shape

GridKind = Literal["fsq", "lfq", "bsq"]
QuantizerKind = Literal["vq", "fsq", "lfq", "lfq-successive", "bsq"]

FSQ_VALUES = {
    256: (8, 6, 5),
    512: (8, 8, 8),
    1024: (8, 5, 5, 5),
    4096: (7, 5, 5, 5, 5),
    16384: (8, 8, 8, 6, 5),
    65536: (8, 8, 8, 5, 5, 5),
}
"""Values per channel that stand in for a codebook of a power of two (arXiv:2309.15505, table 1; 512: ours, exactly)."""


def values_for(kind: QuantizerKind, codebook_size: int) -> tuple[int, ...]:
    """The values per channel of a grid of about `codebook_size` codewords (FSQ), or of just as many (those of bits).

    Raises:
        ValueError: if there is none, saying which sizes are expected.
    """
    if kind == "fsq":
        if codebook_size in FSQ_VALUES:
            return FSQ_VALUES[codebook_size]
        raise ValueError(f"one of {', '.join(map(str, FSQ_VALUES))} for fsq without values_per_channel")
    if isinstance(codebook_size, int) and codebook_size >= 2 and not codebook_size & (codebook_size - 1):
        return (2,) * (codebook_size.bit_length() - 1)
    raise ValueError(f"a power of two for {kind}, whose channels are bits")


class GridQuantizer(VectorQuantizer):
    """A codebook that is not learned: each channel takes one of a few evenly spaced values, whatever the others take.

        FSQ   values_per_channel[i] values from -1 to 1      latents are clipped there; a loss on what is beyond
        LFQ   -1 or 1                                        the same
        BSQ   -1 or 1, over sqrt(D)                          latents are unit vectors

    FSQ as published bounds latents by tanh, and its codewords are nearest only behind it; clipped, they are nearest in
    the latents themselves. LFQ as published pulls latents to their codewords; inside the range the entropy term does. The entropy term, which FSQ is given too, is LFQ's, equation 4, with q(c | z) in proportion to
    exp(-|z - c|^2 / s^2) and s half the distance of two values. q is a product over the channels, so that the mean of all
    codewords' shares is one product of two matrices, those of either half of the channels.

    Args:
        kind: "fsq", "lfq" or "bsq" (SuccessiveSigns has its own class).
        values_per_channel: FSQ's "levels"; 2 for each channel of the others.
        beta: weight of the loss on what is beyond the range.
    """

    is_fixed = True

    def __init__(self, kind: GridKind, values_per_channel: tuple[int, ...], *, beta: float = 0.25):
        if kind not in get_args(GridKind):
            raise ValueError(f'quantizer is {kind!r}; expected "vq", "fsq", "lfq", "lfq-successive" or "bsq"')
        if not values_per_channel or any(number < 2 for number in values_per_channel):
            raise ValueError(
                f"expected values_per_channel of 2 and above, one for each channel, got {values_per_channel}"
            )
        if kind != "fsq" and set(values_per_channel) != {2}:
            raise ValueError(
                f"expected values_per_channel of 2 only, those of {kind}, got {values_per_channel}"
            )
        super().__init__(math.prod(values_per_channel), len(values_per_channel), beta=beta)
        self.kind, self.values_per_channel = kind, tuple(values_per_channel)
        self.limit = 1 / math.sqrt(self.dim) if kind == "bsq" else 1.0
        self.entropy_weight = 0.01 if kind == "fsq" else 0.02
        """Of E[H(q(c | z))] - H(E[q(c | z)]) in `loss`; set by whoever trains."""
        axes = [torch.linspace(-self.limit, self.limit, number) for number in values_per_channel]
        points = torch.cartesian_prod(*axes).view(-1, self.dim)
        self.embedding.weight.data.copy_(points)
        self.embedding.weight.requires_grad_(False)

    def assign(self, latents: Tensor) -> Tensor:
        """Indices of the nearest codewords, int64 (B, h, w), of latents (B, D, h, w), the first where several are.

        The first channel counts most.
        """
        return self._indices(self.prepare(at_least_float32(latents.detach())))

    def prepare(self, latents: Tensor) -> Tensor:
        """What the grid is laid over, (B, D, h, w): the latents as they are."""
        return latents

    def start_from(self, vectors: Tensor) -> Tensor:
        """The matrix (D, D) that brings latents to the grid as a training begins.

        Of `vectors`, float64 (N, D) of mean 0. It whitens them, with the grid's own variance for each channel, by the
        symmetric square root, which changes each channel least. Directions of less than a thousandth of the largest
        variance stay as small as those of a thousandth would become.
        """
        values, directions = torch.linalg.eigh(vectors.T.cov().view(self.dim, -1))
        scales = values.clamp_min(1e-3 * values[-1].clamp_min(1e-12)).rsqrt()
        spread = self.embedding.weight.double().std(0, correction=0)
        return spread[:, None] * (directions * scales @ directions.T)

    def _indices(self, z: Tensor) -> Tensor:
        indices = torch.zeros_like(z[:, 0], dtype=torch.int64)
        for channel, number in zip(z.unbind(1), self.values_per_channel):
            steps = (channel / self.limit + 1) / 2 * (number - 1)
            indices = indices * number + (steps - 0.5).ceil().clamp(0, number - 1).to(torch.int64)
        return indices

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize `latents`, (B, D, h, w), in float32 where their dtype has fewer digits.

        Nothing moves a codeword, so that `codebook_loss` is 0. `commitment_loss` is the squared distance from the
        range, 0 of BSQ. Errors are those of VectorQuantizer.
        """
        check_shape(latents, "latents", ("B", self.dim, "h", "w"))
        with torch.autocast(latents.device.type, enabled=False):
            z = self.prepare(at_least_float32(latents))
            indices = self._indices(z.detach())
            zero = z.new_zeros(())
            codewords = self.lookup(indices).to(z.dtype)
            if self.kind == "bsq":
                z, commitment_loss = F.normalize(z, dim=1), zero
            else:
                inside = z.clamp(-self.limit, self.limit)
                commitment_loss, z = F.mse_loss(z, inside), inside
            entropy_loss = self.entropy_loss(z) if self.entropy_weight else None
            quantized = z if self.bypassed else straight_through(z, codewords)
        counts = count_indices(indices.flatten(), self.codebook_size)
        return QuantizerOutput(
            quantized.to(latents.dtype).contiguous(),
            indices,
            commitment_loss,
            zero,
            perplexity(counts),
            z.to(latents.dtype),
            entropy_loss=entropy_loss,
        )

    def entropy_loss(self, z: Tensor) -> Tensor:
        """E[H(q(c | z))] - H(E[q(c | z)]), in nats: each latent sure of its codeword, all codewords used alike."""
        shares, entropy = [], z.new_zeros(())
        for channel, number in zip(z.unbind(1), self.values_per_channel):
            values = torch.linspace(-self.limit, self.limit, number, dtype=z.dtype, device=z.device)
            distances = (channel.reshape(-1, 1) - values) * (number - 1) / self.limit  # in units of s
            log_q = (-distances.square()).log_softmax(1)
            shares.append(log_q.exp())
            entropy = entropy - (shares[-1] * log_q).sum(1).mean()
        half = len(shares) // 2
        first, second = (_products(part, z) for part in (shares[:half], shares[half:]))
        mean = first.T @ second / len(first)  # of every codeword's share
        return (
            entropy + (mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()
        )  # finite at 0, and its gradient

    def loss(self, output: QuantizerOutput) -> Tensor:
        """The weighted sum of an output's terms. Also before the codebook begins: latents find their range until then."""
        loss = self.beta * output.commitment_loss
        return loss if output.entropy_loss is None else loss + self.entropy_weight * output.entropy_loss


class SuccessiveSigns(GridQuantizer):
    """LFQ whose channels see the signs before them: a residual quantizer of one bit at a time.

        b_k = sign(z_k),    z_k = a_k + sum_{j<k} U_kj b_j        of latents a

    as a successive-approximation converter finds one binary digit after another. D planes divide a space of few dimensions
    into few cells, and most of LFQ's codewords are never needed; here each plane's place depends on the side of those
    before it, so that a direction can have as many bits as it is worth. U learns by gradient, through the
    signs by the straight-through estimator. Codewords and indices are LFQ's; but they are nearest to z, not to the latents, so
    that plain VQModel decodes indices alike, and finds other ones for latents.
    """

    RATE = 10.0  # `feedback` is U divided by it: U is of the order of 1, and learns as fast as weights of a tenth would

    def __init__(self, values_per_channel: tuple[int, ...], *, beta: float = 0.25):
        super().__init__("lfq", values_per_channel, beta=beta)
        self.feedback = torch.nn.Parameter(torch.zeros(self.dim, self.dim))
        """Only what is below the diagonal counts."""

    def prepare(self, latents: Tensor) -> Tensor:
        """z of the latents a, (B, D, h, w)."""
        # In the latents' precision, whatever the caller's: a sign must not depend on it.
        columns = (self.RATE * self.feedback.tril(-1)).to(latents.dtype).T.reshape(self.dim, -1, 1, 1)
        z = latents
        for channel, column in enumerate(columns[:-1]):
            inside = z[:, channel : channel + 1].clamp(-1, 1)
            z = z + column * straight_through(inside, torch.where(inside > 0, 1.0, -1.0))
        return z

    @torch.no_grad()
    def start_from(self, vectors: Tensor) -> Tensor:
        """The directions (D, D) that a training begins with; sets U.

        Of `vectors`, float64 (N, D) of mean 0: each sign is that along the principal direction of what the signs before
        it leave.
        """
        # Nothing is left where vectors are few.
        least = (1e-3 * vectors.square().mean().sqrt()).clamp_min(1e-6)
        rest, directions, steps = vectors, [], []
        feedback = torch.zeros_like(self.feedback, dtype=torch.float64)
        for channel in range(self.dim):
            direction = torch.linalg.eigh(rest.T.cov().view(self.dim, -1))[1][:, -1]
            along = rest @ direction
            # If z is uniform in [-1, 1], its mean absolute value is a half.
            direction = direction / torch.maximum(2 * along.abs().mean(), least)
            signs = torch.where(along > 0, 1.0, -1.0).double()
            for earlier, step in enumerate(steps):
                feedback[channel, earlier] = -direction @ step
            directions.append(direction)
            steps.append(signs @ rest / len(rest))
            rest = rest - signs[:, None] * steps[-1]
        self.feedback.copy_(feedback / self.RATE)
        return torch.stack(directions)


def _products(shares: list[Tensor], like: Tensor) -> Tensor:
    """Shares of independent choices, (N, K_i) each -> those of all their combinations, (N, K_1 K_2 ...)."""
    joint = like.new_ones(like[:, 0].numel(), 1)
    for each in shares:
        joint = (joint[:, :, None] * each[:, None]).flatten(1)
    return joint


def build_quantizer(
    kind: QuantizerKind,
    codebook_size: int,
    dim: int,
    values_per_channel: tuple[int, ...] | None = None,
    *,
    beta: float,
    **learned,
) -> VectorQuantizer:
    """A VectorQuantizer ("vq") or a GridQuantizer, as a model's config has it.

    Args:
        codebook_size, dim: which a grid must have.
        values_per_channel: of "fsq"; None: 2 each, those of the others.
        beta: of either.
        learned: legacy, gradient and l2_normalized, which only "vq" has.

    Raises:
        ValueError: for settings that do not go together.
    """
    if kind == "vq":
        if values_per_channel is not None:
            raise ValueError(
                f'expected no values_per_channel of the quantizer "vq", got {values_per_channel}'
            )
        return VectorQuantizer(codebook_size, dim, beta=beta, **learned)
    if learned["legacy"] or learned["l2_normalized"] or learned["gradient"] != "straight-through":
        raise ValueError(
            f'expected legacy, gradient and l2_normalized at their defaults for the quantizer "{kind}", got {learned}'
        )
    values = values_per_channel or (2,) * dim
    successive = kind == "lfq-successive"
    quantizer = SuccessiveSigns(values, beta=beta) if successive else GridQuantizer(kind, values, beta=beta)
    if (quantizer.codebook_size, quantizer.dim) != (codebook_size, dim):
        raise ValueError(
            f"expected a codebook of {quantizer.codebook_size} codewords of {quantizer.dim} numbers, those of {kind} with "
            f"values_per_channel {quantizer.values_per_channel}, got {codebook_size} of {dim}"
        )
    return quantizer
