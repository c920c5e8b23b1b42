"""`itm_run train -p folder PHOTOS -p model NAME`: from the command line to a finished run, without weights
of the world."""
import json
import time

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
