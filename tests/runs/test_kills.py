"""Drivers and workers of sweeps are killed at any moment: nothing is lost, nothing is run twice."""
import hashlib
import json
import signal
import time
from pathlib import Path

import pytest
import yaml
from test_runs import ROOT, call, command

from itm_nb.runs import run_folder


def fingerprints(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def finished(folder):
    "Finished rows of tables: run folder -> when it was finished (the report is made anew each time)"
    return {p.parent.name: p.stat().st_mtime_ns for p in Path(folder).glob('*/*/DONE') if p.parent.name != 'study'}


def small(folder):
    "A sweep of four runs of seconds"
    spec = yaml.safe_load((ROOT/'nbs'/'experiments'/'sweeps'/'tiny.yaml').read_text())
    f = Path(folder)/'toy.yaml'; f.write_text(yaml.safe_dump(spec | dict(blocks=[dict(seed=0)]))); return f


def test_a_sweep_ends_with_tables_and_does_nothing_twice(tmp_path):
    f = small(tmp_path)
    code, out, err = call('itm_sweep', f, '--runs', tmp_path/'runs'); assert code == 0, out + err
    report = tmp_path/'runs'/'toy'/'report'; before, ends = fingerprints(report), finished(tmp_path/'runs')
    assert len(ends) == 4 and {'table_toy.md', 'table_toy.csv', 'dots_toy.svg'} <= set(before)
    assert 'oracle' in out and 'chance' in out and str(report/'table_toy.md') in out
    code, out, err = call('itm_sweep', f, '--runs', tmp_path/'runs'); assert code == 0, out + err
    assert fingerprints(report) == before and '4 of them finished before' in out
    assert finished(tmp_path/'runs') == ends


def kill_children(pid, how):
    "Also what the driver started, workers and kernels"
    import psutil
    for p in psutil.Process(pid).children(recursive=True):
        try: p.send_signal(how)
        except psutil.NoSuchProcess: pass


@pytest.mark.parametrize('who', ['driver', 'workers', 'stop'])
def test_killed_in_the_middle_nothing_is_lost_or_repeated(who, tmp_path):
    "SIGKILL of the driver, of its workers and kernels, or a polite stop; then the same command again"
    f = small(tmp_path); argv = (f, '--runs', tmp_path/'runs', '--jobs', '1')
    p = command('itm_sweep', *argv)
    for _ in range(1200):
        if finished(tmp_path/'runs'): break
        time.sleep(.1)
    time.sleep(3.)                                            # into the second run
    early = finished(tmp_path/'runs'); assert 0 < len(early) < 4
    if who == 'driver': p.send_signal(signal.SIGKILL); p.communicate()
    elif who == 'stop': p.send_signal(signal.SIGTERM); p.communicate(timeout=120); assert p.returncode in (0, run_folder.RESUMABLE)
    else: kill_children(p.pid, signal.SIGKILL); p.communicate(timeout=600)
    code, out, err = call('itm_sweep', *argv); assert code == 0, out + err
    assert len(finished(tmp_path/'runs')) == 4
    assert early.items() <= finished(tmp_path/'runs').items(), 'a finished run was run again'


def test_two_drivers_share_a_folder(tmp_path):
    "No run is run twice: papermill starts exactly one notebook per run"
    f = small(tmp_path); both = [command('itm_sweep', f, '--runs', tmp_path/'runs', '--jobs', '1') for _ in range(2)]
    for p in both: out, err = p.communicate(timeout=600); assert p.returncode == 0, out + err
    assert len(finished(tmp_path/'runs')) == 4
    for log in (tmp_path/'runs'/'toy').glob('*/timing.jsonl'):
        steps = [json.loads(l)['step'] for l in log.read_text().splitlines()]
        assert steps == sorted(set(steps)), 'a run was done twice'
