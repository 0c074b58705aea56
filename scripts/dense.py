"""What SDP is compared with: torch's DistributedDataParallel and FSDP2, used as sdp.SDP is."""

from collections import Counter
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from support.costs import ring_half
from support.peers import add_up


def local_shard(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # FSDP shards each tensor


class Dense:
    """The whole model on every process by DDP, or in shards by FSDP. Each process is one worker."""

    def __init__(
        self, build, initial_value, optimizer, units, mask, mode, dtype, device="cpu", layout=None, weights=()
    ):
        """As of sdp.SDP, but mode: ddp or fsdp. units, mask and layout are not used."""
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.build, self.dtype, self.device, self.sharded = build, dtype, torch.device(device), mode == "fsdp"
        self.workers, self.traffic = {self.rank: self}, Counter()
        self.weights, self.passes_left = weights or [1.0] * self.processes, 1
        self.model = self.make_module(self.rank)
        self.params = sum(p.numel() for p in self.model.parameters())
        self.blocks = [sum(p.numel() for p in block.parameters()) for block in self.model.blocks.values()]
        wide = torch.promote_types(dtype, torch.float32)  # the precision of the optimizer
        kept_as = wide if self.sharded else dtype
        values = {n: initial_value(self.model, n).to(device, wide) for n, _ in self.model.named_parameters()}
        self.model.load_state_dict({n: value.to(kept_as) for n, value in values.items()}, assign=True)
        mesh = dist.init_device_mesh(self.device.type, (self.processes,))
        for module in (*self.model.blocks.values(), self.model) if self.sharded else ():
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
        self.wrapped = self.model if self.sharded else DDP(self.model, gradient_as_bucket_view=True)
        self.wrapped.register_forward_pre_hook(self.before_pass)
        self.copies = list(zip(self.model.parameters(), values.values())) if kept_as != wide else []
        self.masters = [master for _, master in self.copies] or list(self.model.parameters())
        matrices = [master for master in self.masters if master.dim() > 1]
        vectors = [master for master in self.masters if master.dim() == 1]  # norms and biases
        self.optimizer = optimizer([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])

    def make_module(self, worker):
        """The whole model, on the meta device."""
        with torch.device("meta"):
            return self.build({})

    def before_pass(self, *_):
        """Only the last pass of a turn averages the gradients over the processes."""
        self.passes_left -= 1
        if self.sharded:
            self.model.set_requires_gradient_sync(self.passes_left <= 0)
        else:
            self.wrapped.require_backward_grad_sync = self.passes_left <= 0

    @contextmanager
    def turn(self, worker, passes=1):
        """Traffic is computed, for a ring. FSDP gathers blocks twice in each pass, and the rest once."""
        self.passes_left = passes
        yield self.wrapped
        gathered = passes * (self.params + sum(self.blocks)) if self.sharded else self.params
        self.traffic["pull"] += ring_half(gathered, self.processes, self.dtype)
        self.traffic["push"] += ring_half(self.params, self.processes, self.dtype)

    def step(self, lr, clip=0.0, *numbers):
        for parameter, master in self.copies:
            master.grad = parameter.grad.to(master.dtype)
        gradients = [local_shard(master.grad) for master in self.masters]
        squares = torch.nn.utils.get_total_norm(gradients).item() ** 2
        squares /= 1 if self.sharded else self.processes  # which all have the same gradients
        squares, *sums = add_up([squares, *numbers])
        norm = squares**0.5
        if torch.tensor([norm, *sums]).isfinite().all():
            torch._foreach_mul_(gradients, min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            for parameter, master in self.copies:
                parameter.data.copy_(master)
        self.model.zero_grad()
        self.optimizer.zero_grad()
        return norm, *sums

    def memory(self, worker, passes):
        """FSDP has one block whole at a time, and what is in none. Between passes it has all gradients."""
        own = sum(local_shard(parameter).nbytes for parameter in self.model.parameters())
        whole = self.params - sum(self.blocks) + max(self.blocks) if self.sharded else 0
        waiting = self.params if self.sharded and passes > 1 else 0
        weights, gradients = own + whole * self.dtype.itemsize, own + waiting * self.dtype.itemsize
        state = [t for of in self.optimizer.state.values() for t in of.values() if t.dim() > 0]
        optimizer = sum(local_shard(t).nbytes for t in (*state, *(master for _, master in self.copies)))
        return {"weight_bytes": weights, "grad_bytes": gradients, "optimizer_bytes": optimizer}
