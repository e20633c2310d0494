"""What a config of transformers says of a network, by timm's names."""

import transformers

from netclone.graph.configs import facts_of, options_of


def test_a_config_says_classes_their_names_and_the_size_of_images():
    config = transformers.ViTConfig(image_size=[32, 48], num_channels=1, id2label={0: "heron", 1: "ibis"})
    assert facts_of(config) == {
        "library": "transformers",
        "architecture": "vit",
        "num_classes": 2,
        "label_names": ["heron", "ibis"],
        "input_size": [1, 32, 48],
    }


def test_numbered_labels_are_no_names_and_a_network_of_any_size_has_none():
    assert facts_of(transformers.ResNetConfig(num_labels=3)).keys() == {"library", "architecture", "num_classes"}


def test_options_are_those_that_differ_from_the_default():
    config = transformers.ViTConfig(hidden_size=24, num_labels=3, architectures=["ViTForImageClassification"])
    assert options_of(config)["hidden_size"] == 24
    assert "num_hidden_layers" not in options_of(config) and "id2label" not in options_of(config)
    assert transformers.ViTConfig(**options_of(config)).hidden_size == 24


def test_anything_else_says_nothing():
    assert facts_of(object()) == options_of({"model_type": "vit"}) == {}
