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

# Runs of the sweep that is killed. In each of three calls one ends and the next is met; two more begin when
# their server is gone
RUNS = 6


def fingerprints(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def finished(folder):
    "Finished rows of tables: run folder -> when it was finished (the report is made anew each time)"
    return {p.parent.name: p.stat().st_mtime_ns for p in Path(folder).glob('*/*/DONE') if p.parent.name != 'study'}


def small(folder, **parts):
    "A sweep of four runs of seconds"
    spec = yaml.safe_load((ROOT/'nbs'/'experiments'/'sweeps'/'tiny.yaml').read_text())
    f = Path(folder)/'toy.yaml'; f.write_text(yaml.safe_dump(spec | dict(blocks=[dict(seed=0)]) | parts)); return f


def kill_children(pid, how):
    "Also what the driver started, workers and kernels"
    import psutil
    for p in psutil.Process(pid).children(recursive=True):
        try: p.send_signal(how)
        except psutil.NoSuchProcess: pass


def until(what, seconds=300):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, 'waited too long'
        time.sleep(.05)


def written(folder):
    "How much the runs that train have written"
    return {p: p.stat().st_size for p in Path(folder).glob('toy/*/log.jsonl') if not (p.parent/'DONE').is_file()}


def interrupted(who, argv, runs):
    "A driver that is stopped by `who` while it is in a run, one more being finished; what was finished before"
    there, p = len(finished(runs)), command('itm_sweep', *argv)
    until(lambda: p.poll() is not None or len(finished(runs)) > there)
    so_far = written(runs); until(lambda: p.poll() is not None or written(runs) != so_far)
    early = finished(runs); assert there < len(early) < RUNS and p.poll() is None
    if who == 'driver': p.send_signal(signal.SIGKILL); p.communicate()
    elif who == 'stop': p.send_signal(signal.SIGTERM); p.communicate(timeout=120); assert p.returncode in (0, run_folder.RESUMABLE)
    else: kill_children(p.pid, signal.SIGKILL); p.communicate(timeout=600)
    return early


@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    "One sweep: SIGKILL of the driver, a polite stop, SIGKILL of workers and kernels; then the same command again"
    at = tmp_path_factory.mktemp('killed'); runs = at/'runs'
    arms = dict(vse0=dict(method='vse0'), vsepp=dict(method='vsepp', warmup=4))
    f = small(at, blocks=[dict(seed=s) for s in range(RUNS//2)], arms=arms, controls={})
    argv = (f, '--runs', runs, '--jobs', '1')
    early = {who: interrupted(who, argv, runs) for who in ('driver', 'stop', 'workers')}
    return argv, runs, early, call('itm_sweep', *argv)


@pytest.mark.parametrize('who', ['driver', 'stop', 'workers'])
def test_killed_in_the_middle_nothing_is_lost_or_repeated(who, killed):
    _, runs, early, (code, out, err) = killed
    assert code == 0, out + err
    assert len(finished(runs)) == RUNS
    assert early[who].items() <= finished(runs).items(), 'a finished run was run again'


def test_a_sweep_ends_with_tables_and_does_nothing_twice(killed):
    argv, runs, _, (code, out, err) = killed
    report = runs/'toy'/'report'; before, ends = fingerprints(report), finished(runs)
    assert len(ends) == RUNS and {'table_toy.md', 'table_toy.csv', 'dots_toy.svg'} <= set(before)
    assert str(report/'table_toy.md') in out
    code, out, err = call('itm_sweep', *argv); assert code == 0, out + err
    assert fingerprints(report) == before and f'{RUNS} of them finished before' in out
    assert finished(runs) == ends


def test_two_drivers_share_a_folder(tmp_path):
    "No run is run twice: papermill starts exactly one notebook per run"
    f = small(tmp_path); both = [command('itm_sweep', f, '--runs', tmp_path/'runs', '--jobs', '1') for _ in range(2)]
    said = []
    for p in both: out, err = p.communicate(timeout=600); assert p.returncode == 0, out + err; said.append(out)
    assert len(finished(tmp_path/'runs')) == 4 and all('oracle' in x and 'chance' in x for x in said)
    for log in (tmp_path/'runs'/'toy').glob('*/timing.jsonl'):
        steps = [json.loads(l)['step'] for l in log.read_text().splitlines()]
        assert steps == sorted(set(steps)), 'a run was done twice'
