"""Folders of transformers models of every kind, through the command line."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mpq.cli.main import main
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.exporters.mpq import checkpoint
from mpq.exporters.mpq.skeleton import build_skeleton
from mpq.exporters.request import ExportRequest
from mpq.network.calibration import seeded
from mpq.network.distance import TARGET, distance_loss, with_targets
from mpq.network.layers import find_layers
from mpq.sensitivity.profile import profile
from mpq.sources import open_source
from mpq.sources.networks import open_network

transformers = pytest.importorskip("transformers")
TEXT = "the cat sat on the mat and the dog ran over the hill to see what the cat had seen there " * 60
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
FEW = ["--nsamples", "8", "--seqlen", "16", "--batch-size", "4", "--formats", "int4-g32,int8-channel", "--bits", "6"]


def tokenizer(words=60):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "[CLS]", "[SEP]", "<s>"]
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=words, special_tokens=special))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", cls_token="[CLS]", sep_token="[SEP]", bos_token="<s>",
        chat_template="{{ messages }}",
    )  # fmt: skip


def save(folder, model, text=True):
    model.save_pretrained(folder)
    if text:
        tokenizer().save_pretrained(folder)
        (folder.parent / "text.txt").write_text(TEXT)
    return model


def llama(**changes):
    torch.manual_seed(0)
    config = {"vocab_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64, **SIZES, **changes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def test_a_bfloat16_source_stays_bfloat16_and_its_side_files_are_copied(tmp_path, capsys, caplog):
    source, out = tmp_path / "source", tmp_path / "out"
    model = save(source, llama().to(torch.bfloat16))
    job = ["quantize", str(source), "--dataset", str(tmp_path / "text.txt"), *FEW, "--exclude", "*lm_head"]
    assert main([*job, "-o", str(out)]) == 0
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert f"{size / 1e3:.1f} kB" in capsys.readouterr().out
    with safe_open(out / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("lm_head.weight"), model.lm_head.weight)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert all(facts["dtype"] == "bfloat16" for facts in config["quantization_config"]["layers"].values())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    source.rename(tmp_path / "moved")
    assert main(["generate", str(out), "--prompt", "the cat", "--max-new-tokens", "3"]) == 0
    assert "the cat" in capsys.readouterr().out
    assert main(["eval", str(out), "--seqlen", "16"]) == 0
    said = capsys.readouterr()
    assert "perplexity" in said.out
    assert "KL from the original" not in said.out
    assert "cannot be opened: measured without it" in caplog.text
    text = (tmp_path / "text.txt").rename(tmp_path / "other.txt")
    assert main(["eval", str(out), "--seqlen", "16"]) == 2
    assert "no longer exist: name a file with --dataset" in capsys.readouterr().err
    assert main(["eval", str(out), "--seqlen", "16", "--dataset", str(text)]) == 0
    (out / "tokenizer.json").write_text("{")
    assert main(["generate", str(out), "--prompt", "the cat"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq"])
def test_exports_for_other_programs_get_the_side_files_too(target, tmp_path):
    source = tmp_path / "source"
    save(source, llama())
    job = [str(source), "--dataset", str(tmp_path / "text.txt"), "--nsamples", "4", "--seqlen", "16"]
    table = ["--formats", "int4-g32", "--exclude", "*embed*", "--exclude", "*lm_head", "--metric", "proxy:size"]
    assert main(["profile", *job, *table, "-o", str(tmp_path / "t.csv")]) == 0
    assert main(["allocate", str(tmp_path / "t.csv"), "--bits", "4.5", "-o", str(tmp_path / "a.json")]) == 0
    written = ["--to", target, "-o", str(tmp_path / "o")]
    assert main(["export", *job[:1], str(tmp_path / "a.json"), *job[1:], *written]) == 0
    assert (tmp_path / "o" / "chat_template.jinja").read_bytes() == (source / "chat_template.jinja").read_bytes()


def bert():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(vocab_size=64, max_position_embeddings=64, **SIZES))


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, **sizes))


@pytest.mark.parametrize(("build", "kind"), [(bert, "distance"), (t5, "loss")])
def test_encoders_and_encoder_decoders(build, kind, tmp_path, capsys):
    save(tmp_path / "source", build())
    job = ["quantize", str(tmp_path / "source"), "--dataset", str(tmp_path / "text.txt"), *FEW]
    assert main([*job, "-o", str(tmp_path / "out")]) == 0
    assert kind in capsys.readouterr().out
    assert type(checkpoint.load(tmp_path / "out")) is type(build())
    if kind == "distance":
        (tmp_path / "source").rename(tmp_path / "moved")
        assert main(["eval", str(tmp_path / "out")]) == 2
        assert "restore it" in capsys.readouterr().err


def test_image_models_are_shown_images_of_their_size(tmp_path, capsys):
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=4)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 16, "width": 16},
                 "image_processor_type": "ViTImageProcessor"}  # fmt: skip
    for model in (transformers.ViTForImageClassification(config), transformers.ViTModel(config)):
        folder = tmp_path / type(model).__name__
        save(folder, model, text=False)
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        images = np.random.default_rng(0).integers(0, 256, (20, 24, 24, 3), np.uint8)
        labels = {"labels": np.arange(20) % 4} if "Classification" in folder.name else {}
        np.savez(tmp_path / "images.npz", images=images, **labels)
        out = tmp_path / f"{folder.name}-out"
        assert main(["quantize", str(folder), "--dataset", str(tmp_path / "images.npz"), *FEW, "-o", str(out)]) == 0
        assert (out / "preprocessor_config.json").is_file()
    said = capsys.readouterr().out
    assert "accuracy" in said
    assert "distance" in said


def test_a_gguf_file_is_a_model(tmp_path, capsys, caplog):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from mpq.core.allocation import Allocation
    from mpq.exporters import export
    from mpq.network.layers import find_layers
    from mpq.quantized import simulate

    model = llama(vocab_size=60)
    layers = find_layers(model)
    allocation = Allocation(layers, ("int8-g32",) * len(layers))
    export(model, allocation, tmp_path / "gguf", to="gguf")
    np.savez(tmp_path / "tokens.npz", input_ids=torch.randint(0, 60, (12, 16), generator=seeded(1)).numpy())
    for name in (tmp_path / "gguf" / "model.gguf", tmp_path / "gguf"):
        source = open_source(str(name), str(tmp_path / "tokens.npz"), nsamples=4)
        assert "is already quantized" in caplog.text
        tokens = source.calibration[0]
        with torch.no_grad():
            expected = simulate(model, allocation, trainable=False)(tokens).logits
            torch.testing.assert_close(source.model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    job = ["quantize", str(tmp_path / "gguf"), "--dataset", str(tmp_path / "tokens.npz"), *FEW[:2], *FEW[6:]]
    assert main([*job, "-o", str(tmp_path / "out")]) == 0
    assert "perplexity" in capsys.readouterr().out
    with pytest.raises(MpqError, match="no such file"):
        open_source(str(tmp_path / "none.gguf"))


class Encoder(nn.Module):
    """Two layers, tokens in, vectors out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 6)

    def forward(self, input_ids, attention_mask=None):
        return (self.out(torch.tanh(self.embed(input_ids))),)


def test_squared_gradients_of_the_drawn_distance_are_its_curvature():
    """The mean of squared gradients over random targets is the Hessian of the distance.

    At the float model the distance itself has no gradient."""
    torch.manual_seed(0)
    model, tokens = Encoder().double(), torch.randint(0, 20, (4, 5), generator=seeded(2))
    exact = with_targets(model, [{"input_ids": tokens}], noise=False)[0]
    weight = model.out.weight
    slope = torch.autograd.grad(distance_loss(model, exact), weight)[0]
    assert slope.abs().max() < 1e-5
    hessian = torch.autograd.functional.hessian(
        lambda moved: distance_loss(_with(model, moved), exact), weight.detach().clone()
    )
    diagonal = hessian.reshape(48, 48).diagonal().reshape(6, 8)
    squares = torch.zeros_like(weight)
    draws = 400
    for draw in range(draws):
        batch = with_targets(model, [{"input_ids": tokens}], noise=True, seed=draw)[0]
        for index in range(4):
            one = {name: tensor[index : index + 1] for name, tensor in batch.items()}
            squares += torch.autograd.grad(distance_loss(model, one), weight)[0].square().detach() / (4 * draws)
    assert squares.sum().item() == pytest.approx(diagonal.sum().item(), rel=0.1)


def _with(model, weight):
    def run(input_ids):
        return torch.func.functional_call(model, {"out.weight": weight}, (input_ids,))

    return run


def test_hidden_positions_are_no_part_of_a_distance():
    model, tokens = Encoder(), torch.randint(0, 20, (2, 5), generator=seeded(3))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    (batch,) = with_targets(model, [{"input_ids": tokens, "attention_mask": mask}], noise=False)
    batch[TARGET + "0"][0, 3:] += 100
    assert distance_loss(model, batch).item() == 0
    batch[TARGET + "0"][1, 4] += 1
    assert distance_loss(model, batch).item() > 0


@pytest.mark.parametrize("metric", ["kronecker", "fisher"])
def test_no_layer_of_an_encoder_scores_zero(metric, tmp_path):
    save(tmp_path / "source", bert())
    source = open_source(str(tmp_path / "source"), str(tmp_path / "text.txt"), nsamples=4, seqlen=16)
    table = profile(
        source.model, source.calibration, source.loss_fn, ("int2-g32", "int8-channel"), metric=metric, progress=False
    )
    assert source.kind == "distance"
    assert (table.scores[:, 0] > 10 * table.scores[:, 1]).mean() > 0.9


@pytest.fixture
def small_llama(tmp_path):
    """The folder of a Llama of one layer and 32 tokens."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("damage", ["missing tensor", "cut weights", "heads"])
def test_folders_that_lack_what_the_model_needs_are_refused(small_llama, damage):
    weights = small_llama / "model.safetensors"
    if damage == "missing tensor":
        tensors = load_file(weights)
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, weights, {"format": "pt"})
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:3000])
    else:
        edit_config(small_llama, num_attention_heads=0)
    match = "lacks 1 tensors of LlamaForCausalLM, such as model.layers.0.mlp.up_proj.weight"
    with pytest.raises(MpqError, match=match if damage == "missing tensor" else "cannot be loaded|unknown model"):
        open_network(str(small_llama))


def test_weights_of_an_unknown_quantizer_are_refused(small_llama):
    edit_config(small_llama, quantization_config={"quant_method": "frobnicate"})
    with pytest.raises(MpqError, match="stored by a quantizer that transformers does not know here"):
        open_network(str(small_llama))


@pytest.mark.parametrize("kind", ["int8", "int64", "float8 with scales", "a pickle"])
def test_integer_codes_without_a_quantizer_are_refused(small_llama, kind):
    name, file = "model.layers.0.mlp.up_proj.weight", small_llama / "model.safetensors"
    tensors = load_file(file)
    if kind == "float8 with scales":
        tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
    else:
        tensors[name] = torch.ones(16, 16, dtype=torch.int64 if kind == "int64" else torch.int8)
    if kind == "a pickle":
        file.unlink()
        torch.save(tensors, small_llama / "pytorch_model.bin")
    else:
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(MpqError, match=rf"stores {name} as (I8|I64|F8_E4M3|torch.int8): expected floating"):
        open_network(str(small_llama))


def test_integer_tensors_that_are_not_weights_are_accepted(small_llama):
    file = small_llama / "model.safetensors"
    indices = {"model.position_ids": torch.arange(4)[None], "model.layers.0.bias": torch.ones(4, 4, dtype=torch.uint8)}
    save_file(load_file(file) | indices, file, {"format": "pt"})
    assert open_network(str(small_llama)).model is not None


@pytest.mark.parametrize("content", [b"{}", b"\xff\x00", None])
def test_a_damaged_tokenizer_is_named(small_llama, content, caplog):
    text = small_llama.parent / "good.txt"
    text.write_text(TEXT)
    if content is not None:
        (small_llama / "tokenizer.json").write_bytes(content)
    with pytest.raises(MpqError) as caught:
        open_source(str(small_llama), str(text))
    said = "has no tokenizer" if content is None else "cannot be loaded from tokenizer.json"
    assert said in str(caught.value)
    assert said in caplog.text
    assert "good.txt" not in str(caught.value)


def test_unused_tensors_are_reported(small_llama, caplog):
    weights = small_llama / "model.safetensors"
    save_file(load_file(weights) | {"model.other.weight": torch.ones(2, 2)}, weights, {"format": "pt"})
    open_network(str(small_llama))
    assert "1 tensors of" in caplog.text
    assert "model.other.weight" in caplog.text


@pytest.mark.parametrize("layers", [-1, 1])
def test_a_model_that_does_not_run_on_its_data_is_refused_at_once(small_llama, layers):
    edit_config(small_llama, num_hidden_layers=layers)
    np.savez(small_llama / "tokens.npz", input_ids=np.full((64, 8), 20 if layers < 0 else 40))
    with pytest.raises(MpqError, match="its config, weights and tokenizer do not fit together"):
        open_source(str(small_llama), str(small_llama / "tokens.npz"), nsamples=2, evaluation_samples=2)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_file_of_a_folder_is_no_model(small_llama, file):
    with pytest.raises(MpqError, match=f"{file} is a file: name the folder that holds it"):
        open_network(str(small_llama / file))


def test_a_classifier_that_needs_a_padding_token_is_refused(tmp_path):
    """It takes one text at a time without one, which shows only on a whole batch."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, **sizes)
    save(tmp_path / "classifier", transformers.LlamaForSequenceClassification(config))
    with pytest.raises(MpqError, match=r"does not run on a sample of .*no padding token is defined"):
        open_source(str(tmp_path / "classifier"), str(tmp_path / "text.txt"), nsamples=4, seqlen=16)


def test_configs_with_infinities_or_without_a_context_are_accepted(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    config = transformers.Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=8, num_heads=8, head_dim=8, n_groups=1,
        chunk_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    save(tmp_path / "mamba", transformers.Mamba2ForCausalLM(config))
    assert "__float__" in (tmp_path / "mamba" / "config.json").read_text()
    job = ["--dataset", str(tmp_path / "text.txt"), *FEW, "--effort", "fast", "--tuning-steps", "0"]
    assert main(["quantize", str(tmp_path / "mamba"), *job, "-o", str(tmp_path / "out")]) == 0
    assert main(["eval", str(tmp_path / "out"), "--seqlen", "16"]) == 0
    config = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=48)
    save(tmp_path / "xlnet", transformers.XLNetModel(config))
    assert open_network(str(tmp_path / "xlnet")).context is None


def test_an_invalid_config_is_reported(tmp_path, small_llama):
    folder = tmp_path.parent / f"{tmp_path.name}-out"
    model = open_network(str(small_llama)).model
    checkpoint.export(ExportRequest(model, Allocation(find_layers(model)[:1], ("int8-channel",)), folder))
    edit_config(folder, num_attention_heads="many")
    (folder / "checksums.json").unlink()
    with pytest.raises(MpqError, match="makes no LlamaForCausalLM"):
        build_skeleton(json.loads((folder / "config.json").read_text()), folder, trust=False)
