"""What ends a run is said in one line: a loss that is no number, an exception of one's own method, no memory, no disk, no kernel."""
import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from itm_nb.runs import execution
from itm_nb.training import loop
from itm_nb.training.config import config, Config

ROOT = Path(__file__).parents[2]
TINY = Config(preset='tiny', dim=16, d_word=8, image_hidden=0, epochs=2, batch=32, dropout=0.)
NAN = "float('nan')"


def own(folder, broken=NAN, steps=4):
    "A method of one's own that goes wrong in a step: its term is `broken` from then on"
    file = Path(folder)/'mine.py'
    file.write_text(f"""from dataclasses import replace
from itm_nb.methods.method import Method, vsepp

def go(margin=.2):
    m, calls = vsepp(margin), []
    def cost(n):
        calls.append(1)
        if len(calls) <= {2*(steps-1)}: return m.terms['hardest'].cost(n)
        return m.terms['hardest'].cost(n)*({broken})
    return Method(m.sources, dict(hardest=replace(m.terms['hardest'], cost=cost)))
""")
    return file


@pytest.mark.parametrize('broken', [NAN, "float('inf')"])
def test_a_loss_that_is_no_number_ends_the_run_at_once(broken, tmp_path):
    "The step, the method, the term, the learning rate; what was saved stays what it was"
    file = own(tmp_path, broken); cfg = config(asdict(TINY) | dict(method=f'{file}:go', lr=.01, decay='none')); done = []
    with pytest.raises(loop.NotFinite, match=r'step 4 of \d+ \(epoch 1\), method .*mine.py:go: hardest/i2t is (nan|inf), hardest/t2i is (nan|inf).*learning rate 0\.01') as e:
        loop.fit(cfg, tmp_path/'run', progress=False, allow_code=True, on_step=done.append)
    assert done == [1, 2, 3, 4] and '\n' not in str(e.value) and not (tmp_path/'run'/'last').exists()


def test_a_device_that_is_not_waited_for_names_the_same_step(tmp_path, monkeypatch):
    "As on an accelerator: asked only where the loss is read, the first wrong step is named, and nothing is saved after it"
    monkeypatch.setattr(loop, '_waits', lambda t, *there: any(there)); done = []
    with pytest.raises(loop.NotFinite, match='step 4 of'):
        loop.fit(config(asdict(TINY) | dict(method=f'{own(tmp_path, NAN)}:go')), tmp_path/'run', progress=False, allow_code=True, on_step=done.append)
    assert len(done) > 4 and not (tmp_path/'run'/'last').exists()


def test_a_gradient_that_is_no_number_is_named(tmp_path):
    "The loss is finite, its gradient is not"
    file = own(tmp_path); file.write_text(file.read_text().replace(f"({NAN})", "(1. + (n['on.pos']*0).abs().sqrt().sum())"))
    with pytest.raises(loop.NotFinite, match='the gradient is nan'):
        loop.fit(config(asdict(TINY) | dict(method=f'{file}:go')), tmp_path/'run', progress=False, allow_code=True)


def test_asking_does_not_change_the_run(tmp_path):
    t = loop.fit(TINY, tmp_path/'run', progress=False); assert not t.recent or len(t.recent) <= 1
    assert 'recent' not in json.dumps(loop._pack(t)[1]) and not any('recent' in k for k in loop._pack(t)[0])


def book(path, *cells):
    "A notebook that runs these cells, without torch"
    cell = lambda i, s, **m: dict(cell_type='code', execution_count=None, metadata=m, outputs=[], source=s, id=str(i))
    made = [cell(0, "out = ''", tags=['parameters']), *(cell(i, s) for i, s in enumerate(cells, 1))]
    path.write_text(json.dumps(dict(cells=made, metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')), nbformat=4, nbformat_minor=5)))
    return path


def ended(tmp_path, capsys, *cells):
    "Exit code, the one line that was said, what FAILED holds"
    code, out = execution.start(str(book(tmp_path/'b.ipynb', *cells)), dict(out=str(tmp_path/'run')), bar=False)
    said = capsys.readouterr().err.strip().splitlines(); lines = [l for l in said if 'IPKernelApp' not in l]
    assert len(lines) == 1 and 'Traceback' not in lines[0] and not (out/'DONE').exists()
    return code, lines[0], (out/'FAILED').read_text('utf-8')


def test_an_exception_of_ones_own_code_is_said_with_its_file_and_line(tmp_path, capsys):
    (tmp_path/'tool.py').write_text('def go(x):\n    y = 1\n    return y/x\n')
    code, line, why = ended(tmp_path, capsys, f'import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport tool\ntool.go(0)')
    assert code == 1 and why == f'ZeroDivisionError: division by zero ({tmp_path/"tool.py"}, line 3)' and why in line


def test_no_memory_is_said_as_that(tmp_path, capsys):
    "Also where there is not even memory for the error: the kernel ends a cell without a reason"
    for n in 'ab': (tmp_path/n).mkdir()
    assert ended(tmp_path/'a', capsys, 'bytearray(10**15)')[2].startswith('not enough memory; use smaller settings')
    limit = 'import resource; resource.setrlimit(resource.RLIMIT_AS, (600*2**20,)*2)'
    assert 'not enough memory; use smaller settings' in ended(tmp_path/'b', capsys, limit, 'x = [bytearray(10**7) for i in range(200)]')[2]


@pytest.mark.parametrize('error,wanted', [(OSError(errno.ENOSPC, 'No space left on device', 'run.ipynb'), 'make room on the disk'), (PermissionError(errno.EROFS, 'Read-only file system', 'run.ipynb'), 'can be written'),
                                          (MemoryError(), 'not enough memory'), (RuntimeError('Kernel died before replying to kernel_info'), 'jupyter kernelspec list')])
def test_what_papermill_itself_ends_in(error, wanted, tmp_path, capsys, monkeypatch):
    import papermill
    def fall(*a, **k): raise error
    monkeypatch.setattr(papermill, 'execute_notebook', fall)
    code, line, why = ended(tmp_path, capsys, '1'); assert code == 1 and wanted in why and why in line


def test_a_full_disk_that_cannot_even_hold_the_reason(tmp_path, capsys):
    out = tmp_path/'run'; out.mkdir(); (out/'FAILED').mkdir()
    assert execution.mark_failed(out, 'why', 'train: why') == 1 and 'FAILED could not be written' in capsys.readouterr().err


def no_kernel(folder):
    "Environment in which a kernel called python3 is found that cannot start"
    at = folder/'jp'/'kernels'/'python3'; at.mkdir(parents=True)
    (at/'kernel.json').write_text(json.dumps(dict(argv=['/bin/false', '-f', '{connection_file}'], display_name='gone', language='python')))
    return os.environ | dict(PYTHONPATH=str(ROOT), JUPYTER_PATH=str(folder/'jp'))


def test_a_kernel_that_cannot_start(tmp_path):
    "Case 19: status 1, one line, the reason in FAILED"
    env = no_kernel(tmp_path)
    code = 'from itm_nb.cli import itm_run; itm_run()'
    r = subprocess.run([sys.executable, '-c', code, 'train', '-p', 'preset', 'tiny', '-p', 'epochs', '1', '--quiet'], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (r.returncode, r.stdout, r.stderr.count('\n')) == (1, '', 1) and 'kernel python3 cannot start' in r.stderr
    failed, = tmp_path.glob('runs/manual/*/FAILED'); assert failed.read_text().startswith('the kernel python3 cannot start') and failed.read_text() in r.stderr


def test_a_sweep_whose_kernels_cannot_start(tmp_path):
    "Case 19, the sweep: status 1, one line that says where, the reason in FAILED and in --status"
    spec = 'title: small\nbase: {preset: tiny, epochs: 1}\nblocks: [{seed: 0}]\narms: {vsepp: {}}\n'
    (tmp_path/'s.yaml').write_text(spec)
    env = no_kernel(tmp_path)
    def sweep(*argv):
        code = 'from itm_nb.cli import itm_sweep; itm_sweep()'
        return subprocess.run([sys.executable, '-c', code, 's.yaml', *argv], capture_output=True, text=True,
                              cwd=tmp_path, env=env)
    r = sweep()
    failed, = tmp_path.glob('runs/s/*/FAILED')
    assert r.returncode == 1 and 'Traceback' not in r.stdout + r.stderr, r.stderr
    assert failed.read_text().startswith('the kernel python3 cannot start')
    named, = re.findall('failed [(]1[)]; see (runs/s/.+)', r.stderr)          # one line, and where to look
    assert 'the kernel python3 cannot start' in (tmp_path/named.strip()).read_text()
    asked = sweep('--status')
    line, = asked.stdout.splitlines()
    assert asked.returncode == 0 and line.startswith('failed: the kernel python3 cannot start')


@pytest.mark.slow
def test_a_run_that_diverges_is_failed_and_says_so(tmp_path):
    "Through papermill, as a person runs it (case: status FAILED, one line)"
    own(tmp_path); env = os.environ | dict(PYTHONPATH=str(ROOT))
    argv = ['train', '-p', 'preset', 'tiny', '-p', 'epochs', '1', '-p', 'method', 'mine.py:go', '-p', 'out', 'run', '--quiet']
    r = subprocess.run([sys.executable, '-c', 'from itm_nb.cli import itm_run; itm_run()', *argv], capture_output=True, text=True, cwd=tmp_path, env=env)
    why = (tmp_path/'run'/'FAILED').read_text(); assert r.returncode == 1 and re.match(r'NotFinite: step 4 of \d+ \(epoch 1\), method mine.py:go: hardest/i2t is nan', why), r.stderr
    assert [l for l in r.stderr.splitlines() if 'IPKernelApp' not in l] == [f'train: {why}; see run/run.ipynb']
