# SPDX-License-Identifier: BSD-3-Clause
"""``python -m bench``: the side-by-side. ``docs/benchmarks.md`` explains it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import adapters, calm, forms, linear, machine, report, targets
from .cases import select
from .isolate import ROOT
from .measure import Record
from .sections import SECTIONS, Job, Settings


def parser() -> argparse.ArgumentParser:
    names = [*dict.fromkeys((*adapters.ADAPTERS, *forms.ADAPTERS, *linear.ADAPTERS))]
    parse = argparse.ArgumentParser(prog="softce bench", description=__doc__)
    parse.add_argument("patterns", nargs="*", help='cases whose id contains one of these, as "512x32768 float32"')
    parse.add_argument(
        "--quick", action="store_true", help="small shapes and short timings: a check, not a measurement"
    )
    parse.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)}",
    )
    parse.add_argument(
        "--contestants", nargs="+", choices=names, default=[], metavar="NAME", help=f"of {', '.join(names)}"
    )
    parse.add_argument("--seconds", type=float, help="timed per case, all contestants together (4; quick: 0.2)")
    parse.add_argument(
        "--patience",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="a case waits for so long, in all, before samples taken while something shares the core (0)",
    )
    parse.add_argument("--threads", type=int, nargs="+", default=[1], help="thread counts of the logits section (1)")
    parse.add_argument(
        "--no-page-faults",
        action="store_true",
        help="the logits section with an allocator that keeps its memory, for every contestant alike",
    )
    parse.add_argument(
        "--out", type=Path, help="folder of the results (bench/results/MACHINE; quick: bench-out/MACHINE)"
    )
    parse.add_argument("--merge", action="store_true", help="keep the records of an earlier run that this one lacks")
    parse.add_argument("--report-only", action="store_true", help="make tables and plots anew from the JSON file there")
    parse.add_argument("--list", action="store_true", help="print the measurements and stop")
    parse.add_argument("--check", action="store_true", help="exit with 1 where a figure to reach is missed")
    return parse


def plan(settings: Settings, sections: Sequence[str], patterns: Sequence[str]) -> list[Job]:
    jobs = [job for section in sections for job in SECTIONS[section](settings)]
    wanted = {case.id for case in select([job.case for job in jobs], patterns)}
    return [job for job in jobs if job.case.id in wanted]


def document_of(records: Sequence[Record], settings: Settings, facts: dict[str, Any]) -> dict[str, Any]:
    verdicts = targets.evaluate(records, targets.TARGETS, facts)
    return {
        "machine": facts,
        "settings": dataclasses.asdict(settings),
        "records": list(records),
        "targets": [verdict.as_json() for verdict in verdicts],
    }


def write(document: dict[str, Any], folder: Path) -> None:
    """JSON at once, so that an interrupted run loses nothing; tables beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "results.json.part"
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(folder / "results.json")


def write_report(document: dict[str, Any], folder: Path) -> None:
    from . import plots

    try:
        made = plots.draw(document, folder)
    except ImportError as missing:
        print(f"no plots: {missing}", file=sys.stderr)
        made = []
    (folder / "README.md").write_text(report.markdown(document, made))


def _key(record: Record) -> tuple[str, str]:
    return record["section"], record["case"]["id"]


def run(jobs: Sequence[Job], settings: Settings, folder: Path, kept: Sequence[Record]) -> dict[str, Any]:
    from tqdm import tqdm

    calm.remember(settings.patience, kept)
    facts = machine.facts()
    if facts["load_average"] > 0.5:
        print(f"note: the machine is busy (load {facts['load_average']:.1f}); ratios will be noisy", file=sys.stderr)
    records = {_key(record): record for record in kept}
    bar = tqdm(total=len(jobs), unit="case", smoothing=0.1)
    for job in jobs:
        bar.set_description(f"{job.section} {job.case.id}")
        record = job.run(progress=lambda done, total: bar.set_postfix_str(f"round {done}/{total}"))
        record.update(
            section=job.section, commit=facts["commit"], at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        )
        record["load_average"] = os.getloadavg()[0]
        records[_key(record)] = record
        write(document_of(list(records.values()), settings, facts), folder)
        bar.update()
    bar.close()
    return document_of(list(records.values()), settings, facts)


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    cores = machine.facts()["cores"]
    settings = Settings(
        seconds=args.seconds or (0.2 if args.quick else 4.0),
        threads=tuple(args.threads),
        scaling=(1, 2) if cores > 1 else (1,),
        quick=args.quick,
        contestants=tuple(args.contestants),
        page_faults="none" if args.no_page_faults else "default",
        patience=args.patience,
    )
    folder = args.out or ROOT / ("bench-out" if args.quick else "bench/results") / machine.slug(machine.facts())
    sections = ["logits"] if args.no_page_faults else args.sections
    jobs = plan(settings, sections, args.patterns)
    if args.list:
        print(*(f"{job.section:15s} {job.case.id}" for job in jobs), sep="\n")
        return 0
    before = folder / "results.json"
    if args.report_only and not before.exists():
        raise SystemExit(f"softce bench: no results to report on: {before} does not exist")
    earlier = json.loads(before.read_text()) if (args.merge or args.report_only) and before.exists() else None
    if args.report_only:
        document = earlier
        document["targets"] = document_of(earlier["records"], settings, earlier["machine"])["targets"]
    else:
        document = run(jobs, settings, folder, earlier["records"] if earlier else [])
    write(document, folder)
    write_report(document, folder)
    print(report.targets_block(document))
    print(f"\nresults: {folder}")
    return int(args.check and any(verdict["status"] == "missed" for verdict in document["targets"]))


if __name__ == "__main__":
    sys.exit(main())
