"""The command line: options and their help. What a command does is imported when it runs.

Nothing here may import tvm, torch or transformers: ``llmc --help`` must answer at once, and ``llmc doctor``
must work where they are broken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmc import __version__
from llmc.cli.guard import guard

_LEVEL_HELP = "Of several levels of processor features, the one to run (default: the best that runs here)."
app = typer.Typer(
    name="llmc",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Ahead-of-time compiler for large language models: checkpoint in, verified artifact out.",
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"llmc {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Options before the command's name."""


@app.command()
def compile(
    model: Annotated[
        str | None,
        typer.Argument(help="Hugging Face folder or hub id, .gguf or .pt2 file (not with --spec)."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the artifact (needed unless --stop-after)."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="cpu (this machine, the default), or presets such as cpu/x86-64-v3,x86-64-v4-bf16 (an artifact with a "
            "level for each; cpu/x86-64: all of x86) or cuda/sm_80,sm_90."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="f32, bf16 or f16 (default: the checkpoint's).")] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="Of the KV cache: f32, bf16, f16, int8 or fp8 (default: --dtype).")
    ] = None,
    page_size: Annotated[int | None, typer.Option(help="Tokens per KV-cache page (default: 32).")] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="Longest sequence (default: the model's).")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Most sequences in one step (default: 16).")] = None,
    max_step_tokens: Annotated[
        int | None, typer.Option(help="Most tokens in one step (default: 512); longer prompts are cut.")
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(help="off, sample (default) or full: how much to check against the source model."),
    ] = None,
    calib: Annotated[
        str | None, typer.Option(help="UTF-8 text for a --quant-method that looks at activations.")
    ] = None,
    eval: Annotated[
        str | None, typer.Option(help="UTF-8 text on which to compare the artifact with the source model.")
    ] = None,
    eval_tokens: Annotated[int | None, typer.Option(help="Use so many tokens of it (default: 8192).")] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Fail if the mean KL divergence on --eval is larger (nats).")
    ] = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option(help="Fail if the perplexity on --eval grows by more, e.g. 1%.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw size against perplexity of --quant auto there (.png, .svg).")
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            help="Scheme of the weights, e.g. q8, q4g32, nf4, fp8, w8a8, w4a8, fp8a8; auto, auto-a8: see --max-ppl-increase."
        ),
    ] = None,
    quant_method: Annotated[
        str | None,
        typer.Option(
            help="rtn, gptq, awq, awq+gptq, smooth, smooth+gptq, rotate or rotate+gptq; all but rtn need --calib."
        ),
    ] = None,
    quant_head: Annotated[
        str | None,
        typer.Option(help="Of the output projection (default: q8 if --quant has 4 bits or fewer)."),
    ] = None,
    quant_embedding: Annotated[
        str | None, typer.Option(help="Of an embedding that is not tied to the head (default: none).")
    ] = None,
    prune: Annotated[
        str | None,
        typer.Option(
            help="Set weights to zero: wanda:2:4, sparsegpt:0.5, magnitude:0.3 (needs --calib but for magnitude). They "
            "stay dense: neither smaller nor faster on targets without sparse units."
        ),
    ] = None,
    svd: Annotated[
        str | None,
        typer.Option(
            help="Factor linear layers into two of low rank: a rank, or the share of weights that is kept. Needs --calib."
        ),
    ] = None,
    spec: Annotated[
        Path | None, typer.Option(help="TOML file with the spec; options given here win.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
    meta_weights: Annotated[
        bool,
        typer.Option("--meta-weights", help="Compile the graph only, for sizing: config.json is enough."),
    ] = False,
    disable_pass: Annotated[
        list[str] | None, typer.Option(help="Leave out this graph pass (a fusion); may be given often.")
    ] = None,
    tune: Annotated[
        str | None, typer.Option(help="Tune the kernels for so long before building them, e.g. 10m.")
    ] = None,
    records: Annotated[
        Path | None, typer.Option(help="Tuning records to choose schedules by (llmc tune writes them).")
    ] = None,
    dump_ir: Annotated[Path | None, typer.Option(help="Write NNN_stage_Pass.py files there.")] = None,
    time_passes: Annotated[
        bool, typer.Option("--time-passes", help="Print what each stage and pass took.")
    ] = False,
    stop_after: Annotated[
        str | None, typer.Option(help="capture, lower, build, ...: stop there and write no artifact.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Compile MODEL into an artifact folder."""
    with guard():
        from llmc.cli.compile import run_compile

        run_compile(
            {
                "model": model,
                "target": target,
                "dtype": dtype,
                "kv_dtype": kv_dtype,
                "page_size": page_size,
                "max_seq_len": max_seq_len,
                "max_batch": max_batch,
                "max_step_tokens": max_step_tokens,
                "verify": verify,
                "quant": quant,
                "quant_method": quant_method,
                "quant_head": quant_head,
                "quant_embedding": quant_embedding,
                "prune": prune,
                "svd": svd,
                "revision": revision,
                "meta_weights": meta_weights or None,
                "calib_text": calib,
                "eval_text": eval,
                "eval_tokens": eval_tokens,
                "max_kl": max_kl,
                "max_ppl_increase": max_ppl_increase,
                "disable_passes": disable_pass or None,
                "tune": tune,
                "records": str(records) if records else None,
            },
            spec_file=spec,
            output=output,
            dump_ir=dump_ir,
            time_passes=time_passes,
            stop_after=stop_after,
            plot=plot,
            quiet=quiet,
        )


@app.command()
def run(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    prompt: Annotated[str, typer.Argument(help="Text; - reads it from stdin.")],
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="0 = always the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest of this probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens below this share of the likeliest's.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be given often.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt with the model's chat template.")
    ] = False,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="The prompt is token ids, and so is the output.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Worker threads (default: all cores).")] = None,
    kv_pages: Annotated[
        int | None, typer.Option(help="KV-cache pages (default: as many as --max-memory allows).")
    ] = None,
    max_memory: Annotated[str | None, typer.Option(help="Memory for weights and KV cache, e.g. 2GB.")] = None,
    level: Annotated[str | None, typer.Option(help=_LEVEL_HELP)] = None,
) -> None:
    """Generate text from an artifact, streaming it to stdout.

    Sampling options that are not given come from the checkpoint's generation_config.json, else greedy.
    """
    with guard():
        from llmc.cli.run import run_generate

        run_generate(
            artifact,
            prompt,
            chat=chat,
            token_ids=token_ids,
            threads=threads,
            kv_pages=kv_pages,
            max_memory=max_memory,
            level=level,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
        )


@app.command("eval")
def evaluate(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text file.")],
    against: Annotated[
        str | None, typer.Option(help="Source model (float32, by torch) or another artifact to compare with.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Use so many tokens of the text; 0 = all.")] = 8192,
    window: Annotated[int | None, typer.Option(help="Tokens that are run together (default: 512).")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next (default: no overlap).")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also the error of each layer (compiles the graph once more).")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    threads: Annotated[int | None, typer.Option(help="Worker threads (default: all cores).")] = None,
) -> None:
    """Evaluate an artifact on a text: perplexity, and its distance from another model."""
    with guard():
        from llmc.cli.eval import run_eval

        run_eval(
            artifact,
            text,
            against=against,
            max_tokens=max_tokens,
            window=window,
            stride=stride,
            layers=layers,
            as_json=json,
            threads=threads,
        )


@app.command()
def bench(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    prompt: Annotated[int | None, typer.Option(help="Tokens of the prompt (default: up to 512).")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to generate per round.")] = 64,
    rounds: Annotated[int, typer.Option(help="How often.")] = 5,
    batch: Annotated[int, typer.Option(help="Sequences side by side.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Worker threads (default: all cores).")] = None,
    roofline: Annotated[
        bool,
        typer.Option("--roofline", help="Also each kernel's time, beside what this machine can do at most."),
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Also write all figures there.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the roofline there (.png, .svg); implies --roofline.")
    ] = None,
    level: Annotated[str | None, typer.Option(help=_LEVEL_HELP)] = None,
) -> None:
    """Measure how fast an artifact reads prompts and generates tokens on this machine."""
    with guard():
        from llmc.cli.bench import run_bench

        run_bench(
            artifact,
            prompt=prompt,
            tokens=tokens,
            rounds=rounds,
            batch=batch,
            threads=threads,
            roofline=roofline,
            json_file=json,
            plot=plot,
            level=level,
        )


@app.command()
def tune(
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face folder or hub id, or an artifact.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Time to spend, e.g. 10m or 90s.")] = None,
    target: Annotated[str | None, typer.Option(help="cpu, or a preset such as cpu/x86-64-v4.")] = None,
    records: Annotated[
        Path | None, typer.Option(help="Database to read and write (default: in the cache folder).")
    ] = None,
    list_records: Annotated[bool, typer.Option("--list", help="List what the database knows.")] = False,
    merge: Annotated[
        list[Path] | None, typer.Option(help="Add this file's records to the database; may be given often.")
    ] = None,
    export_candidates: Annotated[
        Path | None,
        typer.Option(help="Build candidates into this file instead, for a machine that --measure runs on."),
    ] = None,
    candidates: Annotated[
        int, typer.Option(help="With --export-candidates: so many per task and number of rows.")
    ] = 32,
    measure: Annotated[
        Path | None, typer.Option(help="Measure the candidates of this file here; needs no model.")
    ] = None,
    rpc: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of the machine that measures; python -m llmc.tune.rpc_server runs there."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="f32, bf16 or f16 (default: the checkpoint's).")] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="Of the KV cache: f32, bf16, f16, int8 or fp8 (default: --dtype).")
    ] = None,
    quant: Annotated[str | None, typer.Option(help="Scheme of the weights, as for llmc compile.")] = None,
    quant_head: Annotated[str | None, typer.Option(help="Of the output projection.")] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="Longest sequence (default: the model's).")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Most sequences in one step.")] = None,
    max_step_tokens: Annotated[int | None, typer.Option(help="Most tokens in one step.")] = None,
    spec: Annotated[
        Path | None, typer.Option(help="TOML file with the spec; options given here win.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the conclusions only.")] = False,
) -> None:
    """Find fast schedules for the kernels of MODEL on this machine, or list and merge tuning records.

    --export-candidates and --measure do it in two steps: build here, measure where the device is; --rpc in one.
    Ctrl-C keeps what was found; a later run goes on from there.
    """
    with guard():
        from llmc.cli.tune import TuneAction, run_tune

        run_tune(
            model,
            {
                "target": target,
                "dtype": dtype,
                "kv_dtype": kv_dtype,
                "quant": quant,
                "quant_head": quant_head,
                "max_seq_len": max_seq_len,
                "max_batch": max_batch,
                "max_step_tokens": max_step_tokens,
            },
            TuneAction(list_records, merge or (), export_candidates, candidates, measure, rpc),
            budget=budget,
            spec_file=spec,
            records=records,
            quiet=quiet,
        )


@app.command()
def inspect(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder, or its model.so.")],
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
    params: Annotated[bool, typer.Option("--params", help="List every parameter.")] = False,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels", help="List the kernels: bytes, operations; of a GPU also registers, spills."
        ),
    ] = False,
    context: Annotated[
        int | None, typer.Option(help="With --kernels: tokens per sequence (default: up to 1024).")
    ] = None,
) -> None:
    """Show what an artifact is: target, functions, KV plan, parameters, sizes, quality, versions."""
    with guard():
        from llmc.cli.inspect import run_inspect

        run_inspect(artifact, as_json=json, all_params=params, kernels=kernels, context=context)


debug = typer.Typer(no_args_is_help=True, help="Tools that look inside a compile.")
app.add_typer(debug, name="debug")


@debug.command()
def simulate(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub id; a tiny model.")],
    target: Annotated[
        str, typer.Option(help="Of a machine with blocks and threads, e.g. cuda/sm_90.")
    ] = "cuda/sm_90",
    dtype: Annotated[str | None, typer.Option(help="f32, bf16 or f16 (default: the checkpoint's).")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the sequence, random.")] = 20,
    decode: Annotated[int, typer.Option(help="So many of them, the last ones, through `decode`.")] = 3,
    races: Annotated[bool, typer.Option(help="Look for races in memory.")] = True,
    seed: Annotated[int, typer.Option(help="Of the tokens.")] = 0,
) -> None:
    """Run MODEL's step functions on a simulated GPU: numbers against torch, races, bounds and barriers."""
    with guard():
        from llmc.cli.debug import run_simulate

        run_simulate(model, target=target, dtype=dtype, tokens=tokens, decode=decode, races=races, seed=seed)


@app.command()
def doctor() -> None:
    """Show this environment: versions, CPU, memory, compiler driver, and the targets that work here."""
    with guard():
        from llmc.cli.doctor import run_doctor

        run_doctor()
