"""``pdspec plan``: predictions for hardware that need not be here, and for traces on simulated workers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pdspec.cli.options import Json
from pdspec.cli.output import only_json, print_json, size


def plan(
    context: typer.Context,
    case: Annotated[str, typer.Option(help="A worked example instead of the flags, e.g. a100-llama2-13b.")] = "",
    hardware: Annotated[str, typer.Option(help="A device of the table, e.g. h100-80gb.")] = "a100-80gb",
    model: Annotated[str, typer.Option(help="A known decoder, a model that is here, or a folder.")] = "llama-3.1-8b",
    drafter: Annotated[str, typer.Option(help="A family, or a decoder that drafts (default: the best).")] = "",
    alpha: Annotated[float, typer.Option(help="Acceptance of a draft (0: the family's typical).")] = 0.0,
    k: Annotated[int, typer.Option(min=0, help="Drafts of a step (0: the best).")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once on a decode worker.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    output: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 512,
    dtype: Annotated[str, typer.Option(help="Of weights: bfloat16, float16, float32, float8 or int4.")] = "bfloat16",
    kv_dtype: Annotated[str, typer.Option(help="Of KV rows: the same.")] = "bfloat16",
    devices: Annotated[int, typer.Option(min=1, help="That a worker is split over.")] = 1,
    json: Json = False,
) -> None:
    """Speed-up, memory, K and tree, P:D and who prefills the drafter, from shapes and a hardware table."""
    if context.invoked_subcommand:
        return
    with only_json(json):
        from pdspec.study.plan import report
        from pdspec.study.plan.shapes import BYTES

        question = report.case(case) if case else report.Question(
            hardware=hardware, model=model, drafter=drafter, alpha=alpha, drafts=k,
            dtype=_known(dtype, BYTES, "--dtype"), kv_dtype=_known(kv_dtype, BYTES, "--kv-dtype"), devices=devices,
            load=report.Load(batch=batch, prompt=prompt, output=output),
        )  # fmt: skip
        result = report.answer(question)
    if json:
        print_json(result)
        return
    for line in lines(result):
        print(line)


def lines(result: dict[str, Any]) -> list[str]:
    """What people read."""
    memory, moved, best = result["memory"], result["transfer"], result["recommended"]
    closed = f"E = {result['expected_tokens']:.2f}, T_draft {result['draft_ms']:.2f} ms, T_target "
    closed += f"{result['target_ms']:.1f} ms: {result['ms_per_token']:.2f} ms per token against "
    closed += f"{result['baseline_ms_per_token']:.1f}, {result['speedup']:.2f}x"
    rows = [
        f"{result['model']} on {result['devices']} x {result['hardware_name']}, drafter {result['drafter']}, "
        f"alpha {result['alpha']:.2f}, K = {result['k']}",
        f"closed form: {closed}",
    ]
    for name in ("chain", "tree"):
        one = result["roofline"][name]
        rows.append(
            f"roofline, {one['tree'] or 'no drafts'}: {one['ms_per_token']:.2f} ms per token, {one['speedup']:.2f}x"
        )
    rows.append(
        f"memory: target {size(memory['target_bytes'])}, drafter {size(memory['draft_bytes'])} "
        f"({memory['draft_share']:.2%}), room for {memory['kv_tokens_with_draft']:.0f} tokens of KV at "
        f"{size(memory['kv_bytes_per_token'])} + {size(memory['draft_kv_bytes_per_token'])}"
    )
    for row in result["batches"]:
        fits = "" if row["fits"] else " (KV does not fit)"
        plan_ = row["tree"] or "no drafts"
        rows.append(f"batch {row['batch']}: {plan_}, {row['speedup']:.2f}x, {row['tokens_per_second']:.0f}/s{fits}")
    for row in result["contexts"]:
        rows.append(f"prompts of {row['prompt']}: {row['tree'] or 'no drafts'}, {row['speedup']:.2f}x")
    rows.append(
        f"handoff: {size(moved['kv_bytes'])} + {size(moved['draft_kv_bytes'])} in {1e3 * moved['seconds']:.1f} ms, "
        f"{1e3 * moved['exposed_seconds']:.1f} ms of it exposed"
    )
    rows.append(
        f"colocated instead: {result['colocated']['slowdown']:.2f}x the time per token, gaps up to "
        f"{result['colocated']['worst_gap_ratio']:.1f}x"
    )
    rows.append(
        f"recommended: {best['drafter']} {best['tree']}, P:D {best['pd']} ({best['pd_without_drafts']} without drafts),"
        f" draft_prefill {best['draft_prefill']}"
    )
    return rows


def _known(name: str, table: dict[str, Any], field: str) -> str:
    from pdspec.settings import unknown_name

    if name not in table:
        raise unknown_name("type", name, tuple(table), field=field, where="the table")
    return name
