"""The whole way on the embedded data set: what `make demo` runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from clip_ray import pipeline
from clip_ray.config import Config
from clip_ray.data.shapes import write_shapes
from clip_ray.evaluation.report import Query, write_report
from clip_ray.pipeline import Say
from clip_ray.storage import Storage
from clip_ray.training.run import METRICS_KEY

SENTENCE = "a large red star at the top left"
QUERIES = 12
REPORT = Path("report.html")


def run_demo(config: Config, say: Say) -> dict[str, Any]:
    """Prepare, train, evaluate, search, report; returns the summary. A second run reuses all."""
    started = time.monotonic()
    source = Path(config.data.source or "")
    written = write_shapes(source)
    say(f"shapes: {source} " + ("is written" if written else "is there already"))
    with pipeline.session(config, say):
        pipeline.prepare_data(config, say)
        pipeline.train_model(config, say)
        results = pipeline.evaluate_model(config, say)
        images = source / "flickr30k-images"
        found = pipeline.search_images(config, SENTENCE, None, 5)
        say(f"search: {SENTENCE!r} finds {', '.join(hit.filename for hit in found)}")
        likes = pipeline.search_images(config, None, images / found[0].filename, 5)
        say(f"search: {found[0].filename} is like {', '.join(hit.filename for hit in likes[1:])}")
        log = _training_log(config)
        queries = _queries(config, images)
    metrics = results["zeroshot_retrieval"]
    write_report(REPORT, config, log, results, queries)
    summary: dict[str, Any] = {name: round(value, 4) for name, value in metrics.items()}
    summary["zero_shot_acc1"] = round(results["zeroshot_classification"]["acc1"], 4)
    summary["images_per_s"] = round(median(entry["images_per_s"] for entry in log), 1)
    summary["seconds"] = round(time.monotonic() - started, 1)
    summary |= {"storage": config.storage.root, "report": str(REPORT.resolve())}
    for name, value in summary.items():
        say(f"{name:28} {value}")
    return summary


def _training_log(config: Config) -> list[dict[str, Any]]:
    lines = Storage(config.run_root).read_bytes(METRICS_KEY).decode().splitlines()
    return [json.loads(line) for line in lines]


def _queries(config: Config, images: Path) -> list[Query]:
    """A dozen captions of the index's images with what they find."""
    run = Storage(config.run_root)
    index = pipeline.read_index(run)
    model = pipeline.load_model(run.uri("weights"))
    step = max(1, len(index.filenames) // QUERIES)
    rows = range(0, len(index.filenames), step)[:QUERIES]
    return [
        Query(
            index.captions[row][0],
            index.filenames[row],
            [
                (hit.filename, hit.score, (images / hit.filename).read_bytes())
                for hit in index.search(model.encode_text([index.captions[row][0]])[0], 5)
            ],
        )
        for row in rows
    ]
