"""A GPU that is the CPU, so that a machine without a GPU can run the code for one.

    [torchrun --nproc_per_node 2] python tests/pretend_device.py COMMANDS.json STOP_AFTER

runs `train.main` for each list of flags in the file, on the device `gpu:0`, and stops, as if by Ctrl-C, after
STOP_AFTER optimizer steps in all, if that is not 0. Each tensor there wraps a tensor on the CPU, on which
every operation is computed. What a GPU refuses is refused here, too: an operation on tensors of both devices
(indices may be on the CPU, and scalars that are only read), numpy(), a generator of the CPU, and, as by NCCL,
a collective on the CPU. Not covered: kernels, graphs, streams, memory, NCCL itself, and --remat, whose second
forward pass aborts this torch on such a device.
"""

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

sys.path.insert(0, str(Path(__file__).parents[1]))
import parallel
import train

GPU = torch.device("cpu")  # after make_gpu(): gpu:0
aten = torch.ops.aten
BETWEEN_DEVICES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
# Not even of the CPU; and no operation writes into one.
TAKE_NO_SCALARS = ("_fused", "_foreach", "::cat", "::stack", "gather", "index_select", "embedding")


class OnGPU(torch.Tensor):
    """A tensor that says it is on GPU, around a tensor on the CPU with the same memory layout."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, device=GPU, requires_grad=held.requires_grad, **layout
        )

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def __repr__(self):
        return f"{self.held}, on {GPU}"

    def numpy(self):
        raise TypeError(f"a tensor on {GPU} has no numpy()")

    # Torch's own look for the device behind the name.
    def tolist(self):
        return self.held.tolist()

    def item(self):
        return self.held.item()

    def __float__(self):
        return float(self.held)

    def __int__(self):
        return int(self.held)

    def __bool__(self):
        return bool(self.held)

    def __index__(self):
        return self.held.__index__()


def held(x):
    return x.held if isinstance(x, OnGPU) else x


def on_gpu(x):
    return OnGPU(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnGPU) else x


def compute(function, args, kwargs):
    """An operation of torch, computed on the CPU; RuntimeError where a GPU would refuse it."""
    check_devices(function, args, kwargs)
    device = kwargs.get("device")
    if device is not None:
        result_on_gpu = torch.device(device) == GPU
        kwargs = kwargs | {"device": torch.device("cpu")}
    elif function in BETWEEN_DEVICES or function in INDEXED:
        result_on_gpu = isinstance(args[0], OnGPU)
    else:
        result_on_gpu = any(isinstance(x, OnGPU) for x in tree_flatten((args, kwargs))[0])
    result = function(*tree_map(held, args), **tree_map(held, kwargs))
    if result_on_gpu:
        result = tree_map(on_gpu, result)
    if device is not None or not result_on_gpu or function.namespace == "c10d":
        return result
    return return_and_correct_aliasing(function, args, kwargs, result)


def check_devices(function, args, kwargs):
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    if function in BETWEEN_DEVICES:
        return
    if function in INDEXED and isinstance(args[0], OnGPU):
        tensors = [args[0], *(x for x in args[2:] if isinstance(x, torch.Tensor))]  # indices may be anywhere
    here = [tuple(x.shape) for x in tensors if isinstance(x, OnGPU)]
    writes_to_cpu = function._schema.is_mutable and not isinstance(args[0], OnGPU)
    strict = writes_to_cpu or any(part in function.name() for part in TAKE_NO_SCALARS)
    there = [tuple(x.shape) for x in tensors if not isinstance(x, OnGPU) and (x.dim() > 0 or strict)]
    if here and there:
        raise RuntimeError(f"{function} of tensors on {GPU}, {here}, and on the CPU, {there}")
    is_collective = function.namespace == "c10d" and function.name() != "c10d::barrier"
    if there and is_collective and not Gpu.sends_objects:
        raise RuntimeError(f"{function} of tensors on the CPU, {there}")
    generator = kwargs.get("generator")
    if generator is not None and (here or kwargs.get("device") == GPU):
        raise RuntimeError(f"{function} on {GPU} with a generator of the CPU")


class Gpu(TorchDispatchMode):
    """Also operations that take no tensor, and make one on GPU."""

    sends_objects = False  # as bytes, which torch.distributed puts where its backend wants them

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Lists(TorchFunctionMode):
    """Lists in torch.tensor and between brackets become tensors on the CPU first.

    Otherwise torch asks the device itself for memory, which no TorchDispatchMode sees.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and "device" in kwargs:
            elsewhere = {name: value for name, value in kwargs.items() if name != "device"}
            return function(*args, **elsewhere).to(kwargs["device"])
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            x, index, *value = args
            index = index if isinstance(index, tuple) else (index,)
            index = tuple(torch.tensor(i).to(x.device) if isinstance(i, list) else i for i in index)
            return function(x, index, *value)
        return function(*args, **kwargs)


def make_gpu():
    """Registers the device; once in a process, for good."""
    global GPU
    if GPU.type == "cpu":
        backend_registration._setup_privateuseone_for_python_backend("gpu")
        GPU = torch.device("gpu", 0)


@contextlib.contextmanager
def pretended_gpu():
    """Inside, every process's own device is GPU."""
    make_gpu()
    all_gather_object = dist.all_gather_object

    def gather_objects(*args, **kwargs):
        Gpu.sends_objects = True
        try:
            all_gather_object(*args, **kwargs)
        finally:
            Gpu.sends_objects = False

    one_thread = torch.autograd.set_multithreading_enabled(False)  # else backward looks for the GPU's thread
    device = mock.patch.object(parallel, "my_device", lambda name: GPU)
    objects = mock.patch.object(dist, "all_gather_object", gather_objects)
    with one_thread, device, objects, Gpu(), Lists():
        yield GPU


def stop_after(updates):
    """Ctrl-C before the update after that."""
    step, calls = parallel.Optimizer.step, []

    def counted(*args):
        calls.append(args)
        if len(calls) > updates:
            raise KeyboardInterrupt
        return step(*args)

    parallel.Optimizer.step = counted


if __name__ == "__main__":
    commands, updates = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    if updates:
        stop_after(updates)
    with pretended_gpu():
        for flags in commands:
            status = train.main(flags)
            if status:
                sys.exit(status)
