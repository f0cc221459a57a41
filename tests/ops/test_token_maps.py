"""Maps of chosen words against diffusers' own probabilities, and the memory they do not take."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tvkernels import token_map_attention

B, F, N, H, D, L = 2, 5, 24, 3, 8, 77


def draw(seed=0, frames=F, tokens=N):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, frames, tokens, H, D, generator=generator)
    k, v = (torch.randn(B, L, H, D, generator=generator) for _ in range(2))
    return q, k, v


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def run_inside(backend, *args):
    """The backend's operations one by one: the registered op would hide them from a mode."""
    from tvkernels.ops.token_map_attention.api import OP

    with LargestResult() as mode:
        OP.backend(backend).forward(*args, None)
    return mode.elements


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_equals_diffusers_attention_scores(backend):
    """`Attention.get_attention_scores`, what people average by hand today, one frame at a time."""
    processor = pytest.importorskip("diffusers.models.attention_processor")
    attention = processor.Attention(
        query_dim=H * D, cross_attention_dim=H * D, heads=H, dim_head=D, bias=False
    )
    q, k, v = draw()
    words = [3, 9, 9]
    out, maps = token_map_attention(q, k, v, torch.tensor(words), backend=backend)
    flat = k.flatten(2), v.flatten(2)
    for f in range(F):
        query, key, value = (attention.head_to_batch_dim(x) for x in (q[:, f].flatten(2), *flat))
        p = attention.get_attention_scores(query, key)
        torch.testing.assert_close(out[:, f].flatten(2), attention.batch_to_head_dim(p @ value))
        mean = p.unflatten(0, (B, H)).mean(1)
        for i, word in enumerate(words):
            torch.testing.assert_close(maps[:, f, :, i], mean[..., word])


def test_all_words_add_up_to_one():
    _, maps = token_map_attention(*draw(), torch.arange(L))
    torch.testing.assert_close(maps.sum(-1), torch.ones(B, F, N))


def test_the_whole_map_is_never_held():
    """The cpu backend holds the scores of one frame; the reference those of all."""
    args = (*draw(frames=8, tokens=64), torch.tensor([2, 5]))
    one_frame = B * H * 64 * L
    assert run_inside("cpu", *args) <= one_frame
    assert run_inside("reference", *args) == 8 * one_frame


def test_backward_holds_one_frame():
    q, k, v = draw(frames=8, tokens=64)
    tokens = torch.tensor([2, 5])
    from tvkernels.ops.token_map_attention.api import OP

    grads = [torch.ones_like(q), torch.ones(*q.shape[:3], 2)]
    with LargestResult() as mode:
        OP.backend("cpu").backward(grads, q, k, v, tokens, None)
    assert mode.elements <= B * H * 64 * L


def test_gradients_of_one_result_alone():
    """A loss on the maps alone leaves v untouched; one on out alone is plain cross-attention."""
    q, k, v = (x.requires_grad_() for x in draw())
    tokens = torch.tensor([4])
    out, maps = token_map_attention(q, k, v, tokens)
    dq, dk, dv = torch.autograd.grad(maps.sum(), (q, k, v), retain_graph=True)
    assert dq.abs().max() > 0
    assert dk.abs().max() > 0
    assert not dv.any()
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    heads = [x.transpose(-2, -3) for x in (q, k, v)]
    plain = torch.nn.functional.scaled_dot_product_attention(
        heads[0], *(x.unsqueeze(1).expand(-1, F, -1, -1, -1) for x in heads[1:])
    )
    expected = torch.autograd.grad(plain.square().sum(), (q, k, v))
    torch.testing.assert_close(found, expected)


def test_no_words_give_no_maps():
    out, maps = token_map_attention(*draw(), torch.tensor([], dtype=torch.int64))
    assert maps.shape == (B, F, N, 0)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.zeros(B, N, H, D)}, r"q is \[B, F, N, H, D\]"),
        ({"q": torch.zeros(1, F, N, H, D)}, "must agree"),
        ({"v": torch.zeros(B, L + 1, H, D)}, "must agree"),
        ({"v": torch.zeros(B, L, H, D).half()}, "one floating dtype"),
        ({"tokens": torch.tensor([1.0])}, "tokens is int64"),
        ({"tokens": torch.tensor(1)}, "tokens is int64"),
        ({"k": torch.zeros(B, 0, H, D), "v": torch.zeros(B, 0, H, D)}, "no tokens"),
    ],
)
def test_errors(change, says):
    call = dict(zip("qkv", draw(), strict=True)) | {"tokens": torch.tensor([1])}
    with pytest.raises(ValueError, match=says):
        token_map_attention(**(call | change))


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned")
def test_words_of_any_stride_and_one_outside_the_text_in_triton():
    """A kernel cannot raise: the map of a word that is not there is NaN, the others stand."""
    pytest.importorskip("triton")
    args, words = draw(tokens=5), [76, -1, 3, 77]
    tokens = torch.tensor([[word, 0] for word in words])[:, 0]
    out, maps = token_map_attention(*args, tokens, backend="triton")
    expected, known = token_map_attention(*args, torch.tensor([76, 3]), backend="reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(maps[..., [0, 2]], known)
    assert maps[..., [1, 3]].isnan().all()


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_a_position_outside_the_text(backend):
    with pytest.raises(IndexError, match="77 is out of bounds"):
        token_map_attention(*draw(), torch.tensor([77]), backend=backend)
