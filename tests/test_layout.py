"""The layout of the package: folders in reading order, arrows only downwards, notebooks and modules in pairs."""
import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUPS = ('core', 'data', 'scenes', 'metrics', 'models', 'methods', 'training', 'runs', 'analysis', 'cli')     # from the bottom to the top
MODULES = {'.'.join(p.relative_to(ROOT/'itm_nb').with_suffix('').parts): p for p in (ROOT/'itm_nb').rglob('*.py') if p.name not in ('__init__.py', '__main__.py', '_modidx.py')}
source = lambda c: ''.join(c['source'])


def exported_by():
    "{module: notebook that exports it}"
    out = {}
    for p in sorted((ROOT/'nbs').rglob('*.ipynb')):
        for c in json.loads(p.read_text('utf-8'))['cells']:
            if m := re.search(r'#\|\s*default_exp (\S+)', source(c)): out[m.group(1)] = p
    return out


NOTEBOOKS = exported_by()
place = lambda module: str(NOTEBOOKS[module].relative_to(ROOT/'nbs'))


def imports(module):
    "Modules of this package that a module imports, anywhere in its text"
    found, here = set(), module.split('.')
    for n in ast.walk(ast.parse(MODULES[module].read_text('utf-8'))):
        if isinstance(n, ast.ImportFrom):
            base = here[:len(here)-n.level] if n.level else []
            if not n.level and (n.module or '').split('.')[0] != 'itm_nb': continue
            full = base + (n.module.split('.') if n.module else [])
            full = full[1:] if full[:1] == ['itm_nb'] else full
            for a in n.names:
                name = '.'.join([*full, a.name])
                found.add(name if name in MODULES else '.'.join(full))
        if isinstance(n, ast.Import): found |= {a.name.split('.', 1)[1] for a in n.names if a.name.startswith('itm_nb.')}
    return {m for m in found if m in MODULES}


ARROWS = {m: imports(m) for m in MODULES}


def test_there_is_something_to_check():
    assert len(MODULES) >= 60 and set(MODULES) == set(NOTEBOOKS), set(MODULES) ^ set(NOTEBOOKS)
    assert sum(map(len, ARROWS.values())) > 150


def test_at_most_ten_groups_from_the_bottom_to_the_top(capsys):
    groups = {m.split('.')[0] for m in MODULES}; assert groups == set(GROUPS) and len(groups) <= 10
    arrows = Counter((a.split('.')[0], b.split('.')[0]) for a, bs in ARROWS.items() for b in bs if a.split('.')[0] != b.split('.')[0])
    with capsys.disabled():
        print()
        for g in GROUPS: print(f"{g:9} {sum(m.split('.')[0] == g for m in MODULES):3} modules -> " + ' '.join(f'{b}({n})' for (a, b), n in sorted(arrows.items()) if a == g))
    assert not [f'{a} -> {b}' for a, b in arrows if GROUPS.index(a) < GROUPS.index(b)]


@pytest.mark.parametrize('module', sorted(MODULES))
def test_a_notebook_imports_only_earlier_notebooks(module):
    late = [b for b in ARROWS[module] if place(b) >= place(module)]
    assert not late, f'{place(module)} imports {late}'


def test_no_circle():
    done, path = set(), []

    def walk(m):
        assert m not in path, ' -> '.join([*path[path.index(m):], m])
        if m in done: return
        path.append(m)
        for b in sorted(ARROWS[m]): walk(b)
        done.add(path.pop())
    for m in sorted(MODULES): walk(m)


@pytest.mark.parametrize('module', sorted(MODULES))
def test_private_names_stay_in_their_module(module):
    bad = [a.name for n in ast.walk(ast.parse(MODULES[module].read_text('utf-8'))) if isinstance(n, ast.ImportFrom)
           and (n.level or (n.module or '').startswith('itm_nb')) for a in n.names if a.name.startswith('_')]
    assert not bad


def test_importing_the_package_is_quick():
    "The ten things people come for are imported when they are asked for"
    code = "import time; t = time.perf_counter(); import sys, itm_nb; assert time.perf_counter()-t < .1 and 'torch' not in sys.modules; print(itm_nb.ranks, dir(itm_nb))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
