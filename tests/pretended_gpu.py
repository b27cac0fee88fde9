"""A GPU that is pretended: tensors that say that they lie on another device and compute on the CPU.

What mixes devices raises, as on a GPU, and what would make the host wait for the device is counted
by line. The device is called "meta". Kernels of a GPU are not there: numbers are the CPU's.
"""

import contextlib
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
ROOT = Path(__file__).parent.parent
OURS = tuple(str(ROOT / name) for name in ("widthbench", "methods", "baselines"))
COPIES = ("copy_", "_to_copy")
READS = ("_local_scalar_dense", "item", "is_nonzero", "equal")
SIZED_BY_VALUES = ("nonzero", "masked_select", "unique", "_unique2")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class Waits:
    """Where the host waited for the device, by ``what at file:line``."""

    def __init__(self):
        self.at = Counter()

    def note(self, what):
        """One more, at the innermost line of ours."""
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(OURS)]
        last = frames[-1] if frames else None
        self.at[f"{what} at {Path(last.filename).name}:{last.lineno}" if last else what] += 1


WAITS = Waits()


def on_the_host(at):
    """An index with lists as tensors: torch makes a tensor of the device's of a list, without
    numbers if that is "meta"."""
    if isinstance(at, tuple):
        return tuple(map(on_the_host, at))
    return torch.tensor(at) if isinstance(at, list) else at


class OnDevice(torch.Tensor):
    """A tensor of the device; what it holds lies on the CPU."""

    __slots__ = ("held",)  # not in __dict__, which others copy from one parameter to another

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    def tolist(self):
        WAITS.note("tolist")
        return self.held.tolist()

    def numpy(self, *args, **options):
        raise TypeError("a tensor of the device is no numpy array: .cpu() first")

    __array__ = numpy

    def __getitem__(self, at):
        return super().__getitem__(on_the_host(at))

    def __setitem__(self, at, value):
        super().__setitem__(on_the_host(at), value)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def computed(func, args, kwargs):
    """An operation, once devices have been looked at."""
    name = func.overloadpacket.__name__
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    device = any(isinstance(t, OnDevice) for t in tensors)
    if device and any(t.device == DEVICE and not isinstance(t, OnDevice) for t in tensors):
        raise RuntimeError(f"{name}: a tensor without numbers, which the pretence did not make")
    host = [t for t in tensors if not isinstance(t, OnDevice)]
    wanted = kwargs.get("device")
    there = wanted is not None and torch.device(wanted).type == DEVICE.type
    if device and host:
        require_alike(name, args, host)
    if (name == "_to_copy" and wanted is not None and there != device) or (
        name == "copy_" and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice)
    ):
        WAITS.note("copy between host and device")
    elif device and name in (*READS, *SIZED_BY_VALUES):
        WAITS.note(name)
    plain = tree_map(lambda t: t.held if isinstance(t, OnDevice) else t, (args, kwargs))
    if there:
        plain[1]["device"] = torch.device("cpu")
    if "pin_memory" in plain[1]:
        plain[1]["pin_memory"] = False
    out = func(*plain[0], **plain[1])
    mutable = func._schema.is_mutable
    if mutable and name.endswith("_") and isinstance(args[0], torch.Tensor):
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    if (mutable and name.startswith("_foreach")) or not (device if wanted is None else there):
        return out
    return tree_map(_there, out)


def _there(value):
    held = isinstance(value, torch.Tensor) and not isinstance(value, OnDevice)
    return OnDevice(value) if held else value


def require_alike(name, args, host):
    """What a GPU takes besides its own tensors: copies, indices, numbers without dimensions."""
    if name in COPIES:
        return
    if name in INDEXED and isinstance(args[0], OnDevice):
        if name != "index" and not isinstance(args[2], OnDevice) and args[2].dim() > 0:
            raise RuntimeError(f"{name}: the value lies on another device")
        WAITS.note("index on the host")
    elif name in INDEXED or any(t.dim() > 0 for t in host):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")


class _Everything(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


@contextlib.contextmanager
def gpu():
    """torch finds one; gives the waits of the block."""
    WAITS.at.clear()
    real, state = torch.tensor, torch.zeros(16, dtype=torch.uint8)

    def tensor(data, *args, device=None, **options):
        made = real(data, *args, **options)
        if device is None or torch.device(device).type != DEVICE.type:
            return made
        WAITS.note("copy between host and device")
        return OnDevice(made)

    cuda = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=0: "a pretended GPU",
        "mem_get_info": lambda device=None: (2**35, 2**36),
        "get_rng_state": lambda device=0: state,
        "set_rng_state": lambda state, device=0: None,
        "get_rng_state_all": lambda: [state],
        "set_rng_state_all": lambda states: None,
        "manual_seed_all": lambda seed: None,
        "_is_in_bad_fork": lambda: False,
        "empty_cache": lambda: None,
    }
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "tensor", tensor))
        autocast = mock.Mock(return_value=contextlib.nullcontext())
        stack.enter_context(mock.patch.object(torch, "autocast", autocast))
        stack.enter_context(_Everything())
        yield WAITS.at


def onto(model):
    """A network, moved there in place."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                there = OnDevice(p.detach().clone())
                module._parameters[name] = torch.nn.Parameter(there, p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = OnDevice(b.clone())
    return model
