"""The service's OpenAPI document, and whether the service does what it says (``make test-browser`` brings schemathesis)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from test_serve import Running

pytestmark = pytest.mark.onnxruntime


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="make test-browser runs this")
def test_the_service_does_what_its_document_says(engine_folder: Path, tmp_path: Path) -> None:
    running = Running(engine_folder)
    # No schema tells what an image is, so that what fits the document may be refused all the same.
    options = ["--max-examples", "20", "--seed", "1", "--exclude-checks", "positive_data_acceptance", "--no-color"]
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{running.url}/openapi.json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    running.close()
    assert done.returncode == 0, done.stdout
