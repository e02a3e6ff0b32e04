"""Test configuration for experiments: JAX's default configuration, which users have."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments import cifar, files, idx_files, process, report


@pytest.fixture(scope="module", autouse=True)
def strict():
    """Override the library tests' strict float64 configuration."""


@pytest.fixture(autouse=True)
def allocator(monkeypatch):
    """Leave the allocator of the test process unchanged, because its settings cannot be reverted."""
    monkeypatch.setattr(process, "keep_freed_memory", lambda: False)


@pytest.fixture(scope="module", autouse=True)
def reports():
    """Write no report at the end of a training, because the figures take seconds. test_report.py overrides this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda folder, trained: folder / report.FILE)
        yield


@pytest.fixture
def served(tmp_path, monkeypatch) -> Iterator[Path]:
    """Serve a folder as the upstream from loopback, with an empty cache and no system copy."""
    folder = tmp_path / "upstream"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

        def end_headers(self) -> None:
            if self.path.startswith("/cut"):  # promise more than is sent
                self.send_header("Content-Length", "1000000")
            super().end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(files.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(idx_files, "SYSTEM_DIR", tmp_path / "no-system-copy")
    url = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setattr(idx_files, "FASHION_MNIST_URL", url)
    monkeypatch.setattr(cifar, "URL", url)
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()
