"""The configuration of nginx in docs/serving.md."""

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
    """The block for nginx in the documentation."""
    return re.search(r"^    location / \{\n.*?^    \}\n", PAGE.read_text(), re.M | re.S)[0]


def test_documented_limits_are_those_of_the_server():
    assert "client_max_body_size 4m;" in block()
    assert "proxy_read_timeout 610s;" in block()
    assert "proxy_buffering off;" in block()


@pytest.mark.slow
@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_nginx_passes_streams_bodies_and_ids_on(model_directory, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = tmp_path / "socket"
    location = block().replace("http://127.0.0.1:8000", f"http://unix:{path}:")
    user = "user root;" if os.geteuid() == 0 else ""  # who may open the socket
    config = CONFIG.format(user=user, folder=tmp_path, port=port, block=location)
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
                request_id = answer.headers["x-request-id"]
                large = http.post("/v1/completions", json={"prompt": "x" * (4 * 2**20 - 100)})
                assert large.status_code == 400
                assert "max_seq_len" in large.json()["error"]["message"]

            def found():
                lines = [json.loads(line) for line in server.lines]
                return [line for line in lines if line.get("request_id") == request_id]

            eventually(found)
            (line,) = found()
            assert re.fullmatch("[0-9a-f]{32}", request_id)  # nginx's
            assert line["client"] == "127.0.0.1"  # not the name of the socket
        finally:
            proxy.terminate()
            proxy.wait(SECONDS)


def is_listening(port):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True
