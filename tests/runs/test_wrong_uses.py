"""Wrong uses of every command and every template: refused in one line that names what is wrong and what to do, at once, with nothing written."""
import configparser
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from itm_nb import cli
from itm_nb.analysis import site
from itm_nb.training.config import TEMPLATES

ROOT = Path(__file__).parents[2]


def commands():
    "{name: function} of every command that an installation brings: a new one without wrong uses here fails"
    settings = configparser.ConfigParser()
    settings.read(ROOT/'settings.ini', 'utf-8')
    named = dict(line.split('=') for line in settings['DEFAULT']['console_scripts'].split())
    place = {k: v.split(':') for k, v in named.items()}
    return {k: getattr(importlib.import_module(module), f) for k, (module, f) in place.items()}


COMMANDS = commands()
REMEDY = re.compile(r'wanted|did you mean|there are|see itm_|\b(given?|correct|rename|name|choose|takes|set|finish|use|install|change|remove|say|save|move|make|complete|leave|run|convert|copy|take)\b', re.I)
SWEEP = 'title: a\nblocks: [{seed: 0}]\narms: {a: {}}\n'


def setting(name, value, *more): return ('itm_run', ['train', '-p', name, value, *more], name)


def of_training():
    "A setting of `train` whose value cannot be"
    wrong = dict(
        data='coco', preset='medium', rho='0 -1 100 nan inf much', world='-2 1.5', dims='-1 half', regions='middle 5:3 -1 5,,6 6:x', image_hidden='-1', image_pool='sum cls', text='gru_first lstm',
        text_pool='first last', dim='0 -5 1e3', d_word='0', dropout='1 -0.1 nan', method='nosuch vseppp vsepp( vsepp(5) | fne(tau=-1) fne(tua=5.0) aoq(stage="x") tags(copies=0) vsepp|fne(',
        warmup_method='nosuch', warmup='-1 12 99', margin='nan -5 inf', temperature='-1 0 nan', epochs='0 -1 many', batch='0 1 -8 2.5', lr='0 1e10 -1 nan', decay='linear', clip='-1 nan', precision='fp16',
        seed='-1 abc 0.5', threads='0 100000', tokenizer='letters own', wordpiece_vocab='0', max_tokens='-1', size='0 -3', resize='stretch', augment='flip', freeze='half 1++2', text_freeze='top', pretrained_lr_scale='-1',
        layer_decay='0 1.5', weight_decay='-5 1e6', chunk='-1', similarity='cosin dot', image='resnet', captioner='-1 8', attention_scale='-1', lse_scale='inf', agg='Median', norm='l3', layers='0', heads='0',
        boxes='perhaps true', columns='a;b', max_captions='-1', captions_of_split='tset', folds='flikr8k_5', fold='0 -2', carry='true', test='no', sweep='../x a/b .hidden', workers='-1 9999',
        device='banana cuda:x', progress='perhaps', compile='on', deterministic='perhaps', checkpoint_seconds='-1 soon')
    return [setting(k, v) for k, vs in wrong.items() for v in vs.split()] + [('itm_run', ['train', '-p', 'method', ' '], 'method')]


def together():
    "Settings that are right alone"
    many = ('similarity=two_modes text_freeze=all', 'similarity=scan_t2i image=vsrn', 'similarity=cross image=vsrn', 'similarity=bfan_prob agg=Max', 'similarity=cross heads=3', 'boxes=true vision=x',
            'method=vse0|caption()', 'method=vsepp|tags()', 'method=mlm_warmup()', 'method=aoq()', 'method=vsepp|tags(sharing="static")', 'data=scan folder=. method=vsepp(honest=True)',
            'data=scan folder=. method=fne(prior="known")', 'data=scan', 'data=images', 'captions_of_split=test', 'max_captions=5', 'data=scan folder=. columns=file:a', 'epochs=2 warmup=2',
            'folds=flickr8k_5', 'fold=1', 'method=infonce|semihard batch=1', 'lr=1 weight_decay=2', 'warmup_method=mlm_warmup() warmup=2', 'image_pool=all', 'text_pool=pooler')
    return [('itm_run', ['train', *(x for pair in many_.split() for x in ('-p', *pair.split('=', 1)))], many_.split()[-1].split('=')[0]) for many_ in many]


def of_places(here):
    "Folders, files and runs that are not there, or that cannot be written"
    out = [('out', 'file'), ('out', 'file/a'), ('out', '/dev/null/a'), ('out', 'x'*300), ('out', 'other'), ('out', 'lost/a'), ('cache', 'file'), ('folder', 'nowhere'), ('folder', 'file'),
           ('models', 'nowhere'), ('init', 'nowhere'), ('init', 'other'), ('lists', 'nowhere'), ('generator', 'file')]
    table = [setting(k, v) for k, v in out] + [('itm_run', ['train', '-p', 'folder', 'a\udcff'], 'UTF-8')]
    table += [('itm_run', [t, '-p', k, v], k) for t, k, v in (
        ('study', 'records', 'nowhere'), ('study', 'figures', 'file'), ('verdicts', 'tests', 'nowhere.yaml'), ('verdicts', 'audits', 'file'), ('aoq', 'records', 'file'), ('fne', 'runs', 'nowhere'),
        ('tags_dc', 'attempts', '0'), ('tags_dc', 'runs', 'file'), ('defects', 'delta', '-1'), ('dose', 'records', 'nowhere'), ('factorial', 'figures', '/dev/null/x'), ('first_look', 'records', 'nowhere'), ('side_by_side', 'records', 'nowhere'), ('bench', 'records', 'nowhere'), ('audit', 'run', 'nowhere'),
        ('audit', 'part', 'dev2'), ('audit', 'gallery', '-1'), ('audit', 'judgements', 'nowhere'), ('run_report', 'top', '0'), ('run_report', 'folder', 'nowhere'), ('search', 'query', ' '),
        ('search', 'device', 'banana'), ('search', 'top', '-1'), ('search', 'run', 'other'), ('acceptance', 'preset', 'huge'), ('acceptance', 'epochs', '0'), ('benchmark', 'batches', 'a,b'),
        ('benchmark', 'depth', '3'), ('accelerator', 'size', 'huge'), ('accelerator', 'kills', '-2'), ('accelerator', 'folder', 'nowhere'), ('benchmark', 'rounds', '0'), ('evaluate', 'scores', 'nowhere.npy'), ('evaluate', 'scores', 'nowhere/run'), ('evaluate', 'scores', ' '), ('evaluate', 'rerank', '-1'),
        ('evaluate', 'weights', 'nowhere'), ('evaluate', 'img_of', 'nowhere.npy'), ('evaluate', 'fold', '0'), ('evaluate', 'data', 'scan'), ('mine', 'share', '2'), ('generate', 'mask_share', '0'), ('generate', 'keep', '0'), ('mine', 'init', 'nowhere'),
        ('mine', 'similarity', 'x'), ('test_sets', 'test_set', 'coco_2k'), ('test_sets', 'scores', 'nowhere'), ('test_sets', 'workers', '-1'))]
    return table


def of_itm_run(here):
    "The command itself, its files and notebooks"
    files = {'list.yaml': '- 1', 'open.yaml': '{', 'bytes.yaml': b'\xff\xfe', 'null.yaml': 'arm: null', 'yes.yaml': 'seed: true', 'name.yaml': 'sede: 3', 'nested.yaml': 'arm: {a: 1}', 'code.yaml': 'arm: !!python/object/apply:os.getcwd []',
             'own.yaml': 'method: "mine.py:go"', 'surrogate.json': '{"name": "\\ud800"}'}
    for n, raw in files.items(): (here/n).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    books = {'none.ipynb': 'no json', 'list.ipynb': '[]', 'bare.ipynb': '{}', 'odd.ipynb': '{"cells": [1]}', 'empty.ipynb': '{"cells": []}'}
    for n, raw in books.items(): (here/n).write_text(raw)
    cell = lambda s: dict(cell_type='code', execution_count=None, outputs=[], id='0', metadata=dict(tags=['parameters']), source=s)
    for n, s in {'syntax.ipynb': 'seed = ', 'import.ipynb': 'import os', 'call.ipynb': 'seed = int(3)', 'two.ipynb': 'a = b = 3\nc, d = 1, 2'}.items():
        (here/n).write_text(json.dumps(dict(cells=[cell(s)], metadata={}, nbformat=4, nbformat_minor=5)))
    table = [('itm_run', ['train', '-f', n], n.split('.')[0] if n in ('list.yaml', 'open.yaml', 'bytes.yaml', 'code.yaml') else '') for n in files]
    table += [('itm_run', [n], n) for n in (*books, 'syntax.ipynb', 'import.ipynb', 'call.ipynb', 'two.ipynb', 'nowhere.ipynb', 'folder.ipynb', 'trian', 'zzz', '')[:-1]]
    return table + [('itm_run', a, w) for a, w in ((['train', '-f', 'nowhere.yaml'], 'nowhere'), (['train', '-f', 'folder.ipynb'], 'folder'), (['train', '-p', 'sede', '3'], 'sede'), (['train', '-p', 'seed'], '-p'),
                                                   (['train', '--accelerate', '0'], 'accelerate'), (['train', '--accelerate', 'two'], 'accelerate'), (['train', '--quite'], '--quite'), (['train', 'evaluate'], 'evaluate'),
                                                   (['train', '-p', 'arm', 'a\0b'], 'null'), (['a\udcff'], 'UTF-8'), (['study', '--parameter', '-x'], '-x'), (['nowhere.ipynb', '--parameters'], 'nowhere'))]


def of_sweeps(here):
    "Sweep files, and the arguments of `itm_sweep`"
    parts = {'report': 'report: nosuch', 'reads': 'report: train', 'epochs': 'base: {epochs: -1}', 'method': 'base: {method: nosuch}', 'warmup': 'base: {warmup: 12}', 'cost': 'cost: {train: {epoch: fast}}', 'minutes': 'cost: {train: {minutes: 3}}',
             'searched': 'search: {arms: {a: 3}}', 'arms': 'search: {arms: 3}', 'grid': 'search: {arms: {a: {lr: []}}}', 'who': 'search: {arms: {b: [{lr: .1}]}}', 'block': 'search: {block: {seed: 9}, arms: {a: [{lr: .1}]}}', 'part': 'serach: {}',
             'template': 'runs: {b: {template: nosuch}}', 'number': 'runs: {b: {template: 3}}', 'names': 'runs: {1: {}}', 'key': 'base: {1: 2}', 'null': 'base: {rho: null}', 'listed': 'base: {lr: [1]}', 'itself': 'runs: {b: {init: b}}',
             'parent': 'runs: {b: {init: c}}', 'place': 'base: {out: x}', 'own': 'base: {method: "mine.py:go"}', 'twice': 'runs: {a: {}}', 'profile': 'profiles: {b: 3}', 'device': 'base: {device: banana}', 'image': 'base: {captioner: 8}',
             'script': 'runs: {"<b>": {}}', 'slash': 'runs: {"../b": {}}', 'gone': 'base: {lists: nowhere}'}
    for n, raw in parts.items(): (here/f's_{n}.yaml').write_text(SWEEP + raw + '\n')
    for n, raw in {'list': '- 1', 'open': '{', 'untitled': 'blocks: [{seed: 0}]\narms: {a: {}}', 'kinds': 'title: a\nblocks: {seed: 0}\narms: {a: {}}', 'same': 'title: a\nblocks: [{seed: 0}, {seed: 0}]\narms: {a: {}}'}.items():
        (here/f's_{n}.yaml').write_text(raw)
    (here/'good.yaml').write_text(SWEEP); (here/'a b.yaml').write_text(SWEEP)
    said = dict(reads='train', minutes='minutes', searched='a', arms='arms', grid='lr', who='b', part='serach', number='b', names='1', key='1', null='rho', listed='lr', parent='c', place='out', own='mine', twice='two', image='captioner',
                script='<b>', slash='../b', template='nosuch', gone='lists', block='block', itself='b', list='s_list', open='s_open', untitled='title', kinds='blocks', same='two')
    table = [('itm_sweep', [f's_{n}.yaml', '--dry-run'], said.get(n, n)) for n in (*parts, 'list', 'open', 'untitled', 'kinds', 'same')]
    argv = (('--jobs', '-2'), ('--jobs', '0'), ('--jobs', 'two'), ('--jobs', '1.5'), ('--budget', '10x'), ('--budget', '-5m'), ('--runs', 'file'), ('--runs', '/dev/null/x'), ('-p', 'device', 'banana'), ('-p', 'folder', 'nowhere'),
            ('-p', 'models', 'file'), ('-p', 'cache', 'file'), ('-p', 'seed', '3'), ('-p', 'workers', '-1'), ('--profile', 'x'), ('--engine', 'slurm'), ('--retries', '-1'), ('--accelerate', '0'), ('--memory', '0'), ('--memory', 'nan'),
            ('--gpu-memory', '-1'), ('--jbos', '2'), ('-p', 'folder'), ('--runs', 'a\udcff'))
    words = lambda a: a[1] if a[0] == '-p' else 'UTF-8' if '\udcff' in a[-1] else a[0].strip('-')
    table += [('itm_sweep', ['good.yaml', '--dry-run', *a], '-p' if a == ('-p', 'folder') else words(a)) for a in argv]
    return table + [('itm_sweep', a, w) for a, w in ((['scnes'], 'scenes'), (['nowhere.yaml'], 'nowhere'), (['folder.ipynb'], 'folder'), (['a b.yaml'], 'a b'), ([], 'sweep'), (['flickr8k_base'], 'folder'),
                                                     (['flickr8k_base', '-p', 'folder', 'nowhere'], 'nowhere'), (['tiny', 'scenes'], 'scenes'))]


def of_data(here):
    "Looking at data, fetching, cutting, auditing; converting; the README"
    (here/'empty').mkdir(); np.savez(here/'bad.npz', img=np.zeros((2, 3))); (here/'bad.pth').write_bytes(b'no weights')
    table = [('itm_data', a, w) for a, w in (
        (['look', 'empty'], 'look'), ([], 'what'), (['info'], 'path'), (['info', 'nowhere'], 'nowhere'), (['info', 'empty'], 'empty'), (['info', 'file'], 'file'), (['info', 'empty', '--layout', 'foo'], 'foo'),
        (['check', 'empty', '--layout', 'foo'], 'foo'), (['check', 'empty', '--name', 'flickr9k'], 'flickr9k'), (['info', 'empty', '--lay'], '--lay'), (['info', 'scenes', 'more'], 'more'), (['info', 'a\udcff'], 'UTF-8'),
        (['check', 'nowhere'], 'nowhere'), (['check', 'empty'], 'empty'), (['check', 'file'], 'file'),
        (['get', 'flikr8k'], 'flickr8k'), (['get', 'zzz'], 'zzz'), (['get', 'karpathy', 'file'], 'file'), (['get', 'karpathy', 'nowhere', '--verify'], 'nowhere'), (['get', '--qiet'], '--qiet'),
        (['subset'], 'folder'), (['subset', 'nowhere', 'to'], 'nowhere'), (['subset', 'empty', 'to'], 'empty'), (['subset', 'empty', 'to', '-n', '0'], '-n'), (['subset', 'empty', 'to', '-n', 'few'], '-n'),
        (['subset', 'empty', 'to', '--train', '-1'], 'train'), (['subset', 'empty', 'file/a'], 'file'), (['subset', 'empty', 'to', '--layout', 'foo'], 'foo'), (['subset', 'empty', 'to', '--seed', '-1'], 'seed'),
        (['audit'], '--run'), (['audit', '--run', 'a', '--vectors', 'b'], '--vectors'), (['audit', '--run', 'nowhere'], 'nowhere'), (['audit', '--run', 'empty'], 'empty'), (['audit', '--vectors', 'nowhere.npz'], 'nowhere'),
        (['audit', '--vectors', 'bad.npz'], 'bad'), (['audit', '--vectors', 'file'], 'file'), (['audit', '--vectors', 'bad.npz', '--csv', 'empty'], 'csv'), (['audit', '--vectors', 'bad.npz', '--csv', 'file/a'], 'csv'),
        (['audit', '--vectors', 'bad.npz', '--csv', '/dev/null/x'], 'csv'), (['audit', '--run', 'empty', '--part', 'dev2'], 'part'), (['audit', '--run', 'empty', '--top', '0'], 'top'))]
    table += [('itm_convert', a, w) for a, w in (
        ([], 'file'), (['bad.pth'], '--out'), (['bad.pth', '--out', 'to'], '--as'), (['bad.pth', '--as', 'scan9', '--out', 'to'], 'scan9'), (['bad.pth', '--as', 'scan_t2i', '--out', 'to'], 'bad'),
        (['nowhere.pth', '--as', 'scan_t2i', '--out', 'to'], 'nowhere'), (['bad.pth', '--as', 'scan_t2i', '--out', 'file'], 'file'), (['empty', '--to-released', '--out', 'to.pth'], 'empty'),
        (['nowhere', '--to-released', '--out', 'to.pth'], 'nowhere'), (['bad.pth', '--out', 'to', '--to-relased'], '--to-relased'))]
    table += [('itm_bench', a, w) for a, w in (
        ([], 'my_method.py'), (['mine'], 'mine'), (['nowhere.py:mine'], 'nowhere'), (['bad.npz:mine'], 'bad'),
        (['m.py:mine', '-p', 'seed', '3'], 'seed'), (['m.py:mine', '--budget', 'soon'], 'soon'),
        (['m.py:mine', '--settings', '0'], '--settings'),
        (['m.py:mine', '-p', 'folder', 'nowhere'], 'nowhere'),
        (['m.py:mine', '-p', 'folder', 'empty'], 'models'), (['--check', 'nowhere'], 'nowhere'),
        (['--check', 'empty'], 'empty'), (['m.py:mine', '--runs', 'file'], 'file'))]
    return table + [('itm_readme', ['now'], 'now'), ('itm_readme', ['--quiet'], '--quiet')]


def of_folders(here):
    "Folders of pictures and the site: searched, prepared, packed, built"
    from PIL import Image
    (here/'pictures').mkdir()
    Image.new('RGB', (16, 16)).save(here/'pictures'/'a.png')
    (here/'texts').mkdir()
    (here/'texts'/'a.jpg').write_text('no picture')
    table = [('itm_search', a, w) for a, w in (
        ([], 'run'), (['nowhere'], 'photos'), (['nowhere', 'empty'], 'empty'),
        (['nowhere', 'nowhere'], 'nowhere'),
        (['nowhere', 'file'], 'file'), (['nowhere', 'pictures'], 'nowhere'), (['empty', 'pictures'], 'empty'),
        (['file', 'pictures'], 'file'), (['other', 'pictures'], 'other'),
        (['clip-vit-base', 'pictures'], 'clip-vit-base'),
        (['nowhere', 'texts'], 'texts'), (['a', 'pictures', '--port', '-1'], '--port'),
        (['a', 'pictures', '--port', '65536'], '--port'), (['a', 'pictures', '--port', 'http'], '--port'),
        (['a', 'pictures', '--no-brwoser'], '--no-brwoser'), (['a', 'pictures', 'more'], 'more'),
        (['a\udcff', 'pictures'], 'UTF-8'), (['clip', 'pictures', '--models', 'nowhere'], 'clip'))]
    table += [('itm_data', ['prepare', *a], w) for a, w in (
        ([], 'folder'), (['nowhere'], 'nowhere'), (['empty'], 'empty'), (['file'], 'file'),
        (['pictures'], 'pictures'), (['empty', '--layout', 'foo'], 'foo'),
        (['empty', '--workers', '0'], '--workers'), (['empty', '--lay'], '--lay'))]
    table += [('itm_data', ['accelerator-pack', *a], w) for a, w in (
        ([], '--data'), (['to'], '--data'), (['to', '--data', 'nowhere'], 'nowhere'),
        (['to', '--data', 'empty'], 'empty'),
        (['file', '--data', 'empty'], 'file'), (['/dev/null/x', '--data', 'empty'], '/dev/null'),
        (['to', '--data', 'empty', '--limit', '0'], '--limit'),
        (['to', '--data', 'empty', '--dims', '-1'], '--dims'))]
    return table + [('itm_docs', a, w) for a, w in (
        (['now'], 'now'), (['--uot', 'x'], '--uot'), (['--out', str(here/'file')], 'file'),
        (['--out', str(here/'other')], 'other'), (['--out', '/dev/null/x'], '--out'),
        (['--out', ''], '--out'), (['--out', '..'], '--out'))]


def declared():
    "Every setting of every template, beyond its type, its interval, its choices and its form"
    out = []
    for t, settings in TEMPLATES.items():
        for s in settings:
            if type(s.default) is not str: out.append((t, s.name, 'perhaps'))
            if s.choices: out.append((t, s.name, 'zzz'))
            if s.within: out += [(t, s.name, v) for v in (str(int(float(s.within[1:].split(',')[0])) - 1), 'nan')]
            if s.form: out.append((t, s.name, '\t'))
    return [('itm_run', [t, '-p', k, v], k) for t, k, v in out]


def snapshot(folder): return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in Path(folder).rglob('*'))


def judge(case, capsys, here):
    "What happened: 'refused clearly', or what else"
    name, argv, word = case; before = snapshot(here); began = time.process_time()
    try: code = COMMANDS[name](argv)
    except SystemExit as e: return f'SystemExit {e.code}'
    except BaseException as e: return f'{type(e).__name__}: {e}'
    took, (out, err) = time.process_time()-began, capsys.readouterr(); lines = err.strip().splitlines()
    if argv[:1] == ['check'] and not err: *lines, total = out.strip().splitlines(); assert total.endswith(' errors')     # its answer is what is wrong
    if code == 0 or code is None: return f'accepted ({code})'
    if len(lines) != 1: return f'{len(lines)} lines: {err[:300]!r} {out[:100]!r}'
    if word.lower() not in lines[0].lower(): return f'does not name {word!r}: {lines[0]}'
    if not REMEDY.search(lines[0].partition(': ')[2]): return f'without a remedy: {lines[0]}'
    if took > 10: return f'{took:.1f} s'         # of the processor: other work on this machine does not count
    if snapshot(here) != before: return f'wrote something: {lines[0]}'
    return 'refused clearly'


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with a file, a dead link and a folder of somebody else's, in which commands are given; nothing may be executed"
    (tmp_path/'file').write_text('mine'); (tmp_path/'other').mkdir(); (tmp_path/'other'/'letter.txt').write_text('mine'); (tmp_path/'folder.ipynb').mkdir(); (tmp_path/'lost').symlink_to(tmp_path/'nowhere')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(site, '_has_extra', lambda: None)          # not what is wrong here
    for what in ('execute', 'launch', 'drive'):
        monkeypatch.setattr(cli, what, lambda *a, **k: pytest.fail('a notebook was started'))
    return tmp_path


def test_a_site_needs_its_packages(capsys, monkeypatch):
    monkeypatch.setattr(site, '_NEEDED', ('nowhere_to_be_found',))
    assert site.itm_docs([]) == 2
    said = capsys.readouterr().err
    assert 'nowhere_to_be_found' in said and 'pip install' in said and len(said.splitlines()) == 1


def count(table, capsys, here, title):
    "Judge a table; print the counts"
    began = time.perf_counter(); found = [(case, judge(case, capsys, here)) for case in table]
    odd = [(' '.join([n, *argv]), said) for (n, argv, _), said in found if said != 'refused clearly']
    of = Counter(n for (n, *_), said in found if said == 'refused clearly')
    with capsys.disabled():
        print(f'\n{title}: {len(found)-len(odd)} of {len(found)} refused clearly ({", ".join(f"{k} {v}" for k, v in of.items())}), everything else {len(odd)}; {time.perf_counter()-began:.0f} s')
    assert not odd, '\n' + '\n'.join(f'{a!r}: {said}' for a, said in odd)


def test_wrong_uses_are_refused_in_one_line_with_nothing_written(capsys, here):
    table = [*of_training(), *together(), *of_places(here), *of_itm_run(here), *of_sweeps(here),
             *of_data(here), *of_folders(here)]
    assert len(table) >= 200 and {n for n, *_ in table} == set(COMMANDS)
    assert {a[0] for n, a, _ in table if n == 'itm_run' and a} >= set(TEMPLATES)
    count(table, capsys, here, 'wrong uses')


def test_every_setting_of_every_template_is_checked(capsys, here): count(declared(), capsys, here, 'settings')


@pytest.mark.parametrize('name,argv', [('itm_run', ['train', '-p', 'clip', '-1']), ('itm_sweep', ['s.yaml', '--dry-run']), ('itm_data', ['info', 'file']), ('itm_convert', ['file', '--as', 'scan9', '--out', 'to']), ('itm_readme', ['now'])])
def test_a_process_ends_the_same_way(name, argv, here):
    "As a person calls it: exit code 2, one line on the error stream, nothing on the other"
    (here/'s.yaml').write_text(SWEEP + 'base: {epochs: -1}'); before = snapshot(here); began = sum(os.times()[2:4])
    place = 'models.released_checkpoints' if name == 'itm_convert' else 'cli'
    r = subprocess.run([sys.executable, '-c', f'from itm_nb.{place} import {name}; {name}()', *argv], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)), timeout=120)
    assert (r.returncode, r.stdout, r.stderr.count('\n')) == (2, '', 1) and REMEDY.search(r.stderr), r.stderr
    assert snapshot(here) == before and sum(os.times()[2:4])-began < 10
