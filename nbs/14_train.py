# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Training
# > One plain loop for every method: it can be killed at any step and goes on to the same bytes.

# %%
#| default_exp train

# %%
#| export
import difflib
import fcntl
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from itm_nb import scenes
from itm_nb.data import Batches, DataError, Vocabulary, fingerprint, order, purpose_key, read_scan, write_atomic
from itm_nb.methods import costs, in_force, schedule
from itm_nb.metrics import Ranks, galleries, summary
from itm_nb.samplers import Step
from itm_nb.similarity import Model, from_pretrained, save_pretrained

# %%
#| hide
import tempfile
import matplotlib.pyplot as plt
from fastcore.test import expect_fail, test_close, test_eq


# %% [markdown]
# Everything that varies between the papers is in the *method*; the loop below is the same for all. It keeps three promises:
#
# 1. **Same seed, same bytes.** Initial weights, the order of captions, dropout and draws come from four named streams. Two methods with
#    one seed share all of them, so their difference is the method's, not luck's.
# 2. **Kill it anywhere.** Checkpoints are written whole or not at all; a resumed run ends with the bytes of an uninterrupted one.
# 3. **The test split is opened by `evaluate` alone**, after training has ended.

# %% [markdown]
# ## The settings
# One frozen dataclass; every field changes the result (devices, paths and progress bars are elsewhere). An unknown key is an error with
# a hint.

# %%
#| export
@dataclass(frozen=True)
class Config:
    "All that determines a run's result"
    data:str='scenes'          # 'scenes' (the drawn world) or 'scan' (a folder in the SCAN layout)
    name:str=''                # of the data set, for tables; '': the data's own
    preset:str='small'         # scenes: 'tiny', 'small' or 'full'
    rho:float=.25              # scenes: share of cross pairs that are true, in percent
    world:int=-1               # scenes: which world; -1: the seed's own
    dims:int=0                 # SCAN layout: keep the first so many feature dimensions; 0: all
    regions:str='all'          # SCAN layout: 'all', or 'first:last' or one number: which regions to keep
    image_hidden:int=256       # width of the image tower's MLP; 0: linear
    image_pool:str='mean'      # 'mean', 'max', 'topk', 'gpo'
    text:str='conv'            # text tower: 'mean', 'conv', 'gru'
    text_pool:str='max'        # pooling over words
    dim:int=256                # length of the joint vectors
    d_word:int=128             # length of word vectors
    dropout:float=0.           # of region features and word vectors
    method:str='vsepp'         # name in `methods.METHODS`
    warmup:int=0               # epochs of `vse0` before the method takes over
    margin:float=.2            # of the hinges
    temperature:float=.05      # of InfoNCE
    epochs:int=16
    batch:int=128              # pairs in a step
    lr:float=1e-3              # of Adam
    decay:str='cosine'         # 'cosine' to zero, 'step' (a tenth after two thirds), 'none'
    clip:float=2.              # largest gradient norm; 0: no clipping
    precision:str='fp32'       # 'fp32' or 'bf16' (towers only; scores, losses and metrics are fp32 always)
    seed:int=0                 # init, order, dropout, draws
    threads:int=1              # results are bit-equal for equal threads

    def __post_init__(self):
        for f in fields(self):
            v = getattr(self, f.name)
            if f.type in (float, 'float') and type(v) is int: object.__setattr__(self, f.name, float(v)); continue
            kind = getattr(f.type, '__name__', f.type)
            if type(v).__name__ != kind: raise ValueError(f'{f.name} is {v!r}; wanted {kind}')
        for name, known in dict(data=('scenes','scan'), decay=('cosine','step','none'), precision=('fp32','bf16')).items():
            if getattr(self, name) not in known: raise ValueError(f'{name} is {getattr(self, name)!r}; there are {known}')
        for name in ('epochs', 'batch', 'dim', 'd_word', 'threads'):
            if getattr(self, name) < 1: raise ValueError(f'{name} is {getattr(self, name)}; wanted 1 or more')

def config(
    given:dict,     # settings by name
)->Config:
    "A `Config`; unknown names are refused with the nearest known one"
    known = [f.name for f in fields(Config)]
    for k in given.keys() - set(known):
        near = difflib.get_close_matches(k, known, 1)
        raise ValueError(f'no setting called {k!r}' + (f'; did you mean {near[0]!r}?' if near else f'; there are {known}'))
    return Config(**given)


# %%
with expect_fail(ValueError, "did you mean 'epochs'"): config(dict(epoch=3))
with expect_fail(ValueError, 'wanted int'): config(dict(epochs='3'))
with expect_fail(ValueError, "there are ('scenes', 'scan')"): config(dict(data='coco'))


# %% [markdown]
# ## The data of a run
# A `Corpus` hands out one split at a time, so nothing opens the test split by accident. For scenes it also knows the truth of every pair.

# %%
#| export
@dataclass
class Corpus:
    "A data set as a run sees it"
    label:str                # for tables, e.g. 'scenes small, rho 0.25 %'
    split:Callable           # 'train' | 'val' | 'test' -> Split
    world:object = None      # the drawn world, where there is one

def _columns(
    regions:str,   # 'all', 'first:last' or one number
):
    "Which region columns a setting names"
    if regions == 'all': return None
    a, _, b = regions.partition(':')
    return slice(int(a), int(b) if b else int(a)+1)

def corpus(
    cfg:Config,
    folder='',       # of a data set that is not embedded
)->Corpus:
    "Open the data a configuration names"
    if cfg.data == 'scenes':
        world = scenes.make(cfg.preset, rho=cfg.rho, seed=cfg.seed if cfg.world < 0 else cfg.world)
        return Corpus(cfg.name or f'scenes {cfg.preset}, rho {cfg.rho:g} %', world.split, world)
    if not folder: raise DataError('folder', 'no data folder', 'a folder in the SCAN layout', 'Give one: -p folder PATH.')
    return Corpus(cfg.name or Path(folder).name, lambda part: read_scan(folder, part, dims=cfg.dims or None, regions=_columns(cfg.regions)))


# %%
test_eq(_columns('all'), None); test_eq(_columns('16'), slice(16, 17)); test_eq(_columns('0:17'), slice(0, 17))
tiny = Config(preset='tiny', dim=32, d_word=16, image_hidden=32, epochs=3, batch=32, method='vsepp', warmup=1)
world = corpus(tiny)
train, val = world.split('train'), world.split('val')
world.label, len(train), len(train.captions), len(val), train.captions[:3]


# %% [markdown]
# ## The model
# Built under the stream `init` of the seed: arms with the same towers and seed start from the same weights.

# %%
#| export
def build(
    cfg:Config,
    d_in:int,        # length of a region's feature vector
    n_words:int,     # size of the vocabulary
)->Model:
    "The model of a configuration, with the initial weights of its seed"
    torch.manual_seed(purpose_key('init', cfg.seed) % 2**63)
    image = dict(kind='region', d_in=d_in, dim=cfg.dim, hidden=cfg.image_hidden, pool=cfg.image_pool, dropout=cfg.dropout)
    text = dict(kind=cfg.text, n_words=n_words, dim=cfg.dim, d_word=cfg.d_word, pool=cfg.text_pool, dropout=cfg.dropout)
    return Model(image, text)

def learning_rate(
    cfg:Config,
    step:int,      # from 0
    steps:int,     # of the whole run
)->float:
    "The learning rate of a step: a function of the step, so there is no scheduler state to lose"
    if cfg.decay == 'none': return cfg.lr
    if cfg.decay == 'step': return cfg.lr * (1. if step < 2*steps/3 else .1)
    return cfg.lr * .5*(1 + math.cos(math.pi*step/steps))


# %%
vocab = Vocabulary.build(train.captions)
a, b = (build(tiny, train.feats.shape[-1], len(vocab)).state_dict() for _ in range(2))
for k in a: test_eq(a[k], b[k])
test_close([learning_rate(Config(), s, 100) for s in (0, 50, 100)], [1e-3, 5e-4, 0.]); len(vocab)


# %% [markdown]
# ## One step
# Encode once; let the owners of state look; ask the method for its costs; step. Nothing here waits for the device.

# %%
#| export
@dataclass
class Training:
    "Everything a run needs between two steps"
    cfg:Config
    model:nn.Module                  # as prepared by accelerate
    opt:torch.optim.Optimizer
    accelerator:Accelerator
    phases:tuple                     # the schedule of methods
    train:Batches
    val:Batches
    vocab:Vocabulary
    prints:dict                      # fingerprints of the splits
    step:int = 0                     # steps done
    best:tuple = (-1., -1)           # (val rSum, epoch) of the best epoch
    history:list = field(default_factory=list)    # val metrics by epoch
    meter:Tensor = None              # sums of loss, gradient norm, clipped steps, and their number since the last log line
    log_bytes:int = 0

    @property
    def core(self)->Model: return self.accelerator.unwrap_model(self.model)
    @property
    def per_epoch(self)->int: return max(1, len(self.train.lengths)//self.cfg.batch)
    @property
    def steps(self)->int: return self.cfg.epochs*self.per_epoch

    def owners(self)->list:
        "Owners of state of ALL phases, each once"
        return list({id(o): o for _, m in self.phases for o in m.owners()}.values())

def train_step(
    t:Training,
    caps:Tensor,      # (B,) indices of captions
    epoch:int,
)->dict:              # {'term/side': cost}, detached
    "One step of training; the loss, gradient norm and clipping go to the meter without waiting for the device"
    cfg = t.cfg
    torch.manual_seed(purpose_key('dropout', cfg.seed, t.step) % 2**63)
    for group in t.opt.param_groups: group['lr'] = learning_rate(cfg, t.step, t.steps)
    t.model.train()
    b = t.train.take(caps)
    images, texts = t.model(b['feats'], b['mask'].sum(1), b['tokens'], b['lengths'])
    method, step = in_force(t.phases, epoch), Step(t.core, images, texts, b['img_ids'], b['cap_ids'], cfg.seed, epoch, b)
    for o in t.owners(): o.before_step(step)
    for o in t.owners(): o.observe(step)
    parts = costs(method, step); loss = sum(parts.values())
    t.opt.zero_grad(set_to_none=True); t.accelerator.backward(loss)
    norm = t.accelerator.clip_grad_norm_(t.model.parameters(), cfg.clip or torch.inf)
    t.opt.step()
    for o in t.owners(): o.after_step(step)
    t.meter += torch.stack([loss.detach(), norm, (norm > (cfg.clip or torch.inf)).float(), torch.ones_like(norm)])
    return {k: v.detach() for k, v in parts.items()}


# %%
#| export
def prepare(
    cfg:Config,
    data:Corpus,
    device:str='cpu',        # 'cpu', or 'auto' for the accelerator where there is one
)->Training:
    "Data on the device, a fresh model, its optimiser and the schedule of methods"
    torch.set_num_threads(cfg.threads)
    accelerator = Accelerator(cpu=device == 'cpu', mixed_precision='bf16' if cfg.precision == 'bf16' else 'no')
    train, val = data.split('train'), data.split('val')
    vocab = Vocabulary.build(train.captions)
    model = build(cfg, train.feats.shape[-1], len(vocab)).to(accelerator.device)
    opt = torch.optim.Adam(model.parameters(), lr=cfg.lr, fused=True)
    model, opt = accelerator.prepare(model, opt)
    phases = schedule(cfg.method, cfg.warmup, margin=cfg.margin, temperature=cfg.temperature)
    batches = [Batches(s, vocab, accelerator.device) for s in (train, val)]
    return Training(cfg, model, opt, accelerator, phases, *batches, vocab, {s.name: fingerprint(s) for s in (train, val)},
                    meter=torch.zeros(4, device=accelerator.device))


# %%
t = prepare(tiny, world)
first = order(len(t.train.lengths), tiny.seed, 0)[:tiny.batch]
for epoch in (0, 1): print({k: round(float(v), 3) for k, v in train_step(t, first, epoch).items()})


# %% [markdown]
# The first line is the warm-up (the sum over all negatives of the batch), the second the hardest negative alone.
#
# ## Ranks of a split
# Embed everything once, in blocks; then count. Scores are float32.

# %%
#| export
@torch.no_grad()
def embed(
    model:Model,
    batches:Batches,
    block:int=1024,    # images or sentences at a time
)->tuple:              # (N, D) images, (M, D) sentences
    "Vectors of all images and all sentences, in evaluation mode"
    model.eval()
    def blocks(n): return torch.arange(n).split(block)
    img = [model.image(b['feats'], b['mask'].sum(1)) for b in map(batches.images, blocks(len(batches.mask)))]
    txt = [model.text(b['tokens'], b['lengths']) for b in map(batches.texts, blocks(len(batches.lengths)))]
    return torch.cat(img), torch.cat(txt)

def rank_split(
    model:Model,
    batches:Batches,
)->Ranks:
    "Ranks of a whole split, each image and sentence inside its own gallery"
    img, txt = embed(model, batches); s = batches.split
    return galleries(img, txt, s.img_of, s.gallery)


# %%
{k: v for k, v in summary(rank_split(t.core, t.val)).items()}


# %% [markdown]
# ## Checkpoints
# A checkpoint is a folder: tensors as safetensors, the rest as JSON, and in the JSON the hash of the tensors. It is written under
# another name and renamed; the one before it is kept. So at every moment there is a whole one, and a damaged one is noticed.

# %%
#| export
def sha256_file(path)->str:
    "SHA-256 of a file"
    with open(path, 'rb') as f: return hashlib.file_digest(f, 'sha256').hexdigest()

def save_checkpoint(
    folder,           # e.g. run/last; the one before it goes to run/previous
    tensors:dict,     # name -> tensor
    state:dict,       # anything JSON can hold
):
    "Write a checkpoint whole or not at all; the previous one stays until the new one is in place"
    folder = Path(folder); new, old = folder.with_name('new.tmp'), folder.with_name('previous')
    shutil.rmtree(new, ignore_errors=True); new.mkdir(parents=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, new/'tensors.safetensors')
    with open(new/'tensors.safetensors', 'rb') as f: os.fsync(f.fileno())
    write_atomic(new/'state.json', json.dumps(state | dict(sha256=sha256_file(new/'tensors.safetensors')), sort_keys=True).encode())
    if folder.exists(): shutil.rmtree(old, ignore_errors=True); os.replace(folder, old)
    os.replace(new, folder)

def load_checkpoint(
    folder,
)->tuple:      # (tensors, state), or None where there is none
    "The newest whole checkpoint; a damaged one is passed over, and said"
    folder = Path(folder)
    for at in (folder, folder.with_name('previous')):
        if not at.is_dir(): continue
        try:
            state = json.loads((at/'state.json').read_text('utf-8'))
            if sha256_file(at/'tensors.safetensors') != state.pop('sha256'): raise ValueError('the tensors do not match their hash')
            return load_file(at/'tensors.safetensors'), state
        except (OSError, ValueError, KeyError) as e: warnings.warn(f'{at.name}: damaged checkpoint passed over ({e})')
    return None


# %%
with tempfile.TemporaryDirectory() as d:
    test_eq(load_checkpoint(d + '/last'), None)
    for step in (1, 2): save_checkpoint(d + '/last', dict(x=torch.full((2,), float(step))), dict(step=step))
    tensors, state = load_checkpoint(d + '/last'); print(tensors, state)
    f = Path(d)/'last'/'tensors.safetensors'; f.write_bytes(f.read_bytes()[:-1] + b'?')                 # one byte flipped
    with warnings.catch_warnings(record=True) as said: test_eq(load_checkpoint(d + '/last')[1], dict(step=1))
    print(said[0].message)


# %% [markdown]
# What a checkpoint of a run holds: weights, Adam's moments, the states of owners, the meter; step, best epoch, history, the length of
# the log. No random state: every stream is a function of (seed, step).

# %%
#| export
def _pack(t:Training)->tuple:   # (tensors, state)
    "A training as tensors and JSON"
    tensors = {f'model.{k}': v for k, v in t.core.state_dict().items()} | {'meter': t.meter}
    for i, s in t.opt.state_dict()['state'].items(): tensors |= {f'opt.{i}.{k}': v for k, v in s.items()}
    for i, o in enumerate(t.owners()): tensors |= {f'owner.{i}.{k}': v for k, v in o.state_dict().items()}
    return tensors, dict(step=t.step, best=list(t.best), history=t.history, log_bytes=t.log_bytes, config=asdict(t.cfg), prints=t.prints)

def _under(tensors:dict, prefix:str)->dict:
    "The entries below a prefix, without it"
    return {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}

def _unpack(t:Training, tensors:dict, state:dict):
    "Put a checkpoint into a fresh training"
    t.core.load_state_dict(_under(tensors, 'model.'))
    moments = {}
    for k, v in _under(tensors, 'opt.').items(): i, name = k.split('.', 1); moments.setdefault(int(i), {})[name] = v
    t.opt.load_state_dict(t.opt.state_dict() | dict(state=moments))
    for i, o in enumerate(t.owners()): o.load_state_dict(_under(tensors, f'owner.{i}.'))
    t.meter = tensors['meter'].to(t.meter.device)
    t.step, t.best, t.history, t.log_bytes = state['step'], tuple(state['best']), state['history'], state['log_bytes']

def resume(
    t:Training,
    run:Path,      # run folder
)->bool:           # was there anything to go on from?
    "Go on from the newest whole checkpoint; the log is cut to it. Another configuration or other data is refused"
    found = load_checkpoint(run/'last')
    log = run/'log.jsonl'
    if found is None:
        log.write_bytes(b''); return False
    tensors, state = found
    for name, have, want in (('settings', state['config'], asdict(t.cfg)), ('data', state['prints'], t.prints)):
        if have == want: continue
        raise DataError(run, f'a checkpoint made with other {name}', f'the same {name}', 'Use another run folder, or remove this one.')
    _unpack(t, tensors, state)
    os.truncate(log, t.log_bytes)
    return True


# %% [markdown]
# ## Locks and signals
# The process that trains holds a lock on its run folder from before its first write, with its process number inside, so that a driver
# can find it. SIGTERM means: finish the step, save, stop.

# %%
#| export
class Busy(RuntimeError): "Another process is training in this run folder"
class Stopped(RuntimeError): "Training was asked to stop; the checkpoint is written and the run can be resumed"

@contextmanager
def locked(
    run:Path,    # run folder, made if need be
):
    "Hold the lock of a run folder"
    run = Path(run); run.mkdir(parents=True, exist_ok=True)
    with open(run/'lock', 'a+') as f:
        try: fcntl.flock(f, fcntl.LOCK_EX|fcntl.LOCK_NB)
        except BlockingIOError: raise Busy(f'{run}: another process trains here') from None
        f.truncate(0); f.write(str(os.getpid())); f.flush()
        yield
        f.truncate(0)

@contextmanager
def stop_signal():
    "A list that is no longer empty once SIGTERM has come (only the main thread can listen)"
    asked = []
    try: before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    except ValueError: yield asked; return
    try: yield asked
    finally: signal.signal(signal.SIGTERM, before)


# %%
with tempfile.TemporaryDirectory() as d:
    with locked(Path(d)):
        with expect_fail(Busy, 'another process'):
            with locked(Path(d)): pass
    with locked(Path(d)): pass                                    # free again
with stop_signal() as asked:
    os.kill(os.getpid(), signal.SIGTERM); assert asked

# %% [markdown]
# ## The loop

# %%
#| export
LOG_EVERY = 50     # steps between two lines of the log

def _say(t:Training, run:Path, **line):
    "Append a line to the log: nothing of the clock, so it is the same on every machine and after every resume"
    with open(run/'log.jsonl', 'ab') as f: f.write((json.dumps(line)+'\n').encode()); f.flush(); t.log_bytes = f.tell()

def _log(t:Training, run:Path, epoch:int, clock:list):
    "One line of means since the last, and one of the clock; the only place that waits for the device"
    loss, norm, clipped, n = t.meter.tolist(); t.meter.zero_()
    _say(t, run, step=t.step, epoch=epoch, loss=loss/n, norm=norm/n, clipped=clipped/n)
    now = time.perf_counter(); seconds, clock[0] = now-clock[0], now
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    with open(run/'timing.jsonl', 'a') as f:
        line = dict(step=t.step, steps=t.steps, seconds=round(seconds, 4), pairs=int(n)*t.cfg.batch, peak_mib=round(peak))
        f.write(json.dumps(line)+'\n')

def _validate(t:Training, run:Path, epoch:int):
    "Rank the val split; keep the model with the highest rSum, the earlier one on ties"
    m = summary(rank_split(t.core, t.val)); t.history.append(m)
    _say(t, run, step=t.step, epoch=epoch, val=m)
    if m['rsum'] > t.best[0]:
        t.best = (m['rsum'], epoch)
        save_pretrained(t.core, run/'best'); t.vocab.save(run/'best'/'vocab.json')

def _finished(t:Training, run:Path)->Training:
    "Ranks of the val split by the best model, beside the model"
    t.core.load_state_dict(from_pretrained(run/'best').state_dict())
    save_ranks(run/'ranks_val.npz', rank_split(t.core, t.val))
    return t

def save_ranks(path, r:Ranks):
    "Ranks as a file; written whole or not at all"
    tmp = Path(path).with_name('ranks.tmp.npz')
    np.savez(tmp, i2t=np.asarray(r.i2t, 'int32'), t2i=np.asarray(r.t2i, 'int32')); os.replace(tmp, path)

def load_ranks(path)->Ranks:
    "Ranks from a file"
    with np.load(path, allow_pickle=False) as z: return Ranks(z['i2t'], z['t2i'])


# %%
#| export
def fit(
    cfg:Config,
    run,                       # run folder; what is there is gone on from
    data:Corpus=None,          # None: opened from the configuration
    folder='',                 # of a data set that is not embedded
    device:str='cpu',
    every:int=200,             # steps between checkpoints (there is one after every epoch too)
    progress:bool=True,        # show a bar
    on_step:Callable=None,     # called with the number of steps done, after each
)->Training:                   # holding the best model
    "Train to the end, from where the last checkpoint left off"
    run = Path(run)
    with locked(run), stop_signal() as stop:
        t = prepare(cfg, data or corpus(cfg, folder), device)
        resume(t, run)
        clock = [time.perf_counter()]
        bar = tqdm(total=t.steps, initial=t.step, disable=not progress, mininterval=1., desc=cfg.method, unit='step')
        while t.step < t.steps:
            epoch, i = divmod(t.step, t.per_epoch)
            caps = order(len(t.train.lengths), cfg.seed, epoch)[i*cfg.batch:(i+1)*cfg.batch]
            train_step(t, caps, epoch); t.step += 1; bar.update()
            if on_step: on_step(t.step)
            ends, halt = i == t.per_epoch-1, bool(stop)
            if ends or t.step % LOG_EVERY == 0: _log(t, run, epoch, clock)
            if ends: _validate(t, run, epoch)
            if ends or halt or t.step % every == 0: save_checkpoint(run/'last', *_pack(t))
            if halt: raise Stopped(f'{run}: stopped after step {t.step} of {t.steps}; run it again to go on')
        bar.close()
        return _finished(t, run)


# %% [markdown]
# Three epochs on the tiny world: one of warm-up, two of hardest negatives.

# %%
with tempfile.TemporaryDirectory() as d:
    t = fit(tiny, d, world, progress=False)
    print(sorted(p.name for p in Path(d).iterdir())); print(Path(d, 'log.jsonl').read_text()[:600])
    log = [json.loads(l) for l in Path(d, 'log.jsonl').read_text().splitlines()]
[round(m['rsum'], 1) for m in t.history], t.best


# %% [markdown]
# ## Killed and resumed
# The promise, checked here by stopping after step 5 and going on (the tests kill a process at random steps with SIGKILL): weights,
# moments, log and ranks are the same bytes.

# %%
def digest(d):
    files = [p for p in sorted(Path(d).rglob('*')) if p.is_file() and p.name not in ('timing.jsonl', 'lock') and p.parent.name != 'previous']
    return {str(p.relative_to(d)): sha256_file(p) for p in files}

def stop_at(n):
    def hook(step):
        if step == n: os.kill(os.getpid(), signal.SIGTERM)
    return hook

with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as broken:
    fit(tiny, whole, world, progress=False)
    with expect_fail(Stopped, 'stopped after step 5'): fit(tiny, broken, world, progress=False, every=2, on_step=stop_at(5))
    fit(tiny, broken, world, progress=False)
    test_eq(digest(whole), digest(broken)); print(f'{len(digest(whole))} files are equal')
    with expect_fail(DataError, 'made with other settings'): fit(Config(**(asdict(tiny)|dict(lr=.5))), broken, world, progress=False)


# %% [markdown]
# ## Evaluate
# The only function that opens the test split. It ranks with the best model; where the truth of every pair is known (scenes), it also
# gives mAP@R under the truth.

# %%
#| export
def evaluate(
    run,                   # run folder
    data:Corpus,
    part:str='test',
    device='cpu',
)->tuple:                  # (Ranks, Split, Batches)
    "Ranks of a split by the best model of a run, written to `ranks_<part>.npz`"
    run = Path(run)
    vocab, model = Vocabulary.load(run/'best'/'vocab.json'), from_pretrained(run/'best', device)
    batches = Batches(data.split(part), vocab, device)
    r = rank_split(model, batches); save_ranks(run/f'ranks_{part}.npz', r)
    return r, batches.split, batches


# %%
#| hide
import nbdev; nbdev.nbdev_export()
