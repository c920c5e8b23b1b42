"""A run folder is what it says, or it is not used: damaged in every way, killed at every file operation, asked for as another run."""
import builtins
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from itm_nb.core import commands, project, sealed_files
from itm_nb.runs import execution, identity, parameters, run_folder, run_record
from itm_nb.core.errors_files import DataError
from itm_nb.core.sealed_files import broken, content, result, seal
from itm_nb.training.config import config
from itm_nb.training import loop
from itm_nb.training.corpus import corpus
from itm_nb.training.loop import fit, Inputs, Saving

ROOT = Path(__file__).parents[2]
TINY = dict(preset='tiny', dim=16, d_word=8, image_hidden=16, epochs=2, batch=100, dropout=.1, method='vsepp', progress=False, sweep='t')
worlds = {}


def values_of(**given): return parameters.resolve(parameters.parameters(project.template('train')), TINY | given)


def world_of(values):
    key = values['seed'], values['preset']
    if key not in worlds: worlds[key] = corpus(config({k: v for k, v in values.items() if k not in identity.OF_A_RUN}), cache='worlds')
    return worlds[key]


def work(nb, values, out, bar=False, on_step=None, every=3):
    "What the notebook `train` does, without a kernel"
    os.environ['ITM_DRIVEN'] = '1'; data = world_of(values)
    try:
        t = fit(config({k: v for k, v in values.items() if k not in identity.OF_A_RUN}), out, data, progress=False, saving=Saving(every=every), on_step=on_step,
                inputs=Inputs(**{k: values[k] for k in ('init', 'carry', 'lists', 'generator')}))
        run_record.conclude(values, out, t, data); run_folder.finish(out)
    finally: del os.environ['ITM_DRIVEN']
    return 0


def start(asked=TINY, work=work, **given):
    "Run it as the command does; what was said on the way"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always'); code, out = execution.start('train', asked | given, work=work)
    assert code == 0; return out, [str(w.message) for w in said]


def killed_at(step, in_turn=False, **given):
    "The same in a process that dies at a step; in turn: steps wait for every checkpoint, so what is there is certain"
    pid = os.fork()
    if pid == 0:
        if in_turn: loop.Aside.begin = lambda self, what, *args: what(*args)
        try: start(work=lambda *a: work(*a, on_step=lambda s: os.kill(os.getpid(), signal.SIGKILL) if s == step else None), **given)
        finally: os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A finished run, one that was killed, and another run altogether, finished and killed; each in a folder of its own"
    home = Path.cwd(); at = tmp_path_factory.mktemp('made'); out = {}
    for name, seed in (('mine', 0), ('other', 1)):
        for how in ('whole', 'half'):
            (at/name/how).mkdir(parents=True); os.chdir(at/name/how); me = Path('runs/t')/identity.run_id('train', values_of(seed=seed))
            me.mkdir(parents=True); (me/'params.json').write_text(json.dumps(values_of(seed=seed)))             # as a sweep leaves it
            if how == 'whole': start(seed=seed)
            else: killed_at(steps//2 + 5 - (name == 'other'), in_turn=True, seed=seed)                 # in the second epoch: there is a best model, and a checkpoint before the last
            out[name, how] = (at/name/how/me).resolve()
            if how == 'whole': steps = json.loads((me/'last'/'state.json').read_text())['state']['step']
    os.chdir(home); yield out
    os.chdir(home)


WAYS = dict(cut=lambda p, other: p.write_bytes(p.read_bytes()[:p.stat().st_size//2]), empty=lambda p, other: p.write_bytes(b''),
            flipped=lambda p, other: flip(p), missing=lambda p, other: p.unlink(), foreign=lambda p, other: p.write_bytes(other.read_bytes()))
READ = ('DONE', 'manifest.json', 'run.json', 'params.json', 'log.jsonl', 'picks.bin', 'timing.jsonl', 'ranks_val.npz', 'ranks_test.npz', 'best/config.json',
        'best/model.safetensors', 'best/vocab.json', 'last/state.json', 'last/tensors.safetensors',
        'record.json')
BEFORE = ('previous/best/config.json', 'previous/best/model.safetensors', 'previous/best/vocab.json')
UNREAD = ('claim', 'lock', 'wall.jsonl')
HALF = ('run.json', 'params.json', 'log.jsonl', 'picks.bin', 'timing.jsonl', 'best/config.json', 'best/model.safetensors', 'best/vocab.json', 'last/state.json',
        'last/tensors.safetensors', 'previous/state.json', 'previous/tensors.safetensors', *BEFORE)
TOLD = Counter()


def flip(p):
    raw = bytearray(p.read_bytes())
    if raw: raw[len(raw)//2] ^= 1
    p.write_bytes(raw)


def damaged(made, how, name, way, tmp_path, monkeypatch):
    "A copy of a run with one file damaged; (folder, was it changed at all?)"
    mine, other = made['mine', how], made['other', how]
    shutil.copytree(mine.parent.parent, tmp_path/'runs'); (tmp_path/'worlds').symlink_to(mine.parent.parent.parent/'worlds'); monkeypatch.chdir(tmp_path)
    at = Path('runs/t')/mine.name/name; before = at.read_bytes() if at.is_file() else None
    if before is None: pytest.skip(f'{name} is not there')
    WAYS[way](at, other/name if (other/name).is_file() else mine/'log.jsonl')
    return Path('runs/t')/mine.name, not at.is_file() or at.read_bytes() != before


@pytest.mark.parametrize('how,lists', [('whole', READ+UNREAD), ('half', HALF+UNREAD)])
def test_every_file_of_a_run_folder_is_damaged_below(how, lists, made):
    "A file that a run leaves and that stands in no list would be damaged by nobody"
    at = made['mine', how]
    there = {p.relative_to(at).as_posix() for p in at.rglob('*') if p.is_file()}
    assert there <= set(lists), there - set(lists)
    assert len(there & {*READ, *HALF}) >= 10


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', READ)
def test_a_damaged_finished_run_is_made_again_or_refused(name, way, made, tmp_path, monkeypatch):
    "It does not count as finished, the file is named; asked for again it comes to the same bytes. Never used in silence"
    out, changed = damaged(made, 'whole', name, way, tmp_path, monkeypatch)
    if not changed: pytest.skip('the other run has the same bytes there')
    why = broken(out); assert why and (name in why or name == 'DONE'), why
    asked = []
    def again(*a): asked.append(1); return work(*a)
    try: out_, said = start(work=again)
    except (commands.SetupError, DataError) as e:
        assert str(out) in str(e) and made['mine', 'whole'].name in str(e); TOLD['finished: refused by name'] += 1; return
    assert asked and out_ == out, 'used as it was'
    assert any(name in s for s in said) or name == 'DONE' and (way == 'missing' or any('DONE' in s for s in said)), said
    assert broken(out) == '' and result(out) == result(made['mine', 'whole']) and content(out) == content(made['mine', 'whole'])
    rec = json.loads((out.parent/'records'/f'{out.name}.json').read_text()); kept = json.loads((made['mine', 'whole'].parent/'records'/f'{out.name}.json').read_text())
    assert rec['metrics'] == kept['metrics'] and rec['ranks'] == kept['ranks']
    TOLD['finished: made again'] += 1


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', UNREAD)
def test_what_nobody_reads_changes_nothing(name, way, made, tmp_path, monkeypatch):
    out, _ = damaged(made, 'whole', name, way, tmp_path, monkeypatch)
    assert start(work=lambda *a: pytest.fail('run again'))[0] == out and result(out) == result(made['mine', 'whole']); TOLD['finished: nobody reads it'] += 1


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', HALF)
def test_a_damaged_run_on_its_way_comes_to_the_same_bytes(name, way, made, tmp_path, monkeypatch):
    "Back to the checkpoint before, or to the beginning, and that is said; or refused by name"
    out, changed = damaged(made, 'half', name, way, tmp_path, monkeypatch); assert not (out/'DONE').exists()
    if not changed: pytest.skip('the other run has the same bytes there')
    try: _, said = start()
    except (commands.SetupError, DataError) as e:
        assert made['mine', 'half'].name in str(e); TOLD['on its way: refused by name'] += 1; return
    if name not in ('run.json', 'params.json', 'timing.jsonl'): assert any(Path(name).parts[0].split('.')[0] in s for s in said) or name.startswith('previous'), said
    assert result(out) == result(made['mine', 'whole']) and content(out) == content(made['mine', 'whole'])
    TOLD['on its way: same bytes in the end'] += 1


@pytest.mark.parametrize('how, name', [('whole', 'best'), ('whole', 'last'), ('half', 'best'), ('half', 'last'), ('half', 'previous')])
def test_a_folder_that_is_lost(name, how, made, tmp_path, monkeypatch):
    out, _ = damaged(made, how, 'run.json', 'flipped', tmp_path, monkeypatch); shutil.copyfile(made['mine', how]/'run.json', out/'run.json')
    shutil.rmtree(out/name); start()
    assert result(out) == result(made['mine', 'whole']) and broken(out) == ''; TOLD['a folder lost: same bytes in the end'] += 1


def test_a_finished_run_keeps_no_checkpoint_before_the_last(made):
    there = {how: {p.name for p in made['mine', how].iterdir() if p.is_dir()} for how in ('whole', 'half')}
    assert there == dict(whole={'best', 'last'}, half={'best', 'last', 'previous'})


def test_a_trial_keeps_its_validation_and_no_weights(tmp_path, monkeypatch):
    "It counts as finished; a run of the same settings that only skips the test split keeps its model"
    monkeypatch.chdir(tmp_path); (tmp_path/'worlds').mkdir()
    for arm, kept in (('vsepp~3', set()), ('warm', {'best', 'last'})):
        out, _ = start(arm=arm, test=False)
        assert {p.name for p in out.iterdir() if p.is_dir()} == kept and broken(out) == '' and json.loads((out/'val.json').read_text())['metrics']['val']['rsum'] > 0
        assert start(work=lambda *a: pytest.fail('run again'), arm=arm, test=False)[0] == out


def test_the_count():
    "What was damaged above, and what became of it"
    if not TOLD: pytest.skip('the tests above were not run')
    print(f'\n{sum(TOLD.values())} ways to damage a run folder, 0 used in silence:', *(f'{n} {k}' for k, n in sorted(TOLD.items())), sep='\n  ')
    assert sum(TOLD.values()) >= 27


DOORS = ('init', 'evaluate', 'search', 'attacks', 'audit', 'test_sets')


@pytest.mark.parametrize('door', DOORS)
def test_no_door_uses_a_damaged_run(door, made, tmp_path, monkeypatch):
    "Every way a finished run is used refuses one whose best model has one other bit, and names the file"
    from itm_nb.analysis import attacks, audit_runs, coco_protocols, search
    from itm_nb.training.loop import evaluate, prepare, warm_start
    out, _ = damaged(made, 'whole', 'best/model.safetensors', 'flipped', tmp_path, monkeypatch); v = values_of(); cfg = config({k: x for k, x in v.items() if k not in identity.OF_A_RUN})
    use = dict(init=lambda: warm_start(prepare(cfg, world_of(v)), out), evaluate=lambda: evaluate(out, world_of(v)), search=lambda: search.open_run(out),
               attacks=lambda: attacks.opened(out), audit=lambda: audit_runs.run_vectors(out), test_sets=lambda: coco_protocols.trained_on(out))
    with pytest.raises((DataError, commands.SetupError), match='model.safetensors'): use[door]()


def test_a_child_of_a_damaged_run_is_refused(made, tmp_path, monkeypatch):
    out, _ = damaged(made, 'whole', 'best/model.safetensors', 'flipped', tmp_path, monkeypatch)
    with pytest.raises(commands.SetupError, match='needed first and is not finished .*model.safetensors'): start(init=str(out))


# ---- another run in the same folder
def test_another_run_in_the_same_folder_is_refused_with_both_named(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); (tmp_path/'worlds').symlink_to(made['mine', 'whole'].parent.parent.parent/'worlds')
    out, _ = start(out='X'); before = {p: p.read_bytes() for p in sorted(out.rglob('*')) if p.is_file()}; mine = identity.run_id('train', values_of())
    for given in (dict(method='infonce'), dict(seed=3), dict(rho=1), dict(test=False)):
        theirs = identity.run_id('train', values_of(**given))
        with pytest.raises(commands.SetupError, match=f'lies the run {mine}.*{"".join(given)}.*asked for is {theirs}'): start(out='X', **given)
    with pytest.raises(commands.SetupError, match='asked for is .*evaluate'): execution.start('evaluate', dict(scores='chance', out='X'))
    with pytest.raises(commands.SetupError, match='asked for is .*search'): execution.start('search', dict(out='X'))
    assert start(out='X', work=lambda *a: pytest.fail('run again'))[0] == out
    assert {p: p.read_bytes() for p in sorted(out.rglob('*')) if p.is_file()} == before


@pytest.mark.parametrize('what', ['photos', 'a file', 'half a run without run.json'])
def test_a_folder_that_is_no_run_folder_is_refused_untouched(what, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if what == 'photos': (tmp_path/'X').mkdir(); (tmp_path/'X'/'cat.jpg').write_text('mine')
    elif what == 'a file': (tmp_path/'X').write_text('mine')
    else: shutil.copytree(made['mine', 'half'], tmp_path/'X'); (tmp_path/'X'/'run.json').unlink()
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    with pytest.raises(commands.SetupError, match='X'): start(out='X')
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == before


def test_an_empty_folder_is_taken(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); (tmp_path/'X').mkdir(); (tmp_path/'worlds').symlink_to(made['mine', 'whole'].parent.parent.parent/'worlds')
    assert start(out='X')[0] == Path('X') and broken('X') == ''


def test_a_folder_finished_before_there_were_manifests(made, tmp_path, monkeypatch):
    "It stands as long as its one hash holds, and no longer"
    mine = made['mine', 'whole']; shutil.copytree(mine.parent.parent, tmp_path/'runs'); monkeypatch.chdir(tmp_path); out = Path('runs/t')/mine.name
    (out/'manifest.json').unlink(); (out/'DONE').write_text(content(out)+'\n'); old = json.loads((out/'run.json').read_text())
    (out/'run.json').write_text(json.dumps({k: v for k, v in old.items() if k not in ('seal', 'identity')}))
    assert start(work=lambda *a: pytest.fail('run again'))[0] == out
    flip(out/'best'/'model.safetensors'); assert broken(out) == 'its files are not those that DONE was written for'


def test_looking_again_is_cheap(made, monkeypatch):
    "Every byte is read once; after that a folder is only looked at until something in it changes"
    out = made['mine', 'whole']; assert broken(out) == ''
    monkeypatch.setattr(sealed_files, 'sha256_of', lambda p: pytest.fail('read again')); assert broken(out) == '' and run_folder.done(out)


def test_an_audit_reads_a_model_by_its_own_tokenizer(tmp_path, monkeypatch):
    "Word pieces, and a frozen network whose states are kept: the vectors are those that were ranked"
    from itm_nb.analysis.audit_runs import run_vectors
    from itm_nb.metrics.ranks import ranks, summary
    monkeypatch.chdir(tmp_path); (tmp_path/'worlds').mkdir()
    network = json.dumps(dict(model_type='bert', hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    out, _ = start(tokenizer='pieces', wordpiece_vocab=60, text_model=network, text_freeze='all', text_parts='net:-1:mean+bag', max_tokens=0)
    img, txt, split, *_ = run_vectors(out)
    rec = json.loads((out.parent/'records'/f'{out.name}.json').read_text())
    at = split.gallery[split.img_of] == 0; own = np.flatnonzero(split.gallery == 0)
    first = summary(ranks(img[own], txt[at], np.searchsorted(own, split.img_of[at])))['rsum']
    assert len(img) == len(split) and len(txt) == len(split.captions) and 0 < first <= 600 and rec['metrics']['test']['rsum'] > 0
    every = [summary(ranks(img[split.gallery == g], txt[split.gallery[split.img_of] == g],
                           np.searchsorted(np.flatnonzero(split.gallery == g), split.img_of[split.gallery[split.img_of] == g])))['rsum'] for g in np.unique(split.gallery)]
    assert abs(np.mean(every) - rec['metrics']['test']['rsum']) < 1e-6


# ---- kills
def same(out, whole): assert result(out) == result(whole) and content(out) == content(whole) and broken(out) == ''


@pytest.fixture(scope='module')
def parents(tmp_path_factory):
    "Mined lists and a writer, for methods that need them"
    home = Path.cwd(); at = tmp_path_factory.mktemp('parents'); os.chdir(at); (at/'worlds').mkdir()
    warm, _ = start(method='vse0', warmup=0)
    command = [sys.executable, '-c', 'import sys; from itm_nb.cli import itm_run; sys.exit(itm_run())', 'mine', '--quiet', '-p', 'init', str(warm.resolve()), '-p', 'preset', 'tiny',
               '-p', 'share', '.02', '-p', 'progress', 'false', '-p', 'out', 'lists']
    r = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT))); assert r.returncode == 0, r.stderr[-2000:]
    writer, _ = start(method='mlm_warmup(copies=2)', similarity='two_modes', layers=1, heads=2, dim=16, d_word=16, warmup=0, test=False)
    os.chdir(home); return dict(lists=str((at/'lists').resolve()), generator=str((at/writer).resolve())), at/'worlds'


FAMILIES = dict(vsepp={}, aoq=dict(method='aoq(share=0.02)', lists=True), fne=dict(method='fne(queue=64)'), tags=dict(method="vsepp|tags(sharing='static', tau=1.0)", generator=True),
                union=dict(method="aoq(share=0.02),on=itm_nb.fne:bank_source(queue=64)|tags(sharing='static', tau=1.0)", lists=True, generator=True))


def family(name, parents):
    given, folders = FAMILIES[name], parents[0]
    return dict(epochs=3) | {k: folders[k] if v is True else v for k, v in given.items()}


def killed_often(name, kills, seed, parents, tmp_path, monkeypatch):
    "So many SIGKILLs, each at a drawn step and each followed by going on; then the bytes of a run that nobody killed"
    given = family(name, parents); g = np.random.default_rng(seed)
    for where in ('whole', 'killed'): (tmp_path/where).mkdir(); (tmp_path/where/'worlds').symlink_to(parents[1])
    monkeypatch.chdir(tmp_path/'whole'); whole, _ = start(**given); whole = whole.resolve(); steps = json.loads((whole/'last'/'state.json').read_text())['state']['step']
    monkeypatch.chdir(tmp_path/'killed'); out = Path('runs/t')/whole.name
    for step in sorted(g.choice(np.arange(1, steps+1), min(kills, steps), replace=False).tolist()): killed_at(step, **given)
    start(**given); same(out, whole); return min(kills, steps)


@pytest.mark.parametrize('name', FAMILIES)
def test_killed_and_gone_on(name, parents, tmp_path, monkeypatch): killed_often(name, 2, 0, parents, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize('name', FAMILIES)
def test_sixty_kills_over_five_methods(name, parents, tmp_path, monkeypatch):
    n = killed_often(name, 12, 7, parents, tmp_path, monkeypatch); print(f'{name}: {n} SIGKILLs, equal bytes'); assert n == 12


# ---- death at every file operation
def count_operations(die_at):
    "From now on this process counts what it does to files, and dies before or after the operation with this number; returns the count so far"
    import io
    from itm_nb.models import factory
    from itm_nb.training import checkpoint
    seen = [0]
    one = threading.Lock()                     # checkpoints are written by a thread
    def tick():
        with one:
            seen[0] += 1
            if seen[0] == die_at: os.kill(os.getpid(), signal.SIGKILL)
    def counted(f, when=lambda *a, **k: True):
        def g(*a, **k):
            if not when(*a, **k): return f(*a, **k)
            tick(); out = f(*a, **k); tick(); return out
        return g
    writes = lambda path, mode='r', *a, **k: isinstance(mode, str) and bool(set(mode) & set('wax+'))
    builtins.open = io.open = counted(io.open, writes)
    for name in ('replace', 'rename', 'fsync', 'unlink', 'remove', 'rmdir', 'mkdir', 'truncate'): setattr(os, name, counted(getattr(os, name)))
    os.open = counted(os.open, lambda path, flags, *a, **k: bool(flags & os.O_CREAT))
    checkpoint.save_file = factory.save_file = counted(checkpoint.save_file)
    return seen


def only_trained(nb, values, out, bar=False):
    fit(config({k: v for k, v in values.items() if k not in identity.OF_A_RUN}), out, world_of(values), progress=False, saving=Saving(every=2)); run_folder.finish(out); return 0


SHORT = dict(TINY, batch=400, epochs=2)


def operations(die_at, told):
    "A run in a process of its own that dies at an operation; where it does not, their number goes to a file"
    pid = os.fork()
    if pid == 0:
        try: seen = count_operations(die_at); start(SHORT, work=only_trained); n = seen[0]; told.write_text(str(n)); os._exit(0)
        finally: os._exit(1)
    return os.waitpid(pid, 0)[1]


def die_everywhere(every, made, tmp_path, monkeypatch):
    "Death at each so-manieth operation, then the same command: the bytes of a run that nobody killed; the number of deaths"
    monkeypatch.chdir(tmp_path); (tmp_path/'worlds').symlink_to(made['mine', 'whole'].parent.parent.parent/'worlds')
    world_of(parameters.resolve(parameters.parameters(project.template('train')), SHORT)); assert operations(0, tmp_path/'n') == 0
    n = int((tmp_path/'n').read_text()); out = next(Path('runs/t').glob('*/DONE')).parent; want = result(out), content(out); shutil.rmtree('runs'); died = 0
    for k in range(1, n+1, every):
        assert os.WTERMSIG(operations(k, tmp_path/'x')) == signal.SIGKILL, k
        start(SHORT, work=only_trained); assert (result(out), content(out), broken(out)) == (*want, ''), f'death at {k} of {n}'
        shutil.rmtree('runs'); died += 1
    print(f'\n{died} deaths before and after {n//2} file operations: equal bytes'); return died, n


def test_death_at_some_file_operations(made, tmp_path, monkeypatch): assert die_everywhere(13, made, tmp_path, monkeypatch)[0] >= 10


@pytest.mark.slow
def test_death_before_and_after_every_file_operation(made, tmp_path, monkeypatch):
    died, n = die_everywhere(1, made, tmp_path, monkeypatch); assert died == n > 100


# ---- provenance
def test_no_commit_where_the_repository_is_anothers(tmp_path):
    "The package unpacked inside somebody's own git: none; kept by it: that commit, + where files differ; moved with the import, not with the current folder"
    if not shutil.which('git'): pytest.skip('no git')
    git = lambda *a: subprocess.run(('git', '-C', tmp_path, '-c', 'user.email=a@b.c', '-c', 'user.name=x', *a), capture_output=True, text=True, check=True).stdout.strip()
    git('init', '-q'); git('commit', '-q', '--allow-empty', '-m', 'mine'); shutil.copytree(ROOT/'itm_nb', tmp_path/'itm'/'itm_nb', ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path/'elsewhere').mkdir()
    def said(env={}):
        code = 'import itm_nb.runs.identity as r; print(r.commit(), r.source_hash())'
        r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path/'elsewhere', env=os.environ | dict(PYTHONPATH=str(tmp_path/'itm')) | env, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr; return r.stdout.split()
    assert said() == ['none', identity.source_hash()]                                      # the same files, wherever they lie
    assert said(dict(GIT_DIR=str(tmp_path/'.git'), GIT_WORK_TREE=str(tmp_path)))[0] == 'none'
    git('add', 'itm'); git('commit', '-qm', 'theirs'); head = git('rev-parse', '--short=12', 'HEAD'); assert said()[0] == head
    (tmp_path/'itm'/'itm_nb'/'part').mkdir(); (tmp_path/'itm'/'itm_nb'/'part'/'new.py').write_text('x = 1'); after = said()
    assert after[0] == head + '+' and after[1] != identity.source_hash()                   # folders below count, too
    (tmp_path/'itm'/'itm_nb'/'part'/'new.py').rename(tmp_path/'itm'/'itm_nb'/'new.py'); assert said()[1] not in (after[1], identity.source_hash())


def test_a_machine_without_git_finishes_its_runs(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); (tmp_path/'worlds').symlink_to(made['mine', 'whole'].parent.parent.parent/'worlds'); (tmp_path/'bin').mkdir()
    monkeypatch.setenv('PATH', str(tmp_path/'bin')); assert shutil.which('git') is None and identity.commit() == 'none'
    out, _ = start(epochs=1); assert json.loads((out.parent/'records'/f'{out.name}.json').read_text())['commit'] == 'none' and broken(out) == ''


def test_a_lock_that_nobody_holds_stops_nobody(tmp_path):
    "A number left, or put, in the lock file is no process to be sent a signal"
    for text in ('', '0', '-1', str(os.getpid()), 'x'):
        (tmp_path/'lock').write_text(text)
        with pytest.raises(KeyboardInterrupt): execution.forward_signal(tmp_path)(None, None)


# ---- ids
@pytest.mark.parametrize('name,forms', [('rho', (1, 1., '1', '1.0', '1e0', np.float64(1), np.int64(1))), ('lr', ('.003', .003, '3e-3')), ('clip', (0, 0., '-0.0', -0.)),
                                        ('epochs', (3, '3', ' 3 ', np.int64(3))), ('boxes', (False, 'false', 'False')), ('arm', ('5', 5))])
def test_a_value_has_one_form_whichever_way_it_came(name, forms, tmp_path):
    "Typed, from YAML, set by papermill, in JupyterLab: one id, one value in the record"
    import yaml
    known = parameters.parameters(project.template('train')); default = {k: p.default for k, p in known.items()}
    given = [parameters.resolve(known, {name: x}) for x in forms] + [run_record.settings(default | {name: x}, 'train') for x in forms]
    if not any(isinstance(x, np.generic) for x in forms): given += [parameters.resolve(known, yaml.safe_load(yaml.safe_dump({name: x}))) for x in forms]
    assert len({(type(v[name]), repr(v[name])) for v in given}) == 1
    assert len({identity.run_id('train', v) for v in given} | {identity.run_id('train', default | {name: x}) for x in forms}) == 1


@pytest.mark.parametrize('text', ['name: null', 'name: ~', 'name:', 'name: yes', 'name: [a]', 'name: {a: 1}', 'rho: null', 'rho: true', 'epochs: null', 'carry: null'])
def test_yaml_null_is_no_text(text, tmp_path):
    import yaml
    with pytest.raises(commands.SetupError, match='wanted'): parameters.resolve(parameters.parameters(project.template('train')), yaml.safe_load(text))
    with pytest.raises(commands.SetupError, match='wanted'): run_record.settings({k: p.default for k, p in parameters.parameters(project.template('train')).items()} | yaml.safe_load(text), 'train')


def test_the_ids_of_all_records_are_what_they_were():
    recs = [json.loads(p.read_text()) for p in sorted((ROOT/'figures'/'results').glob('*.json'))]; assert len(recs) > 1000
    odd = [r['id'] for r in recs if r['id'] != identity.run_id('train' if r['kind'] == 'run' else 'evaluate', r['config'])]
    assert not odd, odd[:5]


def test_the_ids_of_every_plan_are_what_they_were():
    "Of each sweep under each profile: how many runs, and a hash over their ids, as on the day this was written down"
    import hashlib
    from itm_nb.runs import sweep_plan
    want, have = json.loads((ROOT/'tests'/'plan_ids.json').read_text()), {}
    for f in sorted((ROOT/'nbs'/'experiments'/'sweeps').glob('*.yaml')):
        for profile in ('', *sweep_plan.read_sweep(f)['profiles']):
            name = f'{f.stem} {profile}'.strip()
            spec = sweep_plan.read_sweep(f, profile); chosen = {a: dict(settings=x[0]) for a, x in sweep_plan.trials(spec).items()}
            ids = [e.out.name for e in sweep_plan.entries(spec, f.stem, Path('runs'), chosen=chosen)]
            have[name] = f'{len(ids)} {hashlib.sha256(" ".join(ids).encode()).hexdigest()[:12]}'
    assert have == want
