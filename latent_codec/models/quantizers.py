"""Vector quantization: the search, the gradients through it, the loss terms, and how a codebook is learned.

    latents --nearest codeword--> indices --codebook--> quantized --straight-through | rotation--> decoder
       |                             |
       +---- commitment, codebook ---+         CodebookLearner: k-means start, moving average, restarts

A model holds a `VectorQuantizer`, whose only weights are the codewords; what a training
must remember about them (how often each was used, and by what) is a `CodebookLearner`'s.
"""

import math
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec.tensors import check_shape

GradientEstimator = Literal["straight-through", "rotation"]

SCORES_AT_ONCE = 2**22
"""Vectors times codewords whose scores are kept at a time: 16 MB."""

DEAD_BELOW = 0.01
"""Share of the mean usage below which a codeword counts as dead."""


class QuantizerOutput(NamedTuple):
    """Latents snapped to a codebook; its losses are unweighted means over all values."""

    quantized: Tensor
    """(B, D, h, w), in the latents' dtype; gradients reach the latents by the quantizer's estimator."""
    indices: Tensor
    """int64 (B, h, w)."""
    commitment_loss: Tensor
    """||z - sg[e]||^2: moves the encoder's output towards the codewords."""
    codebook_loss: Tensor
    """||sg[z] - e||^2: moves the codewords towards the encoder's output."""
    perplexity: Tensor
    """exp of the entropy (in nats) of the indices' frequencies: 1 to codebook_size."""
    latents: Tensor
    """Latents before quantization, (B, D, h, w): unit vectors where the quantizer normalizes."""
    kl: Tensor | None = None
    """KL(q || uniform) in nats per position, of a quantizer that samples indices (gumbel_quantizer.py)."""
    entropy_loss: Tensor | None = None
    """In nats, of a quantizer that keeps its codewords in use by it (grid_quantizer.py)."""


class VectorQuantizer(nn.Module):
    """A codebook, and the step from latents to it (VQ-VAE, arXiv:1711.00937, equations 1-3).

    Args:
        codebook_size: number of codewords.
        dim: their length, the latents' channels.
        beta: weight of the commitment term against the codebook term.
        legacy: beta weighs the codebook term instead, as in the first published VQGAN and diffusers' `legacy=True`.
        gradient: "straight-through" (section 3.2), or "rotation" (arXiv:2410.06424, equation 4), which turns and
            scales a gradient as it turned and scaled the vector.
        l2_normalized: compare only directions: latents and codewords are unit vectors (arXiv:2110.04627, 3.2).
    """

    is_fixed: ClassVar[bool] = False
    """Whether codewords stay where they are (grid_quantizer.py)."""
    has_distances: ClassVar[bool] = True
    """Whether latents choose what is near them: else neither k-means nor averages of latents make codewords
    (gumbel_quantizer.py)."""

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        beta: float = 0.25,
        legacy: bool = False,
        gradient: GradientEstimator = "straight-through",
        l2_normalized: bool = False,
    ):
        super().__init__()
        if gradient not in ("straight-through", "rotation"):
            raise ValueError(f'gradient is {gradient!r}; expected "straight-through" or "rotation"')
        if codebook_size < 1 or dim < 1:
            raise ValueError(f"codebook_size is {codebook_size} and dim {dim}; both are at least 1.")
        self.beta, self.legacy = beta, legacy
        self.gradient, self.l2_normalized = gradient, l2_normalized
        self.bypassed = False
        """True lets latents through unquantized: the same network as a plain autoencoder, for comparison."""
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        self.project_codebook()

    @property
    def codebook_size(self) -> int:
        return self.embedding.num_embeddings

    @property
    def dim(self) -> int:
        return self.embedding.embedding_dim

    @torch.no_grad()
    def project_codebook(self) -> None:
        """Put codewords back onto the unit sphere where they belong there; to be called after they changed."""
        if self.l2_normalized:
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=1))

    def assign(self, latents: Tensor) -> Tensor:
        """Indices of the nearest codewords, int64 (B, h, w), of latents (B, D, h, w)."""
        # Normalizing the latents would change no answer: among unit codewords the nearest is the one best aligned.
        vectors = latents.detach().movedim(1, -1).reshape(-1, self.dim)
        return nearest_codewords(vectors, self.embedding.weight).view(len(latents), *latents.shape[2:])

    def lookup(self, indices: Tensor) -> Tensor:
        """Codewords (B, D, h, w) of `indices` (B, h, w)."""
        return self.embedding(indices).movedim(-1, 1).contiguous()

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize `latents`, (B, D, h, w), in float32 where their dtype has fewer digits.

        Raises:
            ValueError: if they have another number of channels than the codewords.
        """
        check_shape(latents, "latents", ("B", self.dim, "h", "w"))
        # Of the given latents: in half precision unit vectors would be rounded again.
        indices = self.assign(latents)
        if self.l2_normalized:
            latents = F.normalize(at_least_float32(latents), dim=1).to(latents.dtype)
        z = at_least_float32(latents)
        codewords = self.lookup(indices).to(z.dtype)
        commitment_loss = F.mse_loss(z, codewords.detach())
        codebook_loss = F.mse_loss(codewords, z.detach())
        rotates = self.gradient == "rotation" and z.requires_grad
        estimate = rotate if rotates else straight_through
        quantized = latents if self.bypassed else estimate(z, codewords.detach()).to(latents.dtype)
        quantized = quantized.contiguous()  # one layout, whatever the encoder's, so that decoders round alike
        counts = count_indices(indices.flatten(), self.codebook_size)
        return QuantizerOutput(
            quantized, indices, commitment_loss, codebook_loss, perplexity(counts), latents
        )

    def loss(self, output: QuantizerOutput) -> Tensor:
        """The weighted sum of an output's terms: VQ-VAE, equation 3, behind the reconstruction.

        The codebook term is left out while codewords take no gradient, because a moving average sets them.
        """
        if self.bypassed:
            return 0 * output.codebook_loss  # DDP waits for every weight to have a gradient
        commitment_weight, codebook_weight = (1.0, self.beta) if self.legacy else (self.beta, 1.0)
        loss = commitment_weight * output.commitment_loss
        return loss + codebook_weight * output.codebook_loss if self.embedding.weight.requires_grad else loss


def nearest_codewords(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of each vector's nearest codeword (VQ-VAE, arXiv:1711.00937, equation 1), the first where several are.

    argmin_k |z - e_k|^2 = argmax_k (z . e_k - |e_k|^2 / 2).

    Args:
        vectors: (N, D), any floating dtype.
        codebook: (K, D).

    Returns:
        int64 (N,).
    """
    codewords = at_least_float32(codebook.detach())
    return highest_scores(vectors, codewords, codewords.square().sum(1) / -2)


@torch.no_grad()
def highest_scores(vectors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """argmax_k (z . w_k + b_k) of each vector z, the first where several are equal.

    At least in float32: half precision's rounding can change which one wins. The scores of all pairs never exist at
    once.

    Args:
        vectors: (N, D), any floating dtype.
        weight: (K, D).
        bias: (K,).

    Returns:
        int64 (N,).
    """
    dtype = torch.promote_types(at_least_float32(weight).dtype, vectors.dtype)
    with torch.autocast(vectors.device.type, enabled=False):
        columns, bias = weight.to(dtype).T, bias.to(dtype)
        num_rows = min(max(SCORES_AT_ONCE // len(bias), 1), max(len(vectors), 1))
        # Written in place: blocks that are freed one by one between small results never come together again.
        scores = bias.new_empty(num_rows, len(bias))
        indices = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
        for chunk, highest in zip(vectors.split(num_rows), indices.split(num_rows)):
            part = torch.addmm(bias, chunk.to(dtype), columns, out=scores[: len(chunk)])
            torch.argmax(part, 1, out=highest)
    return indices


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or in float64 where that is what it has."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def straight_through(z: Tensor, codewords: Tensor) -> Tensor:
    """`codewords`, with the identity as their gradient with respect to `z` (VQ-VAE, section 3.2)."""
    # Rounds as diffusers.VQModel does, which then decodes to the same bits.
    return z + (codewords - z).detach()


def rotate(z: Tensor, codewords: Tensor) -> Tensor:
    """`codewords`, reached from `z` by a rotation and a scale that count as constants in the backward pass.

    q = |e|/|z| (z - 2 w w'z + 2 e' z'z) with unit vectors z' and e' and w = (z' + e') / |z' + e'|: the rotation
    trick (Fifty et al., arXiv:2410.06424, equation 4). Gradients keep their angle to the codeword, which the
    straight-through estimator forgets. A vector too short to have a direction passes them straight through; its
    scale would be without bound.

    Args:
        z: encoder output, (B, D, h, w).
        codewords: those of `z`, without gradient, same shape.
    """
    with torch.no_grad():
        length = z.norm(dim=1, keepdim=True)
        has_direction = length > 1e-6
        source, target = (F.normalize(each, dim=1) * has_direction for each in (z, codewords))
        middle = F.normalize(source + target, dim=1)
        scale = torch.where(has_direction, codewords.norm(dim=1, keepdim=True) / length, 1.0)

    def project(direction: Tensor) -> Tensor:
        return (z * direction).sum(1, keepdim=True)

    rotated = scale * (z - 2 * project(middle) * middle + 2 * project(source) * target)
    return codewords + (rotated - rotated.detach())  # the value to the bit


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of frequencies `counts`, (K,): as many codewords, used alike, would be as uncertain."""
    shares = counts.float() / counts.sum().clamp_min(1)
    return torch.exp(-torch.xlogy(shares, shares).sum())


@torch.no_grad()
def k_means(
    vectors: Tensor,
    num_clusters: int,
    *,
    num_iterations: int = 20,
    seed: int = 0,
    normalize: bool = False,
) -> Tensor:
    """Centers of `vectors` by Lloyd's algorithm (1982), begun as k-means++ (Arthur and Vassilvitskii, 2007).

    Each first center is one of the vectors, drawn in proportion to its squared distance from those drawn before, a
    64th of them at a time. A center that loses all its vectors moves to one of them drawn at random. Computed on
    the CPU, so that every process of a run gets the same.

    Args:
        vectors: (N, D). With fewer than `num_clusters`, some centers are copies with a little noise.
        normalize: by directions only, with unit vectors as centers: spherical k-means.

    Returns:
        (num_clusters, D), float32.

    Raises:
        ValueError: if there is no vector, or one is not finite.
    """
    vectors = vectors.detach().float().cpu()
    if not len(vectors) or not vectors.isfinite().all():
        raise ValueError(f"k-means of {len(vectors)} vectors: at least one, and all finite, are needed.")
    if normalize:
        vectors = F.normalize(vectors, dim=1)
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        order = [torch.randperm(len(vectors), generator=generator) for _ in range(-(-count // len(vectors)))]
        drawn = vectors[torch.cat(order)[:count]]
        noise = torch.randn(drawn.shape, generator=generator)
        return drawn + 1e-4 * vectors.std(0, correction=0) * noise

    centers = draw(1)
    distances = torch.full((len(vectors),), math.inf, dtype=torch.float64)
    newest = centers
    while len(centers) < num_clusters:
        offsets = vectors - newest[nearest_codewords(vectors, newest)]
        distances = torch.minimum(distances, offsets.double().square().sum(1))
        bounds = distances.cumsum(0)
        count = min(-(-num_clusters // 64), num_clusters - len(centers))
        places = torch.rand(count, dtype=torch.float64, generator=generator) * bounds[-1]
        chosen = torch.searchsorted(bounds, places, right=True).clamp_max(len(vectors) - 1)
        newest = vectors[chosen] if bounds[-1] > 0 else draw(count)
        centers = torch.cat([centers, newest])
    for _ in range(num_iterations):
        indices = nearest_codewords(vectors, centers)
        counts, sums = codeword_sums(vectors, indices, num_clusters)
        empty = counts == 0
        centers = torch.where(empty[:, None], centers, sums / counts.clamp_min(1)[:, None])
        if empty.any():
            centers[empty] = draw(int(empty.sum()))
        if normalize:
            centers = F.normalize(centers, dim=1)
    return centers


def count_indices(indices: Tensor, codebook_size: int) -> Tensor:
    """Count each of 0..K - 1 in `indices` (N,): int64 (K,). Unlike torch.bincount it does not wait for the device."""
    return indices.new_zeros(codebook_size).scatter_add_(0, indices, torch.ones_like(indices))


def codeword_sums(vectors: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Count, float (K,), and sum, (K, D), of the `vectors` (N, D) that chose each codeword."""
    counts = count_indices(indices, codebook_size).to(vectors.dtype)
    return counts, vectors.new_zeros(codebook_size, vectors.shape[1]).index_add_(0, indices, vectors)


class CodebookLearner(nn.Module):
    """Track the usage of a codebook during training; update and restart codewords after each step.

    Its buffers belong into the checkpoint. Every process observes its own batches; `update` sums over all of
    them, does the same everywhere, and does not wait for the device.

    Args:
        quantizer: whose codewords are changed in place.
        learning: "ema" sets each codeword to the moving average of what chose it (VQ-VAE, arXiv:1711.00937,
            appendix A.1); "gradient" leaves that to the optimizer and the codebook loss. Fixed codewords are only
            counted; a GumbelQuantizer's always learn by gradient, and none moves to a latent.
        decay: of the moving averages, of the usage's also where learning is by gradient.
        restart_below: a codeword used less than this share of the mean moves to a live latent; 0: never.
        seed: of the choice among latents.
    """

    quantizer: VectorQuantizer
    NUM_CANDIDATES = 1024  # latents per process and step among which restarted codewords choose

    def __init__(
        self,
        quantizer: VectorQuantizer,
        *,
        learning: Literal["ema", "gradient"] = "ema",
        decay: float = 0.99,
        restart_below: float = 0.03,
        seed: int = 0,
    ):
        super().__init__()
        self.__dict__["quantizer"] = quantizer  # not a submodule: its weights are the model's
        self.learning, self.decay, self.restart_below, self.seed = learning, decay, restart_below, seed
        if quantizer.is_fixed or not quantizer.has_distances:
            self.learning, self.restart_below = (None if quantizer.is_fixed else "gradient"), 0.0
        size, dim = quantizer.embedding.weight.shape
        quantizer.embedding.weight.requires_grad_(self.learning == "gradient")
        self.register_buffer("usage", torch.zeros(size))
        """Moving average of the latents per step that chose each codeword; all 0 before the first step."""
        self.register_buffer("sums", torch.zeros(size, dim))
        """Moving average of those latents' sum."""
        self._observed: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def observe(self, output: QuantizerOutput) -> None:
        """Remember a micro-batch until `update`."""
        vectors = output.latents.detach().float().movedim(1, -1).reshape(-1, self.quantizer.dim)
        self._observed.append((vectors, output.indices.flatten()))

    @torch.no_grad()
    def update(
        self,
        step: int,
        *,
        sum_over_processes: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Learn from what was observed since the last update, after the optimizer's step.

        Args:
            step: seeds the choice of restarted codewords.
            sum_over_processes: sums a tensor over the processes of a run.
            gather: concatenates the processes' tensors along the first dimension.

        Returns:
            `perplexity`, `used_codes` (chosen in this step), `dead_codes` (before any restart) and
            `restarted_codes`, float32; and which were restarted, bool (K,): their earlier averages mean nothing now.
        """
        quantizer, weight = self.quantizer, self.quantizer.embedding.weight
        vectors, indices = (torch.cat(parts) for parts in zip(*self._observed))
        self._observed.clear()
        counts, sums = (
            sum_over_processes(total) for total in codeword_sums(vectors, indices, quantizer.codebook_size)
        )
        is_first = ~self.usage.any()
        self.usage.copy_(torch.where(is_first, counts.mean(), self.usage))
        self.sums.copy_(torch.where(is_first, weight.float() * self.usage[:, None], self.sums))
        self.usage.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        if self.learning == "ema":
            # Laplace smoothing keeps a codeword that is hardly used from dividing by nothing.
            total, epsilon = self.usage.sum(), 1e-5
            smoothed = (self.usage + epsilon) / (total + len(self.usage) * epsilon) * total
            weight.copy_(self.sums / smoothed[:, None])
        num_dead = (self.usage < DEAD_BELOW * self.usage.mean()).sum()
        restarted = self._restart(vectors, step, gather)
        quantizer.project_codebook()
        terms = {
            "perplexity": perplexity(counts),
            "used_codes": (counts > 0).sum(),
            "dead_codes": num_dead,
            "restarted_codes": restarted.sum(),
        }
        return {name: term.float() for name, term in terms.items()}, restarted

    def _restart(self, vectors: Tensor, step: int, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """Move rare codewords to latents drawn from all processes' `vectors`; return which moved, bool (K,).

        No latent gets two codewords: where there are fewer, the other codewords wait for the next step. A moved
        codeword is granted the mean usage, so that it has about ln(1 / restart_below) / (1 - decay) steps to be
        chosen.
        """
        weight, mean_usage = self.quantizer.embedding.weight, self.usage.mean()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        drawn = torch.randperm(len(vectors), generator=generator)[: self.NUM_CANDIDATES]
        candidates = gather(vectors[drawn.to(vectors.device, non_blocking=True)])  # by every process
        order = torch.randperm(len(candidates), generator=generator)
        rare = self.usage < self.restart_below * mean_usage
        rank = rare.cumsum(0) - 1  # among the rare ones
        moved = rare & (rank < len(candidates))
        chosen = order.to(rank.device, non_blocking=True)[rank.clamp(0, len(candidates) - 1)]
        places = candidates[chosen]
        weight.copy_(torch.where(moved[:, None], places.to(weight.dtype), weight))
        self.usage.copy_(torch.where(moved, mean_usage, self.usage))
        self.sums.copy_(torch.where(moved[:, None], places * mean_usage, self.sums))
        return moved
