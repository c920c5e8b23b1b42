"""Long acceptance runs are `pytest -m slow`; everything else is quick and needs nothing outside the repository."""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')


def pytest_collection_modifyitems(config, items):
    import pytest
    if 'slow' in (config.option.markexpr or ''): return
    for item in items:
        if 'slow' in item.keywords: item.add_marker(pytest.mark.skip(reason='long: run with -m slow'))
