"""Every place where a text might choose what is called: imports by name, attributes by name, programs. Each is listed here with the reason why it is safe; a new one fails this test."""
import ast
import json
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FIELDS = 'names of the fields of one of our own dataclasses, or a literal tuple beside the call'
PARSER = 'names that argparse was given by us'
SIDE = "'image' or 'text', written beside the call or in the function that calls"
OURS = 'a literal of the package in another function, passed on'
SIDE = "'image' or 'text', a literal of the package: a tower of a model, or None"

# (module, function, what is called, its text) -> why it is safe
SAFE = {
    ('audit_runs', 'audit_command', 'getattr', 'k'): PARSER, ('cli', 'itm_data', 'getattr', 'k'): PARSER,
    ('config', '_check_all', 'getattr', 'k'): FIELDS,
    ('config', '_check_all', 'getattr', 's.name'): FIELDS, ('corpus', 'corpus', 'getattr', 'k'): FIELDS,
    ('pretrained', '_loaded_half', 'getattr', "f'{side}_model'"): OURS,
    ('encode', '_is_network', 'getattr', "f'{side}_tower'"): SIDE, ('build', '_what_is_read', 'getattr', "f'{side}_tower'"): SIDE,
    ('build', 'measure', 'getattr', "f'{side}_tower'"): SIDE,
    ('frozen_cache', 'network_print', 'getattr', 'k'): FIELDS,
    ('cross_attention', '__post_init__', 'getattr', 'name'): FIELDS,
    ('compare_runs', 'find_run', 'getattr', 'd'): FIELDS, ('compare_runs', 'compare', 'getattr', 'way'): FIELDS,
    ('splits', 'concat', 'getattr', 'field'): FIELDS, ('splits', 'fingerprint', 'getattr', 'name'): FIELDS,
    ('cache', '_flat', 'getattr', 'f.name'): FIELDS,
    ('ranks', 'recalls', 'getattr', 'd'): FIELDS, ('ranks', 'summary', 'getattr', 'd'): FIELDS,
    ('registry', 'found', 'vars', 'module'): 'a path its user wrote (`allow_code`); what is found is looked at by `_defined` before it is called',
    ('registry', '_module', 'importlib.util.find_spec', 'top'): 'of a path its user wrote: tells where a module lies, and executes nothing',
    ('registry', '_module', 'importlib.import_module', 'place'): 'a path its user wrote (`allow_code`), below the current folder, by its own file',
    ('registry', '_file', 'importlib.util.spec_from_file_location', 'key'): 'a .py file its user wrote the path of (`allow_code`)',
    ('registry', '_file', 'importlib.util.module_from_spec', 'spec'): 'the same file', ('registry', '_file', 'spec.loader.exec_module', 'module'): 'the same file',
    ('tables', 'per_photo', 'getattr', 'd'): "'i2t' or 't2i' of `Ranks`, split off the name of a metric that a page of ours asks for; nothing found there is called",
    ('released_checkpoints', '_towers', 'getattr', 'name'): OURS,
    ('dataset', '_make_part', 'getattr', 'f'): FIELDS,
    ('released_checkpoints', 'opened', 'vars', 'v'): 'the settings in an argparse.Namespace that torch read by weights alone: a dictionary of plain values, no lookup',
    ('download', '_get_package', 'importlib.util.find_spec', 'source.package'): 'a literal of SOURCES; a name without dots is located, not imported',
    ('captions', 'rows', 'getattr', 'f'): FIELDS,
    ('subset', '_cut_judgements', 'getattr', 'k'): FIELDS, ('subset', 'subset_command', 'getattr', 'part'): PARSER,
    ('pretrained', '_spelt', 'getattr', 'half'): "'vision_config' or 'text_config' of a configuration of transformers; it is read, not called",
    ('pretrained', '_maker', 'getattr', "type(c).__name__.replace('Config', 'Model')"): 'the class of a configuration that transformers made of a type in CONFIG_MAPPING',
    ('corpus', 'batches', 'getattr', 'missing'): FIELDS,
    ('loop', 'call_hooks', 'getattr', 'hook'): OURS, ('loop', '_compile_towers', 'getattr', 'name'): OURS,
    ('bench', '_taken_somewhere', 'vars', 'sys.modules[place]'): 'the module of a method its user typed the path of; its names are looked at, nothing found there is called',
    ('bench', '_taken_somewhere', 'sys.modules', 'place'): 'the same module', ('bench', '_own_settings', 'getattr', 'k'): FIELDS,
    ('photo_index', '_said', 'getattr', 'k'): FIELDS,
    ('site', '_has_extra', 'importlib.util.find_spec', 'x'): 'of _NEEDED, literals: tells where a package lies, and executes nothing',
    ('plain_loss', 'plain_settings', 'vars', 'f'): 'a class of a file its user wrote the path of; its own call is looked at, and not called',
    ('warm_server', '_import', 'importlib.import_module', 'name'): 'of the module\'s own list of literals',
    ('grammar', '__getitem__', 'getattr', 'f.name'): FIELDS, ('grammar', 'join', 'getattr', 'f.name'): FIELDS, ('world', '_columns', 'getattr', 'f.name'): FIELDS,
}
BY_NAME = {'getattr', 'setattr', 'delattr', 'vars', '__import__', 'eval', 'exec', 'compile', 'operator.attrgetter', 'operator.methodcaller', 'pydoc.locate', 'runpy.run_path', 'runpy.run_module',
           'importlib.import_module', 'importlib.reload', 'importlib.util.find_spec', 'importlib.util.spec_from_file_location', 'importlib.util.module_from_spec', 'pkgutil.resolve_name'}


def aliases(tree):
    "{name in the file: what it is} of imports that give a looker-up another name"
    made = {}
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom):
            made |= {a.asname or a.name: f'{n.module}.{a.name}' for a in n.names}
        if isinstance(n, ast.Import): made |= {a.asname: a.name for a in n.names if a.asname}
    return made


def full_name(node, known):
    "A dotted name with what was imported under another name put in"
    head, dot, rest = ast.unparse(node).partition('.')
    return known.get(head, head) + dot + rest


def lookups(tree):
    """(function, what is called, its text, line) of every place that looks something up by a text that is no
    literal, under whatever name it was imported, and of every such function that is handed on"""
    found, known = [], aliases(tree)
    def called(c, inside):
        name = full_name(c.func, known)
        at = {'getattr': 1, 'setattr': 1, 'delattr': 1}.get(name, 0)
        text = c.args[at] if len(c.args) > at else None
        if (name in BY_NAME or name.endswith('.exec_module')) and not isinstance(text, ast.Constant):
            found.append((inside, name, '' if text is None else ast.unparse(text), c.lineno))
        if isinstance(c.func, ast.Subscript) and ast.unparse(c.func.value) in ('globals()', 'locals()'):
            found.append((inside, 'globals', ast.unparse(c.func.slice), c.lineno))
        for a in [*c.args, *(k.value for k in c.keywords)]:
            if isinstance(a, (ast.Name, ast.Attribute)) and full_name(a, known) in BY_NAME:
                found.append((inside, full_name(a, known), 'handed on', c.lineno))
    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            kind = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            here = child.name if kind and not inside else inside
            if isinstance(child, ast.Call): called(child, inside)
            if (isinstance(child, ast.Subscript) and full_name(child.value, known) == 'sys.modules'
                    and not isinstance(child.slice, ast.Constant) and isinstance(child.ctx, ast.Load)):
                found.append((inside, 'sys.modules', ast.unparse(child.slice), child.lineno))
            walk(child, here)
    walk(tree, '')
    return found


MODULES = sorted(p for p in (ROOT/'itm_nb').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))
PAGES = sorted((ROOT/'nbs'/'experiments').glob('*.ipynb'))


@pytest.mark.parametrize('p', MODULES, ids=lambda p: p.stem)
def test_every_lookup_by_a_text_is_listed(p):
    new = [x for x in lookups(ast.parse(p.read_text())) if (p.stem, *x[:3]) not in SAFE]
    assert not new, '\n'.join(f'{p.name} line {line}: {call} of {text!r} in {function}(): say in SAFE why no file can choose it' for function, call, text, line in new)


@pytest.mark.parametrize('p', PAGES, ids=lambda p: p.stem)
def test_the_pages_look_nothing_up(p):
    for c in json.loads(p.read_text('utf-8'))['cells']:
        if c['cell_type'] == 'code': assert not lookups(ast.parse(''.join(c['source']))), ''.join(c['source'])[:200]


def test_nothing_is_listed_that_is_no_longer_there():
    have = {(p.stem, *x[:3]) for p in MODULES for x in lookups(ast.parse(p.read_text()))}
    assert not SAFE.keys() - have, SAFE.keys() - have


def test_the_finder_finds():
    bad = 'import importlib, sys\ndef f(x, y):\n    getattr(x, y)(); importlib.import_module(y); sys.modules[y]; y.loader.exec_module(x); vars(x)[y]; __import__(y); setattr(x, y, 1); globals()[y]()\n    getattr(x, "kind")\n'
    assert Counter(x[1] for x in lookups(ast.parse(bad))) == Counter(['getattr', 'importlib.import_module', 'sys.modules', 'y.loader.exec_module', 'vars', '__import__', 'setattr', 'globals'])


@pytest.mark.parametrize('bad,want', [
    ('from importlib import import_module as bring\nbring(x)', 'importlib.import_module'),
    ('import importlib as i\ni.import_module(x)', 'importlib.import_module'),
    ('from operator import attrgetter\nattrgetter(x)(y)', 'operator.attrgetter'),
    ('from sys import modules as m\nm[x]', 'sys.modules'), ('list(map(getattr, xs, names))', 'getattr'),
    ('from functools import partial\npartial(getattr, x)', 'getattr'),
    ('import runpy as r\nr.run_path(x)', 'runpy.run_path'),
    ('sorted(xs, key=eval)', 'eval')])
def test_the_finder_finds_other_names_and_what_is_handed_on(bad, want):
    assert [x[1] for x in lookups(ast.parse(bad))] == [want]


def allows(tree):
    "Calls that are given leave to run code of one's own: allow_code=True"
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and any(k.arg == 'allow_code' and isinstance(k.value, ast.Constant) and k.value.value is True for k in n.keywords)]


def test_leave_is_given_in_one_place():
    "By the page `train`, whose parameters are its user's, and by `itm_bench`, whose method its user types; nowhere else"
    assert {p.name for p in MODULES if allows(ast.parse(p.read_text()))} == {'bench.py', 'cli.py'}
    cli = ast.parse((ROOT/'itm_nb'/'cli.py').read_text())
    givers = {f.name for f in ast.walk(cli) if isinstance(f, ast.FunctionDef) and allows(f)}
    assert givers and all('bench' in f for f in givers), givers
    pages = [p.stem for p in PAGES for c in json.loads(p.read_text('utf-8'))['cells'] if c['cell_type'] == 'code' and allows(ast.parse(''.join(c['source'])))]
    assert pages == ['train']
