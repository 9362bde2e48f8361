"""Unusual models: exports compute what was profiled, or one sentence says why not."""

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import mpq
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.network.calibration import cross_entropy, seeded
from mpq.network.layers import find_layers

X, LABELS = torch.randn(6, 16, generator=seeded(0, "x")), torch.arange(6) % 4


def net(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layers or (nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)))).eval()


def compiled_forward() -> nn.Module:
    model = net()
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_child() -> nn.Module:
    return net(torch.compile(nn.Sequential(nn.Linear(16, 12), nn.ReLU()), backend="eager"), nn.Linear(12, 4))


def bound_forward() -> nn.Module:
    model = net()
    model.forward = (lambda self, x: 2 * nn.Sequential.forward(self, x)).__get__(model)
    return model


def with_hooks() -> nn.Module:
    model = net()
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    model[2].register_forward_pre_hook(lambda module, args, kwargs: ((), {"input": args[0] / 3}), with_kwargs=True)
    return model


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return net()


def expanded() -> nn.Module:
    model = net()
    model[0].weight = nn.Parameter(torch.randn(1, 16, generator=seeded(1)).expand(12, 16))
    return model


class Autocast(nn.Sequential):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


class Short(nn.Module):
    """An embedding with max_norm, whose look-ups shorten rows to 0.5."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(9, 16, max_norm=0.5), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.embed((4 * x).long().clamp(-4, 4) + 4).mean(1))


def volumes() -> nn.Module:
    shaped = nn.Unflatten(1, (1, 2, 2, 4))
    return net(shaped, nn.Conv3d(1, 4, 2), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2), nn.Flatten(), nn.Linear(32, 4))


class CompiledMethod(nn.Sequential):
    @torch.compile(backend="eager")
    def forward(self, x):
        return super().forward(x)


class Stashing(nn.Sequential):
    """Stores tensors with a graph between calls, which `copy.deepcopy` refuses."""

    def forward(self, x):
        self.last = super().forward(x)
        self.seen = {"outputs": [self.last * 2]}
        return self.last


def stashing() -> nn.Module:
    model = Stashing(*net()).eval()
    model(X)
    return model


class Absolute(nn.Module):
    def forward(self, bias):
        return bias.abs()


def computed_bias(pruned: bool) -> nn.Module:
    model = net()
    if pruned:
        prune.l1_unstructured(model[0], "weight", amount=0.3)
        prune.l1_unstructured(model[0], "bias", amount=0.3)
    else:
        parametrize.register_parametrization(model[0], "bias", Absolute())
    return model


def computed_attention() -> nn.Module:
    torch.manual_seed(0)
    model = Attending()
    parametrizations.weight_norm(model.attention, "in_proj_weight")
    return model.eval()


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)

    def forward(self, x):
        x = x.unflatten(1, (4, 4))
        return self.head(self.attention(x, x, x)[0].mean(1))


def scripted_part() -> nn.Module:
    return net(torch.jit.script(nn.Sequential(nn.Linear(16, 12), nn.ReLU())), nn.Linear(12, 4))


class WithoutRows(nn.Module):
    """Layers without a single weight beside others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.none, self.nothing = net(), nn.Linear(16, 0), nn.Linear(0, 4)

    def forward(self, x):
        return self.body(x) + self.nothing(self.none(x))


class Copying(nn.Sequential):
    """Runs copies of its layers."""

    def forward(self, x):
        for layer in self:
            x = copy.deepcopy(layer)(x)
        return x


MODELS: dict[str, Callable[[], nn.Module]] = {
    "compiled forward": compiled_forward,
    "compiled child": compiled_child,
    "compiled method": lambda: CompiledMethod(*net()).eval(),
    "bound forward": bound_forward,
    "hooks": with_hooks,
    "inference mode": made_in_inference_mode,
    "expanded": expanded,
    "autocast": lambda: Autocast(*net()).eval(),
    "largest norm": lambda: Short().eval(),
    "volumes": volumes,
    "stashed outputs": stashing,
    "pruned bias": lambda: computed_bias(pruned=True),
    "computed bias": lambda: computed_bias(pruned=False),
    "computed attention": computed_attention,
    "scripted part": scripted_part,
    "no rows": lambda: WithoutRows().eval(),
    "copied layers": lambda: Copying(*net()).eval(),
}


REBUILT = ("stashed outputs", "pruned bias")  # torch refuses to copy them


@pytest.mark.parametrize("name", MODELS)
def test_what_is_loaded_computes_what_was_simulated(name, tmp_path):
    model = MODELS[name]()
    table = mpq.profile(model, [(X, LABELS)], cross_entropy, ["int2-channel"], metric="gradient", progress=False)
    assert (table.scores > 0).all()
    allocation = Allocation(table.layers, ("int2-channel",) * len(table.layers))
    simulated = mpq.simulate(model, allocation, trainable=False)
    mpq.simulate(model, allocation)  # does not change the model: the computation is in its classes
    with torch.no_grad():
        expected, original = simulated(X), model(X)
        assert (expected - original).norm() > 0.05 * original.norm()  # two bits change the outputs
        mpq.export(model, allocation, tmp_path / "out", inputs=X)
        loaded = mpq.load(tmp_path / "out", model=MODELS[name]() if name in REBUILT else copy.deepcopy(model))
        torch.testing.assert_close(loaded(X), expected, rtol=0.02 if name == "autocast" else 1e-3, atol=1e-3)


def test_uncopyable_models_are_reported():
    model = net()
    model.lock = threading.Lock()
    with pytest.raises(MpqError, match=r"Sequential cannot be copied .*lock"):
        mpq.simulate(model, Allocation(find_layers(model), ("int2-channel",) * 2))


def test_profiling_does_not_change_embeddings_with_max_norm(tmp_path):
    model = Short().eval()
    before = model.embed.weight.detach().clone()
    mpq.profile(model, [(X, LABELS)], cross_entropy, ["int2-channel"], metric="loss", progress=False)
    assert torch.equal(model.embed.weight, before)


def test_data_created_in_inference_mode():
    with torch.inference_mode():
        batches = [(X.clone(), LABELS)]
    table = mpq.profile(net(), batches, cross_entropy, ["int2-channel"], progress=False)
    assert (table.scores > 0).all()


class InPlace(nn.Sequential):
    def forward(self, x):
        hidden = self[0](x).relu()
        hidden += 1
        return self[2](hidden)


def own_loss(model, batch):
    return model(*batch)


class WithLoss(nn.Sequential):
    def forward(self, x, labels):
        return nn.functional.cross_entropy(super().forward(x), labels)


def in_place(model, batch):
    batch[0].mul_(1.5)
    return cross_entropy(model, batch)


def needs_gradients(model, batch):
    return torch.autograd.grad(model(batch[0].requires_grad_()).sum(), batch[0])[0].square().mean()


def complex_loss(model, batch):
    return 1j * cross_entropy(model, batch)


WRONG = {
    "changes its batch": ([(X, LABELS)], in_place, "changes its batch in place"),
    "raises": ([(X, LABELS)], needs_gradients, r"Sequential does not run on calibration batch 0 \(RuntimeError: "),
    "attribute": ([(X, LABELS)], lambda model, batch: model.nothing, "does not run on calibration batch 0"),
    "one batch for many": ((X, LABELS), cross_entropy, "does not run on calibration batch 0"),
    "double": ([(X.double(), LABELS)], cross_entropy, "does not run on calibration batch 0"),
    "no function": ([(X, LABELS)], "mse", r"expected a function loss_fn\(model, batch\), not 'mse'"),
    "complex": ([(X, LABELS)], complex_loss, r"not a tensor \(\) of complex numbers"),
    "sparse": ([(X.to_sparse(), LABELS)], cross_entropy, "batch 0 holds a sparse or nested tensor"),
    "nested": ([torch.nested.nested_tensor([X[0], X[1]])], cross_entropy, "batch 0 holds a sparse or nested tensor"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_invalid_data_and_losses_are_reported_in_one_sentence(kind):
    batches, loss, message = WRONG[kind]
    kept = X.clone()
    try:
        with pytest.raises(MpqError, match=message):
            mpq.profile(net(), batches, loss, ["int2-channel"], progress=False)
    finally:
        X.detach_().requires_grad_(False).copy_(kept)


def two_bits() -> Allocation:
    return Allocation(find_layers(net()), ("int2-channel",) * 2)


FACES = {
    "a model's class": (lambda: mpq.profile(nn.Linear, [X], cross_entropy), "expected a torch.nn.Module as the model"),
    "numbers as formats": (lambda: mpq.profile(net(), [X], cross_entropy, [7]), "expected names of formats, .* not 7"),
    "no metric": (lambda: mpq.profile(net(), [X], cross_entropy, metric=None), "expected the name of a metric, not"),
    "a number as pattern": (lambda: mpq.profile(net(), [X], cross_entropy, include=3), "expected a pattern of names"),
    "no table": (lambda: mpq.frontier(None), "expected a SensitivityTable, as mpq.profile gives it, not None"),
    "no folder": (lambda: mpq.load(None), "expected a folder's name, not None"),
    "no folder to write": (lambda: mpq.export(net(), two_bits(), None), "expected a folder's name, not None"),
    "inputs that fail": (lambda: mpq.export(net(), two_bits(), "out", inputs={}.pop), r"does not run \(KeyError"),
}


@pytest.mark.parametrize("kind", FACES)
def test_arguments_of_a_wrong_type_are_reported_in_one_sentence(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, message = FACES[kind]
    with pytest.raises(MpqError, match=message):
        call()
    assert not list(tmp_path.iterdir())


def test_a_loss_may_pop_entries_of_its_batch():
    def popping(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch.pop("labels"))

    batch = {"x": X, "labels": LABELS}
    own = mpq.profile(net(), [batch], popping, ["int2-channel"], progress=False)
    plain = mpq.profile(net(), [(X, LABELS)], cross_entropy, ["int2-channel"], progress=False)
    assert (own.scores == plain.scores).all()
    assert list(batch) == ["x", "labels"]


def test_modes_changed_by_a_loss_are_restored():
    model = net(nn.Linear(16, 12), nn.Dropout(0.0), nn.Linear(12, 4))
    mpq.profile(model, [(X, LABELS)], lambda model, batch: cross_entropy(model.train(), batch), ["int2-channel"])
    assert not any(module.training for module in model.modules())


def test_autograd_refusals_are_one_sentence():
    with pytest.raises(MpqError, match=r"metric kl-curvature does not work on this model \(one of the variables"):
        mpq.profile(InPlace(*net()), [(X, LABELS)], cross_entropy, ["int2-channel"], progress=False)
    table = mpq.profile(InPlace(*net()), [(X, LABELS)], cross_entropy, ["int2-channel"], metric="loss", progress=False)
    assert table.scores.any()


@pytest.mark.parametrize("metric", ["kl-curvature", "hessian", "kronecker"])
def test_a_model_may_return_its_loss(metric):
    table = mpq.profile(WithLoss(*net()), [(X, LABELS)], own_loss, ["int2-channel"], metric=metric, progress=False)
    assert (table.scores > 0).all()


def test_a_forward_bound_to_the_original_is_reported(tmp_path):
    model = net()
    first, last = model[0], model[2]
    model.forward = lambda x: last(first(x).relu())
    allocation = Allocation(find_layers(model), ("int2-channel",) * 2)
    with pytest.raises(MpqError, match="uses none of its own layers' weights"):
        mpq.export(model, allocation, tmp_path / "out", inputs=X)
    assert not list(tmp_path.iterdir())


def test_a_packed_model_that_does_not_run_is_reported(tmp_path):
    class Functional(nn.Sequential):
        def forward(self, x):
            return self[2](torch.func.functional_call(self[0], {"weight": 2 * self[0].weight}, (x,)))

    model = Functional(*net()).eval()
    allocation = Allocation(find_layers(model), ("int2-channel",) * 2)
    with pytest.raises(MpqError, match="does not run"):
        mpq.export(model, allocation, tmp_path / "out", inputs=X)


@pytest.mark.parametrize("kind", ["buffer", "lazy"])
def test_tensors_without_content_are_named(kind):
    model = net() if kind == "buffer" else nn.Sequential(nn.LazyLinear(4))
    if kind == "buffer":
        model.register_buffer("shift", torch.zeros(3, device="meta"))
    with pytest.raises(
        MpqError, match="shift is on the device 'meta'" if kind == "buffer" else "0.weight has no content"
    ):
        mpq.profile(model, [(X, LABELS)], cross_entropy, ["int2-channel"], progress=False)


def test_products_under_vmap_are_scored():
    class Each(nn.Sequential):
        def forward(self, x):
            return torch.vmap(super().forward)(x)

    own = mpq.profile(Each(*net()), [(X, LABELS)], cross_entropy, ["int2-channel"], metric="loss", progress=False)
    plain = mpq.profile(net(), [(X, LABELS)], cross_entropy, ["int2-channel"], metric="loss", progress=False)
    torch.testing.assert_close(torch.tensor(own.scores), torch.tensor(plain.scores), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scheme", ["int4-g4", "nf4-g4", "mxfp4", "int8-channel+a:int8-token"])
def test_a_trainable_simulation_compiles(scheme):
    model = net(nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 4))
    allocation = Allocation(find_layers(model), (scheme, "int8-channel"))
    student = mpq.simulate(model, allocation)
    compiled = torch.compile(student, backend="eager")
    inputs = torch.randn(3, 32, generator=seeded(2))
    torch.testing.assert_close(compiled(inputs), student(inputs))
    compiled(inputs).sum().backward()
    assert student[0].parametrizations.weight.original.grad.any()
