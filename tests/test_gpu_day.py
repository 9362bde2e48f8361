import pytest

from experiments import gpu_day
from experiments.gpu_day import Done, Part, in_order, log_of, outcomes, run_part, save


def test_finished_parts_are_skipped_and_failed_ones_come_last(tmp_path):
    wanted = [Part(name, ()) for name in ("a", "b", "c", "d")]
    done = {
        "a": Done("a", None, 600.0, "X", "1", False),
        "b": Done("b", 0, 3.0, "X", "1", False),
        "c": Done("c", 2, 3.0, "X", "1", False),
    }
    for part in done:
        log_of(tmp_path, part).write_text("words\nRESULT speed 1 >=2 short\n")
    save(tmp_path, done)
    assert outcomes(tmp_path) == done
    assert [part.name for part in in_order(wanted, done, "X", "1", False)] == ["d", "a", "c"]
    for other in (("Y", "1", False), ("X", "2", False), ("X", "1", True)):
        assert [part.name for part in in_order(wanted, done, *other)] == ["a", "b", "c", "d"]
    summary = (tmp_path / "summary.md").read_text()
    assert "X, 1: stopped after 10 minutes" in summary
    assert summary.count("RESULT speed 1") == 3


def test_a_part_is_stopped_in_time_with_all_its_processes(tmp_path):
    log = tmp_path / "part.txt"
    code, seconds = run_part(["-c", "import time; print('begun', flush=True); time.sleep(60)"], log, 1 / 60)
    assert code is None
    assert seconds < 10
    assert "begun" in log.read_text()
    assert run_part(["-c", "raise SystemExit(3)"], log, 1)[0] == 3


def test_a_missing_device_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_day, "device_name", lambda: "")
    monkeypatch.setattr("sys.argv", ["gpu_day", "--output", str(tmp_path / "out")])
    gpu_day.main()
    assert "no CUDA device was seen" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("sys.argv", ["gpu_day", "--quick", "--only", "int4", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="0"):
        gpu_day.main()
    assert "the GPU kernels stay untried" in capsys.readouterr().out
