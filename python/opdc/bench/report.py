"""What is shown of a result: tables for the terminal and for a README, and a plot.

Everything here reads the result as it stands in the JSON file, so old results can be shown too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .contenders import FUNCTIONS, TOP
from .contenders import PACKAGES as LOGITS_PACKAGES
from .hidden import PACKAGES

NAMES = {
    "eager": "eager",
    "compile": "torch.compile",
    "liger": "Liger",
    "flashinfer": "FlashInfer",
    "opdc": "opdc",
    "opdc_inplace": "opdc in place",
}
SHORT = {**NAMES, "compile": "compile"}  # for the headings of wide tables
GENERATED = {
    "plain": "the student alone",
    "student": "`BlendSampler`, ε = 0",
    "blend": "`BlendSampler`",
    "speculative": "`BlendSampler`, drafts",
}
COLOURS = {
    "eager": "#c9c9c9",
    "compile": "#8d99ae",
    "liger": "#e0b45c",
    "flashinfer": "#9bb87a",
    "opdc": "#7fb8e6",
    "opdc_inplace": "#1f6fb4",
}
FROM_HIDDEN = {
    "logits": "opdc on logits",
    "trl": "TRL",
    "liger": NAMES["liger"],
    "eager": NAMES["eager"],
    "compile": NAMES["compile"],
}
MISSING = "–"

Case = dict[str, Any]


def title(case: Case) -> str:
    return FUNCTIONS[case["function"]].title


def median(case: Case, contender: str) -> float | None:
    found = case["microseconds"].get(contender)
    return None if found is None else float(found["median"])


def best(case: Case) -> str:
    """The contender to compare with others: opdc in place where there is such a call."""
    return "opdc_inplace" if "opdc_inplace" in case["microseconds"] else "opdc"


def ratio(case: Case, over: str) -> float | None:
    """How many times faster opdc is."""
    slow, fast = median(case, over), median(case, best(case))
    return None if slow is None or fast is None else slow / fast


def page_cost(case: Case) -> float | None:
    """What a fresh gradient costs over one in place, in units of torch's empty().fill_() of it."""
    fresh, inplace = median(case, "opdc"), median(case, "opdc_inplace")
    return None if fresh is None or inplace is None else (fresh - inplace) / case["fill"]


def number(value: float | None, digits: int = 3) -> str:
    """A few significant digits, thousands grouped: 0.041, 3.42, 51.3, 1,408."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - int(f"{abs(value):e}".split("e")[1]))
    return f"{value:,.{decimals}f}"


def times(value: float | None) -> str:
    return MISSING if value is None else f"{number(value, 2)}×"


def mebibytes(value: float | None) -> str:
    return MISSING if value is None else f"{value / 2**20:,.1f}"


def seen(cases: Iterable[Case], field: str) -> list[Any]:
    """The values of a field, in the order of their first appearance."""
    return list(dict.fromkeys(case[field] for case in cases))


def contenders(result: dict[str, Any]) -> list[str]:
    present = {name for case in result["cases"] for name in case["microseconds"]}
    return [name for name in NAMES if name in present]


def select(result: dict[str, Any], **fields: Any) -> list[Case]:
    return [
        case
        for case in result["cases"]
        if all(case[field] == value for field, value in fields.items())
    ]


def principal(result: dict[str, Any]) -> list[Case]:
    """The cases of which there is most to tell: the fewest rows and all threads."""
    cases = result["cases"]
    rows, threads = min(seen(cases, "rows")), max(seen(cases, "threads"))
    return select(result, rows=rows, threads=threads)


def on_gpu(result: dict[str, Any]) -> bool:
    return bool(result.get("device", {}).get("type") == "cuda")


def workers(result: dict[str, Any], record: dict[str, Any]) -> str:
    """Who did what a record is of."""
    return "on the GPU" if on_gpu(result) else plural(record["threads"], "thread")


def share(case: Case, contender: str) -> float | None:
    """Of the bandwidth of a copy: what moving the matrices alone would take of what is taken."""
    found = median(case, contender)
    return None if found is None else case["least"] * case["stream"] / found


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")


# ---- the terminal ----------------------------------------------------------------------------


def _table(heading: str, caption: str, columns: Iterable[str]) -> Table:
    table = Table(title=heading, caption=caption, title_justify="left", caption_justify="left")
    table.title_style, table.caption_style = "bold", "dim"
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    return table


def _with_spread(case: Case, contender: str) -> str:
    found = case["microseconds"].get(contender)
    if found is None:
        return MISSING
    if found["repeats"] == 1:
        return f"{number(found['median'])} [dim](once)[/dim]"
    spread = (found["high"] - found["low"]) / 2 / found["median"]
    return f"{number(found['median'])} [dim]±{spread:.0%}[/dim]"


def time_table(result: dict[str, Any], cases: list[Case]) -> Table:
    names = contenders(result)
    stream = statistics.median(case["stream"] for case in cases)
    fill = statistics.median(case["fill"] for case in cases)
    first = cases[0]
    table = _table(
        f"{first['dtype']}, {first['rows']:,} × {result['vocabulary']:,} logits, "
        f"{plural(first['threads'], 'thread')}: microseconds a row for loss and gradient, or a "
        "sample",
        f"Medians, ± half the range. One stream, half a copy of a float32 row: {number(stream)} µs."
        f" empty().fill_() of the gradient: {number(fill)} µs a row.",
        ["function"]
        + [SHORT[name] for name in names]
        + ["streams", "in place", "least"]
        + [f"× {SHORT[name]}" for name in names if name in ("eager", "compile")]
        + ["pages"],
    )
    for case in cases:
        streams = case["streams"]
        table.add_row(
            title(case),
            *(_with_spread(case, name) for name in names),
            number(streams.get("opdc"), 2),
            f"[bold]{number(streams.get('opdc_inplace'), 2)}[/bold]",
            number(case["least"], 2),
            *(times(ratio(case, name)) for name in names if name in ("eager", "compile")),
            number(page_cost(case), 2),
        )
    return table


def gpu_rows(result: dict[str, Any], cases: list[Case]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: milliseconds of the whole, how they compare, and the memory."""
    names = contenders(result)

    def milliseconds(case: Case, name: str) -> float | None:
        found = median(case, name)
        return None if found is None else found * case["rows"] / 1e3

    def cells(case: Case) -> list[str]:
        mine = milliseconds(case, best(case))
        found = {name: milliseconds(case, name) for name in names}
        return [
            title(case),
            case["dtype"],
            *(
                number(value) if name.startswith("opdc") else _with_ratio(value, mine)
                for name, value in found.items()
            ),
            *(
                MISSING if part is None else f"{part:.0%}"
                for part in (share(case, name) for name in names if name.startswith("opdc"))
            ),
            _memory(case),
        ]

    mine = [name for name in names if name.startswith("opdc")]
    headings = [
        "loss + gradient, or a sample",
        "dtype",
        *(_in_readme(name) for name in names),
        *(f"share, {_in_readme(name)}" for name in mine),
        "extra memory, MiB",
    ]
    return headings, [cells(case) for case in cases]


def gpu_remarks(result: dict[str, Any], cases: list[Case]) -> list[str]:
    first = cases[0]
    stream = statistics.median(case["stream"] for case in cases)
    present = [name for name in contenders(result) if name in LOGITS_PACKAGES]
    versions = "".join(
        f", {NAMES[name]} {result['packages'][LOGITS_PACKAGES[name]]}" for name in present
    )
    remarks = [
        f"Milliseconds, medians; {first['rows']:,} × {result['vocabulary']:,} logits, "
        f"{device(result)}, opdc {result['machine']['opdc']}, torch "
        f"{result['machine']['torch']}{versions}. In brackets: how many times as long as opdc, in "
        "place where it can be.",
        "*Share*: of the bandwidth of a copy of one matrix onto another in the same run, "
        f"{number(4 * result['vocabulary'] / stream / 1e3)} GB/s read and written; every matrix "
        "counts as read or written once.",
        "Extra memory: the peak of PyTorch's allocator in a call, beyond what is there before it: "
        "eager → opdc → in place.",
    ]
    if "flashinfer" in present:
        remarks.append("FlashInfer gives tokens alone, the others their log-probs too.")
    return [*remarks, *result["notes"]]


def first_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: milliseconds of a first call that compiles, and of one that need not."""
    rows = [
        [title(found), *(number(1e3 * found[call]) for call in ("compiled", "cached", "next"))]
        for found in result["first_calls"]
    ]
    return ["first call of a process, ms", "nothing compiled", "from the disk", "the next"], rows


def _in_readme(name: str) -> str:
    return NAMES[name].replace("opdc in place", "opdc, `inplace`")


def gpu_table(result: dict[str, Any], cases: list[Case]) -> Table:
    headings, rows = gpu_rows(result, cases)
    table = _table(
        "On the GPU",
        "\n".join(gpu_remarks(result, cases)).replace("*", ""),
        [heading.replace("`", "") for heading in headings],
    )
    for row in rows:
        table.add_row(*row)
    return table


def first_table(result: dict[str, Any]) -> Table:
    headings, rows = first_rows(result)
    table = _table("First calls", f"{seen(result['first_calls'], 'dtype')[0]} logits", headings)
    for row in rows:
        table.add_row(*row)
    return table


def thread_table(result: dict[str, Any]) -> Table | None:
    """How much faster the most threads are than one."""
    counts = seen(result["cases"], "threads")
    many = max(counts)
    if 1 not in counts or many == 1:
        return None
    sizes = seen(({"size": (c["rows"], c["dtype"])} for c in result["cases"]), "size")
    table = _table(
        f"{many} threads over 1: how many times faster (opdc, in place where it can be)",
        "",
        ["function", *(f"{dtype}, {rows:,} rows" for rows, dtype in sizes)],
    )
    for function in seen(result["cases"], "function"):
        cells = []
        for rows, dtype in sizes:
            pair = [
                select(result, function=function, rows=rows, dtype=dtype, threads=threads)
                for threads in (1, many)
            ]
            values = [median(case[0], best(case[0])) if case else None for case in pair]
            one, all_ = values
            cells.append(times(None if one is None or all_ is None else one / all_))
        table.add_row(FUNCTIONS[function].title, *cells)
    return table


def memory_table(result: dict[str, Any], cases: list[Case]) -> Table:
    names = contenders(result)
    first = cases[0]
    table = _table(
        f"{first['dtype']}, {first['rows']:,} rows: extra memory, and the error of the gradient "
        "or of the log-probs of a sample",
        "MiB at the peak beyond what was there before the call; the fresh gradient itself has "
        f"{mebibytes(first['gradient'])}.\nError: relative, in norm, against float64.",
        ["function"]
        + [f"{SHORT[name]}, MiB" for name in names]
        + [f"error, {SHORT[name]}" for name in names if name != "opdc_inplace"],
    )
    for case in cases:
        table.add_row(
            title(case),
            *(mebibytes(case["memory"].get(name)) for name in names),
            *(
                f"{case['gradient_error'][name]:.1e}" if name in case["gradient_error"] else MISSING
                for name in names
                if name != "opdc_inplace"
            ),
        )
    return table


def orders_table(result: dict[str, Any]) -> Table:
    records = result["orders"]
    names = [name for name in ("eager", "opdc") if name in records[0]]
    first = records[0]
    table = _table(
        f"{FUNCTIONS['topk'].title}: microseconds a row for rows in an adverse order "
        f"({first['rows']} rows, {workers(result, first)})",
        "×: over rows in random order",
        ["order", *(f"{SHORT[name]}, {r['dtype']}" for r in records for name in names)],
    )
    for order in records[0][names[0]]:
        cells = []
        for times_of in (record[name] for record in records for name in names):
            slower = times(times_of[order] / times_of["random"])
            cells.append(number(times_of[order]) + ("" if order == "random" else f" ({slower})"))
        table.add_row(order, *cells)
    return table


def overhead_table(result: dict[str, Any]) -> Table:
    dtypes = seen(result["overhead"], "dtype")
    names = [name for name in ("eager", "opdc") if name in result["overhead"][0]]
    rows, vocabulary = result.get("overhead_shape", (1, 32))
    table = _table(
        f"Overhead of a call: microseconds for {rows} × {vocabulary} logits",
        "",
        ["function", *(f"{SHORT[name]}, {dtype}" for dtype in dtypes for name in names)],
    )
    for function in seen(result["overhead"], "function"):
        of_function = {c["dtype"]: c for c in result["overhead"] if c["function"] == function}
        table.add_row(
            FUNCTIONS[function].title,
            *(number(of_function.get(dtype, {}).get(name)) for dtype in dtypes for name in names),
        )
    return table


def was_generated(result: dict[str, Any]) -> bool:
    return "microseconds" in (result.get("generate") or {})


def generate_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table of `generate`."""
    measured = result["generate"]
    plain = measured["microseconds"]["plain"]["median"]
    rows = []
    for name, found in measured["microseconds"].items():
        did = measured["blends"].get(name, {})
        split = [did.get(f"{part}_seconds") for part in ("student", "teacher", "sampling")]
        rows.append(
            [
                GENERATED[name],
                number(1e6 / found["median"]),
                times(found["median"] / plain),
                f"{did['student_forwards']} + {did['teacher_forwards']}" if did else MISSING,
                f"{did['accepted'] / did['drafted']:.1%}" if did.get("drafted") else MISSING,
                " + ".join(number(part, 2) for part in split) if did else MISSING,
            ]
        )
    headings = ["`generate`", "tokens/s", "time", "forwards", "accepted", "seconds inside"]
    return headings, rows


def generate_remark(result: dict[str, Any]) -> str:
    measured = result["generate"]
    return (
        f"{measured['model']}, {measured['vocabulary']:,} logits, the teacher as large and "
        f"{number(measured['divergence'], 2)} nats away; {measured['batch']} responses of "
        f"{measured['new_tokens']} tokens, ε = {measured['epsilon']}, drafts of "
        f"{measured['draft_length']}, {workers(result, measured)}. Forwards and "
        "seconds: of the student + of the teacher (+ of the sampling)."
    )


def generate_table(result: dict[str, Any]) -> Table:
    headings, rows = generate_rows(result)
    table = _table(
        "generate, end to end",
        generate_remark(result),
        [heading.replace("`", "") for heading in headings],
    )
    for row in rows:
        table.add_row(*(cell.replace("`", "") for cell in row))
    return table


def hidden_contenders(measured: dict[str, Any]) -> list[str]:
    present = {name for case in measured["cases"] for name in case["milliseconds"]}
    return [name for name in FROM_HIDDEN if name in present]


def hidden_rows(
    measured: dict[str, Any], cells: Callable[[Case, str], list[str]]
) -> list[list[str]]:
    """A row for each loss and size, and one more where opdc gives a sparse gradient too."""
    rows = []
    for case in measured["cases"]:
        for name, suffix in (("opdc", ""), ("opdc_sparse", ", sparse gradient of the head")):
            if name in case["milliseconds"] or name == "opdc":
                rows.append([title(case) + suffix, f"{case['size']:,}", *cells(case, name)])
    return rows


def hidden_times(measured: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: milliseconds, and how they compare with those of opdc."""
    others = hidden_contenders(measured)

    def cells(case: Case, name: str) -> list[str]:
        found = {key: value["median"] for key, value in case["milliseconds"].items()}
        mine, products = found.get(name), found["products"]
        return [
            number(products),
            number(mine),
            times(mine and mine / products),
            *(_with_ratio(found.get(other), mine) for other in others),
        ]

    columns = [FROM_HIDDEN[name] for name in others]
    headings = ["loss + gradients", "H", "bare products", "opdc", "over the products", *columns]
    return headings, hidden_rows(measured, cells)


def _with_ratio(value: float | None, mine: float | None) -> str:
    return number(value) + (f" ({times(value / mine)})" if value and mine else "")


def hidden_sizes(measured: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: MiB of the inputs, of the gradients, and what each needs beyond them."""
    others = hidden_contenders(measured)

    def cells(case: Case, name: str) -> list[str]:
        sizes = [case["inputs"], case["gradients"].get(name)]
        sizes += [case["memory"].get(key) for key in (name, *others)]
        return [number(size and size / 2**20) for size in sizes]

    columns = [FROM_HIDDEN[name] for name in others]
    headings = ["extra memory, MiB", "H", "(inputs)", "(gradients)", "opdc", *columns]
    return headings, hidden_rows(measured, cells)


def hidden_errors(measured: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    others = hidden_contenders(measured)

    def cells(case: Case, name: str) -> list[str]:
        found = [case["gradient_error"].get(key) for key in (name, *others)]
        return [MISSING if error is None else f"{error:.1e}" for error in found]

    return ["error", "H", "opdc", *(FROM_HIDDEN[name] for name in others)], hidden_rows(
        measured, cells
    )


def hidden_remarks(measured: dict[str, Any]) -> list[str]:
    used = [name for name in hidden_contenders(measured) if name in PACKAGES]
    versions = {name: measured["packages"][PACKAGES[name]] for name in used}
    others = "".join(f", {FROM_HIDDEN[name]} {version}" for name, version in versions.items())
    cases = [case for case in measured["cases"] if "teacher" in FUNCTIONS[case["function"]].takes]
    remarks = [
        f"Milliseconds, medians; float32, {measured['rows']:,} positions × "
        f"{measured['vocabulary']:,} ids, {plural(measured['threads'], 'thread')}, "
        f"{machine(measured)}{others}. In brackets: how many times as long as opdc.",
        "*Bare products*: the matrix products that gradients need from whole logits, into memory "
        "that is there before: one for each model with a head, two backward.",
        "Extra memory: the peak of the resident memory in a call, beyond inputs and gradients.",
    ]
    if cases:
        products = 4 * 2 * measured["rows"] * measured["vocabulary"] / 1e6
        rates = [c["size"] * products / c["milliseconds"]["products"]["median"] for c in cases]
        remarks[1] += f" They run at {number(statistics.median(rates))} GFLOP/s."
    return remarks


def machine(result: dict[str, Any]) -> str:
    facts = result["machine"]
    return (
        f"{facts['cpu']}, {facts['cpus']} CPUs, opdc {facts['opdc']} "
        f"({facts['instruction_set']}), torch {facts['torch']}"
    )


def device(result: dict[str, Any]) -> str:
    """The GPU in words."""
    facts = result["device"]
    return (
        f"{facts['name']} ({facts['memory'] / 2**30:.0f} GiB, capability {facts['capability']}), "
        f"CUDA {facts['cuda']}, driver of CUDA {facts['driver'] or 'unknown'}"
    )


def print_hidden(measured: dict[str, Any], console: Console) -> None:
    about, products, memory = hidden_remarks(measured)
    error = (
        "Relative, against float64: of the first hidden states in norm, of the head in the sum of "
        "its products with its gradient."
    )
    parts = (
        ("From hidden states: milliseconds", hidden_times, f"{about}\n{products}"),
        ("From hidden states: memory", hidden_sizes, memory),
        ("From hidden states: error of the gradients", hidden_errors, error),
    )
    for heading, part, caption in parts:
        headings, rows = part(measured)
        table = _table(heading, caption, headings)
        for row in rows:
            table.add_row(*row)
        console.print(table, "", highlight=False)


def print_tables(result: dict[str, Any], console: Console) -> None:
    if not console.is_terminal:
        console = Console(file=console.file, width=160)  # a file has no edge to fold lines at
    console.print(machine(result), highlight=False)
    cases = result["cases"]
    if on_gpu(result):
        for rows in seen(cases, "rows"):
            console.print(gpu_table(result, select(result, rows=rows)), "", highlight=False)
        if result["first_calls"]:
            console.print(first_table(result), "", highlight=False)
    groups = dict.fromkeys((c["rows"], c["threads"], c["dtype"]) for c in cases)
    for rows, threads, dtype in () if on_gpu(result) else groups:
        chosen = select(result, rows=rows, threads=threads, dtype=dtype)
        console.print(time_table(result, chosen), "", highlight=False)
    if cases and not on_gpu(result):
        console.print(
            "[dim]streams: of opdc with a fresh gradient, and in place; least: every matrix read "
            "or written once. ×: over opdc,\nin place where it can be. pages: what a fresh gradient"
            " costs over one in place, in units of empty().fill_().[/dim]\n"
        )
    for dtype in seen(cases, "dtype"):
        chosen = [case for case in principal(result) if case["dtype"] == dtype and case["memory"]]
        if chosen:
            console.print(memory_table(result, chosen), "", highlight=False)
    threads_over_one = thread_table(result) if cases else None
    if threads_over_one is not None:
        console.print(threads_over_one, "", highlight=False)
    if result.get("orders"):
        console.print(orders_table(result), "", highlight=False)
    if result["overhead"]:
        console.print(overhead_table(result), "", highlight=False)
    if was_generated(result):
        console.print(generate_table(result), "", highlight=False)
    if measured := result.get("hidden"):
        print_hidden(measured, console)
    for note, where in notes(result).items():
        console.print(f"[yellow]{note}[/yellow] ({where})", highlight=False)


def notes(result: dict[str, Any]) -> dict[str, str]:
    """What was left out or done otherwise, and where."""
    found: dict[str, list[str]] = {}
    for case in result["cases"]:
        threads = "" if on_gpu(result) else f" {case['threads']} thr."
        where = f"{title(case)} {case['dtype']} {case['rows']} rows{threads}"
        for note in case["notes"]:
            found.setdefault(note, []).append(where)
    for case in (result.get("hidden") or {"cases": []})["cases"]:
        for note in case["notes"]:
            found.setdefault(note, []).append(f"{title(case)}, hidden states of {case['size']}")
    if reason := (result.get("generate") or {}).get("left_out"):
        found["generate left out: " + reason] = ["end to end"]
    return {
        note: f"{where[0]} and {len(where) - 1} more" if len(where) > 1 else where[0]
        for note, where in found.items()
    }


# ---- a README --------------------------------------------------------------------------------


def sections(result: dict[str, Any]) -> dict[str, str]:
    """What a README shows, by the name of its markers."""
    found = {"benchmark-cuda" if on_gpu(result) else "benchmark": _benchmark_markdown(result)}
    if measured := result.get("hidden"):
        found["hidden"] = _hidden_markdown(measured)
    return {name: text for name, text in found.items() if text}


def _hidden_markdown(measured: dict[str, Any]) -> str:
    lines = []
    for headings, rows in (hidden_times(measured), hidden_sizes(measured)):
        lines += [*markdown_table(headings, rows, 1), ""]
    return "\n".join([*lines, *hidden_remarks(measured)])


def _benchmark_markdown(result: dict[str, Any]) -> str:
    """The principal cases, and `generate`."""
    parts = []
    if result["cases"]:
        parts.append((_gpu_markdown if on_gpu(result) else _principal_markdown)(result))
    if was_generated(result):
        headings, rows = generate_rows(result)
        parts.append("\n".join([*markdown_table(headings, rows, 1), "", generate_remark(result)]))
    return "\n\n".join(parts)


def markdown_table(headings: list[str], rows: Iterable[list[str]], labels: int) -> list[str]:
    """The lines of a table whose first columns are labels, the others numbers."""
    return [
        "| " + " | ".join(headings) + " |",
        "|" + "---|" * labels + "---:|" * (len(headings) - labels),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _gpu_markdown(result: dict[str, Any]) -> str:
    cases = principal(result)
    lines = [*markdown_table(*gpu_rows(result, cases), labels=2), ""]
    if result["first_calls"]:
        lines += [*markdown_table(*first_rows(result), labels=1), ""]
    return "\n".join([*lines, *gpu_remarks(result, cases)])


def _principal_markdown(result: dict[str, Any]) -> str:
    """The principal cases as a Markdown table, with the machine below."""
    cases = principal(result)
    names = contenders(result)
    compared = [name for name in ("eager", "compile") if name in names]

    columns: list[tuple[str, Callable[[Case], str]]] = [
        ("loss + gradient, or a sample", title),
        ("dtype", lambda case: str(case["dtype"])),
    ]
    for name in names:
        heading = _in_readme(name)
        columns.append((heading, lambda case, name=name: number(median(case, name))))  # type: ignore[misc]
    for name in compared:
        heading = f"vs {NAMES[name]}"
        columns.append((heading, lambda case, name=name: times(ratio(case, name))))  # type: ignore[misc]
    columns.append(("streams (least)", _streams))
    columns.append(("extra memory, MiB", _memory))

    lines = markdown_table(
        [heading for heading, _ in columns],
        ([cell(case) for _, cell in columns] for case in cases),
        labels=2,
    )
    first = cases[0]
    stream = statistics.median(case["stream"] for case in cases)
    remarks = [
        f"Microseconds a row, medians; {first['rows']:,} × {result['vocabulary']:,} logits, "
        f"{plural(first['threads'], 'thread')}, {machine(result)}.",
        f"A *stream* is half the time of copying one float32 row ({number(stream)} µs in this run);"
        " *least* is every matrix read or written once.",
        "Ratios and streams are those of `inplace=True` where the function has it; memory is what "
        "the call needs beyond its inputs: eager → opdc → in place.",
    ]
    if any(FUNCTIONS[case["function"]].law for case in cases):
        remarks.append(
            "Samplers give a token and its log-prob; the others by softmax and `multinomial`, "
            "after a sort for top-p and 20 bisections for the β of TRB."
        )
    for record in result.get("orders", []):
        if "opdc" in record:
            random, *others = record["opdc"].items()
            adverse = ", ".join(f"{order} {times(spent / random[1])}" for order, spent in others)
            remarks.append(
                f"Top {TOP} of {record['dtype']} rows in an adverse order, over random rows: "
                f"{adverse}."
            )
    return "\n".join([*lines, "", *remarks])


def _streams(case: Case) -> str:
    return f"{number(case['streams'].get(best(case)), 2)} ({number(case['least'], 2)})"


def _memory(case: Case) -> str:
    sizes = [case["memory"].get(name) for name in ("eager", "opdc", "opdc_inplace")]
    return " → ".join(f"{size / 2**20:,.0f}" for size in sizes if size is not None) or MISSING


def replace_sections(text: str, sections: dict[str, str]) -> str:
    """The text with whatever stands between the markers of each section replaced."""
    for name, table in sections.items():
        first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, begin, rest = text.partition(first)
        _, end, after = rest.partition(last)
        if not begin or not end:
            raise ValueError(f"{first} … {last} is missing")
        text = f"{before}{first}\n{table}\n{last}{after}"
    return text


# ---- the plot --------------------------------------------------------------------------------


def save_plot(result: dict[str, Any], path: Path) -> None:
    """Time a row of each contender beside the time that moving the matrices alone would take."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    cases = principal(result)
    names, dtypes = contenders(result), seen(cases, "dtype")
    functions = seen(cases, "function")
    figure, panels = plt.subplots(
        1,
        len(dtypes),
        figsize=(2.0 + 4.6 * len(dtypes), 1.6 + 0.46 * len(functions)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    thickness = 0.84 / len(names)
    for dtype, axes in zip(dtypes, panels[0], strict=True):
        chosen = [(functions.index(c["function"]), c) for c in cases if c["dtype"] == dtype]
        for offset, name in enumerate(names):
            axes.barh(
                [y + (offset - (len(names) - 1) / 2) * thickness for y, _ in chosen],
                [median(case, name) or float("nan") for _, case in chosen],
                thickness,
                label=NAMES[name],
                color=COLOURS[name],
            )
        for index, (y, case) in enumerate(chosen):
            axes.vlines(
                case["least"] * case["stream"],
                y - 0.45,
                y + 0.45,
                colors="black",
                linewidth=1.2,
                label=None if index else "reading and writing alone",
            )
            faster, length = ratio(case, "eager"), median(case, best(case))
            if faster is not None and length is not None:
                place = y + (names.index(best(case)) - (len(names) - 1) / 2) * thickness
                axes.annotate(
                    times(faster),
                    (max(length, case["least"] * case["stream"]), place),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
        axes.set_xscale("log")
        axes.margins(x=0.06, y=0.01)
        axes.set_title(dtype, fontsize=10)
        axes.set_xlabel("µs a row")
        axes.set_yticks(range(len(functions)), [FUNCTIONS[name].title for name in functions])
        axes.tick_params(axis="y", length=0, labelsize=8)
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0, 0].invert_yaxis()
    first = cases[0]
    where = (
        device(result)
        if on_gpu(result)
        else (f"{workers(result, first)}, {result['machine']['cpu']}")
    )
    figure.suptitle(
        f"Loss and gradient, or a sample: {first['rows']:,} × {result['vocabulary']:,} logits, "
        + where
        + ("\nnumbers: how many times faster than eager" if "eager" in names else ""),
        fontsize=10,
    )
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
