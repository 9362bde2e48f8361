import importlib.util
import json

import numpy as np
import pytest
import torch
from torch import nn

from mpq.core.errors import MpqError
from mpq.sources import Network, open_data, open_network, open_source

HERE = "tests.sources.some_models"


def words() -> Network:
    """A language model whose tokens are characters."""
    return Network("words", nn.Identity(), "perplexity", {}, encode=lambda text: [ord(c) for c in text], context=64)


def pictures(mean=(), std=()) -> Network:
    return Network("pictures", nn.Identity(), "accuracy", {}, mean=mean, std=std)


def windows(batches) -> set[tuple[int, ...]]:
    return {tuple(row) for batch in batches for row in batch.tolist()}


def numbered(length=1000) -> str:
    return "".join(chr(1 + i) for i in range(length))


def test_text_files_are_cut_into_disjoint_windows(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(numbered(), "utf-8", newline="")
    data = open_data(str(path), words(), nsamples=6, seqlen=10, batch_size=4)
    assert [len(batch) for batch in data.calibration] == [4, 2]
    assert sum(map(len, data.evaluation)) == 20
    seen, unseen = windows(data.calibration), windows(data.evaluation)
    assert len(seen) == 6
    held = windows(data.acceptance)
    assert len(held) == 2
    assert not held & (seen | unseen)
    assert max(max(row) for row in seen) < min(min(row) for row in unseen)
    assert all(row[-1] - row[0] == 9 for row in seen | unseen)


def test_lines_of_json_give_the_same_windows_as_their_text(tmp_path):
    parts = [numbered(300), "second\ntext", numbered(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in parts), "utf-8")
    (tmp_path / "a.txt").write_text("\n".join(parts), "utf-8", newline="")
    options = {"nsamples": 5, "seqlen": 10, "seed": 3}
    lines, text = (open_data(str(tmp_path / name), words(), **options) for name in ("a.jsonl", "a.txt"))
    # Reading text turns "\r" into "\n", and the numbered characters hold one.
    changed = [{tuple(10 if c == 13 else c for c in row) for row in windows(part)} for part in (lines.calibration,)]
    assert changed == [windows(text.calibration)]
    for wrong in ('{"txt": "b"}', '{"text": 3}', '{"text": null}', '{"text": ["b"]}', '["text"]', '{"tex'):
        (tmp_path / "b.jsonl").write_text(f'{{"text": "a"}}\n{wrong}\n')
        with pytest.raises(MpqError, match="line 2 is not"):
            open_data(str(tmp_path / "b.jsonl"), words())


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_byte_order_marks_and_line_ends_of_other_systems(kind, tmp_path):
    """A mark is no text, and a line separator within a string of JSON ends no line."""
    text = numbered(300).replace("\r", "") + "\u2028\x85 end"
    plain = text if kind == "txt" else json.dumps({"text": text}, ensure_ascii=False) + "\n"
    (tmp_path / f"a.{kind}").write_bytes(plain.encode())
    (tmp_path / f"b.{kind}").write_bytes(b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode())
    one, other = (open_data(str(tmp_path / f"{name}.{kind}"), words(), nsamples=5, seqlen=10) for name in "ab")
    assert windows(one.calibration) == windows(other.calibration)
    assert windows(one.evaluation) == windows(other.evaluation)


def test_windows_of_no_tokens_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text(numbered(300), "utf-8")
    for seqlen in (0, 1, -5):
        with pytest.raises(MpqError, match=f"invalid seqlen {seqlen}: expected at least 2"):
            open_data(str(tmp_path / "a.txt"), words(), seqlen=seqlen)


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_parquet_text_is_the_same_text(tmp_path):
    import pyarrow
    from pyarrow import parquet

    texts = [numbered(300), "second"]
    parquet.write_table(pyarrow.table({"text": texts, "id": [1, 2]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"id": [1, 2]}), tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    ours, lines = (open_data(str(tmp_path / name), words(), seqlen=10) for name in ("a.parquet", "a.jsonl"))
    assert windows(ours.calibration) == windows(lines.calibration)
    with pytest.raises(MpqError, match="expected a column called text"):
        open_data(str(tmp_path / "b.parquet"), words())


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_a_missing_extra_says_how_to_install_it():
    with pytest.raises(MpqError, match=r"pip install 'mpq\[data\]'"):
        open_data("datasets:wikitext:wikitext-2-raw-v1", words())


def test_images_are_normalized_for_the_network(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 5, 4, 3), dtype=np.uint8)
    labels = np.arange(20)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    data = open_data(str(tmp_path / "a.npz"), pictures((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), nsamples=30, batch_size=7)
    assert [len(y) for _, y in data.calibration] == [7, 6]
    assert [len(y) for _, y in data.acceptance] == [3]
    assert torch.cat([y for _, y in data.evaluation]).tolist() == [16, 17, 18, 19]
    x, y = data.calibration[0]
    pixel = images[y[2], 3, 1, 2] / 255
    assert x.shape == (7, 3, 5, 4)
    assert x[2, 2, 3, 1].item() == pytest.approx((pixel - 0.3) / 0.7, rel=1e-5)


def test_arrays_are_taken_as_they_are(tmp_path):
    np.savez(tmp_path / "x.npz", inputs=np.arange(12.0).reshape(6, 2), labels=np.arange(6))
    ((x, y),) = open_data(str(tmp_path / "x.npz"), pictures(), nsamples=9).calibration
    assert x.tolist() == [[2.0 * i, 2.0 * i + 1] for i in y.tolist()]
    np.savez(tmp_path / "t.npz", input_ids=np.arange(40).reshape(5, 8))
    (tokens,) = open_data(str(tmp_path / "t.npz"), words()).evaluation
    assert tokens.tolist() == [list(range(32, 40))]
    np.savez(tmp_path / "y.npz", numbers=np.arange(3))
    with pytest.raises(MpqError, match="holds numbers: expected images"):
        open_data(str(tmp_path / "y.npz"), pictures())


def test_loaders():
    network = open_network(f"{HERE}:classifier")
    data = open_data(f"{HERE}:labelled", network)
    assert (len(data.calibration), len(data.evaluation), data.kind) == (3, 1, "accuracy")
    assert len(data.acceptance) == 1
    source = open_source(f"{HERE}:classifier", f"{HERE}:with_loss")
    assert source.kind == "loss"
    assert source.loss_fn(source.model, source.calibration[0]).item() > 0
    with pytest.raises(MpqError, match="loss_fn"):
        open_data(f"{HERE}:unexplained", network)


def test_unsuitable_or_missing_data_is_refused(tmp_path):
    with pytest.raises(MpqError, match="tiny-cnn takes labelled images, which novels is not"):
        open_source("tiny-cnn", "novels")
    with pytest.raises(MpqError, match="did you mean novels"):
        open_source("tiny-lm", "novel")
    with pytest.raises(MpqError, match="no such file"):
        open_source("tiny-lm", str(tmp_path / "none.txt"))
    with pytest.raises(MpqError, match="no data for"):
        open_source(f"{HERE}:classifier")
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(MpqError, match="smaller seqlen"):
        open_source("tiny-lm", str(tmp_path / "short.txt"))
    with pytest.raises(MpqError, match="at least 1"):
        open_source("tiny-lm", nsamples=0)


def test_evaluation_can_be_limited():
    digits = open_source("tiny-cnn", evaluation_samples=130)
    assert sum(len(labels) for _, labels in digits.evaluation) == 130
    assert sum(map(len, open_source("tiny-lm", evaluation_samples=7).evaluation)) == 7


def test_batches_of_a_large_vocabulary_are_small(tmp_path):
    (tmp_path / "text.txt").write_text("word " * 4000)
    model = nn.Embedding(100, 8)
    model.config = type("Config", (), {"vocab_size": 60_000})
    network = Network("wide", model, "perplexity", {}, encode=lambda text: [1] * len(text), context=64)
    sizes = {
        given: {
            len(batch)
            for batch in open_data(str(tmp_path / "text.txt"), network, nsamples=64, batch_size=given).calibration
        }
        for given in (None, 8)
    }
    assert sizes == {None: {4}, 8: {8}}
