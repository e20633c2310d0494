"""Classifiers of transformers: by name from a folder, as source and target, and what their folders say."""

import json

import huggingface_hub
import pytest
import timm
import torch
import transformers
from torchvision.transforms.functional import to_pil_image

import netclone
from netclone.errors import LoadError, NetcloneWarning
from netclone.graph.preparing import preparation
from netclone.models.huggingface import _preprocessing
from netclone.models.loading import load_model, open_model
from netclone.workflows import deploying, examining

NAMES = ("Grey_Heron", "ibis", "crow, raven", "gull")
TOKENS = dict(image_size=32, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=8)
STAGES = dict(hidden_sizes=[8, 12], depths=[1, 2])
MOBILE = dict(hidden_sizes=[12, 16, 20], neck_hidden_sizes=[4, 6, 8, 10, 12, 14, 16], num_attention_heads=2)
WINDOWS = dict(image_size=32, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4, patch_size=4)
MODELS = {
    "vit": ("ViT", TOKENS | {"intermediate_size": 48}),
    "deit": ("DeiT", TOKENS | {"intermediate_size": 48}),
    "beit": ("Beit", TOKENS | {"intermediate_size": 48, "use_relative_position_bias": True}),
    "dinov2": ("Dinov2", TOKENS | {"mlp_ratio": 2}),
    "swin": ("Swin", WINDOWS),
    "convnext": ("ConvNext", STAGES | {"num_stages": 2, "image_size": 32}),
    "resnet": ("ResNet", STAGES | {"embedding_size": 8}),
    "mobilevit": ("MobileViT", MOBILE | {"image_size": 32}),
}


def made(kind, classes=4, seed=0, names=NAMES):
    torch.manual_seed(seed)
    name, fields = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**fields, num_labels=classes)
    config.id2label = dict(enumerate(names[:classes]))
    return getattr(transformers, f"{name}ForImageClassification")(config).eval()


def saved(folder, kind, processor=None, **options):
    made(kind, **options).save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return f"transformers/{folder}"


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the variable was read when it was imported


KINDS = [pytest.param(kind, marks=() if kind in ("vit", "resnet") else pytest.mark.long) for kind in MODELS]
"""All of them, of which two are not left to the long tier."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_is_source_and_target_to_the_bit(kind):
    model, images = made(kind), torch.randn(2, 3, 32, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        own = model(images).logits
    mask = netclone.localize(model, method="magnitude", keep=0.5, example_inputs=images)
    module = netclone.extract(model, mask, classes=["ibis", "raven"], example_inputs=images)
    assert module.certificate < 1e-9
    assert (module.classes, module.class_names) == ((1, 2), ("ibis", "raven"))
    grafted = netclone.inject(model, module.with_spec(class_names=("a", "b")), at="input", example_inputs=images)
    with torch.no_grad():
        assert torch.equal(grafted(images)[:, :4], own)
    removed = netclone.remove(grafted)
    with torch.no_grad():
        assert torch.equal(removed(images), own)
    assert grafted.pretrained_cfg["label_names"] == [*NAMES, "a", "b"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_network_that_was_saved_there(kind, tmp_path):
    name = saved(tmp_path, kind)
    model, images = load_model(name), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images).logits, made(kind)(images).logits)
    assert not any(module.training for module in model.modules())
    opened = open_model(f"local-dir:{tmp_path}")
    assert opened.architecture == f"transformers/{kind}"
    assert "assuming" in opened.assumption  # there is no preprocessor_config.json
    again = load_model(opened.architecture, weights=None, **opened.options, num_classes=4)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert load_model(name, num_classes=3)(images).logits.shape == (2, 3)


VIT = {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
BGR = {
    "image_processor_type": "MobileViTImageProcessor",
    "size": {"shortest_edge": 36},
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
    "resample": 2,
}


OTHER_WAY = [pair for pair in zip(MODELS, [*MODELS][1:] + [*MODELS][:1], strict=True) if pair != ("resnet", "vit")]
"""Each of the eight kinds once as source and once as target."""


@pytest.mark.parametrize(
    ("source", "target"), [("resnet", "vit"), *(pytest.param(*pair, marks=pytest.mark.long) for pair in OTHER_WAY)]
)
def test_on_the_command_line_classes_go_from_one_to_another_and_back(source, target, tmp_path):
    others = ("ant", "bee", "cat", "dog")
    for split in ("train", "validation"):
        for number, name in enumerate(["Grey_Heron", "ibis", "raven", "gull", *others]):
            folder = tmp_path / ("old" if name in others else "new") / split / name
            folder.mkdir(parents=True)
            for index in range(3):
                pixels = torch.rand(3, 40, 36, generator=torch.Generator().manual_seed(7 * number + index))
                to_pil_image(pixels).save(folder / f"{index}.png")
    data, old = str(tmp_path / "new"), str(tmp_path / "old")
    source, target = saved(tmp_path / "s", source, BGR), saved(tmp_path / "t", target, VIT, seed=1, names=others)
    file, whole, plain = (tmp_path / f"{name}.safetensors" for name in ("herons", "grafted", "plain"))
    options = {"epochs": 1, "distill_steps": 0, "at": "input", "keep": 0.9, "method": "magnitude"}
    module = deploying.clone(source, target, "Grey_Heron,ibis", data, file, target_data=old, **options)
    assert module.class_names == ("Grey_Heron", "ibis")
    columns = deploying.inject(target, [file], whole)
    assert columns[0][:2] == (0, 3)
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        own = load_model(target)(images).logits
        assert torch.equal(load_model(str(whole))(images)[:, :4], own)
        assert deploying.remove(whole, None, plain) == ()
        assert torch.equal(load_model(str(plain))(images).logits, own)
    scores = examining.evaluate(str(whole), data, old, source=source).scores
    assert (scores.samples, scores.locality_closed) == (18, 0)


def test_a_grafted_network_is_saved_without_saying_what_it_was(tmp_path):
    model, images = made("resnet"), torch.randn(2, 3, 32, 32)
    mask = netclone.localize(model, method="magnitude", example_inputs=images)
    module = netclone.extract(model, mask, classes="gull", class_names="other", example_inputs=images)
    grafted = netclone.inject(model, module, at="input", name="gulls", example_inputs=images)
    netclone.save_grafted(grafted, tmp_path / "grafted.safetensors")
    assert torch.equal(load_model(str(tmp_path / "grafted.safetensors"))(images), grafted(images))


def test_what_the_image_processor_says_is_what_images_get(tmp_path):
    """Each is compared with transformers' own processor on a real image."""
    picture = to_pil_image(torch.rand(3, 50, 44, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 1))
    edge, square = {"shortest_edge": 40}, {"height": 40, "width": 40}
    crop = {"crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    scaled = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "do_rescale": True, "do_normalize": True}
    for number, (kind, said) in enumerate(
        [
            ("ViTImageProcessor", {"size": square, "resample": 2}),
            ("DeiTImageProcessor", {"size": square, "resample": 3} | crop),
            ("BitImageProcessor", {"size": edge, "resample": 3} | crop),
            ("ConvNextImageProcessor", {"size": edge, "resample": 3, "crop_pct": 0.8}),
            ("MobileViTImageProcessor", {"size": edge, "resample": 2} | crop),
        ]
    ):
        own = getattr(transformers, kind)(**(said | scaled))
        own.save_pretrained(tmp_path / str(number))
        found = json.loads((tmp_path / str(number) / "preprocessor_config.json").read_text())
        network = timm.create_model("test_resnet")
        network.pretrained_cfg = dict(_preprocessing(found))
        ours = preparation(network).transform()(picture)
        theirs = own(picture, return_tensors="pt")["pixel_values"][0]
        assert ours.shape == theirs.shape, kind
        assert float((ours - theirs).abs().mean()) < 0.02, kind  # PIL and tensors are resized a little differently


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "type 't5', and transformers has no image classifier of that type"),
        ({"model_type": "os.path"}, "code beside the weights is never run"),
        ({"attn_implementation": "someone/kernel"}, "'someone/kernel'; expected 'eager' or 'sdpa'"),
        ({"quantization_config": {}}, "quantised weights"),
        ({"model_type": None, "architecture": "resnet18"}, "holds a network of timm; name it"),
    ],
)
def test_a_folder_that_is_no_plain_classifier_is_refused(changes, message, tmp_path):
    name = saved(tmp_path, "resnet")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(LoadError, match=message):
        load_model(name)


def test_code_beside_the_weights_is_never_run(tmp_path):
    name = saved(tmp_path, "resnet")
    path = tmp_path / "config.json"
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\nclass Net: pass\n")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "code.Net"}}))
    load_model(name)
    assert not (tmp_path / "was run").exists()


def test_what_is_missing_is_said(tmp_path):
    made("resnet").resnet.save_pretrained(tmp_path / "body")
    with pytest.raises(LoadError, match="no weights for .* tensors .* saved without its classifier"):
        load_model(f"transformers/{tmp_path / 'body'}")
    with pytest.raises(LoadError, match="'vit' is|is an architecture, and has no weights of its own"):
        load_model("transformers/vit")
    with pytest.raises(LoadError, match="transformers/vit has no option 'dpeth'"):
        load_model("transformers/vit", weights=None, dpeth=3)
    with pytest.raises(LoadError, match="its pretrained weights could not be loaded"):
        load_model("transformers/nobody/nothing-of-this-name")
    with pytest.warns(NetcloneWarning, match="its content is no valid preprocessing"):
        load_model(saved(tmp_path / "odd", "resnet", VIT | {"image_mean": "half"}))
