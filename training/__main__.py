"""python -m training {vit,sae,profiles,controls,evaluate,report,all} --preset fashion-mnist --out runs/fm"""

import sys

from pydantic import ValidationError
from pydantic_settings import CliApp

from training.config import Settings, source
from training.terminal import print_anything


def main(arguments: list[str], prog: str = "python -m training") -> int:
    """Run the step or steps. Returns the exit status: 0, 1 if a step fails, 2 if a setting is invalid.

    arguments: without the program's name, which is prog. The reason for a failure goes to standard error.
    """
    print_anything()
    try:
        settings = parse(arguments, prog)
    except ValidationError as error:
        show(error)
        return 2
    from training.steps import run_steps  # imports torch: only once the settings are valid

    return run_steps(settings)


def parse(arguments: list[str], prog: str = "python -m training") -> Settings:
    """The settings of a command line. Raises pydantic's ValidationError; exits on --help and unknown flags, as argparse
    does."""
    return CliApp.run(Settings, cli_args=arguments, cli_settings_source=source(prog))


def show(error: ValidationError) -> None:
    """Print each invalid setting to standard error, as a flag."""
    for problem in error.errors():
        name = ".".join(map(str, problem["loc"])).replace("_", "-")
        value = "missing" if problem["type"] == "missing" else repr(problem["input"])
        print(f"--{name} is {value}: {problem['msg']}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
