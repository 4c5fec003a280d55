"""Trackers listen; what they do never stops a training, and what they lack is said before it begins."""

import pytest

from ldmcli.core.errors import InputError, UsageError
from ldmcli.training import trackers
from ldmcli.training.trackers import Trackers, open_trackers


class Recorder:
    """A tracker that keeps what it is told, and fails from `until` calls on."""

    def __init__(self, until=99):
        self.told, self.until, self.settings = [], until, None

    def start(self):
        print("a tracker that chats")

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step):
        if len(self.told) >= self.until:
            raise ConnectionError("gone")
        self.told.append((step, values))

    def finish(self):
        self.told.append("finished")


def test_an_unknown_tracker_is_refused_with_the_near_one(tmp_path):
    with pytest.raises(UsageError, match="tensorbord.*did you mean.*tensorboard"):
        open_trackers(("tensorbord",), tmp_path, {})


def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"wandb is missing: pip install 'ldm-toolkit\[trackers\]'"):
        open_trackers(("wandb",), tmp_path, {})


def test_a_tracker_that_fails_warns_once_and_the_others_go_on(capsys):
    bad, good = Recorder(until=1), Recorder()
    both = Trackers({"bad": bad, "good": good})
    for step in range(4):
        both.log({"loss": 1.0}, step=step)
    both.close()
    assert capsys.readouterr().err.count("ldm: warning: --track bad: stopped (gone); training goes on") == 1
    assert [step for step, _ in good.told[:-1]] == [0, 1, 2, 3] and good.told[-1] == "finished"


def test_trackers_keep_stdout_clean_and_get_no_secrets(tmp_path, monkeypatch, capsys):
    recorder = Recorder()
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    monkeypatch.setitem(trackers.TRACKERS, "trackio", lambda run: recorder)
    open_trackers(("trackio",), tmp_path, {"a": "x hf_abcdefgh", "b": (1, 2), "c": 0.5, "d": True})
    assert recorder.settings == {"a": "x <HF_TOKEN>", "b": "1, 2", "c": 0.5, "d": True}
    assert capsys.readouterr().out == ""


def test_a_tracker_that_cannot_start_is_named(tmp_path, monkeypatch):
    def fail(run):
        raise RuntimeError("no login\nsecond line")

    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", fail)
    with pytest.raises(InputError, match="--track wandb: cannot start .no login second line.; .*--offline"):
        open_trackers(("wandb",), tmp_path, {})


def test_wandb_stays_offline_where_nothing_may_be_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert trackers._wandb(tmp_path).init_kwargs["mode"] == "offline"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert "mode" not in trackers._wandb(tmp_path).init_kwargs
