"""Weights divided among processes, by PyTorch's FSDP or FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import (
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    StrategyRegistry,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

SHARDED = (FSDPStrategy, ModelParallelStrategy)


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2, by `--trainer.strategy fsdp2`: each process holds its rows of every weight.

    A checkpoint is one file and holds what that of one process holds, optimizer included: a run
    may go on with another number of processes.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, network: nn.Module) -> None:
        """Leave each process its rows of every weight, gathered for each pass of the network."""
        if self._layer_sync is not None:
            network = self._layer_sync.apply(network)
        network.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other
        fully_shard(network, mesh=self.device_mesh["data_parallel"])

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return whole(ParallelStrategy.optimizer_state(self, optimizer))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        ours = self.lightning_module.state_dict()
        weights = {
            name: part_of(weight, ours[name]) if name in ours else weight
            for name, weight in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(weights, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            parts = {
                index: {name: part_of(value, weights[index]) for name, value in state.items()}
                for index, state in saved["state"].items()
            }
            states.append({**saved, "state": parts})
        ParallelStrategy.load_optimizer_state_dict(self, {"optimizer_states": states})


StrategyRegistry.register("fsdp2", FSDP2Strategy, "FSDP2: each process holds rows of the weights")


@contextmanager
def whole_weights(network: nn.Module) -> Iterator[None]:
    """Within, every process has all weights of a network, to read."""
    if isinstance(network, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(network, writeback=False):
            yield
        return
    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    yield
    for part in parts:
        part.reshard()


def whole(state: Any) -> Any:
    """A nested state with whole tensors in place of their parts; all processes take part."""
    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, state)


def part_of(value: Any, weight: Tensor) -> Any:
    """This process's part of a whole tensor, divided as the weight of its shape is."""
    if not (isinstance(weight, DTensor) and isinstance(value, Tensor)):
        return value
    if value.shape != weight.shape:
        return value
    value = value.to(weight.device)
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)


def here(weight: Tensor) -> Tensor:
    """What this process holds of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
