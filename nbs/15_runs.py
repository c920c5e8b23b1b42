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
# # Runs
# > From a notebook and a few parameters to a finished run in a folder of its own.

# %%
#| default_exp runs

# %%
#| export
import argparse
import ast
import difflib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# %%
#| hide
import io
import tempfile
from contextlib import redirect_stderr
from fastcore.test import expect_fail, test_eq
from IPython.display import Markdown


# %% [markdown]
# An experiment is a notebook with a cell of parameters. This room runs it with others, strictly: a misspelt name or a wrong type is an
# error at once, never a run with the defaults. Everything a run leaves is in one folder; it is **finished when the file `DONE` is in
# it**, which is written last. Nothing heavy is imported until it is needed, so every `--help` is quick.
#
# ## Where notebooks lie

# %%
#| export
class SetupError(ValueError): "A command that cannot be carried out as given: what was wrong and what is possible"

def project(
    start=None,     # where to look first; None: the current folder
)->Path:            # the folder that holds nbs/experiments
    "The clone: the current folder or one above it, else the folder of an editable install"
    here = Path(start or Path.cwd()).resolve()
    for at in (here, *here.parents, Path(__file__).resolve().parent.parent if '__file__' in globals() else here):
        if (at/'nbs'/'experiments').is_dir() and (at/'settings.ini').is_file(): return at
    raise SetupError(f'no clone of itm_nb at or above {here.name}; run this in the cloned folder, or install with `pip install -e .`')

def fold_file(
    name:str,        # 'flickr8k_5', or the path of a json file
)->Path:
    "A file of folds"
    path = Path(name) if name.endswith('.json') else project()/'nbs'/'experiments'/'folds'/f'{name}.json'
    if path.is_file(): return path
    raise SetupError(f'no folds called {name!r}; there are {sorted(p.stem for p in path.parent.glob("*.json"))}')

def template(
    name:str,        # 'train', or the path of a notebook
)->Path:
    "The notebook of an experiment"
    if name.endswith('.ipynb'):
        if not Path(name).is_file(): raise SetupError(f'{name}: no such notebook')
        return Path(name)
    folder = project()/'nbs'/'experiments'; path = folder/f'{name}.ipynb'
    there = sorted(p.stem for p in folder.glob('*.ipynb'))
    if name not in there: raise SetupError(f'no experiment called {name!r}; there are {there}')
    return path


# %% [markdown]
# ## Parameters, strictly
# The cell tagged `parameters` is read, not run: names, defaults and comments. papermill itself only warns about a name it does not know
# and then uses the defaults; here a wrong name or type stops everything before a kernel is started.

# %%
#| export
@dataclass(frozen=True)
class Parameter:
    "One line of a parameters cell"
    name:str
    default:object
    about:str        # its comment

    def parse(self, given)->object:   # text from the command line, or a value from a file
        "The value, of the default's type"
        kind = type(self.default)
        if kind is bool and str(given).lower() in ('true', 'false'): return str(given).lower() == 'true'
        try:
            if kind is bool or (kind is int and isinstance(given, (float, bool))): raise ValueError
            return kind(given)
        except (TypeError, ValueError):
            raise SetupError(f'parameter {self.name} is {given!r}; wanted {kind.__name__}, e.g. {self.default!r}') from None

def parameters(
    notebook,       # path
)->dict:            # name -> Parameter
    "What can be set in a notebook: the assignments of its cell tagged `parameters`"
    cells = json.loads(Path(notebook).read_text('utf-8'))['cells']
    tagged = [''.join(c['source']) for c in cells if 'parameters' in c.get('metadata', {}).get('tags', [])]
    if len(tagged) != 1: raise SetupError(f'{Path(notebook).name}: {len(tagged)} cells tagged "parameters"; wanted one')
    lines, out = tagged[0].splitlines(), {}
    for node in ast.parse(tagged[0]).body:
        name = (node.target if isinstance(node, ast.AnnAssign) else node.targets[0]).id
        out[name] = Parameter(name, ast.literal_eval(node.value), lines[node.end_lineno-1][node.end_col_offset:].strip(' #'))
    return out

def resolve(
    known:dict,      # from `parameters`
    given:dict,      # name -> text or value
)->dict:             # all parameters with their values
    "The values a notebook will run with"
    for k in given:
        if k not in known:
            near = difflib.get_close_matches(k, known, 1)
            hint = f' (did you mean {near[0]!r}?)' if near else ''
            raise SetupError(f'no parameter called {k!r}{hint}; there are {", ".join(known)}')
    return {k: p.parse(given[k]) if k in given else p.default for k, p in known.items()}


# %%
def notebook(path, source, tags=('parameters',), more=()):
    "A notebook of a parameters cell and others, for examples"
    def cell(s, t=()):
        return dict(cell_type='code', execution_count=None, metadata=dict(tags=list(t)) if t else {}, outputs=[], source=s, id=hashlib.sha256(s.encode()).hexdigest()[:8])
    kernel = dict(name='python3', display_name='python3', language='python')
    Path(path).write_text(json.dumps(dict(cells=[cell(source, tags), *map(cell, more)], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    return Path(path)

tmp = tempfile.TemporaryDirectory(); here = Path(tmp.name)
nb = notebook(here/'toy.ipynb', "seed = 0       # of everything\nlr = 1e-3\nwide = False   # twice the width\narm = ''\nout = ''", more=["print(seed, lr)"])
known = parameters(nb); list(known.values())

# %%
test_eq(resolve(known, dict(seed='3', wide='true')), dict(seed=3, lr=1e-3, wide=True, arm='', out=''))
with expect_fail(SetupError, "did you mean 'seed'"): resolve(known, dict(sede='3'))
with expect_fail(SetupError, 'there are seed, lr, wide, arm, out'): resolve(known, dict(depth=3))
for bad in (dict(seed='abc'), dict(seed=.5), dict(wide='perhaps'), dict(lr='fast')):
    with expect_fail(SetupError, 'wanted'): resolve(known, bad)
with expect_fail(SetupError, 'wanted one'): parameters(notebook(here/'untagged.ipynb', 'seed = 0', ()))

# %% [markdown]
# ## What a run is called
# A run's id is a hash of what determines its result. Folders, devices, loader threads and progress bars do not. Some runs need others: the weights another
# run ended with, lists it mined, its scores. Such an **input** is given as a path, and enters the id as what lies there: a run by its
# own id, a file by its content. So a parent with another setting gives all its children other names, and moving a folder changes nothing.
#
# A parameter that is new in a template counts only where it differs from its default: ids that are known stay what they are. (The other
# side of this: the default of a parameter, once there, is never changed.)

# %%
#| export
PLACES = ('out', 'folder', 'cache', 'models', 'workers', 'device', 'progress', 'sweep', 'search')   # parameters that do not change a result
INPUTS = ('init', 'lists', 'generator', 'scores', 'img_of', 'img_ids', 'gallery', 'folds')  # those that name a run, a file, or a word
OF_A_RUN = (*PLACES, 'arm', 'init', 'carry', 'lists', 'generator', 'folds', 'fold', 'test')  # of `train`: no settings of training
FIRST = dict(    # parameters that always count: those the templates had when the first records were made
    train='data name preset rho world dims regions image_hidden image_pool text text_pool dim d_word dropout method warmup margin '
          'temperature epochs batch lr decay clip precision seed threads arm'.split(),
    evaluate='scores data name preset rho world regions seed arm'.split())

def sha256_of(path)->str:
    "SHA-256 of a file"
    with open(path, 'rb') as f: return hashlib.file_digest(f, 'sha256').hexdigest()

def about_folder(
    out,             # run folder
)->dict:             # id, template, source, parents; at least the id, which is the folder's name in a sweep
    "What a run folder says of itself"
    try: return json.loads((Path(out)/'run.json').read_text('utf-8'))
    except (OSError, ValueError): return dict(id=Path(out).name)

def origin(
    given:str,       # value of an input: a run folder, a file, a word; several runs are joined by commas
)->str:
    "What an input is, wherever it lies: the id of a run, the hash of a file, or the word itself"
    def one(x):
        p = Path(x)
        if p.is_file() and p.suffix: return f'sha256:{sha256_of(p)}'
        return about_folder(p)['id'] if (p/'run.json').is_file() or len(p.parts) > 1 else x
    return ','.join(map(one, given.split(',')))

def identity(
    name:str,        # of the template
    values:dict,     # all its parameters
)->dict:
    "What determines a result: parameters without places, inputs by what they are, and of later parameters those not at their default"
    what = {k: origin(v) if k in INPUTS and v else v for k, v in values.items() if k not in PLACES}
    if name not in FIRST: return what
    known = parameters(template(name))
    return {k: v for k, v in what.items() if k in FIRST[name] or v != known[k].default}

def run_id(
    name:str,        # of the template
    values:dict,     # all its parameters
)->str:              # 12 hexadecimal digits
    "What a run is called: a hash of the template's name and of all that determines the result"
    what = dict(template=name, **identity(name, values))
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]

def source_hash(
    method:str='',    # name of the method; one's own has a hash of its own, see `methods.code_of`
)->str:
    "A hash of the package's source (and of one's own method behind it), so that a record tells which code made it"
    h = hashlib.sha256()
    for p in sorted((project()/'itm_nb').glob('*.py')): h.update(p.name.encode() + p.read_bytes())
    if ':' not in method: return h.hexdigest()[:12]
    from itm_nb.methods import code_of
    return f'{h.hexdigest()[:12]}+{code_of(method)}'

def commit()->str:
    "The commit of the clone, with + where files differ from it; 'none' outside git"
    def git(*a): return subprocess.run(('git', '-C', project(), *a), capture_output=True, text=True)
    head = git('rev-parse', '--short=12', 'HEAD')
    if head.returncode: return 'none'
    return head.stdout.strip() + ('+' if git('status', '--porcelain', '--', 'itm_nb').stdout.strip() else '')


# %%
test_eq(run_id('toy', resolve(known, {})), run_id('toy', resolve(known, dict(out='elsewhere'))))
assert run_id('toy', resolve(known, {})) != run_id('toy', resolve(known, dict(seed=1)))
(here/'s.npy').write_bytes(b'12'); (here/'t.npy').write_bytes(b'12')
test_eq(origin(str(here/'s.npy')), origin(str(here/'t.npy')))                       # a file by what is in it
test_eq(origin('runs/toy/0123456789ab,runs/toy/ba9876543210'), '0123456789ab,ba9876543210')
test_eq(origin('oracle'), 'oracle')
row = resolve(parameters(template('train')), {})
test_eq(identity('train', row), {k: row[k] for k in FIRST['train']})               # what came later does not count at its default
assert run_id('train', row) != run_id('train', row | dict(init='runs/toy/0123456789ab'))
run_id('toy', resolve(known, {}))

# %% [markdown]
# ## Claims
# A run folder is claimed with a lock by the process that drives it, so two drivers on one folder never run one run twice. The
# system takes the lock away when the process dies, however it dies.

# %%
#| export
BUSY, RESUMABLE = 76, 75     # exit codes: another process has this run; stopped and can be gone on with

@contextmanager
def claim(
    out:Path,      # run folder, made if need be
):                 # yields True, or False where another process has it
    "The right to drive a run"
    out.mkdir(parents=True, exist_ok=True)
    with open(out/'claim', 'a') as f:
        try: fcntl.flock(f, fcntl.LOCK_EX|fcntl.LOCK_NB)
        except BlockingIOError: yield False; return
        yield True

@contextmanager
def in_turn(
    lock:Path,     # a file, made if need be
):
    "One process after the other: waits until the lock is free"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, 'a') as f: fcntl.flock(f, fcntl.LOCK_EX); yield

def done(
    out,           # run folder
)->bool:
    "Is this run finished?"
    return (Path(out)/'DONE').is_file()


# %%
with claim(here/'run') as mine, claim(here/'run') as yours: test_eq((mine, yours), (True, False))
with claim(here/'run') as mine: assert mine and not done(here/'run')


# %% [markdown]
# ## Running a notebook
# The kernel is a process of its own, in its own session: killing papermill alone leaves it writing for a second. So a stop is passed on
# to the process that holds the run's lock, and we wait until it has written its checkpoint.

# %%
#| export
def _pass_on(
    out:Path,     # run folder
):
    "A signal handler that asks the process training in `out` to save and stop"
    def handler(signum, frame):
        try: os.kill(int((out/'lock').read_text()), signal.SIGTERM)
        except (OSError, ValueError): raise KeyboardInterrupt from None     # nobody trains yet: there is nothing to save
    return handler

def execute(
    notebook:Path,       # template
    values:dict,         # all its parameters
    out:Path,            # run folder: run.ipynb is written here
    bar:bool=True,       # papermill's progress bar
)->int:                  # exit code: 0 finished, 75 stopped and resumable, 1 failed
    "Run a notebook with these parameters; DONE is written last"
    import papermill
    from nbclient.exceptions import DeadKernelError
    for name in (signal.SIGTERM, signal.SIGINT): signal.signal(name, _pass_on(out))
    os.environ |= dict(ITM_DRIVEN='1', OMP_NUM_THREADS=str(values.get('threads', 1)))
    try: papermill.execute_notebook(str(notebook), str(out/'run.ipynb'), values, kernel_name='python3', progress_bar=bar)
    except papermill.PapermillExecutionError as e:
        if e.ename in ('Stopped', 'KeyboardInterrupt'): return RESUMABLE
        if e.ename == 'Busy': return BUSY
        why = f'{e.ename}: {e.evalue}'
        return _failed(out, why, f'{notebook.stem}: {why}\n(up to the failing cell: {out/"run.ipynb"})')
    except KeyboardInterrupt: return RESUMABLE
    except DeadKernelError: return _failed(out, why := 'the kernel died (out of memory, or killed)', f'{notebook.stem}: {why}')
    finish(out)
    return 0

def _failed(out, why, said)->int:
    "Leave the reason in the run folder and on the error stream"
    (out/'FAILED').write_text(why); print(said, file=sys.stderr); return 1

_OF_THE_CLOCK = ('run.ipynb', 'run.json', 'timing.jsonl', 'wall.jsonl', 'worker.log', 'params.json', 'claim', 'lock', 'DONE', 'FAILED')

def content(
    out,          # run folder
)->str:           # 64 hexadecimal digits
    "A hash of what a run has made, without anything of the clock: the same run made again has the same"
    h, out = hashlib.sha256(), Path(out)
    for p in sorted(p for p in out.rglob('*') if p.is_file()):
        rel = p.relative_to(out)
        if rel.name in _OF_THE_CLOCK or rel.parts[0] in ('previous', 'new.tmp') or rel.name.endswith('.tmp'): continue
        h.update(f'{rel.as_posix()} {sha256_of(p)}\n'.encode())
    return h.hexdigest()

def finish(
    out,          # run folder
):
    "Mark a run as finished, with a hash of what it made: the last thing written, whole or not at all"
    tmp = Path(out)/f'.done.{os.getpid()}.tmp'
    with open(tmp, 'w') as f: f.write(content(out)+'\n'); f.flush(); os.fsync(f.fileno())
    os.replace(tmp, Path(out)/'DONE')


# %% [markdown]
# ## Runs that need runs
# `DONE` holds a hash of what the run has made. A run that needs others notes theirs when it begins, and **is finished only as long as
# they are what they were**: where a parent was made anew and came out differently, its children are not finished any more and begin
# again from nothing. A parent made anew with the same bytes changes nothing.

# %%
#| export
def _stands(folder)->bool:
    "Is a run finished, with its parents as they are now, and theirs?"
    def same(p, print_):
        at = Path(p) if Path(p).is_dir() else Path(folder).parent/Path(p).name          # the folder of runs may have been moved
        return done(at) and (at/'DONE').read_text().strip() == print_ and _stands(at)
    return done(folder) and all(same(*x) for x in about_folder(folder).get('parents', {}).items())

def parents(
    values:dict,      # all parameters
)->dict:              # run folder -> its DONE; '' where it is not finished
    "The runs that a run needs, and what they have made"
    named = [x for k in INPUTS for x in str(values.get(k) or '').split(',')]
    folders = [x for x in named if (Path(x)/'run.json').is_file() or len(Path(x).parts) > 1 and not Path(x).suffix]
    return {x: (Path(x)/'DONE').read_text().strip() if _stands(x) else '' for x in folders}

def finished(
    out,              # run folder
    values:dict,      # all parameters
)->bool:
    "Is this run finished, with the parents it would have today?"
    if not done(out): return False
    now = parents(values)
    return all(now.values()) and sorted(now.values()) == sorted(about_folder(out).get('parents', {}).values())

def _begin(out, name, values):
    "Note in a run folder what it is; what was made with other parents is removed, its DONE first"
    now = parents(values)
    if missing := [p for p, d in now.items() if not d]: raise SetupError(f'{missing[0]}: this run is needed first and is not finished')
    before = about_folder(out).get('parents')
    if before is not None and sorted(before.values()) != sorted(now.values()):
        for p in sorted(out.iterdir(), key=lambda p: p.name != 'DONE'):
            if p.name in ('claim', 'worker.log', 'params.json'): continue
            shutil.rmtree(p) if p.is_dir() else p.unlink()
    (out/'FAILED').unlink(missing_ok=True)
    me = dict(id=run_id(name, values), template=name, source=source_hash(), parents=now)
    tmp = out/f'.run.{os.getpid()}.tmp'; tmp.write_text(json.dumps(me, indent=1)); os.replace(tmp, out/'run.json')

def start(
    name:str,            # template, or a notebook's path
    given:dict,          # parameters by name
    bar:bool=True,
    work=execute,        # (notebook, values, run folder, bar) -> exit code: what is done
)->tuple:                # (exit code, run folder)
    "Run an experiment; one that makes a row of a table (it has an `arm`) is not run again once it is finished"
    nb = template(name); values = resolve(parameters(nb), given)
    out = Path(values.get('out') or Path('runs')/(values.get('sweep') or 'manual')/run_id(nb.stem, values))
    if 'out' in values: values['out'] = str(out)
    with claim(out) as mine:
        if not mine: return BUSY, out
        if 'arm' in values and finished(out, values): return 0, out     # a row of a table is made once; a study is made anew
        _begin(out, nb.stem, values)
        began = time.perf_counter(); code = work(nb, values, out, bar)
        with open(out/'wall.jsonl', 'a') as f: f.write(json.dumps(dict(seconds=round(time.perf_counter()-began, 2), code=code))+'\n')
        return code, out


# %%
code, out = start(str(nb), dict(seed='5', out=str(here/'runs'/'a')), bar=False)
print(code, sorted(p.name for p in out.iterdir()))
[''.join(o['text']) for c in json.loads((out/'run.ipynb').read_text())['cells'] for o in c.get('outputs', [])]

# %%
test_eq(start(str(nb), dict(seed='5', out=str(here/'runs'/'a'))), (0, out))                     # finished: nothing is run
bad = notebook(here/'bad.ipynb', "out = ''", more=['1/0'])
with redirect_stderr(said := io.StringIO()): code, out = start(str(bad), dict(out=str(here/'runs'/'b')), bar=False)
print(said.getvalue().replace(str(here), '...'))
test_eq((code, done(out)), (1, False))                                                          # failed: no DONE
test_eq((out/'FAILED').read_text(), 'ZeroDivisionError: division by zero')

# %% [markdown]
# A family of two: the child says what it was made from. The parent is made again: with the same result nothing happens, with another
# the child begins anew.

# %%
made = []
def toy(nb, values, out, bar):
    "A worker without a kernel: writes its seed and what its parent wrote"
    made.append(values['arm']); below = (Path(values['init'])/'result').read_text() if values['init'] else ''
    (out/'result').write_text(f"{values['arm']}{luck}<{below}"); finish(out); return 0

pair = str(notebook(here/'pair.ipynb', "init = ''\narm = ''\nout = ''")); luck = 1
old, young = dict(arm='old', out=str(here/'f'/'old')), dict(arm='young', init=str(here/'f'/'old'), out=str(here/'f'/'young'))
with expect_fail(SetupError, 'needed first'): start(pair, young, work=toy)
for g in (old, young, young): start(pair, g, work=toy)
test_eq(made, ['old', 'young'])
(here/'f'/'old'/'DONE').unlink(); assert not finished(here/'f'/'young', young)      # the parent is on its way: so is the child
start(pair, old, work=toy); start(pair, young, work=toy)
test_eq(made, ['old', 'young', 'old'])                                              # the same bytes: the child stands
luck = 2; (here/'f'/'old'/'DONE').unlink(); start(pair, old, work=toy); assert not finished(here/'f'/'young', young)
start(pair, young, work=toy); (here/'f'/'young'/'result').read_text()

# %%
test_eq((made, (here/'f'/'young'/'result').read_text()), (['old', 'young', 'old', 'old', 'young'], 'young2<old2<'))


# %% [markdown]
# ## What a run records
# After training: rank the test split with the best model, put the numbers, the ranks and where they came from into one small file.

# %%
#| export
def about(
    values:dict,      # all parameters of the template
    name:str,         # of the template
    method:str,       # name of the row in tables
    device='cpu',
)->dict:
    "Where a record comes from: id, sweep, method, seed, settings, code, versions"
    import numpy, torch
    cfg = {k: origin(v) if k in INPUTS and v else v for k, v in values.items() if k not in PLACES}
    fold = values['fold'] if values.get('folds') else None
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=numpy.__version__)
    return dict(id=run_id(name, values), sweep=values['sweep'], method=values['arm'] or method, preset=None, seed=values['seed'],
                block=dict(fold=fold, seed=values['seed']), config=cfg, commit=commit(), source=source_hash(values.get('method', '')),
                device=str(device), threads=values.get('threads', 1), versions=versions)

def under_truth(
    world,            # the drawn world
    split,            # a Split of it
    scores,           # (images, sentences) -> what `many_positives` takes; see `train.scores_of`
)->list:              # per gallery, what `many_positives` found
    "Where many sentences are true of an image: ranks of all that are true, inside each gallery; half-true pairs are left out"
    import numpy as np
    from itm_nb.metrics import many_positives
    out = []
    for g in np.unique(split.gallery):
        images, caps = np.flatnonzero(split.gallery == g), np.flatnonzero(split.gallery[split.img_of] == g)
        truth = world.matrix(split.name, g)
        out.append(many_positives(scores(images, caps), truth == 2, ignore=truth == 1))
    return out


# %%
#| export
def curves(
    run:Path,      # run folder
)->dict:           # name -> a value per epoch
    "Training curves from the log: loss and share of clipped steps averaged over each epoch, val rSum, and what owners of state tell"
    lines = [json.loads(l) for l in (Path(run)/'log.jsonl').read_text().splitlines()]
    vals = {l['epoch']: l['val']['rsum'] for l in lines if 'val' in l}
    steps = {e: [l for l in lines if l['epoch'] == e and 'loss' in l] for e in vals}
    mean = lambda e, k: sum(l[k] for l in steps[e])/len(steps[e])
    told = {l['epoch']: l['monitor'] for l in lines if 'monitor' in l}; names = dict.fromkeys(k for m in told.values() for k in m)
    return dict(epoch=list(vals), val_rsum=list(vals.values()), **{k: [mean(e, k) for e in vals] for k in ('loss', 'clipped')},
                **{k: [told.get(e, {}).get(k) for e in vals] for k in names})

def picks(
    run:Path,
    split,            # the training split
    world=None,       # the drawn world, where truth is known
)->dict:              # source -> side -> epoch, n, score, gap (positive minus pick), and on the drawn world `false`; a value per epoch
    "What the sources of a run picked, from its sampled log: how hard, and how often false"
    import numpy as np
    from itm_nb.train import load_picks
    rows, out = load_picks(Path(run)/'picks.bin'), {}
    false = None if world is None else _false(rows, split, world)
    for source, side in sorted(set(zip(rows['source'].tolist(), rows['side'].tolist()))):
        at = (rows['source'] == source) & (rows['side'] == side); epochs, which = np.unique(rows['epoch'][at], return_inverse=True)
        mean = lambda v: [None if np.isnan(x) else float(f'{x:.4g}') for x in _mean_by(v[at].astype(float), which, len(epochs))]
        found = dict(epoch=epochs.tolist(), n=np.bincount(which).tolist(), score=mean(rows['score']))
        found['gap'] = mean(rows['positive'] - rows['score'])
        out.setdefault(source.decode(), {})[side.decode()] = found | ({} if false is None else dict(false=mean(false)))
    return out

def _mean_by(v, which, n):
    "Means of groups; values that are not numbers do not count"
    import numpy as np
    ok = ~np.isnan(v); count = np.bincount(which[ok], minlength=n)
    return np.where(count, np.bincount(which[ok], v[ok], minlength=n)/np.maximum(count, 1), np.nan)

def _false(rows, split, world):
    "Is each pick true of its anchor in the drawn world? nan where the pick is none of its pairs"
    import numpy as np
    def place(ids, x):
        order = np.argsort(ids); at = order[np.minimum(np.searchsorted(ids, x, sorter=order), len(ids)-1)]
        return at, ids[at] == x
    i2t = rows['side'] == b'i2t'
    img, ok = place(split.img_ids, np.where(i2t, rows['image'], rows['other_image']))
    cap, there = place(split.cap_ids, np.where(i2t, rows['other_caption'], rows['caption']))
    return np.where(ok & there, world.truth(split.name, img, cap) == 2, np.nan)

def cost(
    run:Path,
)->dict:           # steps, seconds, pairs per second, peak memory
    "What a run cost, from its timing (a part that was done twice after a kill counts twice)"
    lines = [json.loads(l) for l in (Path(run)/'timing.jsonl').read_text().splitlines()]
    seconds = sum(l['seconds'] for l in lines)
    return dict(steps=lines[-1]['steps'], seconds=round(seconds, 2), pairs_per_s=round(sum(l['pairs'] for l in lines)/seconds, 1),
                peak_mib=max(l['peak_mib'] for l in lines))

def tested_on(
    values:dict,      # all parameters of the template
    split,            # what is ranked
    label:str,        # of the data, for tables
    train:int=0,      # photos to train on
)->dict:
    "The data part of a record"
    import numpy as np
    from itm_nb.data import fingerprint
    sizes = [len(split)] if split.gallery is None else np.unique(split.gallery, return_counts=True)[1].tolist()
    return dict(name=values['data'], label=label, fingerprint=fingerprint(split), split=split.name, train=train,
                images=len(split), captions=len(split.captions), gallery=sizes)

COLLAPSED = 2.    # a run whose validation rSum at the end is below so many times chance has collapsed

def collapsed(
    last:dict,         # validation metrics of the last epoch
    split,             # the validation split
)->bool:
    "The rule, fixed beforehand, by which a run counts as collapsed; it is said in its record, and the run is kept in every mean"
    import numpy as np
    from itm_nb.metrics import chance
    gallery = np.zeros(len(split), int) if split.gallery is None else split.gallery
    each = [np.bincount(split.img_of)[gallery == g] for g in np.unique(gallery)]
    return bool(last['rsum'] < COLLAPSED*np.mean([chance(len(n), n.sum(), n)['rsum'] for n in each]))

def conclude(
    values:dict,       # all parameters of the train template
    run:Path,          # run folder
    t,                 # the finished Training
    data,              # its Corpus
)->dict:               # the record, written to records/ beside the run folder
    "Open the test split, rank it with the best model, write the record"
    from itm_nb.records import record, write_record
    from itm_nb.train import embed, evaluate, scores_of
    device, more = t.accelerator.device, dict(collapsed=collapsed(t.history[-1], t.val.split))
    if values['search']: more |= dict(search=json.loads(values['search']))
    if not values['test']: return _searched(run, t, more)
    ranks, split, batches = evaluate(run, data, 'test', device)
    truth = None if data.world is None else under_truth(data.world, split, scores_of([(t.core, *embed(t.core, batches))]))
    if seen := picks(run, t.train.split, data.world): more |= dict(picks=seen)
    rec = record(about(values, 'train', values['method'], device), tested_on(values, split, data.label, len(t.train.split)),
                 ranks, split.img_of, split.gallery, truth, val=t.history[t.best[1]], best_epoch=t.best[1], last=t.history[-1],
                 cost=cost(run), curves=curves(run), **more)
    write_record(run.parent/'records', rec)
    if 'ITM_DRIVEN' not in os.environ: finish(run)      # run by hand in JupyterLab: nobody else marks it
    return rec

def _searched(run, t, more)->dict:
    "What is kept of a run that only tries settings: its validation; the test split stays closed"
    from itm_nb.data import write_atomic
    found = dict(metrics=dict(val=t.history[t.best[1]], test={}), best_epoch=t.best[1], last=t.history[-1], **more)
    write_atomic(run/'val.json', json.dumps(found, sort_keys=True).encode())
    if 'ITM_DRIVEN' not in os.environ: finish(run)
    return found

def _expected(
    scores:str,       # 'oracle' or 'chance'
    true,             # (n, m) bool: which pairs of a gallery are true
    own,              # (m,) image of each sentence
    many:bool,        # is the truth of all pairs known?
)->dict:              # as `summary`
    "Expected metrics of a control in one gallery"
    import numpy as np
    from itm_nb.metrics import chance, chance_many, many_positives, match_summary, oracle
    n, m = true.shape
    row = oracle(own, true) if scores == 'oracle' else chance(n, m, np.bincount(own))
    if not many: return row
    if scores == 'oracle': found = match_summary(many_positives(true.astype('float32'), true))
    else: found = {d: chance_many(R[R > 0], k) for d, R, k in (('i2t', true.sum(1), m), ('t2i', true.sum(0), n))}
    return row | dict(truth={d: {k: found[d][k] for k in ('map_r', 'rp')} for d in ('i2t', 't2i')}
                      | dict(map_r=(found['i2t']['map_r'] + found['t2i']['map_r'])/2))

def control(
    values:dict,       # all parameters of the evaluate template
    run:Path,          # run folder
    data,              # the Corpus
)->dict:               # the record of an oracle or of chance
    "The row of a control: expectations over random ties, averaged over galleries"
    import numpy as np
    from itm_nb.metrics import mean_summary
    from itm_nb.records import record, write_record
    split = data.split('test'); gallery = np.zeros(len(split), int) if split.gallery is None else split.gallery; rows = []
    for g in np.unique(gallery):
        images, caps = np.flatnonzero(gallery == g), np.flatnonzero(gallery[split.img_of] == g)
        own = np.searchsorted(images, split.img_of[caps]); true = np.zeros((len(images), len(caps)), bool)
        true[own, np.arange(len(caps))] = True
        if data.world is not None: true = data.world.matrix('test', g) == 2
        rows.append(_expected(values['scores'], true, own, data.world is not None))
    rec = record(about(values, 'evaluate', values['scores']), tested_on(values, split, data.label), test=mean_summary(rows), kind='control')
    run.mkdir(parents=True, exist_ok=True); write_record(run.parent/'records', rec)
    if 'ITM_DRIVEN' not in os.environ: finish(run)
    return rec

def settings(
    given:dict,      # e.g. `globals()` of a notebook
    name:str,        # of the template
)->dict:             # its parameters with the values they have now
    "The parameters of a running notebook"
    return {k: given[k] for k in parameters(template(name))}


# %% [markdown]
# ## The commands
# `itm_run` runs one experiment, `itm_data` looks at a data folder, `itm_readme` makes `README.md`; `itm_sweep` has a room of its own.

# %%
#| export
def read_yaml(path)->dict:
    "A YAML (or JSON) file that holds a mapping"
    import yaml
    try: found = yaml.safe_load(path.read_text('utf-8'))
    except OSError as e: raise SetupError(f'{path.name}: cannot be read ({e.strerror})') from None
    except (yaml.YAMLError, UnicodeDecodeError) as e: raise SetupError(f'{path.name}: not a YAML file ({str(e).splitlines()[0]})') from None
    if not isinstance(found, dict): raise SetupError(f'{path.name}: wanted a mapping, name: value')
    return found

def command(
    main,      # a function of a list of arguments (None: the command line) that returns an exit code
):
    "Turn a typed error into one line and exit code 2"
    def run(argv=None):
        from_cli = argv is None
        try: code = main(argv)
        except ValueError as e:
            if not type(e).__name__ in ('SetupError', 'DataError'): raise
            print(f'{main.__name__}: {e}', file=sys.stderr); code = 2
        if from_cli: sys.exit(code)
        return code
    run.__name__, run.__doc__ = main.__name__, main.__doc__
    return run

@command
def itm_run(argv=None)->int:
    "Run an experiment's notebook with parameters, strictly"
    p = argparse.ArgumentParser(prog='itm_run', description=itm_run.__doc__)
    p.add_argument('experiment', nargs='?', help='train, evaluate, study, benchmark, or the path of a notebook')
    p.add_argument('-p', nargs=2, action='append', default=[], metavar=('NAME', 'VALUE'), help='set a parameter')
    p.add_argument('-f', metavar='FILE', help='a YAML or JSON file of parameters')
    p.add_argument('--parameters', action='store_true', help='list what can be set, and stop')
    p.add_argument('--quiet', action='store_true', help='no progress bar')
    p.add_argument('--accelerate', type=int, default=1, metavar='N', help='train in N processes, then execute the notebook')
    a = p.parse_args(argv); work = execute
    if not a.experiment: p.print_help(); return 2
    if a.parameters:
        for x in parameters(template(a.experiment)).values(): print(f'{x.name:14} {x.default!r:12} {x.about}')
        return 0
    given = read_yaml(Path(a.f)) if a.f else {}
    if a.accelerate > 1: from itm_nb.processes import several; work = several(a.accelerate)
    code, out = start(a.experiment, given | dict(a.p), bar=not a.quiet, work=work)
    said = {0: 'finished', RESUMABLE: 'stopped, run it again to go on', BUSY: 'another process has this run'}
    if not a.quiet: print(f'{said.get(code, "failed")}: {out}')
    return code


# %%
#| export
@command
def itm_data(argv=None)->int:
    "Look at a data folder; `itm_data get`: fetch one; `itm_data audit --help`: what samplers pick from it"
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['audit']:
        from itm_nb.audit import audit_command
        print(audit_command(argv[1:])); return 0
    if argv[:1] == ['get']:
        from itm_nb.sources import get_command
        lines, code = get_command(argv[1:]); print('\n'.join(lines)); return code
    p = argparse.ArgumentParser(prog='itm_data', description=itm_data.__doc__)
    p.add_argument('what', choices=('info', 'check'), help='info: sizes and samples; check: everything that is wrong')
    p.add_argument('path', help='a data folder, or the word scenes'); p.add_argument('--layout', default='', help='default: found out')
    p.add_argument('--name', default='', help='flickr8k, flickr30k or coco: sizes are then compared')
    a = p.parse_args(argv)
    from itm_nb.readers import check_layout, info_layout
    if a.path == 'scenes': return _scenes_info()
    if a.what == 'info':
        for line in info_layout(a.path, a.layout, a.name): print(line)
        return 0
    found = check_layout(a.path, a.layout, a.name)
    for f in found: print(f'{f.level:8} {f.part}: {f.text}')
    from itm_nb.test_sets import served
    for line in served(a.path, a.layout): print(line)
    wrong = sum(f.level == 'error' for f in found); print(f'{wrong} errors'); return 1 if wrong else 0

def _scenes_info()->int:
    "The card of the embedded world"
    from itm_nb.scenes import make
    for k, v in make('small').card().items(): print(f'{k}: {v}')
    return 0


# %% [markdown]
# `README.md` is the index notebook with its saved outputs, turned into Markdown: prose, tables and pictures come from there, code does
# not. Offline, and the same bytes every time.

# %%
#| export
def _readme_cell(cell)->str:
    "What a cell of the index shows in README: prose as it is, of code only Markdown outputs"
    if cell.cell_type == 'markdown': return cell.source
    if cell.cell_type != 'code': return ''
    return '\n\n'.join(''.join(o['data']['text/markdown']) for o in cell.outputs if 'text/markdown' in o.get('data', {}))

@command
def itm_readme(argv=None)->int:
    "Execute nbs/index.ipynb and make README.md of it, offline"
    p = argparse.ArgumentParser(prog='itm_readme', description=itm_readme.__doc__); p.parse_args(argv)
    import nbformat
    from nbclient import NotebookClient
    root = project(); nb = nbformat.read(root/'nbs'/'index.ipynb', 4)
    NotebookClient(nb, kernel_name='python3', resources=dict(metadata=dict(path=str(root/'nbs')))).execute()
    text = '\n\n'.join(filter(None, (_readme_cell(c).strip() for c in nb.cells)))
    head = '<!-- made from nbs/index.ipynb by itm_readme: edit the notebook -->\n'
    text = re.sub(r'\]\((?!https?:|#|\.\./)', '](nbs/', text).replace('](../', '](')       # links of nbs/ as seen from its parent
    (root/'README.md').write_text(head + text + '\n', 'utf-8')
    print(f'README.md: {len(text.splitlines())} lines'); return 0


# %% [markdown]
# Errors are one line, with the names that are valid, and come before any kernel is started.

# %%
for argv in (['train', '-p', 'sede', '3'], ['train', '-p', 'seed', 'abc'], ['trian']): test_eq(itm_run(argv), 2)

# %%
#| hide
tmp.cleanup()

# %%
#| hide
import nbdev; nbdev.nbdev_export()
