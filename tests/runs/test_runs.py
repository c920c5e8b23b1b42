"""Commands are strict and light; sweep files and templates are what they should be; committed tables come from committed records."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from itm_nb.core import commands, project
from itm_nb.runs import identity, parameters, sweep_plan

ROOT = Path(__file__).parents[2]


def room(name): return 'cli'


def command(name, *argv, cwd=ROOT, **kw):
    code = f'import sys; from itm_nb.{room(name)} import {name}; {name}()'
    return subprocess.Popen([sys.executable, '-c', code, *map(str, argv)], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | dict(PYTHONPATH=str(ROOT)), **kw)


def call(name, *argv, **kw):
    p = command(name, *argv, **kw); out, err = p.communicate(timeout=600)
    return p.returncode, out, err


@pytest.mark.parametrize('name', ['itm_run', 'itm_sweep', 'itm_data', 'itm_readme'])
def test_help_is_light(name):
    code = f'''import sys
from itm_nb.{room(name)} import {name}
try: {name}(['--help'])
except SystemExit as e: assert e.code == 0
heavy = {{'torch', 'papermill', 'nbdev', 'matplotlib', 'transformers', 'numpy', 'pandas', 'fastcore'}} & set(sys.modules)
assert not heavy, heavy'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert r.returncode == 0, r.stderr
    assert 'usage' in r.stdout


def test_import_is_light():
    r = subprocess.run([sys.executable, '-c', "import sys, itm_nb; assert not {'torch', 'numpy', 'nbdev'} & set(sys.modules)"], cwd=ROOT)
    assert r.returncode == 0


@pytest.mark.parametrize('argv,wanted', [(['-p', 'sede', '3'], "did you mean 'seed'"), (['-p', 'seed', 'abc'], 'wanted int'), (['-p', 'lr', 'fast'], 'wanted float'),
                                         (['-p', 'progress', 'perhaps'], 'wanted bool')])
def test_wrong_parameters_stop_at_once(argv, wanted, tmp_path):
    began = time.perf_counter(); code, out, err = call('itm_run', 'train', *argv)
    assert code == 2 and wanted in err and 'Traceback' not in err and time.perf_counter()-began < 5
    if 'sede' in argv: assert 'seed' in err and 'method' in err and 'epochs' in err           # the valid names


@pytest.mark.parametrize('raw', [None, b'{', b'- 1', b'\xff\xfe', b'sede: 3', b'seed: abc'])
def test_bad_parameter_files(raw, tmp_path):
    if raw is not None: (tmp_path/'p.yaml').write_bytes(raw)
    code, out, err = call('itm_run', 'train', '-f', tmp_path/'p.yaml')
    assert code == 2 and 'Traceback' not in err and err.count('\n') == 1


def test_unknown_experiment_or_sweep():
    for argv, near in (('itm_run serach', 'search'), ('itm_run trian', 'train'), ('itm_sweep scnes', 'scenes'), ('itm_run zzz', None), ('itm_sweep zzz', None)):
        code, out, err = call(*argv.split()); assert code == 2 and err.count('\n') == 1 and 'Traceback' not in err and 'there are' in err
        assert (f'did you mean {near!r}?' in err) if near else ('did you mean' not in err)


def test_a_sweep_without_its_data_stops_at_once(tmp_path):
    for argv in ([], ['-p', 'folder', tmp_path/'nowhere']):
        code, out, err = call('itm_sweep', 'flickr8k_base', '--runs', tmp_path, *argv)
        assert code == 2 and '-p folder PATH' in err and not list(tmp_path.iterdir())
    assert call('itm_sweep', 'scenes', '-p', 'seed', '3')[0] == 2          # a sweep fixes its seeds


def test_templates_agree_with_the_settings():
    "The parameters of `train` are exactly the settings of a run, with the same defaults, and places"
    from dataclasses import asdict
    from itm_nb.training.config import Config
    have = {k: p.default for k, p in parameters.parameters(project.template('train')).items()}
    places = {k: have.pop(k) for k in identity.OF_A_RUN if k in have}
    assert have == asdict(Config()) and set(places) == set(identity.OF_A_RUN)
    assert all(p.about for k, p in parameters.parameters(project.template('train')).items() if k not in ('epochs',))


def test_nbdev_clean_keeps_the_parameters_tag(tmp_path):
    pytest.importorskip('nbdev')
    import shutil
    for f in ('settings.ini', 'setup.py'): shutil.copy(ROOT/f, tmp_path)
    (tmp_path/'nbs').mkdir(); (tmp_path/'itm_nb').mkdir(); nb = tmp_path/'nbs'/'train.ipynb'; shutil.copy(ROOT/'nbs'/'experiments'/'train.ipynb', nb)
    raw = json.loads(nb.read_text()); raw['cells'][0]['metadata']['junk'] = 1; nb.write_text(json.dumps(raw))
    subprocess.run([sys.executable, '-c', 'from nbdev.clean import nbdev_clean; nbdev_clean()', '--fname', str(nb)], cwd=tmp_path, check=True)
    cleaned = json.loads(nb.read_text())
    assert 'junk' not in cleaned['cells'][0]['metadata'], 'nothing was cleaned'
    assert sum('parameters' in c['metadata'].get('tags', []) for c in cleaned['cells']) == 1


BAD_SWEEPS = {'not yaml': '{', 'a list': '- 1', 'unknown part': 'title: a\nblocks: [{seed: 0}]\narms: {a: {}}\nblokcs: 1', 'no arms': 'title: a\nblocks: [{seed: 0}]',
              'wrong kind': 'title: a\nblocks: {seed: 0}\narms: {a: {}}', 'unknown setting': 'title: a\nblocks: [{seed: 0}]\narms: {a: {sede: 1}}',
              'twice the same': 'title: a\nblocks: [{seed: 0}, {seed: 0}]\narms: {a: {}}', 'blocks of a profile': 'title: a\nblocks: [{seed: 0}]\narms: {a: {}}\nprofiles: {b: {blocks: {seed: 1}}}',
              'code': 'title: !!python/object/apply:os.getcwd []\nblocks: []\narms: {}'}


@pytest.mark.parametrize('what', BAD_SWEEPS)
def test_bad_sweep_files(what, tmp_path):
    f = tmp_path/'bad.yaml'; f.write_text(BAD_SWEEPS[what])
    with pytest.raises(commands.SetupError): sweep_plan.entries(sweep_plan.read_sweep(f), 'bad', tmp_path)


def test_sweep_files_resolve():
    "Every sweep of the project, under every profile, names known settings and completes a block before the next"
    for f, profile in [(f, p) for f in sorted((ROOT/'nbs'/'experiments'/'sweeps').glob('*.yaml')) for p in ('', *sweep_plan.read_sweep(f)['profiles'])]:
        spec = sweep_plan.read_sweep(f, profile)
        todo = sweep_plan.entries(spec, f.stem, Path('runs'), chosen={a: dict(settings=x[0]) for a, x in sweep_plan.trials(spec).items()})
        blocks = [e.block for e in todo]
        assert blocks == sorted(blocks) and len({e.out for e in todo}) == len(todo)
        assert len(todo) == len(spec['blocks'])*sum(len(spec[k]) for k in sweep_plan.PARTS)
    ten = sweep_plan.read_sweep(sweep_plan.sweep_file('fne_flickr8k'), 'gpu')['blocks']; assert len(ten) == 10 and ten[:5] == sweep_plan.read_sweep(sweep_plan.sweep_file('fne_flickr8k'))['blocks']


@pytest.mark.slow
@pytest.mark.parametrize('preset', ['tiny', 'small', 'full'])
def test_the_drawn_world_is_accepted(preset, tmp_path):
    "Every figure of study 2.5 within the bounds fixed beforehand, with models trained for it (minutes)"
    import csv
    code, out, err = call('itm_run', 'acceptance', '-p', 'preset', preset, '-p', 'figures', tmp_path, '-p', 'out', tmp_path/'run', '-p', 'progress', 'false', '--quiet')
    assert code == 0, out + err
    rows = list(csv.DictReader(open(tmp_path/f'acceptance_scenes_{preset}.csv')))
    assert len(rows) >= 12 and not [r for r in rows if r['holds'] != 'yes']


def test_committed_tables_come_from_committed_records():
    "Every run id in a table has its record, and the committed acceptance figures hold"
    import csv
    have = {p.stem for p in (ROOT/'figures'/'results').glob('*.json')}
    tables = list((ROOT/'figures').rglob('table_*.csv')); assert len(tables) >= 20
    for f in tables:
        for r in csv.DictReader(open(f)): assert set(r['runs'].split()) <= have, f.name
    accepted = list((ROOT/'figures').rglob('acceptance_scenes_*.csv')); assert len(accepted) >= 2
    for f in accepted: assert all(r['holds'] == 'yes' for r in csv.DictReader(open(f))), f.name
