"""Long acceptance runs are `pytest -m slow`; everything else is quick and needs nothing outside the repository."""
import os
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')


def pytest_collection_modifyitems(config, items):
    import pytest
    if 'slow' in (config.option.markexpr or ''): return
    for item in items:
        if 'slow' in item.keywords: item.add_marker(pytest.mark.skip(reason='long: run with -m slow'))


GOLDEN = ('aoq', 'fne', 'metrics', 'rivals', 'scan', 'state_dicts', 'state_dicts_fne_tags', 'tags')     # files, without .json
ABSENT = 'absent from the folder: '


def pytest_configure(config):
    "A folder of golden numbers that has none is a mistake in its name, not a reason to skip everything"
    import pytest
    folder = os.environ.get('ITM_GOLDEN')
    if not folder: return
    at = Path(folder)
    if any((at/f'{n}.json').is_file() for n in GOLDEN) or any((at/'traces').glob('*.npz')): return
    raise pytest.UsageError(f'ITM_GOLDEN={folder}: no golden numbers there; wanted a folder with {", ".join(n + ".json" for n in GOLDEN)} or traces/NAME.npz')


def pytest_terminal_summary(terminalreporter):
    "Golden blocks and traces that a folder does not have: how many, and which"
    why = [r.longrepr[2] for r in terminalreporter.stats.get('skipped', []) if isinstance(r.longrepr, tuple)]
    names = sorted({x.split(ABSENT)[1] for x in why if ABSENT in x})
    if names: terminalreporter.write_line(f'{len(names)} golden blocks absent and skipped: {", ".join(names)}')
