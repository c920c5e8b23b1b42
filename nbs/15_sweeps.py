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
# # Sweeps
# > Many runs from one file: what each needs, in which order, how long, and what is left when something is killed.

# %%
#| default_exp sweeps

# %%
#| export
import argparse
import difflib
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from itm_nb.runs import (
    BUSY, INPUTS, PLACES, RESUMABLE, SetupError, about_folder, command, done, finished, identity, in_turn, parameters, project, read_yaml,
    resolve, run_id, source_hash, template)

# %%
#| hide
import tempfile
from fastcore.test import expect_fail, test_eq
from itm_nb.runs import FIRST

# %% [markdown]
# ## A sweep file
# A sweep file names settings common to all runs (`base`), what is compared (`arms`), and what is repeated (`blocks`: seeds, folds). Every
# arm runs in every block; a block is completed before the next is begun, so that a sweep cut short leaves balanced data. Beside the arms
# stand `controls` (rows that no training makes) and `runs` (what others need, e.g. a common start). The other parts:
#
# | part | holds |
# |---|---|
# | `profiles` | named overrides of `base`, perhaps with a `cost` of their own; `--profile tiny` takes one, and its runs form a sweep of their own |
# | `search` | settings to try per arm, on validation alone, in one block; the best goes on |
# | `cost` | per template or arm: seconds to `start`, seconds an `epoch`, `mib`, `gpu_mib`; used until something is measured |
#
# In a run, `template` names the notebook (else `train`, for controls `evaluate`), and an input such as `init` or `scores` names **another
# run of the same file**: of the same block, or of another one as `{run: NAME, seed: 0}`.

# %%
#| export
PARTS = dict(runs='train', arms='train', controls='evaluate')      # where runs are named, and their template if they name none
WORDS = ('oracle', 'chance')         # scores that are words, even where a run is called so
_KINDS = dict(title=str, about=str, base=dict, profiles=dict, blocks=list, runs=dict, arms=dict, controls=dict, search=dict, cost=dict,
              report=str)

def sweep_file(
    name:str,        # 'scenes', or the path of a yaml file
)->Path:
    "The file of a sweep"
    if name.endswith(('.yaml', '.yml')): path = Path(name)
    else: path = project()/'nbs'/'experiments'/'sweeps'/f'{name}.yaml'
    if path.is_file(): return path
    there = sorted(p.stem for p in (project()/'nbs'/'experiments'/'sweeps').glob('*.yaml'))
    raise SetupError(f'no sweep called {name!r}; there are {there}')

def _must_be(path, what, x, kind):
    if not isinstance(x, kind): raise SetupError(f'{path.name}: {what} is {type(x).__name__}; wanted {kind.__name__}')

def read_sweep(
    path:Path,
    profile:str='',  # one of its profiles
)->dict:             # its parts; those it lacks are empty
    "A sweep file, checked: only known keys, every part of the right kind"
    spec = read_yaml(path)
    for k, v in spec.items():
        if k not in _KINDS: raise SetupError(f'{path.name}: no part called {k!r}; there are {", ".join(_KINDS)}')
        _must_be(path, k, v, _KINDS[k])
    missing = [k for k in ('title', 'blocks', 'arms') if not spec.get(k)]
    if missing: raise SetupError(f'{path.name}: without {", ".join(missing)}')
    spec = {k: kind() for k, kind in _KINDS.items()} | spec
    for b in spec['blocks']: _must_be(path, 'a block', b, dict)
    for k in ('runs', 'arms', 'controls', 'profiles', 'cost'):
        for n, own in spec[k].items(): _must_be(path, f'{k}: {n}', own or {}, dict)
    if len(names := [n for k in PARTS for n in spec[k]]) > len(set(names)): raise SetupError(f'{path.name}: two runs of one name')
    if profile and profile not in spec['profiles']:
        raise SetupError(f'{path.name}: no profile called {profile!r}; there are {", ".join(spec["profiles"]) or "none"}')
    return _with_profile(spec, dict(spec['profiles'][profile] or {})) if profile else spec

def _with_profile(spec, own)->dict:
    "A profile's settings over the base; a profile that declares its own cost replaces every other"
    cost = own.pop('cost', None); spec = spec | dict(base=spec['base'] | own)
    if cost is None: return spec
    bare = lambda part: {n: {k: v for k, v in (x or {}).items() if k != 'cost'} for n, x in spec[part].items()}
    return spec | dict(cost=cost) | {part: bare(part) for part in PARTS}


# %% [markdown]
# From the file to runs: settings are joined (base, block, the run's own), inputs become run folders, and the id of a run follows from all
# of it, its parents' ids included. So a changed parent has a new id, and so have all its descendants.

# %%
#| export
@dataclass(frozen=True)
class Entry:
    "One run of a sweep"
    template:str
    arm:str
    values:dict      # all parameters
    out:Path         # run folder
    block:int=0      # number of its block; -1: a trial of a search
    needs:tuple=()   # run folders of its parents
    cost:dict=field(default_factory=dict)    # as declared

def _named(spec)->dict:
    "Every run of a block: name -> its own settings, with `template`"
    return {n: dict(template=kind) | (own or {}) for part, kind in PARTS.items() for n, own in spec[part].items()}

def _block_of(spec, block, change):
    "Number of the block that differs from `block` in these values"
    want = block | change
    if want in spec['blocks']: return spec['blocks'].index(want)
    raise SetupError(f'no block {want}; there are {spec["blocks"]}')

def _links(own, names, spec, b)->dict:
    "Inputs that name other runs: input -> [(name, number of the block)]"
    out = {}
    for k in INPUTS:
        given = own.get(k); given = given if isinstance(given, list) else [given]
        known = [x if isinstance(x, dict) else dict(run=x) for x in given if x and x not in WORDS]
        free = k not in ('init', 'lists', 'generator') and not isinstance(own.get(k), list)        # may be a file or a word
        if not known or free and known[0].get('run') not in names: continue
        for x in known:
            if x.get('run') not in names:
                near = difflib.get_close_matches(str(x.get('run')), names, 1)
                hint = f'did you mean {near[0]!r}?' if near else f'there are {", ".join(names)}'
                raise SetupError(f'{k} names {x.get("run")!r}, which is no run of this sweep; {hint}')
        out[k] = [(x['run'], _block_of(spec, spec['blocks'][b], {a: v for a, v in x.items() if a != 'run'})) for x in known]
    return out


# %%
#| export
class _Maker:
    "Makes the entries of a sweep, each once, parents first"
    def __init__(self, spec, name, runs, places, chosen):
        self.spec, self.name, self.runs, self.places, self.chosen = spec, name, Path(runs), places, chosen
        self.own, self.made, self.open = _named(spec), {}, trials(spec).keys() - chosen.keys()
        self.known = {t: parameters(template(t)) for t in {o['template'] for o in self.own.values()}}
        every = set().union(*self.known.values())
        for given in (spec['base'], *spec['blocks']):
            for k in given.keys() - every: resolve(next(iter(self.known.values())), {k: given[k]})       # says what is near

    def entry(self, arm, b, path=()):
        "The entry of a run in a block, or None where it waits for a search"
        if arm in path: raise SetupError(f'{self.name}: {" <- ".join([*path, arm])}: a run that needs itself')
        if arm in self.open: return None
        if (arm, b) not in self.made: self.made[arm, b] = self.new(arm, b, self.own[arm], (*path, arm), self.chosen.get(arm))
        return self.made[arm, b]

    def new(self, arm, b, own, path=(), found=None, number=None):
        "Join the settings, link the inputs, name the run"
        links = {k: [self.entry(n, c, path) for n, c in x] for k, x in _links(own, self.own, self.spec, b).items()}
        if any(e is None for es in links.values() for e in es): return None
        kind = own['template']; known = self.known[kind]
        common = {k: v for k, v in (self.spec['base'] | self.spec['blocks'][b]).items() if k in known}
        given = common | {k: v for k, v in own.items() if k not in ('template', 'cost')} | (found['settings'] if found else {})
        given |= {k: ','.join(str(e.out) for e in es) for k, es in links.items()} | dict(arm=arm, sweep=self.name)
        if found and 'search' in known: given['search'] = json.dumps(found, sort_keys=True)
        values = resolve(known, given | {k: v for k, v in self.places.items() if k in known})
        at = self.runs/self.name/run_id(template(kind).stem, values)
        cost = (self.spec['cost'].get(kind) or {}) | (own.get('cost') or {})
        needs = tuple(dict.fromkeys(str(e.out) for es in links.values() for e in es))
        return Entry(kind, arm, values | dict(out=str(at)), at, b if number is None else number, needs, cost)

def entries(
    spec:dict,        # from `read_sweep`
    name:str,         # of the sweep
    runs:Path,        # where runs go
    places:dict={},   # folder, cache, models, workers, device, progress
    chosen:dict={},   # from `choose`: what a search has found; arms that wait for theirs are left out
)->list:              # of Entry, block by block, parents before their children
    "Every run of a sweep, in the order in which they are started"
    make = _Maker(spec, name, runs, places, chosen)
    for b in range(len(spec['blocks'])):
        for arm in make.own: make.entry(arm, b)
    out = sorted((e for e in make.made.values() if e), key=lambda e: e.block)
    if len({e.out.name for e in out}) < len(out): raise SetupError(f'{name}: two entries are one and the same run')
    return out


# %% [markdown]
# ## Searching for settings
# Tuning one method more than another is a comparison of patience. So a search gives **every arm the same number of trials**, looks at
# validation only (the test split stays closed), in one block; the best trial's settings go on into all blocks, and each record says how many were
# tried and what each trial reached. From the trials one can also read what fewer would have found: *best of n against n*.

# %%
#| export
def trials(
    spec:dict,        # from `read_sweep`
)->dict:              # arm -> list of settings to try
    "The trials of a search: a list of settings as it is, names with lists of values as a grid"
    def each(x): return x if isinstance(x, list) else [dict(zip(x, v)) for v in itertools.product(*x.values())]
    wrong = spec['search'].keys() - {'block', 'arms'}
    if wrong: raise SetupError(f'search: no part called {wrong.pop()!r}; there are block, arms')
    out = {arm: each(x) for arm, x in spec['search'].get('arms', {}).items()}
    if missing := out.keys() - _named(spec).keys(): raise SetupError(f'search: no run called {missing.pop()!r}')
    if len({len(x) for x in out.values()}) > 1:
        raise SetupError('search: unequal budgets: ' + ', '.join(f'{a} {len(x)}' for a, x in out.items()))
    return out

def searches(
    spec:dict,        # from `read_sweep`
    name:str,         # of the sweep
    runs:Path,        # where runs go
    places:dict={},   # folder, cache, models, workers, device, progress
)->list:              # of Entry, named arm~number; what they need stands before them
    "The runs of a search"
    tried = trials(spec)
    if not tried: return []
    b = _block_of(spec, {}, spec['search'].get('block') or spec['blocks'][0]); out = []
    make = _Maker(spec | dict(search={}), name, runs, places, {})
    for arm, settings in tried.items():
        for i, x in enumerate(settings):
            out.append(make.new(f'{arm}~{i}', b, make.own[arm] | x | dict(test=False), (arm,), number=-1))
    return list(make.made.values()) + out

def best_of(
    vals:list,        # validation rSum of n trials; None where one failed
)->list:              # n numbers
    "The best that k trials, drawn without order, would have found on average, k = 1 ... n; a failed trial counts as 0"
    from math import comb
    x, n = sorted(v or 0. for v in vals), len(vals)
    return [sum(comb(i, k-1)*v for i, v in enumerate(x))/comb(n, k) for k in range(1, n+1)]

def choose(
    spec:dict,          # from `read_sweep`
    todo:list,          # from `searches`
    given_up=(),        # numbers of entries that failed: tried, and not chosen
)->dict:                # arm -> settings, tried, failed, block, val; arms with an open trial are left out
    "The best settings of every arm: highest validation rSum, the earlier one on ties"
    out, fell = {}, {todo[i].arm for i in given_up}
    at = {e.arm: e for e in todo if e.block < 0}
    for arm, settings in trials(spec).items():
        es = [at[f'{arm}~{i}'] for i in range(len(settings))]; ok = [finished(e.out, e.values) for e in es]
        if not any(ok) or not all(o or e.arm in fell for o, e in zip(ok, es)): continue
        vals = [json.loads((e.out/'val.json').read_text('utf-8'))['metrics']['val']['rsum'] if o else None for o, e in zip(ok, es)]
        i = max(range(len(vals)), key=lambda i: (-1. if vals[i] is None else vals[i], -i))
        block = spec['search'].get('block') or spec['blocks'][0]
        out[arm] = dict(settings=settings[i], tried=len(es), failed=ok.count(False), block=block, val=vals, best_of=best_of(vals))
    return out


# %% [markdown]
# A file with all of it: a warm start per block, two arms that go on from it, their average, and a search of two trials each.

# %%
tmp = tempfile.TemporaryDirectory(); here = Path(tmp.name)
text = """
title: A fork
base: {preset: tiny, epochs: 2}
profiles: {long: {epochs: 20}, unknown: {cost: {}}}
blocks: [{seed: 0}, {seed: 1}]
runs: {warm: {method: vse0}}
arms:
  vsepp: {method: vsepp, init: warm}
  infonce: {method: infonce, init: warm}
  both: {template: evaluate, scores: [vsepp, infonce]}
controls: {oracle: {scores: oracle}}
search: {block: {seed: 0}, arms: {vsepp: {margin: [0.1, 0.2]}, infonce: [{temperature: 0.05}, {temperature: 0.1}]}}
cost: {train: {start: 8, epoch: 2, mib: 500}, evaluate: {start: 8}}
"""
(here/'fork.yaml').write_text(text); spec = read_sweep(here/'fork.yaml')
provisional = {a: dict(settings=x[0]) for a, x in trials(spec).items()}
todo = entries(spec, 'fork', here/'runs', chosen=provisional)
for e in todo: print(e.block, e.arm.ljust(8), e.out.name, '<-', *(Path(p).name for p in e.needs))

# %%
by = {(e.arm, e.block): e for e in todo}
test_eq(by['vsepp', 0].needs, (str(by['warm', 0].out),)); test_eq(len(by['both', 1].needs), 2)
test_eq([e.arm for e in entries(spec, 'fork', here/'runs')], ['warm', 'oracle']*2)                # the rest waits for its search
test_eq([e.arm for e in searches(spec, 'fork', here/'runs')], ['warm', 'vsepp~0', 'vsepp~1', 'infonce~0', 'infonce~1'])
other = entries(spec | dict(base=spec['base'] | dict(lr=.01)), 'fork', here/'runs', chosen=provisional)      # parents change: all ids change
assert not {e.out.name for e in other if e.arm != 'oracle'} & {e.out.name for e in todo}
test_eq(read_sweep(here/'fork.yaml', 'long')['base']['epochs'], 20)
bare = entries(read_sweep(here/'fork.yaml', 'unknown'), 'fork', here/'runs', chosen=provisional)
test_eq([(e.out, e.cost) for e in bare], [(e.out, {}) for e in todo])
test_eq(best_of([1., 3., None]), [4/3, 7/3, 3.])


# %%
def changed(**parts): return spec | dict(search={}) | parts
def says(text, **parts):
    with expect_fail(SetupError, text): entries(changed(**parts), 'x', here)
says("did you mean 'warm'", arms=dict(a=dict(init='warn')))
says('a run that needs itself', arms=dict(a=dict(init='b'), b=dict(init='a')))
says('no block', arms=dict(a=dict(init=dict(run='warm', seed=7))))
says("did you mean 'seed'", blocks=[dict(sede=0)], arms=dict(a={}))
with expect_fail(SetupError, 'unequal budgets: vsepp 2, infonce 1'): trials(changed(search=dict(arms=dict(vsepp=dict(margin=[.1, .2]), infonce=[{}]))))
with expect_fail(SetupError, 'no profile called'): read_sweep(here/'fork.yaml', 'short')

# %% [markdown]
# Ids of runs without parents are what they were when the first records were committed:

# %%
committed = [json.loads(p.read_text('utf-8')) for p in sorted((project()/'figures'/'results').glob('*.json'))]
early = [r for r in committed if r['kind'] in ('run', 'control') and set(r['config']) == set(FIRST['train' if r['kind'] == 'run' else 'evaluate'])]
for r in early: test_eq(run_id('train' if r['kind'] == 'run' else 'evaluate', r['config']), r['id'])
len(early)

# %% [markdown]
# ## How long, how much memory
# Before a sweep is started one wants to know what it will take. What finished runs took is the best guide: the same settings in another
# block; else the same data and model, by the epoch; else what the file declares; else it is said that nothing is known. Own runs come
# before committed records, which may be of another machine and leave out what starting a notebook takes.

# %%
#| export
_BLOCK = ('seed', 'fold', 'world', 'arm', 'name', *INPUTS)                # what makes no run longer
_TUNED = ('method', 'warmup', 'margin', 'temperature', 'lr', 'decay', 'clip', 'epochs', 'batch', 'carry', 'test')   # or only by the epoch

@dataclass
class Estimate:
    "What a run will take"
    seconds:float=None   # None: not known
    mib:float=None
    how:str='unknown'    # 'measured', 'by the epoch' (both perhaps 'from records'), 'declared'

def _alike(name, values)->tuple:
    "What runs of the same length, and of the same length per epoch, have in common"
    what = {k: v for k, v in identity(name, values).items() if k not in _BLOCK}
    loose = {k: v for k, v in what.items() if k not in _TUNED}
    return name + json.dumps(what, sort_keys=True), name + json.dumps(loose, sort_keys=True)

def _lines(path): return [json.loads(x) for x in path.read_text('utf-8').splitlines()] if path.is_file() else []

def measured(
    runs:Path,           # where runs go: all sweeps are looked at
    records:Path=None,   # a folder of committed records
)->list:                 # (settings alike, alike by the epoch, epochs, seconds, MiB, '' or 'records')
    "What finished runs took"
    out = []
    for at in sorted(p.parent for p in Path(runs).glob('*/*/wall.jsonl') if done(p.parent)):
        try:
            values, name = json.loads((at/'params.json').read_text('utf-8')), about_folder(at)['template']
            seconds = sum(x['seconds'] for x in _lines(at/'wall.jsonl'))
            mib = max((x['peak_mib'] for x in _lines(at/'timing.jsonl')), default=None)
        except (OSError, ValueError, KeyError, TypeError): continue
        out.append((*_alike(name, values), values.get('epochs', 1), seconds, mib, ''))
    for p in sorted(Path(records).glob('*.json')) if records else ():
        r = json.loads(p.read_text('utf-8'))
        if r.get('kind') == 'run' and r.get('cost'):
            out.append((*_alike('train', r['config']), r['config']['epochs'], r['cost']['seconds'], r['cost']['peak_mib'], 'records'))
    return out

def estimate(
    e:Entry,
    known:list,          # from `measured`
)->Estimate:
    "The median of like runs, else what is declared"
    same, loose = _alike(template(e.template).stem, e.values); epochs = e.values.get('epochs', 1)
    for at, want, each, how in ((0, same, lambda x: x[3], 'measured'), (1, loose, lambda x: x[3]/x[2]*epochs, 'by the epoch')):
        for source, extra, said in (('', 0, how), ('records', e.cost.get('start', 0), f'{how}, from records')):   # training alone
            xs = [x for x in known if x[at] == want and x[5] == source]
            if not xs: continue
            mib = max((x[4] for x in xs if x[4]), default=e.cost.get('mib'))
            return Estimate(statistics.median(map(each, xs)) + extra, mib, said)
    if 'start' not in e.cost or 'epochs' in e.values and 'epoch' not in e.cost: return Estimate(None, e.cost.get('mib'))
    return Estimate(e.cost.get('start', 0) + e.cost.get('epoch', 0)*epochs, e.cost.get('mib'), 'declared')


# %%
x = estimate(by['vsepp', 0], []); test_eq((x.seconds, x.mib, x.how), (12, 500, 'declared'))
known = [(*_alike('train', by['vsepp', 1].values), 2, 30., 640, '')]
test_eq(estimate(by['vsepp', 0], known), Estimate(30., 640, 'measured'))                       # the other block
long = entries(read_sweep(here/'fork.yaml', 'long'), 'fork', here/'runs', chosen=provisional)
test_eq(estimate(next(e for e in long if e.arm == 'infonce'), known), Estimate(300., 640, 'by the epoch'))
test_eq(estimate(Entry('train', 'x', by['warm', 0].values, here), []).how, 'unknown')

# %% [markdown]
# ## The driver
# It starts each run as a process of its own, watches, and starts the next. It holds nothing that cannot be read back from the disk: kill
# it at any moment and start it again. A run whose parent failed is *blocked*. With a time budget a block is begun only if it will be
# completed, no run is begun that will not fit, and what still runs at the end is asked to save. Runs side by side share the machine and
# the accelerator: one is begun only if its declared or measured memory still fits.

# %%
#| export
BLOCKED = 77      # code of a run whose parent failed

def launch(
    e:Entry,
    more:tuple=(),     # further arguments of `itm_run`
)->subprocess.Popen:
    "Start one run in its own session; what it prints goes to worker.log in its folder"
    e.out.mkdir(parents=True, exist_ok=True)
    tmp = e.out/f'.params.{os.getpid()}.tmp'; tmp.write_text(json.dumps(e.values, indent=1))
    os.replace(tmp, e.out/'params.json')               # whole at every moment: another driver's worker may be reading it
    code = 'import sys; from itm_nb.runs import itm_run; sys.exit(itm_run())'
    with open(e.out/'worker.log', 'ab') as log:
        return subprocess.Popen([sys.executable, '-c', code, e.template, '-f', str(e.out/'params.json'), '--quiet', *more],
                                stdout=log, stderr=log, start_new_session=True, env=os.environ | dict(OMP_NUM_THREADS=str(e.values.get('threads', 1))))

@dataclass
class Plan:
    "What a driver may start, and when"
    cost:Callable=lambda e: Estimate()     # Entry -> Estimate
    budget:float=None                      # seconds for everything; None: as long as it takes
    memory:float=None                      # MiB that all runs together may use; None: no limit
    gpu_memory:float=None                  # the same on the accelerator, for runs that declare `gpu_mib`

    def fits_memory(self, e, others)->bool:      # Entry, Entries that run now
        "Is there room beside the others? Alone a run is always begun"
        if not others: return True
        need = lambda x, k: (self.cost(x).mib if k == 'mib' else x.cost.get(k)) or 0
        room = dict(mib=self.memory, gpu_mib=self.gpu_memory)
        return all(v is None or sum(need(x, k) for x in (e, *others)) <= v for k, v in room.items())

    def fits_time(self, e, rest, jobs, begun, left)->bool:     # rest: waiting Entries of its block; begun: was the block? left: seconds
        "Will it end in time, and if its block is new, the whole block?"
        if left is None: return True
        seconds = [self.cost(x).seconds or 0 for x in rest]
        return (self.cost(e).seconds or 0) <= left and left > 0 and (begun or max(sum(seconds)/jobs, *seconds) <= left)

class _Driver:
    "Which runs wait, live, have failed"
    def __init__(self, todo, jobs, start, plan):
        self.todo, self.jobs, self.start, self.plan, self.began = todo, jobs, start, plan, time.monotonic()
        self.waiting = [i for i, e in enumerate(todo) if not finished(e.out, e.values)]
        self.live, self.failed, self.later, self.late = {}, {}, {}, set()
        self.home, self.first = {str(e.out): i for i, e in enumerate(todo)}, min((todo[i].block for i in self.waiting), default=0)

    def left(self): return None if self.plan.budget is None else self.plan.budget - (time.monotonic() - self.began)

    def verdict(self, i)->str:
        "What is to be done about a waiting run: 'go', 'wait', 'late', 'done', 'blocked'"
        e = self.todo[i]; kin = [self.home.get(p) for p in e.needs]
        if any(k in self.failed or k is None and not done(p) for k, p in zip(kin, e.needs)): return 'blocked'
        if self.later.get(i, 0) > time.monotonic() or any(k in self.live or k in self.waiting for k in kin): return 'wait'
        if finished(e.out, e.values): return 'done'
        rest = [self.todo[j] for j in self.waiting if self.todo[j].block == e.block]
        size, running = sum(x.block == e.block for x in self.todo), [self.todo[j] for j in self.live]
        begun = e.block <= self.first or len(rest) < size
        if i in self.late or not self.plan.fits_time(e, rest, self.jobs, begun, self.left()): return 'late'
        return 'go' if len(self.live) < self.jobs and self.plan.fits_memory(e, running) else 'wait'

    def begin(self)->bool:
        "Start what may be started; False where nothing will ever change"
        said = {}
        for i in list(self.waiting):
            said[i] = self.verdict(i)
            if said[i] != 'wait' and said[i] != 'late': self.waiting.remove(i)
            if said[i] == 'go': self.live[i] = self.start(self.todo[i])
            if said[i] == 'blocked': self.failed[i] = BLOCKED
            if said[i] == 'late': self.late.add(i)
        return bool(self.live) or any(v != 'late' for i, v in said.items() if not self.hopeless(i, said))

    def hopeless(self, i, said):
        "Is a run too late, or does it wait for one that is?"
        kin = [self.home.get(p) for p in self.todo[i].needs]
        return said.get(i) == 'late' or any(k in self.waiting and self.hopeless(k, said) for k in kin)

    def reap(self, stopping):
        "Take up what has ended"
        for i, p in list(self.live.items()):
            if p.poll() is None: continue
            del self.live[i]
            if p.returncode == BUSY: self.waiting.insert(0, i); self.later[i] = time.monotonic() + 1     # another driver has it: look again
            elif p.returncode: self.failed[i] = RESUMABLE if stopping else p.returncode


# %%
#| export
def _progress(e:Entry)->float:
    "Share of a run that is done, as far as its timing tells"
    if finished(e.out, e.values): return 1.
    try: last = json.loads((e.out/'timing.jsonl').read_text().splitlines()[-1])
    except (OSError, IndexError, ValueError): return 0.
    return min(.99, last['step']/last['steps'])

def where(e:Entry)->str:
    "The block of a run, in words"
    return ' '.join(f'{k} {e.values[k]}' for k in ('fold', 'seed') if e.values.get(k, -1) != -1)

def _show(bar, todo, live):
    "Draw the bar anew where it has changed"
    n, names = round(sum(map(_progress, todo)), 1), ' '.join(f'{todo[i].arm}/{where(todo[i])}' for i in live)
    if (bar.n, bar.postfix) != (n, names): bar.n = n; bar.set_postfix_str(names, refresh=False); bar.refresh()

def drive(
    todo:list,          # of Entry
    jobs:int=2,         # side by side
    bar=None,           # a tqdm bar counting runs, or None
    plan:Plan=None,     # budget of time and memory
    start:Callable=launch,   # Entry -> a process: how a run is started
    pause:float=.3,     # seconds between two looks
)->dict:                # Entry index -> exit code, for those that did not finish: 75 resumable, 77 blocked by a failed parent
    "Run what is not finished; on SIGTERM, Ctrl-C or the end of the budget ask all running ones to save and wait for them"
    d, stop, told = _Driver(todo, jobs, start, plan or Plan()), [], False
    before = {s: signal.signal(s, lambda *_: stop.append(1)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        while True:
            more = d.begin() if not stop else bool(d.live)
            if bar is not None: _show(bar, todo, d.live)
            if not more: break
            if d.left() is not None and d.left() <= 0: stop.append(1)
            if stop and not told: told = True; [p.terminate() for p in d.live.values()]
            time.sleep(pause); d.reap(bool(stop))
    finally:
        for s, h in before.items(): signal.signal(s, h)
    return d.failed | {i: RESUMABLE for i in d.waiting}


# %% [markdown]
# To see it work, a toy whose worker is plain Python: it writes down that it was started, waits a moment, and joins what its parents
# wrote. One of the arms fails.

# %%
worker = here/'worker.py'
worker.write_text("""
import json, sys, time
from pathlib import Path
from itm_nb.runs import finish, start

def work(nb, values, out, bar):
    with open(out.parent/'started.txt', 'a') as f: f.write(out.name + chr(10))
    time.sleep(values['nap'])
    if values['fail']: (out/'FAILED').write_text('as it was told to'); return 1
    (out/'result').write_text(values['arm'] + ''.join(f"({Path(p, 'result').read_text()})" for p in values['init'].split(',') if p))
    finish(out); return 0

given = json.loads(Path(sys.argv[2]).read_text()); sys.exit(start(sys.argv[1], given, work=work)[0])
""")
cell = dict(cell_type='code', execution_count=None, outputs=[], id='0', metadata=dict(tags=['parameters']),
            source="seed = 0\nnap = 0.0\nfail = False\ninit = ''\narm = ''\nsweep = ''\nout = ''")
(here/'toy.ipynb').write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))

def toy_start(e):
    e.out.mkdir(parents=True, exist_ok=True); (e.out/'params.json').write_text(json.dumps(e.values))
    return subprocess.Popen([sys.executable, worker, e.template, e.out/'params.json'], stderr=open(e.out/'worker.log', 'ab'))

toy = dict(template=str(here/'toy.ipynb'))
family = changed(base={}, blocks=[dict(seed=0), dict(seed=1)], runs=dict(root=toy), controls={}, cost={},
                 arms=dict(left=toy | dict(init='root'), right=toy | dict(init='root', fail=True), both=toy | dict(init=['left', 'right']), alone=toy))
todo = entries(family, 'toy', here/'runs'); failed = drive(todo, 2, start=toy_start, pause=.02)
for i, e in enumerate(todo): print(e.block, e.arm.ljust(6), (e.out/'result').read_text() if done(e.out) else failed[i])

# %%
test_eq({(todo[i].arm, code) for i, code in failed.items()}, {('right', 1), ('both', BLOCKED)})
started = (here/'runs'/'toy'/'started.txt').read_text().split()
test_eq((len(started), len(set(started))), (8, 8))                                # nobody twice; what was blocked was never started
test_eq([todo[[x.out.name for x in todo].index(s)].block for s in started][:2], [0, 0])

# %% [markdown]
# With a budget of 44 seconds, 30 a run as far as anybody knows, two at a time. The first block is begun, since something has to be; the
# second needs 45 seconds and is not, although a run of it would fit.

# %%
family['arms'] = dict(a=toy, b=toy, c=toy); family['runs'] = {}
todo = entries(family, 'budget', here/'runs'); costs = lambda e: Estimate(30., 300, 'declared')
failed = drive(todo, 2, plan=Plan(costs, budget=44.), start=toy_start, pause=.02)
test_eq([(todo[i].block, todo[i].arm, c) for i, c in failed.items()], [(1, x, RESUMABLE) for x in 'abc'])
plan = Plan(costs, memory=500)
test_eq((plan.fits_memory(todo[0], []), plan.fits_memory(todo[0], todo[1:2])), (True, False))


# %% [markdown]
# ## What is there
# The state of a sweep is read from the disk alone.

# %%
#| export
def state(
    e:Entry,
    todo:list,       # all entries
)->str:              # 'done', 'failed: why', 'blocked: by whom', 'waiting' or how far it is
    "Where a run stands"
    if finished(e.out, e.values): return 'done'
    if (e.out/'FAILED').is_file(): return 'failed: ' + (e.out/'FAILED').read_text('utf-8').splitlines()[0][:100]
    kin = [x for x in todo if str(x.out) in e.needs]; theirs = [state(x, todo) for x in kin]
    for x, s in zip(kin, theirs):
        if s.startswith('failed'): return f'blocked: {x.arm} ({x.out.name}) {s}'
        if s.startswith('blocked'): return s
    return f'{100*p:.0f}%' if (p := _progress(e)) else 'waiting'

def stale(
    todo:list,           # of Entry
    records:Path=None,   # committed records are looked at too
)->list:                 # (Entry, where it was found, source it was made by)
    "Finished runs and records that were made by other source than the present one"
    now, out = source_hash(), []
    for e in todo:
        if finished(e.out, e.values) and (made := about_folder(e.out).get('source', 'unknown')) != now: out.append((e, str(e.out), made))
        p = Path(records or '')/f'{e.out.name}.json'
        if records and p.is_file() and (made := json.loads(p.read_text('utf-8'))['source']) != now: out.append((e, str(p), made))
    return out


# %%
todo = entries(changed(base={}, blocks=[dict(seed=0)], runs=dict(root=toy), controls={}, cost={},
                       arms=dict(left=toy | dict(init='root'), right=toy | dict(init='root', fail=True), both=toy | dict(init=['left', 'right']))), 'toy', here/'runs')
for e in todo: print(e.arm.ljust(6), state(e, todo))

# %%
test_eq([state(e, todo).split(':')[0] for e in todo], ['done', 'done', 'failed', 'blocked'])
test_eq(stale(todo), [])
made = json.loads((todo[0].out/'run.json').read_text()); (todo[0].out/'run.json').write_text(json.dumps(made | dict(source='older')))
test_eq([(e.arm, was) for e, _, was in stale(todo)], [('root', 'older')])


# %% [markdown]
# ## The report of a sweep
# When runs have ended, their records are gathered and the notebook `study` makes tables and figures of them. `--publish` puts records and
# pictures into `figures/`, where they are committed and where `README.md` gets its numbers. Scores from elsewhere that were brought into
# the sweep (`itm_run evaluate -p scores FILE -p sweep NAME`) are gathered with it.

# %%
#| export
def gather(
    todo:list,       # of Entry
    into:Path,       # folder of records
    name:str,        # of the sweep
    runs:Path=None,  # where runs go, to find foreign records of this sweep
):
    "Copy the records of finished runs; those of other runs of this sweep are removed"
    into.mkdir(parents=True, exist_ok=True)
    keep = {e.out.name: e.out.parent/'records'/f'{e.out.name}.json' for e in todo if finished(e.out, e.values)}
    for p in sorted((Path(runs)/name/'records').glob('*.json')) if runs else ():
        if json.loads(p.read_text('utf-8'))['kind'] == 'foreign': keep[p.stem] = p
    for p in into.glob('*.json'):
        if p.stem not in keep and json.loads(p.read_text('utf-8')).get('sweep') == name: p.unlink()
    for n, p in keep.items():
        if p.is_file(): shutil.copyfile(p, into/f'{n}.json')          # a run that makes no row of a table leaves no record

def report(
    name:str,            # of the sweep; '' for all
    records:Path,        # folder of records
    figures:Path,        # where tables and figures go
    work:Path,           # where the executed notebook goes
    kind:str='study',    # its template
    **more               # further parameters, for templates that have them
)->int:                  # exit code
    "Run a notebook on a folder of records, in a process of its own"
    shutil.rmtree(work, ignore_errors=True); known = parameters(template(kind))
    given = dict(sweep=name, records=str(records), figures=str(figures), out=str(work)) | {k: str(v) for k, v in more.items() if k in known}
    return launch(Entry(kind, kind, resolve(known, given), work)).wait()


# %% [markdown]
# ## The command

# %%
#| export
def seconds(
    text:str,     # '90', '90s', '10m', '1.5h'
)->float:
    "A length of time"
    m = re.fullmatch(r'(\d+(?:\.\d+)?)([smh]?)', text)
    if not m: raise SetupError(f'{text!r} is no length of time; wanted e.g. 90s, 10m, 1.5h')
    return float(m[1])*dict(s=1, m=60, h=3600)[m[2] or 's']

def _time(s): return f'{s:.0f} s' if s < 120 else f'{s/60:.0f} min' if s < 7200 else f'{s/3600:.1f} h'

def _dry(todo, open_, costs, jobs):
    "Every run with its estimate, then the sum"
    left = [e for e in todo if not finished(e.out, e.values)]; got = {e.out: costs(e) for e in left}
    for e in todo:
        c = got.get(e.out); guess = 'done' if c is None else 'unknown' if c.seconds is None else f'{_time(c.seconds)}, {c.how}'
        print(f'{"(open)" if e.arm in open_ else e.out.name:12} {e.arm:16} {where(e):14} {guess}')
    known = [c.seconds for c in got.values() if c.seconds is not None]; mib = [c.mib for c in got.values() if c.mib]
    print(f'{len(left)} of {len(todo)} runs to do: {_time(sum(known))} of work, about {_time(sum(known)/jobs)} with {jobs} side by side'
          + (f'; for {len(left)-len(known)} nothing is known' if len(known) < len(left) else ''))
    if mib: print(f'memory: up to {max(mib):.0f} MiB a run, {sum(sorted(mib)[-jobs:]):.0f} MiB side by side')
    if open_: print(f'(open): the settings of {", ".join(sorted(open_))} are found by the search first')

def _look(a, todo, spec, tried, open_, costs)->int:
    "Answer --dry-run, --status, --stale"
    every = tried + [e for e in todo if e.out not in {x.out for x in tried}]
    if a.dry_run:
        guess = {arm: dict(settings=x[0]) for arm, x in trials(spec).items() if arm in open_}
        shown = entries(spec, a.name, Path(a.runs), a.places, a.chosen | guess) if open_ else todo
        _dry(tried + [e for e in shown if e.out not in {x.out for x in tried}], open_, costs, a.jobs or _jobs())
    if a.status:
        for e in every: print(f'{state(e, every):8} {e.out.name} {e.arm:16} {where(e)}')
        if open_: print(f'{", ".join(sorted(open_))}: the search comes first')
    if a.stale:
        for e, at, was in (old := stale(every, project()/'figures'/'results')): print(f'{at} {e.arm} {where(e)}: made by {was}')
        print(f'{len(old)} made by other source than the present {source_hash()}')
    return 0

def _jobs(): return min(2, os.cpu_count() or 1)

def _parser()->argparse.ArgumentParser:
    "The arguments of `itm_sweep`"
    p = argparse.ArgumentParser(prog='itm_sweep', description='Run a sweep: every arm in every block, then tables and figures; what is '
                                'finished is never run again')
    p.add_argument('sweep', help='scenes, flickr8k_base, tiny, or the path of a yaml file')
    p.add_argument('--profile', default='', help='a profile of the file: other settings, in a sweep of their own')
    p.add_argument('--jobs', type=int, help=f'runs side by side (default: {_jobs()}; with ray what the cluster holds)')
    p.add_argument('--engine', choices=('local', 'ray'), default='local', help='where runs are started: this machine, or a Ray cluster')
    p.add_argument('--retries', type=int, default=2, help='ray: further tries of a run that failed or was lost (default: %(default)s)')
    p.add_argument('--accelerate', type=int, default=1, metavar='N', help='train every run in N processes (default: one)')
    p.add_argument('--runs', default='runs', help='where runs go (default: %(default)s)')
    p.add_argument('--budget', type=seconds, help='time for everything, e.g. 10m: no block is begun that will not be completed')
    p.add_argument('--memory', type=float, help='MiB for all runs together (default: what the machine has)')
    p.add_argument('--gpu-memory', type=float, help='MiB of the accelerator for all runs together (default: what it has)')
    p.add_argument('-p', nargs=2, action='append', default=[], metavar=('NAME', 'VALUE'), help='folder, cache, models, workers, device')
    p.add_argument('--dry-run', action='store_true', help='list the runs, what they will take, and stop')
    p.add_argument('--status', action='store_true', help='say what is finished, failed, blocked, and stop')
    p.add_argument('--stale', action='store_true', help='list what was made by other source than the present, and stop')
    p.add_argument('--publish', action='store_true', help='put records, tables and figures into figures/')
    return p


# %%
#| export
@command
def itm_sweep(argv=None)->int:
    "Run a sweep: every arm in every block, then tables and figures; what is finished is never run again"
    a = _parser().parse_args(argv)
    odd = [k for k, _ in a.p if k not in ('folder', 'cache', 'models', 'workers', 'device')]
    if odd: raise SetupError(f'a sweep fixes {odd[0]!r}; -p takes folder, cache, models, workers and device')
    path = sweep_file(a.sweep); spec = read_sweep(path, a.profile); a.told = spec['report']
    a.name, a.places = path.stem + (f'_{a.profile}' if a.profile else ''), dict(a.p) | dict(progress=False)
    tried = searches(spec, a.name, Path(a.runs), a.places); a.chosen = choose(spec, tried)
    todo = entries(spec, a.name, Path(a.runs), a.places, a.chosen); known = measured(a.runs, project()/'figures'/'results')
    open_, costs = trials(spec).keys() - a.chosen.keys(), lambda e: estimate(e, known)
    if a.dry_run or a.status or a.stale: return _look(a, todo, spec, tried, open_, costs)
    _has_data(tried + todo); _engine(a, tried + todo, costs)
    return _sweep(a, spec, tried, costs)

def _has_data(todo):
    "Refuse a sweep on data that is not there, before anything is started"
    for e in todo:
        folder = e.values.get('folder', '')
        if e.values.get('data') in ('scan', 'images') and not Path(folder or '?').is_dir():
            raise SetupError(f'data folder {folder!r} is not there; wanted the folder of the data set: -p folder PATH')

def _engine(a, todo, costs):
    "How a run is started, and how many at a time"
    more = ('--accelerate', str(a.accelerate)) if a.accelerate > 1 else (); begin = partial(launch, more=more); a.start, n = begin, _jobs()
    if a.engine == 'ray':
        from itm_nb.ray_engine import starter
        a.start, n = starter(todo, costs, a.retries, begin, a.accelerate)
    a.jobs = a.jobs or n

def _machine(device)->tuple:
    "MiB of memory: of the machine, of its accelerator where one is asked for"
    host = os.sysconf('SC_PAGE_SIZE')*os.sysconf('SC_PHYS_PAGES')/2**20
    if device != 'auto' or not shutil.which('nvidia-smi'): return host, None
    said = subprocess.run(['nvidia-smi', '--query-gpu=memory.total', '--format=csv,noheader,nounits'], capture_output=True, text=True)
    try: return host, float(said.stdout.splitlines()[0])
    except (IndexError, ValueError): return host, None

def _drive_all(a, todo, costs, budget)->dict:
    "Drive with a bar; say what did not finish"
    from tqdm import tqdm
    host, gpu = _machine(a.places.get('device'))
    plan = Plan(costs, budget, a.memory or host, a.gpu_memory or gpu) if a.engine == 'local' else Plan(costs, budget)
    look = '{l_bar}{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}] {postfix}'
    with tqdm(total=len(todo), unit='run', bar_format=look) as bar: failed = drive(todo, a.jobs, bar, plan, a.start)
    for i, code in failed.items():
        how = {RESUMABLE: 'not finished, resumable', BLOCKED: state(todo[i], todo)}.get(code, f'failed ({code})')
        print(f'{todo[i].arm} {where(todo[i])}: {how}; see {todo[i].out/"worker.log"}', file=sys.stderr)
    return failed

def _sweep(a, spec, tried, costs)->int:
    "Search, drive, gather, report, say where everything lies"
    began = time.perf_counter(); left = lambda: None if a.budget is None else a.budget - (time.perf_counter()-began)
    failed = {}
    if tried:
        print(f'{spec["title"]}: {len(tried)} runs of the search')
        failed = _drive_all(a, tried, costs, left())
        if RESUMABLE in failed.values(): print('stopped; the same command goes on from here'); return RESUMABLE
        a.chosen = choose(spec, tried, failed)
    todo = entries(spec, a.name, Path(a.runs), a.places, a.chosen)
    before = sum(finished(e.out, e.values) for e in todo)
    print(f'{spec["title"]}: {len(todo)} runs, {before} of them finished before; {a.jobs} side by side')
    codes = list(failed.values()) + list(_drive_all(a, todo, costs, left()).values())
    late = RESUMABLE in codes
    if late and a.budget is None: print('stopped; the same command goes on from here'); return RESUMABLE
    code = _report(a, todo)
    if late: print('the time is used up; the same command goes on from here'); return code or RESUMABLE
    print(f'{time.perf_counter()-began:.0f} s')
    return code or (1 if codes else 0)

def _report(a, todo)->int:
    "Records, tables and figures of what is finished"
    base, name = project()/'figures' if a.publish else Path(a.runs)/a.name/'report', a.name
    if not any(finished(e.out, e.values) for e in todo): print('nothing is finished yet'); return 0
    with in_turn(Path(a.runs)/name/'report.lock'):     # a second driver of the same folder waits here and then makes the same files
        gather(todo, base/'results', name, a.runs)
        code, kind = report(name, base/'results', base, Path(a.runs)/name/'study'), 'study'
        if a.told and not code:
            more = dict(runs=Path(a.runs)/name, folder=a.places.get('folder', '')); kind = a.told
            code = report(name, base/'results', base, Path(a.runs)/name/kind, kind, **more)
    if code: print(f'the report failed; see {Path(a.runs)/name/kind/"worker.log"}', file=sys.stderr)
    if code == 0: print((base/f'table_{name}.md').read_text('utf-8'))
    for f in sorted(base.glob(f'*{name}*')): print(f)
    return code


# %%
test_eq([seconds(x) for x in ('90', '90s', '10m', '1.5h')], [90, 90, 600, 5400])
with expect_fail(SetupError, 'no length of time'): seconds('soon')
itm_sweep([str(here/'fork.yaml'), '--dry-run', '--runs', str(here/'none')])

# %%
for argv in (['scnes'], ['tiny', '-p', 'seed', '3'], ['tiny', '--profile', 'gpu']): test_eq(itm_sweep(argv), 2)

# %%
#| hide
tmp.cleanup()

# %%
#| hide
import nbdev; nbdev.nbdev_export()
