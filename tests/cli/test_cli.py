import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from devices import needs_device
from mpq.cli.main import grammar, main
from mpq.core.allocation import Allocation
from mpq.core.frontier import SavedFrontier
from mpq.core.table import SensitivityTable

FEW = ["--formats", "int2-g32,int4-g32,int8-channel", "--nsamples", "16", "--metric", "fisher"]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "table.csv"
    assert main(["profile", "tiny-cnn", "-o", str(path), *FEW]) == 0
    return path


@pytest.fixture(scope="module")
def out(tmp_path_factory, table) -> Path:
    folder = tmp_path_factory.mktemp("quantize") / "out"
    assert main(["quantize", "tiny-cnn", "--bits", "4.25", "--table", str(table), "-o", str(folder), *FEW]) == 0
    return folder


def test_quantize_writes_every_artefact(out):
    names = {path.name for path in out.iterdir()}
    wanted = {
        "model.safetensors",
        "config.json",
        "allocation.json",
        "table.csv",
        "frontier.csv",
        "frontier.png",
        "report.html",
    }
    assert wanted <= names
    assert not [name for name in names if "unfinished" in name or name.startswith(".")]
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mpq"
    assert Allocation.load(out / "allocation.json").bits <= 4.25
    report = (out / "report.html").read_text()
    assert report.count("<svg") == 4
    assert "http://" not in report.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_a_result_is_repeated_from_its_recipe_and_kept_from_other_settings(out, table, tmp_path, capsys):
    job = ["quantize", "--recipe", str(out / "recipe.yaml"), "-o"]
    assert main([*job, str(tmp_path / "again"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bits"] == Allocation.load(out / "allocation.json").bits
    assert facts["activations"] > 0
    assert facts["measured"][-1]["bytes"] == (tmp_path / "again" / "model.safetensors").stat().st_size
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert main([*job, str(tmp_path / "again"), "--bits", "5"]) == 2
    assert "give --force" in capsys.readouterr().err
    assert main(["-q", *job, str(tmp_path / "again"), "--bits", "5", "--force"]) == 0
    assert capsys.readouterr() == ("", "")
    assert Allocation.load(tmp_path / "again" / "allocation.json").bits > 4.25


def test_commands_answer_in_json(out, table, capsys):
    assert main(["eval", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "accuracy"
    assert main(["allocate", str(table), "--bits", "4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bits"] <= 4
    assert len(facts["schemes"]) == 12


def test_metric_options_are_passed_to_the_metric(tmp_path, capsys):
    job = ["profile", "tiny-cnn", "-o", str(tmp_path / "t.csv"), "--formats", "int4-g32", "--nsamples", "4"]
    assert main([*job, "--metric", "hessian", "--metric-option", "max_probes=2", "--include", "stem"]) == 0
    assert SensitivityTable.load(tmp_path / "t.csv").provenance["options"] == {"max_probes": 2}
    capsys.readouterr()
    assert main([*job, "--metric", "hessian", "--metric-option", "max_probs=2"]) == 2
    assert "did you mean max_probes" in capsys.readouterr().err


def test_the_version_is_reported(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("mpq 0.")


def test_every_option_has_help():
    for command in grammar()[1].values():
        for action in command._actions:
            assert action.help, action


def test_eval_measures_what_quantize_printed(out, capsys):
    assert main(["eval", str(out)]) == 0
    said = capsys.readouterr().out
    assert "accuracy" in said
    assert re.search(r"KL from the original 0\.\d+ \+- .*, same top choice \d+", said)
    assert f"{Allocation.load(out / 'allocation.json').bits:.3f} bits" in said


def test_allocate_export_eval_in_steps(table, tmp_path, capsys):
    chosen = tmp_path / "allocation.json"
    assert main(["allocate", str(table), "--bits", "5", "-o", str(chosen), "--pin", "stem=int8-channel"]) == 0
    assert Allocation.load(chosen).scheme_of["stem"].name == "int8-channel"
    assert main(["export", "tiny-cnn", str(chosen), "-o", str(tmp_path / "out")]) == 0
    assert main(["eval", str(tmp_path / "out")]) == 0
    assert "accuracy" in capsys.readouterr().out
    again = ["export", "tiny-cnn", str(chosen), "-o", str(tmp_path / "out")]
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert main([*again, "--method", "nearest"]) == 2
    assert "other settings (method was the default): give --force" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert main(again) == 0
    assert main([*again, "--method", "nearest", "--force"]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before


def test_export_does_not_overwrite_the_result_of_a_whole_job(out, table, tmp_path, capsys):
    assert main(["allocate", str(table), "--bits", "5", "-o", str(tmp_path / "a.json")]) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert main(["export", "tiny-cnn", str(tmp_path / "a.json"), "-o", str(out)]) == 2
    assert "holds a result of other settings" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_graph_for_onnx_runtime_is_traced_with_the_calibration_data(table, tmp_path, capsys):
    pytest.importorskip("onnx")
    chosen = tmp_path / "allocation.json"
    job = ["allocate", str(table), "--bits", "9", "--by", "integer", "--pin", "*=int8-channel", "-o", str(chosen)]
    assert main(job) == 0
    assert main(["export", "tiny-cnn", str(chosen), "--to", "onnx", "-o", str(tmp_path / "out")]) == 0
    assert list((tmp_path / "out").glob("*.onnx"))


def test_allocate_takes_sizes_and_several_budgets(table, capsys):
    assert main(["allocate", str(table), "--size", "60kB"]) == 0
    assert main(["allocate", str(table), "--bits", "6", "--budget", "bitops=1e9"]) == 0
    said = capsys.readouterr().out
    assert "stage1.conv1" in said
    assert "proven optimal" in said


def test_allocate_finds_the_smallest_of_a_quality(table, tmp_path, capsys):
    path = tmp_path / "allocation.json"
    assert main(["allocate", str(table), "--bits", "4", "-o", str(path)]) == 0
    chosen = Allocation.load(path)
    assert main(["allocate", str(table), "--loss", repr(chosen.loss * (1 + 1e-9)), "-o", str(path)]) == 0
    assert Allocation.load(path).schemes == chosen.schemes  # exact: no smaller allocation is as good
    assert main(["allocate", str(table), "--loss", repr(chosen.loss * (1 - 1e-6)), "-o", str(path)]) == 0
    assert Allocation.load(path).size > chosen.size
    assert main(["allocate", str(table), "--loss", "1e-9"]) == 2
    assert "can be reached" in capsys.readouterr().err
    for wrong, message in (
        (["--bits", "4", "--by", "cheapest"], "give loss instead"),
        (["--loss", "1", "--by", "evolution"], "leave the search out"),
        (["--loss", "1", "--measure-frontier"], "needs a search on measured loss"),
    ):
        assert main(["allocate", str(table), *wrong]) == 2
        assert message in capsys.readouterr().err


def test_allocate_answers_without_torch(table):
    code = "import sys; from mpq.cli.main import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code, "allocate", str(table), "--bits", "4"], check=True, stdout=subprocess.PIPE
    )


def test_help_answers_without_torch():
    code = "import sys; from mpq.cli.main import parser; parser().format_help(); assert 'torch' not in sys.modules"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.perf_counter() - start < 10  # 0.1 s on an idle machine


def test_plot_draws_tables_and_folders(table, out, tmp_path):
    for name in ("one.png", "two.svg"):
        assert main(["plot", str(table), str(out), "-o", str(tmp_path / name)]) == 0
        assert (tmp_path / name).stat().st_size > 10_000


def test_formats_lists_all_and_describes_one(capsys):
    assert main(["formats"]) == 0
    assert main(["formats", "fp4-e2m1-g32", "bf16"]) == 0
    said = capsys.readouterr().out
    assert "nvfp4" in said
    assert "-6 -4 -3 -2 -1.5 -1 -0.5 0 0.5 1 1.5 2 3 4 6" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "tiny-cmm", "--bits", "4", "-o", "x"], "did you mean tiny-lm or tiny-cnn"),
        (["quantize", "tiny-cnn", "--bits", "4", "-o", "x", "--formats", "int4-g129x"], "unknown format"),
        (["quantize", "tiny-cnn", "--bits", "4", "-o", "x", "--exclude", "nothing*"], "matches nothing"),
        (["quantize", "tiny-cnn", "--bits", "inf", "-o", "x", *FEW], "invalid budget of inf"),
        (["quantize", "tiny-cnn", "--bits", "1", "-o", "x", *FEW], "below the smallest"),
        (["profile", "tiny-cnn", "-o", "x.csv", "--metric", "hesian"], "did you mean hessian"),
        (["profile", "tiny-cnn", "-o", "x.csv", "--method", "gptqq"], "did you mean gptq"),
        (["allocate", "none.csv", "--bits", "4"], "cannot read the sensitivity table"),
        (["eval", "none"], "not a folder"),
        (["allocate", "none.csv"], "cannot read the sensitivity table none.csv"),
        (["quantize", "hub/model", "--bits", "4", "-o", "x", "--dataset", "none.txt"], "no such file: none.txt"),
        (["quantize", "hub/model", "--bits", "4", "-o", "x", "--for", "vlm"], "vllm"),
        (["quantize", "hub/model", "--bits", "4", "-o", "x", "--metric", "hesian"], "did you mean hessian"),
        (["quantize", "hub/model", "--bits", "4", "-o", "x", "--pin", "a"], "expected LAYERS=FORMAT"),
        (["quantize", "hub/model", "--bits", "4", "-o", "x", "--effort", "fasst"], "did you mean fast"),
        (["judge", "hub/model", "--config", "none.yaml", "--effort", "0"], "unknown effort '0'"),
        (["judge", "hub/model", "--metrics", "fishr"], "did you mean fisher"),
        (["plot", "none.csv", "-o", "x.gif"], "expected .png"),
        (["bench", "--device", "gpu"], "expected cpu, cuda or cuda:N"),
        (["bench", "--tune", "--shapes", "16x16"], "add --device cuda"),
    ],
)
def test_invalid_arguments_print_one_sentence_and_exit_with_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\nmpq: ") + said.startswith("mpq: ") <= 1
    left = [path for path in tmp_path.rglob("*") if path.is_file() and "unfinished" not in path.name]
    assert not left


WRONG_GRAMMAR = [
    ["allocate"],
    ["allocate", "t.csv", "--size", "five"],
    ["nothing"],
    ["quantize", "tiny-cnn", "--bits", "4", "-o", ""],
]


@pytest.mark.parametrize("arguments", WRONG_GRAMMAR)
def test_a_wrong_grammar_exits_with_2(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_an_interrupted_profile_is_resumed(tmp_path, monkeypatch):
    import mpq.sensitivity.task as task_module

    path, calls = tmp_path / "table.csv", []
    honest = task_module.Task.weight_error

    def counted(self, layer, scheme):
        calls.append(layer.name)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return honest(self, layer, scheme)

    monkeypatch.setattr(task_module.Task, "weight_error", counted)
    assert main(["profile", "tiny-cnn", "-o", str(path), *FEW]) == 130
    assert not path.exists()
    assert (tmp_path / "table.csv.unfinished").exists()
    assert main(["profile", "tiny-cnn", "-o", str(path), *FEW]) == 0
    assert len(calls) == 8 + 3 * 12 - 6  # two layers of three formats were not rounded again
    assert not (tmp_path / "table.csv.unfinished").exists()
    assert len(SensitivityTable.load(path).layers) == 12


def test_evolution_measures_on_the_model_of_the_table(table, tmp_path, capsys):
    storage = tmp_path / "study.log"
    job = ["allocate", str(table), "--bits", "3", "--by", "evolution", "--trials", "4", "--storage", str(storage)]
    assert main(job) == 0
    assert main([*job, "-o", str(tmp_path / "a.json")]) == 0  # nothing is left to measure
    assert Allocation.load(tmp_path / "a.json").bits <= 3
    assert storage.exists()
    capsys.readouterr()
    assert main([*job, "--resume"]) == 0
    assert "measured loss" in capsys.readouterr().out
    assert main([*job, "--resume", "--study", "another"]) == 2
    assert "no study 'another'" in capsys.readouterr().err
    measured = ["--sampler", "nsga3", "--measure-frontier", "--study", "both", "--frontier", str(tmp_path / "f.csv")]
    assert main([*job, *measured]) == 0
    saved = SavedFrontier.load(tmp_path / "f.csv")
    assert saved.measured is not None
    assert (saved.errors > 0).all()
    assert main(["plot", str(table), str(tmp_path / "f.csv"), "-o", str(tmp_path / "f.svg")]) == 0
    assert (tmp_path / "f.svg").stat().st_size > 10_000
    assert main([*job, "--measure-frontier", "--budget", "bitops=1e9"]) == 2


def test_measured_latency_is_a_cost(table, tmp_path, capsys):
    latencies = tmp_path / "latency.json"
    shapes = ["--shapes", "16x64", "--batches", "1,3", "--repeats", "3", "-o", str(latencies)]
    assert main(["bench", "--formats", "int2-g32,int4-g32,int8-channel", "--inputs", "bfloat16", *shapes]) == 0
    assert main(["allocate", str(table), "--bits", "6", "--latency", str(latencies), "--budget", "latency=10"]) == 0
    assert "int4-g32" in capsys.readouterr().out
    job = ["allocate", str(table), "--bits", "6", "--latency", str(latencies), "--budget", "latency=10", "--batch"]
    assert main([*job, "3"]) == 0
    assert main([*job, "2"]) == 2
    assert "at batch 2" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_bench_on_a_missing_gpu_is_refused(capsys):
    for more in ([], ["--list"]):
        assert main(["bench", "--device", "cuda", *more]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("mpq: --device cuda needs an NVIDIA GPU")
        assert len(said.err.splitlines()) == 1
        assert said.out == ""


@needs_device
def test_a_gpus_latency_is_a_cost(table, tmp_path, capsys):
    latencies = tmp_path / "latency.json"
    job = ["bench", "--device", "cuda", "--shapes", "16x64,64x256", "--batches", "1,4", "--repeats", "3"]
    assert main([*job, "--formats", "int2-g32,int4-g32,int8-channel", "-o", str(latencies)]) == 0
    assert "of copy" in capsys.readouterr().out
    job = ["allocate", str(table), "--bits", "6", "--latency", str(latencies), "--batch", "4"]
    assert main([*job, "--budget", "latency=10"]) == 0


def test_a_packed_language_model_continues_a_prompt(tmp_path, capsys):
    job = ["quantize", "tiny-lm", "--bits", "8.12", "--formats", "int8-channel,int8-g128", "--metric", "proxy:size"]
    assert main([*job, "--nsamples", "2", "-o", str(tmp_path / "out")]) == 0
    texts = (capsys.readouterr().out, (tmp_path / "out" / "report.html").read_text())
    assert not [text for text in texts if "predicted loss" in text or "The prediction was" in text]
    job = ["generate", str(tmp_path / "out"), "--prompt", "It was a truth", "--max-new-tokens", "5", "--compare"]
    assert main(job) == 0
    said = capsys.readouterr().out
    assert "It was a truth" in said
    assert "tokens per second" in said
    assert "bfloat16" in said
    said = []
    for choice in ([], [], ["--temperature", "9", "--seed", "1"], ["--temperature", "9", "--seed", "2"]):
        assert main([*job[:-1], *choice]) == 0
        said.append(capsys.readouterr().out.rpartition("\n\n")[0])
    assert said[0] == said[1]
    assert len(set(said)) == 3
    assert main(["generate", str(tmp_path / "out"), "--prompt", "an invalid byte \udcff"]) == 2
    assert "bytes that are no UTF-8 text" in capsys.readouterr().err
    texts = []
    for name in ("int8-token", "int2-asym"):
        assert main([*job[:-3], "--max-new-tokens", "20", "--kv-cache", name]) == 0
        texts.append(capsys.readouterr().out.rpartition("\n\n")[0])
    assert texts[0] != texts[1]  # two bits change the text
    assert texts[0].startswith(said[0])
    assert main([*job[:3], "It was a truth", "She was", *job[4:-1]]) == 0
    together = capsys.readouterr().out
    assert together.startswith(said[0] + "\nShe was")
    assert main([*job, "--kv-cache", "int9"]) == 2
    assert "int9" in capsys.readouterr().err


def test_proxies_from_benchmark_to_formula(tmp_path, capsys):
    few = ["--nsamples", "16"]
    rows = str(tmp_path / "rows.csv")
    assert main(["proxy", "bench", "tiny-cnn", *few, "-n", "24", "-o", rows]) == 0
    assert main(["proxy", "show", "tiny-cnn", rows, "size", "fisher", *few]) == 0
    said = capsys.readouterr().out
    assert "24 configurations" in said
    assert "fisher" in said
    small = ["--population", "4", "--generations", "2", "-o", str(tmp_path / "run")]
    assert main(["proxy", "evolve", "tiny-cnn", rows, *few, *small]) == 0
    formula = re.search(r"^best formula: (.*)$", capsys.readouterr().out, re.MULTILINE)[1]
    job = ["profile", "tiny-cnn", *few, "--formats", "int4-channel", "-o", str(tmp_path / "table.csv")]
    assert main([*job, "--metric", f"proxy:{formula}"]) == 0


def test_formats_by_row_from_the_command_line(tmp_path, capsys):
    few = ["--formats", "int2-channel,int4-channel,int8-channel", "--nsamples", "16", "--granularity", "row"]
    job = ["quantize", "tiny-cnn", "--bits", "3", "--effort", "fast", "--metric", "kl-curvature", *few]
    assert main([*job, "-o", str(tmp_path / "out")]) == 0
    allocation = Allocation.load(tmp_path / "out" / "allocation.json")
    assert allocation.assignments
    assert allocation.bits <= 3
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "out")]) == 0
    assert main(["profile", "tiny-cnn", "--metric", "fisher", *few, "-o", str(tmp_path / "table.csv")]) == 2
    assert "take kl-curvature" in capsys.readouterr().err
