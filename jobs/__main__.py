"""The command line of the jobs: `python -m jobs --help`.

Exit codes: 0 done or already done; 2 a user must change something (base/ turns it into an immediate failure);
143 stopped by SIGTERM with the work saved; anything else is worth a retry.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from jobs.core import variables
from jobs.core.command import run_command
from jobs.core.errors import UserError
from jobs.training import distributed

DESCRIPTION = """\
Fine-tune a model privately and serve the result, as its files in git declare.

  stages (the Kubernetes Jobs run these; a stage whose result exists ends at once)
    relocate WHAT     bring the dataset, the base model, the tokenizer, the reference model or a published adapter
                      onto its volume
    encode            encode the dataset to tokens, with the tokenizer and its chat template
    train             train the LoRA adapter
    evaluate          measure base, fine-tuned and reference model; promote the adapter if the gate passes
    publish           bring the promoted adapter to a registry or a bucket, for other environments
    await ARTIFACT…   wait until artifacts are there (init containers)
    verify            read every artifact on the volumes and compare it with its manifest

  for people
    new OVERLAY NAME  add an adapter to an overlay: its folder and its entries in kustomization.yaml
    pin OVERLAY       fill or refresh the pins in an overlay's files, like a lock file
    check OVERLAY     validate an overlay with no network and no cluster: for a pre-commit hook or CI
    plan OVERLAY      show what a push would run again, and why
    export ADAPTER    copy a promoted adapter into a folder that PEFT and vLLM load, with model card and SBOM
    local OVERLAY     run the whole overlay, as rendered by kustomize, as local processes
    kind OVERLAY      run it in a cluster on this machine, with kubectl or with Argo CD
"""
EPILOG = """\
examples
  python -m jobs check overlays/kind
  python -m jobs local overlays/kind --ask "What is the best hotel in Seville?"
  python -m jobs --pipeline overlays/kind/adapters/seville-hotels/pipeline.yaml --volumes /tmp/volumes relocate dataset
"""
RELOCATABLE = ("dataset", "base-model", "tokenizer", "reference-model")
AWAITABLE = (*RELOCATABLE, "acceptability", "tasks", "encoded-dataset", "adapter", "merged-model", "evaluation",
             "imported-adapter")


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="python -m jobs", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    top.add_argument("--pipeline", type=Path, default=Path(os.environ.get("PIPELINE", "/etc/pipeline/pipeline.yaml")),
                     metavar="FILE", help="the pipeline file (default: $PIPELINE, else %(default)s)")
    top.add_argument("--environment", type=Path, default=os.environ.get("ENVIRONMENT_FILE"), metavar="FILE",
                     help="the environment file (default: $ENVIRONMENT_FILE, else environment.yaml of the overlay to "
                          "which the pipeline file belongs)")
    top.add_argument("--volumes", type=Path, default=Path(os.environ.get("VOLUMES", "/volumes")), metavar="DIR",
                     help="where the volumes are mounted, one folder each (default: $VOLUMES, else %(default)s)")
    top.add_argument("--wait-seconds", metavar="S",
                     help="how long a stage waits for its inputs, or for another process that makes the same artifact "
                          "(default: $WAIT_SECONDS, else 6 hours)")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", help="one of the above")

    relocate = commands.add_parser("relocate", description="bring a source onto its volume, verified against its pin")
    relocate.add_argument("what", choices=(*RELOCATABLE, "adapter"))
    for stage, description in (
            ("encode", "encode the dataset to tokens; needs no GPU"),
            ("train", "train the LoRA adapter; resumes after a kill"),
            ("evaluate", "measure the models, write the report, pass or reject the adapter"),
            ("publish", "bring the promoted adapter, with its evaluation, to where environment.yaml says; ends at once "
                        "if it is there, or was rejected")):
        commands.add_parser(stage, description=description).add_argument(
            "--set", action="append", default=[], dest="changes", metavar="KEY=VALUE",
            help="for this run, take this value of the pipeline file's `training` instead of the file's; the adapter "
                 "is evaluated, but neither promoted nor published; can be repeated")
    wait = commands.add_parser("await", description="wait until artifacts are there; their readers verify them")
    wait.add_argument("artifacts", nargs="+", choices=AWAITABLE, metavar="ARTIFACT", help=", ".join(AWAITABLE))

    from jobs.publication import export as export_module
    from jobs.tools import verify as verify_module

    verify = commands.add_parser("verify", description=verify_module.DESCRIPTION, formatter_class=raw)
    verify.add_argument("chosen", nargs="*", metavar="ARTIFACT",
                        help="KIND/DIGEST, KIND, or an artifact's path (default: all on the volumes)")

    from jobs.tools import kind as kind_module
    from jobs.tools import local as local_module
    from jobs.tools import new as new_module
    from jobs.tools import plan as plan_module

    new = commands.add_parser("new", description=new_module.DESCRIPTION, formatter_class=raw)
    pin = commands.add_parser("pin", description="fill or refresh the pins in the files of an overlay or an adapter")
    check = commands.add_parser("check", description="validate an overlay or an adapter offline")
    plan_parser = commands.add_parser("plan", description="show what a push would do", formatter_class=raw)
    export = commands.add_parser("export", formatter_class=raw)
    local = commands.add_parser("local", description="run an overlay as local processes", formatter_class=raw)
    kind = commands.add_parser("kind", description="run an overlay in a kind cluster", formatter_class=raw)
    for command in (new, plan_parser, local, kind):
        command.add_argument("overlay", type=Path, metavar="OVERLAY", help="the overlay's folder, e.g. overlays/kind")
    for command in (pin, check):
        command.add_argument("overlay", type=Path, metavar="OVERLAY",
                             help="the overlay's folder, e.g. overlays/kind, or that of one of its adapters, "
                                  "overlays/kind/adapters/NAME")
    check.add_argument("--encode", nargs="?", type=int, const=3, metavar="N", dest="check_encode",
                       help="then show the first N training records of each adapter (default: %(const)s) as tokens, "
                            "with what is learned of them marked, and how many are too long")
    check.add_argument("--volumes", type=Path, metavar="DIR", dest="check_volumes",
                       help="where --encode finds a tokenizer or data that is neither in git nor embedded: a folder "
                            "with a folder for each volume (/volumes, or .local/NAME/volumes)")
    pin.add_argument("--update", action="store_true", help="also move pins that are there to the newest revision")
    new_module.add_arguments(new)
    plan_module.add_arguments(plan_parser)
    local_module.add_arguments(local)
    export_module.add_arguments(export)
    kind_module.add_arguments(kind)
    return top


def run(args: argparse.Namespace) -> None:
    """Carry out one command. Imports are late: `--help` and `already done` must answer at once."""
    from jobs.core import environment, imported, pipeline

    wait_seconds = variables.wait_seconds(args.wait_seconds)  # not in the parser: `--help` must work in any environment
    match args.command:
        case "new":
            from jobs.tools import new

            new.run(args.overlay, args.name, data=args.data, old=args.old, source=args.source)
        case "pin":
            from jobs.tools import pin

            pin.run(args.overlay, update=args.update)
        case "check":
            from jobs.tools import check

            check.run(args.overlay)
            if args.check_encode is not None:
                from jobs.tools import preview

                preview.run(args.overlay, args.check_encode, args.check_volumes)
        case "plan":
            from jobs.tools import plan as plan_module

            plan_module.run(args)
        case "local":
            from jobs.tools import local

            local.run(args)
        case "export":
            from jobs.publication import export

            export.run(args.adapter, args.export_volumes, args.output)
        case "kind":
            from jobs.tools import kind

            kind.run(args)
        case "verify":
            from jobs.tools import verify

            verify.run(args.volumes, args.chosen)
        case "relocate":
            from jobs.relocation import relocate

            if args.what == "adapter":
                from jobs.relocation import adapters

                adapters.run(imported.load(args.pipeline, args.environment), args.volumes)
            elif args.what == "dataset":
                relocate.run_dataset(imported.load_data(args.pipeline, args.environment), args.volumes)
            else:
                relocate.run_model(environment.load(_environment_file(args)), args.what, args.volumes)
        case "encode":
            from jobs.data import encode

            encode.run(imported.load_data(args.pipeline, args.environment, changes=args.changes), args.volumes,
                       wait_seconds)
        case "train":
            from jobs.training import train

            loaded = pipeline.load(args.pipeline, args.environment, changes=args.changes)
            train.run(loaded, args.volumes, wait_seconds)
        case "evaluate":
            from jobs.evaluation import evaluate

            evaluate.run(imported.load_any(args.pipeline, args.environment, changes=args.changes), args.volumes,
                         wait_seconds)
        case "publish":
            from jobs.publication import publish

            loaded = pipeline.load(args.pipeline, args.environment, changes=args.changes)
            publish.run(loaded, args.volumes, wait_seconds)
        case "await":
            from jobs.core import artifacts
            from jobs.core.plan import plan_adapter, plan_environment

            if set(args.artifacts) <= set(RELOCATABLE) - {"dataset"}:
                named = plan_environment(environment.load(_environment_file(args)).environment).named()
            else:
                named = plan_adapter(imported.load_any(args.pipeline, args.environment).pipeline).named()
            if unknown := [name for name in args.artifacts if name not in named]:
                raise UserError(f"await {unknown[0]}: {args.pipeline} desires no such artifact; it has "
                                f"{', '.join(named)}")
            artifacts.wait_until_there([named[a] for a in args.artifacts], args.volumes, wait_seconds)


def _environment_file(args: argparse.Namespace) -> Path:
    """The environment file of a stage that has no pipeline file, such as the relocation of the base model."""
    from jobs.core import pipeline

    return args.environment or pipeline.find_environment(args.pipeline)


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: run(parser().parse_args(argv)), relay=distributed.say_to_launcher)


if __name__ == "__main__":
    distributed.end(main())
