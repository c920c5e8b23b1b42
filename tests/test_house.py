"""The rules of the house, as far as a machine can see them."""
import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))
MODULES = sorted(p for p in (ROOT/'itm_nb').rglob('*.py') if p.name not in ('__init__.py', '__main__.py', '_modidx.py'))
cells = lambda p: json.loads(p.read_text('utf-8'))['cells']
source = lambda c: ''.join(c['source'])


def test_nothing_is_overlooked():
    assert len(NOTEBOOKS) >= 80 and len(MODULES) >= 60


def released_door(p):
    "Lines of the one call of torch.load there may be: in `released_checkpoints.read_pth`, with weights_only=True written out"
    if p.name != 'released_checkpoints.py': return ()
    calls = [n for f in ast.parse(p.read_text()).body if isinstance(f, ast.FunctionDef) and f.name == 'read_pth' for n in ast.walk(f)
             if isinstance(n, ast.Call) and ast.unparse(n.func) == 'torch.load']
    return [n.lineno for n in calls if len(calls) == 1 and {k.arg: ast.unparse(k.value) for k in n.keywords}.get('weights_only') == 'True']


@pytest.mark.parametrize('p', MODULES, ids=lambda p: p.stem)
def test_nothing_dangerous(p):
    "No pickle, no eval or exec, no unsafe yaml, no star import"
    door = released_door(p)
    for n in ast.walk(ast.parse(p.read_text())):
        if isinstance(n, (ast.Import, ast.ImportFrom)):
            assert not {'pickle', 'dill', 'joblib', 'marshal', 'shelve'} & {a.name.split('.')[0] for a in n.names} and getattr(n, 'module', '') != 'pickle'
            assert not any(a.name == '*' for a in n.names)
        if isinstance(n, ast.Call):
            name = ast.unparse(n.func); kw = {k.arg: ast.unparse(k.value) for k in n.keywords}
            assert name not in ('eval', 'exec', 'yaml.load', 'os.system') and (name != 'torch.load' or n.lineno in door), name
            assert kw.get('allow_pickle', 'False') == 'False' and kw.get('shell', 'False') == 'False' and kw.get('trust_remote_code', 'False') == 'False'
            if name in ('np.load', 'numpy.load'): assert kw.get('allow_pickle') == 'False', f'line {n.lineno}'


def length(n):
    "Lines of a body without its docstring"
    body = n.body[1:] if isinstance(n.body[0], ast.Expr) and isinstance(n.body[0].value, ast.Constant) else n.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize('p', MODULES, ids=lambda p: p.stem)
def test_functions_are_short_and_documented(p):
    tree = ast.parse(p.read_text())
    for line, text in enumerate(p.read_text().splitlines(), 1): assert len(text) <= 140, f'line {line} has {len(text)} columns'
    for n in ast.walk(tree):
        if isinstance(n, ast.FunctionDef): assert length(n) <= 25, f'{n.name}: {length(n)} lines'
    for n in tree.body:
        most = 60 if isinstance(n, ast.ClassDef) and n.name == 'Config' else 48           # a list of settings may be longer
        if isinstance(n, ast.ClassDef): assert length(n) <= most, f'{n.name}: {length(n)} lines'
        if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and not n.name.startswith('_'): assert ast.get_docstring(n), f'{n.name} has no docstring'


@cache
def our_classes():
    "Names of all classes of the package"
    trees = [ast.parse(p.read_text()) for p in MODULES]
    return {n.name for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}


@pytest.mark.parametrize('p', MODULES, ids=lambda p: p.stem)
def test_inheritance_is_one_deep(p):
    ours = our_classes()
    for n in ast.walk(ast.parse(p.read_text())):
        if isinstance(n, ast.ClassDef): assert not {ast.unparse(b).split('.')[-1] for b in n.bases} & ours, n.name


@pytest.mark.parametrize('p', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_small_whole_and_clean(p):
    assert p.stat().st_size <= 200_000, f'{p.stat().st_size} bytes'
    code = [c for c in cells(p) if c['cell_type'] == 'code' and source(c).strip()]
    assert any(c['outputs'] for c in code), 'no saved output: execute it'
    assert not any(o['output_type'] == 'error' for c in code for o in c['outputs'])
    assert source(cells(p)[0]).startswith('# '), 'the first cell is the title'
    assert not any(re.search(r'^\s*#\s*(for|if|import|from|def|return)\b.*[:=(]', l) for c in code for l in source(c).splitlines()), 'code commented out'


def draws(cell):
    "A figure is made outside of any function, class or condition"
    if cell['cell_type'] != 'code' or 'subplots(' not in source(cell) or '#| eval: false' in source(cell): return False
    top = [n for n in ast.parse(source(cell)).body if not isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.If, ast.With))]
    return any(isinstance(n, ast.Call) and ast.unparse(n.func).endswith('subplots') for t in top for n in ast.walk(t))


@pytest.mark.parametrize('p', NOTEBOOKS, ids=lambda p: p.stem)
def test_pictures_are_kept(p):
    "People look before they read: executed under a backend that shows nothing, a notebook would lose its pictures without a word"
    blind = [source(c)[:80] for c in cells(p) if draws(c) and not any('image/png' in o.get('data', {}) for o in c['outputs'])]
    assert not blind, f'no picture kept under {blind}; unset MPLBACKEND, execute the notebook again and keep its outputs'


@pytest.mark.parametrize('p', NOTEBOOKS + MODULES + sorted(p for p in ROOT.glob('*.*') if p.name != '.git') + sorted((ROOT/'figures').rglob('*.md')), ids=lambda p: p.name)
def test_no_machine_is_named(p):
    if p.is_dir(): return
    assert not re.search(r'(?<![\w.])/(home|root|tmp|work|Users|mnt|srv)/\w', p.read_text('utf-8')), 'a path of some machine'


def test_experiments_have_one_parameters_cell():
    templates = sorted((ROOT/'nbs'/'experiments').glob('*.ipynb')); assert {p.stem for p in templates} >= {'train', 'evaluate', 'study', 'benchmark'}
    for p in templates: assert sum('parameters' in c['metadata'].get('tags', []) for c in cells(p)) == 1, p.name
    assert (ROOT/'nbs'/'experiments'/'.notest').is_file()


def test_the_right_torch_and_no_torchvision():
    import importlib.util
    import torch
    major, minor = map(int, torch.__version__.split('.')[:2])
    assert (2, 11) <= (major, minor) < (2, 14) and importlib.util.find_spec('torchvision') is None


def test_a_run_without_a_transformer_does_not_import_one():
    "Four seconds of every small run, and of every command"
    done = subprocess.run([sys.executable, '-c', "import sys, itm_nb.training.loop, itm_nb.runs.run_folder; sys.exit('transformers' in sys.modules)"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
