"""transformers' Trainer trains a simulation, saves it, resumes from its checkpoint, and writes packed models."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import mpq  # noqa: E402
from mpq.core.allocation import Allocation  # noqa: E402
from mpq.core.errors import MpqError  # noqa: E402
from mpq.integrations.trainer import ExportCallback  # noqa: E402
from mpq.network.calibration import seeded  # noqa: E402
from mpq.network.layers import find_layers  # noqa: E402


def trainer(model, allocation, folder, steps):
    tokens = torch.randint(0, 30, (16, 8), generator=seeded(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, save_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        lr_scheduler_type="constant", report_to=[], disable_tqdm=True, use_cpu=True, seed=1,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=data, callbacks=[ExportCallback(allocation)])


def test_a_simulation_is_trained_saved_and_packed(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    layers = find_layers(model)
    allocation = Allocation(layers, ("int3-g8",) * len(layers))
    student = mpq.simulate(model, allocation, "nearest", learned=True)
    trainer(student, allocation, tmp_path, 6).train()
    tokens = torch.arange(20).view(2, 10)
    outputs = student.eval()(tokens).logits
    loaded = mpq.load(tmp_path / "packed")
    torch.testing.assert_close(loaded(tokens).logits, outputs, rtol=1e-3, atol=1e-3)
    halfway = mpq.load(tmp_path / "checkpoint-3" / "packed")
    assert not torch.allclose(halfway(tokens).logits, outputs, atol=1e-2)
    again = mpq.simulate(model, allocation, "nearest", learned=True)
    trainer(again, allocation, tmp_path, 6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(again.eval()(tokens).logits, outputs, rtol=1e-5, atol=1e-5)
    with pytest.raises(MpqError, match="is no simulation"):
        trainer(model, allocation, tmp_path / "plain", 1).train()
