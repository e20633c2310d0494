"""torch.export of a copy: names, positions, and what the model gives."""

import pytest
import torch
from architectures import CachingByKey, CountingInto, WritesLater, returned, untouched
from torch import fx, nn

from netclone.channels.grouping import channel_groups
from netclone.cloning.extracting import extract
from netclone.cloning.modules import load, save
from netclone.errors import OutputError, TraceError
from netclone.graph.capturing import capture
from netclone.graph.exporting import copied, export, one_of
from netclone.graph.recurrent import exported_by_shape
from netclone.learning.localizing import localize


def images():
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def test_what_is_exported_is_still_in_place_under_the_model_s_names():
    model, x = WritesLater().eval(), images()
    with untouched(model):
        exported = export(model, (x,), {})
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count("inputs_0") == targets.count("output") == 1
    assert {"aten.relu_.default", "aten.add_.Tensor", "aten.leaky_relu_.default"} <= set(targets)
    used = {str(node.target) for node in exported.graph.nodes if node.op == "get_attr"}
    assert used == set(exported.tensors) == {name for name in model.state_dict() if "batches" not in name}
    assert torch.equal(exported.value, model(x[:1]))
    assert exported.positions.keys() == returned(model, x).keys()


def test_a_position_is_the_node_before_what_overwrites_it():
    exported = export(WritesLater().eval(), (images(),), {})
    nodes = {node.name: str(node.target) for node in exported.graph.nodes}
    assert nodes[exported.positions["stage.0"]] == "aten.conv2d.default"
    assert nodes[exported.positions["stage.1"]] == "aten.batch_norm.default"
    assert nodes[exported.positions["stage"]] == "aten.relu_.default"
    assert nodes[exported.positions["block"]] == "aten.mul_.Tensor"


def test_a_path_of_a_graph_stands_for_its_node_also_where_that_is_overwritten():
    model = WritesLater().eval()
    traced = fx.symbolic_trace(model)
    exported = export(traced, (images(),), {"stage.1": "stage_1", "gone": "nowhere"})
    assert exported.positions["stage.1"] == exported.positions["stage_1"]
    assert "gone" not in exported.positions


@pytest.mark.parametrize("make", [CountingInto, CachingByKey])
def test_the_value_is_that_of_the_first_call_and_every_copy_starts_anew(make):
    model, x = make().eval(), torch.randn(2, 6)
    with untouched(model):
        values = [export(model, (x,), {}).value for _ in range(2)]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], model(x[:1]))


def test_a_tuple_of_two_is_refused_without_a_choice():
    with pytest.raises(OutputError, match="Pair returns tuple of 2: .* say which one is the logits"):

        class Pair(nn.Linear):
            def forward(self, x):
                return super().forward(x), x

        export(Pair(6, 4), (torch.zeros(2, 6),), {})


def test_what_cannot_be_copied_is_said():
    class Held(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("a lock\nof some kind")

    with pytest.raises(TraceError, match=r"copy.deepcopy: RuntimeError: a lock \(in Held\); netclone works on a copy"):
        copied(Held(2, 2))


def test_one_of_each_batch_is_a_copy():
    x = images()
    (one,) = one_of((x,))
    assert one.shape == (1, 3, 5, 5)
    one.zero_()
    assert x[0].abs().max() > 0


RECURRENT = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "rnn_tanh": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
}


class Rows(nn.Module):
    """A classifier that reads the rows of an image with a recurrent network, in both directions."""

    def __init__(self, kind, **options):
        super().__init__()
        network, special = RECURRENT[kind]
        self.stem = nn.Linear(6, 8)
        self.rows = network(8, 5, num_layers=2, bidirectional=True, batch_first=True, **special, **options)
        self.hidden = nn.Linear(2 * options.get("proj_size", 5), 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        read, _ = self.rows(self.stem(x))
        return self.head(torch.relu(self.hidden(read.mean(1))))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")  # torch's own
@pytest.mark.parametrize(
    ("kind", "options"), [*((kind, {}) for kind in RECURRENT), ("lstm", {"proj_size": 3}), ("gru", {"bias": False})]
)
def test_a_recurrent_network_is_one_operator_that_follows_the_dtype_and_is_slimmed_around(kind, options, tmp_path):
    model = Rows(kind, **options).eval()
    images = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))
    groups = channel_groups(model, images)
    operator = getattr(torch.ops.aten, kind).input
    assert sum(node.target is operator for node in groups.graph_module.graph.nodes) == 1
    assert len(groups.graph_module.graph.nodes) < 40
    more = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(groups.graph_module(more), model(more))
    slim = extract(groups, localize(groups, method="magnitude", keep=0.5))
    assert slim.certificate < 1e-12
    assert slim.body.get_parameter("hidden.weight").shape == (6, 2 * options.get("proj_size", 5))
    save(slim, tmp_path / "rows.safetensors")
    again = load(tmp_path / "rows.safetensors")
    with torch.no_grad():
        assert torch.equal(again(more), slim(more))
        assert again.double()(more.double()).dtype == torch.float64


def test_a_packed_sequence_is_not_taken_for_a_plain_one():
    function = exported_by_shape(torch.gru, (torch.ones(4, 6), torch.ones(2), torch.ones(1, 2, 5), []))
    assert function is None


class Norms(nn.Module):
    """BatchNorm in every form: with and without weights, by running and by the batch's statistics, as a function."""

    def __init__(self):
        super().__init__()
        self.full, self.plain = nn.BatchNorm2d(4, eps=1e-2), nn.BatchNorm2d(4, affine=False)
        self.by_batch, self.flat = nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm1d(4)
        for norm in (self.full, self.plain, self.flat):
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.by_batch(self.plain(self.full(x)))
        x = nn.functional.batch_norm(x, self.full.running_mean, running_var=self.full.running_var, bias=self.full.bias)
        x = nn.functional.batch_norm(x, self.full.running_mean.clone(), self.full.running_var.clone(), training=True)
        return self.flat(self.flat(x.flatten(2).transpose(1, 2).transpose(1, 2)).mean(2))


def test_batch_norms_are_torchs_own_in_the_graph():
    model = Norms().eval()
    graph = capture(model, torch.randn(2, 4, 3, 3))
    norms = [node for node in graph.graph.nodes if node.op == "call_function" and "norm" in str(node.target)]
    assert [str(node.target) for node in norms] == ["aten.batch_norm.default"] * 7
    assert [node.args[7] for node in norms] == [1e-2] + [1e-5] * 6
    fresh = torch.randn(5, 4, 3, 3)
    assert torch.equal(graph(fresh), model(fresh))
