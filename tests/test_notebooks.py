"""The notebooks of the package run from the first cell to the last, and draw what they promise.

`python tests/test_notebooks.py` runs them at full length and stores their outputs.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

import opdc

pytest.importorskip("trl")
pytest.importorskip("ipykernel")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
kernelspec = pytest.importorskip("jupyter_client.kernelspec")
manager = pytest.importorskip("jupyter_client.manager")

SOURCES = Path(__file__).parents[1] / "python" / "opdc" / "examples"
FIGURES = {"five_minutes": 10, "from_scratch": 3, "behaviour_policy": 6}
ABSOLUTE_PATH = re.compile(r"(?<![\w.*])/(?:home|root|tmp|usr|var|opt|work|Users)/|site-packages")
ENVIRONMENT = {
    "CI": "true",  # TRL would send telemetry
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # a widget of tqdm's that nothing here shows
}


def read(folder, name):
    return nbformat.read(folder / f"{name}.ipynb", as_version=4)


def execute(notebook, folder, **environment):
    """Run all cells in a kernel of this interpreter, in a folder."""
    # No folders of specifications: what remains is the kernel of the running interpreter.
    kernels = kernelspec.KernelSpecManager(kernel_dirs=[])
    nbclient.NotebookClient(
        notebook,
        km=manager.AsyncKernelManager(kernel_spec_manager=kernels),
        timeout=300,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    ).execute(cleanup_kc=True, env={**os.environ, **ENVIRONMENT, **environment})


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def figures(notebook):
    return sum("image/png" in output.get("data", ()) for output in outputs(notebook))


def test_all_notebooks_are_listed():
    assert {path.stem for path in SOURCES.glob("*.ipynb")} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_notebook_runs(name, tmp_path):
    # Of the installed package, which has to hold it.
    notebook = read(Path(opdc.__file__).parent / "examples", name)
    execute(notebook, tmp_path, OPDC_EXAMPLE_UPDATES="2")
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert figures(notebook) >= FIGURES[name]
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.mark.parametrize("name", FIGURES)
def test_stored_notebook_shows_its_figures_and_no_machine(name):
    notebook = read(SOURCES, name)
    nbformat.validate(notebook)
    assert figures(notebook) == FIGURES[name]
    assert notebook.metadata == METADATA
    assert (SOURCES / f"{name}.ipynb").stat().st_size < 1.5e6
    for cell in notebook.cells:
        assert not cell.metadata
        assert not ABSOLUTE_PATH.search(cell.source)
    for output in outputs(notebook):
        assert output.get("name") != "stderr"
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        assert not ABSOLUTE_PATH.search(text)
        assert " at 0x" not in text


METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def store(name):
    notebook = read(SOURCES, name)
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, folder)
    notebook.metadata = nbformat.from_dict(METADATA)
    nbformat.write(notebook, SOURCES / f"{name}.ipynb")
    print(f"{name}: {figures(notebook)} figures")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or FIGURES:
        store(chosen)
