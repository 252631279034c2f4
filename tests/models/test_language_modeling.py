import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.decoder.decoder_config import LossScaling
from rarefy.models import GPTConfig, GPTModel, LanguageModelLoss, LanguageModelMetrics

SCALINGS: tuple[LossScaling, ...] = ("num_tokens", "batch_size")


def random_batches(sizes, vocabulary):
    generator = torch.Generator().manual_seed(sum(sizes))
    for size in sizes:
        labels = torch.randint(vocabulary, (size, 5), generator=generator)
        mask = torch.randint(2, (size, 5), generator=generator)
        mask[0, 0] = 1
        yield torch.randn(size, 5, vocabulary, generator=generator), {"labels": labels, "loss_mask": mask}


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), scaling=st.sampled_from(SCALINGS))
def test_metrics_do_not_depend_on_the_cut_into_batches(sizes, scaling):
    loss, metrics, whole = LanguageModelLoss(scaling, 0.5), LanguageModelMetrics(7), LanguageModelMetrics(7)
    batches = list(random_batches(sizes, 7))
    for logits, batch in batches:
        metrics.update(loss.detailed(logits, batch), batch)
    joined = {name: torch.cat([batch[name] for _, batch in batches]) for name in ("labels", "loss_mask")}
    whole.update(loss.detailed(torch.cat([logits for logits, _ in batches]), joined), joined)
    assert metrics.compute() == pytest.approx(whole.compute(), rel=1e-5)


def test_metrics_of_known_predictions():
    labels = torch.tensor([[0, 1, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 0]])
    logits = torch.full((1, 4, 4), 0.5).log()
    logits[0, 1, 1] += math.log(3)
    metrics = LanguageModelMetrics(4)
    batch = {"labels": labels, "loss_mask": mask}
    metrics.update(LanguageModelLoss().detailed(logits, batch), batch)
    nll = (2 * math.log(4) + math.log(2)) / 3
    expected = {"eval/loss": nll, "eval/lm_perplexity": math.exp(nll), "eval/accuracy": 2 / 3}
    assert metrics.compute() == pytest.approx(expected, rel=1e-5)


def test_fractional_masks_weigh_tokens():
    logits, labels = torch.zeros(1, 2, 4), torch.tensor([[1, 1]])
    logits[0, 0, 1] = 5.0
    mask = torch.tensor([[0.25, 0.5]])
    loss = LanguageModelLoss()(logits, {"labels": labels, "loss_mask": mask})
    each = torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="none")
    assert float(loss) == pytest.approx(float((each * mask[0]).sum() / 0.75))


def test_bits_per_byte_for_byte_tokens_only():
    config = GPTConfig(vocab_size=256, hidden_size=8, num_heads=2, num_hidden_layers=1, filter_size=8)
    model = GPTModel(config).eval()
    metrics, ids = model.eval_metrics(), torch.ones(1, 3).long()
    batch = {"input_ids": ids, "labels": ids}
    metrics.update(model(batch), batch)
    values = metrics.compute()
    assert values["eval/bits_per_byte"] == pytest.approx(math.log2(values["eval/lm_perplexity"]))
    assert "eval/bits_per_byte" not in LanguageModelMetrics(255).compute()


def test_metrics_before_the_first_batch_are_not_numbers():
    assert all(math.isnan(value) for value in LanguageModelMetrics(256).compute().values())
