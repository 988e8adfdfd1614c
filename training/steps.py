"""The steps of a training run, from images to the report."""

import sys

import torch

from training import processes
from training.checkpoint import Run, RunError
from training.config import DENSE, STEPS, Settings
from training.data import splits
from training.evaluation.controls import fit_controls
from training.evaluation.protocol import evaluate
from training.model.backbone import check_given
from training.model.gated_vit import UnsupportedModel
from training.profiles.fit import fit_profiles, load_profiles, targets_of
from training.report.write import write_report
from training.sae.fit import fit_sae, load_sae
from training.steering import SteeringError
from training.vit.fit import check_images, fit_vit, load_vit


def run_steps(settings: Settings) -> int:
    """Run the step or steps of the settings. Returns 0, or 1 with the reason on standard error."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        check_given(settings)
        images = splits.load(settings.data, settings.seed)
        targets_of(images.labels, settings.profiles.contexts)  # before hours of training
        for step in STEPS if settings.step == "all" else (settings.step,):
            run_step(step, settings, images, Run(settings.out))
    except (splits.DataError, RunError, SteeringError, UnsupportedModel) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def run_step(step: str, settings: Settings, images: splits.Data, run: Run) -> None:
    """Run one step, in every process. Earlier steps must be finished in the run folder."""
    check_images(run, images)
    match step:
        case "vit":
            if settings.vit.teacher == DENSE:
                fit_controls(settings.model_copy(update={"only": (DENSE.name,)}), images, run)
            fit_vit(settings, images, run)
        case "sae":
            fit_sae(settings, images, run, load_vit(run))
        case "profiles":
            fit_profiles(settings, images, run, load_vit(run), load_sae(run))
        case "controls":
            fit_controls(settings, images, run)
        case "evaluate" if processes.is_main():
            evaluate(settings, images, run, load_vit(run), load_sae(run), load_profiles(run))
        case "report" if processes.is_main():
            write_report(run, [Run(folder) for folder in settings.others])
    processes.wait()
