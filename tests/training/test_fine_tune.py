"""`itm_run train -p folder PHOTOS -p model NAME`: from the command line to a finished run, without weights
of the world."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from itm_nb.cli import itm_run
from itm_nb.data.prepare import prepare
from itm_nb.runs.run_folder import done
from photos import folder_of, tiny_clip


def test_the_first_two_commands(tmp_path, capsys, monkeypatch):
    folder_of(tmp_path/'photos', 60, 6)
    tiny_clip(tmp_path/'models'/'tiny-clip')
    monkeypatch.chdir(tmp_path)
    prepare('photos')
    began = time.perf_counter()
    asked = ['train', '-p', 'folder', 'photos', '-p', 'model', 'tiny-clip', '-p', 'epochs', '2', '-p', 'out',
             'run']
    assert itm_run(asked) == 0
    said = capsys.readouterr()
    print(f'{time.perf_counter()-began:.0f} s', said.out)
    lines = said.out.splitlines()
    assert lines[0].startswith('tiny-clip, 54 pictures and 108 sentences to train on: tokenizer own')
    assert '(given: epochs, out)' in lines[0] and lines[-1] == 'finished: run'
    assert done(tmp_path/'run') and sorted(p.name for p in (tmp_path/'runs'/'states').glob('*.npy'))
    told = json.loads((tmp_path/'run'/'run.json').read_text())['identity']
    assert told['vision'] == told['text_model'] == 'tiny-clip' and told['epochs'] == 2 and 'model' not in told
    # the same command again: it is the same run
    assert itm_run(asked) == 0


def test_without_weights_one_message(tmp_path, capsys, monkeypatch):
    folder_of(tmp_path/'photos', 12, 0)
    monkeypatch.chdir(tmp_path)
    assert itm_run(['train', '-p', 'folder', 'photos', '-p', 'model', 'clip-vit-base-patch32']) == 2
    said = capsys.readouterr().err.strip()
    assert (len(said.splitlines()) == 1 and 'itm_data get clip-vit-base-patch32 models/' in said
            and 'drawn world' in said)
    assert not (tmp_path/'runs').exists()


class Timed:
    "Commands of this very environment in a folder, each timed by the clock and by the processor"
    def __init__(self, at):
        self.at, self.rows = at, {}
        self.env = os.environ | dict(HF_HUB_OFFLINE='1')

    def start(self, *command):
        return subprocess.Popen([sys.executable, '-m', 'itm_nb', *command], cwd=self.at, env=self.env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def spent(self):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)      # of those that have ended
        return time.perf_counter(), used.ru_utime + used.ru_stime

    def note(self, name, before):
        self.rows[name] = [round(b - a, 1) for a, b in zip(before, self.spent())]

    def run(self, *command):
        before = self.spent()
        p = self.start(*command)
        said = p.communicate()
        self.note(command[0], before)
        assert p.returncode == 0, said
        return said


@pytest.mark.slow
def test_three_commands_on_200_pictures_with_20_copies(tmp_path):
    "No refusal, and every picture is searched; -s shows seconds by the clock and by the processor"
    pytest.importorskip('starlette', reason="the page needs the extra `app`: pip install 'itm_nb[app]'")
    of = folder_of(tmp_path/'photos')
    tiny_clip(tmp_path/'models'/'tiny-clip')
    t = Timed(tmp_path)
    said, _ = t.run('data', 'prepare', 'photos')
    assert '20 copies of 20 pictures: 7 exact' in said and len(of) == 20
    said, _ = t.run('run', 'train', '-p', 'folder', 'photos', '-p', 'model', 'tiny-clip', '-p', 'out', 'run')
    assert said.splitlines()[-1] == 'finished: run'
    before = t.spent()
    p = t.start('search', 'run', 'photos', '--no-browser')
    lines = [p.stdout.readline(), p.stdout.readline()]
    assert lines[0].startswith('200 pictures, 400 sentences;'), (lines, p.communicate())
    t.rows['search, until it answers'] = [round(t.spent()[0] - before[0], 1)]
    here = lines[1].split()[0]
    get = lambda path: urllib.request.urlopen(here.rstrip('/') + path).read()
    first = time.perf_counter()
    found = json.loads(get('/api/find?q=it+is+007'))
    t.rows['a question'] = [round(time.perf_counter() - first, 2)]
    assert found['said'] == 'the best 48 of 200'
    names = {json.loads(get(f'/api/picture/{i}?q='))['name'] for i in range(200)}
    assert names == {f'Images/{f.name}' for f in (tmp_path/'photos'/'Images').iterdir()} and len(names) == 200
    p.send_signal(signal.SIGINT)
    assert p.wait(60) == 0 and p.stderr.read() == ''
    t.note('search, with 200 pictures looked at', before)
    print(t.rows)
