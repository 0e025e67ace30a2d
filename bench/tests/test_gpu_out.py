"""`make gpu` before its first stage: which folder it takes, and what that does not cost."""

import os
import subprocess

import pytest

from bench.gpu import live, out, run, stages


def test_two_runs_do_not_share_a_folder(tmp_path):
    """The second is refused before it removes what the first has found; a folder that nobody writes to is free."""
    held = out.hold(tmp_path)
    (tmp_path / "results.jsonl").write_text("found")
    for refused in (out.prepare, out.set_aside):
        with pytest.raises(out.Refused, match=r"OUT: another make gpu writes to .*; wait for it"):
            refused(tmp_path)
    assert (tmp_path / "results.jsonl").read_text() == "found"
    out.release(held)
    assert out.prepare(tmp_path) == ["results.jsonl"]


def test_a_second_list_keeps_what_the_first_found(tmp_path):
    """`make gpu`, then `make gpu STAGES=second`: neither names a folder."""
    assert out.set_aside(tmp_path / "gpu") is None
    for n in (1, 2):
        (tmp_path / "gpu").mkdir()
        (tmp_path / "gpu" / "results.jsonl").write_text(str(n))
        assert out.set_aside(tmp_path / "gpu") == tmp_path / f"gpu-{n}"
        assert (tmp_path / f"gpu-{n}" / "results.jsonl").read_text() == str(n)


def test_a_folder_is_shown_as_short_as_it_can_be(tmp_path, monkeypatch):
    """What is shown is committed by `make gpu-report`, and a `~` that the shell has left is no folder's name."""
    shown = []
    monkeypatch.setattr(run, "Run", lambda table, asked, given: shown.append(given.out) or 1 / 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for folder in (str(tmp_path / "here"), "there", "~/x", "/else"):
        with pytest.raises(ZeroDivisionError):
            run.main(["--out", folder])
    assert list(map(str, shown)) == ["here", "there", "/home/me/x", "/else"]


def test_the_machine_is_named_whatever_make_says(tmp_path, monkeypatch):
    """Without torch both attempts of make fail; the second half says what to install."""
    (tmp_path / "make").write_text("#!/bin/sh\nexit 2\n")
    (tmp_path / "make").chmod(0o755)
    shell, c, script, _ = stages.build_command()
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([shell, c, script, "echo"], env=env, capture_output=True, text=True)
    assert done.stdout == "bench/gpu/stage.py live\n" and done.returncode == 0


def test_what_a_run_leaves_in_the_tree_is_no_change(monkeypatch, tmp_path):
    """Folders of results and a report are none, changed code is one."""

    def git(*words):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *words], cwd=tmp_path, check=True)

    for name in ("README.md", "docs/benchmarks.md", "bench/results/a.md", "code.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "m"]):
        git(*words)
    monkeypatch.delenv("FLATKERN_COMMIT", raising=False)
    monkeypatch.setattr(live, "ROOT", tmp_path)
    for name in ("README.md", "docs/benchmarks.md", "bench/results/a.md", "out"):
        (tmp_path / name).write_text("anew")
    assert live.commit()["dirty"] is False
    (tmp_path / "code.py").write_text("anew")
    assert live.commit()["dirty"] is True


def test_where_this_tree_lies_is_not_written(tmp_path, monkeypatch):
    """Neither in what stages print, nor in what tools write themselves; a home that is / is part of every path."""
    monkeypatch.setattr(out, "PLACES", {"/home/me/flatkern": ".", "/home/me": "~", "/": "~"})
    text = "/home/me/flatkern/bench/gpu/run.py, /home/me/.venv/bin/python, /usr/bin/ncu"
    short = "./bench/gpu/run.py, ~/.venv/bin/python, /usr/bin/ncu"
    assert out.placeless(text) == short
    files = out.Out(tmp_path)
    for name in out.OTHERS:
        (tmp_path / name).write_text(text)
    files.end_of("ncu")
    assert all((tmp_path / name).read_text() == short for name in out.OTHERS) and files.errors() == {}
