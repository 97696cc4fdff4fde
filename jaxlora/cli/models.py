"""Commands on models and adapters: generate, chat, classify, merge, export, verify, inspect."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jaxlora.cli.command import add_command
from jaxlora.core.errors import UserError

_FORMATS = ("int4", "nf4", "int8")
_EXAMPLES = {
    "generate": """examples:
  jaxlora generate outputs/quickstart "Facts as YAML: Omar hid two hats on the bridge."
  jaxlora generate mistralai/Mistral-7B-v0.3 --raw --max_new_tokens 64 "Once upon a time"
An adapter that a jaxlora run made is put on the base as that run stored it.
""",
    "chat": """examples:
  jaxlora chat outputs/quickstart
  jaxlora chat meta-llama/Llama-3.2-1B-Instruct --temperature 0.7 --system "Be brief."
""",
    "classify": """examples:
  jaxlora classify outputs/classification "Leo hid two hats in the forest."
  jaxlora classify outputs/classification < texts.txt
Prints the label of each text and how likely it is.
""",
    "merge": """examples:
  jaxlora merge outputs/quickstart --output merged
  jaxlora merge outputs/quickstart --output merged --quantization trained
  jaxlora merge outputs/mine --output mine.gguf --gguf Q8_0
A QLoRA adapter was trained on a quantized base. It is added to the base as it is on disk, as PEFT
and Axolotl do; --quantization trained (or a format) adds it to the base as training saw it,
quantized and back, so that the merged model answers as the run's own. The logit difference that
either makes is printed.
""",
    "export": """examples:
  jaxlora export outputs/quickstart/checkpoints/checkpoint-79 --output early-adapter
  jaxlora export my-mlx-adapter --base meta-llama/Llama-3.2-1B --output peft-adapter
""",
    "verify": """examples:
  jaxlora verify outputs/quickstart
Exit status 0: every tensor loads and the logits agree; 1: they do not.
""",
    "inspect": """examples:
  jaxlora inspect jaxlora/assets/tiny-llama
  jaxlora inspect outputs/quickstart/checkpoints/checkpoint-316
""",
}


def add_commands(commands: Any) -> None:
    """Adds the commands of this module."""

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        return add_command(commands, name, run, text, examples=_EXAMPLES[name])

    for name, run, text in (
        ("generate", _generate, "Answer prompts."),
        ("chat", _chat, "Talk with a model."),
    ):
        _add_sampling(_add_model(add(name, run, text)), prompts=name == "generate")
    classify = _add_model(add("classify", _classify, "Name the labels of texts."))
    classify.add_argument("texts", nargs="*", help="texts; none: one a line from stdin")
    _add_merge(add("merge", _merge, "Write base + adapter as one model folder."))
    export = add(
        "export", _export, "Write a PEFT adapter of a checkpoint, or of another's adapter."
    )
    export.add_argument("source", help="run, checkpoint, or adapter of PEFT, mlx-lm or torchtune")
    export.add_argument("--base", help="base model of such an adapter; default: the one it names")
    export.add_argument("--output", required=True, help="new folder")
    verify = add("verify", _verify, "Compare an adapter's logits with PEFT's (needs torch, peft).")
    _add_model(verify, formats=())
    add("inspect", _inspect, "Show sizes, targets and contents of a folder.").add_argument(
        "path", help="model, adapter, output folder, checkpoint, or hub id"
    )


def _add_model(
    command: argparse.ArgumentParser, *, formats: Sequence[str] = _FORMATS
) -> argparse.ArgumentParser:
    command.add_argument("model", help="folder or hub id of a model, or of an adapter")
    command.add_argument("--adapter", help="folder or hub id of an adapter to put on top")
    command.add_argument("--revision", help="branch, tag or commit of a hub model")
    if formats:
        command.add_argument(
            "--quantization", choices=formats, help="store the base in 4 or 8 bits"
        )
    return command


def _add_merge(command: argparse.ArgumentParser) -> None:
    _add_model(command, formats=("trained", *_FORMATS))
    command.add_argument("--output", required=True, help="new folder, or new .gguf file")
    command.add_argument(
        "--gguf", choices=("F16", "Q8_0"), help="write one GGUF file (also of a model alone)"
    )
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: the base's"
    )
    command.add_argument(
        "--no_compare", action="store_true", help="do not measure what merging changes"
    )


def _add_sampling(command: argparse.ArgumentParser, *, prompts: bool) -> None:
    if prompts:
        command.add_argument("prompts", nargs="*", help="messages; none: one a line from stdin")
        command.add_argument("--raw", action="store_true", help="no chat template")
    else:
        command.add_argument("--system", help="system message")
    command.add_argument(
        "--max_new_tokens", type=int, default=256, metavar="N", help="longest answer (default 256)"
    )
    command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    command.add_argument("--top_k", type=int, default=0, help="0 is off (default)")
    command.add_argument("--top_p", type=float, default=1.0, help="1 is off (default)")
    command.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")


def _quantization(options: argparse.Namespace) -> Any:
    from jaxlora.checkpoints.load import QuantSpec

    return QuantSpec(options.quantization) if options.quantization else None


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    from jaxlora import api

    sampling = api.SamplingOptions(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    )
    model = api.load(
        options.model,
        options.adapter,
        revision=options.revision,
        quantization=_quantization(options),
    )
    return model, sampling


def _given(texts: list[str], what: str) -> list[str]:
    if not texts and not sys.stdin.isatty():
        texts = [line.rstrip("\n") for line in sys.stdin]
    if not texts:
        raise UserError(f"no {what} given; write it in quotes, or one a line to stdin.")
    return texts


def _generate(options: argparse.Namespace) -> None:
    prompts = _given(options.prompts, "prompt")
    model, sampling = _load(options)
    for answer in model.generate(prompts, sampling, raw=options.raw):
        print(answer)


def _chat(options: argparse.Namespace) -> None:
    model, sampling = _load(options)

    def write(text: str) -> None:
        print(text, end="", flush=True)

    model.chat(sampling, input, write, system=options.system)


def _classify(options: argparse.Namespace) -> None:
    from jaxlora.generation.classifier import load_classifier

    texts = _given(options.texts, "text")
    model = load_classifier(
        options.model,
        options.adapter,
        revision=options.revision,
        quantization=_quantization(options),
    )
    for answer in model.classify(texts):
        print(f"{answer.label}\t{answer.probabilities[answer.label]:.4f}")


def _merge(options: argparse.Namespace) -> None:
    from jaxlora import api

    trained = options.quantization == "trained"
    shared = {
        "revision": options.revision,
        "quantization": "trained" if trained else _quantization(options),
        "dtype": options.dtype,
    }
    written = api.merge(options.model, options.adapter, options.output, gguf=options.gguf, **shared)
    print(f"merged model: {written}")
    if options.no_compare:
        return
    measured = api.merge_differences(options.model, options.adapter, **shared)
    if measured is not None:
        print(measured.table(simulated=options.quantization is not None))


def _export(options: argparse.Namespace) -> None:
    from jaxlora import api

    step = api.export(options.source, options.output, base=options.base)
    print(f"{'adapter' if step is None else f'step {step}'} exported: {options.output}")


def _verify(options: argparse.Namespace) -> int:
    from jaxlora import api

    verdict = api.verify(options.model, options.adapter, revision=options.revision)
    for name, keys in (("missing", verdict.missing), ("extra", verdict.extra)):
        if keys:
            print(f"{name} tensors for PEFT: {', '.join(keys)}")
    print(
        f"largest logit difference to PEFT {verdict.max_difference:.2e} (logits vary by "
        f"{verdict.logit_std:.2f}; the adapter changes them by up to {verdict.adapter_effect:.2f})"
    )
    print("verified" if verdict.ok else "NOT verified")
    return 0 if verdict.ok else 1


def _inspect(options: argparse.Namespace) -> None:
    from jaxlora import api
    from jaxlora.config.report import table

    print(table(api.inspect(options.path)))
