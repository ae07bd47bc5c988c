"""Moved to `work/codec_copies.py`."""


def folder_for_sidecar(*args):
    from latent_codec.cli.work import codec_copies

    return codec_copies.folder_for_sidecar(*args)
