"""The command line: ``python -m job VERB [CONFIG.toml | RUN] [--section.field VALUE …]``, or ``lanes VERB …``."""

import io
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from job.config.field import ConfigField
from job.config.model import ModelConfig
from job.config.run import RunConfig, ScaleConfig
from job.config.schema import SECTIONS, Config
from job.config.section import unknown_name
from job.config.toml import FILE_SECTIONS, ConfigValues, check_field, override_config, parse_flags
from job.console import NO_BREAK, Console, escape_controls, format_json, program
from job.errors import RunFailed, UserError, error_origin, import_optional, report_os_error
from job.paths import check_no_credentials, expand_path, mask_credentials


@dataclass(frozen=True)
class CommandLine:
    """The arguments that follow the verb."""

    targets: tuple[str, ...]
    flags: dict[str, str]
    json: bool = False  # print one JSON object instead of text

    @property
    def target(self) -> str | None:
        """The first file or folder."""
        return self.targets[0] if self.targets else None


def _train(line: CommandLine) -> int:
    """Train a model, or resume a run."""
    from job.api import select_launcher
    from job.config.config_file import load_config
    from job.report.write import report_run
    from job.run.driver import print_result, run_training

    config, console = load_config(line.target, line.flags), Console()
    outcome = run_training(config, Path(line.target or "run").stem, console, select_launcher(config))
    if outcome.result:
        print_result(outcome, console)
    report_run(outcome, console)
    return outcome.exit_code


def _tune(line: CommandLine) -> int:
    """Search for the best values of the fields in [search.space]."""
    from job.cluster.tune import run_search
    from job.config.config_file import load_search_config

    config, search = load_search_config(line.target, line.flags)
    return run_search(config, search, Path(line.target or "search").stem, Console())


def _prepare(line: CommandLine) -> int:
    """Write a text as a token store, which runs memory-map instead of reading the text."""
    from job.config.config_file import load_config
    from job.run.prepare import prepare_store

    config, console = load_config(line.target, line.flags), Console()
    if not config.scale.max_workers:
        return prepare_store(config, console)
    from job.cluster.prepare import cluster_tasks

    return prepare_store(config, console, partial(cluster_tasks, config.corpus.store, console))


def _generate(line: CommandLine) -> int:
    """Continue a text with a trained model, or by the mean of the probabilities of several.

    The configuration of the first run overrides the defaults.
    """
    from job.inference.generate import generate_texts
    from job.inference.prefix import prefix_values, prefix_warnings

    checkpoints, config = _open(line.targets, prefix_values(parse_flags(line.flags)))
    generated = generate_texts(checkpoints, config)
    texts, continuations = generated.texts, generated.continuations
    if line.json:
        several = {"continuations": continuations} if len(texts) > 1 else {}
        values = {"prefix": generated.prefix, "continuation": continuations[0], **several, **_describe(checkpoints)}
        texts = [format_json(values)]
    for number, text in enumerate(texts, 1):
        if len(texts) > 1:
            print(f"--- {number} of {len(texts)} ---")
        print(escape_controls(text) if sys.stdout.isatty() else text)
    for warning in prefix_warnings(generated.prefix, config.corpus, checkpoints[0].vocabulary):
        Console(sys.stderr).warn(warning)
    return 0


def _evaluate(line: CommandLine) -> int:
    """Compute the perplexity of a text under a trained model, or under the mean of the probabilities of several.

    The configuration of the first run overrides the defaults.
    """
    from job.data.text_size import bits_per_unit
    from job.data.vocabulary import format_unknown_share, unknown_warnings
    from job.distributed.context import local_device
    from job.inference.evaluate import evaluate_here, evaluate_text
    from job.run.text_cache import TextCache

    values = parse_flags(line.flags)
    if "corpus.source" in line.flags:  # another text is evaluated whole, however the training text was cut
        values.setdefault("corpus.max_tokens", 0)
    scale = ScaleConfig(values.pop("scale.workers", 0), values.pop("scale.accelerator", "auto"))
    checkpoints, config = _open(line.targets, values)
    cache = TextCache(Console(sys.stderr), is_local=True)
    if not scale.max_workers:
        evaluate = partial(evaluate_here, local_device(scale))
    else:
        from job.cluster.connection import is_local
        from job.cluster.evaluate import evaluate_on_cluster

        evaluate, cache = partial(evaluate_on_cluster, scale), replace(cache, is_local=is_local(scale))
    result = evaluate_text(checkpoints, config, evaluate, cache.open)
    unit = "byte" if checkpoints[0].vocabulary.kind == "byte" else "character"
    nats = result.loss.nats_per_token
    if line.json:
        bits = {**bits_per_unit(result.loss.nats, result.size), f"bits_per_{unit}": result.bits_per_character}
        values = {"perplexity": result.perplexity, **bits, "nats_per_token": nats}
        values |= {"targets": result.loss.tokens, "unknown_share": result.unknown_share}
        print(format_json({**values, "source": config.corpus.source, **_describe(checkpoints)}))
    else:
        Console().print(
            f"perplexity {result.perplexity:.6g}, {result.bits_per_character:.4f} bits per {unit}, "
            f"{nats:.6f} nats per token over {result.loss.tokens:,} targets "
            f"({_format_models(checkpoints)}, {config.corpus.source}{format_unknown_share(result.unknown_share)})"
        )
    for warning in unknown_warnings({"evaluated": result.unknown_share}):
        Console(sys.stderr).warn(warning)
    return 0


def _export(line: CommandLine) -> int:
    """Write a trained model for other programs, as an ONNX file or for the Hugging Face hub."""
    from job.export.export import FORMATS, check_export, export_model

    for name, remedy in {"format": f"one of {', '.join(FORMATS)}", "output": "the folder to create"}.items():
        if name not in line.flags:
            raise UserError(f"--{name} is missing", f"give {remedy}")
    file_format, output = line.flags.pop("format"), line.flags.pop("output")
    folder = check_export(file_format, output)
    checkpoints, config = _open(line.targets, parse_flags(line.flags))
    if len(checkpoints) > 1:
        raise UserError(f"{line.target}: is a search with {len(checkpoints)} runs", "give one of them")
    files = export_model(checkpoints[0], config, file_format, folder)
    Console().print(f"step {checkpoints[0].checkpoint.step:,} in {output}: {', '.join(files)}")
    return 0


def _serve(line: CommandLine) -> int:
    """Serve trained models over HTTP, with a page to try them, until Ctrl-C."""
    for package in ("fastapi", "uvicorn"):
        import_optional(package, "serve")
    from job.serving import server

    host, port = line.flags.pop("host", server.DEFAULT_HOST), line.flags.pop("port", server.DEFAULT_PORT)
    token = server.read_token(os.environ, host)
    with server.listen(host, port) as listener:
        models = server.load_models(*_open(line.targets, parse_flags(line.flags)))
        address, names = server.page_address(host, listener), ", ".join(model.name for model in models)
        Console().print(f"serving {names} at {address}")
        return server.run_server(server.build_server(models, host, token), listener)


def _open(targets: Sequence[str], values: ConfigValues) -> tuple[list[Any], Config]:
    """Returns the LoadedCheckpoints that a verb needs, and the configuration of the first, overridden by values.

    A custom cell stays only if the values name it, too.
    """
    from job.run.run_dir import SEARCH_FILE, open_checkpoint
    from job.storage import Folder
    from job.tuning.trials import finished_checkpoints

    if not targets:
        raise UserError("the folder of a run or checkpoint is missing", "give one, such as runs/seed-1")
    loaded: list[Any] = []
    for folder in map(Folder.resolve, targets):
        with report_os_error(f"{folder}: cannot be read"):
            is_search = folder.has(SEARCH_FILE)
        loaded += map(open_checkpoint, finished_checkpoints(folder) if is_search else [folder])
    cell, stored = values.get("model.cell"), {checkpoint.config.model.cell: None for checkpoint in loaded}
    if cell is not None and cell not in stored:
        kind = "this checkpoint's is" if len(loaded) == 1 else "those of the checkpoints are"
        raise UserError(f"--model.cell = {cell}: {kind} {', '.join(stored)}", "leave it out")
    return loaded, override_config(loaded[0].config, {"model.cell": ModelConfig.cell, **values})


def _describe(checkpoints: Sequence[Any]) -> dict[str, Any]:
    """Returns the fields of JSON output that name LoadedCheckpoints."""
    paths = [loaded.checkpoint.path.address for loaded in checkpoints]
    several = {"checkpoints": paths} if len(paths) > 1 else {}
    return {"checkpoint": paths[0], "step": checkpoints[0].checkpoint.step, **several}


def _format_models(checkpoints: Sequence[Any]) -> str:
    return f"step {checkpoints[0].checkpoint.step:,}" if len(checkpoints) == 1 else f"{len(checkpoints)} models"


def _doctor(line: CommandLine) -> int:
    """Check the configuration, the storage and the cluster before a run."""
    from job.cluster.doctor import print_check, run_checks
    from job.config.config_file import load_search_config

    address = line.flags.pop("address", None)
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    config, search = load_search_config(line.target, line.flags)
    name = Path(line.target or ("search" if search.space.domains else "run")).stem
    console = Console(sys.stderr if line.json else sys.stdout)
    checks = run_checks(config, search, name, console, (lambda _: None) if line.json else partial(print_check, console))
    problems = sum(not check.is_ok for check in checks)
    if line.json:
        print(format_json({"checks": [asdict(check) for check in checks], "problems": problems}))
    else:
        console.print()
        console.print(f"{problems} problem{'s' * (problems > 1)} to fix" if problems else "all checks passed")
    return int(problems > 0)


def _runs(line: CommandLine) -> int:
    """List the runs and searches of a storage, the one that changed last first."""
    from job.storage import Folder
    from job.tuning.runs import describe_runs, list_runs, print_runs

    storage = Folder.resolve(line.target or RunConfig.storage)
    runs = list_runs(storage)
    if line.json:
        print(format_json(describe_runs(storage, runs)))
    else:
        print_runs(storage, runs, Console())
    return 0


def _report(line: CommandLine) -> int:
    """Write a page that shows runs next to each other: curves, figures, samples, and the loss of each token."""
    from job.report.write import write_report

    if not line.targets:
        raise UserError("the folder of a run or search is missing", "give one, such as runs/seed-1")
    output = line.flags.get("output")
    path = write_report(line.targets, None if output is None else expand_path(output), Console(sys.stderr))
    Console().print(path, wrap=False)
    return 0


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Args:
        run: returns the exit status; its docstring is the verb's help
        arguments: for the usage line
        fields: sections and fields of the configuration that flags may set
        flags: help texts of its other flags
        takes_several: whether several runs may be given
    """

    run: Callable[[CommandLine], int]
    arguments: str
    fields: tuple[str, ...]
    flags: Mapping[str, str] = field(default_factory=dict)
    takes_several: bool = False

    def accepts(self, name: str) -> bool:
        """Returns whether a flag may set the field of this full name."""
        return name in self.fields or name.partition(".")[0] in self.fields


JSON_FLAG = {"json": "print one JSON object"}  # takes no value
VERBS = {
    "train": Verb(_train, "[CONFIG.toml]", tuple(SECTIONS)),
    "tune": Verb(_tune, "CONFIG.toml", tuple(FILE_SECTIONS)),
    "prepare": Verb(_prepare, "[CONFIG.toml]", tuple(SECTIONS)),
    "generate": Verb(
        _generate,
        "RUN|CHECKPOINT|SEARCH …",
        ("generate", "run.seed", "model.cell", "evaluate.weights"),
        JSON_FLAG,
        takes_several=True,
    ),
    "evaluate": Verb(
        _evaluate,
        "RUN|CHECKPOINT|SEARCH …",
        (
            "corpus.source",
            "corpus.encoding",
            "corpus.text_field",
            "corpus.separator",
            "corpus.cleaning",
            "corpus.max_tokens",
            "model.cell",
            "scale.workers",
            "scale.accelerator",
            "evaluate",
        ),
        JSON_FLAG,
        takes_several=True,
    ),
    "doctor": Verb(
        _doctor, "[CONFIG.toml]", tuple(SECTIONS), {"address": "a running Ray cluster: HOST:PORT", **JSON_FLAG}
    ),
    "runs": Verb(_runs, "[STORAGE]", (), JSON_FLAG),
    "report": Verb(
        _report,
        "RUN|SEARCH …",
        (),
        {"output": "the file to write (default: report.html in the folder of the first run)"},
        takes_several=True,
    ),
    "serve": Verb(
        _serve,
        "RUN|CHECKPOINT|SEARCH …",
        ("model.cell", "evaluate.weights"),
        {"host": "address to listen on (default: 127.0.0.1)", "port": "port; 0: any free one (default: 8000)"},
        takes_several=True,
    ),
    "export": Verb(
        _export,
        "RUN|CHECKPOINT",
        ("model.cell", "evaluate.weights"),
        {"format": "onnx (a step of the model) or hub (weights and a model card)", "output": "the folder to create"},
    ),
}


def _parse_arguments(verb_name: str, arguments: Sequence[str]) -> CommandLine:
    """Parses ``[TARGET …] [--name VALUE | --name=VALUE …]``."""
    targets: list[str] = []
    flags: dict[str, str] = {}
    remaining = iter(arguments)
    for argument in remaining:
        if argument.startswith("--"):
            name, value = _parse_flag(verb_name, argument.removeprefix("--"), remaining)
            flags[name] = value
        elif not targets or VERBS[verb_name].takes_several:
            check_no_credentials(VERBS[verb_name].arguments, argument)
            with error_origin(argument):
                targets.append(expand_path(argument))
        else:
            raise UserError(f"{argument}: {targets[0]} is given already", f"{verb_name} takes one file or folder")
    return CommandLine(tuple(targets), flags, json=flags.pop("json", "") == "true")


def _parse_flag(verb_name: str, text: str, remaining: Iterator[str]) -> tuple[str, str]:
    """Returns the name and the value of a flag; the value is the next argument if the flag does not contain it."""
    name, has_value, value = text.partition("=")
    _check_flag(verb_name, name)
    if name in JSON_FLAG:
        if has_value:
            raise UserError(f"--{name}: takes no value")
        return name, "true"
    following = value if has_value else next(remaining, None)
    if following is None:
        raise UserError(f"--{name}: a value is missing")
    return name, following


def _check_flag(verb_name: str, name: str) -> None:
    verb = VERBS[verb_name]
    if name in verb.flags:
        return
    if others := [other for other, verb in VERBS.items() if name in verb.flags]:
        raise UserError(f"--{name}: {verb_name} does not accept it", f"{', '.join(others)} can use it")
    check_field(name)
    if verb.accepts(name):
        return
    if name.startswith("search."):
        raise UserError(f"--{name}: only tune accepts fields of [search]")
    if not verb.fields:
        raise UserError(f"--{name}: {verb_name} does not accept fields of a configuration")
    raise UserError(f"--{name} is fixed by the checkpoint and cannot be changed", f"{', '.join(verb.fields)} can")


def _format_help() -> str:
    verbs = {name: str(verb.run.__doc__) for name, verb in VERBS.items()}
    return f"""usage: {program()} VERB [CONFIG.toml | RUN] [--section.field VALUE …]

Train recurrent language models on Ray.

{_format_table(verbs, max(map(len, VERBS)))}

Flags override the configuration file, and the file overrides the defaults.
Show the flags of a verb: {program()} VERB --help"""


def _format_verb_help(verb_name: str) -> str:
    verb = VERBS[verb_name]
    usage = f"usage: {program()} {verb_name} {verb.arguments}{' [--section.field VALUE …]' * bool(verb.fields)}"
    tables: dict[str, dict[str, str]] = {}
    for section_name, section in FILE_SECTIONS.items():
        fields = {name: option for name, option in section.config_fields().items() if verb.accepts(name)}
        if fields:
            table = {f"--{name}": _field_help(option) for name, option in fields.items()}
            tables[f"[{section_name}] {section.__doc__}"] = table
    flags = {**verb.flags, "debug": "show the traceback of an error"}
    tables["Other flags"] = {f"--{name}": meaning for name, meaning in flags.items()}
    column = max(len(flag) for table in tables.values() for flag in table)
    blocks = (f"{heading}\n{_format_table(table, column)}" for heading, table in tables.items())
    return "\n\n".join([usage, textwrap.fill(str(verb.run.__doc__), 80), *blocks])


def _field_help(option: ConfigField) -> str:
    default = f"(default: {option.default_text})".replace(" ", NO_BREAK)
    return f"{option.description} {default}"


def _format_table(rows: Mapping[str, str], column: int) -> str:
    """Returns names of up to ``column`` characters and their meanings, wrapped to 80 columns."""
    wrapper = textwrap.TextWrapper(80, subsequent_indent=" " * (column + 4), break_on_hyphens=False)
    lines = [wrapper.fill(f"  {name:<{column}}  {meaning}") for name, meaning in rows.items()]
    return "\n".join(lines).replace(NO_BREAK, " ")


def main(arguments: Sequence[str]) -> int:
    """Runs a command line, without the name of the program.

    Returns:
        the exit status

    Raises:
        UserError, RunFailed: see ``command``
    """
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments:
        raise UserError("the verb is missing", f"one of {', '.join(VERBS)}; {program()} --help describes them")
    if arguments[0] in ("-h", "--help", "help"):
        print(_format_help())
        return 0
    verb_name, *rest = arguments
    if verb_name not in VERBS:
        raise unknown_name("verb", verb_name, VERBS)
    if "-h" in rest or "--help" in rest:
        print(_format_verb_help(verb_name))
        return 0
    return VERBS[verb_name].run(_parse_arguments(verb_name, rest))


def command() -> int:
    """Runs the command line of this process. Reports an error as one line; returns the exit status."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  None if the process was started without one
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):  # the terminal may lack characters of the text, whatever its encoding
            stream.reconfigure(errors=errors)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # by default it ends the process; a run installs its own handler
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if "--debug" in sys.argv:
            print(escape_controls(mask_credentials("".join(traceback.format_exception(error)))), file=sys.stderr)
        else:
            expected = isinstance(error, UserError | RunFailed)
            message = str(error) if expected else f"{type(error).__name__}: {error} (--debug shows where)"
            print(f"error: {escape_controls(mask_credentials(' '.join(message.split())))}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def run_and_exit() -> NoReturn:
    """Runs the command line of this process, as ``python -m job`` and the installed script ``lanes`` do."""
    status = command()
    # A normal exit would join Ray's threads, which may be waiting for a cluster that is gone.
    os._exit(status)


if __name__ == "__main__":
    run_and_exit()
