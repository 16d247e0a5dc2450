import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.data.collating import Collator
from veneer.data.encoding import IGNORED
from veneer.data.packing import best_fit, pack
from veneer.errors import ConfigError, DataError
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.ops.four_bit import FourBitLayout
from veneer.quant.four_bit import FourBitSpec
from veneer.train.loss import token_loss
from veneer.train.packing_layout import keeps_packed_apart, packing_layout

LENGTHS = [7, 3, 11, 2, 5, 13]
NO_SDPA = {"gemma2", "bloom"}
APART = ["llama", "qwen2", "gemma2", "gemma3", "gpt2", "gpt_neox"]
PAIRS = [
    (family, attention)
    for family in [*APART, "opt", "bloom"]
    for attention in ("eager", "sdpa")
    if not (attention == "sdpa" and family in NO_SDPA)
]


def rows_of(lengths):
    torch.manual_seed(5)
    ids = [torch.randint(2, 61, (n,)).tolist() for n in lengths]
    return [{"input_ids": row, "labels": [IGNORED, *row[1:]]} for row in ids]


def test_a_trained_token_that_opens_a_piece_leaves_nothing():
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED, IGNORED, IGNORED, 8, IGNORED]}
    with pytest.raises(DataError, match=r"no trained token is left in rows of 3 tokens.*Raise max_length"):
        pack(Dataset.from_list([row]), 3, split=True)
    assert len(pack(Dataset.from_list([row]), 4, split=True)) == 1


@given(st.lists(st.integers(1, 17), max_size=40))
@settings(max_examples=60)
def test_best_fit_places_everything_once_within_capacity(lengths):
    bins = best_fit(lengths, 17)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= 17 for members in bins)
    # Best fit leaves at most one bin half empty.
    assert sum(2 * sum(lengths[i] for i in members) <= 17 for members in bins) <= 1


def test_best_fit_fills_exactly_where_it_can():
    assert best_fit([9, 8, 1, 16, 17], 17) == [[0, 1], [2, 3], [4]]


def test_best_fit_refuses_what_cannot_fit():
    with pytest.raises(ConfigError, match="19 tokens does not fit in a row of 17"):
        best_fit([3, 19], 17)


def test_split_keeps_every_token_and_never_predicts_across_a_cut():
    packed = pack(Dataset.from_list(rows_of([19, 4])), 7, split=True)
    assert sum(len(row) for row in packed["input_ids"]) == 23
    for row in packed:
        starts = torch.tensor([0, *row["seq_lengths"]]).cumsum(0)[:-1]
        assert all(row["labels"][start] == IGNORED for start in starts.tolist())


@pytest.mark.parametrize(("family", "attention"), PAIRS)
def test_packed_loss_and_gradients_equal_those_of_single_sequences(make_model, family, attention):
    model = make_model(family, attention)
    rows = rows_of(LENGTHS)
    packed = pack(Dataset.from_list(rows), 17)
    assert max(len(lengths) for lengths in packed["seq_lengths"]) > 1
    batch = Collator(pad_token_id=1, layout=packing_layout(model))(list(packed))

    def gradients(batches):
        model.zero_grad()
        total = sum(token_loss(model, batch).total for batch in batches)
        total.backward()
        return total.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    loss, grad = gradients([batch])
    alone, expected = gradients([Collator(pad_token_id=1)([row]) for row in rows])
    assert loss == pytest.approx(alone, rel=1e-5)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_packed_logits_equal_those_of_single_sequences(make_model, family, attention):
    model = make_model(family, attention)
    (row,) = pack(Dataset.from_list(rows_of([7, 3, 11])), 23)
    batch = Collator(pad_token_id=1, pad_to_multiple_of=29)([row])
    del batch["labels"]
    packed = model(**batch, use_cache=False).logits[0]
    start = 0
    for length in row["seq_lengths"]:
        piece = torch.tensor([row["input_ids"][start : start + length]])
        torch.testing.assert_close(packed[start : start + length], model(piece).logits[0], rtol=1e-4, atol=1e-4)
        start += length
    assert packed.isfinite().all()


@pytest.mark.parametrize(("family", "expected"), [*((f, True) for f in APART), ("opt", False), ("bloom", False)])
def test_the_model_is_asked_whether_it_keeps_sequences_apart(make_model, family, expected):
    model = make_model(family).train()
    model.base_model.eval()
    assert keeps_packed_apart(model) is expected
    assert (model.training, model.base_model.training) == (True, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_question_is_answered_rightly_in_low_precision(make_model, dtype):
    assert keeps_packed_apart(make_model("qwen2").to(dtype))
    assert not keeps_packed_apart(make_model("bloom").to(dtype))


@pytest.mark.parametrize(("family", "expected"), [("llama", True), ("bloom", False)])
def test_the_question_is_answered_rightly_where_a_quantized_model_computes_in_less(make_model, family, expected):
    model = make_model(family)
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            layout = FourBitLayout(tuple(module.weight.shape), "nf4", 64, torch.float32)
            model.set_submodule(name, QuantLinear.from_dense(module, FourBitSpec(layout, True, torch.bfloat16)))
    assert keeps_packed_apart(model) is expected


def test_flat_layout_is_one_row_with_restarting_positions():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    batch = Collator(pad_token_id=1, layout="flat", padding_free=True)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9]]
    assert "attention_mask" not in batch


def test_padded_batch_masks_padding_and_keeps_the_end_token_trained():
    rows = [{"input_ids": [5, 6, 1], "labels": [5, 6, 1]}, {"input_ids": [8, 1], "labels": [8, 1]}]
    batch = Collator(pad_token_id=1, pad_to_multiple_of=4)(rows)
    assert batch["labels"].tolist() == [[IGNORED, 6, 1, IGNORED], [IGNORED, 1, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
