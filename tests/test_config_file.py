"""From YAML and overrides to a checked config, or to one report of all mistakes."""

import pytest
import yaml
from conftest import SHAPES_YAML

from clip_ray.config_file import dump_config, load_config, parse_config
from clip_ray.errors import ConfigError
from clip_ray.presets import MODEL_PRESETS


def test_overrides_are_typed() -> None:
    config = load_config(SHAPES_YAML, ["optim.lr=1e-3", "optim.grad_clip_norm=null"])
    assert config.optim.lr == 1e-3
    assert config.optim.grad_clip_norm is None


def test_dump_reads_back_to_an_equal_config() -> None:
    config = load_config(SHAPES_YAML)
    assert parse_config(yaml.safe_load(dump_config(config)), "dump") == config


@pytest.mark.parametrize("preset", MODEL_PRESETS)
def test_presets_resolve_and_their_fields_can_be_refined(preset: str) -> None:
    config = load_config(SHAPES_YAML, [f"model.preset={preset}", "model.embed_dim=64"])
    assert config.model.embed_dim == 64


def test_all_mistakes_come_in_one_report() -> None:
    mistakes = ["optim.lrr=1", "optim.lr=-1", "model.image.siz=3", "nonsense.x=1"]
    with pytest.raises(ConfigError) as caught:
        load_config(SHAPES_YAML, mistakes)
    report = str(caught.value)
    assert "4 errors" in report
    assert "optim.lrr: unknown key; did you mean 'lr'?" in report
    assert "optim.lr is -1: input should be greater than 0" in report
    assert "model.image.siz: unknown key; did you mean 'size'?" in report
    assert "nonsense: unknown key" in report


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.global_batch=33", "cluster.num_workers (2) must divide it; take 32 or 34"),
        ("train.micro_batch=5", "must divide train.global_batch / cluster.num_workers"),
        ("loss.temperature=0.001", "1 / temperature must be at most max_scale"),
        ("model.preset=vit-b-61", "did you mean 'vit-b-16'?"),
        ("storage.root=/tmp/x", "storage.root is '/tmp/x'"),
        ("evaluation.templates=[a photo]", "needs {} for the class"),
        ("optim.lr", "must read section.field=value"),
    ],
)
def test_each_mistake_names_field_rule_and_fix(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(SHAPES_YAML, [override])
    assert said in str(caught.value)
