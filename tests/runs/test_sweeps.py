"""Runs that need runs: killed at any moment, nothing is lost, repeated or counted twice; foreign scores become rows."""
from types import SimpleNamespace
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from itm_nb.core import commands, project
from itm_nb.runs import identity, parameters, run_folder, run_record, sweep_driver, sweep_plan

ROOT = Path(__file__).parents[2]
ENV = os.environ | dict(PYTHONPATH=str(ROOT))
PARAMETERS = "seed = 0\nnap = 0.0\nmargin = 0.0\nluck = 0\nfail = False\ntest = True\nsearch = ''\ninit = ''\narm = ''\nsweep = ''\nout = ''"

# A worker without a kernel. It notes its beginning and its end, holds a lock of its own (so that two of one run would be seen), sleeps, and
# joins what its parents wrote; a search looks at `val.json`.
WORKER = '''
import fcntl, json, sys, time
from pathlib import Path
from itm_nb.runs.run_folder import finish; from itm_nb.runs.execution import start

def note(out, what):
    with open(out.parent/'events.txt', 'a') as f: f.write(f'{what} {out.name}\\n')

def work(nb, values, out, bar):
    alone = open(out.parent/f'{out.name}.alone', 'a')
    try: fcntl.flock(alone, fcntl.LOCK_EX|fcntl.LOCK_NB)
    except BlockingIOError: note(out, 'TWICE')
    note(out, 'begin'); time.sleep(values['nap'])
    if values['fail']: (out/'FAILED').write_text('as it was told to'); return 1
    below = ','.join((Path(p)/'result').read_text() for p in values['init'].split(',') if p)
    (out/'result').write_text(f"{values['arm']}{values['seed']}.{values['luck']}({below})"); time.sleep(values['nap']/4)
    (out/'val.json').write_text(json.dumps(dict(metrics=dict(val=dict(rsum=100 - abs(values['margin'] - .2))))))
    finish(out); note(out, 'end'); return 0

sys.exit(start(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), work=work)[0])
'''
DRIVER = '''
import json, os, subprocess, sys
from pathlib import Path
from itm_nb.runs.sweep_driver import drive; from itm_nb.runs.sweep_plan import entries

def start(e):
    e.out.mkdir(parents=True, exist_ok=True); tmp = e.out/f'.{os.getpid()}.tmp'
    tmp.write_text(json.dumps(e.values, indent=1)); os.replace(tmp, e.out/'params.json')
    return subprocess.Popen([sys.executable, 'worker.py', e.template, e.out/'params.json'], start_new_session=True)

todo = entries(json.loads(Path('spec.json').read_text()), 'toy', Path('runs'))
sys.exit(bool(drive(todo, int(sys.argv[1]), start=start, pause=.02)))
'''


def spec_of(folder, blocks, nap=0., **parts):
    "A folder with toy template, worker, driver and a sweep of four runs and one of another block's child per block"
    folder = Path(folder); toy = dict(template=str(folder/'toy.ipynb'))
    cell = dict(cell_type='code', execution_count=None, outputs=[], id='0', metadata=dict(tags=['parameters']), source=PARAMETERS)
    (folder/'toy.ipynb').write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    (folder/'worker.py').write_text(WORKER); (folder/'driver.py').write_text(DRIVER)
    arms = dict(left=toy | dict(init='root'), right=toy | dict(init='root'), both=toy | dict(init=['left', 'right']),
                other=toy | dict(init=dict(run='root', seed=0)))
    spec = {k: kind() for k, kind in sweep_plan._KINDS.items()} | dict(title='toy', base=dict(nap=nap), blocks=[dict(seed=s) for s in range(blocks)],
                                                                   runs=dict(root=toy), arms=arms) | parts
    (folder/'spec.json').write_text(json.dumps(spec)); return spec


def driver(folder, jobs=2): return subprocess.Popen([sys.executable, 'driver.py', str(jobs)], cwd=folder, env=ENV)


def start_here(folder):
    def start(e):
        e.out.mkdir(parents=True, exist_ok=True); (e.out/'params.json').write_text(json.dumps(e.values, indent=1))
        return subprocess.Popen([sys.executable, Path(folder)/'worker.py', e.template, e.out/'params.json'], env=ENV)
    return start


def ends(folder): return {p.parent.name: (p.stat().st_mtime_ns, p.read_text()) for p in Path(folder, 'runs').glob('toy/*/DONE')}


def events(folder): return [l.split() for l in (Path(folder)/'runs'/'toy'/'events.txt').read_text().splitlines()]


def never_again(folder):
    "No run is begun after its end, and never by two at once"
    over = set()
    for what, name in events(folder):
        assert what != 'TWICE' and not (what == 'begin' and name in over), f'{name} was run again'
        if what == 'end': over.add(name)


def kill_and_go_on(folder, kills, seed):
    "Kill so many drivers and so many workers, at random moments; a new driver each time"
    import psutil
    draw, early, p, hits = random.Random(seed), {}, None, dict(driver=0, worker=0)
    while min(hits.values()) < kills:
        if p is None or p.poll() is not None: p = driver(folder)
        time.sleep(draw.uniform(.2, .9))
        workers = [q for q in psutil.process_iter(['cmdline']) if 'worker.py' in (q.info['cmdline'] or []) and folder_of(q) == Path(folder).resolve()]
        who = min(hits, key=hits.get)
        if who == 'driver' and p.poll() is None: p.kill(); p.wait(); hits[who] += 1
        elif who == 'worker' and workers: [q.kill() for q in workers[:1]]; hits[who] += 1
        now = ends(folder); assert early.items() <= now.items(), 'a finished run was lost or made again'
        assert all((Path(folder)/'runs'/'toy'/n/'result').is_file() for n in now), 'counted as finished, and is not'
        assert len(now) < 40, 'the sweep ended before all was killed'
        early = now
    p.wait()
    return early


def folder_of(process):
    import psutil
    try: return Path(process.cwd()).resolve()
    except (psutil.NoSuchProcess, psutil.AccessDenied): return None


@pytest.mark.parametrize('kills', [3, pytest.param(20, marks=pytest.mark.slow)])
def test_driver_and_workers_are_killed_and_nothing_is_lost_or_repeated(kills, tmp_path):
    "40 runs with parents in their block and in another; so many kills hit the driver, and as many its workers"
    spec = spec_of(tmp_path, 8, nap=.2 if kills < 20 else 1.2)
    early = kill_and_go_on(tmp_path, kills, seed=kills)
    for _ in range(5):                                       # an orphan of the last kill may still hold a run: a driver waits for it
        if driver(tmp_path).wait(timeout=300) == 0: break
    last = ends(tmp_path); assert len(last) == 40 and early.items() <= last.items()
    never_again(tmp_path)
    todo = sweep_plan.entries(spec, 'toy', tmp_path/'runs'); assert {e.out.name for e in todo} == set(last)
    both = {e.values['seed']: (e.out/'result').read_text() for e in todo if e.arm == 'both'}
    assert both == {s: f'both{s}.0(left{s}.0(root{s}.0()),right{s}.0(root{s}.0()))' for s in range(8)}
    before = events(tmp_path); assert driver(tmp_path).wait(timeout=60) == 0 and ends(tmp_path) == last and events(tmp_path) == before


def test_two_drivers_never_run_one_run_twice(tmp_path):
    spec_of(tmp_path, 3, nap=.05); both = [driver(tmp_path) for _ in range(2)]
    assert [p.wait(timeout=300) for p in both] == [0, 0]
    begun = [n for what, n in events(tmp_path) if what == 'begin']
    assert len(begun) == 15 and len(set(begun)) == 15
    never_again(tmp_path)


def test_children_of_a_parent_made_anew(tmp_path):
    "With the same bytes they stand; with others they are not finished and begin anew; the id follows a parent's settings"
    spec = spec_of(tmp_path, 1); start = start_here(tmp_path); todo = sweep_plan.entries(spec, 'toy', tmp_path/'runs')
    assert sweep_driver.drive(todo, 2, start=start, pause=.02) == {}
    root = todo[0]; first = ends(tmp_path); shutil.rmtree(root.out)
    assert [sweep_driver.state(e, todo) for e in todo] == ['waiting']*5
    assert sweep_driver.drive(todo, 2, start=start, pause=.02) == {}
    assert {n for n in first if first[n] != ends(tmp_path)[n]} == {root.out.name}
    (root.out/'result').write_text('by another machine'); (root.out/'DONE').unlink(); run_folder.finish(root.out)
    assert not any(run_folder.finished(e.out, e.values) for e in todo[1:])
    assert sweep_driver.drive(todo, 2, start=start, pause=.02) == {}
    assert all('another machine' in (e.out/'result').read_text() for e in todo[1:])
    changed = sweep_plan.entries(spec | dict(runs=dict(root=spec['runs']['root'] | dict(luck=1))), 'toy', tmp_path/'runs')
    assert not {e.out for e in changed} & {e.out for e in todo}


def test_a_failed_parent_blocks_its_descendants_and_only_them(tmp_path):
    spec = spec_of(tmp_path, 2); spec['arms']['left'] = spec['arms']['left'] | dict(fail=True)
    todo = sweep_plan.entries(spec, 'toy', tmp_path/'runs'); failed = sweep_driver.drive(todo, 2, start=start_here(tmp_path), pause=.02)
    assert {(todo[i].arm, c) for i, c in failed.items()} == {('left', 1), ('both', sweep_driver.BLOCKED)} and len(failed) == 4
    said = {e.arm: sweep_driver.state(e, todo) for e in todo}
    assert said['left'] == 'failed: as it was told to' and said['both'].startswith('blocked: left (') and said['other'] == 'done'


def test_a_search_goes_on_with_the_best(tmp_path):
    spec = spec_of(tmp_path, 2); tried = dict(left=dict(margin=[.1, .2, .3]), right=[dict(margin=.5), dict(margin=.4), dict(margin=.6)])
    spec = spec | dict(search=dict(block=dict(seed=1), arms=tried))
    todo = sweep_plan.searches(spec, 'toy', tmp_path/'runs')
    assert [e.arm for e in todo] == ['root', *(f'{a}~{i}' for a in ('left', 'right') for i in range(3))]
    assert all(e.values['seed'] == 1 and not e.values['test'] for e in todo[1:]) and sweep_plan.choose(spec, todo) == {}
    assert sweep_driver.drive(todo, 2, start=start_here(tmp_path), pause=.02) == {}
    found = sweep_plan.choose(spec, todo)
    assert {a: (x['settings'], x['tried']) for a, x in found.items()} == dict(left=(dict(margin=.2), 3), right=(dict(margin=.4), 3))
    runs_ = sweep_plan.entries(spec, 'toy', tmp_path/'runs', chosen=found)
    assert {e.arm: e.values['margin'] for e in runs_} == dict(root=0., left=.2, right=.4, both=0., other=0.)
    noted = json.loads(next(e for e in runs_ if e.arm == 'left').values['search'])
    assert noted['tried'] == 3 and noted['val'][1] == 100. and noted['best_of'][-1] == 100. and noted['best_of'] == sorted(noted['best_of'])
    (todo[2].out/'DONE').unlink()                                                     # an open trial: nothing is chosen; given up: the best of the rest
    assert set(sweep_plan.choose(spec, todo)) == {'right'}
    left = sweep_plan.choose(spec, todo, [2])['left']; assert (left['failed'], left['settings'], left['val'][1]) == (1, dict(margin=.1), None)


def test_budget_keeps_blocks_whole(tmp_path):
    "A first block is begun whatever it takes; another only if all of it fits; a run that will not fit is not begun"
    spec = spec_of(tmp_path, 3); todo = sweep_plan.entries(spec, 'toy', tmp_path/'runs'); start = start_here(tmp_path)
    def go(budget, each): return sweep_driver.drive(todo, 2, plan=sweep_driver.Plan(lambda e: sweep_plan.Estimate(each), budget), start=start, pause=.02)
    assert len(go(20., 30.)) == 15 and not ends(tmp_path)                                      # not even one
    failed = go(100., 45.); assert {todo[i].block for i in failed} == {1, 2} and set(failed.values()) == {run_folder.RESUMABLE}     # 5*45/2 > 100
    assert len(ends(tmp_path)) == 5 and go(300., .1) == {}


def test_the_end_of_the_budget_stops_what_runs(tmp_path):
    spec = spec_of(tmp_path, 1, nap=30.); todo = sweep_plan.entries(spec, 'toy', tmp_path/'runs'); began = time.monotonic()
    failed = sweep_driver.drive(todo, 2, plan=sweep_driver.Plan(budget=2.), start=start_here(tmp_path), pause=.02)
    assert set(failed.values()) == {run_folder.RESUMABLE} and len(failed) == 5 and time.monotonic()-began < 25


def test_runs_share_memory(tmp_path):
    "Four that need 400 MiB each in 1,000 MiB: two at a time, though four may run"
    spec = spec_of(tmp_path, 4, nap=.3); toy = dict(template=spec['runs']['root']['template'])
    todo = sweep_plan.entries(spec | dict(runs={}, arms=dict(a=toy)), 'toy', tmp_path/'runs'); most, live = [], []
    def start(e):
        live.append(p := start_here(tmp_path)(e)); most.append(sum(q.poll() is None for q in live)); return p
    assert sweep_driver.drive(todo, 4, plan=sweep_driver.Plan(lambda e: sweep_plan.Estimate(1., 400.), memory=1000.), start=start, pause=.02) == {}
    assert max(most) == 2 and len(most) == 4


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "Two finished runs on the tiny world, as the template makes them, and its data"
    from itm_nb.training.config import config
    from itm_nb.training.corpus import corpus
    from itm_nb.training.loop import fit, Inputs
    folder, done = tmp_path_factory.mktemp('tiny'), []
    for arm, more in (('warm', dict(method='vse0')), ('fork', dict(method='vsepp', init='warm'))):
        given = dict(preset='tiny', dim=32, d_word=16, image_hidden=32, epochs=2, batch=32, arm=arm) | more
        if done: given['init'] = str(done[0][1])
        values = parameters.resolve(parameters.parameters(project.template('train')), given)
        cfg = config({k: v for k, v in values.items() if k not in identity.OF_A_RUN}); data = corpus(cfg)
        run = folder/identity.run_id('train', values); t = fit(cfg, run, data, progress=False, inputs=Inputs(init=values['init']))
        done.append((run_record.conclude(values, run, t, data), run, t))
    return done, data, folder


def evaluate_values(**kw): return parameters.resolve(parameters.parameters(project.template('evaluate')), dict(preset='tiny') | kw)


def test_a_fork_is_named_by_its_parent(tiny):
    (warm, _, _), (fork, _, _) = tiny[0]
    assert fork['config']['init'] == warm['id'] and warm['collapsed'] in (True, False)
    assert fork['block'] == dict(fold=None, seed=0)


def test_foreign_scores_of_our_own_model_give_our_own_row(tiny, tmp_path):
    "The matrix of a run, handed in as a file, has the ranks of the run, shares its test set, and differs by nothing"
    from itm_nb.data.batches import Batches
    from itm_nb.models.encode import embed
    from itm_nb.runs.external_scores import judge
    from itm_nb.analysis.tables import differences
    done, data, folder = tiny; rec, run, t = done[0]
    split = data.split('test'); img, txt = embed(t.core, Batches(split, t.vocab))
    S = (img @ txt.T).numpy(); np.save(tmp_path/'s.npy', S)
    got = judge(evaluate_values(scores=str(tmp_path/'s.npy'), arm='theirs'), tmp_path/'runs'/'a', lambda: data)
    assert got['ranks']['i2t'] == rec['ranks']['i2t'] and got['ranks']['t2i'] == rec['ranks']['t2i'] and got['kind'] == 'foreign'
    diff = differences([rec, got], ['theirs'], 'warm'); assert diff.d[0] == 0 and diff.n[0] == 1
    order = np.random.default_rng(0).permutation(len(split))
    np.save(tmp_path/'p.npy', S[order]); np.save(tmp_path/'ids.npy', split.img_ids[order])
    again = judge(evaluate_values(scores=str(tmp_path/'p.npy'), img_ids=str(tmp_path/'ids.npy')), tmp_path/'runs'/'b', lambda: data)
    assert again['ranks'] == got['ranks'] and again['metrics'] == got['metrics']


def test_foreign_rows_are_gathered_and_come_into_the_tables(tiny, tmp_path):
    "Scores brought into a sweep by hand lie beside its records, in its table and its table of differences"
    from itm_nb.runs.external_scores import judge
    done, data, folder = tiny; rec, run, t = done[0]; (tmp_path/'toy'/'records').mkdir(parents=True)
    mine = json.loads(json.dumps(rec)) | dict(sweep='toy', method='vse0'); path = tmp_path/'toy'/'records'/f"{rec['id']}.json"
    path.write_text(json.dumps(mine))
    np.save(tmp_path/'s.npy', np.random.default_rng(0).normal(size=(rec['data']['images'], rec['data']['captions'])))
    judge(evaluate_values(scores=str(tmp_path/'s.npy'), arm='theirs', sweep='toy'), tmp_path/'toy'/'b', lambda: data)
    shutil.copytree(run, tmp_path/'toy'/rec['id'])
    todo = [sweep_plan.Entry('train', 'vse0', dict(seed=0), tmp_path/'toy'/rec['id'])]; run_folder.finish(todo[0].out)
    sweep_driver.gather(todo, tmp_path/'results', 'toy', tmp_path)
    assert sorted(json.loads(p.read_text())['method'] for p in (tmp_path/'results').glob('*.json')) == ['theirs', 'vse0']
    assert sweep_driver.report('toy', tmp_path/'results', tmp_path/'figures', tmp_path/'work') == 0, (tmp_path/'work'/'worker.log').read_text()
    assert '| theirs |' in (tmp_path/'figures'/'table_toy.md').read_text() and '| theirs |' in (tmp_path/'figures'/'table_toy_differences.md').read_text()


def test_an_ensemble_of_one_is_that_run_and_of_two_is_their_mean(tiny, tmp_path):
    from itm_nb.data.batches import Batches
    from itm_nb.metrics.ranks import in_galleries, ranks_of
    from itm_nb.models.encode import embed
    from itm_nb.runs.external_scores import judge
    from itm_nb.runs.records import stored_ranks
    done, data, folder = tiny; (rec, run, t), (_, other, u) = done
    one = judge(evaluate_values(scores=str(run), arm='one'), tmp_path/'e'/'a', lambda: data)
    assert one['ranks'] == rec['ranks'] and one['metrics']['test'] == rec['metrics']['test'] and one['kind'] == 'ensemble'
    two = judge(evaluate_values(scores=f'{run},{other}', arm='two'), tmp_path/'e'/'b', lambda: data)
    assert two['config']['scores'] == ','.join(r['id'] for r, _, _ in done)
    split = data.split('test'); S = sum((lambda i, x: i @ x.T)(*embed(m.core, Batches(split, m.vocab))) for m in (t, u))/2
    want = in_galleries(lambda i, j, own: ranks_of(S[i][:, j], own), split.img_of, split.gallery); have = stored_ranks(two)[0]
    assert (np.minimum(want.i2t, two['ranks']['clip']) == have.i2t).mean() > .99 and (np.minimum(want.t2i, 255) == have.t2i).mean() > .99


def test_the_first_run_looks_and_the_second_scores_its_best_again(tiny, tmp_path, capsys):
    "With a list of everything the second run's own row; with a short one, what the whole matrices give; the ceiling is told"
    import torch
    from itm_nb.data.batches import Batches
    from itm_nb.metrics.ranks import ranks_of
    from itm_nb.models.cross_encoder import ceiling, rerank, shortlist
    from itm_nb.models.encode import embed
    from itm_nb.runs.external_scores import judge
    from itm_nb.runs.records import stored_ranks
    done, data, folder = tiny; (_, run, t), (rec, other, u) = done; split = data.split('test'); two = f'{run},{other}'
    whole = judge(evaluate_values(scores=two, rerank=10**6, arm='all'), tmp_path/'e'/'a', lambda: data)
    def numbers(x, at=''): return {k: v for n, y in x.items() for k, v in numbers(y, f'{at}.{n}').items()} if isinstance(x, dict) else {at: x}
    a, b = (numbers(r['metrics']['test']) for r in (whole, rec)); assert whole['ranks'] == rec['ranks'] and a == pytest.approx(b) and any('map_r' in k for k in b)
    assert 'for 100.0 % of images and 100.0 % of sentences' in capsys.readouterr().out
    short = judge(evaluate_values(scores=two, rerank=5, arm='short'), tmp_path/'e'/'b', lambda: data); said = capsys.readouterr().out
    assert identity.run_id('evaluate', evaluate_values(scores=two, rerank=5)) != identity.run_id('evaluate', evaluate_values(scores=two)) and short['metrics'] != rec['metrics']
    (a, b), (c, d) = (embed(m.core, Batches(split, m.vocab)) for m in (t, u)); first = a @ b.T; keep = shortlist(first, 5); top = ceiling(keep, torch.as_tensor(split.img_of))
    assert f"{int(keep.sum()):,} pairs scored again" in said and f"{top['i2t']:.1f} % of images and {top['t2i']:.1f} % of sentences" in said and top['i2t'] < 100
    want, have = ranks_of(rerank(u.core, c, d, first, keep), split.img_of), stored_ranks(short)[0]
    assert (np.minimum(want.i2t, 255) == have.i2t).mean() > .99 and (np.minimum(want.t2i, 255) == have.t2i).mean() > .99
    with pytest.raises(commands.SetupError, match='wanted candidates per query'):
        judge(evaluate_values(scores=str(run), rerank=5), tmp_path/'x', lambda: data)
    with pytest.raises(commands.SetupError, match='rerank is -1; wanted 0 or more'):
        judge(evaluate_values(scores=two, rerank=-1), tmp_path/'x', lambda: data)


def test_scores_of_other_data_are_refused(tiny, tmp_path):
    from itm_nb.core.errors_files import DataError
    from itm_nb.training.config import Config
    from itm_nb.training.corpus import corpus
    from itm_nb.runs.external_scores import judge
    done, data, folder = tiny
    with pytest.raises(DataError, match='another test split'):
        judge(evaluate_values(scores=str(done[0][1]), seed=1), tmp_path/'x', lambda: corpus(Config(preset='tiny', seed=1)))
    assert not (tmp_path/'x').exists()


def files(folder):
    "Foreign files, sound and broken: name -> parameters, what the message says"
    S = np.random.default_rng(0).normal(size=(4, 8)).astype('float32'); own = np.repeat(np.arange(4), 2)
    save = lambda n, x: (np.save(folder/n, x, allow_pickle=True), str(folder/n))[1]
    def text(n, raw): (folder/n).write_bytes(raw); return str(folder/n)
    s, i = save('s.npy', S), save('i.npy', own); np.savez(folder/'r.npz', i2t=np.array([0, 1, 2, -1]), t2i=np.zeros(8, int)); np.savez(folder/'q.npz', i2t=own)
    np.savez(folder/'w.npz', i2t=np.zeros(4, int), t2i=np.zeros(8, int))
    cut = text('cut.npy', Path(s).read_bytes()[:-7])
    return dict(missing=(dict(scores=str(folder/'no.npy'), img_of=i), ''), cut=(dict(scores=cut, img_of=i), 'mapped'),
                pickled=(dict(scores=save('o.npy', np.array([[{}]], dtype=object)), img_of=i), ''), empty=(dict(scores=save('e.npy', S[:0]), img_of=i), 'photos x sentences'),
                text=(dict(scores=text('t.npy', b'1 2'), img_of=i), 'not an npy'), cube=(dict(scores=save('c.npy', S[None]), img_of=i), 'photos x sentences'),
                bools=(dict(scores=save('b.npy', S > 0), img_of=i), 'real numbers'), turned=(dict(scores=save('u.npy', S.T.copy()), img_of=i), '4 whole numbers'),
                inf=(dict(scores=save('f.npy', S/0.*0), img_of=i), 'NaN'), far=(dict(scores=s, img_of=save('j.npy', own+1)), 'Count rows from 0'),
                lone=(dict(scores=str(folder/'w.npz'), img_of=save('k.npy', own*0)), 'every row of i2t'), floats=(dict(scores=s, img_of=save('l.npy', own*1.)), 'whole numbers'),
                short=(dict(scores=s, img_of=save('m.npy', own[:-1])), '8 whole numbers'), ids=(dict(scores=s, img_of=i, img_ids=i), '4 whole numbers'),
                gallery=(dict(scores=s, img_of=i, gallery=save('g.npy', np.zeros(3, int))), '4 whole numbers'), below=(dict(scores=str(folder/'r.npz'), img_of=i), 'from 0'),
                half=(dict(scores=str(folder/'q.npz'), img_of=i), 'cannot be read'), zipped=(dict(scores=text('z.npz', b'PK\3\4junk'), img_of=i), 'cannot be read'))


@pytest.mark.filterwarnings('ignore:.*:RuntimeWarning')
@pytest.mark.parametrize('what', ['missing', 'cut', 'pickled', 'empty', 'text', 'cube', 'bools', 'turned', 'inf', 'far', 'lone', 'floats', 'short', 'ids', 'gallery',
                                  'below', 'half', 'zipped'])
def test_broken_foreign_files(what, tmp_path):
    "One typed error that names the file; nothing is written, nothing unpickled"
    from itm_nb.core.errors_files import DataError
    from itm_nb.runs.external_scores import judge
    given, said = files(tmp_path)[what]; said = said or given['scores'].rsplit('/', 1)[1]; before = sorted(tmp_path.rglob('*'))
    with pytest.raises(DataError, match=said): judge(evaluate_values(**given), tmp_path/'run', None)
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.slow
def test_a_whole_sweep_with_search_fork_and_ensemble(tmp_path):
    "Through papermill, with the command (minutes)"
    f = tmp_path/'fork.yaml'; f.write_text('''
title: fork
base: {data: scenes, preset: tiny, dim: 32, d_word: 16, image_hidden: 32, epochs: 2, batch: 32}
blocks: [{seed: 0}, {seed: 1}]
runs: {warm: {method: vse0}}
arms:
  vsepp: {method: vsepp, init: warm}
  infonce: {method: infonce, init: warm, carry: true}
  both: {template: evaluate, scores: [vsepp, infonce]}
controls: {chance: {scores: chance}}
search: {arms: {vsepp: {margin: [0.1, 0.3]}, infonce: {temperature: [0.05, 0.2]}}}
''')
    argv = [sys.executable, '-c', 'from itm_nb.cli import itm_sweep; itm_sweep()', f, '--runs', tmp_path/'runs']
    r = subprocess.run(argv, cwd=ROOT, env=ENV, capture_output=True, text=True); assert r.returncode == 0, r.stdout + r.stderr
    recs = [json.loads(p.read_text()) for p in (tmp_path/'runs'/'fork'/'report'/'results').glob('*.json')]
    assert sorted((r['method'], r['seed']) for r in recs) == sorted((a, s) for a in ('warm', 'vsepp', 'infonce', 'both', 'chance') for s in (0, 1))
    assert all(r['search']['tried'] == 2 for r in recs if r['method'] in ('vsepp', 'infonce')) and not any('search' in r for r in recs if r['method'] == 'warm')
    assert 'both' in (tmp_path/'runs'/'fork'/'report'/'table_fork.md').read_text()
    before = ends_of(tmp_path); r = subprocess.run(argv, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert r.returncode == 0 and ends_of(tmp_path) == before


def ends_of(folder): return {p: p.stat().st_mtime_ns for p in Path(folder).glob('runs/fork/*/DONE') if p.parent.name != 'study'}


def test_a_run_of_two_sweeps_keeps_a_record_in_each(tmp_path):
    "Controls of one world are one run: the later sweep's record must not take the place of the earlier's, nor stay behind as a second one"
    from itm_nb.runs.records import made_up_record, read_records, write_record
    from itm_nb.runs.run_folder import finish
    from itm_nb.runs.sweep_driver import gather
    rec, into = made_up_record('oracle', 2.), tmp_path/'into'
    def of(sweep):
        at = tmp_path/sweep/rec['id']; at.mkdir(parents=True, exist_ok=True); finish(at); write_record(tmp_path/sweep/'records', rec | dict(sweep=sweep)); return at
    made = {s: [SimpleNamespace(out=of(s), values={})] for s in ('one', 'two')}
    for s in ('one', 'two', 'one', 'two'): gather(made[s], into, s)
    assert sorted((r['id'], r['sweep']) for r in read_records(into)) == [(rec['id'], 'one'), (rec['id'], 'two')] and len(list(into.iterdir())) == 2
    (into/f"{rec['id']}.json").unlink(); gather(made['two'], into, 'two'); assert [r['sweep'] for r in read_records(into)] == ['two']


def test_a_lost_record_is_had_again_from_the_folder_of_its_run(tmp_path, capsys):
    "The record lies in the run folder too, under its seal; with one byte changed there, the run is not finished"
    from itm_nb.runs.records import keep_record, made_up_record
    from itm_nb.runs.run_folder import finish
    from itm_nb.runs.sweep_driver import gather
    rec = made_up_record('oracle', 2.) | dict(sweep='s')
    out, into = tmp_path/'s'/rec['id'], tmp_path/'into'
    out.mkdir(parents=True)
    at = keep_record(out, rec)
    finish(out)
    raw, todo = at.read_bytes(), [SimpleNamespace(out=out, values={})]
    assert b'record.json' in (out/'manifest.json').read_bytes()
    at.unlink()
    gather(todo, into, 's')
    assert at.read_bytes() == raw == (into/at.name).read_bytes()
    assert 'was lost' in capsys.readouterr().out
    at.unlink()
    (out/'record.json').write_bytes(raw.replace(b'oracle', b'miracl'))
    with pytest.warns(UserWarning, match='record.json'):
        gather(todo, into, 's')
    assert not at.exists() and not (into/at.name).exists()
