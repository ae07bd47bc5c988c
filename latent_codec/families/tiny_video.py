"""AutoencoderTinyVideo: TAEHV, which imitates a video autoencoder's latents, at one frame."""

from latent_codec.families.family import Config, Family


class TinyVideo(Family):
    """No posterior; it takes and gives images, and makes frames of them inside."""

    taken_as = ()
    has_posterior = False
    untiled = "no tiles were written for it"

    @classmethod
    def latent_shape(cls, config: Config) -> tuple[int, int]:
        return config["latent_channels"], config["patch_size"] * 2 ** len(config["encoder_time_strides"])
