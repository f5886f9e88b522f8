"""Laws S1 to S8 of every recovery: zeros stay, the merge is what was trained, nothing else changes, a resume changes
no bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import MODEL, half, is_site, job_of, make, run, tensors_of, two_of_four, with_registry

from prunus.models.discover import find_blocks
from prunus.models.skeleton import skeleton
from prunus.output import Output
from prunus.recovery import RECOVERIES
from prunus.recovery.job import RecoveryJob
from prunus.recovery.masks import FILE, Masks
from prunus.recovery.parts import whole_block
from prunus.recovery.reconstruct import Reconstruct
from prunus.recovery.recovery import Outcome
from prunus.recovery.retrain import Retrain
from prunus.recovery.run import check_zeros
from prunus.recovery.student import Student, loaded, probe_logits
from prunus.recovery.trainables import kept, low_rank
from prunus.recovery.training import Watch
from prunus.verify import compare

EVERY = sorted(RECOVERIES)
TRAINED = [name for name in EVERY if isinstance(RECOVERIES[name], Retrain)]
LOCAL = [name for name in EVERY if isinstance(RECOVERIES[name], Reconstruct)]
SETTINGS = {
    "biases": {"biases.create": True}, "lisa": {"every": 2}, "prilora": {"every": 2},
    "imp": {"sparsity": 0.6, "rounds": 2}, "ebft": {"epochs": 2}, "perp-local": {"epochs": 2},
}  # fmt: skip
# A local method trains each part by itself, with a rate that is relative to its weights.
ALONE = {"steps": None, "lr": None, "samples": 16, "length": 64, "batch": 1, "dense": str(MODEL)}
MATRICES = ("masklora", "loraprune", "scalelora", "spp", "hira", "prilora", "reconstruct")
ANYTHING = ("full", "lisa", "imp")
# What may change, by method; all else is the same to the bit.
CHANGES: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(MATRICES, is_site),
    **dict.fromkeys(ANYTHING, lambda name: True),
    **dict.fromkeys(("head", "embeddings"), lambda name: name == "model.embed_tokens.weight"),
    "norms": lambda name: "norm" in name,
    "biases": lambda name: name.endswith(".bias"),
    "perp": lambda name: is_site(name) or "norm" in name,
    **dict.fromkeys(("ebft", "perp-local"), lambda name: ".layers." in name),
    "lora": lambda name: False,
}
# A factor of a weight that is zero cannot make it grow, and these train no matrix.
NO_GROWTH = ("scalelora", "spp", "hira", "norms", "biases", "head", "embeddings", "lora")


def job(folder: Path, out: Path, name: str, **more) -> RecoveryJob:
    return job_of(folder, out, name, settings=SETTINGS.get(name, {}), **(ALONE if name in LOCAL else {}), **more)


@dataclass
class Done:
    """One uninterrupted run, which several laws look at."""

    name: str
    job: RecoveryJob
    outcome: Outcome
    zeros: dict

    @property
    def changed(self) -> set[str]:
        before, after = tensors_of(self.job.folder), tensors_of(self.job.work.checkpoint)
        same = {key for key in before.keys() & after.keys() if torch.equal(before[key], after[key])}
        return (before.keys() | after.keys()) - same


@pytest.fixture(scope="session")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_registry(make(tmp_path_factory.mktemp("registered") / "half"))


@pytest.fixture(scope="session", params=EVERY)
def done(request: pytest.FixtureRequest, registered: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    found = job(registered, tmp_path_factory.mktemp("laws") / "out", request.param)
    outcome = run(found)
    return Done(request.param, found, outcome, check_zeros(found))


def test_s1_every_removed_weight_is_still_zero_and_something_was_gained(done: Done) -> None:
    assert done.zeros["before"] == done.zeros["after"] == done.job.masks.removed > 0
    assert done.name == "imp" or done.outcome.after < done.outcome.before


def test_s2_the_merge_is_what_was_trained_or_the_gap_is_told(done: Done) -> None:
    gap = done.outcome.facts.get("merge_gap")
    if done.name in LOCAL:
        assert "merge_gap" not in done.outcome.facts  # written into the weights after every step: nothing is merged
    elif done.name == "loraprune":
        assert gap > 1e-4  # what the update did at removed weights is lost, and said
    elif done.name == "lora":
        assert gap is None  # not merged: kept apart
        assert (done.job.work.checkpoint / "adapter" / "adapter_model.safetensors").is_file()
    else:
        assert gap < 1e-5


def test_s4_what_was_not_chosen_is_the_same_to_the_bit(done: Done) -> None:
    assert all(map(CHANGES[done.name], done.changed)), done.changed
    assert bool(done.changed) == (done.name != "lora")


def test_s5_a_tied_head_stays_the_embeddings(done: Done) -> None:
    config = json.loads((done.job.work.checkpoint / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert "lm_head.weight" not in tensors_of(done.job.work.checkpoint)
    changed = "model.embed_tokens.weight" in done.changed
    assert changed == (done.name in ("head", "embeddings", *ANYTHING))


def test_s6_stock_transformers_computes_what_was_written(done: Done) -> None:
    probe = done.job.work.folder / "probe.safetensors"
    inputs = {"input.input_ids": done.job.probe.inputs["input_ids"], "logits": done.outcome.logits}
    done.job.work.write_tensors(probe.name, inputs)
    found = compare(done.job.work.checkpoint, probe, "float32", "cpu", False)
    assert found["relative_difference"] < 1e-5
    assert not found["missing"]


def test_s7_masks_are_not_taken_from_the_weights_again(done: Done) -> None:
    """In each block one kept weight was zero: it stays kept, and grows where its own value is trained."""
    given, own = Masks.read(done.job.folder / FILE), done.job.masks
    assert not own.derived
    if done.name == "imp":  # prunes more, and the weights that are zero first
        assert done.job.masks.removed > given.removed
        return
    assert all(torch.equal(own.packed[key], given.packed[key]) for key in given.packed)
    before, after = tensors_of(done.job.folder), tensors_of(done.job.work.checkpoint)
    names = [name for name in before if ".up_proj." in name]
    kept_zeros = {name: given.keep(name.removesuffix(".weight")) & (before[name] == 0) for name in names}
    assert [int(mask.sum()) for mask in kept_zeros.values()] == [1] * 5
    grown = sum(bool((after[name][mask] != 0).all()) for name, mask in kept_zeros.items())
    # LISA's turns may leave a block out in six steps.
    assert grown == 0 if done.name in NO_GROWTH else grown >= (2 if done.name == "lisa" else 5)


def test_s8_an_interrupted_run_ends_with_the_same_bits(
    done: Done, registered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the fourth step (of IMP: the first of its second round), or in the third block; three are left then."""
    owner, name, last = (Output, "block", 3) if done.name in LOCAL else (Watch, "on_log", 4)
    original, calls = getattr(owner, name), []

    def counted(self, *args, **kwargs):
        if name == "block" or "loss" in (kwargs["logs"] or {}):
            calls.append(args)
            if len(calls) == last:
                raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    broken = job(registered, tmp_path / "broken", done.name)
    with pytest.raises(KeyboardInterrupt):
        run(broken)
    broken.work.close()
    calls.clear()
    last = 100
    run(job(registered, tmp_path / "broken", done.name))
    assert len(calls) == 3
    expected, found = tensors_of(done.job.work.checkpoint), tensors_of(broken.work.checkpoint)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("name", [*TRAINED, "imp"])
def test_s3_a_recovery_begins_with_the_pruned_model(name: str, registered: Path, tmp_path: Path) -> None:
    found = job(registered, tmp_path / "out", name)
    training = found.recovery.training if name == "imp" else found.recovery
    with loaded(found.stream.weights):
        before = probe_logits(found.model, found.probe.inputs)
        training.attach(Student(found.model, found.blocks, found.masks, found.stream.weights))
        after = probe_logits(found.model, found.probe.inputs)
    if name == "scalelora":
        assert torch.allclose(before, after, rtol=0, atol=2e-6 * float(before.abs().max()))
    else:
        assert torch.equal(before, after)


@pytest.mark.parametrize("train", ["kept", "masklora"])
def test_s3_a_local_training_begins_with_the_part_as_it_is(train: str, registered: Path, tmp_path: Path) -> None:
    found = job(registered, tmp_path / "out", "reconstruct")
    with loaded(found.stream.weights):
        part, before = whole_block(found.blocks[1]), found.blocks[1].module.state_dict()
        before = {name: value.clone() for name, value in before.items()}
        what = kept(part, found.masks) if train == "kept" else low_rank(part, found.masks, 4, 8.0, 0)
        what.unfold()
        after = found.blocks[1].module.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


def in_sixteen_bits() -> list:
    """Two in every run of the tests, all others in the thorough one."""
    quick = [("masklora", torch.bfloat16), ("full", torch.bfloat16)]
    others = [(name, torch.bfloat16) for name in EVERY]
    others += [(name, torch.float16) for name in ("masklora", "scalelora", "spp", "hira", "lisa", "full")]
    return [*quick, *(pytest.param(*case, marks=pytest.mark.thorough) for case in others if case not in quick)]


@pytest.mark.parametrize(("name", "dtype"), in_sixteen_bits(), ids=str)
def test_s1_and_s2_hold_in_sixteen_bits_and_groups(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(tmp_path / "model", cut=two_of_four, dtype=dtype)
    few = {} if name in (*LOCAL, "imp") else {"steps": 3}  # of one step a round, at rate 0, nothing would be learnt
    found = job(model, tmp_path / "out", name, **few)
    outcome = run(found)
    zeros = check_zeros(found)
    assert zeros["before"] == zeros["after"] > 0
    assert name == "imp" or zeros["patterns"]["2:4"] >= 20
    written = tensors_of(found.work.checkpoint)
    groups = [
        w.unflatten(1, (-1, 4)) for key, w in written.items() if is_site(key) and w.dim() == 2 and w.shape[1] % 4 == 0
    ]
    assert all(int((group != 0).sum(-1).max()) <= 2 for group in groups)
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    if name not in ("lora", "loraprune", *LOCAL):
        assert outcome.facts["merge_gap"] < (1.6e-2 if dtype == torch.bfloat16 else 2e-3)  # 8 bits and 11


def test_imp_prunes_in_rounds_to_the_sparsity_asked_and_keeps_what_was_pruned(registered: Path, tmp_path: Path) -> None:
    part = {"method": "imp", "settings": {"sparsity": 0.8, "rounds": 3}, "allow_dense": True}
    for model, start in ((MODEL, 0.0), (registered, 0.5)):
        found = job_of(model, tmp_path / f"out-{start}", **part)
        assert found.masks.removed == pytest.approx(start * sum(map(found.masks.size, found.masks.packed)), rel=0.01)
        before = {name: found.masks.keep(name) for name in found.masks.packed}
        rounds = run(found).facts["rounds"]
        # Each prunes what the one before left: 1 - 0.2^(j / 3), and never less than there was.
        wanted = [max(start, 1 - 0.2 ** (number / 3)) for number in (1, 2, 3)]
        assert [one["sparsity"] for one in rounds] == pytest.approx(wanted, abs=2e-3)
        assert not any(bool((found.masks.keep(name) & ~keep).any()) for name, keep in before.items())
        assert check_zeros(found)["after"] == found.masks.removed


@pytest.mark.parametrize("choice", ["skip", "untie", "both"])
def test_a_tied_head_has_three_legal_ways(choice: str, pruned: Path, tmp_path: Path) -> None:
    found = job_of(pruned, tmp_path / "out", "perp", settings={"head.tied": choice})
    run(found)
    before, after = tensors_of(pruned), tensors_of(found.work.checkpoint)
    config = json.loads((found.work.checkpoint / "config.json").read_text())
    same = torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert same == (choice != "both")
    assert ("lm_head.weight" in after) == (choice == "untie")
    assert config["tie_word_embeddings"] == (choice != "untie")


def test_masked_adamw_with_decay_and_momentum_leaves_every_zero(pruned: Path, tmp_path: Path) -> None:
    found = job_of(pruned, tmp_path / "out", "full", settings={"decay": 0.5})
    run(found)
    assert check_zeros(found)["after"] == found.masks.removed


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


@pytest.mark.parametrize(
    "bits",
    [
        torch.tensor(0, dtype=torch.uint8),
        torch.zeros(2, dtype=torch.uint8),
        torch.zeros(3, 2),
        torch.zeros(3, 1).byte(),
    ],
    ids=["no axis", "one axis", "not bytes", "too few"],
)
def test_a_damaged_registry_is_refused_by_name(bits: torch.Tensor, tmp_path: Path) -> None:
    from prunus.errors import FormatError

    masks = Masks()
    masks.packed["up"], masks.columns["up"] = bits, 16
    masks.write(tmp_path / FILE)
    with pytest.raises(FormatError, match="the mask of up is damaged"):
        Masks.read(tmp_path / FILE)


def test_the_registry_of_another_model_is_refused(pruned: Path, tmp_path: Path) -> None:
    from prunus.errors import FormatError

    model = make(tmp_path / "model", cut=two_of_four)
    job_of(pruned, tmp_path / "first", "norms").masks.write(model / FILE)
    with pytest.raises(FormatError, match=r"are removed, but they are not"):
        job_of(model, tmp_path / "out", "norms")
