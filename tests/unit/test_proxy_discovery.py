"""The proxy's engines come and go: by an operator's order, by DNS, by Kubernetes' labels; TLS."""

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from test_proxy_app import ANSWER, TEXT, Engine, answers, hangs, prefills, rig, run

from kvconnect.errors import ConfigError
from kvconnect.proxy.app import start
from kvconnect.proxy.config import make_config
from kvconnect.proxy.engines import discovery
from kvconnect.proxy.engines.discovery import Discovery, finder
from kvconnect.proxy.engines.pool import Pool
from kvconnect.proxy.engines.session import EngineSession, UnreachedError

KEY = {"Authorization": "Bearer operator"}


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.01)


# --- the operator ------------------------------------------------------------------------------


async def order(r, method: str = "POST", **fields: Any) -> tuple[int, dict[str, Any]]:
    how = {"params": fields} if method == "DELETE" else {"json": fields}
    async with r.session.request(method, "/admin/engines", headers=KEY, **how) as response:
        return response.status, await response.json()


def test_an_operator_adds_drains_and_removes_engines():
    async def scenario() -> None:
        first, second = Engine(answers), Engine(answers)
        async with (
            second.serving(),
            rig([Engine(prefills)], [first], admin_key="operator") as r,
        ):
            status, shown = await order(r, role="decode", url=second.url + "/")
            assert status == 200
            assert [state["url"] for state in shown["decode"]] == [first.url, second.url]
            for _ in range(4):
                assert await r.ask() == (200, ANSWER)
            assert (len(first.bodies), len(second.bodies)) == (2, 2)

            status, shown = await order(r, role="decode", url=first.url, drain=True)
            assert [state["url"] for state in shown["decode"]] == [second.url]
            await r.ask()
            assert (len(first.bodies), len(second.bodies)) == (2, 3)

            status, shown = await order(r, "DELETE", role="decode", url=second.url)
            assert (status, shown["decode"]) == (200, [])
            assert (await r.ask())[0] == 503

    run(scenario())


def test_an_engine_that_drains_ends_what_it_has_and_one_that_is_removed_does_not():
    async def scenario() -> None:
        d, other = Engine(hangs), Engine(answers)
        async with rig([Engine(prefills)], [d, other], admin_key="operator") as r:
            asking = asyncio.create_task(r.ask())
            await d.reached.wait()
            _, shown = await order(r, role="decode", url=d.url, drain=True)
            assert (shown["decode"][0]["draining"], shown["decode"][0]["in_flight"]) == (True, 1)
            assert not asking.done()
            await order(r, "DELETE", role="decode", url=d.url)
            assert await asking == (200, ANSWER)
            assert len(other.bodies) == 1

    run(scenario())


def test_orders_need_the_operators_key_and_make_sense():
    async def scenario() -> None:
        good = {"role": "decode", "url": "http://h:1"}
        async with rig(
            [Engine(prefills)], [Engine(answers)], admin_key="operator", api_key="clients"
        ) as r:
            for key in ({}, {"Authorization": "Bearer clients"}):
                async with r.session.post("/admin/engines", json=good, headers=key) as refused:
                    assert refused.status == 401
            for bad in ({"role": "other"}, {"url": "h:1"}, {"drian": True}, {"url": 3}):
                assert (await order(r, **good | bad))[0] == 400
            assert (await order(r, **good, drain=True))[0] == 404
            assert (await order(r, "DELETE", **good))[0] == 404
            async with r.session.get("/admin/engines", headers=KEY) as response:
                assert len((await response.json())["decode"]) == 1
        async with rig([Engine(prefills)], [Engine(answers)]) as r:
            assert (await order(r, **good))[0] == 404, "not served without a key"

    run(scenario())


@pytest.mark.parametrize("path", ["/ui", "/ui/events", "/admin/engines"])
def test_what_is_not_there_without_an_admin_key_says_so(path):
    """It used to be "not served by this proxy", as if there were no such page."""

    async def scenario() -> None:
        async with rig([Engine(prefills)], [Engine(answers)]) as r, r.session.get(path) as response:
            assert response.status == 404
            assert "--admin-key" in (await response.json())["error"]["message"]

    run(scenario())


# --- sources -----------------------------------------------------------------------------------


def found_by(pool: Pool, *answers: Any) -> Discovery:
    """A source that says these in turn; what is an exception it raises."""
    left = list(answers)

    async def find() -> set[str]:
        said = left.pop(0)
        if isinstance(said, Exception):
            raise said
        return said

    return Discovery(pool, [find])


def urls(pool: Pool) -> set[str]:
    return {state.url for state in pool.states()}


@pytest.fixture
def pool():
    return Pool([], lambda: 0.0)


def test_engines_that_are_found_join_and_those_that_are_gone_drain(pool):
    async def scenario() -> None:
        watch = found_by(pool, {"http://a"}, {"http://a", "http://b"}, {"http://b"})
        await watch.look()
        assert urls(pool) == {"http://a"}
        await watch.look()
        assert urls(pool) == {"http://a", "http://b"}
        with pool.busy("http://a"):
            await watch.look()
            assert pool.candidates() == ("http://b",)
            assert urls(pool) == {"http://a", "http://b"}, "it has a request yet"
        assert urls(pool) == {"http://b"}

    run(scenario())


def test_a_source_that_cannot_be_asked_changes_nothing(pool, caplog):
    async def scenario() -> None:
        watch = found_by(pool, {"http://a"}, OSError("no DNS"), OSError("no DNS"), {"http://b"})
        for _ in range(3):
            await watch.look()
        assert urls(pool) == {"http://a"}
        assert caplog.text.count("no DNS") == 1, "once an outage"
        await watch.look()
        assert urls(pool) == {"http://b"}

    run(scenario())


def test_what_an_operator_drained_stays_so_while_it_is_found(pool):
    async def scenario() -> None:
        watch = found_by(pool, {"http://a"}, {"http://a"}, {"http://a"}, set(), {"http://a"})
        await watch.look()
        with pool.busy("http://a"):
            pool.drain("http://a")
            await watch.look()
            assert pool.candidates() == ()
        await watch.look()
        assert urls(pool) == set()
        await watch.look()
        await watch.look()
        assert urls(pool) == {"http://a"}, "it went, and came anew"

    run(scenario())


def test_a_names_addresses_are_engines(monkeypatch):
    """Through a real proxy; the name's address changes while it runs."""
    monkeypatch.setattr(discovery, "LOOK_EVERY_S", 0.02)
    addresses = ["127.0.0.1"]

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        assert host == "decode.svc"
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [
            (family, socket.SOCK_STREAM, 6, "", (address, port))
            for family, address in zip(families, addresses, strict=True)
        ]

    async def scenario() -> None:
        d, p = Engine(answers), Engine(prefills)
        async with d.serving(), p.serving():
            asyncio.get_running_loop().getaddrinfo = as_async(resolve)  # type: ignore[method-assign]
            port = d.url.rsplit(":", 1)[1]
            config = make_config(prefill=[p.url], decode=[f"dns+http://decode.svc:{port}"])
            runner = await start(config, "127.0.0.1", 0)
            where = f"http://127.0.0.1:{runner.addresses[0][1]}"
            async with aiohttp.ClientSession(where) as session:

                async def engines() -> list[str]:
                    async with session.get("/health") as response:
                        return [state["url"] for state in (await response.json())["decode"]]

                while await engines() != [d.url]:
                    await asyncio.sleep(0.01)
                async with session.post(TEXT, json={"prompt": "p"}) as response:
                    assert (response.status, await response.read()) == (200, ANSWER)
                addresses[:] = ["::1"]
                while await engines() != [f"http://[::1]:{port}"]:
                    await asyncio.sleep(0.01)
            await runner.cleanup()

    run(scenario())


def as_async(resolve: Callable[..., list[Any]]) -> Callable[..., Any]:
    real = asyncio.get_running_loop().getaddrinfo

    async def getaddrinfo(host: Any, port: Any, **how: Any) -> list[Any]:
        if host == "decode.svc":
            return resolve(host, port, **how)
        return await real(host, port, **how)

    return getaddrinfo


# --- Kubernetes --------------------------------------------------------------------------------


def certificate(folder: Path) -> Path:
    """A certificate of 127.0.0.1 that signs itself, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    path = folder / "tls.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


def pod(ip: str, ready: bool = True, going: bool = False) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "p",
            **({"deletionTimestamp": "2026-01-01T00:00:00Z"} if going else {}),
        },
        "status": {
            "podIP": ip,
            "conditions": [
                {"type": "Initialized", "status": "True"},
                {"type": "Ready", "status": "True" if ready else "False"},
            ],
        },
    }


@contextlib.asynccontextmanager
async def kubernetes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *pods: dict[str, Any]
) -> AsyncIterator[list[web.Request]]:
    """An API server that has these pods, and our service account's files."""
    asked: list[web.Request] = []

    async def list_pods(request: web.Request) -> web.Response:
        asked.append(request)
        if request.headers["Authorization"] != "Bearer token":
            return web.Response(status=403)
        return web.json_response({"kind": "PodList", "items": pods})

    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate(folder))
    (folder / "ca.crt").write_bytes((folder / "tls.pem").read_bytes())
    (folder / "token").write_text("token\n")
    (folder / "namespace").write_text("ours")
    app = web.Application()
    app.router.add_get("/{any:.*}", list_pods)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(runner.addresses[0][1]))
    monkeypatch.setenv("KVCONNECT_SERVICE_ACCOUNT", str(folder))
    try:
        yield asked
    finally:
        await runner.cleanup()


def test_pods_that_are_ready_are_engines(tmp_path, monkeypatch):
    async def scenario() -> None:
        pods = (
            pod("10.0.0.1"),
            pod("fd00::1"),
            pod("10.0.0.3", ready=False),
            pod("10.0.0.4", going=True),
            {"metadata": {}, "status": {"phase": "Pending"}},
        )
        async with kubernetes(tmp_path, monkeypatch, *pods) as asked:
            found = await finder("k8s://vllm/app=decode,model=a:8200")()
            assert found == {"http://10.0.0.1:8200", "http://[fd00::1]:8200"}
            assert asked[0].path == "/api/v1/namespaces/vllm/pods"
            assert asked[0].query == {"labelSelector": "app=decode,model=a"}
            await finder("k8s:///app=decode:8200")()
            assert asked[1].path == "/api/v1/namespaces/ours/pods"

    run(scenario())


def test_an_api_server_that_refuses_is_no_empty_list(tmp_path, monkeypatch):
    async def scenario() -> None:
        async with kubernetes(tmp_path, monkeypatch):
            (tmp_path / "token").write_text("old")
            with pytest.raises(OSError, match="403: may the service account list pods"):
                await finder("k8s://vllm/app=decode:8200")()

    run(scenario())


def test_outside_of_kubernetes_that_is_said(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(OSError, match="no pod of Kubernetes"):
        asyncio.run(finder("k8s://vllm/app=decode:8200")())


@pytest.mark.parametrize(
    "url",
    ["dns+http://name", "dns+http://:80", "dns+http://n:80/path", "k8s://ns/app=x", "k8s://ns/:80"],
)
def test_a_source_that_names_no_engines_is_refused_at_start(url):
    with pytest.raises(ConfigError, match="names no engines"):
        make_config(prefill=["http://p"], decode=[url])


# --- TLS and several workers -------------------------------------------------------------------


@pytest.mark.parametrize("trusted", [True, False])
def test_engines_over_tls_are_asked_only_if_they_are_who_they_say(trusted, tmp_path, monkeypatch):
    pem = certificate(tmp_path)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(pem)

    async def scenario() -> None:
        asked: list[web.Request] = []

        async def healthy(request: web.Request) -> web.Response:
            asked.append(request)
            return web.Response(text="x" * 100_000)

        app = web.Application()
        app.router.add_get("/health", healthy)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        url = f"https://127.0.0.1:{runner.addresses[0][1]}"
        with contextlib.closing(EngineSession(10, None)) as engines:
            if trusted:
                for _ in range(2):
                    answer, body = await engines.whole("GET", url, "/health", 10)
                    assert (answer.status, len(body)) == (200, 100_000)
                assert len({request.transport for request in asked}) == 1
            else:
                with pytest.raises(UnreachedError, match="certificate verify failed"):
                    await engines.whole("GET", url, "/health", 10)
                assert not asked
        await runner.cleanup()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_clients_come_over_tls(tmp_path):
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers)
        pem = certificate(tmp_path)
        trusted = ssl.create_default_context(cafile=str(pem))
        async with p.serving(), d.serving():
            config = make_config(prefill=[p.url], decode=[d.url], ssl_certfile=str(pem))
            runner = await start(config, "127.0.0.1", 0)
            url = f"https://127.0.0.1:{runner.addresses[0][1]}{TEXT}"
            async with (
                aiohttp.ClientSession() as session,
                session.post(url, json={"prompt": "p"}, ssl=trusted) as response,
            ):
                assert (response.status, await response.read()) == (200, ANSWER)
            await runner.cleanup()

    run(scenario())


def test_several_proxies_share_a_port_where_they_are_told_to():
    async def scenario() -> None:
        config = make_config(prefill=["http://p"], decode=["http://d"], reuse_port=True)
        first = await start(config, "127.0.0.1", 0)
        second = await start(config, "127.0.0.1", first.addresses[0][1])
        assert first.addresses == second.addresses
        alone = make_config(prefill=["http://p"], decode=["http://d"])
        with pytest.raises(OSError, match="in use"):
            await start(alone, "127.0.0.1", first.addresses[0][1])
        await first.cleanup()
        await second.cleanup()

    run(scenario())
