import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.evaluation import Reference, evaluate
from mpq.network.calibration import cross_entropy, mean_loss, next_token_loss, seeded


def classifier() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 1, generator=seeded(0, name))
    return model


class Bigrams(nn.Module):
    """Logits of the next token by looking up the last one."""

    def __init__(self, vocabulary: int = 11) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        self.table.weight.data.normal_(0, 1, generator=seeded(0, "bigrams"))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.table(input_ids)


def images(sizes=(7, 2)):
    return [
        (torch.randn(n, 4, generator=seeded(1, n)), torch.randint(0, 3, (n,), generator=seeded(2, n))) for n in sizes
    ]


def test_accuracy_counts_correct_answers_and_keeps_the_mode():
    model, batches = classifier().train(), images()
    quality = evaluate(model, batches, "accuracy")
    assert model.training
    assert model[1].training
    model.eval()
    right = [bool(model(x[None]).argmax() == y) for xs, ys in batches for x, y in zip(xs, ys, strict=True)]
    assert quality.hits.tolist() == right
    assert quality.value == pytest.approx(np.mean(right))
    assert quality.error == pytest.approx(np.std(right, ddof=1) / 3)
    assert quality.loss == pytest.approx(mean_loss(model, batches, cross_entropy))


def test_perplexity_is_the_exponential_of_the_mean_token_loss():
    model = Bigrams()
    batches = [torch.randint(0, 11, (n, 6), generator=seeded(3, n)) for n in (3, 2)]
    quality = evaluate(model, batches, "perplexity")
    assert quality.value == pytest.approx(math.exp(mean_loss(model, batches, next_token_loss)), rel=1e-6)
    assert quality.error == pytest.approx(quality.value * np.std(quality.losses, ddof=1) / math.sqrt(5), rel=1e-6)


def test_masked_tokens_weigh_nothing():
    tokens = torch.randint(0, 11, (2, 6), generator=seeded(4))
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    masked = evaluate(Bigrams(), [{"input_ids": tokens, "attention_mask": mask}], "perplexity")
    parts = [evaluate(Bigrams(), [row], "perplexity") for row in (tokens[:1], tokens[1:, :4])]
    assert masked.weights.tolist() == [5, 3]
    assert masked.loss == pytest.approx((5 * parts[0].loss + 3 * parts[1].loss) / 8, rel=1e-6)


def test_a_custom_loss_is_evaluated_sample_by_sample():
    model, batches = classifier(), images()
    ours = evaluate(model, batches, "loss", cross_entropy)
    assert ours.losses == pytest.approx(evaluate(model, batches, "accuracy").losses, rel=1e-5)


def test_paired_differences_have_the_standard_error_of_the_differences():
    batches = images((40,))
    first, second = classifier(), classifier()
    with torch.no_grad():
        second[0].weight += 0.01
    a, b = (evaluate(model, batches, "accuracy") for model in (first, second))
    difference, error = b.loss_above(a)
    assert difference == pytest.approx(b.loss - a.loss, rel=1e-4)
    assert error == pytest.approx(np.std(b.losses - a.losses, ddof=1) / math.sqrt(40), rel=1e-6)
    assert error < evaluate(first, batches, "loss", cross_entropy).error / 5
    with pytest.raises(MpqError, match="same samples"):
        a.loss_above(evaluate(first, images((5,)), "accuracy"))


def test_invalid_arguments_are_named():
    with pytest.raises(MpqError, match="accuracy, perplexity, distance, loss"):
        evaluate(classifier(), images(), "bleu")
    with pytest.raises(MpqError, match="no calibration batches"):
        evaluate(classifier(), [], "accuracy")
    broken = classifier()
    broken[2].bias.data.fill_(math.nan)
    with pytest.raises(MpqError, match="batch 0 is nan"):
        evaluate(broken, images(), "accuracy")


def test_divergence_from_the_original_is_that_of_single_predictions():
    first, second = Bigrams(), Bigrams()
    with torch.no_grad():
        second.table.weight.mul_(0.5).add_(torch.randn(11, 11, generator=seeded(5)))
    tokens = torch.randint(0, 11, (3, 6), generator=seeded(3))
    mask = torch.ones_like(tokens)
    mask[2, 3:] = 0
    batches = [{"input_ids": tokens, "attention_mask": mask}]
    reference = Reference(first, batches, "perplexity")
    found = reference.measure(second)
    kl, same, flips = [], [], []
    for row, length in zip(tokens, (5, 5, 2), strict=True):
        one, other = (model(row[:length]).log_softmax(-1) for model in (first, second))
        kl.append((one.exp() * (one - other)).sum(-1).detach())
        same.append((one.argmax(-1) == other.argmax(-1)).float())
        target = row[1 : length + 1]
        flips.append(((one.argmax(-1) == target) != (other.argmax(-1) == target)).float())
    assert found.divergence.flips == pytest.approx([float(part.mean()) for part in flips])
    assert 0 < found.divergence.flipping()[0] < 1 - found.divergence.agreeing()[0] + 1e-12
    assert found.divergence.kl == pytest.approx([float(part.mean()) for part in kl], rel=1e-5)
    assert found.divergence.agreement == pytest.approx([float(part.mean()) for part in same])
    assert found.divergence.mean()[0] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-5)
    assert found.divergence.quantile == pytest.approx(float(torch.cat(kl).quantile(0.99)), rel=1e-5)
    assert found.loss == pytest.approx(evaluate(second, batches, "perplexity").loss)
    itself = reference.measure(first)
    assert itself.divergence.mean()[0] == pytest.approx(0, abs=1e-7)
    assert itself.divergence.agreeing()[0] == 1
    gain, error = itself.harm_above(found)
    assert gain == pytest.approx(-found.divergence.mean()[0], rel=1e-5)
    assert 0 < error < 1


def test_large_vocabularies_are_kept_in_half_the_bytes_and_stay_normalized():
    first, second = Bigrams(2000), Bigrams(2000)
    with torch.no_grad():
        second.table.weight.mul_(0.9)
    tokens = torch.randint(0, 2000, (2, 9), generator=seeded(3))
    found = Reference(first, [tokens], "perplexity").measure(second).divergence
    with torch.no_grad():
        one, other = (model(tokens[:, :-1]).double().log_softmax(-1) for model in (first, second))
    assert found.kl == pytest.approx((one.exp() * (one - other)).sum(-1).mean(1).numpy(), rel=1e-3)


def test_losses_that_compare_samples_are_measured_on_whole_batches():
    """A contrastive loss of a single sample is zero; a single step of a time-first batch has no loss."""

    def contrastive(model, batch):
        one, other = (functional.normalize(model(part), dim=-1) for part in batch)
        return functional.cross_entropy(one @ other.T / 0.1, torch.arange(len(one)))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4))
    batches = [(torch.randn(5, 8), torch.randn(5, 8)) for _ in range(3)]
    quality = evaluate(model, batches, "loss", contrastive)
    assert quality.losses.tolist() == pytest.approx([contrastive(model, batch).item() for batch in batches])
    reference = Reference(model, batches, "loss", contrastive)
    other = reference.measure(nn.Sequential(nn.Linear(8, 4)))
    assert len(other.losses) == len(reference.quality.losses) == 3


def test_time_first_losses_are_measured_by_sample():
    def next_step(model, batch):
        return functional.cross_entropy(model(batch)[:-1].flatten(0, 1), batch[1:].flatten())

    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    tokens = torch.randint(0, 9, (7, 3))
    quality = evaluate(model, [tokens], "loss", next_step)
    assert quality.losses.tolist() == pytest.approx([next_step(model, tokens[:, [i]]).item() for i in range(3)])
