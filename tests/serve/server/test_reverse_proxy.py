"""The page for operators has a block for nginx: it does what the page says."""

import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.serve.server_process import SECONDS, events, eventually, serving

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
PAGE = Path(__file__).parents[3] / "docs" / "serving.md"
CONFIG = """
{user}
daemon off;
pid {folder}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        {block}
    }}
}}
"""


def block():
    """nginx's block of the page."""
    return re.search(r"^    location / \{\n.*?^    \}\n", PAGE.read_text(), re.M | re.S)[0]


def test_the_page_s_limits_are_those_of_the_server():
    """4 MiB, and a time above that of a request."""
    assert "client_max_body_size 4m;" in block()
    assert "proxy_read_timeout 610s;" in block()
    assert "proxy_buffering off;" in block()


@pytest.mark.slow
@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_nginx_passes_streams_bodies_and_ids_on(model_directory, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = tmp_path / "socket"
    given = block().replace("http://127.0.0.1:8000", f"http://unix:{path}:")
    user = "user root;" if os.geteuid() == 0 else ""  # whom the socket lets in
    config = CONFIG.format(user=user, folder=tmp_path, port=port, block=given)
    (tmp_path / "nginx.conf").write_text(config)
    url = f"http://127.0.0.1:{port}"
    with serving(model_directory, "--uds", path) as server:
        command = [NGINX, "-p", tmp_path, "-c", tmp_path / "nginx.conf"]
        proxy = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            eventually(lambda: is_listening(port))
            with httpx.Client(base_url=url, timeout=SECONDS) as http:
                body = {"prompt": "x", "max_tokens": 30, "stop_at_eos": False, "stream": True}
                with http.stream("POST", "/v1/completions", json=body) as answer:
                    assert len(events(answer)) > 1
                own = answer.headers["x-request-id"]
                large = http.post("/v1/completions", json={"prompt": "x" * (4 * 2**20 - 100)})
                assert large.status_code == 400
                assert "max_seq_len" in large.json()["error"]["message"]
            eventually(
                lambda: sum("x-request-id" not in its and own in its for its in server.lines)
            )
            lines = [json.loads(line) for line in list(server.lines)]
            (line,) = [line for line in lines if line.get("request_id") == own]
            assert re.fullmatch("[0-9a-f]{32}", own)  # nginx's
            assert line["client"] == "127.0.0.1"  # and no name of a socket
        finally:
            proxy.terminate()
            proxy.wait(SECONDS)


def is_listening(port):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True
