"""What a program does to torch and to modules around a codec, and must not change what the codec computes.

Autocast, a default device, inference mode and gradients are left for as long as `ignoring_caller_settings` runs.
The default dtype stays as it is, because it is one for all threads: nothing here asks for it. `torch.compile` wraps
modules, so that their weights have other names: `plain_state_dict` gives the names without it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def ignoring_caller_settings() -> Iterator[None]:
    """Compute without gradients and as written, whatever the caller has set; also a decorator.

    Results are ordinary tensors, not those of inference mode: a denoiser may train on them, and what is cached
    serves later calls.
    """
    accelerator = torch.accelerator.current_accelerator()
    device_types = {"cpu", "cpu" if accelerator is None else accelerator.type}
    with ExitStack() as settings:
        settings.enter_context(torch.inference_mode(False))
        settings.enter_context(torch.no_grad())
        for each in device_types:
            if torch.amp.is_autocast_available(each) and torch.is_autocast_enabled(each):
                settings.enter_context(torch.autocast(each, enabled=False))
        if torch.empty(0).device.type != "cpu":
            settings.enter_context(torch.device("cpu"))
        yield


class _InitializingNothing(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Make modules without memory for their weights and without initial values, which would take as long again."""
    with torch.device("meta"), _InitializingNothing():
        yield


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given, or `module` itself if it was not compiled."""
    while hasattr(module, "_orig_mod"):  # torch._dynamo, which has the class, takes 2 s to import
        module = module._orig_mod
    return module


def plain_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()` by the names that weights have where no part of it is compiled."""
    return {
        ".".join(part for part in key.split(".") if part != "_orig_mod"): tensor
        for key, tensor in module.state_dict().items()
    }


def usable_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it.

    Raises:
        ValueError: naming it, with torch's reason.
    """
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {device} is not available here: {reason}") from error
    return device
