"""The process group: one process, DDP through accelerate, or FSDP2 through torch's ``fully_shard``.

accelerate leaves its FSDP plug-in aside on a CPU, so the one call to ``fully_shard`` is made here, the same on CPU and
GPU. Every mode listed in :data:`SHARDING` has a two-process test that compares its trajectory with one process; other
modes are refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from luthier.core.errors import UserError, did_you_mean

SHARDING = ("none", "ddp", "fsdp2")


class Processes:
    """What the engine needs of a process group.

    Args:
        sharding: one of :data:`SHARDING`.
        device: overrides the device accelerate chooses.
        trackers: names of accelerate's trackers.
        folder: where trackers that write files put them.
    """

    def __init__(
        self,
        sharding: str = "none",
        device: str | None = None,
        *,
        trackers: Sequence[str] = (),
        folder: str | None = None,
    ) -> None:
        if sharding not in SHARDING:
            raise UserError(
                f"training.sharding '{sharding}' has no test that it gives the trajectory of one process, so it is "
                f"refused.{did_you_mean(sharding, SHARDING)} Accepted: {', '.join(SHARDING)}. For other modes use the "
                "transformers bridge (luthier.engine.bridge_hf)."
            )
        from accelerate import Accelerator

        self.accelerator = Accelerator(
            cpu=device == "cpu" or not torch.cuda.is_available(), log_with=list(trackers) or None, project_dir=folder
        )
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        if self.world > 1 and sharding == "none":
            sharding = "ddp"
        self.sharding = sharding if self.world > 1 else "none"
        self.sharded = self.sharding == "fsdp2"
        self.main = self.rank == 0

    @classmethod
    def single(cls) -> Processes:
        """The usual group as the environment describes it."""
        return cls()

    def wrap(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module as training calls it."""
        if self.sharding == "ddp":
            return self.accelerator.prepare_model(module)
        if self.sharding == "fsdp2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.world,))
            lists = [m for m in module.modules() if isinstance(m, torch.nn.ModuleList)]
            for block in max(lists, key=len, default=()):
                fully_shard(block, mesh=mesh)
            fully_shard(module, mesh=mesh)
        return module

    def shard_again(self, module: Any) -> None:
        """After a forward pass without a backward pass: the root's weights are whole until then."""
        if self.sharded:
            module.reshard()

    def last_backward(self, module: Any, last: bool) -> AbstractContextManager[Any]:
        """Around one micro-batch's forward and backward: gradients cross processes only after the last one."""
        if self.sharding == "ddp" and not last:
            return module.no_sync()
        if self.sharding == "fsdp2":
            module.set_requires_gradient_sync(last)
        return nullcontext()

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """One JSON-like value per rank, on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            torch.distributed.barrier()

    def whole(self, tensor: Any) -> torch.Tensor:
        """The full tensor of a possibly sharded one (a collective call when sharded)."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def like(self, full: torch.Tensor, target: Any) -> torch.Tensor:
        """A full tensor sharded as ``target`` is."""
        if not hasattr(target, "full_tensor"):
            return full.to(target.device)
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(full.to(target.device), target.device_mesh, target.placements)
