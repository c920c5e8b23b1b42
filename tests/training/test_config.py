"""One declaration makes Config, the cells of parameters and the listing; the ids of everything that was ever run stay what they are."""
import json
import logging
import re
import shutil
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import pytest

from itm_nb import cli
from itm_nb.runs import identity, parameters, sweep_plan
from itm_nb.core.commands import SetupError
from itm_nb.training import config as config_module
from itm_nb.training.config import (
    OF_CONFIG, READERS, TEMPLATES, cell_of, config, Config, current_names, declared, write_cells)

ROOT = Path(__file__).parents[2]
HOME = ROOT/'nbs'/'experiments'


def cell(name): return next(c for c in json.loads((HOME/f'{name}.ipynb').read_text('utf-8'))['cells'] if 'parameters' in c['metadata'].get('tags', []))


def test_cells_of_parameters_are_as_declared(tmp_path):
    "No template without a declaration, no declaration without a template; writing them anew changes nothing"
    assert {p.stem for p in HOME.glob('*.ipynb')} == set(TEMPLATES)
    for p in HOME.glob('*.ipynb'): shutil.copy(p, tmp_path)
    assert write_cells(tmp_path) == [] and all(''.join(cell(n)['source']) == cell_of(ss) for n, ss in TEMPLATES.items())
    nb = tmp_path/'train.ipynb'; nb.write_text(nb.read_text().replace('learning rate of Adam', 'of Adam')); assert write_cells(tmp_path) == ['train']
    assert nb.read_bytes() == (HOME/'train.ipynb').read_bytes()


@pytest.mark.parametrize('name', TEMPLATES)
def test_papermill_reads_every_cell_of_parameters_itself(name, caplog):
    "Its own inspection finds every name with its default, and says nothing (case 02: it counts the signs of equality of a line)"
    from nbformat import NotebookNode
    from papermill.translators import PythonTranslator
    with caplog.at_level(logging.DEBUG): found = PythonTranslator.inspect(NotebookNode(source=''.join(cell(name)['source'])))
    assert [(p.name, p.default) for p in found] == [(s.name, repr(s.default)) for s in TEMPLATES[name]] and not caplog.records
    # a long list of choices goes on in the lines below, which papermill does not read
    assert all(p.help and s.comment.startswith(p.help) for p, s in zip(found, TEMPLATES[name]))
    told = ' '.join(''.join(cell(name)['source']).replace('\n', ' ').replace('#', ' ').split())
    assert all(' '.join(s.comment.replace('#', ' ').split()) in told for s in TEMPLATES[name])


def test_config_has_the_declared_fields():
    assert [(f.name, f.type, f.default) for f in fields(Config)] == [(s.name, type(s.default), s.default) for s in OF_CONFIG]
    assert Config(lr=1).lr == 1. and hash(Config()) == hash(config({})) and 'gru_last' in declared('train')['text'].comment
    with pytest.raises(SetupError, match='did you mean'): config(dict(epoch=3))
    with pytest.raises(AttributeError): Config().lr = 2.


@pytest.mark.parametrize('name', TEMPLATES)
def test_the_listing_is_the_declaration(name, capsys):
    "`itm_run NAME --parameters`: name, default, type, what it is, what it may be"
    assert cli.itm_run([name, '--parameters']) == 0; lines = capsys.readouterr().out.splitlines()
    for s, line in zip(TEMPLATES[name], lines, strict=True):
        assert line.split()[0] == s.name and s.comment in line and f'{s.default!r} ' in line and (not s.bounds or line.endswith(f'[{s.bounds}]'))


def records():
    for p in sorted((ROOT/'figures'/'results').glob('*.json')): yield json.loads(p.read_text('utf-8'))


def test_every_committed_record_keeps_its_id():
    "Computed anew from the settings it holds, with those that came later at their default"
    known = {t: {s.name: s.default for s in TEMPLATES[t]} for t in ('train', 'evaluate', 'test_sets')}; n = 0
    for r in records():
        told = current_names(r['config']); t = next(t for t in known if told.keys() <= known[t].keys())
        assert identity.run_id(t, known[t] | told) == identity.run_id(t, r['config']) == r['id']; n += 1
    assert n >= 1000


SUPERSEDED = {'aoq_fne', 'union'}     # arms whose records were kept when their sweeps went on with detached weights


def test_every_committed_record_is_in_the_plan_of_its_sweep():
    "So the ids of parents (runs that mine, that warm up, that write) are what they were too: they are hashed into their children's"
    of, found = defaultdict(set), defaultdict(dict)
    for r in records():
        if r['method'] not in SUPERSEDED: of[r['sweep']].add(r['id'])
        if 'search' in r: found[r['sweep']][r['method']] = r['search']
    files = {p.stem: p for p in (HOME/'sweeps').glob('*.yaml')}
    for name, ids in of.items():
        stem = max((s for s in files if name == s or name.startswith(f'{s}_')), key=len); spec = sweep_plan.read_sweep(files[stem], name[len(stem)+1:])
        planned = sweep_plan.entries(spec, name, Path('runs'), chosen=found[name])
        assert ids <= {e.out.name for e in planned}, name


# ---- settings that were called something else
EARLIER = {s.name: s.was for s in OF_CONFIG if s.was}


@pytest.fixture
def untold(monkeypatch):
    "As in a new process: no earlier name was mentioned yet"
    monkeypatch.setattr(config_module, '_told', set())


def test_the_earlier_names():
    assert EARLIER == dict(warmup_method='before', max_tokens='longest', wordpiece_vocab='pieces', attention_scale='sharp', lse_scale='lse',
                           resize='frame', pretrained_lr_scale='net_rate', tokenizer='tokens')
    assert not set(EARLIER.values()) & {s.name for ss in TEMPLATES.values() for s in ss}            # so that no name has two meanings


GIVEN = dict(warmup_method='vsepp', max_tokens='40', wordpiece_vocab='8000', attention_scale='9.0', lse_scale='6.0', resize='squash',
             pretrained_lr_scale='0.1', tokenizer='pieces')


@pytest.mark.parametrize('name', EARLIER)
def test_an_earlier_name_is_read_and_said_once(name, untold, capsys, monkeypatch, tmp_path):
    "With -p, from a file, in `config` and in a notebook that is run: the same value, the same id, one line on the error stream"
    old, value, known = EARLIER[name], GIVEN[name], parameters.parameters(HOME/'train.ipynb')
    new = parameters.resolve(known, {name: value}); assert capsys.readouterr().err == ''
    for _ in range(2): assert parameters.resolve(known, {old: value}) == new
    assert capsys.readouterr().err == f'earlier names of settings, still read: {old} (now {name})\n'
    assert identity.run_id('train', new) == identity.run_id('train', {old if k == name else k: v for k, v in new.items()})
    assert old in identity.identity('train', new) and name not in identity.identity('train', new)
    assert config({old: new[name]}) == config({name: new[name]}) and getattr(config({old: new[name]}), name) == new[name]
    file = tmp_path/'given.json'; file.write_text(json.dumps({old: new[name]})); seen = []
    def work(nb, values, out, bar): seen.append(values); return 1
    monkeypatch.setattr(cli, 'execute', work)
    for given in (['-p', old, value], ['-f', str(file)]): cli.itm_run(['train', *given, '-p', 'out', str(tmp_path/'out'), '--quiet'])
    assert seen[0] == seen[1] == new | dict(out=str(tmp_path/'out'))


def test_both_names_at_once_are_refused():
    known = parameters.parameters(HOME/'train.ipynb')
    for f in (config, lambda x: parameters.resolve(known, x)):
        with pytest.raises(SetupError, match='give warmup_method only'): f(dict(before='vsepp', warmup_method='vse0'))


@pytest.mark.parametrize('path', sorted((HOME/'sweeps').glob('*.yaml')), ids=lambda p: p.stem)
def test_a_sweep_file_in_its_earlier_form_is_the_same_plan(path, untold, capsys, tmp_path):
    "The very runs, under every profile; one line on the error stream where a name is an earlier one"
    text = path.read_text('utf-8'); old = tmp_path/path.name
    for name, was in EARLIER.items(): text = re.sub(rf'(?<=[{{,\s]){name}(?=: )', was, text)
    old.write_text(text, 'utf-8')
    def plan(at, profile):
        spec = sweep_plan.read_sweep(at, profile); chosen = {a: dict(settings=x[0]) for a, x in sweep_plan.trials(spec).items()}
        there = spec['search'].get('block') in (None, *spec['blocks'])         # a small profile may lack the block of the search
        tried = sweep_plan.searches(spec, path.stem, Path('runs')) if there else []
        return [*sweep_plan.entries(spec, path.stem, Path('runs'), chosen=chosen), *tried]
    for profile in ('', *sweep_plan.read_sweep(path)['profiles']):
        assert [(e.arm, e.values) for e in plan(path, profile)] == [(e.arm, e.values) for e in plan(old, profile)]
    assert bool(capsys.readouterr().err) == (text != path.read_text('utf-8'))


def test_a_search_in_earlier_names(untold, tmp_path):
    "Tried under either name, over a run that has it under the other"
    text = 'title: t\nblocks: [{seed: 0}]\nbase: {frame: squash}\narms: {a: {warmup: 1, before: vsepp}}\nsearch: {arms: {a: {%s: [vse0, infonce]}}}\n'
    found = []
    for name in ('before', 'warmup_method'):
        (tmp_path/'s.yaml').write_text(text % name); spec = sweep_plan.read_sweep(tmp_path/'s.yaml')
        found.append([e.values for e in sweep_plan.searches(spec, 's', Path('runs'))])
    assert found[0] == found[1] and [v['warmup_method'] for v in found[0]] == ['vse0', 'infonce'] and found[0][0]['resize'] == 'squash'


def test_a_notebook_of_ones_own_keeps_its_names(tmp_path):
    "What is no setting of ours may be called as one of ours was"
    cell = dict(cell_type='code', execution_count=None, id='0', metadata=dict(tags=['parameters']), outputs=[], source="frame = 'a'\nresize = 'b'")
    (tmp_path/'own.ipynb').write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    known = parameters.parameters(tmp_path/'own.ipynb')
    assert parameters.resolve(known, dict(frame='x')) == dict(frame='x', resize='b') == identity.identity('own', dict(frame='x', resize='b'))


PINNED = dict(train='5abd0bb42e25', evaluate='f14d342ef11d', mine='1051fbae3342', test_sets='e4186f1bb8a4')      # of the first records


@pytest.mark.parametrize('name', PINNED)
def test_ids_of_defaults_are_pinned(name):
    "A reader's setting at its default changes no id; another value does"
    defaults = {s.name: s.default for s in TEMPLATES[name]}; assert identity.run_id(name, defaults) == PINNED[name]
    for s in READERS if name != 'test_sets' else ():
        assert identity.run_id(name, defaults | {s.name: dict(columns='file:image', max_captions=5).get(s.name, 'test')}) != PINNED[name]


def test_the_settings_of_readers_reach_them(monkeypatch):
    "From a configuration to the call that opens a part, and only those that are set"
    from itm_nb.data import layouts
    from itm_nb.training import corpus as corpus_module
    asked = []
    monkeypatch.setattr(layouts, 'open_layout', lambda *a, **k: asked.append(k)); monkeypatch.setattr(corpus_module, 'read_scan', lambda *a, **k: asked.append(k))
    own = dict(columns='file:image,caption:comment', separator='|', max_captions=5, captions_of_split='test')
    corpus_module.corpus(Config(data='images', **own), 'folder').split('test'); assert asked.pop() == own
    corpus_module.corpus(Config(data='images'), 'folder').split('test'); assert asked.pop() == {}
    corpus_module.corpus(Config(data='scan', max_captions=5), 'folder').split('test'); assert asked.pop() == dict(dims=None, regions=None, max_captions=5)
