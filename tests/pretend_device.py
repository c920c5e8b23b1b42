"""A pretend accelerator, in Python alone: tensors say they live on the device `pretend`, the CPU computes.

It refuses what an accelerator refuses (tensors of two devices in one operation) and counts what costs time
there, by file and line of the package: `waits` (the host asks for a value and must wait until the device has
come so far), `uploads` (copies to the device; 'blocking' ones hold the host up) and `operations`. What it
cannot show: kernels of a real device, their numerics, their memory.

An operation is one call that torch hands to the device after it has taken composed functions apart, forward
or backward: a matrix product, but also a view, which starts no kernel (`VIEWS` names those; `kernels` counts
the rest). What an accelerator has as one kernel counts once here too: a GRU cell, attention, an optimiser's
step, a function over a list of tensors (`_foreach_`).
"""
import sys
from collections import Counter
from functools import cache

import torch
from torch import library
from torch.utils import _foreach_utils, backend_registration
from torch.utils._mode_utils import no_dispatch

NAME = 'pretend'
WAITING = {'nonzero', 'masked_select', 'unique', '_unique2', 'unique_consecutive', 'unique_dim', 'bincount',
           'equal', 'histc', 'argwhere'}
INDEXING = {'index', 'index_put', 'index_put_', '_unsafe_index', '_index_put_impl_'}
# their lengths are wanted on the host
ON_HOST = {'_pack_padded_sequence', '_pack_padded_sequence_backward', '_pad_packed_sequence'}
COPIES = {'_to_copy', 'to'}
# calls that start no kernel: another shape, another handle, memory alone
VIEWS = {'view', '_unsafe_view', 't', 'transpose', 'permute', 'expand', 'slice', 'select', 'unsqueeze',
         'squeeze', 'detach', 'alias', 'split', 'split_with_sizes', 'unbind', 'as_strided', 'unfold',
         'diagonal', 'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', '_reshape_alias',
         'lift_fresh'}
FACTORY_SKIPS = ('_sparse', 'sparse', 'from_file', '_efficientzerotensor')


class Module(backend_registration._DummyBackendModule):
    "What torch asks a backend"
    def current_device(self): return 0
    def device_count(self): return 1
    def is_available(self): return True
    def synchronize(self, *_): pass
    def get_amp_supported_dtype(self): return [torch.bfloat16, torch.float16]
    def get_rng_state(self, *_): return torch.get_rng_state()
    def set_rng_state(self, state, *_): torch.set_rng_state(state)


class Ledger:
    "What happened on the device since `clear`"
    def __init__(self): self.clear()

    def clear(self): self.waits, self.uploads, self.operations = Counter(), Counter(), Counter()
    def wait(self, kind): self.waits[place(), kind] += 1
    def upload(self, kind): self.uploads[place(), kind] += 1

    @property
    def blocking(self): return Counter({k: n for k, n in self.uploads.items() if k[1] == 'blocking'})

    @property
    def kernels(self): return sum(n for k, n in self.operations.items() if k not in VIEWS)


HELPERS = ('upload', 'on_host', 'told')     # of `data`: who called them is what one wants to know


def place():
    "The innermost line of the package that is being executed"
    f = sys._getframe(1)
    while f:
        if '/itm_nb/' in f.f_code.co_filename and f.f_code.co_name not in HELPERS:
            return f"{f.f_code.co_filename.rsplit('/', 1)[1]}:{f.f_lineno} {f.f_code.co_name}"
        f = f.f_back
    return 'outside'


LEDGER = Ledger()


class OnDevice(torch.Tensor):
    "A tensor that says it is on the device; `raw` holds its numbers"
    @staticmethod
    def __new__(cls, raw):
        return torch.Tensor._make_wrapper_subclass(cls, raw.size(), strides=raw.stride(), dtype=raw.dtype,
                                                   device=DEVICE)

    def __init__(self, raw): self.raw = raw
    def __repr__(self): return f'OnDevice({self.raw})'
    def tolist(self):
        LEDGER.wait('tolist')
        return self.raw.tolist()
    def numpy(self, *_, **__):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy [{place()}]")
    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return dispatch(func, args, kwargs or {})


def raw(x): return x.raw if isinstance(x, OnDevice) else x
def there(x): return OnDevice(x) if isinstance(x, torch.Tensor) else x


# What an operation takes and gives are values, and lists and tuples of them: torch's trees of anything take
# longer than all the rest of a call.

def each(f, x):
    "`f` of a value, or of every value in a list or a tuple"
    kind = type(x)
    return kind([each(f, y) for y in x]) if kind is tuple or kind is list else f(x)


def tensors_in(values, found):
    "Add the tensors among these values, and in lists of them"
    for x in values:
        if isinstance(x, torch.Tensor): found.append(x)
        elif isinstance(x, (tuple, list)): tensors_in(x, found)
    return found


@cache
def known(func):
    "What an operation is called, and whether it gives its argument another shape"
    return func._schema.name.split('::')[1], torch.Tag.inplace_view in func.tags


def dispatch(func, args, kwargs):
    "Every operation with a tensor of the device comes by here"
    name, reshapes = known(func)
    LEDGER.operations[name] += 1
    if name in COPIES: return copied(args[0], dict(kwargs))
    if name == 'copy_': return copied_into(*args, **kwargs)
    if name == '_local_scalar_dense':
        LEDGER.wait('item')
        return args[0].raw.item()
    tensors = tensors_in(kwargs.values(), tensors_in(args, []))
    if name in INDEXING: indexed(name, *args)
    elif name not in ON_HOST: together(name, tensors)
    if name in WAITING or name == 'repeat_interleave' and isinstance(args[0], OnDevice): LEDGER.wait(name)
    if name in FUSED: return each(there, FUSED[name](*each(raw, args), **kwargs))
    kw, to_host = {k: each(raw, v) for k, v in kwargs.items()}, False
    if kwargs.get('device') is not None:
        to_host, kw['device'] = torch.device(kwargs['device']).type == 'cpu', torch.device('cpu')
    out = func(*each(raw, args), **kw)
    if reshapes:                                                                # its shape changes too
        with no_dispatch(): func(*args, **kwargs)
        return args[0]
    if to_host: return out
    if name == '_pack_padded_sequence': return OnDevice(out[0]), out[1]
    # an operation in place gives its argument back
    mine = {id(x.raw): x for x in tensors if isinstance(x, OnDevice)}
    wrap = lambda x: mine.get(id(x)) if id(x) in mine else OnDevice(x) if isinstance(x,
        torch.Tensor) and not isinstance(x, OnDevice) else x
    return each(wrap, out)


def gru_cell(i, h, hx, bi=0., bh=0.):
    "The fused cell of accelerators (the CPU has none): next state, and what its backward pass wants to know"
    r_i, z_i, n_i = (i + bi).chunk(3, 1)
    r_h, z_h, n_h = (h + bh).chunk(3, 1)
    r, z = (r_i + r_h).sigmoid(), (z_i + z_h).sigmoid()
    n = (n_i + r*n_h).tanh()
    return n + z*(hx - n), torch.cat([r, z, n, hx, n_h], 1)


def gru_cell_backward(g, kept, has_bias):
    "Gradients of the two gates, of the state before, and of the two biases"
    r, z, n, hx, n_h = kept.chunk(5, 1)
    g_z = g*(hx - n)*z*(1 - z)
    g_n = g*(1 - z)*(1 - n*n)
    g_r = g_n*n_h*r*(1 - r)
    of_i, of_h = torch.cat([g_r, g_z, g_n], 1), torch.cat([g_r, g_z, g_n*r], 1)
    return of_i, of_h, g*z, of_i.sum(0) if has_bias else None, of_h.sum(0) if has_bias else None


def attended(q, k, v, bias=None, dropout=0., causal=False, *_, scale=None):
    "The fused attention of the CPU, in the form that torch asks of other devices"
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = fused(q, k, v, dropout, causal, attn_mask=bias, scale=scale)
    seed = torch.zeros((), dtype=torch.long)
    return out, lse, None, None, q.shape[2], k.shape[2], seed, seed.clone(), None


def attended_backward(g, q, k, v, bias, wanted, out, lse, *rest, scale=None):
    "Gradients of queries, keys and values"
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return *fused(g, q, k, v, out, lse, *rest[4:6], attn_mask=bias, scale=scale), None


ATTENTION = '_scaled_dot_product_fused_attention_overrideable'
FUSED = {'_thnn_fused_gru_cell': gru_cell, '_thnn_fused_gru_cell_backward': gru_cell_backward,
         ATTENTION: attended, ATTENTION + '_backward': attended_backward}


def attention(q, k, v, attn_mask=None, dropout_p=0., is_causal=False, *, scale=None, enable_gqa=False):
    "What torch does on CUDA: a mask becomes what is added to the scores, and one kernel does the rest"
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0., -torch.inf).to(q.dtype)
    if dropout_p or q.dim() != 4:                   # then its parts are counted: the CPU has no such kernel
        return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal,
                                                                 scale=scale, enable_gqa=enable_gqa)[0]
    return getattr(torch.ops.aten, ATTENTION)(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)[0]


def copied(x, kw):
    "`to`: up, down or on the device"
    device, blocking = torch.device(kw.pop('device', None) or x.device), not kw.pop('non_blocking', False)
    kw.pop('pin_memory', None)
    kw.pop('layout', None)
    out = torch.ops.aten._to_copy.default(raw(x), **kw)
    if device.type != NAME:
        if isinstance(x, OnDevice): LEDGER.wait('to the host')
        return out
    if not isinstance(x, OnDevice): LEDGER.upload('blocking' if blocking else 'behind')
    return OnDevice(out)


def copied_into(to, x, non_blocking=False):
    "`copy_`"
    if isinstance(x, OnDevice) and not isinstance(to, OnDevice): LEDGER.wait('to the host')
    if isinstance(to, OnDevice) and not isinstance(x, OnDevice):
        LEDGER.upload('behind' if non_blocking else 'blocking')
    raw(to).copy_(raw(x))
    return to


def indexed(name, x, idx, values=None, *_):
    """Indices of the host are uploaded, boolean ones are counted first; a tensor of the host takes no
    indices of the device"""
    idx = [i for i in idx if i is not None]
    there = isinstance(x, OnDevice)
    if not there and any(isinstance(i, OnDevice) for i in idx):
        raise RuntimeError(f'indices should be either on cpu or on the same device as the indexed tensor '
                           f'(cpu) [{name}, {place()}]')
    if there and values is not None and not isinstance(values, OnDevice) and values.dim():
        raise RuntimeError(f'expected all tensors to be on the same device: values of {name} are on the cpu '
                           f'[{place()}]')
    if there and any(not isinstance(i, OnDevice) and i.dim() for i in idx): LEDGER.upload('blocking')
    if any(i.dtype in (torch.bool, torch.uint8) for i in idx): LEDGER.wait('boolean index')


def together(name, tensors):
    "A scalar of the host may go with tensors of the device, nothing else may"
    strange = [tuple(x.shape) for x in tensors if not isinstance(x, OnDevice) and x.dim()]
    if strange and any(isinstance(x, OnDevice) for x in tensors):
        raise RuntimeError(f'Expected all tensors to be on the same device: {name} of {NAME} and cpu '
                           f'{strange} [{place()}]')


def factories():
    "Operations that make a tensor out of nothing"
    for full in torch._C._dispatch_get_all_op_names():
        if not full.startswith('aten::'): continue
        name, _, overload = full[6:].partition('.')
        if name.startswith(FACTORY_SKIPS): continue
        try: op = getattr(getattr(torch.ops.aten, name), overload or 'default')
        except (AttributeError, RuntimeError): continue
        s = op._schema
        makes = len(s.returns) == 1 and 'Tensor' in str(s.returns[0].type)
        given = any('Tensor' in str(a.type) for a in s.arguments)
        if makes and not given and any(a.name == 'device' for a in s.arguments): yield full[6:], op


def making(op):
    def make(*args, pin_memory=None, device=None, **kw):
        LEDGER.operations[op._schema.name.removeprefix('aten::')] += 1
        return OnDevice(op(*args, **kw, device='cpu'))
    return make


def copied_from(x, to, non_blocking=False): return copied_into(to, x, non_blocking)


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
DEVICE = torch.device(NAME, 0)
LIBRARY = library.Library('aten', 'IMPL')
for _name, _op in factories(): LIBRARY.impl(_name, making(_op), 'PrivateUse1')
LIBRARY.impl('_copy_from', copied_from, 'PrivateUse1')
LIBRARY.impl('scaled_dot_product_attention', attention, 'AutogradPrivateUse1')
_foreach_utils._foreach_supported_types.append(OnDevice)     # else torch clips gradients one by one
