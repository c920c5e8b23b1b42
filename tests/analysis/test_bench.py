"""The bench for methods of one's own: what is broken is told in one line, what works gets one page; runs are
shared and resumed."""
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from itm_nb.analysis import bench as module
from itm_nb.analysis.bench import check_sent, plan_bench, try_method
from itm_nb.core.commands import SetupError
from itm_nb.methods.registry import code_of, named
from itm_nb.runs.sweep_plan import entries, read_sweep, searches, sweep_file, trials

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT/'nbs'/'guides'/'my_method.py'


def bench(*argv, cwd):
    "itm_bench in a process of its own"
    code = 'import sys; from itm_nb.cli import itm_bench; sys.exit(itm_bench())'
    call = [sys.executable, '-c', code, *map(str, argv)]
    return subprocess.run(call, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope='module')
def worlds(tmp_path_factory): return tmp_path_factory.mktemp('worlds')


# ---------------------------------------------------------------- the file to copy

def test_the_template_says_what_it_is_and_can_be_imported():
    spec = importlib.util.spec_from_file_location('my_method', TEMPLATE)
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    assert 'itm_bench my_method.py:mine' in mine.__doc__ and mine.mine.__doc__ and mine.on_the_seam.__doc__
    assert set(mine.SEARCH) <= set(mine.mine.__code__.co_varnames)


@pytest.mark.parametrize('name', ['mine', 'on_the_seam', 'Remembers'])
def test_every_example_of_the_template_works(name, worlds, tmp_path):
    shutil.copy(TEMPLATE, tmp_path/'my_method.py')
    assert 'it picks' in try_method(f'{tmp_path}/my_method.py:{name}', worlds, steps=6)
    assert len(module._own_settings(f'{tmp_path}/my_method.py:{name}', dict(lr=.001), 12)) == 12


# ---------------------------------------------------------------- broken methods

BODIES = dict(
    shape=('return images @ texts.T', 'one number'),
    word=("return 'loss'", 'one number'),
    missing=('return nothing_of_that_name', 'line 2'),
    nan=('return ((images @ texts.T).diagonal() - 2).log().mean()', 'finite'),
    late=('return (images @ texts.T).mean() * (LATE.append(1) or float("nan" if len(LATE) > 9 else 1))', 'nan'),
    constant=('return (images*0).sum() + 1', 'no gradient'),
    detached=('return (images.detach() @ texts.detach().T).mean()', 'no gradient|does not require grad'),
    division=('return 1/((images @ texts.T).mean().detach()*0)', 'finite|line 2'))


@pytest.mark.parametrize('name', BODIES)
def test_a_broken_loss_gets_one_line(name, worlds, tmp_path):
    body, words = BODIES[name]
    (tmp_path/'broken.py').write_text(f'def mine(images, texts, ids):\n    {body}\nLATE = []\n')
    with pytest.raises(SetupError, match=words) as e:
        try_method(f'{tmp_path}/broken.py:mine', worlds)
    assert '\n' not in str(e.value) and len(str(e.value)) < 400


def test_a_broken_method_has_no_page_and_no_runs(tmp_path):
    (tmp_path/'m.py').write_text('def mine(images, texts, ids):\n    return images @ texts.T\n')
    done = bench('m.py:mine', '--profile', 'tiny', cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith('itm_bench: ') and not list(tmp_path.rglob('bench*')), done.stderr


# ---------------------------------------------------------------- equal search, shared runs

def test_every_arm_is_searched_with_as_many_settings(tmp_path):
    shutil.copy(TEMPLATE, tmp_path/'my_method.py')
    for n in (2, 4, 12):
        b = plan_bench(f'{tmp_path}/my_method.py:mine', tmp_path/'runs', n)
        spec = read_sweep(b.sweeps['scenes'], allow_code=True)
        tried = trials(spec)
        assert {k: len(v) for k, v in tried.items()} == dict(mine=n, vsepp=n)
        assert all(len({json.dumps(s, sort_keys=True) for s in v}) == n for v in tried.values())
        for s in tried['mine']:
            named(s['method'], allow_code=True)         # every trial is a method
    assert {b['rho'] for b in spec['blocks'][:3]} == {.05, .25, 1.} and len(spec['blocks']) == 15


def test_an_edited_method_is_another_run_and_its_base_is_not(tmp_path):
    file = tmp_path/'m.py'
    def runs():
        b = plan_bench(f'{file}:mine', tmp_path/'runs', 2)
        spec = read_sweep(b.sweeps['scenes'], allow_code=True)
        tried = searches(spec, b.name, tmp_path/'runs')
        return b, {(e.arm, e.block, i): e.out.name for i, e in enumerate(tried)}
    file.write_text('def mine(images, texts, ids, temperature=.05):\n    return (images @ texts.T).mean()\n')
    one, first = runs()
    file.write_text(file.read_text().replace('return (', 'return -('))
    two, second = runs()
    changed = {k[0] for k in first if first[k] != second[k]}
    assert changed == {'mine~0', 'mine~1'} and one.method != two.method
    # both versions lie there, as they were
    assert len(list(one.home.glob('m_*.py'))) == 2 and code_of(two.method) == code_of(f'{file}:mine')


def test_the_protocol_has_the_ids_of_the_committed_records(tmp_path):
    "Without a search the base is the very run the package has a record of"
    shutil.copy(TEMPLATE, tmp_path/'my_method.py')
    b = plan_bench(f'{tmp_path}/my_method.py:mine', tmp_path/'runs', 1)
    todo = entries(read_sweep(b.sweeps['scenes'], allow_code=True), b.name, tmp_path/'runs')
    have = [e for e in todo if (ROOT/'figures'/'results'/f'{e.out.name}.json').is_file()]
    assert sorted((e.arm, e.values['rho']) for e in have) == sorted(
        (a, r) for a in ('vsepp', 'oracle', 'chance') for r in (.25, 1.) for _ in range(5))


def test_photographs_take_what_the_package_has_found_for_the_base(tmp_path):
    "With as many settings the base is the run of the study; with fewer it is searched anew, beside the method"
    shutil.copy(TEMPLATE, tmp_path/'my_method.py')
    study = read_sweep(sweep_file('flickr8k_core'), 'eight')
    def runs(spec):
        known = dict(vsepp=spec['search']['found']['vsepp'])
        return {(e.arm, e.block): e.out.name for e in entries(spec, 'x', tmp_path, chosen=known)}
    b = plan_bench(f'{tmp_path}/my_method.py:mine', tmp_path/'runs', 12, ('scenes', 'flickr8k'))
    spec = read_sweep(b.sweeps['flickr8k'], allow_code=True)
    tried = {e.arm.partition('~')[0] for e in searches(spec, 'x', tmp_path)}
    assert tried == {'warm', 'mine'} and spec['search']['found']['vsepp']['tried'] == 12
    theirs = {k: v for k, v in runs(study).items() if k[0] == 'vsepp'}
    assert len(theirs) == 10 and theirs.items() <= runs(spec).items()
    b = plan_bench(f'{tmp_path}/my_method.py:mine', tmp_path/'runs', 4, ('flickr8k',))
    fewer = read_sweep(b.sweeps['flickr8k'], allow_code=True)
    assert {k: len(v) for k, v in trials(fewer).items()} == dict(mine=4, vsepp=4) and 'found' not in fewer['search']


def test_a_search_of_ones_own_is_read_strictly(tmp_path):
    for search, words in (('[1]', 'three names'), ('dict(a=1)', 'a list'), ('dict(keep=[[1]])', 'numbers'),
                          ('dict(kep=[1.])', "'kep'"), ('dict(a=[1], b=[1], c=[1], d=[1])', 'three names')):
        file = tmp_path/f'm{len(list(tmp_path.iterdir()))}.py'
        body = 'def mine(images, texts, ids, keep=1.):\n    return images.sum()\n'
        file.write_text(f'SEARCH = {search}\n{body}')
        with pytest.raises(SetupError, match=words):
            module._own_settings(f'{file}:mine', dict(lr=.001), 4)


# ---------------------------------------------------------------- the whole of it, on tiny worlds

def test_one_page_from_one_command(tmp_path):
    shutil.copy(TEMPLATE, tmp_path/'my_method.py')
    asked = ('my_method.py:mine', '--profile', 'tiny', '--settings', 1)
    done = bench(*asked, '--budget', 'full', '--jobs', 2, cwd=tmp_path)
    home = tmp_path/'runs'/'bench_my_method_mine_tiny'
    assert done.returncode == 0, (done.stdout[-1500:], done.stderr[-1500:])
    page = (home/'bench.md').read_text()
    assert page.startswith('# my_method.py:mine') and '## What it costs' in page and 'unresolved' in page
    html = (home/'bench.html').read_text()
    assert 'data:image/png;base64,' in html and '<table>' in html and 'src="http' not in html
    assert (home/'bench.svg').is_file()
    said = check_sent(home, f'{tmp_path}/my_method.py:mine')
    assert 'follows the schema' in said[0] and 'my_method.py:mine' in said[1]
    # nothing is run again
    before = {p: p.stat().st_mtime for p in tmp_path.rglob('DONE') if p.parent.parent != home}
    again = bench(*asked, '--budget', 'full', cwd=tmp_path)
    assert {p: p.stat().st_mtime for p in before} == before and again.returncode == 0
    first = lambda text: text.partition('## What it costs')[0]
    assert first((home/'bench.md').read_text()) == first(page)
