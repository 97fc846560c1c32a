"""Which kernel attends, and through which mask. Witnesses: torch's own switches of kernels, and the dense mask."""

import contextlib
import dataclasses
from collections.abc import Callable

import pytest
import torch
from helpers import TINY_MODEL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.backends import cuda
from torch.nn.attention import flex_attention as flex

import builders
import start
import train_args
from model import GPT, flex_block_mask, visible_keys, window_block_mask
from nanoforge.device import compile_flex_attention, set_attention_kernel, varying_shapes
from nanoforge.distributed import Ranks
from nanoforge.errors import UserError

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def allowed():
    """The kernels that scaled_dot_product_attention may take; all of them again after the test."""
    is_allowed = {
        "flash": cuda.flash_sdp_enabled,
        "cudnn": cuda.cudnn_sdp_enabled,
        "efficient": cuda.mem_efficient_sdp_enabled,
        "math": cuda.math_sdp_enabled,
    }
    yield lambda: {name for name, is_enabled in is_allowed.items() if is_enabled()}
    set_attention_kernel("auto", CUDA)


def test_varying_shapes_are_attended_without_cudnn_unless_it_was_asked_for(allowed: Callable[[], set[str]]):
    set_attention_kernel("auto", CUDA)
    with varying_shapes():
        assert allowed() == {"flash", "efficient", "math"}
        with varying_shapes():
            pass
        assert allowed() == {"flash", "efficient", "math"}
    assert allowed() == {"flash", "cudnn", "efficient", "math"}

    for name in ("cudnn", "flash"):
        set_attention_kernel(name, CUDA)
        with pytest.raises(ZeroDivisionError), varying_shapes():
            assert allowed() == {name}
            raise ZeroDivisionError
        assert allowed() == {name}


def test_a_kernel_that_cannot_attend_is_named(allowed: Callable[[], set[str]]):
    """On a CPU torch has two kernels, here neither of them allowed."""
    args = train_args.parse(["--attention_kernel=cudnn"])
    q = torch.zeros(1, 2, 4, 8)
    set_attention_kernel("cudnn", CUDA)
    with pytest.raises(UserError, match="--attention_kernel=cudnn"), start.explain_failures(args, Ranks(0, 1, CPU)):
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--deterministic", "--attention_kernel=cudnn"], "--deterministic"),
        (["--window=SL", "--attention_kernel=flash"], "--window"),
        (["--init_from=x", "--objective=grpo", "--attention_kernel=flash"], "--objective=grpo"),
        (["--init_from=x", "--objective=dpo", "--attention_kernel=flash"], "--objective=dpo"),
        (["--window=SL", "--attention_kernel=efficient"], ""),
        (["--deterministic", "--attention_kernel=flash"], ""),
    ],
)
def test_kernels_that_cannot_do_it_are_refused(flags: list[str], error: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) if error else contextlib.nullcontext():
        train_args.parse(flags)
    console = capsys.readouterr().err
    assert ("--attention_kernel" in console and error in console) if error else not console


@pytest.mark.parametrize(
    ("given", "changes", "note"),
    [
        ({}, {"window": "SL"}, None),
        ({}, {}, None),
        ({"objective": "dpo"}, {}, None),
        ({"objective": "dpo"}, {"dropout": 0.1}, "--dropout=0.1"),
        ({}, {"window": "SL", "dropout": 0.1}, "--dropout=0.1"),
        ({}, {"window": "SL", "head_dim": 8}, "16"),
        ({"attention_kernel": "efficient"}, {"window": "SL"}, "--attention_kernel=efficient"),
    ],
)
def test_windows_on_cuda_go_through_flex_attention_or_a_note_says_why_not(
    given: dict, changes: dict, note: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("builders.missing_compiler", lambda device: "")
    monkeypatch.setattr("builders.compile_flex_attention", lambda: flex.flex_attention)
    args = train_args.TrainArgs(**given)
    model, notes = GPT(dataclasses.replace(TINY_MODEL, **{"head_dim": 16} | changes)), []
    builders.add_flex_attention(args, model, CPU, notes.append)
    assert model.flex_attention is None and not notes, "on a CPU the mask stays"
    builders.add_flex_attention(args, model, CUDA, notes.append)
    assert (model.flex_attention is not None) == (note is None and ("window" in changes or "objective" in given))
    assert len(notes) == bool(note) and all(note in line for line in notes)
    monkeypatch.setattr("builders.missing_compiler", lambda device: "triton")
    builders.add_flex_attention(args, model, CUDA, notes.append)
    assert len(notes) == 2 * bool(note) + ("triton" in "".join(notes))


# ---------------------------------------------------------------------------------------------------------------------
# flex_attention: its masks by pairs and by blocks, and the model that uses it

T = 270
DOCUMENTS = ((100, 28, 142), (1, 127, 130, 12))  # lengths, by sequence
BRANCHES = (((0, 140), (90, 220)), ((0, 3), (0, 60), (10, 40), (10, 130), (0, 57)))  # (first, end) of positions
RUNS = (*(tuple((0, length) for length in lengths) for lengths in DOCUMENTS), *BRANCHES)


def packed_positions(T: int) -> torch.Tensor:
    """Positions that restart in every document, and in two sequences in branches of documents: (4, T)."""
    return torch.stack([torch.cat([torch.arange(*run) for run in runs])[:T] for runs in RUNS])


@pytest.fixture
def eager_flex(monkeypatch: pytest.MonkeyPatch):
    """flex_attention as it is defined, without its compiler; on a CPU torch forbids its gradient, which is there."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_validate_device", lambda query, key, value: None)
    window_block_mask.cache_clear()
    yield flex.flex_attention
    window_block_mask.cache_clear()


def dense_mask(positions: torch.Tensor, span: int) -> torch.Tensor:
    """Who sees whom: itself and what the token before it in its text sees, within the window. (B, T, T)"""
    masks = torch.eye(positions.size(-1), dtype=torch.bool).repeat(len(positions), 1, 1)
    for mask, row in zip(masks, positions.tolist(), strict=True):
        document = 0
        for i, position in enumerate(row):
            if position == 0:
                document = i
            elif row[i - 1] == position - 1:
                mask[i] |= mask[i - 1]
            else:
                mask[i] |= mask[document + position - 1]
    return masks & (positions[:, :, None] - positions[:, None] < span)


@pytest.mark.parametrize("span", [1, 128, 129, 1000])
@pytest.mark.parametrize("T", [5, 128, 256, 270])
def test_block_masks_equal_those_that_torch_makes_of_all_pairs(T: int, span: int):
    packed = packed_positions(T)
    for positions, dense in (
        (slice(0, T), dense_mask(torch.arange(T)[None], span)),
        (packed, dense_mask(packed, span)),
    ):
        ours = flex_block_mask(visible_keys(positions, span, CPU, cached=False))
        theirs = flex.create_block_mask(lambda b, h, q, k, dense=dense: dense[b, q, k], len(dense), 1, T, T, "cpu")
        assert ours.shape == theirs.shape
        for prefix in ("kv", "full_kv", "q", "full_q"):
            for name in (f"{prefix}_num_blocks", f"{prefix}_indices"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert torch.equal(flex.create_mask(ours.mask_mod, len(dense), 1, T, T, "cpu")[:, 0], dense)


@pytest.mark.parametrize(
    "changes",
    [
        {"window": "SS", "window_size": 70},
        {"window": "SL", "window_size": 70, "window_rope_base": 100.0, "position": "rope", "n_kv_head": 2},
        {"window": "L", "value_residual": True, "attention_scale": 0.12},
    ],
)
def test_flex_attention_equals_the_mask(changes: dict, eager_flex: Callable[..., torch.Tensor]):
    """Losses and gradients: windows, packed documents and both, grouped heads, an own scale, a base of the windows'."""
    model = GPT(dataclasses.replace(TINY_MODEL, block_size=T, **changes))
    idx = torch.randint(31, (4, T), generator=torch.Generator().manual_seed(0))
    attended = []

    def counted(*args, **kwargs):
        attended.append(kwargs["block_mask"])
        return eager_flex(*args, **kwargs)

    def loss_and_gradients(kernel: Callable[..., torch.Tensor] | None, positions: torch.Tensor | None):
        model.flex_attention = kernel
        losses = model(idx, idx, position_ids=positions)
        return losses, torch.autograd.grad(losses.mean(), list(model.parameters()))

    with torch.inference_mode():  # the masks that it makes are of use in training
        model.flex_attention = eager_flex
        model(idx)
    for positions in (None, packed_positions(T)):
        expected = loss_and_gradients(None, positions)
        torch.testing.assert_close(loss_and_gradients(counted, positions), expected, atol=1e-6, rtol=1e-4)
    n_windowed = sum(model.is_windowed)
    assert len(attended) == n_windowed + 2, "full layers of unpacked rows have the causal kernel"
    assert len(set(map(id, attended))) == len(set(model.is_windowed)) + bool(n_windowed), "one mask a kind of layer"


def test_documents_of_a_row_equal_each_by_itself(eager_flex: Callable[..., torch.Tensor]):
    config = dataclasses.replace(TINY_MODEL, block_size=T, window="SL", window_size=20, position="rope")
    model = GPT(config).eval().requires_grad_(requires_grad=False)
    model.flex_attention = eager_flex
    idx = torch.randint(31, (4, T), generator=torch.Generator().manual_seed(0))
    packed = model(idx, position_ids=packed_positions(T))
    alone = [model(document[None])[0] for document in idx[0].split(DOCUMENTS[0])]
    torch.testing.assert_close(packed[0], torch.cat(alone), atol=1e-5, rtol=1e-5)
    trunk, branch = idx[2].split([140, 130])
    alone = [model(text[None])[0] for text in (trunk, torch.cat((trunk[:90], branch)))]
    torch.testing.assert_close(packed[2], torch.cat((alone[0], alone[1][90:])), atol=1e-5, rtol=1e-5)


def test_flex_attention_reads_nothing_on_the_host(eager_flex: Callable[..., torch.Tensor]):
    """Under FakeTensorMode a read raises."""
    with FakeTensorMode():
        model = GPT(dataclasses.replace(TINY_MODEL, block_size=T, window="SL", window_size=20))
        model.flex_attention = eager_flex
        idx = torch.zeros(2, T, dtype=torch.long)
        for positions in (None, torch.zeros(2, T, dtype=torch.long)):
            model(idx, idx, position_ids=positions).mean().backward()


@pytest.mark.slow
def test_compiled_blocks_hold_flex_attention_and_are_not_compiled_again_for_other_documents():
    """fullgraph: an error at a graph break."""
    model = GPT(dataclasses.replace(TINY_MODEL, block_size=T, window="SL", window_size=20)).requires_grad_(
        requires_grad=False
    )
    model.flex_attention = compile_flex_attention()
    graphs = []

    def count(graph: torch.fx.GraphModule, example_inputs: list) -> Callable:
        graphs.append([node.name for node in graph.graph.nodes if "flex_attention" in str(node.target)])
        return graph.forward

    for block in model.blocks:
        block.compile(backend=count, dynamic=False, fullgraph=True)
    idx = torch.zeros(4, T, dtype=torch.long)
    packed = packed_positions(T)
    n_graphs = []
    for positions in (None, None, packed, packed.flip(0)):
        model(idx, position_ids=positions)
        n_graphs.append(len(graphs))
    assert n_graphs[0] == n_graphs[1] == 2 < n_graphs[2] == n_graphs[3] <= 4
    calls = list(map(len, graphs))
    assert calls[:2] == [1, 0] and set(calls[2:]) == {1}, "none in the full layer of unpacked rows"
