"""The report needs nothing beside itself and shows what it was given."""

from pathlib import Path

from conftest import SHAPES_YAML

from clip_ray.config_file import load_config
from clip_ray.evaluation.report import Query, write_report


def test_report_is_self_contained(tmp_path: Path) -> None:
    log = [{"step": s, "loss": 5.0 - s, "scale": 14.0 + s} for s in range(3)]
    log[-1]["image_retrieval_recall@1"] = 0.5
    results = {"zeroshot_retrieval": {"image_retrieval_recall@1": 0.614}}
    query = Query("a <red> star", "1.jpg", [("1.jpg", 0.9, b"jpeg"), ("2.jpg", 0.8, b"jpeg")])
    write_report(tmp_path / "report.html", load_config(SHAPES_YAML), log, results, [query])
    page = (tmp_path / "report.html").read_text()
    assert "61.4 %" in page
    assert "a &lt;red&gt; star" in page
    assert page.count("data:image/jpeg;base64,") == 2
    assert page.count("<polyline") == 3
    assert "http" not in page
    assert "<script" not in page
