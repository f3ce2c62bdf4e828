"""Average pooling against a slow loop, its map of patches, and the connector that does nothing."""

import pytest
import torch

from lavis_evlgen.models.connectors.pooling import AveragePooling, LinearConnector, build_avgpool, grid

WIDTH = 6


def tokens(count, batch=2):
    return torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "side, protected, wanted, shape",
    [
        (16, 1, 29, (4, 7)),  # the paper's 257 -> 29
        (16, 1, 17, (4, 4)),
        (16, 0, 256, (16, 16)),
        (4, 5, 11, (2, 3)),  # DINOv2 with registers
        (3, 1, 2, (1, 1)),
    ],
)
def test_it_equals_a_slow_loop(side, protected, wanted, shape):
    pool = AveragePooling(WIDTH, protected + side**2, protected, wanted)
    x = tokens(protected + side**2)
    prompt = pool(x, return_source=True)
    rows, columns = shape
    sums, counts = torch.zeros(2, rows, columns, WIDTH), torch.zeros(rows, columns)
    for i in range(side):
        for j in range(side):
            row, column = int(i * rows / side), int(j * columns / side)
            sums[:, row, column] += x[:, protected + i * side + j]
            counts[row, column] += 1
    assert counts.min() >= 1 and counts.max() <= -(-side // rows) * -(-side // columns)
    expected = torch.cat([x[:, :protected], (sums / counts[..., None]).flatten(1, 2)], dim=1)
    assert prompt.tokens.shape == (2, wanted, WIDTH) and prompt.mask is None
    torch.testing.assert_close(prompt.tokens, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prompt.source.merge(x), prompt.tokens)
    assert prompt.source.num_slots == pool.num_output_tokens == wanted


def test_cells_are_rectangles_of_neighbours():
    source = AveragePooling(WIDTH, 257, 1, 29)(tokens(257), return_source=True).source
    cells = source.slot[0, 1:].view(16, 16)
    for cell in range(1, 29):
        where = (cells == cell).nonzero()
        height, width = (where.max(0).values - where.min(0).values + 1).tolist()
        assert len(where) == height * width and height == 4 and width in (2, 3)
    assert torch.equal(source.slot[0], source.slot[1])


@pytest.mark.parametrize(
    "wanted, says",
    [
        (32, r"cannot leave 32 tokens of 1 \+ 16 x 16: 31 cells are no grid of at most 16 x 16; nearest: 31, 33"),
        (1, "0 cells are no grid"),
        (300, "299 cells are no grid .*nearest: 241, 257"),
    ],
)
def test_numbers_that_no_grid_has(wanted, says):
    with pytest.raises(ValueError, match=says):
        AveragePooling(WIDTH, 257, 1, wanted)


def test_a_grid_is_as_square_as_can_be():
    assert [grid(n, 16) for n in (28, 16, 12, 1, 256, 30)] == [(4, 7), (4, 4), (3, 4), (1, 1), (16, 16), (5, 6)]
    assert grid(48, 8) == (6, 8)
    with pytest.raises(ValueError, match="avgpool needs a square of patches; this ViT gives 50"):
        AveragePooling(WIDTH, 50, 0, 5)


def test_29_tokens_are_the_default():
    class Vision:
        width, num_tokens, protected = WIDTH, 257, 1

    assert build_avgpool(Vision, {}).num_output_tokens == 29
    assert build_avgpool(Vision, {"num_query_token": 10}).num_output_tokens == 10


def test_it_has_no_weights_and_nothing_to_save():
    pool = AveragePooling(WIDTH, 17, 1, 5)
    assert not list(pool.parameters()) and not pool.state_dict() and pool.ln_vision_init is None


def test_linear_passes_every_token_on():
    connector, x = LinearConnector(WIDTH, 17), tokens(17)
    prompt = connector(x, return_source=True)
    assert prompt.tokens is x and connector.num_output_tokens == 17 and not list(connector.parameters())
    assert torch.equal(prompt.source.slot, torch.arange(17).expand(2, -1))
    assert connector(x).source is None
