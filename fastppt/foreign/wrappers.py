"""What other libraries wrap around a network."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrap(network: Any) -> nn.Module:
    """Return the network inside of what torch.compile, DDP, accelerate and peft put around it.

    Raises:
        ValueError: what is inside is no module.
    """
    while True:
        if hasattr(network, "_orig_mod"):
            network = network._orig_mod
        elif isinstance(network, DistributedDataParallel | DataParallel):
            network = network.module
        elif hasattr(network, "get_base_model"):
            network = network.get_base_model()
        elif isinstance(network, nn.Module):
            return network
        else:
            raise ValueError(
                f"network: got a {type(network).__qualname__}, want a torch.nn.Module; of a "
                "pipeline, pass pipeline.unet or pipeline.transformer"
            )
