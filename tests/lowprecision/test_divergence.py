import numpy as np
import pytest
import torch

from mpq.lowprecision.divergence import (
    Generation,
    average_std_of_lengths,
    average_std_of_probability,
    divergence_indices,
    generate,
    std_at_accuracy,
)
from mpq.models import bundled_model
from mpq.network.calibration import seeded


def made(tokens, probabilities):
    return Generation(np.array(tokens), np.array(probabilities, dtype=np.float64))


def test_deviations_by_hand():
    assert std_at_accuracy([0.5, 0.7]) == pytest.approx(0.2 / 2**0.5)
    assert average_std_of_lengths([[10, 4], [14, 4]]) == pytest.approx((4 / 2**0.5 + 0) / 2)


def test_probabilities_count_up_to_the_first_divergence():
    runs = [made([[1, 2, 3], [4, 5, 6]], [[0.9, 0.5, 0.3], [0.8, 0.8, 0.8]]),
            made([[1, 9, 3], [4, 5, 6]], [[0.7, 0.5, 0.9], [0.8, 0.8, 0.6]])]  # fmt: skip
    assert divergence_indices(runs) == [1, None]
    first = (0.2 / 2**0.5 + 0) / 2
    second = (0 + 0 + 0.2 / 2**0.5) / 3
    assert average_std_of_probability(runs) == pytest.approx((first + second) / 2)


def test_generation_takes_the_likeliest_token():
    model = bundled_model("tiny-lm")
    prompts = torch.randint(0, 1024, (2, 6), generator=seeded(0))
    run = generate(model, prompts, 4)
    whole = torch.cat((prompts, torch.from_numpy(run.tokens)), 1)
    with torch.no_grad():
        chances = model(whole).double().softmax(-1)[:, 5:-1]
    assert torch.equal(chances.argmax(-1), torch.from_numpy(run.tokens))
    assert run.probabilities == pytest.approx(chances.amax(-1).numpy(), rel=1e-4)
    assert divergence_indices([run, generate(model, prompts, 4)]) == [None, None]
