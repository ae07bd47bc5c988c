"""The autoencoder objective: the forward pass that is trained, and its named loss terms.

image --corrupt--> encode --> posterior --mean | sample--> decode --> reconstruction
  |                        or latents --nearest codeword--^              |
  |                              |                                       |
  +---------- reconstruction, LPIPS, GAN terms --------------------------+
                            KL term, or commitment and codebook terms
"""

from collections.abc import Callable

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from latent_codec.codec import LatentCodec
from latent_codec.families import family_of
from latent_codec.metrics import load_lpips, round_to_8_bits
from latent_codec.models.context_network import LatentContext
from latent_codec.models.discriminator import PatchDiscriminator
from latent_codec.models.quantizers import QuantizerOutput
from latent_codec.training import losses
from latent_codec.training.build import Autoencoder
from latent_codec.training.config import ObjectiveConfig

ACTIVATION_BLOCKS = (ResnetBlock2D, Attention, Downsample2D, Upsample2D)
"""What the penalty on activations looks at."""


class AutoencoderObjective(nn.Module):
    """An autoencoder whose `forward` is the whole pass that training differentiates.

    Wrapped for several processes, its gradients synchronize, because nothing calls
    the autoencoder but through the wrapper.

    Args:
        autoencoder: trained in place; given hooks if there is a penalty on its activations.
        config: the objective.
        train_encoder: False trains the weights of its family's `decoder_keys` only, and keeps all other parts in
            evaluation mode, so that no batch norm of the encoder moves.
        context: the context model of its latents that is trained with it, where rate counts.
        pipeline: whose latents these are, as `LatentCodec` takes it.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        config: ObjectiveConfig,
        *,
        train_encoder: bool = True,
        context: LatentContext | None = None,
        pipeline: str | None = None,
    ):
        super().__init__()
        self.context, self.pipeline = context, pipeline
        self.autoencoder = autoencoder
        self.config = config
        self.train_encoder = train_encoder
        self.family = family_of(autoencoder)
        self.is_discrete = bool(self.family.levels)
        self._kept = [] if train_encoder else _keep_but_decoder(autoencoder)
        if config.reconstruction == "gaussian" and config.gaussian_std is None:
            self.log_std = nn.Parameter(torch.tensor(-1.0))
        elif config.reconstruction == "gaussian":
            self.register_buffer("log_std", torch.tensor(config.gaussian_std).log())
        self._penalties: list[Tensor] = []
        if config.activation_weight:
            for module in autoencoder.modules():
                if isinstance(module, ACTIVATION_BLOCKS):
                    module.register_forward_hook(self._collect_penalty)

    def train(self, mode: bool = True) -> "AutoencoderObjective":
        super().train(mode)
        for part in self._kept:
            part.eval()
        return self

    def forward(
        self,
        image: Tensor,
        noise: Tensor | None,
        kept_levels: Tensor | None = None,
        transformation: losses.Transformation | None = None,
        *,
        quantizes: bool = True,
    ) -> dict[str, Tensor | list[QuantizerOutput]]:
        """Reconstruct `image`.

        Args:
            image: the encoder's input, (N, C, H, W), corrupted where the objective says so.
            noise: standard normal, shaped like the raw latents: the reparameterization's epsilon; not read where
                nothing is sampled.
            kept_levels: int64 (N,), of HierarchicalVQ: how many levels, from the top, each image is decoded from;
                None: from all.
            transformation: of the latents, which are then decoded once more; None: only as they are.
            quantizes: False keeps a context model's lesson from the autoencoder (`objective.rate_start`).

        Returns:
            `reconstruction`, shaped like `image`; `activation`, the activation penalty; and, where there are any, the
            posterior's `mean` and `log_variance`, or `levels`, what each quantizer gave, top level first; `latents`, raw ones
            or codewords, the finest level's; `transformed`, what the transformed latents decode to; and with a context
            model `bits_per_pixel` and `distortion_weight`, those of the step sizes that were drawn.
        """
        self._penalties.clear()
        encoder_learns = self.train_encoder and torch.is_grad_enabled()
        if self.is_discrete and self.family.trainable:
            with torch.set_grad_enabled(encoder_learns):
                levels = self.autoencoder.encode_quantized(image)
            quantized = [level.quantized for level in levels]
            if kept_levels is not None:
                quantized = self._keep_levels(quantized, kept_levels)
            decode, latents = self.autoencoder.decode_quantized, quantized
            code = {"levels": levels, "latents": quantized[-1]}
        else:
            with torch.set_grad_enabled(encoder_learns):
                posterior, raw_latents = self.family.encode_raw(image)
            code = {"latents": raw_latents}
            if posterior is not None:
                raw_latents = posterior.mean
                code = {"latents": raw_latents, "mean": posterior.mean, "log_variance": posterior.logvar}
                if self.config.posterior == "sample":
                    raw_latents = raw_latents + torch.exp(0.5 * posterior.logvar) * noise
            if self.context is not None:
                if quantizes:
                    raw_latents, rate = self._quantize(raw_latents)
                else:
                    _, rate = self._quantize(raw_latents.detach())
                    rate["distortion_weight"] = torch.ones_like(rate["distortion_weight"])
                code |= rate
            decode, latents = self.family.decode_raw, raw_latents
        reconstruction = decode(latents)
        if transformation is not None:
            is_list = isinstance(latents, list)
            moved = [transformation(grid) for grid in latents] if is_list else transformation(latents)
            code["transformed"] = decode(moved)
        penalty = torch.stack(self._penalties).sum() if self._penalties else image.new_zeros(())
        return {"reconstruction": reconstruction, "activation": penalty, **code}

    def reconstruction_term(self, image: Tensor, reconstruction: Tensor) -> tuple[str, Tensor]:
        """The reconstruction's name and value."""
        kind = self.config.reconstruction
        if kind == "l1":
            return "l1", F.l1_loss(reconstruction, image)
        if kind == "mse":
            return "mse", F.mse_loss(reconstruction, image)
        if kind == "gaussian":
            # Resized crops lie between the 8-bit levels whose mass the likelihood counts.
            levels = round_to_8_bits(image)
            return "gaussian_nll", losses.gaussian_nll(levels, reconstruction, self.log_std)
        return "bernoulli_nll", losses.bernoulli_nll(image, reconstruction)

    def _quantize(self, raw_latents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize raw latents as a compressed file does, and give the bits that it would take.

        The decoder gets rounded latents, with the gradient of rounding left out; the context model gets noise of the same
        width in its place, under which code lengths have gradients (Minnen and Singh, arXiv:2007.08739, section 3.3;
        Balle et al., arXiv:1611.01704, section 2). Step sizes are those of one quality, drawn anew for each call, and 2^(-q / 16) of the
        coarsest at quality q.

        Returns:
            Raw latents, and `bits_per_pixel` and `distortion_weight`, w = 2^(q / 8): at high rates distortion falls as the
            square of the step size, so that w D + rate_weight R asks for the same trade-off in units of every step size.
        """
        space = self.family.latent_space(self.pipeline)
        step_sizes = self.context.step_sizes()
        least, most = self.config.rate_qualities
        quality = int(torch.randint(least, min(most, len(step_sizes) - 1) + 1, ()))
        step_sizes = step_sizes[quality].to(raw_latents.device).expand(len(raw_latents), -1)
        scaled = space.normalize(raw_latents.float()) / step_sizes[..., None, None]
        bits = self.context(scaled + (torch.rand_like(scaled) - 0.5), step_sizes).sum()
        rounded = scaled + (scaled.round() - scaled).detach()
        num_pixels = scaled.numel() / scaled.shape[1] * space.downsampling_factor**2
        return space.denormalize(rounded * step_sizes[..., None, None]), {
            "bits_per_pixel": bits / num_pixels,
            "distortion_weight": bits.new_tensor(2 ** (2 * quality / self.context.STEPS_PER_OCTAVE)),
        }

    def _keep_levels(self, quantized: list[Tensor], kept_levels: Tensor) -> list[Tensor]:
        """Return each level's codewords, at their mean for the images that are not decoded from it."""
        kept = [quantized[0]]
        for level, codewords in enumerate(quantized[1:], 1):
            if self.autoencoder.quantizers[level].bypassed:
                mean = codewords.detach().mean((0, 2, 3))
            else:
                mean = self.autoencoder.mean_codeword(level)
            is_kept = (kept_levels > level)[:, None, None, None]
            kept.append(torch.where(is_kept, codewords, mean[None, :, None, None].to(codewords)))
        return kept

    def _collect_penalty(self, module: nn.Module, inputs, output: Tensor) -> None:
        if torch.is_grad_enabled():
            excess = F.relu(output.float().abs() / self.config.activation_limit - 1)
            self._penalties.append(excess.square().mean())


class ObjectiveTerms:
    """The named terms of one step's loss, and the networks that judge the autoencoder.

    Args:
        objective: not wrapped; read for its settings, its likelihood and its last layer.
        codebook_weight: of the commitment and codebook terms together.
        binarized: the data is only -1 and 1, so that a Bernoulli likelihood counts as bits.
        reference: the codec whose latents these should stay near; of one latent space with the objective's.
        discriminator: not wrapped; None without a GAN term.
        mean_over_processes: averages a tensor over the processes of a run.
    """

    def __init__(
        self,
        objective: AutoencoderObjective,
        *,
        codebook_weight: float = 1.0,
        binarized: bool = False,
        reference: LatentCodec | None = None,
        discriminator: PatchDiscriminator | None = None,
        mean_over_processes: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ):
        self.objective = objective
        self.config = objective.config
        self.codebook_weight = codebook_weight
        self.reference = reference
        self.discriminator = discriminator
        self.mean_over_processes = mean_over_processes
        self.counts_bits = objective.family.has_posterior and (
            self.config.reconstruction == "gaussian"
            or (self.config.reconstruction == "bernoulli" and binarized)
        )
        self.lpips = load_lpips(self.config.lpips_net) if self.config.lpips_weight else None

    def to(self, device: torch.device) -> "ObjectiveTerms":
        if self.lpips is not None:
            self.lpips.to(device)
        if self.reference is not None:
            self.reference.to(device)
        return self

    def autoencoder_loss(
        self,
        image: Tensor,
        outputs: dict[str, Tensor],
        step: int,
        transformation: losses.Transformation | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of all terms, and every term by name.

        `kl` and a likelihood are nats per dimension of the image, `bits_per_dim` (likelihoods
        only) is the negative ELBO in bits per dimension, an upper bound of the code length.
        `commitment` and `codebook` are those of a quantizer; of several `commitment_1`, the top level's, and so on.

        Args:
            image: the clean target, (N, C, H, W).
            outputs: what AutoencoderObjective's forward returned.
            step: for the terms that start late.
            transformation: that `outputs["transformed"]` was decoded with.
        """
        config, reconstruction = self.config, outputs["reconstruction"].float()
        name, fidelity = self.objective.reconstruction_term(image, reconstruction)
        terms = {name: fidelity}
        if self.lpips is not None and step >= config.lpips_start:
            terms["lpips"] = self.lpips(reconstruction, image).mean()
            fidelity = fidelity + config.lpips_weight * terms["lpips"]
        if config.color_weight:
            terms["color"] = losses.color_distance(image, reconstruction)
            fidelity = fidelity + config.color_weight * terms["color"]
        loss = fidelity
        if "levels" in outputs:
            quantizers = self.objective.autoencoder.quantizers
            for suffix, quantizer, level in zip(
                level_suffixes(len(quantizers)), quantizers, outputs["levels"]
            ):
                loss = loss + self.codebook_weight * quantizer.loss(level)
                if not quantizer.bypassed:
                    terms[f"commitment{suffix}"] = level.commitment_loss
                    terms[f"codebook{suffix}"] = level.codebook_loss
                    extra = {"entropy": level.entropy_loss, "codeword_kl": level.kl}
                    terms |= {f"{name}{suffix}": term for name, term in extra.items() if term is not None}
        elif config.posterior == "sample" and "mean" in outputs:
            nats = losses.kl_divergence(outputs["mean"].float(), outputs["log_variance"].float()).sum()
            terms["kl"] = nats / image.numel()
            loss = loss + config.kl_weight * terms["kl"]
        if "bits_per_pixel" in outputs:
            terms["bits_per_pixel"] = outputs["bits_per_pixel"]
            weight = outputs["distortion_weight"]
            # Over the square root: D falls, and R grows, so that all qualities weigh alike on the network that they share.
            loss = (weight * loss + config.rate_weight * terms["bits_per_pixel"]) / weight.sqrt()
        if "transformed" in outputs:
            wanted, moved = transformation(image), outputs["transformed"].float()
            terms["equivariance"] = self.objective.reconstruction_term(wanted, moved)[1]
            loss = loss + config.equivariance_weight * terms["equivariance"]
        if config.spectrum_weight:
            terms["spectrum"] = losses.spectral_distance(outputs["latents"], image)
            loss = loss + config.spectrum_weight * terms["spectrum"]
        if self.reference is not None:
            latents = self.reference.latent_space.normalize(outputs["latents"].float())
            terms["reference"] = (latents - self.reference.encode(image)).square().mean()
            loss = loss + config.reference_weight * terms["reference"]
        if config.activation_weight:
            terms["activation"] = outputs["activation"]
            loss = loss + config.activation_weight * terms["activation"]
        if self.discriminator is not None and step >= config.gan_start:
            self.discriminator.requires_grad_(False)  # this step's gradients are only the autoencoder's
            terms["gan"] = -self.discriminator(reconstruction).mean()
            terms["gan_adaptive_weight"] = losses.adaptive_gan_weight(
                fidelity,
                terms["gan"],
                self.objective.family.last_layer.weight,
                config.gan_max_adaptive_weight,
                self.mean_over_processes,
            )
            share = config.gan_weight * losses.ramp(step, config.gan_start, config.gan_ramp)
            loss = loss + share * terms["gan_adaptive_weight"] * terms["gan"]
            self.discriminator.requires_grad_(True)
        if self.counts_bits:
            terms["bits_per_dim"] = losses.nats_to_bits_per_dim((terms[name] + terms.get("kl", 0)).detach())
        with torch.no_grad():
            error = F.mse_loss(reconstruction.clamp(-1, 1), image, reduction="none").mean((1, 2, 3))
            terms["psnr"] = (10 * torch.log10(4 / error.clamp_min(1e-10))).mean()
        return loss, terms

    @staticmethod
    def discriminator_loss(
        discriminator: nn.Module, image: Tensor, reconstruction: Tensor
    ) -> dict[str, Tensor]:
        """The discriminator's hinge loss; no gradient reaches the autoencoder.

        Args:
            discriminator: as prepared for several processes.
            image: real, (N, C, H, W).
            reconstruction: the autoencoder's, detached here.
        """
        real, fake = discriminator(torch.cat([image, reconstruction.detach()])).float().chunk(2)
        return {
            "discriminator": losses.hinge_discriminator_loss(real, fake),
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
        }


def level_suffixes(num_levels: int) -> list[str]:
    """Suffixes of the terms of several quantizers: "" for a single one, else "_1" (the top level), "_2", ..."""
    return [""] if num_levels == 1 else [f"_{number}" for number in range(1, num_levels + 1)]


def _keep_but_decoder(autoencoder: Autoencoder) -> list[nn.Module]:
    """Take all weights but the decoder's out of training, and return the parts that hold none of the decoder's."""
    keys = family_of(autoencoder).decoder_keys(autoencoder.config)
    for name, parameter in autoencoder.named_parameters():
        parameter.requires_grad_(name.startswith(keys))
    return [
        part
        for name, part in autoencoder.named_modules()
        if name and not f"{name}.".startswith(keys) and not any(key.startswith(f"{name}.") for key in keys)
    ]
