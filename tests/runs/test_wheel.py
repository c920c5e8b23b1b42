"""An installed wheel, used in an empty folder: templates, sweeps, folds and published rows came along
(case 03)."""
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ASK = """
import sys, pathlib, itm_nb
from itm_nb.cli import main
from itm_nb.core.project import fold_file, project
assert pathlib.Path(itm_nb.__file__).is_relative_to(sys.argv[1]) and project().is_relative_to(sys.argv[1])
for asked in (['run', '--list'], ['run', 'train', '--parameters'], ['run', 'train', '--help'],
              ['sweep', 'tiny', '--dry-run'], ['data', 'info', 'scenes']):
    print('>>>', *asked, flush=True)
    assert main(asked) == 0, asked
print('>>> readme', flush=True)
assert main(['readme']) == 2
from itm_nb.analysis.tables import published
print(fold_file('flickr8k_5').stat().st_size > 1000, len(published(project()/'figures'/'published.csv')) > 10)
"""


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "The wheel of this very tree, unpacked"
    at = tmp_path_factory.mktemp('wheel')
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'build', '*.egg-info', 'results',
                                  'runs', 'audits')
    for name in ('itm_nb', 'nbs', 'figures'):
        shutil.copytree(ROOT/name, at/'tree'/name, ignore=skip)
    for p in ROOT.glob('*.*'):
        if p.is_file(): shutil.copy(p, at/'tree')
    shutil.copy(ROOT/'LICENSE', at/'tree')
    done = subprocess.run([sys.executable, 'setup.py', '-q', 'bdist_wheel', '-d', str(at/'dist')],
                          cwd=at/'tree', capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
    wheel, = (at/'dist').glob('*.whl')
    with zipfile.ZipFile(wheel) as z:
        z.extractall(at/'site')
        names = z.namelist()
    return at/'site', names, wheel.stat().st_size


def test_what_a_wheel_holds(installed):
    site, names, size = installed
    brought = {n.removeprefix('itm_nb/installed/') for n in names if n.startswith('itm_nb/installed/')}
    there = {p.relative_to(ROOT).as_posix() for pattern in ('*.ipynb', '*.yaml', 'sweeps/*.yaml',
                                                            'folds/*.json')
             for p in (ROOT/'nbs'/'experiments').glob(pattern)}
    assert brought == there | {'figures/published.csv', 'settings.ini'} and size < 8e6
    assert not [n for n in names if n.startswith(('tests/', 'nbs/'))] and 'itm_nb/__main__.py' in names


def test_commands_of_a_wheel_in_an_empty_folder(installed, tmp_path):
    site, *_ = installed
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | dict(PYTHONPATH=str(site))
    done = subprocess.run([sys.executable, '-c', ASK, str(site)], cwd=tmp_path, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-800:]
    assert done.stdout.rstrip().endswith('True True') and 'made in a clone' in done.stderr
    said = done.stdout.split('>>> ')
    assert len(said[1].splitlines()) > 15 and 'common:' in said[3] and 'runs to do' in said[4]


def test_help_of_an_experiment_names_every_parameter_once_the_common_ones_first(capsys):
    from itm_nb.cli import itm_run
    from itm_nb.core.project import template
    from itm_nb.runs.parameters import parameters
    assert itm_run(['train', '--help']) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [l.split()[0] for l in lines if l.startswith('  ')]
    assert sorted(names) == sorted(parameters(template('train')))
    assert names[:10] == 'data folder model method epochs batch lr seed device out'.split()
    assert [l for l in lines if l.endswith(':')] == ['common:', 'data:', 'model:', 'method:', 'training:',
                                                     'this run:']


def console_commands():
    "{name: where its function is} of settings.ini"
    import configparser
    read = configparser.ConfigParser(delimiters=['='], interpolation=None)
    read.read(ROOT/'settings.ini')
    return dict(x.split('=') for x in read['DEFAULT']['console_scripts'].split())


@pytest.mark.parametrize('name', console_commands())
def test_every_console_command_is_reachable_without_one_on_the_path(name, capsys):
    "`python -m itm_nb NAME` says what NAME itself says: of its help, and of an argument that nobody knows"
    import importlib
    from itm_nb.cli import main
    module, function = console_commands()[name].split(':')
    alone = getattr(importlib.import_module(module), function)
    for argv in (['--help'], ['--no-such-thing']):
        said = []
        for call in (lambda: alone(argv), lambda: main([name.removeprefix('itm_'), *argv])):
            try:
                code = call()
            except SystemExit as e:
                code = e.code
            said.append((code, capsys.readouterr()))
        assert said[0] == said[1] and said[0][0] == (0 if argv == ['--help'] else 2)
        assert name in said[0][1].out + said[0][1].err


def test_the_commands_of_the_module_are_those_of_settings_ini(capsys):
    from itm_nb.cli import main
    assert main(['--help']) == 0
    listed = capsys.readouterr().out.split('{')[1].split('}')[0].split(',')
    assert sorted(f'itm_{n}' for n in listed) == sorted(console_commands())
