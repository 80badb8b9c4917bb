"""What a plan removes, as sentences."""

import pytest

from optimum_fwdprune.allocation.losses import losses_by_kind, removed_depth
from optimum_fwdprune.architectures.site import keyed_by_site


def kept(attention, mlp):
    """The kept units of layers with 4 heads and 8 channels, by the numbers of units that each layer keeps."""
    counts = {"attention": attention, "mlp": mlp}
    return {(layer, kind): list(range(n)) for kind, numbers in counts.items() for layer, n in enumerate(numbers)}


@pytest.mark.parametrize(
    ("attention", "mlp", "sentences"),
    [
        (
            [4, 4, 4, 4],
            [8, 8, 8, 6],
            [
                "Attention heads: none is removed.",
                "MLP channels: 6.2% are removed, 25.0% in layer 3, none in layers 0 to 2.",
            ],
        ),
        (
            [3, 3],
            [4, 2],
            [
                "Attention heads: 25.0% are removed in every layer.",
                "MLP channels: 62.5% are removed, from 50.0% in layer 0 to 75.0% in layer 1.",
            ],
        ),
        (
            [4, 0, 4, 4],
            [8, 0, 8, 8],
            [
                "1 of 4 layers is removed: layer 1.",
                "Attention heads of the other layers: none is removed.",
                "MLP channels of the other layers: none is removed.",
            ],
        ),
        (
            [4, 0, 0, 4, 0],
            [8, 0, 0, 4, 0],
            [
                "3 of 5 layers are removed: layers 1, 2 and 4.",
                "Attention heads of the other layers: none is removed.",
                "MLP channels of the other layers: 25.0% are removed, 50.0% in layer 3, none in layer 0.",
            ],
        ),
        (
            [4, 0, 4, 0],
            [8, 8, 0, 0],
            [
                "1 of 4 layers is removed: layer 3.",
                "The attention of layer 1 and the MLP of layer 2 are removed.",
                "Attention heads of the other layers: none is removed.",
                "MLP channels of the other layers: none is removed.",
            ],
        ),
        (
            [4, 4, 4],
            [0, 0, 0],
            ["The MLPs of layers 0 to 2 are removed.", "Attention heads: none is removed."],
        ),
        (
            [0, 4, 4],
            [8, 8, 8],
            [
                "The attention of layer 0 is removed.",
                "Attention heads of the other layers: none is removed.",
                "MLP channels: none is removed.",
            ],
        ),
    ],
)
def test_sentences_name_removed_layers_and_sublayers_and_the_shares_of_the_rest(attention, mlp, sentences):
    units = kept(attention, mlp)
    sizes = {key: 4 if key[1] == "attention" else 8 for key in units}

    losses = losses_by_kind(keyed_by_site(units), keyed_by_site(sizes), "query_head")
    assert list(losses.values()) == sentences


def test_a_removed_layer_is_no_removed_sublayer():
    assert removed_depth(keyed_by_site(kept([4, 0, 0], [8, 0, 8]))) == ([1], {"attention": [2]})
