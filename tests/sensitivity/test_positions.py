"""Hidden positions: padding and labels of -100 do not change scores and moments."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mpq.network.calibration import counted_positions, cross_entropy, next_token_loss
from mpq.network.layers import find_layers
from mpq.network.moments import second_moments
from mpq.network.ranges import input_ranges
from mpq.sensitivity.profile import profile

METRICS = ["kl-curvature", "kronecker", "fisher", "output", "gptq", "gradient"]
HEAD = 16  # width


class Attention(nn.Module):
    """One causal block over (n, t) tokens, with an attention mask (n, t): logits (n, t, 30)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv = nn.Embedding(30, HEAD), nn.Linear(HEAD, 3 * HEAD)
        self.out, self.up, self.head = (nn.Linear(HEAD, HEAD) for _ in range(3))
        self.head = nn.Linear(HEAD, 30)

    def forward(self, tokens, attention_mask):
        """Logits."""
        hidden = self.embed(tokens)
        hidden = hidden + 40 * (tokens == 0).unsqueeze(-1)  # padding holds arbitrary tokens
        q, k, v = self.qkv(hidden).chunk(3, -1)
        mask = torch.ones(2 * tokens.shape[1:], dtype=torch.bool).tril() & (attention_mask[:, None] > 0)
        hidden = hidden + self.out(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        return self.head(hidden + torch.relu(self.up(hidden)))


def sequences(padding: int):
    tokens = torch.randint(1, 30, (6, 5), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(5 + padding) < 5).long().expand(6, -1)
    padded = functional.pad(tokens, (0, padding))
    return [{"input_ids": padded[rows], "attention_mask": mask[rows]} for rows in (slice(0, 3), slice(3, 6))]


@pytest.mark.parametrize("metric", METRICS)
def test_padding_does_not_change_scores(metric):
    formats = ["int3-channel", "int4-channel"]
    plain, padded = (
        profile(Attention(), sequences(padding), next_token_loss, formats, metric=metric, progress=False)
        for padding in (0, 9)
    )
    np.testing.assert_allclose(padded.scores, plain.scores, rtol=1e-3)


def test_padding_does_not_change_moments_and_ranges():
    model = Attention()
    layers = find_layers(model)
    plain, padded = (second_moments(model, layers, sequences(padding), next_token_loss) for padding in (0, 9))
    assert plain.keys() == padded.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], padded[name])
    spans = [input_ranges(model, layers, sequences(padding), next_token_loss) for padding in (0, 9)]
    assert spans[0]["qkv"] == pytest.approx(spans[1]["qkv"])


def test_labels_of_minus_100_hide_positions_in_every_container():
    labels = torch.tensor([[5, -100], [1, 2]])
    tokens = torch.ones(2, 2, dtype=torch.int64)
    for batch in ((tokens, labels), {"input_ids": tokens, "labels": labels}):
        (mask,) = counted_positions(batch)
        assert mask.tolist() == [[True, False], [True, True]]
    assert counted_positions((tokens, torch.tensor([[1, 2], [3, 4]]))) == ()


@pytest.mark.parametrize("shape", ["samples first", "time first", "flat"])
def test_masks_fit_layers_in_any_order_of_positions(shape):
    inputs = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    batch = {"x": inputs, "attention_mask": mask}

    def forward(model, batch):
        x = batch["x"]
        return model(x if shape == "samples first" else x.transpose(0, 1) if shape == "time first" else x.flatten(0, 1))

    model = nn.Sequential(nn.Linear(5, 2))
    (moment,) = second_moments(model, find_layers(model), [batch], forward).values()
    rows = inputs[mask.bool()]
    torch.testing.assert_close(moment, rows.T @ rows / len(rows))


def test_a_position_with_huge_inputs_and_no_gradient_weighs_nothing():
    """Like a language model's first token."""
    inputs, labels = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(3)), torch.arange(4) % 2
    huge = inputs.clone()
    huge[:, 0] *= 1000
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))

    def loss(model, batch):
        return functional.cross_entropy(model(batch[0])[:, 1:].mean(1), batch[1])

    plain, other = (profile(model, [(x, labels)], loss, ["int3-channel"], progress=False) for x in (inputs, huge))
    np.testing.assert_allclose(plain.scores, other.scores, rtol=1e-3)


class Checkpointed(nn.Module):
    """Recomputes its body on the way back, as `reentrant` says, or not at all (None)."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head, self.reentrant = nn.Linear(8, 3), reentrant

    def forward(self, x):
        """Class logits."""
        hidden = self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.head(hidden)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("metric", ["kl-curvature", "kronecker", "fisher", "hessian", "eigenvalue", "loss"])
def test_checkpointing_changes_no_score(metric, reentrant):
    batch = (torch.randn(5, 6, generator=torch.Generator().manual_seed(4)), torch.arange(5) % 3)
    models = Checkpointed(reentrant), Checkpointed(None)
    tables = [profile(m, [batch], cross_entropy, ["int3-channel"], metric=metric, progress=False) for m in models]
    np.testing.assert_array_equal(tables[0].scores, tables[1].scores)
    kept = models[0](batch[0].requires_grad_()).sum()
    kept.backward()  # and checkpointing is back
    assert models[0].body[0].weight.grad is not None
