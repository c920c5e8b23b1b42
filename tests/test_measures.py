"""Measures of the whole house, printed, with ratchets: a count may fall, it may not rise.

`python tests/test_measures.py` prints today's counts in the form of BOUNDS. Lower the bounds whenever counts have fallen.
"""
import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COLUMNS = 110
BOUNDS = {
    'lines > 110, modules': 0,
    'lines > 110, notebooks': 0,
    'lines > 110, tests': 2181,
    'several statements a line, modules, per mille': 7,
    'several statements a line, notebooks, per mille': 5,
    'README lines': 140,
    'public names': 450,
    'private imports': 0,
    'circles': 0,
    'unused or doubtful names (ruff)': 146,
}
RATCHET = 'F401,F402,F403,F405,F541,F811,F841'          # of ruff: the rules that are counted, not forbidden


def walked(folder, ending):
    "Files of a folder and all folders below it, without those that tools leave behind"
    out = []
    for at, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if f not in ('__pycache__', '.ipynb_checkpoints', '_proc')]
        out += [Path(at)/f for f in files if f.endswith(ending)]
    return sorted(out)


NOTEBOOKS = walked(ROOT/'nbs', '.ipynb')
MODULES = [p for p in walked(ROOT/'itm_nb', '.py') if p.name not in ('__init__.py', '__main__.py', '_modidx.py')]
TESTS = walked(ROOT/'tests', '.py')


def cells(p):
    "(kind, text) of every cell"
    return [(c['cell_type'], ''.join(c['source'])) for c in json.loads(p.read_text('utf-8'))['cells']]


def python(cell):
    "Code of a cell without magics"
    return '\n'.join('pass' if x.lstrip()[:1] in ('%', '!') else x for x in cell.splitlines())


def too_long(text):
    "Lines that need scrolling; rows of tables, addresses, formulas and what nbdev writes cannot be broken"
    made = text.partition('# %% auto #0')[2].partition('# %% ')[0]     # `__all__` of a module
    lines = [x for x in text.replace(made, '', 1).splitlines() if len(x) > COLUMNS]
    whole = lambda x: x.lstrip().startswith(('|', '$$', '\\text')) or '://' in x
    return sum(not whole(x) for x in lines)


def crowded(code):
    "(lines on which two statements or more begin, lines on which one does)"
    begins = Counter(n.lineno for n in ast.walk(ast.parse(code)) if isinstance(n, ast.stmt))
    return sum(n > 1 for n in begins.values()), len(begins)


def share(codes):
    "Lines with several statements, per mille of all lines with one"
    counts = [crowded(c) for c in codes]
    return round(1000*sum(a for a, _ in counts)/sum(b for _, b in counts))


def public(module):
    "Names that a module exports"
    tree = ast.parse(module.read_text('utf-8')).body
    lists = [ast.literal_eval(n.value) for n in tree
             if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == '__all__']
    return [name for names in lists for name in names]


def imported(module):
    "Modules of this package, and private names, that a module imports"
    here, names, private = module.relative_to(ROOT/'itm_nb').with_suffix('').parts, set(), []
    for n in ast.walk(ast.parse(module.read_text('utf-8'))):
        if not isinstance(n, ast.ImportFrom): continue
        given = tuple(n.module.split('.')) if n.module else ()
        if not n.level and given[:1] != ('itm_nb',): continue
        base = here[:len(here) - n.level] + given if n.level else given[1:]
        names |= {'.'.join(base), *('.'.join((*base, a.name)) for a in n.names)}
        private += [a.name for a in n.names if a.name.startswith('_')]
    return names, private


def circles(arrows):
    "How many modules can reach themselves"
    def reached(m):
        seen, todo = set(), [m]
        while todo:
            new = arrows[todo.pop()] - seen
            seen |= new
            todo += new
        return seen
    return sum(m in reached(m) for m in arrows)


def ruff(rules):
    "What ruff finds by these rules alone"
    call = [sys.executable, '-m', 'ruff', 'check', '--isolated', '--no-cache', '--target-version', 'py311']
    done = subprocess.run([*call, '--select', rules, '--output-format', 'json', 'itm_nb', 'nbs', 'tests', 'setup.py'],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr[-500:]
    return json.loads(done.stdout)


def measures():
    "{measure: count}"
    modules = [p.read_text('utf-8') for p in MODULES]
    tests = [p.read_text('utf-8') for p in TESTS]
    every = [c for p in NOTEBOOKS for c in cells(p)]
    code = [python(text) for kind, text in every if kind == 'code' and not text.startswith('%%')]
    name = {p: '.'.join(p.relative_to(ROOT/'itm_nb').with_suffix('').parts) for p in MODULES}
    found = {name[p]: imported(p) for p in MODULES}
    arrows = {m: names & found.keys() - {m} for m, (names, _) in found.items()}
    values = [
        sum(map(too_long, modules)),
        sum(too_long(text) for _, text in every),
        sum(map(too_long, tests)),
        share(modules),
        share(code),
        len((ROOT/'README.md').read_text('utf-8').splitlines()),
        sum(len(public(p)) for p in MODULES),
        sum(len(private) for _, private in found.values()),
        circles(arrows),
        len(ruff(RATCHET))]
    return dict(zip(BOUNDS, values, strict=True))


@pytest.fixture(scope='module')
def today(): return measures()


def test_nothing_gets_worse(today, capsys):
    with capsys.disabled():
        print()
        for k, v in today.items(): print(f'{k:50} {v:5}   at most {BOUNDS[k]:5}')
    assert not {k: (v, BOUNDS[k]) for k, v in today.items() if v > BOUNDS[k]}


def listed(folder, ending):
    "Files that git has, or would take"
    call = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard', folder]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    if done.returncode: pytest.skip('no repository here')
    return {ROOT/f for f in done.stdout.split('\0') if f.endswith(ending) and (ROOT/f).is_file()}


@pytest.mark.parametrize('folder, ending, found', [
    ('nbs', '.ipynb', NOTEBOOKS), ('itm_nb', '.py', MODULES), ('tests', '.py', TESTS)])
def test_nothing_is_overlooked(folder, ending, found):
    "What the tests walk is what there is: all of it, in however many folders"
    there = {p for p in listed(folder, ending) if p.name not in ('__init__.py', '__main__.py', '_modidx.py')}
    assert there <= set(found), sorted(str(p) for p in there - set(found))
    assert len({p.parent for p in found}) > 5, 'folders have been overlooked'


def test_the_other_walks_see_as_much():
    "The tests of the house and of the layout look at every notebook and module, too"
    import test_house
    import test_layout
    assert set(test_house.NOTEBOOKS) >= set(NOTEBOOKS) and set(test_house.MODULES) >= set(MODULES)
    assert set(test_layout.MODULES.values()) == set(MODULES)
    assert set(test_layout.NOTEBOOKS) == set(test_layout.MODULES)


def test_every_module_names_its_notebook():
    for p in MODULES:
        source = re.search(r'^# AUTOGENERATED! DO NOT EDIT! File to edit: (\S+?)\.? *$', p.read_text('utf-8'), re.M)
        assert source and (p.parent/source[1]).resolve() in NOTEBOOKS, p.name


def test_a_flat_walk_would_be_noticed(tmp_path):
    for name in ('a.ipynb', '1_b/c.ipynb', '1_b/2_c/d.ipynb', '.ipynb_checkpoints/a.ipynb'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text('{}')
    assert [p.name for p in walked(tmp_path, '.ipynb')] == ['d.ipynb', 'c.ipynb', 'a.ipynb']
    assert len(list(tmp_path.glob('*.ipynb'))) == 1


def long_signatures(text, names, most=10):
    "Public functions, and methods of public classes, that take more than so much; `**kw` counts as one"
    defined = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for top in ast.parse(text).body:
        if not isinstance(top, (*defined, ast.ClassDef)) or top.name not in names: continue
        for f in [top] if isinstance(top, defined) else [x for x in top.body if isinstance(x, defined)]:
            given = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs, f.args.vararg, f.args.kwarg]
            n = sum(a is not None and a.arg not in ('self', 'cls') for a in given)
            found += [f'{top.name}.{f.name}: {n}'] if n > most else []
    return found


def test_no_public_function_takes_more_than_ten_parameters():
    "More than that belongs in a frozen dataclass of options, next to the formula its fields are symbols of"
    found = {str(p.relative_to(ROOT)): long_signatures(p.read_text('utf-8'), public(p)) for p in MODULES}
    assert not {k: v for k, v in found.items() if v}


def test_long_signatures_are_seen():
    many = ', '.join(f'x{i}' for i in range(10))
    text = f'def f({many}): pass\ndef g({many}, **kw): pass\nclass C:\n    def h(self, {many}, *, y): pass\n'
    assert long_signatures(text, ('f', 'g', 'C')) == ['g.g: 11', 'C.h: 11']
    assert long_signatures(text, ('f',)) == []


def test_the_measures_measure():
    assert crowded('a = 1; b = 2\nif a: b = 3\nfor x in y:\n    z = 1\n') == (2, 4)
    assert too_long('x'*111 + '\n| ' + 'x'*111 + '\n' + 'x'*110) == 1
    assert circles(dict(a={'b'}, b={'c'}, c={'b'}, d={'a'})) == 2


def test_ruff_is_content():
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '-q', '.'], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


if __name__ == '__main__': print(json.dumps(measures(), indent=4).replace('"', "'"))
