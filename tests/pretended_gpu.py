"""A GPU that is not there: tensors that say they are on cuda:0 while their numbers are on the CPU.

It shows on a CPU what would go wrong on a GPU by a wrong device or a wrong dtype. Dispatch,
autocast and autograd are torch's own for CUDA tensors. Operations compute with the CPU's kernels,
after a check that all operands are on one device. So programs run to their end, with right numbers.
`FakeTensorMode` does not, in a torch without CUDA: it fails at the first operation in place, and it
has no numbers.

What it cannot show: what a CUDA kernel computes, which shapes it refuses, memory, and speed.
Nor does it carry whole runs yet: PEFT reads adapters with CUDA.

`start` changes torch for the rest of the process. Call it in a process of its own.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

GPU = torch.device("cuda", 0)
HALF = (torch.bfloat16, torch.float16)
CUDA, PRIVATE_USE = 1, 20  # torch's numbers of kinds of device
aten = torch.ops.aten

# How often each kernel was called that only a GPU has, and each choice of SDPA on the GPU.
calls: Counter[str] = Counter()
_random = torch._C.Generator()
_GPU_SEEDS = 1 << 62  # marks generators of the GPU
_tensor = torch.tensor
_real_sdpa = functional.scaled_dot_product_attention


class OnGPU(torch.Tensor):
    """A tensor on the pretended GPU; `numbers` is a tensor on the CPU."""

    @staticmethod
    def __new__(cls, numbers):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=GPU,
        )

    def __init__(self, numbers):
        self.numbers = numbers

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch._C.TensorBase.data.__set__(self, value)  # fails for a tensor on the CPU
        self.numbers = value.numbers

    def __getitem__(self, index):
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index, value):
        super().__setitem__(_without_lists(index), value)

    def tolist(self):
        return self.cpu().tolist()

    def data_ptr(self):
        return self.numbers.data_ptr()

    def untyped_storage(self):
        return self.numbers.untyped_storage()

    def __reduce_ex__(self, protocol):
        return self.numbers.__reduce_ex__(protocol)

    def __repr__(self):
        return f"on the pretended GPU: {self.numbers!r}"


def _without_lists(index):
    """Tensors in place of lists: torch would make them where nothing can be pretended."""
    if isinstance(index, tuple):
        return tuple(map(_without_lists, index))
    return _tensor(index) if isinstance(index, list) else index


class Generator(torch._C.Generator):
    """Random numbers for one device."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        self.mark = _GPU_SEEDS if torch.device(device).type == "cuda" else 0
        self.manual_seed(0)

    def manual_seed(self, seed):
        super().manual_seed(seed | self.mark)
        return self


def _tensor_anywhere(values, *, device=None, **kwargs):
    made = _tensor(values, **kwargs)
    return made if device is None else made.to(device)


class _Everywhere(TorchDispatchMode):
    """For operations without a tensor on the GPU that make one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})


def start():
    """Pretend that the machine has one GPU of compute capability 9.0, from now on."""
    _let_autograd_run()
    cuda = torch.cuda
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "a pretended GPU",
        "mem_get_info": lambda device=None: (80 * 2**30, 80 * 2**30),
        "empty_cache": lambda: calls.update(["empty_cache"]),
        "synchronize": lambda device=None: None,
        "manual_seed": _random.manual_seed,
        "manual_seed_all": _random.manual_seed,
        "get_rng_state": lambda device=None: _random.get_state(),
        "set_rng_state": lambda state, device=None: _random.set_state(state),
        "get_rng_state_all": lambda: [_random.get_state()],
        "set_rng_state_all": lambda states: _random.set_state(states[0]),
        "_lazy_init": lambda: None,
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
        if hasattr(cuda.random, name):
            setattr(cuda.random, name, answer)
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
    torch.accelerator.device_count = lambda: 1
    torch.accelerator.current_device_index = lambda: 0
    # `with torch.device("meta")` lists torch's constructors once. The true `torch.tensor` must be
    # among them: transformers asks it for the device, and otherwise never fills RoPE's buffers.
    _device_constructors()
    torch.Generator, torch.tensor = Generator, _tensor_anywhere
    functional.scaled_dot_product_attention = _sdpa
    # `Module.to` then keeps the parameters that two modules share.
    torch.__future__.set_swap_module_params_on_conversion(True)
    _Everywhere().__enter__()


def _let_autograd_run():
    """Give CUDA what autograd asks for and a torch without CUDA lacks.

    That is a guard of its device, which does nothing here, and three answers: that CUDA is built
    in, that it is available, and that the device is in use. They are the first methods after the
    destructors of `at::CUDAHooksInterface`.
    """

    class Guard(torch._C._acc.DeviceGuard):
        def type_(self):
            return torch._C._autograd.DeviceType.CUDA

    guard = Guard()
    torch._C._acc.register_python_privateuseone_device_guard(guard)
    folder = Path(torch.__file__).parent / "lib"
    name = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * (PRIVATE_USE + 1)).in_dll(ctypes.CDLL(folder / "libc10.so"), name)
    guards[CUDA], guards[PRIVATE_USE] = guards[PRIVATE_USE], None
    hooks_of_cuda = ctypes.CDLL(folder / "libtorch_cpu.so")._ZN2at6detail12getCUDAHooksEv
    hooks_of_cuda.restype = ctypes.c_void_p
    methods_at = ctypes.c_void_p.from_address(hooks_of_cuda())
    before = 2  # pointers in front of the methods: the type of the object, and its place
    methods = (ctypes.c_void_p * 100).from_address(methods_at.value - before * 8)
    methods = (ctypes.c_void_p * 100)(*methods)
    yes = ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p)  # it returns 1
    for number in (2, 3, 4):  # isBuilt, isAvailable, hasPrimaryContext
        methods[before + number] = yes.value
    for kept in (guard, methods):  # torch points to them until the process has ended
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    methods_at.value = ctypes.addressof(methods) + before * 8


def _computed(func, args, kwargs):
    """What an operation gives, on the device of its operands."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with _Everywhere():  # in inference mode torch leaves it to the tensors to take these apart
            return func.decompose(*args, **kwargs)
    flat, spec = tree_flatten((args, kwargs))
    on_gpu = [x for x in flat if isinstance(x, OnGPU)]
    target = _target(func, args, kwargs, on_gpu)
    _refuse_mixed(func, args, flat, on_gpu)
    known = {id(x.numbers): x for x in on_gpu}
    args, kwargs = tree_unflatten([x.numbers if isinstance(x, OnGPU) else x for x in flat], spec)
    kwargs = _as_on_cpu(func, kwargs, target)

    def moved(x):
        if not isinstance(x, Tensor) or not target:
            return x
        if id(x) not in known:
            calls["moved"] += func is aten._to_copy.default and not on_gpu
            return OnGPU(x)
        same = known[id(x)]
        assert (same.shape, same.dtype) == (x.shape, x.dtype), f"{func} changes its operand's form"
        return same

    # Ordinary tensors, also in inference mode: a view of a weight must be one.
    with torch.inference_mode(False), torch.no_grad():
        own = (_KERNELS if target else _KERNELS_OF_CPU).get(func)
        found = own(*args, **kwargs) if own else func(*args, **kwargs)
        return tree_map(moved, found)


def _target(func, args, kwargs, on_gpu):
    """Whether the result is on the GPU."""
    if (device := kwargs.get("device")) is not None:
        return torch.device(device).type == "cuda"
    if func._schema.name.endswith("_") and args and isinstance(args[0], Tensor):
        return isinstance(args[0], OnGPU)
    return bool(on_gpu)


def _refuse_mixed(func, args, flat, on_gpu):
    if not on_gpu or func in (aten._to_copy.default, aten.copy_.default):
        return
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        flat, _ = tree_flatten((args[0], args[2:]))  # indices may be on the CPU
    for x in flat:
        if isinstance(x, Tensor) and not isinstance(x, OnGPU) and x.dim():
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({func}, {tuple(x.shape)})"
            )


def _as_on_cpu(func, kwargs, target):
    kwargs = dict(kwargs)
    if target and kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    generator = kwargs.get("generator")
    if generator is not None:
        if bool(generator.initial_seed() & _GPU_SEEDS) != target:
            raise RuntimeError(f"Expected a generator of the other device ({func})")
    elif target and any(argument.name == "generator" for argument in func._schema.arguments):
        kwargs["generator"] = _random
    return kwargs


def _mm_with_dtype(a, b, out_dtype):
    """cuBLAS's product that is rounded to another dtype, or to none."""
    calls["mm"] += 1
    if a.dtype not in HALF or b.dtype != a.dtype or out_dtype != torch.float32:
        raise RuntimeError(f"mm of {a.dtype} and {b.dtype} to {out_dtype}")
    return a.float() @ b.float()


def _cumsum(x, dim, *, dtype=None):
    is_float = (dtype or x.dtype).is_floating_point
    if is_float and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
    return x.cumsum(dim, dtype=dtype)


def _sdpa(query, key, value, attn_mask=None, *args, **kwargs):
    """Note which kernel a GPU would choose; computed is always by products."""
    if isinstance(query, OnGPU):
        _note_kernel(query, key, value, attn_mask)
    return _real_sdpa(query, key, value, attn_mask, *args, **kwargs)


def _note_kernel(query, key, value, mask):
    has_all_heads = query.shape[1] == key.shape[1]
    if query.dtype in HALF and mask is None and query.shape[-1] == value.shape[-1] <= 256:
        calls["sdpa: flash"] += 1
    else:
        calls["sdpa: efficient" if has_all_heads else "sdpa: math"] += 1


def _spans(q_ends, k_ends, window):
    """For each span its queries, its keys and the mask: the last query sees the last key."""
    for q, q_end, k, k_end in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        rows = torch.arange(q_end - q)[:, None] + (k_end - k) - (q_end - q)
        columns = torch.arange(k_end - k)
        is_seen = columns <= rows + window[1] if window[1] >= 0 else columns >= 0
        if window[0] >= 0:
            is_seen = is_seen & (columns >= rows - window[0])
        yield slice(q, q_end), slice(k, k_end), is_seen


def _checked(query, key, value, q_ends, k_ends, max_q, max_k):
    if query.dtype not in HALF or not query.dtype == key.dtype == value.dtype:
        raise RuntimeError("FlashAttention only supports fp16 and bf16 data type")
    if q_ends.dtype != torch.int32 or k_ends.dtype != torch.int32:
        raise RuntimeError("cu_seqlens must have dtype int32")
    if any(x.stride(-1) != 1 for x in (query, key, value)):
        raise RuntimeError("Input tensor must have contiguous last dimension")
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        raise RuntimeError("head_size must be a multiple of 8, and at most 256")
    q_ends, k_ends = q_ends.tolist(), k_ends.tolist()
    assert (q_ends[-1], k_ends[-1]) == (len(query), len(key))
    assert (max_q, max_k) == tuple(
        max(b - a for a, b in pairwise(ends)) for ends in (q_ends, k_ends)
    )
    return q_ends, k_ends


def _probabilities(query, key, is_seen, scale):
    groups = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(groups, 1)) * scale
    return scores.masked_fill(~is_seen, -math.inf).softmax(-1)


def _varlen(
    query, key, value, q_ends, k_ends, max_q, max_k, is_causal=False, scale=None, window=(-1, -1),
    *rest, **kwargs,
):  # fmt: skip
    """FlashAttention over spans, in fp32."""
    calls["varlen"] += 1
    ends = _checked(query, key, value, q_ends, k_ends, max_q, max_k)
    output = torch.empty_like(query)
    groups = query.shape[1] // key.shape[1]
    scale = scale or query.shape[-1] ** -0.5
    for q, k, is_seen in _spans(*ends, window):
        weights = _probabilities(query[q].float(), key[k].float(), is_seen, scale)
        values = value[k].float().repeat_interleave(groups, 1)
        output[q] = torch.einsum("hqk,khd->qhd", weights, values).to(output.dtype)
    lse = torch.zeros(query.shape[1], len(query))
    return output, lse, torch.zeros(2, dtype=torch.uint64)


def _varlen_backward(
    grad, query, key, value, out, lse, q_ends, k_ends, max_q, max_k, is_causal, state, scale=None,
    window=(-1, -1),
):  # fmt: skip
    calls["varlen backward"] += 1
    ends = _checked(query, key, value, q_ends, k_ends, max_q, max_k)
    groups = query.shape[1] // key.shape[1]
    scale = scale or query.shape[-1] ** -0.5
    d_query, d_key, d_value = (torch.zeros(x.shape) for x in (query, key, value))
    for q, k, is_seen in _spans(*ends, window):
        weights = _probabilities(query[q].float(), key[k].float(), is_seen, scale)
        values, keys = (x[k].float().repeat_interleave(groups, 1) for x in (value, key))
        d_out = grad[q].float()
        d_weights = torch.einsum("qhd,khd->hqk", d_out, values)
        d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * scale
        d_query[q] += torch.einsum("hqk,khd->qhd", d_scores, keys)
        for total, part in (
            (d_key, torch.einsum("hqk,qhd->khd", d_scores, query[q].float())),
            (d_value, torch.einsum("hqk,qhd->khd", weights, d_out)),
        ):
            total[k] += part.unflatten(1, (-1, groups)).sum(2)
    return tuple(d.to(x.dtype) for d, x in ((d_query, query), (d_key, key), (d_value, value)))


def _kernels():
    importlib.import_module("torch.nn.attention.varlen")  # it registers its operations
    own = torch.ops.torch_attn
    return {
        aten.cumsum.default: _cumsum,
        aten.mm.dtype: _mm_with_dtype,
        own._varlen_attn.default: _varlen,
        own._varlen_attn_backward.default: _varlen_backward,
    }


_KERNELS = _kernels()
_KERNELS_OF_CPU = {aten.is_pinned.default: lambda x, device=None: True}
