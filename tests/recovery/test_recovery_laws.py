"""Laws of every recovery: zeros stay, the merge is what was trained, nothing else changes, a resume changes no bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import half, is_site, job_of, make, run, tensors_of, two_of_four

from prunus.models.discover import find_blocks
from prunus.models.skeleton import skeleton
from prunus.recovery import RECOVERIES
from prunus.recovery.masks import FILE, Masks
from prunus.recovery.retrain import Retrain
from prunus.recovery.run import check_zeros
from prunus.recovery.student import Student, loaded, probe_logits
from prunus.recovery.training import Watch
from prunus.verify import compare

TRAINED = sorted(name for name, recovery in RECOVERIES.items() if isinstance(recovery, Retrain))
SETTINGS = {"biases": {"biases.create": True}, "lisa": {"every": 2}, "prilora": {"every": 2}}
EXACT = [name for name in TRAINED if name not in ("lora", "loraprune")]
IN_PLACE = ("norms", "biases", "embeddings", "head")


def settings(name: str) -> dict:
    return SETTINGS.get(name, {})


@pytest.mark.parametrize("name", TRAINED)
def test_zeros_stay_and_stock_transformers_computes_what_was_trained(name: str, pruned: Path, tmp_path: Path) -> None:
    job = job_of(pruned, tmp_path / "out", name, settings=settings(name))
    outcome = run(job)
    zeros = check_zeros(job)
    assert zeros["before"] == zeros["after"] == job.masks.removed > 0
    assert outcome.after < outcome.before
    job.work.write_tensors(
        "probe.safetensors", {"input.input_ids": job.probe.inputs["input_ids"], "logits": outcome.logits}
    )
    found = compare(job.work.checkpoint, job.work.folder / "probe.safetensors", "float32", "cpu", False)
    assert found["relative_difference"] < 1e-5
    assert not found["missing"]
    gap = outcome.facts["merge_gap"]
    if name in EXACT:
        assert gap < 1e-5
    elif name == "loraprune":
        assert gap > 1e-4  # what the update did at removed weights is lost, and said
    before, after = tensors_of(pruned), tensors_of(job.work.checkpoint)
    sites = {key for key in before if is_site(key) and not torch.equal(before[key], after[key])}
    others = {key for key in before if not is_site(key) and not torch.equal(before[key], after[key])}
    if name in IN_PLACE or name == "lora":
        assert not sites
    elif name in ("masklora", "scalelora", "spp", "hira", "loraprune", "prilora"):
        assert sites
        assert not others


def fast(*quick: str, others: tuple[str, ...]) -> list:
    """The first in every run of the tests, the others where minutes do not matter."""
    return [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


@pytest.mark.parametrize("name", fast("masklora", "full", others=("scalelora", "spp", "hira", "lisa")))
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_two_of_four_holds_in_sixteen_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(tmp_path / "model", cut=two_of_four, dtype=dtype)
    job = job_of(model, tmp_path / "out", name, settings=settings(name))
    run(job)
    zeros = check_zeros(job)
    assert zeros["before"] == zeros["after"]
    assert zeros["patterns"].get("2:4", 0) >= 20
    assert {tensor.dtype for tensor in tensors_of(job.work.checkpoint).values()} == {dtype}


@pytest.mark.parametrize("name", TRAINED)
def test_a_recovery_begins_with_the_pruned_model(name: str, pruned: Path, tmp_path: Path) -> None:
    job = job_of(pruned, tmp_path / "out", name, settings=settings(name))
    with loaded(job.stream.weights):
        before = probe_logits(job.model, job.probe.inputs)
        student = Student(job.model, job.blocks, job.masks, job.stream.weights)
        job.recovery.attach(student)
        after = probe_logits(job.model, job.probe.inputs)
    if name == "scalelora":
        assert torch.allclose(before, after, rtol=0, atol=2e-6 * float(before.abs().max()))
    else:
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", fast("masklora", others=("prilora", "lisa", "full", "perp")))
def test_an_interrupted_run_ends_with_the_same_bits(
    name: str, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = job_of(pruned, tmp_path / "whole", name, settings=settings(name))
    run(whole)
    log = Watch.on_log

    def dying(self: Watch, args, state, control, logs=None, **kwargs):
        if state.global_step == 4 and logs and "loss" in logs:
            raise KeyboardInterrupt
        log(self, args, state, control, logs, **kwargs)

    broken = job_of(pruned, tmp_path / "broken", name, settings=settings(name))
    with monkeypatch.context() as patched:
        patched.setattr(Watch, "on_log", dying)
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    assert broken.work.read("training/last.json") == {"step": 3}
    broken.work.close()
    run(job_of(pruned, tmp_path / "broken", name, settings=settings(name)))
    expected, found = tensors_of(whole.work.checkpoint), tensors_of(broken.work.checkpoint)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_kept_weight_that_is_zero_can_grow(pruned: Path, tmp_path: Path) -> None:
    model = make(tmp_path / "model")
    first = job_of(model, tmp_path / "first", "full")
    first.masks.write(model / FILE)
    tensors = tensors_of(model)
    name = "model.layers.1.mlp.up_proj"
    row, column = first.masks.keep(name).nonzero()[7].tolist()
    tensors[f"{name}.weight"][row, column] = 0.0
    from safetensors.torch import save_file

    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    job = job_of(model, tmp_path / "out", "full")
    assert not job.masks.derived
    assert job.masks.removed == first.masks.removed
    run(job)
    assert tensors_of(job.work.checkpoint)[f"{name}.weight"][row, column] != 0


@pytest.mark.parametrize("choice", ["skip", "untie", "both"])
def test_a_tied_head_has_three_legal_ways(choice: str, pruned: Path, tmp_path: Path) -> None:
    import json

    job = job_of(pruned, tmp_path / "out", "perp", settings={"head.tied": choice})
    run(job)
    before, after = tensors_of(pruned), tensors_of(job.work.checkpoint)
    config = json.loads((job.work.checkpoint / "config.json").read_text())
    same = torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert same == (choice != "both")
    assert ("lm_head.weight" in after) == (choice == "untie")
    assert config["tie_word_embeddings"] == (choice != "untie")


def test_masked_adamw_with_decay_and_momentum_leaves_every_zero(pruned: Path, tmp_path: Path) -> None:
    job = job_of(pruned, tmp_path / "out", "full", settings={"decay": 0.5})
    run(job)
    assert check_zeros(job)["after"] == job.masks.removed


def table() -> list:
    """The trainable shares of PERP's table, per cent: biases, norms, both, all-linear LoRA and head, rank 16."""
    from transformers import LlamaConfig, MistralConfig, OPTConfig, Qwen2Config

    opt = lambda width, layers, heads: OPTConfig(  # noqa: E731
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * width,
        word_embed_proj_dim=width,
    )
    llama = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    return [
        ("OPT-125M", opt(768, 12, 12), (0.0816, 0.0307, 0.0969, 2.79)),
        ("OPT-1.3B", opt(2048, 24, 32), (0.0412, 0.0153, 0.0489, 1.175)),
        ("OPT-6.7B", opt(4096, 32, 32), (0.0217, 0.0080, 0.0257, 0.602)),
        ("OPT-30B", opt(7168, 48, 56), (0.0127, 0.0046, 0.0150, 0.3475)),
        ("LLaMA-2-7B", LlamaConfig(intermediate_size=11008, **llama), (0, 0.00395, 0.00395, 0.598)),
        (
            "Mistral-7B",
            MistralConfig(intermediate_size=14336, num_key_value_heads=8, **llama),
            (0, 0.00368, 0.00368, 0.584),
        ),
        (
            "Llama-3.1-8B",
            LlamaConfig(intermediate_size=14336, num_key_value_heads=8, vocab_size=128256, **llama),
            (0, 0.00332, 0.00332, 0.546),
        ),
        (
            "Qwen2.5-7B",
            Qwen2Config(
                hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False,
            ),
            (0.0017, 0.0027, 0.0044, 0.560),
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("case", table(), ids=lambda case: case[0])
def test_trainable_shares_are_those_of_the_table(case: tuple, tmp_path: Path) -> None:
    from prunus.models.skeleton import parameter_count
    from prunus.recovery.adapters import Head, MaskLoRA
    from prunus.recovery.parameters import Biases, Norms

    _, config, shares = case
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(tmp_path)
    both = (Biases(alone=False), Norms())
    adapters = (MaskLoRA(rank=16), Head(rank=16, tied="both"))
    # The table's last column: of OPT everything together, of the others the adapters alone.
    everything = (*both, *adapters) if config.model_type == "opt" else adapters
    for parts, share in zip(((both[0],), (both[1],), both, everything), shares, strict=True):
        model = skeleton(tmp_path)
        parameters = parameter_count(model)
        own = {id(value) for value in model.parameters()}
        student = Student(model, find_blocks(model), Masks())
        for part in parts:
            part.attach(student)
        trained = sum(value.numel() for value in student.chosen)
        # New parameters count in the whole, too.
        parameters += sum(value.numel() for value in student.chosen if id(value) not in own)
        digits = len(str(share).partition(".")[2])
        assert round(100 * trained / parameters, digits) == pytest.approx(share, abs=0.01 * 10**-digits)


def test_masks_survive_their_file(tmp_path: Path) -> None:
    masks = Masks()
    generator = torch.Generator().manual_seed(0)
    wanted = {f"m{columns}": torch.rand(5, columns, generator=generator) > 0.5 for columns in (1, 7, 8, 9, 64)}
    for name, keep in wanted.items():
        masks.add(name, keep)
    masks.write(tmp_path / FILE)
    found = Masks.read(tmp_path / FILE)
    assert all(torch.equal(found.keep(name), keep) for name, keep in wanted.items())
    assert found.removed == sum(int((~keep).sum()) for keep in wanted.values())


def test_the_smallest_pattern_that_explains_a_mask_is_named() -> None:
    from prunus.recovery.masks import pattern_of

    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    assert pattern_of(two_of_four(weight) != 0) == "2:4"
    assert pattern_of(half(weight) != 0) is None
    assert pattern_of(torch.ones(4, 8, dtype=torch.bool)) is None


def test_the_registry_of_another_model_is_refused(pruned: Path, tmp_path: Path) -> None:
    from prunus.errors import FormatError

    model = make(tmp_path / "model", cut=two_of_four)
    job = job_of(pruned, tmp_path / "first", "norms")
    job.masks.write(model / FILE)
    with pytest.raises(FormatError, match=r"are removed, but they are not"):
        job_of(model, tmp_path / "out", "norms")
