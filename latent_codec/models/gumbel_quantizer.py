"""The quantizer of Gumbel VQGANs and of DALL-E's dVAE: a linear layer, not a distance, chooses the codeword."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec.models.quantizers import (
    QuantizerOutput,
    VectorQuantizer,
    at_least_float32,
    count_indices,
    highest_scores,
    perplexity,
)
from latent_codec.tensors import check_shape


class GumbelQuantizer(VectorQuantizer):
    """A codebook whose indices have probabilities q = softmax(proj(z)): taming-transformers' GumbelVQ.

        latents --proj--> logits --argmax | Gumbel noise, argmax--> indices --codebook--> quantized

    The most probable codeword is taken. In training mode, where gradients are computed, one is drawn instead: the
    argmax of logits + g, g standard Gumbel noise. Gradients with respect to latents are those of the mean codeword under
    softmax((logits + g) / temperature): the straight-through Gumbel-softmax (arXiv:1611.01144, section 2.2; of a
    codebook: arXiv:2102.12092, section 2.1). Taming's own code draws at inference too, so that encoding an image twice
    gives other indices.

    Args:
        codebook_size: number of codewords.
        dim: their length, the latents' channels.
        kl_weight: of KL(q || uniform) in `loss`; 5e-4 is taming's quantizer's, its published configs have 1e-8.
    """

    has_distances = False

    def __init__(self, codebook_size: int, dim: int, *, kl_weight: float = 5e-4):
        super().__init__(codebook_size, dim)
        self.kl_weight = kl_weight
        self.temperature = 1.0
        """Of the relaxed draw; whoever trains lowers it, which sharpens the draw and roughens its gradients."""
        self.proj = nn.Conv2d(dim, codebook_size, 1)

    def assign(self, latents: Tensor) -> Tensor:
        """Most probable indices, int64 (B, h, w), of latents (B, D, h, w)."""
        vectors = latents.detach().movedim(1, -1).reshape(-1, self.dim)
        indices = highest_scores(vectors, self.proj.weight[:, :, 0, 0], self.proj.bias)
        return indices.view(len(latents), *latents.shape[2:])

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Choose or draw codewords for `latents`, (B, D, h, w), in float32 where their dtype has fewer digits.

        Nothing draws latents and codewords together, so that `commitment_loss` and `codebook_loss` are 0. Errors are
        those of VectorQuantizer.
        """
        check_shape(latents, "latents", ("B", self.dim, "h", "w"))
        with torch.autocast(latents.device.type, enabled=False):
            z = at_least_float32(latents)
            logits = F.conv2d(z, self.proj.weight.to(z.dtype), self.proj.bias.to(z.dtype))
            log_q = logits.log_softmax(1)
            kl = (log_q.exp() * log_q).sum(1).mean() + math.log(self.codebook_size)
            if self.training and torch.is_grad_enabled():
                logits = logits - torch.empty_like(logits).exponential_().log()
                indices = logits.argmax(1)
            else:
                indices = self.assign(latents)
            quantized = self.lookup(indices).to(z.dtype)
            if torch.is_grad_enabled():
                shares = (logits / self.temperature).softmax(1)
                mean = torch.einsum("bkhw,kd->bdhw", shares, self.embedding.weight.detach().to(z.dtype))
                quantized = quantized + (mean - mean.detach())
        quantized = latents if self.bypassed else quantized.to(latents.dtype)
        counts = count_indices(indices.flatten(), self.codebook_size)
        zero = kl.new_zeros(())
        return QuantizerOutput(quantized.contiguous(), indices, zero, zero, perplexity(counts), latents, kl)

    def loss(self, output: QuantizerOutput) -> Tensor:
        """`kl_weight` times an output's KL: taming-transformers' GumbelQuantize, the prior term of a dVAE's ELBO."""
        return (0 if self.bypassed else self.kl_weight) * output.kl
