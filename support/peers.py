"""What processes do together: sums and exchanges, and the error when one does not answer."""

from contextlib import contextmanager

import torch
import torch.distributed as dist


class PeerLost(RuntimeError):
    """Another process has ended, has stalled, or cannot be reached."""


@contextmanager
def peers():
    """`with peers():` around a collective: what torch raises where another process fails is a PeerLost."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(str(error)) from error


def add_up(numbers):
    """A list of numbers or scalar tensors, each summed over the processes, as floats."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    totals = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=device) for n in numbers])
    with peers():
        dist.all_reduce(totals)
    return totals.tolist()


def exchange(counter, received, send, received_sizes, send_sizes, traffic, group=None, also=None):
    """An all_to_all of flat tensors, as a generator: it starts, stops while it is under way, and waits.
    sizes: elements from and to each process. The bytes that leave this process are added to
    traffic[counter], and to traffic[also]. Raises PeerLost."""
    kept = send_sizes[dist.get_rank(group)]
    traffic[counter] += (len(send) - kept) * send.element_size()
    if also:
        traffic[also] += (len(send) - kept) * send.element_size()
    # gloo was silently wrong with CUDA tensors (https://github.com/pytorch/pytorch/pull/170812)
    through_cpu = send.is_cuda and dist.get_backend(group) == "gloo"
    into = torch.empty_like(received, device="cpu") if through_cpu else received
    send = send.cpu() if through_cpu else send
    work = dist.all_to_all_single(into, send, received_sizes, send_sizes, group=group, async_op=True)
    yield
    with peers():
        work.wait()
    if through_cpu:
        received.copy_(into)
