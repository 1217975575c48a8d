"""Attention in which image tokens cannot see the text, compared with a hand-written masked softmax."""

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.selection.masked_attention import attend_without_text

BATCH, HEADS, TEXT, IMAGE, HEAD_WIDTH = 2, 3, 5, 7, 4
TOTAL = TEXT + IMAGE


def host_attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **_):
    """What hosts use: both layouts, additive and boolean masks."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def by_hand(q, k, v, num_text, mask=None):
    """Softmax over all keys, with the image-to-text scores at minus infinity; (B, h, tokens, d)."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    blocked = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    blocked[num_text:, :num_text] = True
    return scores.masked_fill(blocked, -torch.inf).softmax(-1) @ v


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, HEADS, TOTAL, HEAD_WIDTH, generator=generator, dtype=dtype) for _ in range(3)]


def merged(x):
    return x.transpose(1, 2).flatten(2)


def masks():
    generator = torch.Generator().manual_seed(1)
    additive = torch.randn(BATCH, 1, TOTAL, TOTAL, generator=generator, dtype=torch.float64)
    boolean = torch.rand(TOTAL, TOTAL, generator=generator) > 0.3
    boolean |= torch.eye(TOTAL, dtype=torch.bool)  # every query sees something
    keys = torch.ones(BATCH, 1, 1, TOTAL, dtype=torch.bool)
    keys[1, ..., -2:] = False
    return {
        "none": None,
        "additive": additive,
        "boolean": boolean,
        "boolean, one row for all queries": keys,
        "additive, one row for all queries": torch.zeros(keys.shape, dtype=torch.float64).masked_fill(~keys, -1e9),
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("skip_reshape", [False, True], ids=["merged heads", "split heads"])
@pytest.mark.parametrize("skip_output_reshape", [False, True], ids=["merged output", "split output"])
def test_it_equals_a_masked_softmax(name, skip_reshape, skip_output_reshape):
    q, k, v = inputs()
    mask = masks()[name]
    expected = by_hand(q, k, v, TEXT, mask)
    given = (q, k, v) if skip_reshape else (merged(q), merged(k), merged(v))
    result = attend_without_text(
        host_attention, *given, HEADS, num_text_tokens=TEXT, mask=mask,
        skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape,
    )  # fmt: skip
    expected = expected if skip_output_reshape else merged(expected)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=0.0)


def test_a_mask_passed_by_position_is_respected():
    q, k, v = inputs()
    mask = masks()["additive"]
    result = attend_without_text(host_attention, q, k, v, HEADS, mask, num_text_tokens=TEXT, skip_reshape=True)
    torch.testing.assert_close(result, merged(by_hand(q, k, v, TEXT, mask)), atol=1e-12, rtol=0.0)


def test_arguments_after_a_positional_mask_and_keywords_reach_the_host():
    seen = []

    def attention(q, k, v, heads, precision, *, mask, transformer_options, **_):
        seen.append((heads, precision, transformer_options))
        return host_attention(q, k, v, heads, mask=mask, skip_reshape=True)

    q, k, v = inputs()
    attend_without_text(
        attention, q, k, v, HEADS, None, "fp32", num_text_tokens=TEXT, skip_reshape=True, transformer_options="options"
    )
    assert seen == [(HEADS, "fp32", "options")] * 2


def test_without_text_tokens_the_host_is_called_once_and_unchanged():
    q, k, v = inputs()
    mask = masks()["additive"]
    result = attend_without_text(host_attention, q, k, v, HEADS, num_text_tokens=0, mask=mask, skip_reshape=True)
    assert torch.equal(result, host_attention(q, k, v, HEADS, mask=mask, skip_reshape=True))


def test_text_tokens_attend_as_before():
    """Same queries, same keys: a kernel may still round differently with fewer rows, so float64 rounding is allowed."""
    q, k, v = inputs()
    plain = host_attention(q, k, v, HEADS, skip_reshape=True)
    masked = attend_without_text(host_attention, q, k, v, HEADS, num_text_tokens=TEXT, skip_reshape=True)
    alone = host_attention(q[:, :, :TEXT], k, v, HEADS, skip_reshape=True)
    assert torch.equal(masked[:, :TEXT], alone)
    torch.testing.assert_close(masked[:, :TEXT], plain[:, :TEXT], atol=1e-14, rtol=0.0)
    assert not torch.allclose(masked[:, TEXT:], plain[:, TEXT:], atol=1e-3)


def test_image_tokens_do_not_depend_on_the_text():
    q, k, v = inputs()
    other_k, other_v = k.clone(), v.clone()
    other_k[:, :, :TEXT] += 5.0
    other_v[:, :, :TEXT] -= 3.0
    first, second = (
        attend_without_text(host_attention, q, keys, values, HEADS, num_text_tokens=TEXT, skip_reshape=True)
        for keys, values in ((k, v), (other_k, other_v))
    )
    assert torch.equal(first[:, TEXT:], second[:, TEXT:])
    assert not torch.equal(first[:, :TEXT], second[:, :TEXT])


@pytest.mark.parametrize("num_text", [TOTAL, TOTAL + 1, -1])
def test_there_must_be_an_image_token(num_text):
    with pytest.raises(InvalidInputError, match=f"fewer than {TOTAL} text tokens, got {num_text}"):
        attend_without_text(host_attention, *inputs(), HEADS, num_text_tokens=num_text, skip_reshape=True)
