# %% [markdown]
# # A sweep on many machines
# > The same driver and the same files; only where a run is started differs: as a task of a Ray cluster that shares a file system.

# %%
#| default_exp ray_engine

# %%
#| export
import itertools
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from itm_nb.runs import BUSY, RESUMABLE, SetupError
from itm_nb.sweeps import Entry, Estimate, launch

# %%
#| hide
import json, subprocess, sys, tempfile
from fastcore.test import test_eq
from itm_nb.sweeps import drive
from itm_nb.runs import finish

# %% [markdown]
# `sweeps.drive` asks little of what it starts: `poll()`, `terminate()`, `returncode`, as a process has them. So a cluster is one more way to
# start a run, and everything that makes a sweep safe stays where it is: the claim on the run folder, DONE written last, parents first, whole
# blocks. Ray decides on which machine a run begins; the run's own files, on the disk that all machines share, decide what is finished.
#
# | part | here |
# |---|---|
# | a run | a task that starts `itm_run` as a process and waits for it |
# | its place | `threads` cores, an accelerator where `device` is auto, memory as measured or declared |
# | a machine that dies | the task is given to another one, a bounded number of times; the run goes on from its checkpoint |
# | a worker that dies alone | its run may live on: then the next task finds the claim taken and waits for it, and nothing is run twice |
# | stop | a file beside the run asks the task, wherever it is, to let its run save |
#
# Ray is an extra (`pip install -e '.[ray]'`). It speaks a protocol of pickled objects: let nobody into its ports whom you would not let run
# programs.

# %%
#| export
def work(
    template:str,          # of the run
    values:dict,           # all its parameters
    out:str,               # run folder, as seen from `here`
    here:str,              # folder the driver was started in
    stop:str,              # a file whose appearance asks the run to save and stop
    begin:Callable=launch, # Entry -> a process
    pause:float=.2,        # seconds between two looks
)->int:                    # exit code of the run
    "What a task does, on whatever machine: start the run as a process and wait for it"
    os.chdir(here)
    p, told = begin(Entry(template, values.get('arm', ''), values, Path(out))), False
    try:
        while p.poll() is None:
            if not told and Path(stop).exists(): told = True; p.terminate()
            time.sleep(pause)
    finally:
        if p.poll() is None: p.terminate()                      # the task is ended by Ray: let the run save what it has
    return p.returncode

# %% [markdown]
# Here is a task without any Ray: a process that ends by itself, and one that is asked to.

# %%
tmp = tempfile.TemporaryDirectory(); here = Path(tmp.name); (here/'run').mkdir(); home = os.getcwd()
def sleeper(seconds, code=0):
    return lambda e: subprocess.Popen([sys.executable, '-c', f'import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print(end="", flush=True); '
                                       f'open("ready", "w"); time.sleep({seconds}); sys.exit({code})'])
test_eq(work('t', {}, 'run', tmp.name, str(here/'stop'), sleeper(0, 3), .02), 3)
(here/'ready').unlink(); asked = Path(here/'stop2')
class Late:
    "A process that is asked to stop as soon as it is ready"
    def __init__(self, e): self.p = sleeper(60)(e)
    def poll(self):
        if (here/'ready').exists(): asked.touch()
        return self.p.poll()
    def __getattr__(self, name): return getattr(self.p, name)
test_eq(work('t', {}, 'run', tmp.name, str(asked), Late, .02), RESUMABLE); os.chdir(home)

# %% [markdown]
# ## A task as a process
# What a task answered is an exit code; that it was lost is none. Both kinds of failure are tried again while tries are left - a machine that
# ran out of memory once may not do so twice - but what says "these settings are impossible" (2) or "another process has this run" (76) is not.

# %%
#| export
_FINAL = (0, 2, BUSY)         # exit codes that another try would not change
_number = itertools.count()

class Task:
    "A run on the cluster, seen as a process"
    def __init__(self,
        e:Entry,
        submit:Callable,     # path of the stop file -> a handle: give it to the cluster
        ended:Callable,      # handle -> None while it runs, else its exit code; or the reason, a str, where it was lost
        retries:int=2,       # so many further tries
    ):
        self.e, self.submit, self.ended, self.left, self.returncode = e, submit, ended, retries, None
        self.stop = e.out/f'.stop.{socket.gethostname()}.{os.getpid()}.{next(_number)}.tmp'
        e.out.mkdir(parents=True, exist_ok=True); self.handle = submit(str(self.stop))

    def poll(self):
        "None while it runs, else its exit code"
        if self.returncode is not None: return self.returncode
        said = self.ended(self.handle)
        if said is None: return None
        if said not in _FINAL and self.left > 0 and not self.stop.exists():
            self.left -= 1; self.handle = self.submit(str(self.stop)); return None
        if isinstance(said, str): (self.e.out/'FAILED').write_text(said)
        self.returncode = said if isinstance(said, int) else RESUMABLE if self.stop.exists() else 1
        self.stop.unlink(missing_ok=True)
        return self.returncode

    def terminate(self): self.stop.touch()

# %% [markdown]
# A cluster of paper: it loses the first two tries, and the third ends well. With one try less the run has failed, and its folder says why.

# %%
def paper(*answers):
    "A cluster that gives these answers in turn"
    said, tries = list(answers), []
    return (lambda stop: tries.append(stop) or len(tries)), (lambda handle: said[handle-1]), tries
e = Entry('train', 'toy', {}, here/'run')
def ends(retries, *answers):
    submit, ended, tries = paper(*answers); t = Task(e, submit, ended, retries)
    while t.poll() is None: pass
    return t.returncode, len(tries)
test_eq(ends(2, 'the machine died', 1, 0), (0, 3))
test_eq(ends(1, 'the machine died', 'the machine died again', 0), (1, 2)); print((here/'run'/'FAILED').read_text())

# %%
test_eq([ends(2, code, 0) for code in (0, 2, BUSY)], [(0, 1), (2, 1), (BUSY, 1)])       # nothing to be tried again
test_eq(ends(2, 1, 1, 1), (1, 3))                                                       # bounded
submit, ended, tries = paper('lost', 0); t = Task(e, submit, ended, 5); t.terminate(); test_eq((t.poll(), len(tries)), (RESUMABLE, 1))
test_eq([p.name for p in (here/'run').iterdir()], ['FAILED'])                           # no stop file is left

# %% [markdown]
# ## The cluster

# %%
#| export
def connect(
    address:str='',      # of a cluster; '': RAY_ADDRESS, else one that runs on this machine, else this machine alone
):                       # the module ray, connected
    "Join a Ray cluster"
    try: import ray
    except ImportError: raise SetupError("the engine ray needs the package ray: pip install -e '.[ray]'") from None
    if ray.is_initialized(): return ray
    options = dict(log_to_driver=False, logging_level='error', namespace='itm_nb')
    try: ray.init(address=address or os.environ.get('RAY_ADDRESS') or 'auto', **options)
    except ConnectionError as err:
        if address or os.environ.get('RAY_ADDRESS'): raise SetupError(f'no Ray cluster answers ({str(err).splitlines()[0][:100]})') from None
        ray.init(include_dashboard=False, **options)
    return ray

def needs(
    e:Entry,
    cost:Estimate,         # what it is expected to take
    machines:list,         # of dicts: CPU, GPU, memory in bytes
    processes:int=1,       # that one run trains in
)->dict:                   # num_cpus, num_gpus, memory as Ray takes them
    "What a run asks of a machine; refused where no machine has it"
    want = dict(CPU=max(1, e.values.get('threads', 1))*processes, GPU=0)
    if e.values.get('device') == 'auto' and any(m.get('GPU') for m in machines): want['GPU'] = processes
    if cost.mib: want['memory'] = min(int(cost.mib*2**20), int(max((m.get('memory', 0) for m in machines), default=0)))
    if not any(all(m.get(k, 0) >= v for k, v in want.items()) for m in machines):
        raise SetupError(f'{e.arm}: no machine of the cluster has {want["CPU"]} cores' + (f' and {want["GPU"]} accelerators' if want['GPU'] else ''))
    return dict(num_cpus=want['CPU'], num_gpus=want['GPU']) | ({'memory': want['memory']} if want.get('memory') else {})

def side_by_side(
    todo:list,           # of Entry
    machines:list,       # of dicts: CPU, GPU
    processes:int=1,
)->int:                  # at least 1
    "How many runs the cluster can hold at once"
    threads = max((e.values.get('threads', 1) for e in todo), default=1)
    gpus = sum(m.get('GPU', 0) for m in machines) if any(e.values.get('device') == 'auto' for e in todo) else 0
    return max(1, int(gpus or sum(m.get('CPU', 0)//max(1, threads) for m in machines))//processes)

# %%
here_ = Entry('train', 'vsepp', dict(threads=4, device='auto'), here/'run'); machines = [dict(CPU=16., GPU=2., memory=64*2**30), dict(CPU=8., memory=16*2**30)]
test_eq(needs(here_, Estimate(mib=2000.), machines), dict(num_cpus=4, num_gpus=1, memory=2000*2**20))
test_eq(needs(here_, Estimate(mib=1e9), machines[1:])['memory'], 16*2**30)       # expected to need more than there is: alone on the largest machine
test_eq((side_by_side([here_], machines), side_by_side([here_], machines[1:]), side_by_side([here_], machines, 2)), (2, 2, 1))
try: needs(here_, Estimate(), machines, 3); raise AssertionError
except SetupError as err: print(err)

# %%
#| export
def _lost(ray, handle):
    "None while a task runs, else its exit code, or in words why it was lost"
    done, _ = ray.wait([handle], timeout=0)
    if not done: return None
    try: return ray.get(handle)
    except ray.exceptions.RayTaskError as err: return f'the task failed: {str(err).splitlines()[-1][:200]}'
    except ray.exceptions.RayError as err: return f'the task was lost: {type(err).__name__}'

def starter(
    todo:list,                   # of Entry, to ask the cluster beforehand
    cost:Callable=lambda e: Estimate(),     # Entry -> Estimate
    retries:int=2,               # further tries of a run that failed or was lost
    begin:Callable=launch,       # Entry -> a process, on the machine the run is given to
    processes:int=1,             # that one run trains in
    address:str='',              # of the cluster
)->tuple:                        # (Entry -> Task, how many side by side)
    "Start runs on a Ray cluster: what `sweeps.drive` takes as `start`"
    ray = connect(address); remote, place = ray.remote(max_retries=0, max_calls=1)(work), os.getcwd()
    machines = [n['Resources'] for n in ray.nodes() if n['Alive']]
    for e in todo: needs(e, cost(e), machines, processes)
    def start(e):
        now = [n['Resources'] for n in ray.nodes() if n['Alive']]; ask = needs(e, cost(e), now, processes)
        submit = lambda stop: remote.options(name=f'{e.arm} {e.out.name}', **ask).remote(e.template, e.values, str(e.out), place, stop, begin)
        return Task(e, submit, lambda handle: _lost(ray, handle), retries)
    return start, side_by_side(todo, machines, processes)

# %% [markdown]
# Where Ray is not installed the command says so in a line; where it is, four runs of a toy on this machine, two at a time. (The tests simulate
# a cluster of two machines and kill its driver and its workers.)

# %%
import importlib.util
toy = [Entry('toy', f'run {i}', dict(arm=f'run {i}'), here/f'toy{i}') for i in range(4)]
def begin(e): return subprocess.Popen([sys.executable, '-c', f'from pathlib import Path; from itm_nb.runs import finish; finish(Path({str(e.out)!r}))'])
if importlib.util.find_spec('ray') is None:
    try: starter(toy); raise AssertionError
    except SetupError as err: print(err)
else:
    start, n = starter(toy, begin=begin); test_eq(drive(toy, n, start=start, pause=.05), {}); assert all((e.out/'DONE').is_file() for e in toy)
    import ray; ray.shutdown(); print('4 runs as tasks')

# %%
#| hide
tmp.cleanup()

# %%
#| hide
import nbdev; nbdev.nbdev_export()
