"""The accelerator's notebook at its tiny size: the same cells as on a GPU, on the CPU, through the same command."""
import csv
import json
import time

from PIL import Image

from itm_nb.cli import itm_data, itm_run
from itm_nb.data.scan_layout import write_toy



def rows(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def test_the_whole_kit_on_a_cpu(tmp_path, capsys):
    began, out = time.perf_counter(), tmp_path/'kit'
    assert itm_run(['accelerator', '-p', 'out', str(out), '--quiet']) == 0
    checks, costs, study = (rows(out/f'accelerator_{n}.csv') for n in ('checks', 'costs', 'study'))
    assert [r['ok'] for r in checks] == ['True']*len(checks) and len(checks) == 5
    assert any('killed 1 times (met: 1)' in r['check'] for r in checks)
    assert {r['what'] for r in costs} == {'evaluation', 'mining, torch', 'attention', 'step of training'}
    assert all(float(r['ratio']) > 0 for r in costs)
    assert {r['method'] for r in study} == {'vse0', 'vsepp'} and all(float(r['rsum']) > 0 for r in study)
    about = json.loads((out/'accelerator_records.json').read_text())
    assert about['checks'] is True and about['size'] == 'tiny'
    assert sorted(r['method'] for r in about['records']) == ['vse0', 'vsepp']
    made = sorted(out.glob('accelerator*'))
    assert len(made) <= 8 and all(p.stat().st_size < 16*2**20 for p in made)
    assert Image.open(out/'accelerator.png').size[0] > 300
    with capsys.disabled():
        print(f'\nthe kit: {time.perf_counter()-began:.0f} s')


def test_the_pack_is_weighed_by_the_command(tmp_path, capsys):
    (tmp_path/'toy').mkdir()
    write_toy(tmp_path/'toy')
    to = tmp_path/'pack'
    assert itm_data(['accelerator-pack', str(to), '--data', str(tmp_path/'toy'), '--dims', '4']) == 0
    said = capsys.readouterr().out
    assert 'features' in said and 'in all, at most 64 MiB' in said and (to/'run.sh').is_file()
    assert itm_data(['accelerator-pack', str(to), '--data', str(tmp_path/'toy')]) != 0
    assert 'something there already' in capsys.readouterr().err
