"""Screen many texts with one question: which of these abstracts are about X?

Each text is one Parsl app call that asks the fabric a yes-or-no question and reads the answer, and
how sure the model is of it, from the first token's log probabilities. ::

    python -m fabric.workflows.screen --question "Is this about a planet?" --prompts texts.txt \\
        --output screened.jsonl

Results are lines of JSON on standard output and in the output file, in the order in which they are
ready. Run it again with the same output file and only what is missing is asked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TextIO

from fabric.errors import (
    AuthError,
    FabricError,
    HubUnreachable,
    InsufficientBalance,
    UnknownModel,
)
from fabric.sdk import Completion, Message
from fabric.sdk.parsl import query_app

if TYPE_CHECKING:
    from parsl.config import Config

QUESTION = "Is this text about astronomy?"

DEMO = (
    "We report the transit of a hot Jupiter in front of a quiet G-type star, seen by TESS.",
    "The enzyme's active site was resolved at 1.9 angstrom by X-ray crystallography.",
    "A magnitude-limited survey of quasars constrains the faint end of their luminosity.",
    "Interest rates and housing prices were cointegrated over the whole sample period.",
    "Spectra of the supernova show broad calcium lines three days after the explosion.",
    "Soil moisture controlled the germination of winter wheat in all four plots.",
)

EXIT_OK, EXIT_FAILURES, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One text and the name its result goes by."""

    id: str
    text: str


def main(argv: Sequence[str] | None = None) -> int:
    """Screen what the arguments say; return 0 if every text was answered, 1 if one was not."""
    arguments = parse(argv)
    try:
        items = list(read_items(arguments.prompts)) if arguments.prompts else demo_items()
        done = read_done(arguments.output) if arguments.output else set()
    except (OSError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return EXIT_USAGE
    todo = [item for item in items if item.id not in done]
    print(f"{len(items)} texts, {len(items) - len(todo)} of them done before", file=sys.stderr)
    try:
        return screen(todo, arguments)
    except FabricError as error:
        print(f"Error: {error.message}", file=sys.stderr)
        return EXIT_FAILURES
    except KeyboardInterrupt:
        again = " Run it again to go on." if arguments.output else ""
        print(f"Interrupted; what was printed is complete.{again}", file=sys.stderr)
        return EXIT_INTERRUPTED


def screen(items: Sequence[Item], arguments: argparse.Namespace) -> int:
    """Ask about every item and write the results as they come.

    Raises:
        FabricError: One that every other item would end with, too.
    """
    import parsl

    num_failed = num_done = 0
    with ExitStack() as stack:
        # The file first: whatever stops this, what was printed is in it.
        outputs = [stack.enter_context(open_output(arguments.output))] if arguments.output else []
        outputs.append(sys.stdout)
        run_dir = stack.enter_context(TemporaryDirectory(prefix="fabric-screen-"))
        config = get_config(arguments.parsl_executor, arguments.workers, run_dir)
        stack.enter_context(parsl.load(config))
        ask = query_app(
            model=arguments.model, max_tokens=1, temperature=0, logprobs=20, tier="batch"
        )
        # An AppFuture cannot be cancelled: only what the workers can soon take is handed out.
        todo, running = deque(items), dict[Future[Completion], Item]()
        while todo or running:
            while todo and len(running) < 2 * arguments.workers:
                item = todo.popleft()
                running[ask(build_prompt(arguments.question, item.text))] = item
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                result = read_result(running.pop(future), future)
                num_done += 1
                num_failed += "error" in result
                for output in outputs:
                    print(json.dumps(result, ensure_ascii=False), file=output, flush=True)
                print(f"{num_done}/{len(items)} {describe(result)}", file=sys.stderr)
    return EXIT_FAILURES if num_failed else EXIT_OK


def build_prompt(question: str, text: str) -> list[Message]:
    """Return the conversation that asks about one text."""
    return [
        {"role": "system", "content": "Answer with one word, Yes or No."},
        {"role": "user", "content": f"{text}\n\n{question} Answer Yes or No."},
    ]


def read_result(item: Item, future: Future[Completion]) -> dict[str, Any]:
    """Return an item's result, or its error, as JSON.

    Raises:
        FabricError: One that every other item would end with, too.
    """
    try:
        answer = future.result()
    except (AuthError, UnknownModel, InsufficientBalance, HubUnreachable):
        raise
    except FabricError as error:
        return {"id": item.id, "error": {"code": error.code, "message": error.message}}
    return {
        "id": item.id,
        "yes": read_yes(answer),
        "answer": answer.text,
        "text": item.text,
        "model": answer.model,
        "digest": answer.digest,
        "site": answer.site,
        "run": answer.run_id,
        "charge_usu": answer.charge_usu,
    }


def read_yes(answer: Completion) -> float | None:
    """Return the probability of yes among yes and no; ``None`` if neither was likely."""
    content = (answer.choices[0].logprobs or {}).get("content") or [{}]
    weights = {"yes": 0.0, "no": 0.0}
    for alternative in content[0].get("top_logprobs", ()):
        word = alternative["token"].strip().lower()
        if word in weights:
            weights[word] += math.exp(alternative["logprob"])
    total = sum(weights.values())
    return round(weights["yes"] / total, 4) if total else None


def describe(result: dict[str, Any]) -> str:
    """Return a line of progress."""
    if "error" in result:
        return f"{result['id']}: {result['error']['message']}"
    sure = "unclear" if result["yes"] is None else f"yes {result['yes']:.0%}"
    return f"{result['id']}: {sure}, at {result['site']} for {result['charge_usu']} micro-SU"


def demo_items() -> list[Item]:
    """Return the texts of the demonstration."""
    return [to_item(text) for text in DEMO]


def read_items(path: Path) -> Iterator[Item]:
    """Yield the texts of a file: a line each, or JSON lines with ``text`` and maybe ``id``.

    Raises:
        ValueError: A line of JSON has no text, or an id comes twice.
    """
    seen = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        item = to_item(line)
        if line.startswith("{"):
            try:
                record = json.loads(line)
                item = Item(
                    id=str(record.get("id", to_item(record["text"]).id)), text=record["text"]
                )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: no JSON object with a text") from error
        if item.id not in seen:
            seen.add(item.id)
            yield item


def to_item(text: str) -> Item:
    """Return a text as an item named after its content."""
    return Item(id=hashlib.sha256(text.encode()).hexdigest()[:12], text=text)


def read_done(path: Path) -> set[str]:
    """Return the ids of the results in an output file; errors and a torn last line do not count."""
    done = set()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError):
            result = json.loads(line)
            if "error" not in result:
                done.add(str(result["id"]))
    return done


def open_output(path: Path) -> TextIO:
    """Open an output file for appending, after whole lines only."""
    file = path.open("a+b")
    with closing(file):
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return path.open("a", encoding="utf-8")


def get_config(executor: str, workers: int, run_dir: str) -> Config:
    """Return the Parsl configuration: threads of this process, or workers of their own.

    No retries: the broker has the one retry layer.
    """
    from parsl.config import Config
    from parsl.executors import HighThroughputExecutor, ThreadPoolExecutor
    from parsl.providers import LocalProvider

    if executor == "threads":
        chosen = ThreadPoolExecutor(label="screen", max_threads=workers)
    else:
        # Parsl's programs are beside this Python, which need not be on the PATH.
        programs = Path(sys.executable).parent
        chosen = HighThroughputExecutor(
            label="screen",
            address="127.0.0.1",
            loopback_address="127.0.0.1",
            max_workers_per_node=workers,
            cores_per_worker=0.1,
            interchange_launch_cmd=[str(programs / "interchange.py")],
            provider=LocalProvider(worker_init=f"export PATH={programs}:$PATH"),
        )
    return Config(executors=[chosen], run_dir=run_dir, initialize_logging=False)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fabric.workflows.screen",
        description="Ask a yes-or-no question about many texts, through the fabric.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, metavar="FILE", help="a text a line, or JSON lines")
    source.add_argument("--demo", action="store_true", help="screen six texts that are built in")
    parser.add_argument("--question", default=QUESTION, help="default: %(default)s")
    parser.add_argument("--model", metavar="NAME", help="the model to ask")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="keep results here; what it has is not asked"
    )
    parser.add_argument("--workers", type=int, default=4, help="requests at once (%(default)s)")
    parser.add_argument(
        "--parsl-executor", choices=["threads", "htex"], default="threads", help="(%(default)s)"
    )
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error("--workers must be at least 1")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
