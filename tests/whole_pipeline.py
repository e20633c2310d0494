"""Everything that netclone does, once, on a device: run as ``python whole_pipeline.py DEVICE SOURCE TARGET FOLDER``.

The last line says ``done``; what a network on the CPU gives after the way back is compared with what it gave there.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import strict_device
import timm
import torch
from pictures import folder as folder_of

import netclone
from netclone.cloning.verifying import compare
from netclone.graph.modes import QUICK
from netclone.learning import solving
from netclone.learning.neighbourhoods import mirrored
from netclone.reporting import page
from netclone.workflows import deploying, examining


def main(device: str, source_name: str, target_name: str, folder: str) -> None:
    """Localise, extract, clone, inject, evaluate, remove, save, load and report."""
    if device == "strict":
        strict_device.register()
    torch.manual_seed(0)
    warnings.simplefilter("ignore", netclone.NetcloneWarning)
    size = 32
    networks = [
        timm.create_model(name, num_classes=count, **({"img_size": size} if "vit" in name else {})).eval()
        for name, count in ((source_name, 4), (target_name, 2))
    ]
    source, target = (network.to(device) for network in networks)
    images, labels = torch.randn(16, 3, size, size), torch.arange(16) % 4
    there, own = images.to(device), labels.to(device)
    data, old = [(there, own)], [(there, own % 2)]

    groups = netclone.channel_groups(source, there[:2])
    assert len(groups)
    for method in ("magnitude", "random", "taylor"):
        mask = netclone.localize(groups, data, classes=[2, 3], method=method)
    learned = netclone.localize(source, data, classes=[2, 3], steps=3, batch_size=8, budget="params")
    mask.apply(source)(there)
    plain = netclone.extract(source, mask, classes=[2, 3], example_inputs=there[:2])
    refitted = netclone.extract(source, learned, classes=[2, 3], reconstruct=data, example_inputs=there[:2])
    options = {"classes": [2, 3], "target_data": old, "epochs": 1, "distill_steps": 2, "batch_size": 8}
    module = netclone.clone(source, target, data, augment=mirrored, **options)

    with torch.no_grad():
        before = target(there)
        grafted = netclone.inject(target, module, name="birds")
        both = netclone.inject(grafted, plain.with_spec(at="input"), name="plain")
        both = netclone.inject(both, refitted.with_spec(at="input"), name="refitted")
        assert torch.equal(both(there)[:, :2], before)
        assert torch.equal(netclone.remove(grafted)(there), before)
    scores = netclone.evaluate(grafted, data, reference=target, source=source)
    assert scores.samples == 16
    assert compare(grafted, target, there[:3], QUICK).passed  # fewer modes than verify, which is slow there
    netclone.cost(grafted, there[:1], repeats=1)
    netclone.save(module, f"{folder}/birds.safetensors")
    back = netclone.load(f"{folder}/birds.safetensors")
    grafted_again = netclone.inject(target, back.to(device))
    with torch.no_grad():
        assert torch.equal(grafted_again(there), grafted(there))
    page.report(grafted, data, f"{folder}/birds.html")
    assert Path(folder, "birds.html").stat().st_size > 10_000

    # And from the CPU: networks and batches are moved, the caller's stay where they are. Classifiers are fitted there.
    solving.FEW = 0
    source, target = (network.cpu() for network in networks)
    options |= {"target_data": None, "at": module.at, "source_at": module.source_at}
    moved = netclone.clone(source, target, [(images, labels)], device=device, **options)
    assert {p.device.type for p in moved.parameters()} == {torch.device(device).type}
    assert {p.device.type for network in networks for p in network.parameters()} == {"cpu"}
    assert netclone.evaluate(target, [(images, labels % 2)], device=device).samples == 16
    netclone.localize(source, [(images, labels)], classes=[2], method="taylor", device=device)

    # And by name, as the command line does.
    file, alone, pictures = (Path(folder, name) for name in ("grafted.safetensors", "alone.safetensors", "pictures"))
    netclone.save_grafted(netclone.inject(target, module.cpu(), name="birds"), file)
    deploying.remove(file, None, alone)
    folder_of(pictures / "own", ["0", "1"], count=2)
    here = [netclone.load_model(str(path)) for path in (file, alone)]
    assert compare(*here, images[:3], QUICK).passed
    old = str(pictures / "own")
    found = examining.evaluate(str(file), None, old, device=device)
    assert found.scores.samples == 4 and found.cost.parameters
    subject = examining.opened(str(file), None, old, device=device)
    assert {p.device.type for p in subject.network.parameters()} == {torch.device(device).type}
    page.report(subject.network, subject, Path(folder, "named.html"), pixels=subject.preparation.pixels)
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
