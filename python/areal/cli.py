"""The command line: ``areal train | sft | dpo | serve | reward-server | eval | score | doctor | report | replay-batch``.

Data goes to stdout, everything else to stderr. A mistake is one sentence and a hint (exit code 2), a run that failed is one sentence
with the reason (exit code 1). Nothing heavy is imported before the arguments are parsed: ``areal --help`` needs neither torch nor pydantic.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from areal.replay_command import add_replay, run_replay
from areal.supervised_command import add_supervised, run_supervised

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """Usage errors in the same form as all others."""

    def error(self, message: str) -> None:  # type: ignore[override]  # argparse's own never returns either
        _print_error(message, f"see `{self.prog} --help`")
        sys.exit(EXIT_USAGE)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="areal", description="Fully asynchronous reinforcement learning for language models.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_train(commands)
    add_supervised(commands)
    _add_serve(commands)
    _add_reward_server(commands)
    _add_eval(commands)
    _add_score(commands)
    _add_doctor_and_report(commands)
    add_replay(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction[_Parser]) -> None:
    train = commands.add_parser(
        "train",
        usage="areal train CONFIG [key=value ...]",
        help="train a model as a config file says",
        description="Train a model. The run's folder gets metrics, timeline, checkpoints and summary.json, whose path is the last line printed.",
    )
    train.add_argument(
        "words",
        metavar="CONFIG [key=value ...]",
        nargs="*",
        default=[],
        help="a YAML file, e.g. examples/arithmetic.yaml, and changes to its keys, e.g. rollout.max_head_offpolicyness=4",
    )
    train.add_argument("--config", metavar="FILE", help=argparse.SUPPRESS)  # how AReaL's scripts name the file
    train.add_argument("--check", action="store_true", help="check the configuration, print it in full and stop")
    train.add_argument("--keys", action="store_true", help="list every key with its default and meaning and stop")


def _add_serve(commands: argparse._SubParsersAction[_Parser]) -> None:
    serve = commands.add_parser(
        "serve",
        usage="areal serve MODEL [options] [-- options of SGLang]",
        help="serve a model over SGLang's HTTP protocol",
        description="Serve a model in the foreground: by the embedded engine, or by SGLang. Prints the address once SGLang answers.",
    )
    serve.add_argument("model", metavar="MODEL", help="folder of a Hugging Face model")
    serve.add_argument("--backend", choices=["embedded", "sglang"], default="embedded")
    serve.add_argument("--python", default="", metavar="FILE", help="sglang: interpreter of the environment that SGLang is in")
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; there is no password")
    serve.add_argument("--port", type=int, default=30000, help="0 takes a free one")
    serve.add_argument("--device", default="auto", help="auto, cpu or cuda:N")
    serve.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    serve.add_argument("--max-running-requests", type=int, default=64, metavar="N", help="sequences decoded at once")
    serve.add_argument("--max-context", type=int, default=0, metavar="N", help="longest prompt + answer in tokens; 0 = the model's limit")
    serve.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="CPU threads")
    serve.add_argument(
        "--update-mode",
        choices=["abort", "retract", "in_place"],
        help="running sequences at a weight update, as rollout.update_mode of the run that will use it",
    )
    serve.add_argument("--deterministic", action="store_true", help="embedded: answers do not depend on what else is running")


def _add_reward_server(commands: argparse._SubParsersAction[_Parser]) -> None:
    rewards = commands.add_parser(
        "reward-server",
        usage="areal reward-server FUNCTION ... [options]",
        help="score answers over HTTP, for several runs",
        description="Score answers over HTTP in the foreground; runs use it by reward_fn: http://HOST:PORT/score/NAME. Prints the address.",
    )
    rewards.add_argument("functions", metavar="FUNCTION", nargs="+", help="math, code, or [NAME=]package.module:function")
    rewards.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; there is no password")
    rewards.add_argument("--port", type=int, default=30100, help="0 takes a free one")
    rewards.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that score; default: a core each")
    rewards.add_argument("--timeout", type=float, default=15.0, metavar="S", help="seconds a score may run")
    rewards.add_argument(
        "--isolation", choices=["auto", "namespaces", "rlimit"], help="code: how programs are confined; as for areal score"
    )
    rewards.add_argument("--max-queue", type=int, default=1024, metavar="N", help="scores that wait at most; more are sent away (429)")


def _add_eval(commands: argparse._SubParsersAction[_Parser]) -> None:
    evaluate = commands.add_parser(
        "eval",
        usage="areal eval MODEL [--config FILE] [--out FILE] [key=value ...]",
        help="measure a model on held-out prompts",
        description="pass@1, pass@k and majority@k (evaluator.gconfig.n_samples=k), length and truncation on held-out prompts; JSON on stdout.",
    )
    evaluate.add_argument("model", metavar="MODEL", help="folder of a Hugging Face model, e.g. a checkpoint of a run")
    evaluate.add_argument(
        "words", metavar="key=value", nargs="*", default=[], help="change keys of the config, e.g. evaluator.n_prompts=2000"
    )
    evaluate.add_argument("--config", metavar="FILE", help="data set and sampling; default: the config of the run that MODEL belongs to")
    evaluate.add_argument("--out", metavar="FILE", help="write every episode there as JSONL: the row, its completion and its reward")


def _add_score(commands: argparse._SubParsersAction[_Parser]) -> None:
    score = commands.add_parser(
        "score",
        usage="areal score math|code FILE --out OUT [options]",
        help="score saved completions again",
        description="Score the completions of a JSONL file. OUT has the same rows with 'score' or 'failure'; its path is the line printed.",
    )
    score.add_argument("kind", choices=["math", "code"], help="math: rows with 'completion' and 'answer'; code: 'completion' and 'tests'")
    score.add_argument("file", metavar="FILE", help="JSONL, an object a line")
    score.add_argument("--out", metavar="OUT", required=True, help="appears whole, or not at all")
    score.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that score; default: a core each")
    score.add_argument("--timeout", type=float, metavar="S", help="CPU seconds that an answer may take; one that takes longer scores 0")
    score.add_argument(
        "--isolation", choices=["auto", "namespaces", "rlimit"], help="code: how programs are confined; a named level is demanded"
    )
    score.add_argument("--completion-key", default="completion", metavar="KEY", help="the column of the completions")


def _add_doctor_and_report(commands: argparse._SubParsersAction[_Parser]) -> None:
    doctor = commands.add_parser(
        "doctor", help="what this machine has, and what to do about what is missing", description="Check this machine."
    )
    doctor.add_argument("--json", action="store_true", help="for scripts")

    report = commands.add_parser(
        "report", help="draw a run: reward, length, staleness, speed, timeline", description="Draw a run as PNG; prints the paths."
    )
    report.add_argument("run", metavar="RUN", help="folder of a run, e.g. runs/arithmetic/demo")
    report.add_argument("--out", metavar="FOLDER", help="where the pictures go; default: the run's folder")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = _parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv and argv[0] == "serve" else len(argv)
    args, rest = parser.parse_known_args(argv[:cut])
    args.server_options = argv[cut + 1 :]
    # argparse does not take key=value words behind an option.
    if args.command in ("train", "sft", "dpo", "eval") and all("=" in word and not word.startswith("-") for word in rest):
        args.words += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.version:
        from areal import __version__

        print(__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return _COMMANDS[args.command](args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output (head, less) has gone; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:  # the process boundary: every error ends here as a sentence, or with its traceback if unforeseen
        return _report_failure(error)


def _import_from_here() -> None:
    """Users' functions lie in the folder that they start from, as for ``python -m areal``."""
    if (here := os.getcwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def _end_in_order() -> None:
    """SIGTERM (kill, a job scheduler) and SIGHUP (a lost terminal) are as Ctrl-C: processes and shared memory are cleaned up."""
    import signal

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts its background jobs; the way out goes through it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP, and so do we then
            signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))


def _log_warnings() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


def _train(args: argparse.Namespace) -> int:
    from areal.config import GRPOConfig
    from areal.config_check import check_machine
    from areal.config_load import dump_yaml, list_keys, load_expr_config

    if args.keys:
        print(list_keys())
        return 0
    config, _ = load_expr_config([*(["--config", args.config] if args.config else []), *args.words], GRPOConfig)
    if args.check:
        print(dump_yaml(config), end="")
        return 0
    _import_from_here()
    _end_in_order()
    check_machine(config)
    _log_warnings()
    from areal.controller import run_train

    run_folder = run_train(config)
    from areal.report import draw_report

    for picture in draw_report(run_folder):
        print(f"report: {picture}", file=sys.stderr)
    print(run_folder / "summary.json")
    return 0


def _supervised(args: argparse.Namespace) -> int:
    def prepare() -> None:
        _import_from_here()
        _end_in_order()
        _log_warnings()

    return run_supervised(args, prepare)


def _serve(args: argparse.Namespace) -> int:
    from areal.config_check import check_device, check_model_dir
    from areal.launcher.gpus import count_gpus
    from areal.launcher.local import free_port

    _check_serve(args)
    check_model_dir("MODEL", args.model)
    check_device("--device", args.device)
    if args.device == "auto":
        args.device = "cuda:0" if count_gpus() else "cpu"
    args.port = args.port or free_port()
    if args.backend == "sglang":
        return _serve_sglang(args)
    from areal.inference.embedded.server import main as serve

    args.update_mode = "in_place" if args.update_mode == "in_place" else "retract"
    options = ["model", "host", "port", "device", "dtype", "max_running_requests", "max_context", "threads", "update_mode"]
    words = [word for name in options for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    return serve([*words, *(["--deterministic"] if args.deterministic else [])])


def _check_serve(args: argparse.Namespace) -> None:
    """Options of one backend that were given for the other."""
    from areal.config import ConfigError

    if args.backend == "sglang":
        wrong = "--deterministic" if args.deterministic else "--update-mode in_place" if args.update_mode == "in_place" else ""
    else:
        wrong = "--python" if args.python else "-- and options behind it" if args.server_options else ""
    if wrong:
        other = "embedded" if args.backend == "sglang" else "sglang"
        raise ConfigError(f"{wrong} is for --backend {other}", f"leave it out, or add --backend {other}")


def _serve_sglang(args: argparse.Namespace) -> int:
    from areal.inference.sglang_serve import serve

    _end_in_order()
    return serve(
        Path(args.model).expanduser().absolute(),
        python=args.python,
        host=args.host,
        port=args.port,
        device=args.device,
        dtype=args.dtype,
        max_running_requests=args.max_running_requests,
        max_context=args.max_context,
        threads=args.threads,
        keep_prefixes=args.update_mode != "retract",
        options=args.server_options,
    )


def _reward_server(args: argparse.Namespace) -> int:
    _import_from_here()
    _log_warnings()
    from areal.reward.serve_command import run_reward_server

    options = {name: getattr(args, name) for name in ("host", "port", "workers", "timeout", "max_queue", "isolation")}
    return run_reward_server(args.functions, **options)


def _eval(args: argparse.Namespace) -> int:
    import dataclasses
    import json

    from areal.config import ConfigError, GRPOConfig
    from areal.config_check import check_machine, check_model_dir
    from areal.config_load import load_expr_config

    check_model_dir("MODEL", args.model)
    model = Path(args.model).expanduser().resolve()
    file = args.config or next((str(f / "config.yaml") for f in model.parents if (f / "config.yaml").is_file()), None)
    if file is None:
        raise ConfigError(f"no folder above '{args.model}' has the config.yaml of a run", "name the config with --config FILE")
    # No trainer runs, so it wants no GPU, and the servers need not leave it one.
    ours = [f"actor.path={model}", "actor.init_from_scratch=null", "actor.device=cpu", "warmup=null", "rollout.urls=[]"]
    config, _ = load_expr_config([file, *args.words, *ours], GRPOConfig)
    _import_from_here()
    _end_in_order()
    check_machine(config, trains=False)
    _log_warnings()
    from areal.eval_command import run_eval

    result = run_eval(config, Path(args.out).expanduser() if args.out else None)
    print(json.dumps(dataclasses.asdict(result), ensure_ascii=False, indent=2))
    return 0


def _score(args: argparse.Namespace) -> int:
    from areal.reward.score_command import run_score

    _end_in_order()
    out = Path(args.out)
    options = {name: getattr(args, name) for name in ("workers", "timeout", "completion_key", "isolation")}
    summary = run_score(args.kind, Path(args.file), out, **options)
    print(summary, file=sys.stderr)
    print(out)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from areal.doctor import run_doctor

    return run_doctor(as_json=args.json)


def _report(args: argparse.Namespace) -> int:
    from areal.report import draw_report

    for picture in draw_report(Path(args.run), Path(args.out) if args.out else None):
        print(picture)
    return 0


_COMMANDS = {
    "train": _train, "sft": _supervised, "dpo": _supervised, "serve": _serve, "reward-server": _reward_server, "eval": _eval, "score": _score, "doctor": _doctor, "report": _report, "replay-batch": run_replay,
}  # fmt: skip


def _report_failure(error: Exception) -> int:
    """Says what went wrong; only an error that nobody foresaw shows its traceback."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if os.environ.get("AREAL_TRACEBACK"):
        traceback.print_exception(error)
    foreseen = type(error).__module__.startswith("areal.")
    if type(error).__name__ == "ConfigError" and foreseen:
        _print_error(error.message, error.hint)  # type: ignore[attr-defined]  # its class is not imported here: pydantic is slow
        return EXIT_USAGE
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("areal"):
        _print_error(
            f"the package '{error.name}' is not installed", "install what training needs with `pip install '.[train]'` in areal's folder"
        )
        return EXIT_FAILED
    if foreseen or isinstance(error, OSError):
        _print_error(str(error) or type(error).__name__, "AREAL_TRACEBACK=1 shows where it came from")
        return EXIT_FAILED
    if not os.environ.get("AREAL_TRACEBACK"):
        traceback.print_exception(error)
    _print_error(
        f"unexpected {type(error).__name__}: {error}", "this is a bug in areal or in the functions given to it; the traceback is above"
    )
    return EXIT_FAILED


def _print_error(message: str, hint: str = "") -> None:
    color = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    bold, cyan, plain = ("\033[1;31m", "\033[36m", "\033[0m") if color else ("", "", "")
    print(f"{bold}error:{plain} {message}", file=sys.stderr)
    if hint:
        print(f"{cyan}hint:{plain} {hint}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
