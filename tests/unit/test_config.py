"""Config: unknown keys are errors that name their path; later sources win."""

from pathlib import Path

import msgspec
import pytest

from seer_async.config import Config, merge, parse_setting, read_toml, resolve, to_toml_tree
from seer_async.errors import ConfigError
from seer_async.policies import find_policy, policy_names


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"rollout": {"x": 1}}, "'rollout.x'"),
        ({"nothing": {}}, "'nothing'"),
        ({"rollout": {"n": 0}}, "rollout.n must be at least 1"),
        ({"rollout": {"n": "many"}}, "'rollout.n': Expected `int`"),
        ({"sampling": {"structured_outputs": {}}}, "sampling.structured_outputs is not supported: the grammar"),
        ({"sampling": {"temperature": float("nan")}}, "sampling.temperature must be"),
        ({"sampling": {"max_tokens": 4, "min_tokens": 5}}, "sampling.min_tokens must be"),
        ({"fleet": {"servers": [1]}}, r"'fleet.servers\[0\]'"),
    ],
)
def test_errors_name_the_key(tree: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve(tree)


def test_later_sources_win_and_keep_the_rest() -> None:
    config = resolve({"rollout": {"n": 2, "chunk_size": 3}}, parse_setting("rollout.n=5"), {"sampling": {"top_p": 0.5}})
    assert (config.rollout.n, config.rollout.chunk_size, config.sampling.top_p) == (5, 3, 0.5)


def test_settings_are_toml_or_bare_strings() -> None:
    settings = ["fleet.servers=['a', 'b']", "scheduler.policy=oracle", "output.trace=false"]
    assert merge(*map(parse_setting, settings)) == {
        "fleet": {"servers": ["a", "b"]},
        "scheduler": {"policy": "oracle"},
        "output": {"trace": False},
    }
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        parse_setting("n=3")


def test_toml_faults_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[rollout\n")
    with pytest.raises(ConfigError, match=r"c\.toml is not valid TOML"):
        read_toml(tmp_path / "c.toml")
    with pytest.raises(ConfigError, match="cannot read config"):
        read_toml(tmp_path / "none.toml")


def test_the_saved_config_resolves_to_itself() -> None:
    config = resolve({"sampling": {"logit_bias": {5: 1.5}, "stop": ["x"]}, "rollout": {"n": 3}})
    assert resolve(to_toml_tree(config)) == config
    assert resolve(msgspec.json.decode(msgspec.json.encode(to_toml_tree(config)))) == config  # as in run.json
    assert resolve() == Config()


def test_policies_are_found_by_name_and_by_class() -> None:
    assert {"seer", "no-context", "group-round-robin", "oracle", "partial"} <= set(policy_names())
    for name in policy_names():
        assert find_policy(name).name == name
    assert find_policy("seer_async.policies.seer:Seer").name == "seer"
    with pytest.raises(ConfigError, match="choose one of"):
        find_policy("best")
