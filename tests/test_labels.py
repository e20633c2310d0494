"""Union-find over labels: what is united, what is fixed, and why."""

import networkx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netclone.channels.labels import Event, Labels, compact, expanded

HERE, THERE = Event("relu", "an example"), Event("add", "another example")


def test_fresh_labels_are_units_of_their_own_and_never_zero():
    labels = Labels()
    a, b = labels.fresh(3), labels.fresh(2)
    assert labels.roots(torch.cat([a, b])).tolist() == [1, 2, 3, 4, 5]


def test_many_fresh_labels_keep_what_is_known_of_earlier_ones():
    labels = Labels()
    a = labels.fresh(4)
    labels.unite(a[:2], a[2:], HERE)
    labels.fix(a[1:2], THERE)
    b = labels.fresh(5000)
    assert labels.roots(a).tolist() == [1, 0, 1, 0]
    assert labels.roots(b).tolist() == b.tolist()
    assert labels.why_joined(int(a[0])) == HERE
    assert labels.why_fixed(int(a[3])) == THERE
    assert labels.why_fixed(int(b[-1])) is None


def test_a_chain_leads_from_a_label_to_what_fixed_the_last_that_it_is_joined_to():
    labels = Labels()
    a, b, c, d = (labels.fresh(2) for _ in range(4))
    labels.unite(a, b, Event("first", "meet"))
    labels.unite(c, b, Event("second", "meet"))
    labels.unite(a, d, Event("beside", "meet"))
    assert labels.chain(int(c[0])) == (Event("first", "meet"), Event("second", "meet"), Event("beside", "meet"))
    labels.fix(a[:1], Event("opaque", "has no rule"))
    fixed = (Event("second", "meet"), Event("first", "meet"), Event("opaque", "has no rule"))
    assert labels.chain(int(c[0])) == fixed
    assert labels.chain(int(a[0])) == fixed[2:]
    assert labels.chain(int(labels.fresh(1)[0])) == ()
    assert labels.chain(int(c[1])) == (Event("first", "meet"), Event("second", "meet"), Event("beside", "meet"))


def test_a_chain_may_end_where_a_label_met_0():
    labels = Labels()
    a, b = labels.fresh(3), labels.fresh(3)
    labels.unite(a, b, HERE)
    labels.unite(b, torch.tensor([0, int(b[1]), 0]), THERE)
    labels.fix(a, Event("late", "says nothing new"))
    assert labels.chain(int(a[0])) == (HERE, THERE)
    assert labels.chain(int(a[1])) == (Event("late", "says nothing new"),)


def test_uniting_is_transitive_and_elementwise():
    labels = Labels()
    a, b, c = labels.fresh(3), labels.fresh(3), labels.fresh(3)
    labels.unite(a, b)
    labels.unite(b, c.flip(0))
    assert labels.roots(c).tolist() == labels.roots(a).tolist()[::-1]
    assert len(set(labels.roots(a).tolist())) == 3


def test_uniting_broadcasts():
    labels = Labels()
    rows, column = labels.fresh(6).reshape(2, 3), labels.fresh(2).reshape(2, 1)
    labels.unite(rows, column)
    roots = labels.roots(rows)
    assert (roots == roots[:, :1]).all()
    assert roots[0, 0] != roots[1, 0]


def test_meeting_label_zero_fixes():
    labels = Labels()
    a = labels.fresh(3)
    labels.unite(a, torch.tensor([0, 0, int(a[2])]), HERE)
    assert labels.roots(a).tolist() == [0, 0, int(a[2])]
    assert labels.why_fixed(int(a[0])) == HERE


def test_fixing_one_label_fixes_its_unit_before_and_after_uniting():
    labels = Labels()
    a, b, c = labels.fresh(2), labels.fresh(2), labels.fresh(2)
    labels.unite(a, b)
    labels.fix(a[:1], HERE)
    labels.unite(b, c, THERE)
    assert labels.roots(c).tolist() == [0, int(labels.roots(a)[1])]
    assert labels.why_fixed(int(c[0])) == HERE


def test_the_first_reason_is_kept():
    labels = Labels()
    a, b = labels.fresh(1), labels.fresh(1)
    assert labels.why_fixed(int(a[0])) is None
    assert labels.why_joined(int(a[0])) is None
    labels.unite(a, b, HERE)
    labels.unite(a, labels.fresh(1), THERE)
    labels.fix(a, THERE)
    labels.fix(b, HERE)
    assert labels.why_joined(int(b[0])) == HERE
    assert labels.why_fixed(int(a[0])) == THERE


def test_varies_looks_at_units_not_at_labels():
    labels = Labels()
    a = labels.fresh(6).reshape(2, 3)
    assert labels.varies(a, 0)
    assert labels.varies(a, 1)
    labels.unite(a, a[:, :1].expand(2, 3))
    assert labels.varies(a, 0)
    assert not labels.varies(a, 1)
    labels.fix(a, HERE)
    assert not labels.varies(a, 0)


@pytest.mark.parametrize("shape", [(4, 1, 5), (4, 3, 5)])
def test_expanded_views_stay_small_and_say_the_same(shape):
    labels = torch.arange(4).reshape(4, 1, 1).expand(shape).contiguous()
    view = expanded(labels)
    assert torch.equal(view, labels)
    assert compact(view).shape == (4, 1, 1)
    roots = Labels().roots(torch.zeros((), dtype=torch.long).expand(shape))
    assert roots.shape == shape
    assert compact(roots).numel() == 1


PAIRS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60)


@given(rounds=st.lists(PAIRS, max_size=4), fixed=st.lists(st.integers(0, 30), max_size=4))
def test_units_are_the_connected_components(rounds, fixed):
    """Against networkx: labels are one unit if a path joins them, and 0 if the path reaches 0 or a fixed label."""
    labels, graph = Labels(), networkx.Graph()
    labels.fresh(30)
    graph.add_nodes_from(range(31))
    for pairs in rounds:
        if pairs:
            labels.unite(*torch.tensor(pairs).T, HERE)
        graph.add_edges_from(pairs)
    if fixed:
        labels.fix(torch.tensor(fixed), HERE)
    graph.add_edges_from((0, label) for label in fixed)
    roots = labels.roots(torch.arange(31)).tolist()
    for component in networkx.connected_components(graph):
        found = {roots[label] for label in component}
        assert len(found) == 1
        assert (found == {0}) == (0 in component)
        for label in component:
            assert labels.chain(label) == (() if label == 0 or len(component) == 1 else (HERE,))
    assert len(set(roots)) == networkx.number_connected_components(graph)


def test_removable_is_zero_for_a_unit_that_is_all_of_what_was_made_at_once():
    labels = Labels()
    a, b, c = labels.fresh(3), labels.fresh(2), labels.fresh(2)
    assert torch.equal(labels.removable(a), labels.roots(a))
    labels.unite(b, b[:1].expand(2))  # all of b is one unit
    labels.unite(c[:1], a[:1])  # one of three
    assert labels.removable(b).tolist() == [0, 0]
    assert torch.equal(labels.removable(torch.cat([a, c])), labels.roots(torch.cat([a, c])))
    labels.unite(a, a[:1].expand(3))
    assert labels.removable(c).tolist() == [0, labels.roots(c)[1]]
