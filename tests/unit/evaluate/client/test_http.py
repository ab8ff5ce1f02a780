"""The HTTP client over TLS: a server with a trusted certificate is queried; any other is unreachable, with the reason."""

import asyncio
import ssl

import pytest
import trustme

from grounding.evaluate.client.http import FairQueue, Pool, Unreachable

PICTURE = bytes(range(256)) * 4096  # more than fits into one write


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


async def echo(reader, writer):
    """Answer each request on a connection with the size of its body."""
    while head := await reader.readuntil(b"\r\n\r\n"):
        size = int(
            next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")).split(b":")[1]
        )
        body = await reader.readexactly(size)
        answer = str(len(body) if body.endswith(PICTURE[-9:] + b"}") else -1).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))
        await writer.drain()


async def body():
    return [b"{", PICTURE, b"}"]


async def ask(authority, host, times=1):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    connections = []

    async def serve(reader, writer):
        connections.append(writer)
        try:
            await echo(reader, writer)
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context, limit=1 << 16)
    port = server.sockets[0].getsockname()[1]
    pool = Pool(f"https://{host}:{port}/v1/chat/completions", FairQueue())
    try:
        answers = [await pool.post(body, {}, 20.0) for _ in range(times)]
    finally:
        pool.close()
        server.close()
    return answers, len(connections)


def test_a_trusted_server_gets_every_byte_over_one_connection(authority, tmp_path, monkeypatch):
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    answers, connections = asyncio.run(ask(authority, "localhost", 3))
    assert [(a.status, int(a.body)) for a in answers] == [(200, len(PICTURE) + 2)] * 3
    assert connections == 1


def test_an_unknown_authority_is_no_connection(authority):
    with pytest.raises(Unreachable, match="certificate verify failed"):
        asyncio.run(ask(authority, "localhost"))


def test_another_name_is_no_connection(authority, tmp_path, monkeypatch):
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with pytest.raises(Unreachable, match=r"certificate verify failed.*127\.0\.0\.1"):
        asyncio.run(ask(authority, "127.0.0.1"))
