"""Progress of a training: in a terminal a bar of steps, in a pipe nothing."""
import io
import json
import os

from itm_nb.runs.execution import steps_shown
from itm_nb.training.config import config
from itm_nb.training.corpus import corpus
from itm_nb.training.loop import fit


class Terminal(io.StringIO):
    def isatty(self): return True


def test_a_training_is_seen_from_outside(tmp_path, capsys):
    "Steps to the last, loss, pairs a second, validation - as the log has them"
    cfg = config(dict(preset='tiny', dim=16, d_word=8, image_hidden=16, epochs=2, batch=50))
    out = Terminal()
    with steps_shown(True, out):
        assert 'ITM_PROGRESS' in os.environ
        t = fit(cfg, tmp_path/'run', corpus(cfg, cache=tmp_path/'worlds'), progress=False)
    assert 'ITM_PROGRESS' not in os.environ
    lines = [json.loads(l) for l in (tmp_path/'run'/'log.jsonl').read_text().splitlines()]
    last = out.getvalue().split('\r')[-1]
    assert f'{t.steps}/{t.steps}' in last and 'pairs/s' in last and last.startswith('vsepp: 100%')
    assert f'val rSum {lines[-1]["val"]["rsum"]:.1f}' in last or f'loss {lines[-2]["loss"]:.3f}' in last
    assert not list(tmp_path.glob('**/progress.json'))


def test_nothing_is_shown_in_a_pipe(capsys):
    out = io.StringIO()
    with steps_shown(True, out):
        assert 'ITM_PROGRESS' not in os.environ
    with steps_shown(False, Terminal()):
        assert 'ITM_PROGRESS' not in os.environ
    assert out.getvalue() == ''
