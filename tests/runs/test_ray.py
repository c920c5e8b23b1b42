"""A sweep on a cluster: drivers and workers are killed, machines are lost, and nothing is lost, repeated or counted twice."""
import importlib.util
import json
import os
import random
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import test_sweeps as toy

from itm_nb.core import commands
from itm_nb.runs import run_folder
from itm_nb import cli
from itm_nb.runs import sweep_driver, sweep_plan
from itm_nb.runs.ray_engine import starter

NO_RAY = importlib.util.find_spec('ray') is None
need_ray = pytest.mark.skipif(NO_RAY, reason="the package ray is not installed: pip install -e '.[ray]'")

BEGIN = '''
import json, os, subprocess, sys
from pathlib import Path

def begin(e):
    e.out.mkdir(parents=True, exist_ok=True); tmp = e.out/f'.{os.getpid()}.tmp'
    tmp.write_text(json.dumps(e.values, indent=1)); os.replace(tmp, e.out/'params.json')
    return subprocess.Popen([sys.executable, 'worker.py', e.template, e.out/'params.json'], start_new_session=True)
'''
DRIVER = '''
from toy_begin import begin
from itm_nb.runs.ray_engine import starter
from itm_nb.runs.sweep_driver import drive; from itm_nb.runs.sweep_plan import entries
import json, sys
from pathlib import Path

if __name__ == '__main__':
    todo = entries(json.loads(Path('spec.json').read_text()), 'toy', Path('runs'))
    start, n = starter(todo, retries=int(sys.argv[2]), begin=begin, address=sys.argv[1])
    sys.exit(bool(drive(todo, n, start=start, pause=.05)))
'''


def folder_of(tmp_path, *a, **kw):
    "The toy of `test_sweeps`, with a driver that starts runs on the cluster"
    spec = toy.spec_of(tmp_path, *a, **kw); (tmp_path/'toy_begin.py').write_text(BEGIN); (tmp_path/'ray_driver.py').write_text(DRIVER)
    return spec


# ---- without Ray: its few functions, played by threads
class Lost(Exception): "What a cluster says of a task whose machine is gone"


def paper_ray(lose=()):
    "A module with the functions we use; tasks named in `lose` are lost once each, after they were begun"
    m = types.ModuleType('ray'); m.lost, m.begun, m.asked = list(lose), [], []
    m.exceptions = types.SimpleNamespace(RayError=Lost, RayTaskError=type('RayTaskError', (Lost,), {}))
    m.is_initialized = lambda: True; m.nodes = lambda: [dict(Alive=True, Resources=dict(CPU=2.)), dict(Alive=True, Resources=dict(CPU=1.)), dict(Alive=False, Resources=dict(CPU=99.))]

    class Handle:
        def __init__(self, f, name, args):
            self.answer, self.name = None, name; m.begun.append(name)
            def go():
                try: self.answer = f(*args)
                except Exception as e: self.answer = m.exceptions.RayTaskError(f'{type(e).__name__}: {e}')
                if name.split()[0] in m.lost: m.lost.remove(name.split()[0]); self.answer = Lost('gone')
            self.t = threading.Thread(target=go, daemon=True); self.t.start()

    def get(h):
        if isinstance(h.answer, Exception): raise h.answer
        return h.answer
    m.get = get; m.wait = lambda hs, timeout: ([h for h in hs if not h.t.is_alive()], [h for h in hs if h.t.is_alive()])

    def remote(**settings):
        assert settings == dict(max_retries=0, max_calls=1)
        def options(name, **ask): m.asked.append(ask); return types.SimpleNamespace(remote=lambda *args: Handle(f, name, args))
        def wrap(g): nonlocal f; f = g; return types.SimpleNamespace(options=options)
        f = None; return wrap
    m.remote = remote; return m


def begin_here(e): return toy.start_here(Path.cwd())(e)


def play(tmp_path, monkeypatch, spec, lose=(), **kw):
    monkeypatch.chdir(tmp_path); monkeypatch.setitem(sys.modules, 'ray', m := paper_ray(lose))
    todo = sweep_plan.entries(spec, 'toy', Path('runs')); start, n = starter(todo, begin=begin_here, **kw)
    return m, todo, sweep_driver.drive(todo, n, start=start, pause=.02)


def test_the_same_runs_in_the_same_order_on_a_cluster_of_paper(tmp_path, monkeypatch):
    "Three cores: three side by side; parents first; of equals the earlier block first"
    m, todo, failed = play(tmp_path, monkeypatch, folder_of(tmp_path, 3))
    assert failed == {} and len(toy.ends(tmp_path)) == 15 and len(m.begun) == 15 and all(x == dict(num_cpus=1, num_gpus=0) for x in m.asked)
    assert [p.name for p in (tmp_path/'runs').rglob('.stop*')] == []
    order = [todo.index(next(e for e in todo if e.out.name == b.split()[1])) for b in m.begun]
    place = {str(todo[k].out): i for i, k in enumerate(order)}; assert order[0] == 0
    assert all(place[p] < place[str(e.out)] for e in todo for p in e.needs)
    roots = [k for k in order if todo[k].arm == 'root']; assert roots == sorted(roots)
    toy.never_again(tmp_path)


def test_a_lost_task_is_given_to_another_machine(tmp_path, monkeypatch):
    "Lost after the run ended: the next try finds it finished, and does not run it again. A run that always fails is tried three times and blocks its child"
    spec = folder_of(tmp_path, 1); spec['arms']['right'] = spec['arms']['right'] | dict(fail=True)
    m, todo, failed = play(tmp_path, monkeypatch, spec, lose=('left', 'root'))
    assert sorted(b.split()[0] for b in m.begun) == ['left']*2 + ['other'] + ['right']*3 + ['root']*2
    assert {todo[i].arm: c for i, c in failed.items()} == dict(right=1, both=sweep_driver.BLOCKED)
    assert sum(x == ['begin', todo[0].out.name] for x in toy.events(tmp_path)) == 1
    assert sweep_driver.state(todo[2], todo) == 'failed: as it was told to'


def test_a_task_lost_too_often_says_so(tmp_path, monkeypatch):
    spec = folder_of(tmp_path, 1); spec['arms'] = {}; spec['runs']['root'] = spec['runs']['root'] | dict(fail=True)
    m, todo, failed = play(tmp_path, monkeypatch, spec, lose=('root',)*2, retries=1)
    assert failed == {0: 1} and sweep_driver.state(todo[0], todo) == 'failed: the task was lost: Lost'


def test_no_machine_is_large_enough(tmp_path, monkeypatch):
    spec = folder_of(tmp_path, 1); nb = json.loads((tmp_path/'toy.ipynb').read_text()); nb['cells'][0]['source'] += '\nthreads = 8'
    (tmp_path/'toy.ipynb').write_text(json.dumps(nb))
    with pytest.raises(commands.SetupError, match='no machine of the cluster has 8 cores'): play(tmp_path, monkeypatch, spec)
    assert not (tmp_path/'runs').exists()


def test_the_end_of_the_budget_stops_tasks(tmp_path, monkeypatch):
    "A file beside the run reaches it on whatever machine"
    spec = folder_of(tmp_path, 1, nap=30.); monkeypatch.chdir(tmp_path); monkeypatch.setitem(sys.modules, 'ray', paper_ray())
    todo = sweep_plan.entries(spec, 'toy', Path('runs')); start, n = starter(todo, begin=begin_here); began = time.monotonic()
    failed = sweep_driver.drive(todo, n, plan=sweep_driver.Plan(budget=2.), start=start, pause=.02)
    assert set(failed.values()) == {run_folder.RESUMABLE} and len(failed) == 5 and time.monotonic()-began < 25 and not list((tmp_path/'runs').rglob('.stop*'))


def test_without_ray_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'ray', None)
    assert cli.itm_sweep(['tiny', '--engine', 'ray', '--runs', str(tmp_path/'runs')]) == 2
    assert "pip install -e '.[ray]'" in capsys.readouterr().err and not (tmp_path/'runs').exists()


# ---- with Ray: a cluster of two machines, simulated on this one
@pytest.fixture(scope='module')
def cluster():
    from ray.cluster_utils import Cluster
    os.environ.update(RAY_usage_stats_enabled='0', RAY_agent_register_timeout_ms='300000')          # this machine may be busy
    small = dict(num_cpus=1, object_store_memory=80_000_000, include_dashboard=False)
    os.environ['PYTHONPATH'] = os.pathsep.join([str(toy.ROOT), os.environ.get('PYTHONPATH', '')])
    c = Cluster(initialize_head=True, head_node_args=small); c.add_node(num_cpus=1, object_store_memory=80_000_000)
    yield c
    c.shutdown()


def driver(folder, c, retries=20):
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(folder), str(toy.ROOT), os.environ.get('PYTHONPATH', '')]))
    return subprocess.Popen([sys.executable, 'ray_driver.py', c.address, str(retries)], cwd=folder, env=env)


def workers_of(folder):
    "Processes of runs, and the tasks of Ray above them"
    import psutil
    found = []
    for q in psutil.process_iter(['cmdline']):
        if 'worker.py' in (q.info['cmdline'] or []) and toy.folder_of(q) == Path(folder).resolve(): found.append(q)
    return found


def task_of(p):
    import psutil
    try: up = p.parent(); return up if up and 'ray' in ' '.join(up.cmdline()) else None
    except psutil.Error: return None


def kill_on_a_cluster(folder, c, kills, seed):
    "So many drivers, so many runs and so many tasks of Ray, at random moments; a new driver each time"
    draw, p, hits, early = random.Random(seed), None, dict(driver=0, run=0, task=0), {}
    limit = time.monotonic() + 60*kills + 120
    while min(hits.values()) < kills:
        assert time.monotonic() < limit, f'only {hits} were hit'
        if p is None or p.poll() is not None: p = driver(folder, c)
        if not (live := workers_of(folder)): time.sleep(.2); continue
        time.sleep(draw.uniform(.1, .6)); who = min(hits, key=hits.get); live = workers_of(folder)
        if who == 'driver' and p.poll() is None and live: p.kill(); p.wait(); hits[who] += 1
        elif who == 'run' and live: live[0].kill(); hits[who] += 1
        elif who == 'task' and live and (t := task_of(live[0])): t.kill(); hits[who] += 1
        now = toy.ends(folder); assert early.items() <= now.items(), 'a finished run was lost or made again'
        assert len(now) < 40, f'the sweep ended before all was killed ({hits})'
        early = now
    if p.poll() is None: p.wait(timeout=900)
    return early, hits


@need_ray
@pytest.mark.slow
@pytest.mark.parametrize('kills', [1, 10])
def test_driver_runs_and_tasks_are_killed_on_two_machines(kills, cluster, tmp_path):
    "40 runs; drivers, runs and Ray's own workers are killed in turn"
    spec = folder_of(tmp_path, 8, nap=.3 if kills < 10 else 1.); early, hits = kill_on_a_cluster(tmp_path, cluster, kills, seed=kills)
    for _ in range(5):
        if driver(tmp_path, cluster).wait(timeout=900) == 0: break
    last = toy.ends(tmp_path); assert len(last) == 40 and early.items() <= last.items() and min(hits.values()) == kills
    toy.never_again(tmp_path)
    todo = sweep_plan.entries(spec, 'toy', tmp_path/'runs'); assert {e.out.name for e in todo} == set(last)
    both = {e.values['seed']: (e.out/'result').read_text() for e in todo if e.arm == 'both'}
    assert both == {s: f'both{s}.0(left{s}.0(root{s}.0()),right{s}.0(root{s}.0()))' for s in range(8)}
    before = toy.events(tmp_path); assert driver(tmp_path, cluster).wait(timeout=300) == 0 and toy.events(tmp_path) == before
    assert not list((tmp_path/'runs').rglob('result.*.tmp'))


@need_ray
@pytest.mark.slow
def test_a_machine_leaves_the_cluster(cluster, tmp_path):
    "With one of two machines gone its run begins again on the other"
    folder_of(tmp_path, 1, nap=1.5); extra = cluster.add_node(num_cpus=2, object_store_memory=80_000_000); p = driver(tmp_path, cluster)
    while len(workers_of(tmp_path)) < 2: assert p.poll() is None; time.sleep(.1)
    cluster.remove_node(extra, allow_graceful=False)
    assert p.wait(timeout=300) == 0 and len(toy.ends(tmp_path)) == 5


@need_ray
@pytest.mark.slow
def test_the_command_on_a_cluster_gives_the_bytes_of_the_local_one(cluster, tmp_path):
    "A whole sweep through papermill, on this machine and on the cluster: the same records but for the clock"
    f = tmp_path/'few.yaml'
    f.write_text('title: few\nbase: {data: scenes, preset: tiny, dim: 16, d_word: 8, image_hidden: 16, epochs: 1, batch: 64}\nblocks: [{seed: 0}]\n'
                 'runs: {warm: {method: vse0}}\narms: {vsepp: {method: vsepp, init: warm}}\ncontrols: {chance: {scores: chance}}\n')
    def go(where, *more):
        code = 'from itm_nb.cli import itm_sweep; itm_sweep()'
        r = subprocess.run([sys.executable, '-c', code, f, '--runs', tmp_path/where, *more], cwd=toy.ROOT, env=os.environ | dict(RAY_ADDRESS=cluster.address),
                           capture_output=True, text=True); assert r.returncode == 0, r.stdout + r.stderr[-3000:]
        return {p.parent.name: p.read_text() for p in (tmp_path/where).glob('few/*/DONE') if p.parent.name != 'study'}
    here, there = go('local'), go('ray', '--engine', 'ray'); assert len(here) == 3 and here.keys() == there.keys()
    same = [json.loads((tmp_path/w/'few'/'report'/'results'/f'{n}.json').read_text()) for n in here for w in ('local', 'ray')]
    for a, b in zip(same[::2], same[1::2]): assert a.get('ranks') == b.get('ranks') and a['metrics'] == b['metrics']
