"""The command line: each command parses, calls one function, prints. Nothing here imports torch."""

from __future__ import annotations

import difflib
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import UsageError, XbenchError

if TYPE_CHECKING:
    from .suite import Suite

FINE, UNEXPECTED, USAGE, INTERRUPTED = 0, 1, 2, 130
VARIABLES = (
    "XBENCH_DATA", "XBENCH_DEBUG", "XBENCH_HOME", "XBENCH_LOG", "XBENCH_OFFLINE", "XBENCH_PLUGINS",
)  # fmt: skip
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
KINDS = ("methods", "metrics", "models", "datasets", "regularisers", "suites")

Command = Callable[..., Any]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="xbench")
def cli() -> None:
    """Evaluate explanations of image classifiers: models x attribution methods x metrics."""


def main() -> None:
    """Entry point; README.md lists the exit statuses."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without arrows still gets its table
    try:
        _heed_environment()
        status = cli.main(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else FINE)
    except click.ClickException as error:
        error.show()
        sys.exit(USAGE)
    except UsageError as error:
        _say_error(str(error))
        sys.exit(USAGE)
    except XbenchError as error:
        _say_error(str(error))
        sys.exit(UNEXPECTED)
    except (click.Abort, KeyboardInterrupt):
        click.echo(
            "interrupted; what was finished is stored, and the same command goes on", err=True
        )
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FINE)
    except Exception as error:
        if os.environ.get("XBENCH_DEBUG"):
            traceback.print_exc()
        _say_error(
            f"unexpected {type(error).__name__}: {error}\n"
            "This is a defect of xbench or of a plug-in; XBENCH_DEBUG=1 shows where."
        )
        sys.exit(UNEXPECTED)


def _heed_environment() -> None:
    from . import offline

    for name in os.environ:
        if name.startswith("XBENCH_") and name not in VARIABLES:
            near = difflib.get_close_matches(name, VARIABLES, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            click.echo(f"warning: unknown environment variable {name}{hint}", err=True)
    if level := os.environ.get("XBENCH_LOG"):
        if level.upper() not in LEVELS:
            raise UsageError(f"XBENCH_LOG={level}: expected one of {', '.join(LEVELS).lower()}")
        logging.basicConfig(level=level.upper(), format="%(levelname)s %(name)s: %(message)s")
    offline.enforce(_is_offline() or False)


def _is_offline() -> bool | None:
    """What XBENCH_OFFLINE says; None if nothing."""
    said = os.environ.get("XBENCH_OFFLINE", "").lower()
    if said in ("1", "true", "yes", "on"):
        return True
    if said in ("0", "false", "no", "off"):
        return False
    if said:
        raise UsageError(f"XBENCH_OFFLINE={said}: expected 1 or 0")
    return None


def _offline_at_once(context: click.Context, option: click.Parameter, value: bool | None) -> Any:
    """Before plug-ins are imported."""
    from . import offline

    if value is not None:
        offline.enforce(value)
    return value


def _say_error(message: str) -> None:
    for line in message.splitlines():
        click.echo(f"error: {line}", err=True)


# --- options that several commands share ----------------------------------------------------------


def _suite_options(command: Command) -> Command:
    globs: dict[str, Any] = {"multiple": True, "metavar": "GLOB"}
    options = [
        click.argument("suite", required=False),
        click.option("--datasets", **globs, help="Only these data sets of the suite."),
        click.option("--models", **globs, help="Only these models of the suite."),
        click.option("--methods", **globs, help="Only these methods of the suite."),
        click.option("--metrics", **globs, help="Only these metrics of the suite."),
        click.option(
            "--add-method", multiple=True, metavar="NAME", help="Add a registered method."
        ),
        click.option("--images-dir", metavar="DIR", help="Explain a folder of pictures, no suite."),
        click.option("--model", metavar="NAME", help="The model for --images-dir."),
        click.option("--images", type=click.IntRange(1), help="Images to take of each data set."),
        click.option(
            "--target", type=click.Choice(["predicted", "label"]), help="The class to explain."
        ),
        click.option("--seed", type=click.IntRange(0), help="Seed of all noise."),
        click.option("--device", metavar="auto|cpu|cuda[:N]", help="Where to compute."),
        click.option("--batch-size", metavar="auto|N", help="Rows of every forward."),
        click.option("--workers", metavar="auto|N", help="Processes to compute with."),
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE",
            help="Override a key of the suite, such as run.slice=32; "
            "datasets.0.min_confidence=0.9, .correct=true or .only=ids.txt select images.",
        ),
        click.option(
            "--data", type=click.Path(path_type=Path),
            help="Directory of data and weights; default: XBENCH_DATA, or where fetch puts them.",
        ),
        click.option(
            "--offline/--no-offline", default=None, callback=_offline_at_once,
            help="Refuse all network access; default: XBENCH_OFFLINE.",
        ),
        click.option(
            "--plugin", multiple=True, metavar="FILE|MODULE",
            help="Python file or module with entries of your own.",
        ),
        click.option(
            "-o", "--out", type=click.Path(path_type=Path), default="results", show_default=True,
            help="Where store/ and runs/ are.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _by_option(command: Command) -> Command:
    return click.option(
        "--by",
        default="",
        metavar="METRIC|FAMILY",
        help="Order leaderboards by this; default: the metrics of faithfulness.",
    )(command)


def _keep_options(command: Command) -> Command:
    options = [
        click.option(
            "--keep", multiple=True, metavar="curves,maps",
            help="Store these of every image, not only of the first few.",
        ),
        click.option(
            "--save-maps", metavar="DIR", help="Write all maps as safetensors, for maps/<DIR>."
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _plugins(given: tuple[str, ...]) -> tuple[str, ...]:
    from . import registry

    named = os.environ.get("XBENCH_PLUGINS", "").replace(os.pathsep, ",").split(",")
    plugins = tuple(name for name in named if name) + given
    for plugin in plugins:
        registry.load_plugin(plugin)
    return plugins


def _home() -> Path:
    """Where data lie that nobody has put elsewhere."""
    from platformdirs import user_cache_path

    said = os.environ.get("XBENCH_HOME")
    return (Path(said) if said else user_cache_path("xbench")) / "data"


def _data(given: Path | None) -> Path | None:
    chosen = given or (Path(os.environ["XBENCH_DATA"]) if os.environ.get("XBENCH_DATA") else None)
    if chosen is None and _home().is_dir():
        chosen = _home()
    if chosen is not None and not chosen.is_dir():
        wrong = "is not a directory" if chosen.exists() else "does not exist"
        raise UsageError(f"data directory {str(chosen)!r} {wrong} (--data or XBENCH_DATA)")
    return chosen


def _load(options: dict[str, Any]) -> Suite:
    from . import offline
    from .document import Document
    from .suite import load_suite, read_suite

    if options["images_dir"]:
        if options["suite"] or not options["model"]:
            raise click.UsageError("--images-dir DIR takes --model NAME and no suite")
        document = _folder_suite(read_suite("quick"), options["images_dir"], options["model"])
    elif options["model"]:
        raise click.UsageError("--model belongs to --images-dir; to narrow a suite, use --models")
    elif folder := _run_folder(options["suite"]):
        value = json.loads((folder / "run.json").read_bytes())["suite"]
        document = Document(value, str(folder / "run.json"), {})
    else:
        document = read_suite(options["suite"] or "quick")
    if options["add_method"] and isinstance(document.value, dict):
        methods = document.value.get("methods", [])
        if isinstance(methods, list):
            value = {**document.value, "methods": [*methods, *options["add_method"]]}
            document = Document(value, document.source, document.lines)
    settings = _settings(options["settings"], "run.slice=32")
    for key in ("seed", "target", "images", "device", "batch_size", "workers"):
        value = options[key]
        if value is not None:
            number = isinstance(value, str) and value.isdecimal()
            place = key if key in ("seed", "target") else f"run.{key}"
            option = f"--{key.replace('_', '-')}"
            settings.append((place, int(value) if number else value, option))
    if options.get("keep"):
        kinds = [kind.strip() for words in options["keep"] for kind in words.split(",")]
        settings.append(("run.keep", list(dict.fromkeys(kinds)), "--keep"))
    if options.get("save_maps") is not None:
        settings.append(("run.save_maps", options["save_maps"], "--save-maps"))
    said = _is_offline() if options["offline"] is None else options["offline"]
    if said is not None:
        who = "XBENCH_OFFLINE" if options["offline"] is None else "--offline"
        settings.append(("run.offline", said, who))
    suite = load_suite(document, settings)
    offline.enforce(suite.run.offline)
    return suite.narrowed(**{k: options[k] for k in ("datasets", "models", "methods", "metrics")})


def _settings(given: tuple[str, ...], example: str) -> list[tuple[str, Any, str]]:
    """Key, value and who says so, of each ``--set KEY=VALUE``."""
    from .document import parse

    settings = []
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--set {text!r}: write KEY=VALUE, such as {example}")
        settings.append((key, parse(value, f"--set {key}").value, f"--set {key}"))
    return settings


def _run_folder(name: str | None) -> Path | None:
    """The folder of a run, or the latest one in a folder with ``runs/``."""
    if not name or not Path(name).is_dir():
        return None
    found = sorted(Path(name).glob("runs/*/run.json"))  # folders are named by time
    path = found[-1] if found else Path(name) / "run.json"
    return path.parent if path.is_file() else None


def _folder_suite(quick: Any, folder: str, model: str) -> Any:
    from .document import Document

    value = {
        **quick.value,
        "name": "images",
        "datasets": [{"name": "folder", "root": str(Path(folder).resolve()), "label": folder}],
        "models": [model],
    }
    return Document(value, "--images-dir", {})


# --- commands -------------------------------------------------------------------------------------


@cli.command()
@_suite_options
@_keep_options
@click.option("--fresh", is_flag=True, help="Set the store aside and compute everything.")
@click.option("--fail-fast", is_flag=True, help="Stop after the first unit with an error.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
@click.option("--page/--no-page", default=True, help="Write index.html of the run; the default.")
@_by_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def run(**options: Any) -> int:
    """Plan SUITE, run what is missing, print the leaderboard, write the page.

    SUITE is a built-in name or a YAML file; the default, quick, needs no download.
    """
    plugins = _plugins(options["plugin"])
    suite = _load(options)
    from .run import run_suite

    return run_suite(
        suite,
        data=_data(options["data"]),
        out=options["out"],
        plugins=plugins,
        fresh=options["fresh"],
        fail_fast=options["fail_fast"],
        form="json" if options["as_json"] else "terminal",
        quiet=options["quiet"],
        page=options["page"],
        by=options["by"],
    )


@cli.command()
@_suite_options
@_keep_options
def plan(**options: Any) -> None:
    """Say what a run of SUITE would compute: cells, units, passes, what is stored."""
    _plugins(options["plugin"])
    suite = _load(options)
    from .run import describe_plan

    click.echo(describe_plan(suite, _data(options["data"]), options["out"]), nl=False)


@cli.command()
@_suite_options
def fetch(**options: Any) -> None:
    """Download data sets and weights of SUITE where their hosts allow it; run --offline then works.

    They go into --data, else XBENCH_DATA, else XBENCH_HOME/data (by default in the user's cache),
    where every other command looks too. What is there is verified and not downloaded again; a file
    that was interrupted goes on. What has to be requested says so, and what to put where.
    """
    _plugins(options["plugin"])
    suite = _load(options)
    if suite.run.offline:
        raise UsageError("fetch is for the network; --no-offline lets it through")
    data = options["data"] or Path(os.environ.get("XBENCH_DATA") or _home())
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"data directory {str(data)!r} cannot be made: {error}") from None
    from .run import fetch_data

    click.echo(fetch_data(suite, data), nl=False)


@cli.command()
@_suite_options
@click.option(
    "--format",
    "form",
    type=click.Choice(["terminal", "md", "csv", "json", "latex"]),
    default="terminal",
    show_default=True,
)
@click.option("--leaderboard", "view", flag_value="leaderboard", default=True, hidden=True)
@click.option("--pivot", "view", flag_value="pivot", help="Methods x models against metrics.")
@click.option("--pairs", "view", flag_value="pairs", help="Differences of all pairs of methods.")
@click.option(
    "--between-models",
    "view",
    flag_value="between-models",
    help="Differences of models, on all images and on those that both classify correctly; of a "
    "network of a pair, from the first arm's.",
)
@click.option(
    "--effect",
    "view",
    flag_value="effect",
    help="Differences of arms of training over pairs of networks.",
)
@click.option("--agreement", "view", flag_value="agreement", help="Agreement of metrics.")
@click.option(
    "--sensitivity",
    "view",
    flag_value="sensitivity",
    help="Ranks under each variant (baseline, preset, steps) of a metric.",
)
@click.option(
    "--published",
    "view",
    flag_value="published",
    help="The numbers that a paper printed beside it, and what becomes of the paper's claims.",
)
@_by_option
@click.option("--mixed", is_flag=True, help="Also where rows were made by different versions.")
def table(form: str, view: Any, by: str, mixed: bool, **options: Any) -> int:
    """Print the leaderboard of SUITE, or another view of it, without computing anything.

    SUITE may also be a folder with table.csv, per_image.parquet and provenance.json: one of runs/,
    a committed one such as results/quick, or one with runs/, which stands for the latest run. Its
    table needs neither suite nor data.
    """
    _plugins(options["plugin"])
    if options["suite"] and Path(options["suite"]).is_dir():
        given = [key for key in _NARROWING if options[key] not in (None, ())]
        if given:
            raise click.UsageError(
                f"{options['suite']} is a folder of results, which --{given[0].replace('_', '-')} "
                "does not narrow; name its suite instead"
            )
        from .run import print_results

        return print_results(Path(options["suite"]), form, view, mixed=mixed, by=by)
    suite = _load(options)
    from .run import print_table

    data, out = _data(options["data"]), options["out"]
    return print_table(suite, data, out, form, view, mixed=mixed, by=by)


_NARROWING = (
    "datasets", "models", "methods", "metrics", "add_method", "images", "target", "seed",
    "settings",
)  # fmt: skip


@cli.command(name="report")
@_suite_options
@click.option(
    "--page",
    type=click.Path(path_type=Path),
    help="File to write; default: index.html of the run, or OUT/<suite>.html.",
)
@click.option(
    "--examples",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    help="Pictures in the gallery; 0 for a page without any.",
)
@_by_option
def report_page(page: Path | None, examples: int, by: str, **options: Any) -> int:
    """Write what is stored of SUITE as one HTML page, without computing anything.

    SUITE may also be the folder of a run, or one with runs/, whose latest is taken.
    """
    _plugins(options["plugin"])
    suite = _load(options)
    from .run import write_report

    folder = _run_folder(options["suite"])
    out = folder.parents[1] if folder else options["out"]
    return write_report(
        suite, _data(options["data"]), out, folder=folder, path=page, examples=examples, by=by
    )


@cli.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--strict", is_flag=True, help="Exit 4 on a change for the better too.")
@click.option(
    "--allow-different",
    is_flag=True,
    help="Compare cells by name although data, weights, parameters or versions differ.",
)
@click.option("--update", is_flag=True, help="Then make BASE what NEW is.")
@click.option("--md", "form", flag_value="md", help="As a comment on a pull request.")
@click.option("--json", "form", flag_value="json", help="As JSON.")
@click.option("--terminal", "form", flag_value="terminal", default=True, hidden=True)
def compare(base: Path, new: Path, form: Any, **options: bool) -> int:
    """Say what became worse from BASE to NEW, image by image; exit 4 on a regression.

    Each is a folder with table.csv, per_image.parquet and provenance.json: one of runs/, or a
    committed one such as results/quick. A folder with runs/ stands for the latest run.
    """
    from .compare import compare as judge
    from .compare import read_results, render, update

    fresh = read_results(new)
    if options["update"] and not base.exists():
        update(base, fresh)
        return FINE
    comparison = judge(read_results(base), fresh, allow_different=options["allow_different"])
    click.echo(render(comparison, form), nl=False)
    if options["update"]:
        update(base, fresh)
        return FINE
    return comparison.status(strict=options["strict"])


@cli.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--model", default="shapes/resnet", show_default=True, metavar="NAME|{name: ...}")
@click.option(
    "--methods",
    multiple=True,
    metavar="NAME|{name: ...}",
    help="Repeatable; default: gradient, guided_absolute_grad, integrated_gradients, grad_cam.",
)
@click.option(
    "--metrics",
    multiple=True,
    metavar="NAME|{name: ...}",
    help="Print these scores too; repeatable.",
)
@click.option("--target", type=click.IntRange(0), help="Class to explain; default: the predicted.")
@click.option("--side", type=click.IntRange(1), help="Side of the centre square that is explained.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--data", type=click.Path(path_type=Path), help="Where weights are looked for.")
@click.option("--plugin", multiple=True, metavar="FILE|MODULE", help="Import entries first.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Figure to write, .png, .svg or .pdf; default: <IMAGE>-explained.png here.",
)
def explain(image: Path, model: str, out: Path | None, **options: Any) -> None:
    """Draw maps of some methods over one picture, and print its scores."""
    _plugins(options["plugin"])
    from . import explain as one
    from .suite import read_choices

    path = out or Path(f"{image.stem}-explained.png")
    one.check_form(path)
    methods = options["methods"] or one.METHODS
    metrics = read_choices("metrics", options["metrics"], "--metrics")
    found = one.explain(
        image,
        read_choices("models", [model], "--model")[0],
        read_choices("methods", methods, "--methods"),
        metrics,
        data=_data(options["data"]),
        target=options["target"],
        side=options["side"],
        seed=options["seed"],
    )
    click.echo(one.report(found, metrics))
    if found.maps:
        one.save(one.figure(found, metrics), path)
        click.echo(str(path))


@cli.command()
@click.argument("recipe")
@click.option("--variant", metavar="NAME", help="A regulariser that the recipe lists by this name.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe, such as seed=1 or regulariser=none.",
)
@click.option("--device", default="auto", metavar="auto|cpu|cuda[:N]", help="Where to compute.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Directory of data and weights; default: XBENCH_DATA, or where fetch puts them.",
)
@click.option("--plugin", multiple=True, metavar="FILE|MODULE", help="Import entries first.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of this training; default: training/<recipe>-<variant>-seed<seed>.",
)
@click.option("--fresh", is_flag=True, help="Begin anew, whatever the folder holds.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def train(
    recipe: str,
    variant: str | None,
    settings: tuple[str, ...],
    device: str,
    data: Path | None,
    plugin: tuple[str, ...],
    out: Path | None,
    fresh: bool,
    quiet: bool,
) -> None:
    """Train a network by RECIPE, a built-in name or a YAML file; an interrupted one goes on.

    Prints the weights' file. Several GPUs or hosts: torchrun --nproc-per-node N -m xbench.cli train
    RECIPE.
    """
    _plugins(plugin)
    from .training.recipe import load_recipe, read_recipe

    chosen = load_recipe(read_recipe(recipe), _settings(settings, "seed=1"))
    from .training.loop import train as run_training

    if variant is not None:
        chosen = chosen.variant(variant)
    label = variant or chosen.regulariser["name"]
    folder = out or Path("training") / f"{chosen.name}-{label}-seed{chosen.seed}"
    weights = run_training(
        chosen, out=folder, data=_data(data), device=device, fresh=fresh, quiet=quiet
    )
    click.echo(weights)


@cli.command(name="list")
@click.argument("kind", type=click.Choice([*KINDS, "plugins"]))
@click.option("--plugin", multiple=True, metavar="FILE|MODULE", help="Import entries first.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_entries(kind: str, plugin: tuple[str, ...], as_json: bool) -> None:
    """List what is registered."""
    _plugins(plugin)
    from .info import listing

    click.echo(listing(kind, as_json=as_json))


@cli.command()
@click.argument("name")
@click.option("--plugin", multiple=True, metavar="FILE|MODULE", help="Import entries first.")
def info(name: str, plugin: tuple[str, ...]) -> None:
    """Describe one entry: parameters, direction, passes, source."""
    _plugins(plugin)
    from .info import description

    click.echo(description(name))


@cli.group()
def store() -> None:
    """Look after part files: list, verify, tidy, bring together.

    OUT is the folder that 'xbench run -o' was given, or the store in it; default: results.
    """


_FOLDER = click.Path(path_type=Path)
_OUT = click.argument("out", type=_FOLDER, default="results")
_JSON = click.option("--json", "as_json", is_flag=True, help="As JSON.")


@store.command(name="ls")
@_OUT
@click.option("--cells", is_flag=True, help="A line for each cell.")
@_JSON
def store_ls(out: Path, cells: bool, as_json: bool) -> None:
    """List what OUT holds.

    Groups of data set and model, their cells, images, rows, parts, bytes, and which versions made
    them.
    """
    from . import storekeeping as keeping
    from . import storetext as text

    found = keeping.audit(keeping.find_store(out), deep=False)
    if as_json:
        click.echo(json.dumps(text.contents(found), indent=1, allow_nan=False))
    else:
        click.echo(text.show_contents(found, cells=cells, width=_width()), nl=False)


@store.command()
@_OUT
@_JSON
def verify(out: Path, as_json: bool) -> int:
    """Read every byte of OUT and say what is wrong.

    Exit 1 if anything is. Nothing is changed.
    """
    from . import storekeeping as keeping
    from . import storetext as text

    found = keeping.audit(keeping.find_store(out))
    if as_json:
        click.echo(json.dumps(text.findings_facts(found), indent=1, allow_nan=False))
    else:
        click.echo(text.show_findings(found), nl=False)
    return UNEXPECTED if found.findings else FINE


@store.command()
@_OUT
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--damaged", is_flag=True, help="Also damaged parts, which no run can read.")
@_JSON
def gc(out: Path, dry_run: bool, damaged: bool, as_json: bool) -> None:
    """Remove from OUT what serves nothing.

    That is: temporary files of dead writers, and parts all of whose rows other parts hold. Nothing
    that a table could count goes.
    """
    from . import storekeeping as keeping
    from . import storetext as text

    files = keeping.waste(keeping.audit(keeping.find_store(out)), damaged=damaged)
    if not dry_run:
        keeping.remove(files)
    if as_json:
        facts = text.waste_facts(files, is_gone=not dry_run)
        click.echo(json.dumps(facts, indent=1, allow_nan=False))
    else:
        click.echo(text.show_waste(files, is_gone=not dry_run), nl=False)


@store.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...", type=_FOLDER)
@click.option("--into", required=True, metavar="OUT", type=_FOLDER, help="Where to.")
@_JSON
def merge(sources: tuple[Path, ...], into: Path, as_json: bool) -> None:
    """Copy the parts of other stores into OUT.

    All are verified first, and nothing is copied if one is damaged or two contradict each other.
    What is there already is skipped, so that running it again is harmless.
    """
    from . import storekeeping as keeping
    from . import storetext as text

    done = keeping.merge(sources, into)
    if as_json:
        click.echo(json.dumps(text.merged_facts(done), indent=1, allow_nan=False))
    else:
        click.echo(text.show_merged(done), nl=False)


def _width() -> int | None:
    """Of the terminal on standard output, if it is one."""
    import shutil

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


@cli.command()
def doctor() -> int:
    """Check versions, device, disk and plug-ins."""
    from .info import diagnosis

    text, healthy = diagnosis()
    click.echo(text)
    return FINE if healthy else UNEXPECTED


if __name__ == "__main__":
    main()
