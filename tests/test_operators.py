"""The table of operators is whole, and CONTRIBUTING's way to add to it works."""

import pytest
import torch
from architectures import Net, random_mask
from torch import nn

import netclone
from netclone.channels import oprules
from netclone.channels.grouping import channel_groups
from netclone.channels.oprules import RULES, Rule
from netclone.cloning.extracting import extract
from netclone.graph import operators
from netclone.graph.operators import KINDS, OPERATORS, kind_of, operator_name

aten = torch.ops.aten
X = torch.randn(2, 3, 2, 3, generator=torch.Generator().manual_seed(0))


def test_every_kind_has_a_rule_and_every_rule_a_kind():
    assert set(RULES) == {*KINDS, "part"}  # parts of what gives several are taken by Python's own getitem


def test_an_operator_is_of_one_kind():
    names = [name for spellings in KINDS.values() for name in spellings.split()]
    assert sorted(names) == sorted(set(names))


def test_torch_has_every_operator_of_the_table():
    for name in (name for spellings in KINDS.values() for name in spellings.split()):
        packet, _, overload = name.partition(".")
        assert hasattr(getattr(aten, packet), overload or "default"), name


def test_names_lead_back_to_operators():
    assert all(operator_name(function) == name for name, function in OPERATORS.items())


def test_torchs_tags_stand_in_where_the_table_says_nothing():
    assert kind_of(aten.sinc.default) == "elementwise" and kind_of(aten.aminmax.default) == "reduction"
    assert kind_of(aten.bernoulli.default) is None  # it draws at random


# ---------------------------------------------------------------- "Add an operator", as CONTRIBUTING says it


@pytest.fixture
def add(monkeypatch):
    """Write a line into the table as an edit of the file would."""

    def adds(kind, name, rule=None):
        monkeypatch.setitem(KINDS, kind, f"{KINDS.get(kind, '')} {name}")
        if rule is not None:
            monkeypatch.setitem(oprules.RULES, kind, rule)
        monkeypatch.setattr(operators, "_TABLE", operators._table())
        kind_of.cache_clear()

    yield adds
    kind_of.cache_clear()


def units(net):
    """How many units there are to remove behind the stem, and the operators that have no rule."""
    groups = channel_groups(net, X)
    return sum(group.size for group in groups.groups if group.name == "stem"), {
        name for _, name in groups.labelling.without_rule
    }


def check_it_is_followed(net, folder):
    groups = channel_groups(net, X)
    module = extract(groups, random_mask(groups, 0.5))
    assert module.certificate <= 1e-9
    netclone.save(module, folder / "clone.safetensors")
    loaded = netclone.load(folder / "clone.safetensors")
    assert torch.equal(loaded(X), module(X))


def test_a_new_spelling_is_one_name_in_one_place(add, tmp_path):
    torch.manual_seed(0)
    net = Net(
        lambda net, x: net.head(torch.permute_copy(net.stem(x), (0, 2, 3, 1)).mean((1, 2))),
        **{"stem": nn.Conv2d(3, 8, 1), "head": nn.Linear(8, 4)},
    ).eval()
    assert units(net) == (0, {"aten.permute_copy.default"})
    add("movement", "permute_copy")
    assert units(net) == (8, set())
    check_it_is_followed(net, tmp_path)


def test_a_new_kind_is_a_name_and_a_rule(add, tmp_path):
    def cross(run, node):
        """Elements that meet are kept or removed together; those along the axis of the product stay together."""
        both = run.meet(node, list(node.args[:2]))
        return run.merge(node, both, [node.kwargs["dim"] % both.dim()], "is crossed").expand(run.shapes(node)[0])

    torch.manual_seed(0)
    net = Net(
        lambda net, x: net.head(torch.linalg.cross(net.stem(x), net.other(x), dim=3).mean((2, 3))),
        **{"stem": nn.Conv2d(3, 8, 1), "other": nn.Conv2d(3, 8, 1), "head": nn.Linear(8, 4)},
    ).eval()
    assert units(net) == (0, {"aten.linalg_cross.default"})
    add("cross product", "linalg_cross", Rule(cross))
    assert units(net) == (8, set())
    check_it_is_followed(net, tmp_path)
