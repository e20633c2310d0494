"""Baselines for netclone.clone: other ways to teach a target network classes that a source network knows.

Each method is ``method(problem: Problem, recipe: Recipe) -> nn.Module``: a new network in eval mode with ``K + n``
logits, the target's K classes first. Target and source are not changed. :func:`tune` chooses among recipes by the
validation split, in the same way for every method.

``TUNING`` changes or adds weights in the target by training:

- fine-tune: all layers, or all but the first ``recipe.frozen`` stages. On a problem with all of the data instead of a
  clone set, the same call is joint training, the upper bound.
- LwF: fine-tuning with distillation of the old logits (Li and Hoiem, Learning without Forgetting, ECCV 2016).
- PCSD: the same, with distillation of pooled features (Liu et al., CMFDFormer, 2023).
- source as teacher: fine-tuning with distillation of both networks' logits (Hinton et al., 2015).
- UHC: both networks unified from images without labels (Vongkulbhisal et al., CVPR 2019).
- MeRLin: features for which a ridge on some samples fits others (Liu et al., 2020).
- DER: a second, masked network beside the frozen target, from data alone (Yan et al., CVPR 2021).
- LoRA: low-rank updates of every layer (Hu et al., ICLR 2022), through the ``peft`` library.
- kernel modulation: a multiplier per kernel (Hu and Liu, Kernel Modulation, ICPR 2022).
- residual and parallel patches: small blocks between frozen ones, or beside (Yuan et al., PeterRec, SIGIR 2020).
- shallow and deep prompts: tokens beside a frozen transformer's own (Jia et al., Visual Prompt Tuning, ECCV 2022).
- class prompts: deep ones for each class, and scores by similarity (Fischer et al., 2022).

Prompts are for vision transformers. A method that is not made for a target raises :class:`InapplicableError`.

``ENSEMBLES`` run the source beside the target, or merge it in, without training:

- ensemble: logits side by side.
- calibrated ensemble: with a fitted scale and bias of the new logits (vector scaling; Guo et al., ICML 2017).
- pruned ensemble: the same, with a source pruned by magnitude (Li et al., ICLR 2017) to ``problem.keep``.
- gated ensemble: the new logits are the source's odds on the target's scale, as a clone's at the input before any fit.
- fitted gated ensemble: the same, fitted as a clone's classifier is, by cross-validation.
- learned start: the same, from the mean of earlier clones' classifiers (after Peebles et al., G.pt, 2022).
- ZipIt: both networks, of one architecture, merged up to some stage (Stoica et al., ICLR 2024). Old logits change.

``HEADS`` train no network. Each is a classifier of all classes over frozen features, the target's, the source's, or
both. Its new logits are gated and calibrated as a clone's are, and old ones stay the target's:

- nearest mean (Mensink et al., TPAMI 2013).
- SLDA: one covariance for all classes (Hayes and Kanan, CVPR Workshops 2020).
- FeCAM: a covariance for each class (Goswami et al., NeurIPS 2023).
- RanPAC: random projections and ridge regression (McDonnell et al., NeurIPS 2023).
- logistic regression.
"""

from functools import partial

from netclone.baselines.distilling import distilled, lwf
from netclone.baselines.ensembling import calibrated_ensemble, ensemble, pruned_ensemble
from netclone.baselines.expanding import der
from netclone.baselines.finetuning import finetune, stages
from netclone.baselines.frozen import HEADS, fitted_gated_ensemble, frozen_head, gated_ensemble
from netclone.baselines.lora import lora
from netclone.baselines.merging import zipit
from netclone.baselines.metalearning import merlin
from netclone.baselines.modulating import kernel_modulation
from netclone.baselines.patching import residual_patches
from netclone.baselines.pooling import pcsd
from netclone.baselines.problems import InapplicableError, Method, Problem, Recipe, extended
from netclone.baselines.prompting import class_prompts, visual_prompts
from netclone.baselines.starting import learned_start
from netclone.baselines.training import Trial, Tuned, train, tune, validated
from netclone.baselines.unifying import unified

TUNING: dict[str, Method] = {
    "fine-tune": finetune,
    "LwF": lwf,
    "PCSD": pcsd,
    "source as teacher": distilled,
    "UHC": unified,
    "MeRLin": merlin,
    "DER": der,
    "LoRA": lora,
    "kernel modulation": kernel_modulation,
    "residual patches": residual_patches,
    "parallel patches": partial(residual_patches, parallel=True),
    "shallow prompts": partial(visual_prompts, depth="shallow"),
    "deep prompts": partial(visual_prompts, depth="deep"),
    "class prompts": class_prompts,
}
ENSEMBLES: dict[str, Method] = {
    "ensemble": ensemble,
    "calibrated ensemble": calibrated_ensemble,
    "pruned ensemble": pruned_ensemble,
    "gated ensemble": gated_ensemble,
    "fitted gated ensemble": fitted_gated_ensemble,
    "learned start": learned_start,
    "ZipIt": zipit,
}

__all__ = [
    "ENSEMBLES",
    "HEADS",
    "TUNING",
    "InapplicableError",
    "Method",
    "Problem",
    "Recipe",
    "Trial",
    "Tuned",
    "calibrated_ensemble",
    "class_prompts",
    "der",
    "distilled",
    "ensemble",
    "extended",
    "finetune",
    "fitted_gated_ensemble",
    "frozen_head",
    "gated_ensemble",
    "kernel_modulation",
    "learned_start",
    "lora",
    "lwf",
    "merlin",
    "pcsd",
    "pruned_ensemble",
    "residual_patches",
    "stages",
    "train",
    "tune",
    "unified",
    "validated",
    "visual_prompts",
    "zipit",
]
