"""Laws D1 to D14 of DoLa (numbers of the specification)."""

from __future__ import annotations

import copy
import itertools
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import prunus
from prunus.decoding.dola.contrast import contrast, exchanged, jensen_shannon, next_scores, plausible
from prunus.decoding.dola.generate import DolaOutput, dola_generate, dola_steps
from prunus.decoding.dola.options import Dola, bucket, parse_layers
from prunus.decoding.dola.score import Scoring, _pick, encode, score
from prunus.decoding.dola.states import Layers, Streams, turn
from prunus.decoding.loop import plain
from prunus.errors import ModelError, RecipeError

MODEL = Path(__file__).parent.parent / "assets" / "stories260k"
ALL = (0, 1, 2, 3, 4)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = AutoTokenizer.from_pretrained(MODEL)
    made.padding_side, made.pad_token_id = "left", 0
    return made


def noise(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def made(model: Any, batch: Any, dola: Dola, **options: Any) -> DolaOutput:
    given = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.2, **options}
    return model.generate(
        **batch, **given, custom_generate=dola_generate, dola=dola, return_dict_in_generate=True, output_scores=True
    )


def test_d1_a_premature_layer_like_the_mature_one_leaves_the_plausible_tokens_alike() -> None:
    mature = noise(2, 30)
    scores, _ = next_scores(mature, mature[None], Dola())
    kept = plausible(mature.log_softmax(-1), 0.1)
    assert (scores[kept] == 0).all() and (scores[~kept] == -math.inf).all()
    assert scores.argmax(-1).tolist() == [int(row.nonzero()[0]) for row in kept]
    difference, _, _ = contrast(mature, mature[None], Dola())
    assert torch.allclose(difference.log_softmax(-1), torch.full((2, 30), -math.log(30)))


def test_d2_the_divergence_is_symmetric_bounded_and_0_only_for_equals() -> None:
    p, q = noise(5, 40, scale=8).log_softmax(-1), noise(5, 40, seed=1, scale=8).log_softmax(-1)
    there, back = jensen_shannon(p, q[None]), jensen_shannon(q, p[None])
    assert torch.allclose(there, back, atol=1e-6) and (there > 0).all() and (there <= math.log(2)).all()
    assert (jensen_shannon(p, p[None]) < 1e-6).all()
    apart = torch.tensor([[0.0, -200.0]]), torch.tensor([[[-200.0, 0.0]]])
    assert jensen_shannon(*apart).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_d2_both_divergences_are_their_formulas_in_plain_loops(seed: int) -> None:
    p, q = (noise(1, 12, seed=seed + shift).double().softmax(-1)[0].tolist() for shift in (0, 50))
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    kl = lambda x, y: sum(a * math.log(a / b) for a, b in zip(x, y, strict=True))  # noqa: E731
    args = torch.tensor([p]).log(), torch.tensor([[q]]).log()
    assert jensen_shannon(*args).item() == pytest.approx((kl(p, m) + kl(q, m)) / 2, rel=1e-5)
    assert exchanged(*args).item() == pytest.approx((kl(m, p) + kl(m, q)) / 2 / 12, rel=1e-5)


@pytest.mark.parametrize("compat", ["exact", "published"])
def test_d2_tokens_that_a_layer_rules_out_make_no_number_nan(compat: str) -> None:
    mature, premature = noise(2, 30), noise(3, 2, 30, seed=1)
    ruled = mature.clone(), premature.clone()
    ruled[0][:, 20:] = -math.inf
    ruled[1][..., 20:] = -math.inf
    for top in (0.0, 0.1):
        how = Dola(relative_top=top, compat=compat)
        scores, chosen = next_scores(*ruled, how)
        least, same = next_scores(mature[:, :20], premature[..., :20], how)
        assert torch.allclose(scores[:, :20], least, atol=1e-5) and (scores[:, 20:] == -math.inf).all()
        # The published mean counts the vocabulary, the same for all layers.
        assert chosen.equal(same)
    # Ruled out by the inner layer alone: very much likelier in the last one, and still a number.
    ruled[0][:, 20:] = 0.0
    assert next_scores(*ruled, Dola(relative_top=0.0, compat=compat))[0].isfinite().all()


def test_d2_the_published_divergence_has_no_bound_and_chooses_otherwise() -> None:
    p, q = noise(200, 50, scale=6).log_softmax(-1), noise(4, 200, 50, seed=1, scale=6).log_softmax(-1)
    assert (exchanged(p, q) * 50 > math.log(2)).any()
    assert (exchanged(p, q).argmax(0) != jensen_shannon(p, q).argmax(0)).any()


def test_d2_of_equal_layers_the_lowest_is_chosen() -> None:
    mature, other = noise(3, 20), noise(3, 20, seed=1)
    assert next_scores(mature, torch.stack([mature, other, other]), Dola())[1].tolist() == [1, 1, 1]


def test_d3_the_plausible_set_is_the_likeliest_alone_or_all() -> None:
    log_p = noise(4, 25).log_softmax(-1)
    assert plausible(log_p, 1.0).nonzero()[:, 1].tolist() == log_p.argmax(-1).tolist()
    assert plausible(log_p, 0).all() and plausible(log_p, 1.0, least=3).sum(-1).tolist() == [3, 3, 3, 3]
    ties = torch.zeros(1, 4).log_softmax(-1)
    assert plausible(ties, 1.0).all()


def test_d3_with_relative_top_1_the_text_is_that_of_plain_greedy(model: Any, tokenizer: Any) -> None:
    batch = tokenizer(["Once upon a time"], return_tensors="pt")
    greedy = model.generate(**batch, max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert made(model, batch, Dola(ALL, relative_top=1.0), repetition_penalty=1.0).sequences.equal(greedy)


def test_d4_constants_added_to_logits_change_nothing() -> None:
    mature, premature = noise(2, 30), noise(3, 2, 30, seed=1)
    one, two = next_scores(mature, premature, Dola()), next_scores(mature + 7, premature - 3, Dola())
    assert torch.allclose(one[0], two[0], atol=1e-5) and one[1].equal(two[1])


def test_d5_one_candidate_is_the_static_mode(model: Any, tokenizer: Any) -> None:
    batch = tokenizer(["The little dog"], return_tensors="pt")
    output = made(model, batch, Dola((3,)))
    assert (output.premature_layers == 3).all()
    twice = made(model, batch, Dola((3, 3)))
    assert twice.sequences.equal(output.sequences)


@pytest.mark.parametrize("norm", ["none", "final"])
def test_d6_a_left_padded_batch_equals_its_sequences_alone(model: Any, tokenizer: Any, norm: str) -> None:
    texts = ["Once upon a time", "The little dog was very happy and", "Tim"]
    dola = Dola(ALL, norm=norm)
    together = made(model, tokenizer(texts, return_tensors="pt", padding=True), dola)
    for row, text in enumerate(texts):
        alone = made(model, tokenizer([text], return_tensors="pt"), dola)
        assert together.sequences[row, -16:].equal(alone.sequences[0, -16:])
        assert together.premature_layers[:, row].equal(alone.premature_layers[:, 0])


def test_d6_sequences_of_a_batch_choose_different_layers(model: Any, tokenizer: Any) -> None:
    texts = ["Once upon a time", "The little dog was very happy and", "Tim", "She", "One day a"]
    output = made(model, tokenizer(texts, return_tensors="pt", padding=True), Dola((1, 2, 3, 4), norm="final"))
    assert any(len(set(row.tolist())) > 1 for row in output.premature_layers)


def test_d7_the_cache_changes_nothing(model: Any, tokenizer: Any) -> None:
    batch = tokenizer(["Once upon a time", "Tim"], return_tensors="pt", padding=True)
    cached, whole = (made(model, batch, Dola(ALL, norm="final"), use_cache=use) for use in (True, False))
    assert cached.sequences.equal(whole.sequences)
    assert cached.premature_layers.equal(whole.premature_layers)


@pytest.mark.parametrize("norm", ["none", "final"])
def test_d8_scoring_sums_what_generation_scores(model: Any, tokenizer: Any, norm: str) -> None:
    dola = Dola(ALL, relative_top=0.0, norm=norm)
    texts = [" a little girl named Lily.", " a big dog.", " the"]
    sequences = [encode(tokenizer, "Once upon a time, there was", text) for text in texts]
    found = Layers(model)
    scores = score(found, sequences, dola)
    for (ids, start), own in zip(sequences, scores, strict=True):
        total, likelihood, layers = 0.0, 0.0, []
        for place in range(start, len(ids)):
            step = made(
                model, {"input_ids": torch.tensor([ids[:place]])}, dola, max_new_tokens=1, repetition_penalty=1.0
            )
            total += float(step.scores[0][0, ids[place]])
            layers.append(int(step.premature_layers[0, 0]))
            likelihood += float(model(torch.tensor([ids[:place]])).logits[0, -1].log_softmax(-1)[ids[place]].detach())
        assert own.contrasted == pytest.approx(total, abs=1e-3)
        assert own.plain == pytest.approx(likelihood, abs=1e-3)
        assert own.layers == tuple(layers)


def test_d8_post_softmax_and_the_value_of_the_implausible(model: Any, tokenizer: Any) -> None:
    # Spaces of "qqq" are implausible after this beginning, so the sum shows the value.
    one = [encode(tokenizer, "Once upon a", " qqq")]
    found = Layers(model)
    assert score(found, one, Dola(relative_top=0.9), Scoring())[0].contrasted <= -1000
    free = score(found, one, Dola(relative_top=0.0), Scoring(post_softmax=True))[0]
    assert free.contrasted < 0


@pytest.mark.parametrize("post_softmax", [False, True])
def test_d8_a_token_scores_by_its_formula_in_plain_loops(post_softmax: bool) -> None:
    # The softmax is over all tokens, before the implausible ones are marked.
    mature, premature, tokens = noise(6, 9), noise(1, 6, 9, seed=1), [0, 3, 8, 2, 5, 7]
    how = Dola((1,), relative_top=0.1)
    _, found, _ = _pick(torch.cat([mature[None], premature]), torch.tensor(tokens), how, Scoring(post_softmax))
    marked = 0
    for row, token in enumerate(tokens):
        total = [sum(math.exp(value) for value in one[row].tolist()) for one in (mature, premature[0])]
        log_p, log_q = (
            [value - math.log(own) for value in one[row].tolist()]
            for one, own in zip((mature, premature[0]), total, strict=True)
        )
        scores = [one - other for one, other in zip(log_p, log_q, strict=True)]
        if post_softmax:
            whole = math.log(sum(math.exp(score) for score in scores))
            scores = [score - whole for score in scores]
        wanted = scores[token] if log_p[token] >= max(log_p) + math.log(0.1) else -1000.0
        marked += wanted == -1000.0
        assert float(found[row]) == pytest.approx(wanted, abs=1e-5)
    assert 0 < marked < len(tokens)


def test_d8_a_seam_inside_a_token_counts_to_the_continuation(tokenizer: Any) -> None:
    ids, start = encode(tokenizer, "Once upon a ti", "me")
    assert "me" in tokenizer.decode(ids[start:])


def test_d9_buckets_are_those_of_the_paper() -> None:
    table = {32: (range(0, 16, 2), range(16, 32, 2)), 40: (range(0, 20, 2), range(20, 40, 2)),
             60: (range(0, 20, 2), range(40, 60, 2)), 80: (range(0, 20, 2), range(60, 80, 2))}  # fmt: skip
    for blocks, (low, high) in table.items():
        assert bucket("low", blocks, tied=False) == list(low)
        assert bucket("high", blocks, tied=False) == bucket("high", blocks, tied=True) == list(high)
        assert bucket("low", blocks, tied=True) == list(low)[1:]


@pytest.mark.parametrize(("blocks", "tied", "name"), itertools.product(range(1, 9), (True, False), ("low", "high")))
def test_d9_a_bucket_is_never_empty_and_never_outside(blocks: int, tied: bool, name: str) -> None:
    found = bucket(name, blocks, tied=tied)
    assert found and all(0 <= layer < blocks for layer in found)
    if tied and name == "low":
        assert found[0] == {1: 0, 2: 1}.get(blocks, 2)


def test_d10_a_model_with_dropped_blocks_is_read_like_one_built_so(model: Any, tokenizer: Any) -> None:
    batch = tokenizer(["Once upon a time"], return_tensors="pt")
    surviving = (0, 1, 3, 4)
    dropped = _with_blocks(model, surviving)
    here = made(dropped, batch, Dola((1, 2, 3)))
    assert made(dropped, batch, Dola((1, 2, 4), surviving=surviving)).sequences.equal(here.sequences)
    # Skipped instead of removed: the same states under the old numbers.
    skipped = copy.deepcopy(model)
    skipped.model.layers[2].forward = lambda hidden_states, *args, **kwargs: hidden_states
    assert made(skipped, batch, Dola((1, 2, 4)), use_cache=False).sequences.equal(here.sequences)
    for wrong in ((0, 1), (), (3, 1, 4, 0)):
        with pytest.raises(RecipeError, match="surviving"):
            made(dropped, batch, Dola((1,), surviving=wrong))


def test_d11_and_d12_through_generate_offline(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    batch = tokenizer(["Once upon a time"], return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.2}
    by_name = model.generate(**batch, **options, custom_generate=prunus.dola_generate, dola_layers="low")
    by_number = model.generate(**batch, **options, custom_generate=prunus.dola_generate, dola_layers=[2])
    assert by_name.equal(by_number) and by_name.shape[1] == batch["input_ids"].shape[1] + 8
    # Of this model "low" is layer 2 alone, so only other layers show that what was asked is what is used.
    for layers, wanted in (("low", {2}), ([1], {1}), ("high", {2, 4}), (None, {2})):
        asked = {} if layers is None else {"dola_layers": layers}
        output = model.generate(
            **batch, **options, **asked, custom_generate=prunus.dola_generate, return_dict_in_generate=True
        )
        used = set(output.premature_layers.flatten().tolist())
        assert used <= wanted and (len(wanted) > 1 or used == wanted), layers


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    if kind == "soft cap":
        return Gemma2ForCausalLM(Gemma2Config(**small, final_logit_softcapping=0.5, sliding_window=8)).eval()
    if kind == "scale":
        return GraniteForCausalLM(GraniteConfig(**small, logits_scaling=8.0, embedding_multiplier=3.0)).eval()
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=4, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=8, do_layer_norm_before=False,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("kind", ["soft cap", "scale", "projection"])
def test_d13_what_a_model_does_behind_its_head_is_done_to_every_layer(kind: str) -> None:
    model = tiny(kind)
    ids = torch.randint(3, 40, (1, 6), generator=torch.Generator().manual_seed(0))
    wanted = model(ids).logits[:, -1]
    found = Layers(model)
    with Streams(found, [1, 3], norm="final") as streams, torch.no_grad():
        rows = model(ids).logits[:, -1]
        assert torch.allclose(plain(rows[:1, None])[0], wanted, atol=1e-5)
        # The last stream through the same way must be the mature one: set it in place of a premature one.
        streams.states[3] = streams.states[4]
        hidden = streams.premature()[1]
    assert torch.allclose(hidden, model.get_decoder()(ids).last_hidden_state[:, -1:], atol=1e-5)
    # Read as a candidate, the last stream has the model's own logits: cap, scale and projection are those of `forward`.
    with Streams(found, [1, 4], norm="final"), torch.no_grad():
        both = model(ids).logits[:, -1]
    assert both.shape[0] == 3 and torch.allclose(both[2:], wanted, atol=1e-5)
    assert not both[1].equal(both[2])
    if kind == "soft cap":
        assert rows.abs().max() <= 0.5
    output = made(model, {"input_ids": ids}, Dola((1, 2)))
    assert output.sequences.shape[1] > 6  # one may meet its end token early


def test_d14_nothing_pruned_is_the_dense_text(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    prunus.prune(MODEL, tmp_path / "out", method="magnitude", sparsity=0.0)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    batch = tokenizer(["Once upon a time"], return_tensors="pt")
    one, two = (made(each, batch, Dola(ALL)) for each in (model, pruned))
    assert one.sequences.equal(two.sequences) and one.premature_layers.equal(two.premature_layers)


def test_what_cannot_be_contrasted_is_refused(model: Any, tokenizer: Any) -> None:
    batch = tokenizer(["Once"], return_tensors="pt")
    with pytest.raises(RecipeError, match="outside the model"):
        made(model, batch, Dola((5,)))
    with pytest.raises(RecipeError, match="num_beams"):
        made(model, batch, Dola(), num_beams=2)
    for wrong in ("middle", "3-1", "", "1,,2", "1,3-2", "0-99999999999"):
        with pytest.raises(RecipeError):
            parse_layers(wrong)
    assert parse_layers("2-8:3, 1") == (2, 5, 8, 1)
    headless = copy.deepcopy(model)
    headless.get_output_embeddings = lambda: None
    with pytest.raises(ModelError, match="output embedding"):
        Layers(headless)


def test_a_turned_head_gives_the_same_product(monkeypatch: pytest.MonkeyPatch) -> None:
    head, states = torch.nn.Linear(16, 40), noise(9, 1, 16)
    wanted = head(states)
    assert turn(head, 9) is head and torch.allclose(head(states), wanted, atol=1e-5)
    assert head(states).shape == (9, 1, 40) and torch.allclose(head(states[:2]), wanted[:2], atol=1e-5)
    assert turn(head, 9) is None  # once is enough
    del head.forward
    assert head(states).equal(wanted)
    plain_head = torch.nn.Linear(16, 40, bias=False)
    for limit in (0, 1 << 29):
        monkeypatch.setattr("prunus.decoding.dola.states.COPY_BYTES", limit)
        wanted = plain_head(states)
        turn(plain_head, 9)
        assert torch.allclose(plain_head(states), wanted, atol=1e-5)
        del plain_head.forward


def test_hooks_are_gone_when_the_text_is_done(model: Any, tokenizer: Any) -> None:
    made(model, tokenizer(["Once"], return_tensors="pt"), Dola())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "forward" not in vars(model.lm_head)
    steps = model.generate(**tokenizer(["Once"], return_tensors="pt"), max_new_tokens=5, custom_generate=dola_steps)
    next(steps)
    steps.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _with_blocks(model: Any, kept: tuple[int, ...]) -> Any:
    from torch import nn

    small = copy.deepcopy(model)
    small.model.layers = nn.ModuleList(small.model.layers[index] for index in kept)
    for index, layer in enumerate(small.model.layers):
        layer.self_attn.layer_idx = index
    small.config.num_hidden_layers = len(kept)
    if getattr(small.config, "layer_types", None):
        small.config.layer_types = small.config.layer_types[: len(kept)]
    return small
