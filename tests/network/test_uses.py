"""Uses of weights in custom forwards and outside of their modules, as metrics see them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpq.network.calibration import next_token_loss, seeded
from mpq.network.layers import find_layers
from mpq.network.moments import second_moments
from mpq.network.uses import seeing_uses
from mpq.sensitivity.profile import profile


class Scaled(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 8.0


class Padded(nn.Conv1d):
    def forward(self, x):
        return functional.conv1d(functional.pad(x, (2, 0)), self.weight, self.bias)


class Doubled(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight * 2.0, self.bias)


class Lm(nn.Module):
    """One function, written with custom forwards or with plain modules."""

    def __init__(self, own):
        super().__init__()
        self.own = own
        self.e = (Scaled if own else nn.Embedding)(30, 16)
        self.c = Padded(16, 16, 3) if own else nn.Conv1d(16, 16, 3)
        self.f = nn.Linear(16, 30)

    def forward(self, x):
        h = (self.e(x) if self.own else self.e(x) * 8.0).mT
        h = self.c(h if self.own else functional.pad(h, (2, 0))).mT
        return functional.linear(torch.tanh(h), self.f.weight, self.f.bias) if self.own else self.f(torch.tanh(h))


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.d, self.h = nn.Embedding(7, 16), Doubled(16, 16), nn.Linear(16, 30)

    def forward(self, x):
        return self.h(torch.tanh(self.d(self.q.weight[x % 7])))


TOKENS = [torch.randint(0, 30, (3, 7), generator=seeded(0, index)) for index in range(2)]


def models():
    torch.manual_seed(0)
    own, plain = Lm(True).eval(), Lm(False).eval()
    plain.load_state_dict(own.state_dict())
    return own, plain


@pytest.mark.parametrize("metric", ["kl-curvature", "fisher", "kronecker", "output", "gptq", "gradient", "loss"])
def test_scores_are_those_of_the_same_function_in_plain_modules(metric):
    own, plain = models()
    found, expected = (
        profile(model, TOKENS, next_token_loss, ["int3-g16"], metric=metric, progress=False) for model in (own, plain)
    )
    torch.testing.assert_close(torch.tensor(found.scores), torch.tensor(expected.scores), rtol=1e-3, atol=1e-9)
    assert [layer.macs for layer in found.layers] == [layer.macs for layer in expected.layers]


def test_moments_are_those_of_the_product():
    own, plain = models()
    found, expected = (second_moments(model, find_layers(model), TOKENS, next_token_loss) for model in (own, plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("metric", ["kronecker", "fisher", "output"])
def test_other_reads_of_the_numbers_are_scored_by_the_gradient_of_the_weight(metric):
    torch.manual_seed(0)
    table = profile(Reads().eval(), TOKENS, next_token_loss, ["int2-g16"], metric=metric, progress=False)
    assert not table.reasons
    assert (table.scores > 0).all()


def test_gradients_pass_through_substituted_reads():
    torch.manual_seed(0)
    model = Reads().eval()
    seen = []

    def see(name, module, inputs, output):
        seen.append((name, type(module).__name__, output if output.requires_grad else output.requires_grad_()))
        return seen[-1][2].clone()

    with seeing_uses(model, find_layers(model), see):
        loss = next_token_loss(model, TOKENS[0])
    gradients = torch.autograd.grad(loss, [output for *_, output in seen])
    assert [(name, kind) for name, kind, _ in seen] == [("q", "Embedding"), ("d", "Embedding"), ("h", "Linear")]
    expected = torch.autograd.grad(next_token_loss(model, TOKENS[0]), [model.q.weight, model.d.weight])
    torch.testing.assert_close(gradients[:2], expected)


def test_reading_a_weights_dtype_is_not_a_use():
    model = nn.Sequential(nn.Linear(4, 4))
    with seeing_uses(model, find_layers(model), lambda *use: pytest.fail(f"seen: {use}")):
        assert (model[0].weight.dtype, model[0].weight.shape, model[0].weight.size(0)) == (torch.float32, (4, 4), 4)
