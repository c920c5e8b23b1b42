"""Long acceptance runs are `pytest -m slow`; everything else is quick and needs nothing outside the repository."""
import json
import os
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')


def in_memory(at='/dev/shm', least=4*2**30):
    """A place for files that is memory, or None: it must have room, and programs there may be started.

    A run makes sure a dozen times that the disk has what it wrote: up to seconds of waiting, for files that
    are thrown away."""
    try:
        found = os.statvfs(at)
    except (OSError, AttributeError):      # no such place, or a system without this question
        return None
    room = found.f_bavail*found.f_frsize
    return at if room >= least and not found.f_flag & os.ST_NOEXEC and os.access(at, os.W_OK) else None


if MEMORY := in_memory():
    os.environ.setdefault('PYTEST_DEBUG_TEMPROOT', MEMORY)      # of `tmp_path`


@pytest.fixture
def disk_path():
    "A folder on the disk, for files that are larger than memory"
    with tempfile.TemporaryDirectory() as at:
        yield Path(at)


# The longest first: else a worker is left alone with one of them at the end
LONG = ('training/test_pretend_device.py', 'runs/test_kills.py', 'analysis/test_bench.py',
        'runs/test_warm.py', 'runs/test_sweeps.py', 'methods/test_seam.py', 'runs/test_ray.py',
        'runs/test_accelerator.py', 'runs/test_edges.py', 'methods/test_tags_runs.py', 'analysis/test_model_card.py',
        'training/test_scale.py', 'analysis/test_report.py', 'analysis/test_verdicts.py')
# Their tests make nothing that another of their file needs: each may go to another worker
APART = ('training/test_pretend_device.py', 'runs/test_warm.py')


def file_of(nodeid):
    "Below the folder of tests"
    return nodeid.partition('::')[0].removeprefix('tests/')


def place_of(nodeid):
    "Where a test stands in the queue"
    return LONG.index(file_of(nodeid)) if file_of(nodeid) in LONG else len(LONG)


def together(nodeid):
    "Tests with the same answer go to the same worker: those of a file, where nothing else is said"
    return nodeid if file_of(nodeid) in APART else nodeid.partition('::')[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "As `--dist loadfile`, but some files are taken apart"
    if config.getvalue('dist') != 'loadfile': return None
    from xdist.scheduler import LoadFileScheduling
    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid): return together(nodeid)
    return ByFile(config, log)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: place_of(item.nodeid))
    if 'slow' in (config.option.markexpr or ''): return
    for item in items:
        if 'slow' in item.keywords: item.add_marker(pytest.mark.skip(reason='long: run with -m slow'))


GOLDEN = ('aoq', 'fne', 'metrics', 'rivals', 'scan', 'state_dicts', 'state_dicts_fne_tags', 'tags')     # files, without .json
ABSENT = 'absent from the folder: '


def pytest_configure(config):
    "A folder of golden numbers that has none is a mistake in its name, not a reason to skip everything"
    folder = os.environ.get('ITM_GOLDEN')
    if not folder: return
    at = Path(folder)
    if any((at/f'{n}.json').is_file() for n in GOLDEN) or any((at/'traces').glob('*.npz')): return
    raise pytest.UsageError(f'ITM_GOLDEN={folder}: no golden numbers there; wanted a folder with {", ".join(n + ".json" for n in GOLDEN)} or traces/NAME.npz')


def pytest_addoption(parser):
    parser.addoption('--report', metavar='FILE', default='',
                     help='write how many tests of each file passed: the page "How sure are we?" reads it')


def counts(stats):
    "{file: {passed, skipped, failed}} of what pytest has seen"
    words = dict(passed='passed', xfailed='passed', skipped='skipped', failed='failed', error='failed')
    seen = Counter((r.nodeid.partition('::')[0], word) for k, word in words.items() for r in stats.get(k, []))
    files = sorted({f for f, _ in seen})
    return {f: {w: seen[f, w] for w in ('passed', 'skipped', 'failed')} for f in files}


def write_report(path, found, commit):
    "Renew the files that were run, keep the others; each says at which commit it ran"
    known = json.loads(path.read_text('utf-8')) if path.is_file() else {}
    known |= {f: n | dict(commit=commit) for f, n in found.items()}
    there = {f: known[f] for f in sorted(known) if (path.parent.parent/f).is_file()}
    path.write_text(json.dumps(there, indent=1) + '\n', 'utf-8')


def pytest_sessionfinish(session):
    "With --report: counts by file; a file of which only a part was asked for is not counted"
    at, option = session.config.getoption('--report'), session.config.option
    if not at or hasattr(session.config, 'workerinput') or option.collectonly: return
    part = option.keyword or any('::' in a for a in session.config.args)
    if part or option.markexpr: return
    stats = session.config.pluginmanager.get_plugin('terminalreporter').stats
    commit = subprocess.run(['git', 'rev-parse', '--short=12', 'HEAD'], cwd=Path(__file__).parent,
                            capture_output=True, text=True).stdout.strip()
    write_report(Path(at).resolve(), counts(stats), commit)


def pytest_terminal_summary(terminalreporter):
    "Golden blocks and traces that a folder does not have: how many, and which"
    why = [r.longrepr[2] for r in terminalreporter.stats.get('skipped', []) if isinstance(r.longrepr, tuple)]
    names = sorted({x.split(ABSENT)[1] for x in why if ABSENT in x})
    if names: terminalreporter.write_line(f'{len(names)} golden blocks absent and skipped: {", ".join(names)}')
