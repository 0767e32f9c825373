"""`Run`: what a process knows of the run that it is a part of, in one record."""

from dataclasses import dataclass

import torch

from hacl_megatron.config.layout import Layout
from hacl_megatron.config.run import RunConfig
from hacl_megatron.platform.host_groups import Groups


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was asked for, how it is divided, and where this process stands in it."""

    config: RunConfig
    """The resolved configuration, the model's sizes (`config.architecture`) included."""
    layout: Layout
    groups: Groups
    """This rank's groups."""
    device: torch.device
    """What this rank computes on."""

    @property
    def reads_data(self) -> bool:
        """Whether this rank reads and decodes for its replica; the others receive (`assemble.exchange`)."""
        return self.groups.replica.rank() == 0
