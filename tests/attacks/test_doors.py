"""Six doors through which somebody else's files come in. A canary - a file that any code of theirs would touch - stays untouched at every one of them.

Each door has its list of what it accepts; everything else ends in one typed error. The same lists stand in the notebooks that own the doors."""
import ast
import json
import os
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from itm_nb.analysis import attacks, audit_runs, coco_protocols, photo_index, search
from itm_nb.data import folds, layouts, pixels, prepare, safe_files, scan_layout, tokenizers
from itm_nb.methods import offline_mining, registry, stored_sentences
from itm_nb.models import frozen_cache, pretrained, released_checkpoints
from itm_nb.runs import external_scores
from itm_nb.training import checkpoint, config, loop
from itm_nb.core.commands import SetupError
from itm_nb.core.errors_files import DataError, read_tensors, sha256_of
from itm_nb.data.download import unpack, verify
from itm_nb.data.safe_files import safe_npz
from itm_nb.data.scan_layout import read_scan
from itm_nb.data.subset import subset
from itm_nb.scenes.cache import load_or_make, unpack as unpack_world
from itm_nb.models.factory import from_pretrained
from itm_nb.runs.records import made_up_record, read_records, write_record
from itm_nb.runs.sweep_plan import read_sweep
from itm_nb.analysis.audit import read_audits
from itm_nb.analysis.claims import read_tests
from itm_nb.analysis.compare_runs import find_run
from itm_nb.analysis.tables import published
from itm_nb.cli import itm_run, itm_sweep

ROOT = Path(__file__).parent.parent.parent

ACCEPTS = {
    'run folder': 'JSON and safetensors; its method: names of METHODS, PAPERS and SOURCES with literals; code of one\'s own with allow_code=True alone',
    'record': 'JSON of the schema: an id of 12 hexadecimal digits, a sweep of letters, digits and ._-, texts of one line, finite numbers',
    'sweep': "plain YAML; names of letters, digits, ._- and blanks; methods and templates of the package, others with --allow-code; no places",
    'model folder': 'JSON, safetensors, tokenizer rules; kinds of the registry, types that transformers has itself; nothing that is run or fetched',
    'data folder': 'text, JSON, CSV, pictures, arrays and Arrow tables of plain numbers; files whose content lies in the folder',
    'label file': 'JSON, CSV, npy and npz of plain numbers, plain YAML'}

STRINGS = [                                       # {c}: the canary
    "tags(copies=2, draws=2),syn=os:system(command='touch {c}')", "os:system(command='touch {c}')", 'os:system', "vsepp,on=os:system(command='touch {c}')",
    "vsepp|os:system(command='touch {c}')", "tags(),syn=subprocess:getoutput(cmd='touch {c}')", 'own.py:f', './own.py:f', ' own.py:f ', 'own.py:f()', 'vsepp|own.py:f',
    'vsepp,on=own.py:f', 'vsepp, on = own.py:f', 'own:f', 'own:Kind', 'trap.inner:f', 'trap:f', '__main__:f', 'a=own.py:f', 'own.py:imported', "runpy:run_path(path_name='own.py')",
    "builtins:exec(source='import own')", "importlib:import_module(name='own')", "infonce(temperature=__import__('own').f())", 'vsepp(margin=f())', "vsepp(**own.py:f)",
    "itm_nb.runs:itm_run", "itm_nb.sources:get", 'tags,syn=own.py:f', "tags(words='random'),syn=itm_nb.methods:found(path='own:f')", 'METHODS', '__init__', 'os.system', 'own', '']


TRIED = Counter()                                  # door -> inputs that were offered to it beside a canary
SECTIONS = [(n, m[1]) for n, line in enumerate(Path(__file__).read_text('utf-8').splitlines(), 1)
            if (m := re.match(r'# ---- (?:door \d: an? )?(.+)$', line))]


def door_of(test):
    "The heading under which a test of this file stands"
    line = test.__code__.co_firstlineno
    return [name for n, name in SECTIONS if n < line][-1]


@pytest.fixture
def canary(request, tmp_path, monkeypatch):
    "A file that must not be touched, in a folder with modules that would touch it: when they are imported, or when anything of theirs is called"
    at = tmp_path/'canary'; here = tmp_path/'here'; (here/'trap').mkdir(parents=True); monkeypatch.chdir(here); monkeypatch.syspath_prepend(str(here))
    touch = f'open({str(at)!r}, "w").close()\n'
    body = f'from os import system as imported\n{touch}def f(*a, **kw):\n    {touch}class Kind:\n    def __init__(self, **kw):\n        {touch}'
    for name in ('own.py', 'trap/__init__.py', 'trap/inner.py', 'modeling_own.py', 'configuration_own.py', 'tokenization_own.py', 'own_set.py'): (here/name).write_text(body)
    yield at
    for name in ('own', 'trap', 'trap.inner'): sys.modules.pop(name, None)
    assert not at.exists(), 'something was run'
    TRIED[door_of(request.function)] += 1


class Bomb:
    "What a pickle would run"
    def __init__(self, at): self.at = str(at)
    def __reduce__(self): return os.system, (f'touch {self.at}',)


def pickled(path, canary):
    "An array of objects, a pickle"
    np.save(path, np.array([Bomb(canary)], dtype=object), allow_pickle=True); return path


def pickled_npz(path, canary, *names): np.savez(path, **{n: np.array([Bomb(canary)], dtype=object) for n in names}, allow_pickle=True); return path


def fires(canary): return pickle.loads(pickle.dumps(Bomb(canary)))


def test_the_canary_sings(tmp_path):
    "A canary that cannot die would prove nothing"
    at = tmp_path/'canary'; fires(at); assert at.exists()
    at.unlink(); (tmp_path/'own.py').write_text(f'from itm_nb.methods.method import vsepp\nopen({str(at)!r}, "w")\ndef f(): return vsepp()\n')
    registry.named(f'{tmp_path/"own.py"}:f', allow_code=True); assert at.exists()


def refused(f, *args, **kw):
    "One typed error, of one line"
    with pytest.raises((DataError, SetupError, ValueError)) as e: f(*args, **kw)
    assert type(e.value) in (DataError, SetupError, ValueError, SystemExit) and str(e.value).strip() and '\n' not in str(e.value).strip(), repr(e.value)


# ---- strings
@pytest.mark.parametrize('text', STRINGS)
def test_a_name_that_was_read_resolves_the_registry_alone(text, canary): refused(registry.named, text.format(c=canary))


@pytest.mark.parametrize('text', ['vsepp', "fne(tau=5.0, queue=64)", 'aoq(),on=itm_nb.fne:bank_source(queue=2048)', "vsepp|tags(words='random')"])
def test_names_of_committed_records_are_names_of_the_registry(text): assert not registry.own_code(text)


def test_every_committed_record_and_sweep_names_only_the_registry():
    names = {r['config'].get(k, '') for r in read_records(ROOT/'figures'/'results') for k in ('method', 'before', 'warmup_method')}
    assert len(names) > 60 and not [n for n in names if registry.own_code(n)]
    files = sorted((ROOT/'nbs'/'experiments'/'sweeps').glob('*.yaml')); assert len(files) >= 25
    for p in files:
        for profile in ('', *read_sweep(p)['profiles']): read_sweep(p, profile)


BY_KIND = ['own.py:imported', 'os:system', 'own.py:number', 'own.py:partial_', 'json:loads', 'own.py:object_', 'nowhere:f', 'own.py:nothing', 'own.py:', ':f', 'own.py:f.g', 'pathlib:Path']

@pytest.mark.parametrize('path', BY_KIND)
def test_a_path_of_ones_own_is_refused_by_kind_without_being_called(path, tmp_path, monkeypatch):
    "Only what is defined in that very file, or below the current folder, is called; the file itself is the user's and is executed"
    monkeypatch.chdir(tmp_path); at = tmp_path/'canary'
    (tmp_path/'own.py').write_text(f'''from functools import partial
from os import system as imported
number = 3
def touch(**kw): open({str(at)!r}, "w").close()
partial_ = partial(touch)
class Callable_:
    def __call__(self, **kw): touch()
object_ = Callable_()
''')
    refused(registry.named, path, allow_code=True); refused(registry.named, f'vsepp,on={path}', allow_code=True); assert not at.exists()


@pytest.mark.parametrize('what', ['os.system', '3', '"text"', 'dict(pool=1)', '(1, 2)', 'lambda **kw: None'])
def test_what_comes_back_is_looked_at_before_it_is_used(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); (tmp_path/'own.py').write_text(f'import os\ndef f(): return {what}\n')
    for text in ('own.py:f', 'vsepp,on=own.py:f'):
        with pytest.raises((DataError, TypeError, AttributeError)): registry.named(text, allow_code=True)


def test_a_module_below_the_current_folder_is_found_and_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); monkeypatch.syspath_prepend(str(tmp_path)); (tmp_path/'ours_of_test').mkdir(); (tmp_path/'ours_of_test'/'deep.py').write_text('from itm_nb.methods.method import vsepp\ndef f(): return vsepp(.1)\n')
    assert list(registry.named('ours_of_test.deep:f', allow_code=True).terms) == ['hardest'] and len(registry.code_of('ours_of_test.deep:f')) == 12
    (tmp_path/'os.py').write_text('def system(**kw): raise SystemExit'); refused(registry.named, 'os:system', allow_code=True)       # ours is hidden by the real one


# ---- door 1: a run folder
@pytest.fixture(scope='session')
def a_run(tmp_path_factory):
    "A small finished run that writes sentences, with what a sweep leaves beside it"
    at = tmp_path_factory.mktemp('runs')/'tiny'/('0'*12); sizes = dict(dim=16, d_word=16, layers=1, heads=2, image_hidden=16)
    cfg = config.Config(preset='tiny', similarity='two_modes', method='vsepp|tags(copies=2, draws=2)', epochs=1, batch=32, dropout=0., **sizes)
    loop.fit(cfg, at, progress=False); return at


def copied(a_run, tmp_path, method=None, **changes):
    "The run folder with another method in it, its seal made anew"
    at = tmp_path/'run'; shutil.copytree(a_run, at); file = at/'last'/'state.json'; d = json.loads(file.read_text())
    d['state']['config'] |= changes | ({} if method is None else dict(method=method))
    if 'seal' in d: d['seal'] = checkpoint._seal(d['state'], at/'last'/'tensors.safetensors')
    file.write_text(json.dumps(d)); return at


def test_a_run_is_opened(a_run, canary): assert attacks.opened(a_run).pool is not None and len(search.open_run(a_run).split) > 10


@pytest.mark.parametrize('text', [t for t in STRINGS if t])
def test_a_run_whose_method_is_code_is_not_asked_for_it(text, a_run, canary, tmp_path):
    at = copied(a_run, tmp_path, text.format(c=canary))
    try: attacks.opened(at)
    except (DataError, ValueError): pass           # where nothing of the method is needed, it is not looked up


def test_a_shelf_asks_for_no_method(a_run, canary, tmp_path):
    assert len(search.open_run(copied(a_run, tmp_path, f"vsepp|own.py:f|os:system(command='touch {canary}')")).split) > 10


def test_the_remedy_is_named_and_works(a_run, canary, tmp_path):
    at = copied(a_run, tmp_path, 'tags(copies=2),syn=mine.py:f')
    with pytest.raises(DataError, match='allow_code=True'): attacks.opened(at)
    Path('mine.py').write_text('from itm_nb.methods.registry import named\ndef f(train, vocab, model): return named("tags(copies=3, draws=2)", train=train, vocab=vocab, model=model).sources["syn"]\n')
    assert attacks.opened(at, allow_code=True).pool.copies == 3


@pytest.mark.parametrize('text', ['own.py:f', "vsepp,on=os:system(command='touch {c}')"])
def test_training_asks_for_leave(text, canary, tmp_path):
    cfg = config.Config(preset='tiny', dim=16, d_word=8, image_hidden=0, epochs=1, batch=32, method=text.format(c=canary))
    refused(loop.fit, cfg, tmp_path/'run', progress=False); refused(loop.fit, replace(cfg, method='vsepp', warmup_method=cfg.method, warmup=1, epochs=2), tmp_path/'run', progress=False)


def test_a_method_of_ones_own_is_gone_on_with_by_its_user(tmp_path, monkeypatch):
    "The same call, with leave, finds its checkpoint; without leave it is refused and the checkpoint stays"
    monkeypatch.chdir(tmp_path); Path('mine.py').write_text('from itm_nb.methods.method import vsepp\ndef f(margin=.2): return vsepp(margin)\n')
    cfg = config.Config(preset='tiny', dim=16, d_word=8, image_hidden=0, epochs=1, batch=32, method='mine.py:f')
    t = loop.fit(cfg, 'run', progress=False, allow_code=True); refused(loop.fit, cfg, 'run', progress=False)
    assert loop.fit(cfg, 'run', progress=False, allow_code=True).step == t.step


@pytest.mark.parametrize('text', ["vsepp|own.py:f", "tags(),syn=os:system(command='touch {c}')"])
@pytest.mark.parametrize('key', ['method', 'warmup_method', 'before'])
def test_a_file_of_parameters_is_read_and_not_trusted(text, key, canary, tmp_path, capsys):
    Path('params.json').write_text(json.dumps({'method': 'vsepp', key: text.format(c=canary), 'warmup': 1, 'preset': 'tiny', 'out': str(tmp_path/'out')}))
    assert itm_run(['train', '-f', 'params.json', '--quiet']) == 2
    said = capsys.readouterr().err; assert '--allow-code' in said and len(said.splitlines()) == 1 and not (tmp_path/'out').exists()


@pytest.mark.parametrize('file,text', [('run.json', '{"id": "../../../x", "parents": {}}'), ('run.json', '{"id": ["a"]}'), ('run.json', '{"id": "a/b"}')])
def test_the_id_of_a_run_leads_nowhere(file, text, a_run, canary, tmp_path):
    at = copied(a_run, tmp_path); (at/file).write_text(text); refused(find_run, at)


@pytest.mark.parametrize('name', ['best/model.safetensors', 'last/tensors.safetensors', 'best/vocab.json', 'best/config.json'])
def test_a_pickle_in_a_run_folder_is_not_read(name, a_run, canary, tmp_path):
    at = copied(a_run, tmp_path); (at/name).write_bytes(pickle.dumps(Bomb(canary)))
    refused(search.open_run, at)


# ---- door 2: a record
@pytest.mark.parametrize('change', [dict(sweep=s) for s in ('x/../../y', '../y', '..', '.hidden', '', 'a b', 'a\n', 'a\0', '/etc', 'C:x', '<script>')]
                         + [dict(id=i) for i in ('a'*12 + '\n', '../../../aaaa', 'A'*12, '')] + [dict(method='a\nb'), dict(method='a\u2028b'), dict(commit='x\n'), dict(preset='\0')])
def test_a_record_whose_names_are_no_names(change, canary, tmp_path):
    rec = made_up_record('a', 1.) | change; refused(write_record, tmp_path/'r', rec); (tmp_path/'r').mkdir(exist_ok=True)
    (tmp_path/'r'/f"{made_up_record('a', 1.)['id']}.json").write_text(json.dumps(rec)); refused(read_records, tmp_path/'r')


def test_a_label_of_two_lines_is_refused(canary, tmp_path):
    rec = made_up_record('a', 1.); rec['data']['label'] = 'a\n% \\input{x}'; refused(write_record, tmp_path, rec)


@pytest.mark.parametrize('text', STRINGS)
def test_a_record_may_name_any_method_and_nothing_is_run(text, canary, tmp_path):
    "The name of a row is a text: it is looked up nowhere"
    from itm_nb.runs.sweep_plan import measured
    from itm_nb.analysis.tables import markdown, table
    if not text: return
    text = text.format(c=canary); rec = made_up_record(text, 1., cost=dict(seconds=1., peak_mib=1)); rec['config'] = dict(method=text, before=text, epochs=1, rho=.25)
    write_record(tmp_path, rec); recs = read_records(tmp_path); markdown(table(recs, [text], draws=20)); measured(tmp_path, tmp_path)
    try: registry.preset_of(text)
    except ValueError: pass


def test_an_audit_is_a_record_too(canary, tmp_path):
    about = dict(schema='itm_nb audit 1', kind='audit', id='x', method='m', sweep='a/../../b', preset=None, seed=0, block={}, data={}, config={}, audit=[], control={}, metrics={})
    (tmp_path/'x.json').write_text(json.dumps(about)); refused(read_audits, tmp_path)


# ---- door 3: a sweep
PLAIN = 'title: t\nblocks: [{seed: 0}]\n'
SWEEPS = {f'{where} {i}': (where, t) for i, t in enumerate(STRINGS) if ':' in t and 'a=own' not in t and '**' not in t for where in ('base', 'arm', 'before', 'block', 'search', 'grid', 'profile')}

def sweep_text(where, text):
    y = json.dumps(text)
    return PLAIN.replace('{seed: 0}', '{seed: 0, method: %s}' % y if where == 'block' else '{seed: 0}') + {
        'base': f'base: {{method: {y}}}\narms: {{a: {{}}}}', 'arm': f'arms: {{a: {{method: {y}}}}}', 'before': f'arms: {{a: {{before: {y}, warmup: 1}}}}', 'block': 'arms: {a: {}}',
        'search': f'arms: {{a: {{}}}}\nsearch: {{arms: {{a: [{{method: {y}}}]}}}}', 'grid': f'arms: {{a: {{}}}}\nsearch: {{arms: {{a: {{method: [vsepp, {y}]}}}}}}',
        'profile': f'arms: {{a: {{}}}}\nprofiles: {{p: {{method: {y}}}}}'}[where] + '\n'


@pytest.mark.parametrize('case', SWEEPS)
def test_a_sweep_that_names_code(case, canary):
    where, text = SWEEPS[case]; Path('s.yaml').write_text(sweep_text(where, text.format(c=canary))); profile = 'p' if where == 'profile' else ''
    with pytest.raises(ValueError) as e: read_sweep(Path('s.yaml'), profile)
    assert '\n' not in str(e.value); read_sweep(Path('s.yaml'), profile, allow_code=True)          # read, not run


def test_the_command_says_how_to_allow_it(canary, capsys):
    Path('s.yaml').write_text(sweep_text('arm', 'vsepp|own.py:f'))
    for more in ([], ['--dry-run'], ['--status']):
        assert itm_sweep(['s.yaml', *more]) == 2; said = capsys.readouterr().err; assert '--allow-code' in said and len(said.splitlines()) == 1
    assert itm_sweep(['s.yaml', '--allow-code', '--dry-run']) == 0


@pytest.mark.parametrize('more', ['report: own.ipynb', 'report: ./own.ipynb', 'runs: {b: {template: own.ipynb}}', 'base: {out: x}', 'base: {cache: x}', 'base: {sweep: ../x}', 'title: !!python/object/apply:os.system ["touch x"]',
                                  'about: !!python/name:os.system ""', 'report: ../x', 'runs: {"x/../y": {}}', 'runs: {"..": {}}', 'runs: {"<script>": {}}', 'runs: {7: {}}', 'controls: {"a\\n": {scores: oracle}}'])
def test_a_sweep_with_foreign_notebooks_places_names_or_tags(more, canary, capsys):
    shutil.copyfile(ROOT/'nbs'/'experiments'/'study.ipynb', 'own.ipynb'); Path('s.yaml').write_text(PLAIN.replace('title: t\n', '' if more.startswith('title') else 'title: t\n') + f'arms: {{a: {{}}}}\n{more}\n')
    code = itm_sweep(['s.yaml', '--dry-run']); said = capsys.readouterr().err
    if more == 'report: ../x': return              # a name that no template has: looked for among the package's own
    assert code == 2 and len(said.splitlines()) == 1, said


# ---- door 4: a model folder
def bert(**more): return dict(model_type='bert', vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=12) | more
PROGRAMS = [dict(auto_map=dict(AutoModel='modeling_own.Kind', AutoConfig='configuration_own.Kind')), dict(attn_implementation='own/trap'), dict(_attn_implementation='own/trap:f'),
            dict(experts_implementation='own/trap'), dict(attn_implementation={'': 'own/trap'}), dict(quantization_config=dict(quant_method='own'))]

@pytest.mark.parametrize('more', PROGRAMS, ids=lambda m: next(iter(m)))
def test_a_network_whose_description_names_programs(more, canary, tmp_path):
    "The network is built without them: no kernel is fetched, no module imported"
    shutil.copytree('.', at := tmp_path/'net'); (at/'config.json').write_text(json.dumps(bert(**more)))
    assert pretrained.network(pretrained.find(str(at)).config).config.hidden_size == 16; assert pretrained.network(bert(**more)).config.hidden_size == 16
    pair = dict(model_type='clip', text_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16) | more, vision_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16) | more)
    assert pretrained.network(pair).config.text_config.hidden_size == 16


@pytest.mark.parametrize('kind', ['own', 'own.Kind', 'modeling_own.Kind', '../own', 'os:system', 'own.py:f', '__class__'])
def test_kinds_of_networks_towers_scores_and_poolings_are_those_of_the_registry(kind, canary, a_run, tmp_path):
    refused(pretrained.network, dict(model_type=kind)); at = copied(a_run, tmp_path); file = at/'best'/'config.json'; sane = json.loads(file.read_text())
    for change in (dict(similarity=kind), dict(image=sane['image'] | dict(kind=kind)), dict(image=sane['image'] | dict(pool=kind)), dict(attention=dict(norm=kind))):
        file.write_text(json.dumps(sane | change)); refused(from_pretrained, at/'best')


def test_a_tokeniser_that_brings_its_own_code(canary, tmp_path):
    shutil.copytree('.', at := tmp_path/'net'); (at/'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'dog']))
    (at/'config.json').write_text(json.dumps(dict(model_type='own', auto_map=dict(AutoConfig='configuration_own.Kind'))))
    (at/'tokenizer_config.json').write_text(json.dumps(dict(tokenizer_class='Kind', auto_map=dict(AutoTokenizer=['tokenization_own.Kind', 'tokenization_own.Kind']))))
    try: tokenizers.open_pieces(at)
    except DataError: pass
    (at/'tokenizer.json').write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises((DataError, ValueError)): tokenizers.open_pieces(at)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pt', 'model.safetensors'])
def test_pickled_weights_are_not_read(name, canary, tmp_path):
    (tmp_path/'net').mkdir(); (tmp_path/'net'/'config.json').write_text(json.dumps(bert())); (tmp_path/'net'/name).write_bytes(pickle.dumps(Bomb(canary)))
    refused(from_pretrained, tmp_path/'net'); source = pretrained.find(str(tmp_path/'net'))
    with pytest.raises((DataError, ValueError)): pretrained.fill(pretrained.tower(**pretrained.describe(source, 'text', 16, n_words=30)), source)


def test_a_released_checkpoint_that_is_a_program(canary, tmp_path):
    for i, raw in enumerate((pickle.dumps(Bomb(canary)), pickle.dumps(dict(model=Bomb(canary))))): (tmp_path/f'{i}.pth').write_bytes(raw); refused(released_checkpoints.read_pth, tmp_path/f'{i}.pth')
    torch.save(dict(model=Bomb(canary)), tmp_path/'z.pth'); refused(released_checkpoints.read_pth, tmp_path/'z.pth'); (tmp_path/'v.pkl').write_bytes(pickle.dumps(Bomb(canary))); refused(released_checkpoints.vocabulary_of, tmp_path/'v.pkl', 'vsepp', 5)


@pytest.mark.parametrize('text', ['load', 'hub.load', 'compile', '__class__'])
def test_a_type_of_a_released_file_is_a_type(text):
    "`torch.load` has a name of torch, and is no type of numbers"
    import inspect
    assert 'getattr(torch' not in inspect.getsource(released_checkpoints) and text not in inspect.getsource(released_checkpoints.give)


# ---- door 5: a data folder
def scan(at, n=6):
    "A folder in the SCAN layout"
    at.mkdir(parents=True); first = 0
    for part in ('train', 'dev', 'test'):
        np.save(at/f'{part}_ims.npy', np.ones((n, 2, 4), 'f4')); (at/f'{part}_caps.txt').write_text(''.join(f'a dog {first+i}\n' for i in range(n)))
        (at/f'{part}_ids.txt').write_text(''.join(f'{first+i}\n' for i in range(n))); first += n
    return at


@pytest.mark.parametrize('name', ['train_ims.npy', 'train_num.npy', 'train_boxes.npy'])
def test_arrays_of_objects_are_not_read(name, canary, tmp_path):
    at = scan(tmp_path/'set'); pickled(at/name, canary); refused(read_scan, at, 'train'); (at/name).write_bytes(pickle.dumps(Bomb(canary))); refused(read_scan, at, 'train')


READERS = {'judgements': (lambda p: folds.npz_table(p, 'crowd', 4), ('crowd', 'expert')), 'boxes': (safe_npz, ('features', 'norm_bb', 'conf')), 'world': (unpack_world, ('x',)),
           'ranks': (external_scores.read_ranks, ('i2t', 't2i'))}

@pytest.mark.parametrize('kind', READERS)
def test_zip_files_of_objects_are_not_read(kind, canary, tmp_path):
    read, names = READERS[kind]; at = pickled_npz(tmp_path/'x.npz', canary, *names)
    with pytest.raises(Exception): read(at)
    at.write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises(Exception): read(at)


@pytest.mark.parametrize('name', ['captions.csv', 'captions.jsonl', 'dataset_own.json', 'own_train.json', 'dataset_dict.json', 'train_caps.txt', 'x.npz', 'p.png'])
def test_a_pickle_or_a_program_under_every_name_of_a_layout(name, canary, tmp_path):
    at = tmp_path/'set'; (at/'images').mkdir(parents=True); shutil.copyfile('own_set.py', at/'set.py')
    for raw in (pickle.dumps(Bomb(canary)), Path('own.py').read_bytes(), b'!!python/object/apply:os.system ["touch x"]'):
        (at/name).write_bytes(raw)
        for f in (layouts.recognise, layouts.check_layout, lambda p: layouts.open_layout(p, 'train')):
            try: f(at)
            except DataError as e: assert '\n' not in str(e)


def noted(name, **d):
    "Write the note that a store has beside its arrays, as whoever gives the store away could"
    Path(name).write_text(json.dumps(d))


def through_lists(p):
    files = {n: shutil.copy(p, n) for n in offline_mining._FILES}
    noted('lists.json', format='itm_nb lists 1', about={}, files={n: sha256_of(n) for n in files})
    offline_mining.load_lists('.', {})


def through_sentences(p):
    files = {n: shutil.copy(p, n) for n in ('blind_tokens.npy', 'blind_masked.npy', 'cap_ids.npy')}
    noted('sentences.json', format=stored_sentences._FORMAT, about={}, files={n: sha256_of(n) for n in files})
    stored_sentences.load_sentences('.', 'blind', {})


def through_states(p):
    at = Path(shutil.copy(p, 'states.npy')); noted('states.json', key='k', sha256=frozen_cache._digest(at))
    return frozen_cache._opened(at, 'k')


def through_pixels(p):
    at = Path(shutil.copy(p, 'pixels.npy')); noted('pixels.json', key='k', bytes=at.stat().st_size)
    return pixels._stored(at, 'k', (1, 8, 8, 3))


def through_half(p):
    shutil.copy(p, 'model.safetensors'); noted('config.json', **bert())
    source = pretrained.find(str(Path.cwd()))
    pretrained.fill(pretrained.tower(**pretrained.describe(source, 'text', 16, n_words=30)), source)


def through_weight(p): shutil.copy(p, 'model.safetensors'); pretrained._weight(Path.cwd(), ['a'])


def through_archive(p):
    for end in ('zip', 'tar', 'tar.gz'):
        try: unpack(shutil.copy(p, f'a.{end}'), 'to')      # arrays are zip files: what they hold is laid down
        except DataError: pass


def through_arrow(p):
    at = Path('set'); names = datasets_set(at); shutil.copy(p, at/names[1]); layouts.open_layout(at, 'train')


def through_pieces(p):
    noted('config.json', **bert()); shutil.copy(p, 'tokenizer.json'); tokenizers.open_pieces('.')


def through_world(p):
    "The folder of drawn worlds: what is no world is drawn again"
    world = load_or_make('worlds', 'tiny'); at, = Path('worlds').iterdir(); shutil.copy(p, at)
    assert load_or_make('worlds', 'tiny').preset == world.preset


def through_bare(p): search.bare(shutil.copy(p, 'x.npy'))


def through_scan(p, name):
    at = Path('scan')
    shutil.rmtree(at, ignore_errors=True)
    shutil.copy(p, scan(at)/name)
    read_scan(at, 'train')


def through_labels(p):
    "COCO's test photos in the order of a SCAN folder: the package's ids say which sentence is which"
    at = Path('eccv_caption'); at.mkdir(exist_ok=True); shutil.copy(p, at/'coco_test_ids.npy')
    (at/'original_caption_to_image.json').write_text('{"900": [1]}')
    coco_protocols._places('.', SimpleNamespace(cap_ids=np.arange(2), source='.'))


def ranked(p): return external_scores._array(p, 'scores', lambda x: True, 'numbers')


# every function that opens arrays, weights, archives or pictures -> how it is brought to a file that is a
# program; a text: why it opens no file of other people
LOADERS = {
    'errors_files.read_tensors': read_tensors, 'released_checkpoints.read_pth': released_checkpoints.read_pth,
    'pretrained._weight': through_weight, 'pretrained._loaded_half': through_half,
    'tokenizers.open_pieces': through_pieces, 'offline_mining.load_lists': through_lists,
    'stored_sentences.load_sentences': through_sentences, 'frozen_cache._opened': through_states,
    'pixels._stored': through_pixels, 'pixels._store': 'the array it has just written itself',
    'pixels.decode': lambda p: pixels.decode(p, 8), 'safe_files.look': safe_files.look,
    'prepare._small': prepare._small,
    'photo_index.small_picture': lambda p: small(photo_index.small_picture, p),
    'search.picture': lambda p: small(search.picture, p), 'search.bare': through_bare,
    'safe_files.safe_npz': safe_npz, 'folds.npz_table': lambda p: folds.npz_table(p, 'x', 4),
    'scan_layout.open_npy': lambda p: scan_layout.open_npy(p, lambda x: True, 'numbers', ''),
    'scan_layout._features': lambda p: through_scan(p, 'train_ims.npy'),
    'scan_layout._counts': lambda p: through_scan(p, 'train_num.npy'),
    'scan_layout._boxes': lambda p: through_scan(p, 'train_boxes.npy'),
    'coco_protocols._places': through_labels,
    'layouts._opened': through_arrow, 'download._open_archive': through_archive,
    'cache.unpack': through_world,
    'external_scores._array': ranked, 'external_scores.read_ranks': external_scores.read_ranks,
    'audit_runs._given_vectors': audit_runs._given_vectors,
    'accelerator_pack._packed_repository': 'it writes an archive, and opens none',
    'cli.page': 'a notebook of the clone itself, executed because its owner asked for its page'}
OPENERS = {'np.load', 'open_npy', 'torch.load', 'load_file', 'safe_open', 'zipfile.ZipFile', 'tarfile.open',
           'Image.open',
           'datasets.load_from_disk', 'AutoTokenizer.from_pretrained', 'made.from_pretrained',
           'nbformat.read'}


def small(f, p):
    "A picture shown by the search; whatever its name, its content decides"
    at = Path(shutil.copy(p, 'x.jpg')).resolve()
    if f is search.picture: return f(SimpleNamespace(world=None, split=SimpleNamespace(files=[at])), 0)
    return f(SimpleNamespace(folder=at.parent, names=['x.jpg'], place=at.parent), 0)


def programs(canary):
    "name -> bytes that run something where they are trusted: pickles in every wrapping, PostScript"
    at = canary.parent
    pickled(at/'o.npy', canary)
    pickled_npz(at/'o.npz', canary, 'x', 'img', 'i2t', 'features')
    torch.save(Bomb(canary), at/'o.pt')
    head = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n('
    script = head + str(canary).encode() + b') (w) file closefile\n'
    return dict(pickle=pickle.dumps(Bomb(canary)), script=script, program=Path('own.py').read_bytes(),
                **{k: (at/f'o.{k}').read_bytes() for k in ('npy', 'npz', 'pt')})


@pytest.mark.parametrize('name', [k for k, f in LOADERS.items() if callable(f)])
def test_no_loader_runs_what_it_is_given(name, canary):
    "Refused by a typed error, or passed over where it is a store of our own; never run, never used"
    for kind, raw in programs(canary).items():
        p = Path('given'); p.write_bytes(raw)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try: got = LOADERS[name](p)
            except Exception as e:
                assert isinstance(e, (ValueError, OSError, zipfile.BadZipFile)), f'{kind}: {e!r}'
                continue
        assert got is None, f'{kind} was used'


def opens(p):
    "module.function of every call that opens arrays, weights, archives or pictures"
    for f in ast.walk(ast.parse(p.read_text())):
        if not isinstance(f, ast.FunctionDef): continue
        called = {ast.unparse(c.func) for c in ast.walk(f) if isinstance(c, ast.Call)}
        if called & OPENERS: yield f'{p.stem}.{f.name}'


def test_every_loader_of_the_package_stands_in_the_list():
    package = sorted((ROOT/'itm_nb').rglob('*.py')); found = {x for p in package for x in opens(p)}
    assert found == set(LOADERS), found ^ set(LOADERS)


def test_pictures_are_opened_by_decoders_of_pictures_alone():
    "Pillow would hand an .eps to a program; every place names the formats, experiments too"
    text = [p.read_text() for p in (ROOT/'itm_nb').rglob('*.py')]
    for p in (ROOT/'nbs'/'experiments').glob('*.ipynb'):
        cells = json.loads(p.read_text('utf-8'))['cells']
        text += [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    calls = [line for t in text for line in t.splitlines() if 'Image.open(' in line]
    assert len(calls) >= 6 and all('formats=FORMATS' in x for x in calls)
    assert not {'EPS', 'MPO', 'WMF', 'ICNS'} & set(pixels.FORMATS)


OTHER = {'npy': ['safe_files.safe_npz', 'folds.npz_table', 'cache.unpack', 'external_scores.read_ranks',
                 'audit_runs._given_vectors'],
         'npz': ['search.bare', 'scan_layout.open_npy', 'external_scores._array', 'offline_mining.load_lists',
                 'stored_sentences.load_sentences', 'frozen_cache._opened', 'pixels._stored']}

@pytest.mark.parametrize('end,name', [(end, name) for end, names in OTHER.items() for name in names])
def test_numbers_in_the_other_container_are_refused_too(end, name, canary):
    "An .npz under the name of an .npy and the reverse: numpy hands over another kind of object"
    (np.save if end == 'npy' else np.savez)(f'plain.{end}', np.ones((3, 4), 'f4'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: assert LOADERS[name](f'plain.{end}') is None
        except (DataError, OSError, ValueError, zipfile.BadZipFile) as e: assert str(e)


@pytest.mark.parametrize('name', ['../../private.arrow', '/etc/hosts', '{at}/private.arrow', 7, None])
def test_a_part_of_a_data_set_names_files_of_its_own_folder(name, canary, tmp_path):
    "`datasets` itself follows whatever state.json says"
    at = tmp_path/'set'; names = datasets_set(at); shutil.copy(at/names[1], tmp_path/'private.arrow')
    state = at/'train'/'state.json'; d = json.loads(state.read_text())
    d['_data_files'] = [dict(filename=name.format(at=tmp_path) if isinstance(name, str) else name)]
    state.write_text(json.dumps(d)); refused(layouts.open_layout, at, 'train')
    d['_data_files'] = 'data.arrow'
    state.write_text(json.dumps(d))
    refused(layouts.open_layout, at, 'train')


@pytest.mark.parametrize('part', ['../other', '/etc', '..', 3])
def test_a_data_set_names_parts_of_its_own_folder(part, canary, tmp_path):
    at = tmp_path/'set'; datasets_set(at); shutil.copytree(at/'train', tmp_path/'other')
    (at/'dataset_dict.json').write_text(json.dumps(dict(splits=['train', 'val', 'test', part])))
    refused(layouts.open_layout, at, 'train')
    (at/'dataset_dict.json').write_text(json.dumps(dict(splits=['train', 'val', 'test'])))
    shutil.rmtree(at/'train')
    (at/'train').symlink_to(tmp_path/'other')
    refused(layouts.open_layout, at, 'train')
    assert len(layouts.open_layout(at, 'train', follow_links=True)) == 2


LINKED = ['train_caps.txt', 'train_ids.txt', 'train_ims.npy', 'dev_caps.txt', 'test_ids.txt']

@pytest.mark.parametrize('name', LINKED)
def test_a_link_out_of_the_folder_is_not_copied(name, canary, tmp_path):
    "A private file beside the data does not come into what is given away; a link inside the folder is copied as what it is"
    at = scan(tmp_path/'set'); private = tmp_path/f'private{Path(name).suffix}'; (at/name).rename(private); (at/name).symlink_to(private)
    refused(subset, at, tmp_path/'small', 2); assert not (tmp_path/'small').exists() and not list(tmp_path.glob('.small*'))
    subset(at, tmp_path/'mine', 2, follow_links=True); assert not (tmp_path/'mine'/name).is_symlink()
    (at/name).unlink(); shutil.copyfile(private, at/'kept'); (at/name).symlink_to('kept'); subset(at, tmp_path/'small', 2); assert (tmp_path/'small'/name).is_file()


def test_linked_photos_and_tables_are_not_copied(canary, tmp_path):
    from PIL import Image
    at = tmp_path/'set'; (at/'images').mkdir(parents=True); listed = []
    for i, part in enumerate(('train', 'train', 'val', 'test')):
        Image.fromarray(np.full((16, 16, 3), 40*i, 'u1')).save(at/'images'/f'{i}.png'); listed.append(dict(filename=f'{i}.png', split=part, imgid=i, sentences=[dict(raw=f'a dog {i}', sentid=i)]))
    (at/'dataset_own.json').write_text(json.dumps(dict(images=listed))); subset(at, tmp_path/'whole', 2)
    (at/'images').rename(tmp_path/'elsewhere'); (at/'images').symlink_to(tmp_path/'elsewhere'); refused(subset, at, tmp_path/'b', 2); subset(at, tmp_path/'c', 2, follow_links=True)
    (at/'images').unlink(); (tmp_path/'elsewhere').rename(at/'images'); (at/'images'/'0.png').rename(tmp_path/'secret.png'); (at/'images'/'0.png').symlink_to(tmp_path/'secret.png'); refused(subset, at, tmp_path/'d', 2)
    assert not (tmp_path/'b').exists() and not (tmp_path/'d').exists()


def photos(at):
    "Four small photos and their parts"
    from PIL import Image
    (at/'images').mkdir(parents=True); parts = ('train', 'train', 'val', 'test')
    for i in range(len(parts)): Image.fromarray(np.full((16, 16, 3), 40*i, 'u1')).save(at/'images'/f'{i}.png')
    return [(f'images/{i}.png', f'a dog {i}', part) for i, part in enumerate(parts)]


def karpathy_set(at):
    images = [dict(filename=f[7:], split=p, imgid=i, sentences=[dict(raw=c, sentid=i)]) for i, (f, c, p) in enumerate(photos(at))]
    (at/'dataset_own.json').write_text(json.dumps(dict(images=images))); return ['dataset_own.json', 'images/0.png']


def albef_set(at):
    rows = photos(at); lists = {part: [dict(image=f, caption=c) for f, c, p in rows if p == part] for part in ('train', 'val', 'test')}
    for part, listed in lists.items(): (at/f'own_{part}.json').write_text(json.dumps(listed))
    return ['own_train.json', 'own_val.json', 'own_test.json', 'images/0.png']


def captions_set(at, name='captions.csv'):
    (at/name).write_text('\n'.join(map(','.join, [('file', 'caption', 'split'), *photos(at)]))); return [name, 'images/0.png']


def jsonl_set(at):
    rows = photos(at)
    (at/'captions.jsonl').write_text('\n'.join(json.dumps(dict(file=f, caption=c, split=p)) for f, c, p in rows)); return ['captions.jsonl', 'images/0.png']


def imagefolder_set(at):
    (at/'metadata.csv').write_text('\n'.join(map(','.join, [('file_name', 'text', 'split'), *photos(at)]))); return ['metadata.csv', 'images/0.png']


def parts_set(at):
    "A table in each part, as at the Hub"
    for f, c, p in photos(at):
        (at/p).mkdir(exist_ok=True); (at/f).rename(at/p/f[7:]); new = not (at/p/'metadata.csv').exists()
        with open(at/p/'metadata.csv', 'a') as t: t.write('file_name,text\n'*new + f'{f[7:]},{c}\n')
    return ['train/metadata.csv', 'test/metadata.csv', 'train/0.png']


def boxes_set(at):
    rows = [('file', 'caption', 'split'), *((f'{i}.npz', f'a dog {i}', p) for i, p in enumerate(('train', 'train', 'val', 'test')))]
    box = np.tile(np.array([0, 0, 1, 1], 'f4'), (2, 1))
    at.mkdir(); (at/'captions.csv').write_text('\n'.join(map(','.join, rows)))
    for i in range(4): np.savez(at/f'{i}.npz', features=np.full((2, 3), i, 'f4'), conf=np.ones(2, 'f4'), norm_bb=box)
    return ['captions.csv', '0.npz']


def datasets_set(at):
    datasets = pytest.importorskip('datasets'); rows = photos(at); parts = dict.fromkeys(p for *_, p in rows)
    made = {part: datasets.Dataset.from_list([dict(image=f, caption=c) for f, c, p in rows if p == part]) for part in parts}
    datasets.DatasetDict(made).save_to_disk(str(at)); return ['dataset_dict.json', next((at/'train').glob('*.arrow')).relative_to(at).as_posix()]


def scan_set(at):
    scan(at); return [f'train_{k}' for k in ('caps.txt', 'ids.txt', 'ims.npy')]


SETS = dict(scan=scan_set, karpathy=karpathy_set, albef=albef_set, captions=captions_set, jsonl=jsonl_set, kaggle=lambda at: captions_set(at, 'captions.txt'),
            imagefolder=imagefolder_set, parts=parts_set, boxes=boxes_set, datasets=datasets_set)

@pytest.mark.parametrize('layout', SETS)
def test_a_link_out_of_the_folder_is_not_read(layout, canary, tmp_path):
    "A table, an array or a picture that is a link out of the data folder is refused by name, in every layout; the caller may vouch for it; a link inside is read"
    at = tmp_path/'set'; names = SETS[layout](at); whole = layouts.open_layout(at, 'train')
    def again(**settings): return layouts.open_layout(at, 'train', **settings).captions
    for name in names:
        private = tmp_path/f'private{Path(name).suffix}'; (at/name).rename(private); (at/name).symlink_to(private)
        with pytest.raises(DataError, match='a link that leads out of the folder') as e: again()
        assert Path(e.value.where).name == Path(name).name
        said = layouts.check_layout(at); assert any(f.level == 'error' and 'leads out' in f.text for f in said)
        assert again(follow_links=True) == whole.captions
        (at/name).unlink(); inner = (at/name).with_name('.kept'); private.rename(inner); (at/name).symlink_to(inner.name)
        assert again() == whole.captions; (at/name).unlink(); inner.rename(at/name)


@pytest.mark.parametrize('layout', [k for k in SETS if k not in ('scan', 'boxes', 'parts')])
def test_a_linked_folder_of_pictures_is_read(layout, canary, tmp_path):
    at = tmp_path/'set'; SETS[layout](at); whole = layouts.open_layout(at, 'train').captions
    (at/'images').rename(tmp_path/'elsewhere'); (at/'images').symlink_to(tmp_path/'elsewhere')
    assert layouts.open_layout(at, 'train').captions == whole


@pytest.mark.parametrize('name', ['../out', 'a/../../out', 'own.py/../../out'])
def test_an_archive_stays_in_its_folder(name, canary, tmp_path):
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z: z.writestr(name, 'x')
    refused(unpack, tmp_path/'a.zip', tmp_path/'to'); assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('text', ['{"a": {"../x": {"sha256": "1"}}}', '{"a": {"/x": {"sha256": "1"}}}'])
def test_a_note_of_sources_stays_in_its_folder(text, canary, tmp_path): (tmp_path/'sources.json').write_text(text); refused(verify, tmp_path)


# ---- door 6: a label file
@pytest.mark.parametrize('name', ['original_caption_to_image.json', 'eccv_image_to_caption.json', 'eccv_caption_to_image.json'])
def test_labels_are_json_of_numbers(name, canary, tmp_path):
    for raw in (pickle.dumps(Bomb(canary)), b'{"1": ["__import__(\'own\')"]}', b'[]', b'{"1": "own.py:f"}'): (tmp_path/name).write_bytes(raw); refused(coco_protocols._lists, tmp_path/name)


def test_label_arrays_hold_no_objects(canary, tmp_path):
    pickled(tmp_path/'coco_test_ids.npy', canary); refused(coco_protocols.open_npy, tmp_path/'coco_test_ids.npy', lambda x: True, 'numbers', '')
    pickled(tmp_path/'scores.npy', canary); refused(external_scores._array, tmp_path/'scores.npy', 'scores', lambda x: True, 'numbers')


@pytest.mark.parametrize('raw', [b'!!python/object/apply:os.system ["touch x"]', b'a: !!python/name:os.system ""', b'a: &a [*a]', b'\x80\x04.'])
def test_primary_tests_are_plain_yaml(raw, canary, tmp_path): (tmp_path/'t.yaml').write_bytes(raw); refused(read_tests, tmp_path/'t.yaml')


def test_published_rows_are_text(canary, tmp_path):
    (tmp_path/'p.csv').write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises((DataError, ValueError)): published(tmp_path/'p.csv')


@pytest.mark.parametrize('raw', [b'{"parts": "own.py:f"}', b'!!python/name:os.system ""', b'[]'])
def test_a_file_of_folds_is_json(raw, canary, tmp_path):
    (tmp_path/'f.json').write_bytes(raw)
    with pytest.raises((DataError, ValueError)): folds.Folds.load(tmp_path/'f.json')


def test_every_door_says_what_it_accepts():
    "The lists stand in the notebooks that own the doors, word for word"
    text = ''.join(''.join(c['source']) for p in sorted((ROOT/'nbs').rglob('*.ipynb')) for c in json.loads(p.read_text('utf-8'))['cells'] if c['cell_type'] == 'markdown')
    words = ' '.join(text.split())
    for door, accepts in ACCEPTS.items(): assert f'**Accepted at this door ({door}):** {accepts}.' in words, door


def test_the_count_of_the_six_doors(request):
    "What was offered at each door beside a canary, printed with what the door accepts; none fired"
    here = {i.function.__name__ for i in request.session.items if i.fspath == request.fspath}
    whole = {k for k, f in globals().items() if k.startswith('test_') and 'canary' in f.__code__.co_varnames}
    if not whole <= here: pytest.skip('only a part of this file was asked for')
    for d, accepts in ACCEPTS.items(): print(f'\n{d}: {TRIED[d]} inputs beside a canary, 0 fired; accepts {accepts}', end='')
    print(f'\nstrings: {TRIED["strings"]}, 0 fired')
    assert set(TRIED) == {*ACCEPTS, 'strings'} and min(TRIED.values()) >= 10, TRIED
