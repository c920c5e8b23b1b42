"""Trackers: TensorBoard's own file, compared with the log; the other two by their interface in accelerate.

wandb and trackio themselves are not asked: modules that write down how they are called stand in for them.
"""

import json
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest

from itm_nb.core.commands import SetupError
from itm_nb.training.config import config
from itm_nb.training.corpus import corpus
from itm_nb.training.loop import fit
from itm_nb.training.trackers import scalars, track_place

TINY = dict(preset='tiny', dim=16, d_word=8, image_hidden=16, epochs=3, batch=50)
FILES = ('log.jsonl', 'picks.bin', 'best/model.safetensors', 'best/config.json')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A place with a drawn world, and a run that told nobody"
    at = tmp_path_factory.mktemp('track')
    fit(config(TINY), at / 'plain', data(at), progress=False)
    return at


def data(at):
    return corpus(config(TINY), cache=at / 'worlds')


def log_of(run):
    return [json.loads(l) for l in (run / 'log.jsonl').read_text().splitlines()]


def wanted(run):
    "{name: [(step, number)]} of the log"
    out = {}
    for line in log_of(run):
        for k, v in scalars(line).items():
            out.setdefault(k, []).append((line['step'], v))
    return out


def opened(run):
    "TensorBoard's own reader of its own file"
    reader = pytest.importorskip(
        'tensorboard.backend.event_processing.event_accumulator',
        reason="no tensorboard: pip install 'itm_nb[track]'",
    )
    return reader.EventAccumulator(str(track_place(run) / 'tensorboard')).Reload()


def assert_scalars_are_those_of_the_log(run):
    seen, want = opened(run), wanted(run)
    assert set(seen.Tags()['scalars']) == set(want) and {'train/loss', 'val/rsum', 'val/i2t/r1'} <= set(
        want
    )
    for k, rows in want.items():
        got = [(e.step, e.value) for e in seen.Scalars(k)]
        assert got == [(s, float(np.float32(v))) for s, v in rows], k
    return seen


def test_tensorboard_holds_the_numbers_of_the_log_and_pictures_of_picks(home):
    pytest.importorskip('tensorboard', reason="no tensorboard: pip install 'itm_nb[track]'")
    t = fit(config(TINY), home / 'told', data(home), progress=False, track='tensorboard')
    seen = assert_scalars_are_those_of_the_log(home / 'told')
    picks = seen.Images('picks')
    assert picks[-1].step == t.steps and picks[-1].encoded_image_string[:4] == b'\x89PNG'
    # a tracker changes no byte of a run, and nothing of it lies there
    assert all((home / 'told' / f).read_bytes() == (home / 'plain' / f).read_bytes() for f in FILES)
    assert not [p for p in (home / 'told').rglob('*') if 'tfevents' in p.name]


def test_a_training_that_was_cut_is_told_once(home):
    pytest.importorskip('tensorboard', reason="no tensorboard: pip install 'itm_nb[track]'")

    class Cut(Exception):
        pass

    def cut(step):
        if step == 17:
            raise Cut

    run = home / 'cut'
    with pytest.raises(Cut):
        fit(config(TINY), run, data(home), progress=False, track='tensorboard', on_step=cut)
    before = len(log_of(run))
    fit(config(TINY), run, data(home), progress=False, track='tensorboard')
    assert len(log_of(run)) >= before
    assert_scalars_are_those_of_the_log(run)


class Written:
    "A run of a tracker that writes down what it is told"

    def __init__(self, told, fails=False):
        self.told, self.fails, self.tables, self.ended = told, fails, [], 0

    def log(self, values, step=None):
        if self.fails:
            raise OSError('no network')
        self.told.append((step, values))

    def finish(self):
        self.ended += 1


def stand_in(monkeypatch, kind, fails=False):
    "A module in the place of wandb or trackio"
    m = types.ModuleType(kind)
    m.begun, m.settings, m.run = [], {}, Written([], fails)

    def init(**more):
        m.begun.append(more)
        return m.run

    m.init = init
    m.config = types.SimpleNamespace(update=lambda values, allow_val_change: m.settings.update(values))
    m.Image = lambda x: ('image', x.shape)
    m.Table = lambda columns, data, dataframe: (columns, data)
    monkeypatch.setitem(sys.modules, kind, m)
    return m


@pytest.mark.parametrize('kind', ('wandb', 'trackio'))
def test_the_other_two_are_called_as_accelerate_calls_them(home, monkeypatch, kind):
    m = stand_in(monkeypatch, kind)
    run = home / kind
    fit(config(TINY), run, data(home), progress=False, track=kind)
    got = {}
    for step, values in m.run.told:
        for k, v in values.items():
            if isinstance(v, (int, float)):
                got.setdefault(k, []).append((step, v))
    assert got == wanted(run) and m.run.ended == 1 and m.settings['epochs'] == TINY['epochs']
    pictures = [v for _, values in m.run.told for k, v in values.items() if k.startswith('picks')]
    flat = [x for v in pictures for x in (v if isinstance(v, list) else [v])]
    assert flat and all(x == ('image', (224, 326, 3)) for x in flat)
    (first,) = m.begun
    assert (
        first['project'] == 'itm_nb' and first['resume'] == 'allow' and first['name'].startswith(f'{kind}-')
    )
    # the same training once more: nothing is told twice, and it is the same run there
    n = len(got['train/loss'])
    fit(config(TINY), run, data(home), progress=False, track=kind)
    assert sum('train/loss' in v for _, v in m.run.told) == n and m.begun[1]['name'] == first['name']


def test_a_tracker_that_fails_harms_nothing(home, monkeypatch):
    stand_in(monkeypatch, 'trackio', fails=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        fit(config(TINY), home / 'failing', data(home), progress=False, track='trackio')
    assert len([w for w in said if 'no network' in str(w.message)]) == 1
    assert all((home / 'failing' / f).read_bytes() == (home / 'plain' / f).read_bytes() for f in FILES)


def test_a_tracker_that_is_not_there_is_refused_before_training(home, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(SetupError, match='pip install wandb'):
        fit(config(TINY), home / 'none', data(home), progress=False, track='wandb')
    assert not (home / 'none' / 'log.jsonl').exists() or not (home / 'none' / 'log.jsonl').read_text()


def test_the_command_tells_the_result_and_the_id_stays(tmp_path, monkeypatch):
    pytest.importorskip('tensorboard', reason="no tensorboard: pip install 'itm_nb[track]'")
    from itm_nb.cli import itm_run
    from itm_nb.runs.identity import run_id
    from itm_nb.runs.parameters import parameters
    from itm_nb.core.project import template

    monkeypatch.chdir(tmp_path)
    plain = {k: p.default for k, p in parameters(template('train')).items()}
    assert run_id('train', plain) == run_id('train', plain | dict(track='tensorboard'))
    asked = [x for k, v in (TINY | dict(track='tensorboard', out='run')).items() for x in ('-p', k, str(v))]
    assert itm_run(['train', *asked, '--quiet']) == 0
    seen = assert_scalars_are_those_of_the_log(Path('run'))
    (record,) = (json.loads(p.read_text()) for p in Path('records').glob('*.json'))
    text = seen.Tensors('result/text_summary')[-1].tensor_proto.string_val[0].decode()
    rows = [[c.strip() for c in l.strip('| ').split('|')] for l in text.splitlines()]
    for row in rows[2:]:
        told = dict(zip(rows[0], row))
        test = record['metrics']['test']
        assert float(told['r1']) == test[told['direction']]['r1'] and float(told['rsum']) == test['rsum']
    assert len(rows) == 4 and 'track' not in record['config']
