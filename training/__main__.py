"""python -m training {vit,sae,profiles,controls,evaluate,report,all} --preset fashion-mnist --out runs/fm"""

import sys

import torch
from pydantic import ValidationError
from pydantic_settings import CliApp

from training import processes
from training.checkpoint import Run, RunError
from training.config import STEPS, Settings, source
from training.data import splits
from training.evaluation.controls import fit_controls
from training.evaluation.protocol import evaluate
from training.model.backbone import check_given
from training.model.gated_vit import UnsupportedModel
from training.profiles.fit import fit_profiles, load_profiles, targets_of
from training.report.write import write_report
from training.sae.fit import fit_sae, load_sae
from training.steering import SteeringError
from training.terminal import print_anything
from training.vit.fit import check_images, fit_vit, load_vit


def main(arguments: list[str], prog: str = "python -m training") -> int:
    """Run the step or steps; returns the exit status: 0, 1 if a step cannot run, 2 if a setting is wrong.

    arguments: those after the program's name, prog. The reason for a failure goes to standard error.
    """
    print_anything()
    try:
        settings = parse(arguments, prog)
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(map(str, problem["loc"])).replace("_", "-")
            value = "missing" if problem["type"] == "missing" else repr(problem["input"])
            print(f"--{name} is {value}: {problem['msg']}", file=sys.stderr)
        return 2
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


def parse(arguments: list[str], prog: str = "python -m training") -> Settings:
    """Raises pydantic's ValidationError; exits on --help and on an unknown flag, as argparse does."""
    return CliApp.run(Settings, cli_args=arguments, cli_settings_source=source(prog))


def run_step(step: str, settings: Settings, images: splits.Data, run: Run) -> None:
    """One step, in every process; the ones before it must be finished in the run folder."""
    check_images(run, images)
    match step:
        case "vit":
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
